"""Triton kernel of :mod:`~lightning_muonclip.kernels.symmetric_matmul`, imported only where it runs."""

# Triton is untyped.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Config(NamedTuple):
    """Launch parameters: tiles of ``block x block``, ``block_k`` columns of the operands at a time."""

    block: int
    block_k: int
    num_warps: int
    num_stages: int


# A table instead of autotuning, which would run for every new shape in the middle of a step. The large tile keeps 96 KiB in
# flight, which fits every GPU since Ampere. Estimates, not confirmed on a GPU yet.
_LARGE = Config(block=128, block_k=64, num_warps=8, num_stages=3)
_SMALL = Config(block=64, block_k=64, num_warps=4, num_stages=4)
_FLOAT32 = Config(block=64, block_k=32, num_warps=4, num_stages=3)

#: Large tiles from this many rows; with fewer rows they would be too few to occupy the GPU.
_LARGE_FROM = 1024

#: Rows of tiles processed together, so that consecutive programs find their operands in the L2 cache.
_GROUP = 8


def config_for(n: int, dtype: torch.dtype) -> Config:
    """The tiles for ``n`` rows. float32 runs without tensor cores and takes twice the memory."""
    if dtype is torch.float32:
        return _FLOAT32
    return _LARGE if n >= _LARGE_FROM else _SMALL


