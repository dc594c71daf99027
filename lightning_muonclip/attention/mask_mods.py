"""What a key must be for a query to see it, as functions in the signature of FlexAttention's ``mask_mod``."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: ``mask_mod(b, h, q_idx, kv_idx) -> visible``, FlexAttention's: indices of batch, query head, query and key. It is called
#: with tensors that broadcast, and by FlexAttention with scalars.
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def indices(batch: int, heads: int, length: int, device: torch.device | None) -> tuple[Tensor, ...]:
    """Of batch, head, query and key: four tensors that broadcast to ``(batch, heads, length, length)``."""
    sizes = batch, heads, length, length
    return tuple(
        torch.arange(size, device=device).view([-1 if i == dim else 1 for i in range(4)])
        for dim, size in enumerate(sizes)
    )


def near(window: int) -> MaskMod:
    """Less than so many tokens away."""
    return lambda b, h, q, k: (q - k).abs() < window


def _of_tokens(tensor: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Looks up a token of a sequence in a tensor that has a row a sequence, or one for all."""
    if len(tensor) > 1:
        return lambda b, token: tensor[b, token]
    row = tensor[0]  # under vmap, torch up to 2.10 takes no number beside a tensor as an index
    return lambda b, token: row[token]


def real(padding: Tensor, counted: bool) -> MaskMod:
    """No padding; to be counted neither the query."""
    of = _of_tokens(padding)
    return lambda b, h, q, k: of(b, q) & of(b, k) if counted else of(b, k)


def same_document(documents: Tensor) -> MaskMod:
    """Of one document, which is none if its number is negative."""
    of = _of_tokens(documents)
    return lambda b, h, q, k: (of(b, q) == of(b, k)) & (of(b, q) >= 0)


def causal_after(prefix: Tensor) -> MaskMod:
    """Not later, or among the first tokens."""
    return lambda b, h, q, k: (k <= q) | (k < prefix[b if len(prefix) > 1 else 0])


def visible_in_all(mods: Sequence[MaskMod]) -> MaskMod:
    """What each of some functions shows."""
    if len(mods) == 1:
        return mods[0]
    return lambda b, h, q, k: functools.reduce(operator.and_, [boolean(mod(b, h, q, k)) for mod in mods])


def visible_in_any(mods: Sequence[MaskMod]) -> MaskMod:
    """What at least one of some functions shows."""
    return lambda b, h, q, k: functools.reduce(operator.or_, [boolean(mod(b, h, q, k)) for mod in mods])


def boolean(visible: Any) -> Tensor:
    """What a function gave.

    Raises:
        ValueError: If that is not a boolean tensor.
    """
    if not isinstance(visible, Tensor) or visible.dtype is not torch.bool:
        kind = visible.dtype if isinstance(visible, Tensor) else type(visible).__name__
        raise ValueError(f"a mask_mod must give a boolean tensor, True where a key is visible; got {kind}")
    return visible
