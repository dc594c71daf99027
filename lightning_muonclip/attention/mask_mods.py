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


def _of_tokens(tensor: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Looks up tokens of a sequence in a tensor."""
    if len(tensor) > 1:
        return lambda b, token: tensor[b, token]
    row = tensor[0]  # under vmap, torch before 2.11 takes no number beside a tensor as an index
    return lambda b, token: row[token]


def real(padding: Tensor, counted: bool) -> MaskMod:
    """Visible if the key is not padding; with ``counted``, only if the query is not padding either."""
    of = _of_tokens(padding)
    return lambda b, h, q, k: of(b, q) & of(b, k) if counted else of(b, k)


def same_document(documents: Tensor) -> MaskMod:
    """Visible within a document; a negative id is padding."""
    of = _of_tokens(documents)
    return lambda b, h, q, k: (of(b, q) == of(b, k)) & (of(b, q) >= 0)


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
