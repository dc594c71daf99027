"""Decoupled weight decay, of all weights or of those that an update does not oppose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def decay_cautiously(weights: Sequence[Tensor], updates: Sequence[Tensor], rate: float | Tensor) -> None:
    """Multiplies weights by ``1 - rate``, but not where an update, which is to be subtracted, has the other sign.

    Args:
        weights: The weights, before the update.
        updates: Their updates, of any positive scale.
        rate: The learning rate times the weight decay.

    Source: Cautious weight decay, arXiv 2510.12402, algorithm 1.
    """
    for weight, update in zip(weights, updates):
        agrees = (update * weight >= 0).to(torch.promote_types(weight.dtype, torch.float32))
        weight.mul_(1 - rate * agrees)


def scalar(lr: float | Tensor) -> float | Tensor:
    """The learning rate as a zero-dimensional tensor, as foreach products require."""
    return lr.reshape(()) if isinstance(lr, Tensor) else lr
