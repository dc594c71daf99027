"""The nearest (semi-)orthogonal matrix, by a Newton-Schulz iteration: matrix products only, batched."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from lightning_muonclip.optim.coefficients import resolve_schedule


@torch.no_grad()
def orthogonalize(
    x: Tensor,
    *,
    coefficients: str | Sequence[float] | Sequence[Sequence[float]] | None = None,
    steps: int | None = None,
    method: str = "auto",
    dtype: torch.dtype | None = None,
    eps: float = 1e-7,
) -> Tensor:
    r"""Moves all singular values of a matrix towards 1: with :math:`X = U S V^T`, returns about :math:`U V^T`.

    The result does not depend on the scale of ``x``; a zero matrix stays zero; a matrix with a non-finite entry comes
    out non-finite, and no other matrix of the batch is touched by it.

    Args:
        x: One matrix or a batch, shape ``(..., m, n)``. Not modified.
        coefficients: A schedule's name, one ``(a, b, c)`` or a sequence of them; ``None`` is the library's default.
        steps: Number of iterations; ``None`` is the schedule's own.
        method: ``"direct"`` iterates on the matrix itself; ``"auto"`` picks the cheapest form that is as exact.
        dtype: Working dtype; ``None`` is :func:`working_dtype` of the device of ``x``.
        eps: Added to the norm of the matrix over its largest entry: guards 0/0, whatever the scale of ``x``.

    Returns:
        Tensor of the shape and dtype of ``x``.

    Raises:
        ValueError: If ``x`` has fewer than two dimensions or is not of real floating point, or the schedule or method
            is unknown.

    Source: Keller Jordan (2024); Kimi K2, arXiv 2507.20534, algorithm 1.

    Example:
        >>> x = torch.diag(torch.tensor([3.0, 1.0]))
        >>> orthogonalize(x, steps=8, dtype=torch.float32).round(decimals=3)
        tensor([[1., 0.],
                [0., 1.]])
    """
    if x.ndim < 2:
        raise ValueError(f"orthogonalize needs a matrix or a batch of them, got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"orthogonalize needs real floating-point numbers, got {x.dtype}")
    if method not in ("auto", "direct"):
        raise ValueError(f"unknown method {method!r}; known: auto, direct")
    schedule = resolve_schedule(coefficients, steps)
    if x.numel() == 0:
        return x.clone()
    y = _normalize(x, eps).to(dtype or working_dtype(x.device)).reshape(-1, *x.shape[-2:])
    wide = y.mT if y.shape[-2] > y.shape[-1] else y
    for a, b, c in schedule:
        gram = wide @ wide.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        wide = torch.baddbmm(wide, polynomial, wide, beta=a)
    y = wide.mT if x.shape[-2] > x.shape[-1] else wide
    return y.reshape(x.shape).to(x.dtype)


def _normalize(x: Tensor, eps: float) -> Tensor:
    """Divides every matrix by its Frobenius norm; first by its largest entry, so that no square over- or underflows."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = torch.linalg.vector_norm(x, float("inf"), dim=(-2, -1), keepdim=True)
    x = x / torch.where(largest == 0, 1.0, largest)
    return x.div_(torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).add_(eps))


def working_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware, else float32.

    A CPU without AVX512-BF16 or AMX multiplies bfloat16 10 to 100 times slower than float32.
    """
    return _working_dtype(device.type, device.index)


@cache
def _working_dtype(kind: str, index: int | None) -> torch.dtype:
    if kind == "cuda":
        has_bfloat16 = torch.cuda.get_device_capability(index) >= (8, 0)
    elif kind == "cpu":
        has_bfloat16 = _cpu_has_bfloat16()
    else:
        has_bfloat16 = False
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _cpu_has_bfloat16() -> bool:
    # torch's own probes are private; the kernel's flag list is public and covers every x86 and ARM server.
    try:
        with open("/proc/cpuinfo") as file:
            flags = set(file.read().split())
    except OSError:
        return False
    return not flags.isdisjoint({"amx_bf16", "avx512_bf16", "bf16"})
