"""Rules of visibility, as functions in the signature of FlexAttention's ``mask_mod``."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: ``mask_mod(b, h, q_idx, kv_idx) -> visible``, with the indices of batch, query head, query and key. FlexAttention calls it
#: with scalars, this library with tensors that broadcast.
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def indices(batch: int, heads: int, length: int, device: torch.device | None) -> tuple[Tensor, ...]:
    """Indices of batch, head, query and key: four tensors that broadcast to ``(batch, heads, length, length)``."""
    sizes = batch, heads, length, length
    return tuple(
        torch.arange(size, device=device).view([-1 if i == dim else 1 for i in range(4)])
        for dim, size in enumerate(sizes)
    )


def near(window: int) -> MaskMod:
    """Visible if less than ``window`` tokens away."""
    return lambda b, h, q, k: (q - k).abs() < window


# Tensors have one row per sequence, or a single row for all.


def real(padding: Tensor, counted: bool) -> MaskMod:
    """Visible if the key is not padding; with ``counted``, only if the query is not padding either."""

    def is_real(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row = b if len(padding) > 1 else 0
        return padding[row, q] & padding[row, k] if counted else padding[row, k]

    return is_real


def same_document(documents: Tensor) -> MaskMod:
    """Visible within a document; a negative id is padding."""

    def is_same(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row = b if len(documents) > 1 else 0
        own = documents[row, q]
        return (own == documents[row, k]) & (own >= 0)

    return is_same


def causal_after(prefix: Tensor) -> MaskMod:
    """Visible if not later, or within the prefix."""
    return lambda b, h, q, k: (k <= q) | (k < prefix[b if len(prefix) > 1 else 0])


def visible_in_all(mods: Sequence[MaskMod]) -> MaskMod:
    """The intersection of several functions."""
    if len(mods) == 1:
        return mods[0]
    return lambda b, h, q, k: functools.reduce(operator.and_, [boolean(mod(b, h, q, k)) for mod in mods])


def visible_in_any(mods: Sequence[MaskMod]) -> MaskMod:
    """The union of several functions."""
    return lambda b, h, q, k: functools.reduce(operator.or_, [boolean(mod(b, h, q, k)) for mod in mods])


def boolean(visible: Any) -> Tensor:
    """The result of a mask_mod, checked.

    Raises:
        ValueError: If it is not a boolean tensor.
    """
    if not isinstance(visible, Tensor) or visible.dtype is not torch.bool:
        kind = visible.dtype if isinstance(visible, Tensor) else type(visible).__name__
        raise ValueError(f"a mask_mod must return a boolean tensor, True where a key is visible; got {kind}")
    return visible
