"""Which parameters a run trains, so that no others are scaled."""

from __future__ import annotations

from collections.abc import Collection
from weakref import WeakSet

from torch import Tensor, nn
from torch.optim import Optimizer


class Owned:
    """The parameters in the groups of some optimizers; before there is an optimizer, all that require gradients."""

    def __init__(self) -> None:
        self._optimizers: WeakSet[Optimizer] = WeakSet()  # which may hold what holds this
        self._is_by_hand = True

    def add(self, *optimizers: Optimizer) -> None:
        """From now on, what these optimizers train is owned, beside what those before do."""
        self._is_by_hand = False
        self._optimizers.update(optimizers)

    def params(self) -> set[Tensor] | None:
        """The parameters; ``None`` stands for all that require gradients."""
        if self._is_by_hand:
            return None
        return {p for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]}


def has_part_of(module: nn.Module, owned: Collection[Tensor] | None) -> bool:
    """Whether some trainable parameter of a module is owned (see :meth:`Owned.params`)."""
    return any(param.requires_grad and (owned is None or param in owned) for param in module.parameters())


def why_not_owned(module: nn.Module, owned: Collection[Tensor] | None) -> str:
    """Why a run trains no parameter of a module; empty if it trains some, or if there is none, as in a quantized one."""
    params = list(module.parameters())
    if not params or has_part_of(module, owned):
        return ""
    return "in no optimizer" if any(param.requires_grad for param in params) else "not trained"
