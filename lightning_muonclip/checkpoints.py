"""What the callback does about checkpoints, so that they move between strategies, and the refusal of those not its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.optim import Optimizer

WITHOUT_CALLBACK = (
    "this checkpoint was made without MuonClipCallback: its one optimizer holds the state of all parameters. Resume without"
    " the callback, or start from its weights alone: LightningModule.load_from_checkpoint(path) and fit without ckpt_path"
)


def check_checkpoint(trainer: pl.Trainer) -> None:
    """Refuses, where the strategy loads optimizers before any callback is asked, what was saved without the callback.

    Raises:
        ValueError: With two ways out.
    """
    path = trainer.ckpt_path
    if path is None or trainer.strategy.lightning_restore_optimizer:
        return
    if Path(path).is_dir():
        saved = FileSystemReader(path).read_metadata().state_dict_metadata
        is_own = any(key.startswith("optimizer_1.") for key in saved)
    else:
        is_own = len(torch.load(path, map_location="cpu", mmap=True)["optimizer_states"]) > 1
    if not is_own:
        raise ValueError(WITHOUT_CALLBACK)


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
        if not all(isinstance(key, int) for key in state.get("state", ())) or not numbers.keys() >= set(owned):
            continue
        if not already:
            state["state"] = {numbers[owned[i]]: own for i, own in state["state"].items()}
        for saved, group in zip(state.get("param_groups", ()), groups):
            saved["params"] = [numbers[p] for p in group["params"]]
