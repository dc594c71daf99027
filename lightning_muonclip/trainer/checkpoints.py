"""Checkpoints that can be resumed under any strategy and number of ranks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
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
    "the checkpoint was saved without MuonClipCallback: it has one optimizer, with the state of all parameters. Resume"
    " without the callback, or start from the weights alone: LightningModule.load_from_checkpoint(path), then fit without"
    " ckpt_path"
)


def explain(trainer: pl.Trainer, exception: BaseException) -> None:
    """Raises ValueError if FSDP2 failed to load a checkpoint because it was saved without the callback.

    The strategy loads the optimizers before any callback sees the checkpoint.
    """
    if trainer.state.fn == "fit" and restores_optimizers(trainer.strategy) and _optimizers_in(trainer.ckpt_path) == 1:
        raise ValueError(WITHOUT_CALLBACK) from exception


def _optimizers_in(path: Any) -> int | None:
    """The number of optimizers in a checkpoint, if it can be read."""
    try:
        if not Path(path).is_dir():
            return len(torch.load(path, map_location="cpu", mmap=True)["optimizer_states"])
        saved = FileSystemReader(path).read_metadata().state_dict_metadata
        return len({key.partition(".")[0] for key in saved if key.startswith("optimizer_")})
    except Exception:  # Lightning has already reported what is wrong with it
        return None


def number_as_in_model(
    states: Sequence[dict[str, Any]], optimizers: Sequence[Optimizer], model: nn.Module, *, already: bool
) -> None:
    """Numbers the parameters in optimizer states in the order of ``model.parameters()``.

    This is how Lightning reads an unsharded checkpoint under FSDP2; torch numbers the parameters of each optimizer apart.

    Args:
        states: One per optimizer, changed in place. Sharded states, and those of ranks that save nothing, have no numbers
            and stay as they are.
        optimizers: The optimizers of these states.
        model: The model.
        already: Whether the states are numbered so, as Lightning does under FSDP2; only its sorting of groups is undone.
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
    """Settings of the groups without parameters, by index; a checkpoint of FSDP2 keeps settings by parameter only."""
    return {
        i: {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for i, group in enumerate(optimizer.param_groups)
        if not group["params"]
    }


def warn_of_emptied_groups(optimizer: Optimizer) -> None:
    """Warns that torch cannot load an optimizer with several empty groups under FSDP2."""
    if len(emptied_groups(optimizer)) > 1:
        rank_zero_warn(
            f"Muon took all parameters of several groups of {type(optimizer).__name__}; under FSDP2, torch cannot resume"
            " from a checkpoint with several empty groups. Merge those groups, or exclude a parameter of each"
            " (exclude=[...])"
        )


_COMPARED = (
    *("momentum", "nesterov", "adjust_lr_fn", "cautious_weight_decay"),
    *("second_moment", "second_moment_beta", "momentum_dtype"),
)


def warn_of_other_settings(muon: Muon, but: Collection[str] = ()) -> None:
    """Warns that the settings of the checkpoint take precedence, as for every torch optimizer.

    Args:
        muon: The optimizer.
        but: What else may change in training; what is scheduled may.
    """
    given, saved = _comparable(muon.defaults), _comparable(muon.param_groups[0])
    free = {*but, *(["momentum"] if callable(given["momentum"]) else [])}
    others = [name for name, value in given.items() if saved[name] != value and name not in free]
    if others:
        rank_zero_warn(
            f"Muon resumes with the {', '.join(others)} of the checkpoint, not those of MuonClipCallback; to change them,"
            " edit MuonClipCallback.muon.param_groups in on_train_start"
        )


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    schedule = resolve_schedule(settings["ns_coefficients"], settings["ns_steps"])  # FSDP2 makes lists of tuples
    return {name: settings[name] for name in _COMPARED} | {"ns_coefficients": schedule}
