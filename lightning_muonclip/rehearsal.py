"""Steps that are no steps: torch.distributed.checkpoint lets an optimizer step once, with lr 0, to see its state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


def is_rehearsal(optimizer: Optimizer) -> bool:
    """Whether the step that is about to run only creates a state: there is none yet, and all rates and gradients are zero.

    Waits for the device only if all rates are zero in the first step, as in a warmup.
    """
    rates = [group.get("lr", 0.0) for group in optimizer.param_groups]
    if optimizer.state or not all(isinstance(rate, (float, int, Tensor)) and float(rate) == 0 for rate in rates):
        return False
    return not any(
        p.grad is not None and bool(p.grad.any()) for group in optimizer.param_groups for p in group["params"]
    )


def after_steps(optimizer: Optimizer, function: Callable[[Optimizer], Any]) -> list[RemovableHandle]:
    """Calls a function after every step of an optimizer that is none of these; returns the handles of the hooks."""
    rehearses = False

    def before(optimizer: Optimizer, *_: Any) -> None:
        nonlocal rehearses
        rehearses = is_rehearsal(optimizer)

    def after(optimizer: Optimizer, *_: Any) -> None:
        if not rehearses:
            function(optimizer)

    return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
