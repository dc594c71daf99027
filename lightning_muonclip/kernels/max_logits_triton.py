"""Triton kernel for the per-head maximum attention logit.

As in FlashAttention, each program holds a tile of queries and loops over the keys. It visits only keys that some query of
its tile may see, and evaluates the mask only in tiles where some pair is hidden. Causality, windows and documents bound the
loop. A tile that overruns the end repeats the last valid row: duplicates do not change a maximum.

Source: the order of the tiles follows FlashAttention-2, arXiv 2307.08691, section 3.1.
"""

# Triton's convention: compile-time constants are upper case. mypy cannot type what Triton compiles.
# ruff: noqa: N803, N806, SIM300
# mypy: disable-error-code="import-untyped,import-not-found"
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_muonclip.kernels.hidden import HIDDEN


class Tile(NamedTuple):
    """Queries, keys and channels per tile, and Triton's launch parameters."""

    queries: int
    keys: int
    channels: int
    num_warps: int
    num_stages: int


def tile_for(dtype: torch.dtype, head_dim: int, length: int, masked: bool = False) -> Tile:
    """The tile for products in ``dtype``; ``masked`` means documents or a mask.

    A fixed table, because autotuning times launches, which CUDA graph capture does not allow. The sizes follow from the
    compiler's register use (two float32 per pair, plus the addresses of a mask) and shared memory (99 KiB on the smaller
    devices). They have not been confirmed on a GPU yet.
    """
    channels = max(16, triton.next_power_of_2(head_dim))
    if dtype is torch.float32:  # without tensor cores, which would round to TF32
        tile = Tile(64, 64, 16, 8, 2)
    elif channels > 128:  # wide heads are loaded in parts
        tile = Tile(128, 64, 64, 8, 2)
    elif channels == 128 or masked:
        tile = Tile(128, 64, channels, 8, 3)
    else:
        tile = Tile(128, 128, channels, 8, 3)
    return tile._replace(queries=min(tile.queries, max(16, triton.next_power_of_2(length))))


