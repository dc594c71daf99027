"""Orthogonalizes batches of matrices by a Newton-Schulz iteration, which needs only matrix products."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lightning_muonclip.kernels.costs import cpu_costs
from lightning_muonclip.kernels.symmetric_matmul import Product, product_for, symmetric_cost
from lightning_muonclip.optim.coefficients import Coefficients, Odd, Schedule, resolve_schedule
from lightning_muonclip.optim.restarts import best_restarts
from lightning_muonclip.optim.stacking import most_stacked

METHODS = ("auto", "direct", "gram")

#: An aspect ratio at which only products with the matrix itself count.
_VERY_WIDE = 1e9


@torch.no_grad()
def orthogonalize(
    x: Tensor,
    *,
    coefficients: Coefficients | None = None,
    steps: int | None = None,
    method: str = "auto",
    dtype: torch.dtype | None = None,
    eps: float = 1e-7,
) -> Tensor:
    r"""Moves all singular values of a matrix towards 1: for :math:`X = U S V^T`, returns approximately :math:`U V^T`.

    The result does not depend on the scale of ``x``. A zero matrix stays zero. A matrix with a non-finite entry becomes
    non-finite and does not affect the other matrices of the batch.

    Args:
        x: One matrix or a batch, shape ``(..., m, n)``. Not modified.
        coefficients: A schedule or its name (see :func:`~lightning_muonclip.optim.coefficients.resolve_schedule`). Defaults
            to the library's schedule.
        steps: Number of steps. Defaults to that of the schedule.
        method: ``"direct"`` multiplies the matrix itself at every step. ``"gram"`` iterates on its Gram matrix for as many
            steps as rounding permits. ``"auto"`` is the cheapest mix of both that rounding permits.
        dtype: Working dtype. Defaults to :func:`working_dtype` of the device and the shape of ``x``.
        eps: Added to the norm of the matrix divided by its largest entry. Guards against 0/0 at any scale of ``x``.

    Returns:
        Tensor of the shape and dtype of ``x``.

    Raises:
        ValueError: If ``x`` has fewer than two dimensions or is not real floating point, or if the schedule or method is
            unknown.

    Source: Keller Jordan (2024); Kimi K2, arXiv 2507.20534, algorithm 1; Gram form: Dao-AILab, Gram-Newton-Schulz (2026).

    Example:
        >>> x = torch.diag(torch.tensor([3.0, 1.0]))
        >>> orthogonalize(x, steps=8, dtype=torch.float32).round(decimals=3)
        tensor([[1., 0.],
                [0., 1.]])
    """
    if x.ndim < 2:
        raise ValueError(f"orthogonalize needs a matrix or a batch of matrices, got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"orthogonalize needs a real floating-point dtype, got {x.dtype}")
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; use one of {', '.join(METHODS)}")
    dtype = dtype or working_dtype(x.device, min(x.shape[-2:]))
    schedule = resolve_schedule(coefficients, steps, dtype)
    if x.numel() == 0:
        return x.clone()
    kind = x.device.type
    if _has_autocast(kind) and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):  # the restarts are planned for the working dtype
            return _in_pieces(x, schedule, method, dtype, eps)
    return _in_pieces(x, schedule, method, dtype, eps)


def _in_pieces(x: Tensor, schedule: Schedule, method: str, dtype: torch.dtype, eps: float) -> Tensor:
    """Orthogonalizes a batch, on a CPU no more of it at once than stays in cache."""
    stack = x.reshape(-1, *x.shape[-2:])
    size = most_stacked(x.device, dtype) if x.device.type == "cpu" else stack.numel()
    count = max(1, size // stack[0].numel())
    if count >= len(stack):
        return _orthogonalize(stack, schedule, method, dtype, eps).reshape(x.shape).to(x.dtype)
    result = torch.empty_like(stack)
    for piece, own in zip(stack.split(count), result.split(count)):
        own.copy_(_orthogonalize(piece, schedule, method, dtype, eps))
    return result.reshape(x.shape)


def _orthogonalize(stack: Tensor, schedule: Schedule, method: str, dtype: torch.dtype, eps: float) -> Tensor:
    y = _normalize(stack, schedule.norm, eps).to(dtype)
    if y.shape[-2] <= y.shape[-1]:
        return _iterate(y, schedule, _restarts(y, schedule, method))
    return _iterate(y.mT, schedule, _restarts(y.mT, schedule, method)).mT


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def _normalize(x: Tensor, norm: str, eps: float) -> Tensor:
    """Divides every matrix by its Frobenius norm; first by its largest entry, so that squares do not over- or underflow."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    tiny = torch.finfo(x.dtype).tiny  # instead of 0
    # amax and amin are vectorized on a CPU. The infinity norm is not and takes six times as long.
    largest = torch.maximum(x.amax((-2, -1), keepdim=True), x.amin((-2, -1), keepdim=True).neg_()).clamp_min_(tiny)
    x = x / largest
    size = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).add_(eps).clamp_min_(tiny)
    # Norms computed from the Gram matrix start from a larger scale, where half precision rounds it better.
    return x.mul_((1.0 if norm == "frobenius" else min(x.shape[-2:]) ** 0.5) / size)


