"""Per-head maximum attention logit: ``max(scale · q_i · k_j)`` over the batch and the visible pairs.

No softmax, no values, no gradient. The logit matrix is never materialized: the maximum is taken tile by tile, and tiles
without visible pairs are skipped. GPUs run a Triton kernel (:mod:`~lightning_muonclip.kernels.max_logits_triton`), other
devices plain torch.
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
    """Queries and keys per tile (the second a multiple of the first), and the number of logits computed at once."""

    queries: int
    keys: int
    logits: int


#: CPUs are fastest on tiles that stay in cache (measured: 64 x 512); GPUs prefer a few large ones.
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
        key: Shape ``(..., key_heads, S, d)``; its batch and that of the queries broadcast. ``heads`` is a multiple of
            ``key_heads``, and every ``heads / key_heads`` consecutive query heads share a key head.
        scale: Factor on the dot products, as attention applies it.
        is_causal: Query i sees only keys 0..i, as in :func:`~torch.nn.functional.scaled_dot_product_attention`.
        window: Query i sees only keys ``i - window < j < i + window``, further limited by causality. ``None`` means any
            distance.
        documents: Integer document ids of shape ``(batch, L)``, for self-attention: a pair is visible only within one
            document. A negative id marks padding, which sees nothing and is hidden from everything.
        mask: Shape broadcastable to ``(..., heads, L, S)``. Boolean: ``True`` is visible. Floating point: an additive mask,
            which hides a pair where it is at most :data:`~lightning_muonclip.kernels.hidden.HIDDEN` and does not enter the
            maximum elsewhere.

    Returns:
        float32 tensor of shape ``(heads,)``: ``-inf`` for a head that sees nothing, NaN where a logit is NaN.

    Raises:
        ValueError: If the number of query heads is not a multiple of the number of key heads, if the mask or the documents
            do not match the numbers of queries and keys, if documents are not integers, or if the window is empty.

    Source: Kimi K2, arXiv 2507.20534, section 2.1 (the :math:`S_{max}^h` of QK-Clip).

    Example:
        >>> q = k = 2 * torch.eye(2).reshape(1, 1, 2, 2)
        >>> max_logits(q, k, scale=0.5)
        tensor([2.])
    """
    check_arguments(query, key, window)
    if torch.compiler.is_compiling():
        return torch.ops.muonclip.max_logits(query, key, scale, is_causal, window, documents, mask)
    with torch.profiler.record_function("muonclip::max_logits"):
        return of_all_pairs(query, key, scale, is_causal, window, documents, mask)


def check_arguments(query: Tensor, key: Tensor, window: int | None) -> None:
    """Raises ValueError if the heads do not match or the window is empty."""
    heads, key_heads = query.shape[-3], key.shape[-3]
    if heads % key_heads:
        raise ValueError(
            f"the number of query heads must be a multiple of the number of key heads; got {heads}, {key_heads}"
        )
    if window is not None and window < 1:
        raise ValueError(f"the window hides every key, got {window}; use at least 1, or None for any distance")


