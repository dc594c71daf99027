"""The largest attention logit of every head: ``max(scale · q_i · k_j)`` over the batch and the visible pairs.

No softmax, no values, no gradient, and never the whole logit matrix: a tile of queries and keys at a time, without the tiles
that no query sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Tiles(NamedTuple):
    """Queries and keys of a tile, the second a multiple of the first; and how many logits are made at once."""

    queries: int
    keys: int
    logits: int


#: A CPU's products are fastest on tiles that stay in cache (measured: 64 x 512); a GPU wants few and large ones.
TILES = {"cpu": Tiles(64, 512, 2**19)}
_LARGE_TILES = Tiles(256, 2**14, 2**26)

#: An additive mask at or below this hides a pair. Libraries hide by -inf, by the lowest number of a dtype, or by -1e4,
#: perhaps with a position bias on top; a bias alone is no mask, and a pair that has been given so much of it has no weight
#: either.
HIDDEN = -9e3


@torch.no_grad()
def max_logits(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    is_causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Signed per-head maximum of the scaled dot products, before any soft-cap, additive bias or sink.

    Args:
        query: Shape ``(..., heads, L, d)``.
        key: Shape ``(..., key_heads, S, d)``, the batch broadcastable to that of the queries or the other way round;
            ``heads`` is a multiple of ``key_heads``, and every run of ``heads / key_heads`` query heads shares a key head.
        scale: Factor on the dot products, as attention applies it.
        is_causal: Query i sees keys 0..i only, as :func:`~torch.nn.functional.scaled_dot_product_attention` has it.
        mask: Shape broadcastable to ``(..., heads, L, S)``. Boolean: ``True`` is visible. Floating: an additive mask; a
            pair is hidden where it is at most :data:`HIDDEN`, and its value is not part of the maximum elsewhere.

    Returns:
        float32 tensor of shape ``(heads,)``; ``-inf`` for a head that sees nothing, NaN where a logit is NaN.

    Raises:
        ValueError: If the number of query heads is no multiple of the number of key heads, or the mask is for another
            number of queries or keys.

    Source: Kimi K2, arXiv 2507.20534, section 2.1 (the :math:`S_{max}^h` of QK-Clip).

    Example:
        >>> q = k = 2 * torch.eye(2).reshape(1, 1, 2, 2)
        >>> max_logits(q, k, scale=0.5)
        tensor([2.])
    """
    heads, key_heads = query.shape[-3], key.shape[-3]
    if heads % key_heads:
        raise ValueError(f"{heads} query heads cannot share {key_heads} key heads evenly")
    if torch.compiler.is_compiling():
        return torch.ops.muonclip.max_logits(query, key, scale, is_causal, mask)
    with torch.profiler.record_function("muonclip::max_logits"):
        return _max_logits(query, key, scale, is_causal, mask)


