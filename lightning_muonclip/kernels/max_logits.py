"""The largest attention logit of every head: ``max(scale · q_i · k_j)`` over the batch and the visible pairs.

No softmax, no values, no gradient, and never the whole logit matrix: a tile of queries and keys at a time, without the tiles
that no query sees. On a GPU a Triton kernel does it (:mod:`~lightning_muonclip.kernels.max_logits_triton`), elsewhere torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_muonclip.kernels.hidden import HIDDEN


class Tiles(NamedTuple):
    """Queries and keys of a tile, the second a multiple of the first; and how many logits are made at once."""

    queries: int
    keys: int
    logits: int


#: A CPU's products are fastest on tiles that stay in cache (measured: 64 x 512); a GPU wants few and large ones.
TILES = {"cpu": Tiles(64, 512, 2**20)}
_LARGE_TILES = Tiles(256, 2**14, 2**26)


@torch.no_grad()
def max_logits(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    is_causal: bool = False,
    window: int | None = None,
    documents: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Signed per-head maximum of the scaled dot products, before any soft-cap, additive bias or sink.

    Args:
        query: Shape ``(..., heads, L, d)``.
        key: Shape ``(..., key_heads, S, d)``, the batch broadcastable to that of the queries or the other way round;
            ``heads`` is a multiple of ``key_heads``, and every run of ``heads / key_heads`` query heads shares a key head.
        scale: Factor on the dot products, as attention applies it.
        is_causal: Query i sees keys 0..i only, as :func:`~torch.nn.functional.scaled_dot_product_attention` has it.
        window: Query i sees keys ``i - window < j < i + window`` only, as far as causality lets it; ``None`` sees any
            distance.
        documents: Integers of shape ``(batch, L)``, for self-attention: a pair is visible only within one document. What has
            a negative one is padding, sees nothing and is seen by nothing.
        mask: Shape broadcastable to ``(..., heads, L, S)``. Boolean: ``True`` is visible. Floating: an additive mask; a
            pair is hidden where it is at most :data:`~lightning_muonclip.kernels.hidden.HIDDEN`, and its value is not part
            of the maximum elsewhere.

    Returns:
        float32 tensor of shape ``(heads,)``; ``-inf`` for a head that sees nothing, NaN where a logit is NaN.

    Raises:
        ValueError: If the number of query heads is no multiple of the number of key heads, the mask or the documents are for
            another number of queries or keys, documents are no integers, or the window is empty.

    Source: Kimi K2, arXiv 2507.20534, section 2.1 (the :math:`S_{max}^h` of QK-Clip).

    Example:
        >>> q = k = 2 * torch.eye(2).reshape(1, 1, 2, 2)
        >>> max_logits(q, k, scale=0.5)
        tensor([2.])
    """
    heads, key_heads = query.shape[-3], key.shape[-3]
    if heads % key_heads:
        raise ValueError(f"{heads} query heads cannot share {key_heads} key heads evenly")
    if window is not None and window < 1:
        raise ValueError(
            f"a window of {window} lets no query see even itself; give at least 1, or None for any distance"
        )
    if torch.compiler.is_compiling():
        return torch.ops.muonclip.max_logits(query, key, scale, is_causal, window, documents, mask)
    with torch.profiler.record_function("muonclip::max_logits"):
        return _max_logits(query, key, scale, is_causal, window, documents, mask)


