"""Trains 10 steps under one of Lightning's strategies on 2 CPU processes; every rank writes down what it has.

python worker.py STRATEGY FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import LitTiny, loader, tiny_gpt, token_batches, trainer

from lightning_muonclip import MuonClipCallback


class Calls(TorchDispatchMode):
    """Names of all operators called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class WatchedCallback(MuonClipCallback):
    """Lists the operators of the last ``on_before_optimizer_step``."""

    calls: list[str]

    def on_before_optimizer_step(self, *args: Any) -> None:
        with Calls() as calls:
            super().on_before_optimizer_step(*args)
        self.calls = calls.names


class LitSharded(LitTiny):
    """Shards itself under FSDP2."""

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            for layer in self.model.layers:
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


def main() -> None:
    strategy, folder = sys.argv[1], Path(sys.argv[2])
    if strategy == "fsdp2":
        chosen: Any = pl.strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    else:
        chosen = strategy
    torch.manual_seed(0)
    model = tiny_gpt()
    callback = WatchedCallback(threshold=1.0, dtype=torch.float32)  # so that a tight tolerance is right everywhere
    fit = trainer(
        [callback],
        strategy=chosen,
        devices=2,
        use_distributed_sampler=False,
        gradient_clip_val=None if strategy == "fsdp2" else 0.3,
    )
    tokens = token_batches(10, batch_size=4)
    lit = LitSharded(model, lambda params: torch.optim.AdamW(params, lr=3e-3))

    class Shard(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            half = tokens.unflatten(1, (2, 2))[:, fit.global_rank]
            return loader(half)

    fit.fit(lit, datamodule=Shard())
    weights = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in lit.named_parameters()}
    torch.save(
        {
            "weights": {n: p.detach().clone() for n, p in weights.items()},
            "max_logits": callback.last.max_logits,
            "clips": callback.qk_clip.clips,
            "calls": callback.calls,
        },
        folder / f"rank{fit.global_rank}.pt",
    )


if __name__ == "__main__":
    main()