def launch(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    alpha: float,
    beta: float,
    gamma: float,
    alphas: Tensor | None,
    betas: Tensor | None,
    gammas: Tensor | None,
) -> Tensor:
    """Computes ``alpha alphas a b^T + beta betas c + gamma gammas I``; a missing factor is 1, a missing ``c`` is 0.

    Args:
        a: Shape ``(batch, n, k)``, any strides; bfloat16, float16 or float32.
        b: Shape ``(batch, n, k)``, any strides.
        c: Shape ``(batch, n, n)``, any strides.
        alpha: A float, so that a new value does not recompile the kernel.
        beta: As ``alpha``.
        gamma: As ``alpha``.
        alphas: Shape ``(batch,)``.
        betas: Shape ``(batch,)``.
        gammas: Shape ``(batch,)``.

    Returns:
        Contiguous tensor of shape ``(batch, n, n)`` and of the dtype of ``a``.
    """
    batch, n, k = a.shape
    out = a.new_empty(batch, n, n)
    if out.numel() == 0:
        return out
    config = config_for(n, a.dtype)
    tiles = triton.cdiv(n, config.block)
    with torch.cuda.device_of(a):
        _lower_tile[(batch * (tiles * (tiles + 1) // 2),)](
            *(a, b, c, out, alphas, betas, gammas),
            *(alpha, beta, gamma, n, k, tiles),
            *(*a.stride(), *b.stride(), *((0, 0, 0) if c is None else c.stride()), *out.stride()[:2]),
            *(0 if x is None else x.stride(0) for x in (alphas, betas, gammas)),
            BLOCK=config.block,
            BLOCK_K=config.block_k,
            GROUP=_GROUP,
            EVEN_N=n % config.block == 0,
            EVEN_K=k % config.block_k == 0,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out


# The kernels call only Triton's built-ins, none of its helpers written in Triton (tl.zeros, tl.cdiv): the interpreter cannot
# run those once Triton has been imported for compiling.


@triton.jit
def _triangle_row(index):
    """Row of entry ``index`` of a lower triangle written row by row: the largest r with r (r + 1) / 2 <= index."""
    row = ((tl.sqrt(8.0 * index + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(
        row * (row + 1) // 2 > index, row - 1, row
    )  # the root may be off by its last bit in either direction
    return tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)


@triton.jit
def _tile_of(index, tiles, GROUP: tl.constexpr):  # noqa: N803
    """Row and column of tile ``index`` of the lower triangle, GROUP rows at a time, down each column of the group.

    The groups above hold as many tiles as in row-by-row order. Each group is a rectangle, traversed column by column, and
    then a small triangle on the diagonal.
    """
    first = _triangle_row(index) // GROUP * GROUP
    height = tl.minimum(GROUP, tiles - first)
    index -= first * (first + 1) // 2
    corner = index - first * height
    below = _triangle_row(tl.maximum(corner, 0))
    row = first + tl.where(corner < 0, index % height, below)
    column = tl.where(corner < 0, index // height, first + corner - below * (below + 1) // 2)
    return row, column


@triton.jit
def _lower_tile(
    a,
    b,
    c,
    out,
    alphas,
    betas,
    gammas,
    alpha,
    beta,
    gamma,
    n,
    k,
    tiles,
    a_batch,
    a_row,
    a_column,
    b_batch,
    b_row,
    b_column,
    c_batch,
    c_row,
    c_column,
    out_batch,
    out_row,
    alphas_stride,
    betas_stride,
    gammas_stride,
    BLOCK: tl.constexpr,  # noqa: N803
    BLOCK_K: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    EVEN_N: tl.constexpr,  # noqa: N803
    EVEN_K: tl.constexpr,  # noqa: N803
):
    """One tile of the lower triangle of one matrix, and its mirror image."""
    in_triangle = tiles * (tiles + 1) // 2
    matrix = (tl.program_id(0) // in_triangle).to(tl.int64)
    i, j = _tile_of(tl.program_id(0) % in_triangle, tiles, GROUP)
    # 64-bit, since every offset derives from these: a batch of large matrices, or a row of a view, may exceed 2^31 elements.
    rows = i * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    columns = j * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    step = tl.full((), BLOCK_K, tl.int64)

    left = a + matrix * a_batch + rows[:, None] * a_row + ks[None, :] * a_column
    right = b + matrix * b_batch + columns[None, :] * b_row + ks[:, None] * b_column
    sums = tl.full((BLOCK, BLOCK), 0.0, tl.float32)
    for start in range(0, k, BLOCK_K):
        if EVEN_N and EVEN_K:
            x = tl.load(left)
            y = tl.load(right)
        elif EVEN_K:
            x = tl.load(left, mask=rows[:, None] < n, other=0.0)
            y = tl.load(right, mask=columns[None, :] < n, other=0.0)
        else:
            x = tl.load(left, mask=(rows[:, None] < n) & (ks[None, :] < k - start), other=0.0)
            y = tl.load(right, mask=(columns[None, :] < n) & (ks[:, None] < k - start), other=0.0)
        sums = tl.dot(x, y, sums, input_precision="ieee")
        left += step * a_column
        right += step * b_column

    if alphas is not None:
        alpha *= tl.load(alphas + matrix * alphas_stride).to(tl.float32)
    if gammas is not None:
        gamma *= tl.load(gammas + matrix * gammas_stride).to(tl.float32)
    inside = (rows[:, None] < n) & (columns[None, :] < n)
    sums = alpha * sums + tl.where(rows[:, None] == columns[None, :], gamma, 0.0)
    if c is not None:
        if betas is not None:
            beta *= tl.load(betas + matrix * betas_stride).to(tl.float32)
        addend = c + matrix * c_batch + rows[:, None] * c_row + columns[None, :] * c_column
        sums += beta * tl.load(addend, mask=inside, other=0.0).to(tl.float32)

    # Transposed on chip, so that both copies are written along their rows.
    tile = sums.to(out.dtype.element_ty)
    mirrored = tl.trans(tile)
    own = out + matrix * out_batch
    if i == j:
        tile = tl.where(rows[:, None] >= columns[None, :], tile, mirrored)
    else:
        image = own + columns[:, None] * out_row + rows[None, :]
        tl.store(image, mirrored, mask=(columns[:, None] < n) & (rows[None, :] < n))
    tl.store(own + rows[:, None] * out_row + columns[None, :], tile, mask=inside)
