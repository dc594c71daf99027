"""Trains under Lightning's strategies in several processes; the tests compare the final results of every rank."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from helpers import LitTiny, loader, tiny_gpt, token_batches, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_muonclip import MuonClipCallback

STEPS, SAVED, KILLED = 10, 5, 7  # of a run, before its checkpoint, and before one rank is killed

#: Timeout in seconds of a collective, in a run in which one rank is killed.
PATIENCE = 20


class LitSharded(LitTiny):
    """Shards itself under FSDP2."""

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            for layer in self.model.layers:
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


@dataclass(frozen=True)
class Run:
    """A run that saves after :data:`SAVED` steps, or resumes from such a checkpoint.

    Attributes:
        name: Names its checkpoint.
        strategy: ``"ddp"``, ``"fsdp2"`` with full checkpoints, ``"fsdp2 sharded"`` with a folder of shards, or ``"auto"``.
        resume: The name of the run to resume; the resumed run saves nothing.
        steps: Total number of steps.
        killed: Whether rank 1 is killed during the run.
        plain: Trains without MuonClip.
        groups: How AdamW's parameters are grouped.
        options: Arguments of the callback.
    """

    name: str
    strategy: str
    resume: str | None = None
    steps: int = STEPS
    killed: bool = False
    plain: bool = False
    groups: Callable[[LitSharded], Any] = LitSharded.parameters
    options: tuple[tuple[str, Any], ...] = ()


def projections_apart(lit: LitSharded) -> list[dict[str, Any]]:
    """Muon takes all parameters of the first group."""
    return [group_of(lit, "proj", 0.1), group_of(lit, "norm", 0.0), group_of(lit, "embed", 0.0)]


def two_of_projections(lit: LitSharded) -> list[dict[str, Any]]:
    return [group_of(lit, "mlp", 0.1), group_of(lit, "_proj", 0.1, "mlp"), group_of(lit, "norm", 0.0)]


def group_of(lit: LitSharded, part: str, weight_decay: float, but: str = "-") -> dict[str, Any]:
    params = [p for name, p in lit.named_parameters() if part in name and but not in name]
    return {"params": params, "weight_decay": weight_decay}


class Tokens(pl.LightningDataModule):
    """A rank's share of a batch of 4 sequences, the same whatever the number of ranks; a resumed run gets the rest."""

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        shares = token_batches(STEPS, batch_size=4).chunk(self.trainer.world_size, dim=1)
        return _Rest(loader(shares[self.trainer.global_rank].contiguous()), self.trainer)


class _Rest:
    """Serves the batches that a run has not seen yet; stateful, so that Lightning relies on it."""

    def __init__(self, batches: Any, fit: pl.Trainer) -> None:
        self.batches, self.fit = batches, fit

    def __iter__(self) -> Any:
        return iter(list(self.batches)[self.fit.global_step :])

    def __len__(self) -> int:
        return len(self.batches)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Kill(pl.Callback):
    """Kills rank 1 with SIGKILL."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)


def checkpoint_of(name: str, folder: Path) -> Path:
    return folder / f"{name}-{SAVED}.ckpt"


def strategy_of(name: str, ranks: int, patience: timedelta) -> Any:
    if name == "ddp":
        return pl.strategies.DDPStrategy(timeout=patience)
    if name.startswith("fsdp2"):
        return pl.strategies.ModelParallelStrategy(ranks, 1, name.endswith("sharded"), timeout=patience)
    return name


def train(run: Run, ranks: int, folder: Path) -> dict[str, Any]:
    """The final state of a rank, or the error that ended it."""
    torch.manual_seed(0)
    lit = LitSharded(tiny_gpt(), lambda _: torch.optim.AdamW(run.groups(lit), lr=3e-3), schedule=True)
    callback = MuonClipCallback(threshold=1.0, dtype=torch.float32, **dict(run.options))
    callbacks: list[pl.Callback] = [] if run.plain else [callback]
    if run.resume is None:
        callbacks.append(
            ModelCheckpoint(
                folder, f"{run.name}-{{step}}", every_n_train_steps=SAVED, save_top_k=-1, auto_insert_metric_name=False
            )
        )
    if run.killed:
        callbacks.append(Kill())
    fit = trainer(
        callbacks,
        max_steps=run.steps,
        strategy=strategy_of(run.strategy, ranks, timedelta(seconds=PATIENCE if run.killed else 200)),
        devices=ranks,
        use_distributed_sampler=False,
        enable_checkpointing=run.resume is None,
    )
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit.fit(lit, datamodule=Tokens(), ckpt_path=run.resume and checkpoint_of(run.resume, folder))
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        if run.killed:
            raise
        return {"error": f"{type(error).__name__}: {error}"}
    weights = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in lit.named_parameters()}
    return {
        "weights": {name: p.detach().clone() for name, p in weights.items()},
        "clips": None if callback.qk_clip is None else callback.qk_clip.clips,
        "warnings": [str(warning.message) for warning in caught],
        "rates": [group["lr"] for optimizer in fit.optimizers for group in optimizer.param_groups],
    }


def train_all(runs: list[Run], ranks: int, folder: Path) -> dict[str, dict[str, Any]]:
    return {run.name: train(run, ranks, folder) for run in runs}