def _max_logits(
    query: Tensor,
    key: Tensor,
    scale: float,
    is_causal: bool,
    window: int | None,
    documents: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    heads, key_heads = query.shape[-3], key.shape[-3]
    group = heads // key_heads
    maximum = torch.full((key_heads, group), float("-inf"), dtype=torch.float32, device=query.device)
    if query.numel() == 0 or key.numel() == 0:
        return maximum.flatten()
    pairs = query.shape[-2], key.shape[-2]
    if mask is not None and any(have not in (1, need) for have, need in zip(mask.shape[::-1], pairs[::-1])):
        raise ValueError(f"a mask of shape {tuple(mask.shape)} is not for {pairs[0]} queries and {pairs[1]} keys")
    batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3])
    if documents is not None:
        documents = _documents(documents, batch, *pairs)
    if window is not None and window >= max(pairs):
        window = None
    query, key = _as_batch(query, batch), _as_batch(key, batch)
    launch = _launcher(query.device)
    if launch is not None:
        if mask is not None:
            mask = _as_batch(mask.expand(*batch, heads, *pairs), batch)
        launch(
            query,
            key,
            maximum.view(-1),
            scale=scale,
            is_causal=is_causal,
            window=window,
            documents=documents,
            mask=mask,
        )
        return maximum.flatten()
    visible = None if mask is None else _visible(mask, batch, heads, key_heads)
    query = query.unflatten(1, (key_heads, group))
    tiles = TILES.get(query.device.type, _LARGE_TILES)
    of_a_tile = group * min(tiles.queries, pairs[0]) * min(tiles.keys, pairs[1])
    at_once = max(1, tiles.logits // of_a_tile)
    # A factor on the maximum is cheaper than one on every query, but only a positive one leaves it the maximum.
    inner, outer = (1.0, scale) if scale > 0 else (scale, 1.0)
    # Made once for all tiles, so that it stays in cache.
    products = torch.empty(min(at_once, len(key) * key_heads) * of_a_tile, dtype=torch.float32, device=query.device)
    # Half-precision inputs are multiplied in float32, as attention itself accumulates; autocast would undo that.
    with torch.autocast(query.device.type, enabled=False):
        for b, h in _chunks(len(key), key_heads, at_once):
            ids = None if documents is None else _part(documents, 0, b)
            seen = None if visible is None else _part(_part(visible, 0, b), 1, h)
            own = _chunk_maxima(query[b, h], key[b, h], inner, is_causal, window, ids, seen, tiles, products)
            maximum[h] = torch.maximum(maximum[h], own)
    return (maximum * outer).flatten()


@functools.cache
def _launcher(device: torch.device) -> Callable[..., None] | None:
    """The kernel, where a device and what is installed can run it."""
    # Its tiles are for the shared memory of Ampere, as are products of bfloat16.
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    if not is_nvidia or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from lightning_muonclip.kernels.max_logits_triton import launch
    except ImportError:
        return None
    return launch


def _chunk_maxima(
    query: Tensor,
    key: Tensor,
    scale: float,
    is_causal: bool,
    window: int | None,
    documents: Tensor | None,
    visible: Tensor | None,
    tiles: Tiles,
    products: Tensor,
) -> Tensor:
    """Maxima of shape (key heads, group); queries are (batch, key heads, group, L, d), keys (batch, key heads, S, d)."""
    batch, key_heads, group, length = query.shape[:4]
    keys = key.flatten(0, 1).float()
    # float32 by name everywhere: under some precisions Lightning sets another default while a model runs.
    maximum = torch.full((batch, key_heads, group), float("-inf"), dtype=torch.float32, device=query.device)
    side = min(tiles.queries, length)
    future = torch.ones(side, side, dtype=torch.bool, device=query.device).tril(-1)[:, None]
    cap = torch.full(future.shape, float("inf"), dtype=torch.float32, device=query.device)
    cap.masked_fill_(future, float("-inf"))
    only_causal = window is None and documents is None and visible is None
    for top in range(0, length, tiles.queries):
        bottom = min(top + tiles.queries, length)
        block = query[..., top:bottom, :].float()
        block = (block if scale == 1 else block * scale).flatten(2, 3).flatten(0, 1)
        first, last = 0, keys.shape[1]
        if window is not None:
            # Keys start where queries do, so that the diagonal lies in a tile as it does without a window.
            first = max(0, top - window + 1) // tiles.queries * tiles.queries
            last = min(bottom + window - 1, last)
        if is_causal:
            last = min(bottom, last)
        for left in range(first, last, tiles.keys):
            right = min(left + tiles.keys, last)
            # Keys by queries: that way round the product is faster (on a CPU by a sixth).
            shape = len(keys), right - left, block.shape[1]
            logits = products[: math.prod(shape)].view(shape)
            torch.bmm(keys[:, left:right], block.mT, out=logits)
            logits = logits.view(batch, key_heads, right - left, group, bottom - top)
            if is_causal and right > top:
                crossed = logits[:, :, top - left :]
                if only_causal:  # a minimum is three times faster, and what it cannot hide is a NaN
                    torch.minimum(crossed, cap[: right - top, :, : bottom - top], out=crossed)
                else:
                    crossed.masked_fill_(future[: right - top, :, : bottom - top], float("-inf"))
            if window is not None and (left <= bottom - 1 - window or right > top + window):
                rows = torch.arange(top, bottom, device=query.device)
                columns = torch.arange(left, right, device=query.device)
                logits.masked_fill_(((rows - columns[:, None]).abs() >= window)[:, None], float("-inf"))
            if documents is not None:
                rows, columns = documents[:, None, top:bottom], documents[:, left:right, None]
                logits.masked_fill_(((rows != columns) | (rows < 0))[:, None, :, None], float("-inf"))
            if visible is not None:
                tile = _part(_part(visible, 3, slice(top, bottom)), 4, slice(left, right))
                logits.masked_fill_(~tile.permute(0, 1, 4, 2, 3), float("-inf"))
            maximum = torch.maximum(maximum, logits.amax((2, 4)))
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
    schema=(
        "(Tensor query, Tensor key, float scale, bool is_causal, SymInt? window, Tensor? documents, Tensor? mask) -> Tensor"
    ),
)


@_operation.register_fake
def _(
    query: Tensor,
    key: Tensor,
    scale: float,
    is_causal: bool,
    window: int | None,
    documents: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
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


def _documents(documents: Tensor, batch: torch.Size, length: int, key_length: int) -> Tensor:
    """The ids of shape (batch or 1, L)."""
    if documents.dtype.is_floating_point or documents.dtype.is_complex or documents.dtype is torch.bool:
        raise ValueError(f"documents must be integers, one id a token, negative for padding; got {documents.dtype}")
    if length != key_length:
        raise ValueError(
            f"documents are for self-attention, but there are {length} queries and {key_length} keys; give a mask instead"
        )
    try:
        return documents.expand(*batch, length).reshape(-1, length)
    except RuntimeError as error:
        shape = tuple(documents.shape)
        raise ValueError(
            f"documents of shape {shape} is not for a batch of shape {tuple(batch)} and {length} tokens"
        ) from error