def _restarts(wide: Tensor, schedule: Schedule, method: str) -> tuple[int, ...]:
    if method == "direct":
        return tuple(range(1, len(schedule.polynomials)))
    n, m = wide.shape[-2:]
    unit = torch.finfo(wide.dtype).eps / 2
    ratio = _VERY_WIDE if method == "gram" else m / n
    return best_restarts(schedule.polynomials, ratio, unit, symmetric_cost(wide), schedule.in_pairs)


def _iterate(wide: Tensor, schedule: Schedule, restarts: tuple[int, ...]) -> Tensor:
    """Newton-Schulz on matrices of shape (batch, n, m) with n <= m, with restarts before the given steps."""
    symmetric = product_for(wide)
    wide, gram = _bring_below_one(wide, symmetric(wide, wide), schedule.norm)
    for start, end in pairwise((0, *restarts, len(schedule.polynomials))):
        if start:
            gram = symmetric(wide, wide)
        first, *others = schedule.polynomials[start:end]
        if not others:
            # The identity term is added separately: in half precision, summing it first would round off the rest.
            wide = _multiply(_polynomial(symmetric, gram, (0.0, *first[1:])), wide, beta=first[0])
            continue
        factor = z = _polynomial(symmetric, gram, first)
        for polynomial in others:
            # Z R Z, not R Z Z: rounding errors that mix large and small directions then grow by a per step, not by a².
            gram = symmetric(symmetric(z, gram), z)
            z = _polynomial(symmetric, gram, polynomial)
            factor = symmetric(z, factor)
        wide = _multiply(factor, wide, beta=0.0)
    return wide


def _multiply(symmetric: Tensor, wide: Tensor, beta: float) -> Tensor:
    """``symmetric @ wide + beta · wide``, in the memory layout of ``wide``.

    A transposed view of a tall matrix stays one, so transposing the result back gives contiguous rows, which are ten times
    as fast to read.
    """
    if wide.stride(-1) == 1:
        return torch.baddbmm(wide, symmetric, wide, beta=beta)
    return torch.baddbmm(wide.mT, wide.mT, symmetric, beta=beta).mT


def _bring_below_one(wide: Tensor, gram: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """Scales matrices and their Gram matrices so that all singular values are in [0, 1]."""
    exact = torch.promote_types(gram.dtype, torch.float32)
    if norm == "frobenius":
        return wide, gram
    if norm == "schatten4":
        squared = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True, dtype=exact)
        scale = torch.where(squared == 0, 1.0, squared).reciprocal()
        return (scale.sqrt() * wide).to(wide.dtype), (scale * gram).to(gram.dtype)
    # Subnormal sums are rounded so coarsely that a row could end up above 1.
    rows = gram.abs().sum(-1, keepdim=True, dtype=exact).clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()
    return (rows * wide).to(wide.dtype), (rows * gram * rows.mT).to(gram.dtype)


def _polynomial(symmetric: Product, gram: Tensor, coefficients: Odd) -> Tensor:
    """``a + b·R + c·R² + ...`` of a Gram matrix R."""
    if len(coefficients) == 3:
        a, b, c = coefficients
        return symmetric(gram, gram, gram, c, b, a)
    if len(coefficients) == 2:
        return _add_identity(coefficients[1] * gram, coefficients[0])
    # Horner's rule in R², so that two coefficients cost one product.
    square = symmetric(gram, gram)
    if len(coefficients) % 2:
        *rest, even, odd, highest = coefficients
        total = _add_identity(highest * square + odd * gram, even)
    else:
        *rest, even, odd = coefficients
        total = _add_identity(odd * gram, even)
    while rest:
        *rest, even, odd = rest
        total = symmetric(total, square, gram, 1.0, odd, even)
    return total


def _add_identity(x: Tensor, factor: float) -> Tensor:
    x.diagonal(dim1=-2, dim2=-1).add_(factor)
    return x


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def working_dtype(device: torch.device, side: int | None = None) -> torch.dtype:
    """The dtype in which the device orthogonalizes a matrix fastest.

    float16 on CUDA devices with tensor cores: as fast as bfloat16 and eight times finer, and normalized matrices do not
    overflow. On CPUs that multiply bfloat16 in hardware, bfloat16 for all but small matrices, whose products in float32 take
    less time than it takes to start one in bfloat16; other CPUs multiply it 10 to 100 times slower than float32.

    Args:
        device: Where the matrix is.
        side: The smaller side of the matrix; ``None`` is a large one.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0):
        return torch.float16
    bound = cpu_costs().bfloat16_from if device.type == "cpu" else None
    is_large = bound is not None and (side is None or side >= bound)
    return torch.bfloat16 if is_large else torch.float32