def launch(
    query: Tensor,
    key: Tensor,
    maxima: Tensor,
    *,
    scale: float,
    is_causal: bool = False,
    window: int | None = None,
    documents: Tensor | None = None,
    mask: Tensor | None = None,
    tile: Tile | None = None,
) -> None:
    """Updates ``maxima`` in place to the maximum of themselves and the visible logits.

    Does not synchronize or allocate. Inputs may have any strides, including 0. See
    :func:`~lightning_muonclip.kernels.max_logits.max_logits` for their meaning.

    Args:
        query: Shape ``(batch, heads, L, d)``.
        key: Shape ``(batch, key_heads, S, d)``.
        maxima: Contiguous float32 tensor of shape ``(heads,)``: ``-inf``, or the maxima so far. A positive NaN, the only
            kind the kernel writes, persists.
        scale: Factor on the dot products.
        is_causal: Query i sees only keys 0..i.
        window: Query i sees only keys between ``i - window`` and ``i + window``, both exclusive.
        documents: Integers of shape ``(batch, L)``.
        mask: Boolean or additive, shape ``(batch, heads, L, S)``.
        tile: Defaults to that of :func:`tile_for`.
    """
    batch, heads, length, head_dim = query.shape
    key_length = key.shape[2]
    # A CPU tensor means Triton's interpreter, which cannot multiply bfloat16.
    is_half = query.dtype is key.dtype and query.dtype in (torch.float16, torch.bfloat16) and not query.is_cpu
    work = query.dtype if is_half else torch.float32
    tile = tile or tile_for(work, head_dim, length, documents is not None or mask is not None)
    kind = "none" if mask is None else "boolean" if mask.dtype is torch.bool else "additive"
    if mask is not None and kind == "boolean":
        mask = mask.view(torch.uint8)
    # One-dimensional: the other grid dimensions are limited to 65535 programs.
    grid = (triton.cdiv(length, tile.queries) * heads * batch,)
    with torch.cuda.device_of(query):  # Triton launches on the current device; no-op for a CPU tensor
        _kernel[grid](
            maxima,
            query,
            key,
            documents,
            mask,
            abs(scale),
            length,
            key_length,
            window or 0,
            heads,
            heads // key.shape[1],
            *query.stride(),
            *key.stride(),
            *((0, 0) if documents is None else documents.stride()),
            *((0, 0, 0, 0) if mask is None else mask.stride()),
            FLIP=scale < 0,
            CAUSAL=is_causal,
            WINDOW=window is not None,
            DOCUMENTS=documents is not None,
            MASK=kind,
            HIDDEN=HIDDEN,
            CHANNELS=head_dim,
            WORK=_WORK[work],
            TILE_Q=tile.queries,
            TILE_K=tile.keys,
            TILE_D=tile.channels,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


_WORK: dict[torch.dtype, Any] = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


# Lengths vary between batches and must not trigger recompilation.
@triton.jit(do_not_specialize=["length", "key_length", "window", "heads", "group"])
def _kernel(
    maxima,
    query,
    key,
    documents,
    mask,
    scale,
    length,
    key_length,
    window,
    heads,
    group,
    q_batch,
    q_head,
    q_row,
    q_channel,
    k_batch,
    k_head,
    k_row,
    k_channel,
    d_batch,
    d_row,
    m_batch,
    m_head,
    m_row,
    m_column,
    FLIP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    MASK: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHANNELS: tl.constexpr,
    WORK: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """One tile of queries of one head against all keys it may see."""
    tiles = tl.cdiv(length, TILE_Q)
    program = tl.program_id(0)
    # Consecutive programs share keys. The last queries go first: under causality they have the most work.
    top = (tiles - 1 - program % tiles) * TILE_Q
    bottom = tl.minimum(top + TILE_Q, length)
    head = program // tiles % heads
    batch = (program // tiles // heads).to(tl.int64)
    # 64-bit offsets: a long batch with many heads exceeds 2^31 elements.
    rows = tl.minimum(top + tl.arange(0, TILE_Q), length - 1)
    query += batch * q_batch + head.to(tl.int64) * q_head + rows.to(tl.int64)[:, None] * q_row
    key += batch * k_batch + (head // group).to(tl.int64) * k_head
    if DOCUMENTS:
        documents += batch * d_batch
    if MASK != "none":
        mask += batch * m_batch + head.to(tl.int64) * m_head + rows.to(tl.int64)[:, None] * m_row

    # Some query of the tile sees the keys [first, last); all of them see [all_first, all_last).
    first = tl.full((), 0, tl.int32)
    last = first + key_length
    all_first = first
    all_last = last
    if WINDOW:
        first = tl.maximum(top - window + 1, 0)
        all_first = tl.maximum(bottom - window, 0)
    if CAUSAL:
        last = tl.minimum(bottom, last)
        all_last = tl.minimum(top + 1, all_last)
    elif WINDOW:
        last = tl.minimum(bottom - 1 + window, last)
        all_last = tl.minimum(top + window, all_last)
    row_ids = rows
    if DOCUMENTS:
        row_ids = tl.load(documents + rows.to(tl.int64) * d_row).to(tl.int64)
        first, last, is_one = _document_span(documents, d_row, row_ids, first, last)
        all_first = tl.where(is_one, tl.maximum(all_first, first), first)
        all_last = tl.where(is_one, tl.minimum(all_last, last), first)
    if MASK != "none":
        all_first = first
        all_last = first

    # The loop needs a mask from `first` to `start`, none from `start` to `stop`, and one again from `stop` to `last`.
    start = first
    if WINDOW:
        start += tl.cdiv(tl.maximum(tl.minimum(all_first, last) - first, 0), TILE_K) * TILE_K
    common = tl.maximum(all_last - start, 0)
    stop = start + tl.where(all_last >= last, tl.cdiv(common, TILE_K), common // TILE_K) * TILE_K

    channels = tl.arange(0, TILE_D)
    # All channels of a narrow head, loaded once.
    fixed = _load(query, q_channel, channels[None, :], CHANNELS, TILE_D, WORK)
    best = tl.full((TILE_Q, TILE_K), float("-inf"), tl.float32)
    for part in tl.static_range(3):
        masked = part != 1
        if not masked or (part == 0 and WINDOW) or (part == 2 and (CAUSAL or WINDOW or DOCUMENTS or MASK != "none")):
            begin = first if part == 0 else (start if part == 1 else stop)
            end = start if part == 0 else (stop if part == 1 else last)
            for left in range(begin, end, TILE_K):
                columns = tl.minimum(left + tl.arange(0, TILE_K), last - 1)
                offsets = columns.to(tl.int64)[None, :]
                logits = tl.full((TILE_Q, TILE_K), 0.0, tl.float32)
                if CHANNELS <= TILE_D:
                    part_of_key = _load(key + offsets * k_row, k_channel, channels[:, None], CHANNELS, TILE_D, WORK)
                    logits = tl.dot(fixed, part_of_key, logits, input_precision="ieee")
                elif WORK == tl.float32:  # not unrolled: that would take a minute to compile
                    for offset in range(0, CHANNELS, TILE_D):
                        logits = _add_part(
                            logits, query, key + offsets * k_row, q_channel, k_channel, offset, CHANNELS, TILE_D, WORK
                        )
                else:
                    for offset in tl.static_range(0, CHANNELS, TILE_D):
                        logits = _add_part(
                            logits, query, key + offsets * k_row, q_channel, k_channel, offset, CHANNELS, TILE_D, WORK
                        )
                if FLIP:
                    logits = -logits
                if masked:
                    visible = _visible(rows[:, None], columns[None, :], window, CAUSAL, WINDOW)
                    if DOCUMENTS:
                        ids = tl.load(documents + offsets * d_row).to(tl.int64)
                        visible &= (row_ids[:, None] == ids) & (row_ids >= 0)[:, None]
                    if MASK == "boolean":
                        visible &= tl.load(mask + offsets * m_column) != 0
                    if MASK == "additive":
                        visible &= tl.load(mask + offsets * m_column).to(tl.float32) > HIDDEN
                    logits = tl.where(visible, logits, float("-inf"))
                best = tl.maximum(best, logits, propagate_nan=tl.PropagateNan.ALL)
    _raise_maximum(maxima + head, best, scale)


@triton.jit
def _add_part(
    logits,
    query,
    key,
    q_channel,
    k_channel,
    offset,
    CHANNELS: tl.constexpr,
    TILE_D: tl.constexpr,
    WORK: tl.constexpr,
):
    """Adds the products of one part of the channels of a wide head."""
    channels = offset + tl.arange(0, TILE_D)
    own = _load(query, q_channel, channels[None, :], CHANNELS, TILE_D, WORK)
    other = _load(key, k_channel, channels[:, None], CHANNELS, TILE_D, WORK)
    return tl.dot(own, other, logits, input_precision="ieee")


@triton.jit
def _load(rows, stride, channels, CHANNELS: tl.constexpr, TILE_D: tl.constexpr, WORK: tl.constexpr):
    """The given channels of all rows, zero past the last channel."""
    if CHANNELS % TILE_D == 0:
        return tl.load(rows + channels * stride).to(WORK)
    else:
        return tl.load(rows + channels * stride, mask=channels < CHANNELS, other=0).to(WORK)


@triton.jit
def _visible(rows, columns, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which pairs causality and the window leave visible."""
    visible = (rows >= 0) & (columns >= 0)
    if CAUSAL:
        visible &= columns <= rows
    if WINDOW:
        visible &= columns > rows - window
        if not CAUSAL:
            visible &= columns < rows + window
    return visible


@triton.jit
def _document_span(documents, stride, row_ids, first, last):
    """Bounds of the keys whose documents match those of the rows, and whether all pairs in between are visible.

    Reads every id once per program. The ids need no order, but only packed documents give tight bounds.
    """
    AT_ONCE: tl.constexpr = 1024
    lowest = tl.min(row_ids)
    highest = tl.max(row_ids)
    begin = last
    end = first
    count = tl.full((), 0, tl.int32)
    for left in range(first, last, AT_ONCE):
        columns = left + tl.arange(0, AT_ONCE)
        ids = tl.load(documents + columns.to(tl.int64) * stride, mask=columns < last, other=-1).to(tl.int64)
        meets = (ids >= tl.maximum(lowest, 0)) & (ids <= highest)
        begin = tl.minimum(begin, tl.min(tl.where(meets, columns, last)))
        end = tl.maximum(end, tl.max(tl.where(meets, columns + 1, first)))
        count += tl.sum(meets.to(tl.int32))
    return begin, end, (lowest == highest) & (count == end - begin)


@triton.jit
def _raise_maximum(address, tile, scale):
    """Updates a float32 to the scaled maximum of itself and a tile; NaN if either contains NaN.

    Reductions and atomics treat NaN differently across devices, but integers alike: read as integers, the bits of positive
    floats are in order, those of negative floats in reverse, and a positive NaN is above all of them.
    """
    bits = _bits(tile)
    ordered = tl.max(bits ^ ((bits >> 31) & 0x7FFFFFFF))
    largest = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    # The scale is applied last. A scale of 0 must not turn the -inf of a head that sees nothing into NaN.
    bits = _bits(tl.where(largest == float("-inf"), largest, largest * scale))
    tl.atomic_max(address.to(tl.pointer_type(tl.int32), bitcast=True), bits, mask=bits >= 0, sem="relaxed")
    unsigned = bits.to(tl.uint32, bitcast=True)
    tl.atomic_min(address.to(tl.pointer_type(tl.uint32), bitcast=True), unsigned, mask=bits < 0, sem="relaxed")


@triton.jit
def _bits(x):
    """The bits of float32 numbers, with every NaN mapped to the same positive NaN."""
    return tl.where(x == x, x.to(tl.int32, bitcast=True), 0x7FC00000)
