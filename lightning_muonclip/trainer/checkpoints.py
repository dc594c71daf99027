"""Checkpoints of the callback: they move between strategies and numbers of ranks; those of others are refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.optim import Optimizer

from lightning_muonclip.optim.coefficients import resolve_schedule
from lightning_muonclip.optim.muon import Muon
from lightning_muonclip.trainer.strategies import restores_optimizers

WITHOUT_CALLBACK = (
    "this checkpoint was made without MuonClipCallback: its one optimizer holds the state of all parameters. Resume without"
    " the callback, or start from its weights alone: LightningModule.load_from_checkpoint(path) and fit without ckpt_path"
)


def explain(trainer: pl.Trainer, exception: BaseException) -> None:
    """Says in plain words why FSDP2 failed to load, if the reason is that the checkpoint was made without the callback.

    Its strategy loads the optimizers before any callback could look at the checkpoint.

    Raises:
        ValueError: With two ways out.
    """
    if trainer.state.fn == "fit" and restores_optimizers(trainer.strategy) and _optimizers_in(trainer.ckpt_path) == 1:
        raise ValueError(WITHOUT_CALLBACK) from exception


def _optimizers_in(path: Any) -> int | None:
    """How many optimizers a checkpoint has, if it can be told."""
    try:
        if not Path(path).is_dir():
            return len(torch.load(path, map_location="cpu", mmap=True)["optimizer_states"])
        saved = FileSystemReader(path).read_metadata().state_dict_metadata
        return len({key.partition(".")[0] for key in saved if key.startswith("optimizer_")})
    except Exception:  # whatever is wrong with it, Lightning has said so already
        return None


def number_as_in_model(
    states: Sequence[dict[str, Any]], optimizers: Sequence[Optimizer], model: nn.Module, *, already: bool
) -> None:
    """Numbers the parameters in states of optimizers as the model does, and not each optimizer for itself.

    So Lightning understands the numbers in a whole checkpoint that it loads under FSDP2.

    Args:
        states: Changed in place. Those without numbers, in shards or on ranks that save nothing, are left alone.
        optimizers: Whose states they are.
        model: Numbers its parameters in the order of ``parameters()``.
        already: Whether they are numbered so, as Lightning does under FSDP2; it sorts them then, which is undone.
    """
    numbers = {p: i for i, p in enumerate(model.parameters())}
    for state, optimizer in zip(states, optimizers):
        groups = optimizer.param_groups
        owned = [p for group in groups for p in group["params"]]
        is_numbered = bool(state) and all(isinstance(key, int) for key in state["state"])
        if not is_numbered or not numbers.keys() >= set(owned):
            continue
        if not already:
            state["state"] = {numbers[owned[i]]: own for i, own in state["state"].items()}
        for saved, group in zip(state["param_groups"], groups):
            saved["params"] = [numbers[p] for p in group["params"]]


def emptied_groups(optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """Settings of the groups that Muon took every parameter of, by index: FSDP2 keeps settings by parameter only."""
    return {
        i: {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for i, group in enumerate(optimizer.param_groups)
        if not group["params"]
    }


def warn_of_emptied_groups(optimizer: Optimizer) -> None:
    """Under FSDP2, torch refuses to load an optimizer with several of them."""
    if len(emptied_groups(optimizer)) > 1:
        rank_zero_warn(
            f"Muon took all parameters of several groups of {type(optimizer).__name__}, so that torch cannot resume from a"
            " checkpoint under FSDP2; make those groups one, or keep a parameter of each from Muon by exclude=[...]"
        )


def warn_of_other_settings(muon: Muon) -> None:
    """As in all of PyTorch, an optimizer goes on with the settings that it was saved with."""
    given, saved = _comparable(muon.defaults), _comparable(muon.param_groups[0])
    others = [name for name, value in given.items() if saved[name] != value]
    if others:
        rank_zero_warn(
            f"Muon goes on with {', '.join(others)} of the checkpoint, not of MuonClipCallback; to change them, set them in"
            " MuonClipCallback.muon.param_groups in on_train_start"
        )


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    schedule = resolve_schedule(settings["ns_coefficients"], settings["ns_steps"])  # FSDP2 makes lists of tuples
    return {name: settings[name] for name in ("momentum", "nesterov", "adjust_lr_fn")} | {"ns_coefficients": schedule}