def _max_logits(query: Tensor, key: Tensor, scale: float, is_causal: bool, mask: Tensor | None) -> Tensor:
    heads, key_heads = query.shape[-3], key.shape[-3]
    group = heads // key_heads
    maximum = torch.full((key_heads, group), float("-inf"), dtype=torch.float32, device=query.device)
    if query.numel() == 0 or key.numel() == 0:
        return maximum.flatten()
    pairs = query.shape[-2], key.shape[-2]
    if mask is not None and any(have not in (1, need) for have, need in zip(mask.shape[::-1], pairs[::-1])):
        raise ValueError(f"a mask of shape {tuple(mask.shape)} is not for {pairs[0]} queries and {pairs[1]} keys")
    batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3])
    visible = None if mask is None else _visible(mask, batch, heads, key_heads)
    query = _as_batch(query, batch).unflatten(1, (key_heads, group))
    key = _as_batch(key, batch)
    tiles = TILES.get(query.device.type, _LARGE_TILES)
    at_once = max(1, tiles.logits // (group * min(tiles.queries, query.shape[-2]) * min(tiles.keys, key.shape[-2])))
    # A factor on the maximum is cheaper than one on every query, but only a positive one leaves it the maximum.
    inner, outer = (1.0, scale) if scale > 0 else (scale, 1.0)
    # Half-precision inputs are multiplied in float32, as attention itself accumulates; autocast would undo that.
    with torch.autocast(query.device.type, enabled=False):
        for b, h in _chunks(len(key), key_heads, at_once):
            seen = None if visible is None else _part(_part(visible, 0, b), 1, h)
            own = _chunk_maxima(query[b, h], key[b, h], inner, is_causal, seen, tiles)
            maximum[h] = torch.maximum(maximum[h], own)
    return (maximum * outer).flatten()


def _chunk_maxima(
    query: Tensor, key: Tensor, scale: float, is_causal: bool, visible: Tensor | None, tiles: Tiles
) -> Tensor:
    """Maxima of shape (key heads, group); queries are (batch, key heads, group, L, d), keys (batch, key heads, S, d)."""
    batch, key_heads, group, length = query.shape[:4]
    keys = key.flatten(0, 1).float()
    maximum = torch.full((batch, key_heads, group), float("-inf"), device=query.device)
    # What a tile on the diagonal may show at most: on a CPU a minimum is three times faster than masked_fill.
    side = min(tiles.queries, length)
    future = torch.ones(side, side, dtype=torch.bool, device=query.device).triu(1)
    cap = torch.where(future, float("-inf"), float("inf"))
    products = keys.new_empty(len(keys) * group * side * min(tiles.keys, keys.shape[1]))  # made once: it stays in cache
    for top in range(0, length, tiles.queries):
        bottom = min(top + tiles.queries, length)
        block = query[..., top:bottom, :].float()
        block = (block if scale == 1 else block * scale).flatten(2, 3).flatten(0, 1)
        reach = min(bottom, keys.shape[1]) if is_causal else keys.shape[1]
        for left in range(0, reach, tiles.keys):
            right = min(left + tiles.keys, reach)
            shape = len(keys), block.shape[1], right - left
            logits = products[: math.prod(shape)].view(shape)
            torch.bmm(block, keys[:, left:right].mT, out=logits)
            logits = logits.view(batch, key_heads, group, bottom - top, right - left)
            if is_causal and right > top:
                crossed = logits[..., top - left :]
                torch.minimum(crossed, cap[: bottom - top, : right - top], out=crossed)
            if visible is not None:
                tile = _part(_part(visible, 3, slice(top, bottom)), 4, slice(left, right))
                logits = logits.masked_fill(~tile, float("-inf"))
            maximum = torch.maximum(maximum, logits.flatten(3).amax(3))
    return maximum.amax(0)


def _chunks(batch: int, heads: int, at_once: int) -> Iterator[tuple[slice, slice]]:
    """Parts of the batch and the heads with about ``at_once`` pairs each."""
    some_heads = min(heads, at_once)
    some_batch = max(1, at_once // heads)
    for b in range(0, batch, some_batch):
        for h in range(0, heads, some_heads):
            yield slice(b, b + some_batch), slice(h, h + some_heads)


def _part(x: Tensor, dim: int, part: slice) -> Tensor:
    """A slice along one dimension, unless that has only one entry for all."""
    return x if x.shape[dim] == 1 else x.narrow(dim, part.start, min(part.stop, x.shape[dim]) - part.start)


# To torch.compile one opaque operation: traced, the loop would be unrolled, and compiled anew for every length.
_operation = torch.library.custom_op(
    "muonclip::max_logits",
    _max_logits,
    mutates_args=(),
    schema="(Tensor query, Tensor key, float scale, bool is_causal, Tensor? mask) -> Tensor",
)


@_operation.register_fake
def _(query: Tensor, key: Tensor, scale: float, is_causal: bool, mask: Tensor | None) -> Tensor:
    return query.new_empty(query.shape[-3], dtype=torch.float32)


def _as_batch(x: Tensor, batch: torch.Size) -> Tensor:
    """Exactly one batch dimension: (batch, heads, length, d)."""
    return x.detach().expand(*batch, *x.shape[-3:]).reshape(-1, *x.shape[-3:])


def _visible(mask: Tensor, batch: torch.Size, heads: int, key_heads: int) -> Tensor:
    """The mask as booleans of shape (batch or 1, key heads or 1, group or 1, L or 1, S or 1)."""
    if mask.dtype is not torch.bool:
        mask = mask > HIDDEN
    if len(batch) > 1 and mask.ndim > 3:
        mask = mask.expand(*batch, *mask.shape[-3:]).flatten(0, -4)
    mask = mask[(None,) * (4 - mask.ndim)]
    if mask.shape[1] == 1:
        return mask.unsqueeze(2)
    return mask.unflatten(1, (key_heads, heads // key_heads))