def of_all_pairs(
    query: Tensor,
    key: Tensor,
    scale: float,
    is_causal: bool,
    window: int | None,
    documents: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """As :func:`max_logits`, without a check of the arguments or a span in a profile."""
    heads, key_heads = query.shape[-3], key.shape[-3]
    group = heads // key_heads
    maximum = torch.full((key_heads, group), float("-inf"), dtype=torch.float32, device=query.device)
    if query.numel() == 0 or key.numel() == 0:
        return maximum.flatten()
    pairs = query.shape[-2], key.shape[-2]
    if mask is not None:
        check_mask(mask, *pairs)
    batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3])
    if documents is not None:
        documents = sequence_ids(documents, batch, *pairs)
    if window is not None and window >= max(pairs):
        window = None
    query, key = as_batch(query, batch), as_batch(key, batch)
    launch = _launcher(query.device)
    if launch is not None:
        if mask is not None:
            mask = as_batch(mask.expand(*batch, heads, *pairs), batch)
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
    visible = None
    if mask is not None:
        visible = visible_pairs(mask, batch)
        visible = visible.unsqueeze(2) if visible.shape[1] == 1 else visible.unflatten(1, (key_heads, group))
    query = query.unflatten(1, (key_heads, group))
    tiles = TILES.get(query.device.type, _LARGE_TILES)
    of_a_tile = group * min(tiles.queries, pairs[0]) * min(tiles.keys, pairs[1])
    at_once = max(1, tiles.logits // of_a_tile)
    # Scaling the maximum is cheaper than scaling every query, but only a positive factor commutes with it.
    inner, outer = (1.0, scale) if scale > 0 else (scale, 1.0)
    # Allocated once for all tiles, so that it stays in cache.
    products = torch.empty(min(at_once, len(key) * key_heads) * of_a_tile, dtype=torch.float32, device=query.device)
    # Half-precision inputs are multiplied in float32, as attention accumulates; autocast would undo that.
    with torch.autocast(query.device.type, enabled=False):
        for b, h in _chunks(len(key), key_heads, at_once):
            ids = None if documents is None else _part(documents, 0, b)
            seen = None if visible is None else _part(_part(visible, 0, b), 1, h)
            own = _chunk_maxima(query[b, h], key[b, h], inner, is_causal, window, ids, seen, tiles, products)
            maximum[h] = torch.maximum(maximum[h], own)
    return (maximum * outer).flatten()


@functools.cache
def _launcher(device: torch.device) -> Callable[..., None] | None:
    """The Triton kernel, or ``None`` if the device or the installation cannot run it."""
    # The tile sizes and bfloat16 products need Ampere or later.
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
    # Explicit float32 everywhere: under some precisions Lightning changes the default dtype while a model runs.
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
            # Aligned with the query tiles, so that the diagonal falls into a tile as it does without a window.
            first = max(0, top - window + 1) // tiles.queries * tiles.queries
            last = min(bottom + window - 1, last)
        if is_causal:
            last = min(bottom, last)
        for left in range(first, last, tiles.keys):
            right = min(left + tiles.keys, last)
            # Keys by queries: this order is faster (on a CPU by a sixth).
            shape = len(keys), right - left, block.shape[1]
            logits = products[: math.prod(shape)].view(shape)
            torch.bmm(keys[:, left:right], block.mT, out=logits)
            logits = logits.view(batch, key_heads, right - left, group, bottom - top)
            if is_causal and right > top:
                crossed = logits[:, :, top - left :]
                if only_causal:  # a minimum is three times faster; it lets NaN through
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
    """Slices of the batch and the heads, of about ``at_once`` (batch, head) pairs each."""
    some_heads = min(heads, at_once)
    some_batch = max(1, at_once // heads)
    for b in range(0, batch, some_batch):
        for h in range(0, heads, some_heads):
            yield slice(b, b + some_batch), slice(h, h + some_heads)


def _part(x: Tensor, dim: int, part: slice) -> Tensor:
    """A slice along one dimension, unless that dimension broadcasts."""
    return x if x.shape[dim] == 1 else x.narrow(dim, part.start, min(part.stop, x.shape[dim]) - part.start)


# Opaque to torch.compile: tracing would unroll the loop and recompile for every length.
_operation = torch.library.custom_op(
    "muonclip::max_logits",
    of_all_pairs,
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


def as_batch(x: Tensor, batch: torch.Size) -> Tensor:
    """Exactly one batch dimension: (batch, heads, length, d)."""
    return x.detach().expand(*batch, *x.shape[-3:]).reshape(-1, *x.shape[-3:])


def check_mask(mask: Tensor, queries: int, keys: int) -> None:
    """Raises ValueError if the mask does not broadcast."""
    if any(have not in (1, need) for have, need in zip(mask.shape[::-1], (keys, queries))):
        raise ValueError(f"the mask must broadcast to {queries} queries and {keys} keys, got shape {tuple(mask.shape)}")


def visible_pairs(mask: Tensor, batch: torch.Size) -> Tensor:
    """The mask as booleans of shape (batch or 1, heads or 1, L or 1, S or 1)."""
    if mask.dtype is not torch.bool:
        mask = mask > HIDDEN
    if len(batch) > 1 and mask.ndim > 3:
        mask = mask.expand(*batch, *mask.shape[-3:]).flatten(0, -4)
    return mask[(None,) * (4 - mask.ndim)]


def sequence_ids(documents: Tensor, batch: torch.Size, length: int, key_length: int) -> Tensor:
    """The document ids of shape (batch or 1, L)."""
    if documents.dtype.is_floating_point or documents.dtype.is_complex or documents.dtype is torch.bool:
        raise ValueError(f"documents must be integer ids, one per token, negative for padding; got {documents.dtype}")
    if length != key_length:
        raise ValueError(
            f"documents need as many queries as keys, got {length} queries and {key_length} keys; use a mask instead"
        )
    try:
        return documents.expand(*batch, length).reshape(-1, length)
    except RuntimeError as error:
        shape = tuple(documents.shape)
        raise ValueError(
            f"documents must match a batch of shape {tuple(batch)} and {length} tokens, got shape {shape}"
        ) from error
