"""Batched symmetric matrix product, the building block of Newton-Schulz: only one triangle is computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_muonclip.kernels.costs import cpu_costs

#: A GPU runs the Triton kernel from this many rows; below, torch's own operations are cheaper. float32 always uses the
#: kernel, because torch's product may be set to TF32. Estimates, not confirmed on a GPU yet.
KERNEL_FROM = {torch.float32: 1, torch.bfloat16: 64, torch.float16: 64}

#: A CPU computes a triangle of blocks, this many high, where that pays (see :class:`~.costs.Costs`).
PANELS = 4

#: Columns between the rows of a panel, since rows that are powers of two apart fall into the same lines of a cache.
_PADDING = 32

#: A transposed copy reads columns; this many at a time stay in cache.
_STRIP = 128
_BELOW = torch.ones(_STRIP, _STRIP, dtype=torch.bool, device="cpu").tril_()

#: As :func:`product_for` returns it.
Product: TypeAlias = Callable[..., Tensor]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@torch.no_grad()
def symmetric_matmul(
    a: Tensor,
    b: Tensor | None = None,
    *,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 0.0,
    c: Tensor | None = None,
    gamma: float | Tensor = 0.0,
) -> Tensor:
    r"""Computes :math:`\alpha A B^T + \beta C + \gamma I` for a batch of matrices whose result is known to be symmetric.

    It is symmetric without ``b``, and where ``a`` and ``b`` are symmetric and commute, as polynomials of one matrix do.
    This is not checked. Where only a triangle is computed, the result is symmetric bit for bit; elsewhere it is as symmetric
    as torch's product. Products accumulate in float32 (float64 for float64), regardless of autocast.

    Args:
        a: Shape ``(batch, n, k)``, any strides: ``x.mT`` of tall matrices is not copied.
        b: As ``a``. Defaults to ``a`` itself.
        alpha: A number, or a tensor of shape ``(batch,)`` on the device of ``a``.
        beta: As ``alpha``. If it is the number 0, ``c`` is not read.
        c: Symmetric, shape ``(batch, n, n)``. ``None`` means 0.
        gamma: As ``alpha``.

    Returns:
        Tensor of shape ``(batch, n, n)`` and of the dtype of ``a``, without gradient.

    Raises:
        ValueError: If shapes, dtypes or devices do not match.

    Example:
        >>> symmetric_matmul(torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]), alpha=2.0, gamma=-1.0)
        tensor([[[9., 4.],
                 [4., 1.]]])
    """
    _check(a, b, c, alpha, beta, gamma)
    (x, xs), (y, ys), (z, zs) = _split(alpha), _split(beta), _split(gamma)
    multiply = torch.ops.muonclip.symmetric_matmul if torch.compiler.is_compiling() else _symmetric_matmul
    return multiply(a, b, c, x, y, z, xs, ys, zs)


def product_for(a: Tensor) -> Product:
    """The cheapest way to :func:`symmetric_matmul` for a loop over matrices like ``a``, chosen and checked once.

    It takes ``(a, b, c, alpha, beta, gamma)``, without tensors as factors, and is for use outside of autocast.
    """
    if a.device.type != "cpu" or a.dtype is torch.float16 or torch.compiler.is_compiling():
        return _product
    return _by_panels if symmetric_cost(a) < 1 else _whole


def symmetric_cost(a: Tensor) -> float:
    """Approximate time of :func:`symmetric_matmul`, relative to a general product of the same size.

    Args:
        a: Shape ``(batch, n, k)``.
    """
    if _runs_kernel(a):
        return 0.6
    return 0.8 if a.device.type == "cpu" and a.shape[1] >= cpu_costs().panels_from[a.dtype] else 1.0


def _check(a: Tensor, b: Tensor | None, c: Tensor | None, *factors: float | Tensor) -> None:
    if a.ndim != 3 or a.dtype not in _DTYPES:
        raise ValueError(
            "symmetric_matmul needs a batch of real floating-point matrices, of shape (batch, n, k); got"
            f" {a.dtype} of shape {tuple(a.shape)}"
        )
    batch, n, _ = a.shape
    for name, x, shape in (("b", b, a.shape), ("c", c, (batch, n, n))):
        if x is not None and (x.shape != shape or x.dtype is not a.dtype or x.device != a.device):
            need, have = (f"{t} of shape {tuple(s)} on {d}" for t, s, d in (_kind(a, shape), _kind(x, x.shape)))
            raise ValueError(f"symmetric_matmul needs {name} to be {need}, got {have}")
    for factor in factors:
        if isinstance(factor, Tensor) and (factor.shape != (batch,) or factor.device != a.device):
            have = f"shape {tuple(factor.shape)} on {factor.device}"
            raise ValueError(f"a factor per matrix must have shape ({batch},) and be on {a.device}, got {have}")


def _kind(x: Tensor, shape: tuple[int, ...]) -> tuple[torch.dtype, tuple[int, ...], torch.device]:
    return x.dtype, shape, x.device


def _split(factor: float | Tensor) -> tuple[float, Tensor | None]:
    return (1.0, factor) if isinstance(factor, Tensor) else (float(factor), None)


def _product(
    a: Tensor, b: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0, gamma: float = 0.0
) -> Tensor:
    return symmetric_matmul(a, b, alpha=alpha, beta=beta, c=c, gamma=gamma)


def _symmetric_matmul(
    a: Tensor,
    b: Tensor | None,
    c: Tensor | None,
    alpha: float,
    beta: float,
    gamma: float,
    alphas: Tensor | None,
    betas: Tensor | None,
    gammas: Tensor | None,
) -> Tensor:
    """Every factor is a number times a tensor (``None`` for ones), since the schema of an operator allows no unions."""
    b = a if b is None else b
    c = None if beta == 0 else c
    if _runs_kernel(a):
        from lightning_muonclip.kernels.symmetric_matmul_triton import launch

        return launch(a, b, c, alpha, beta, gamma, alphas, betas, gammas)
    kind = a.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return _symmetric_matmul(a, b, c, alpha, beta, gamma, alphas, betas, gammas)
    if kind == "cpu" and a.dtype is torch.float16:  # no slower, and no rounding before the addition
        c = None if c is None else c.float()
        return _symmetric_matmul(a.float(), b.float(), c, alpha, beta, gamma, alphas, betas, gammas).half()
    if alpha == 0:  # torch's bfloat16 product then returns early and ignores beta
        a, b = a[..., :0], b[..., :0]
    product = _by_panels if symmetric_cost(a) < 1 else _whole
    if alphas is None and betas is None and gammas is None:
        return product(a, b, c, alpha, beta, gamma)
    out = product(a, b) * _each(alpha, alphas, a)
    if c is not None:
        out += c * _each(beta, betas, a)
    return _add_identity(out, _each(gamma, gammas, a))


def _each(number: float, tensor: Tensor | None, like: Tensor) -> float | Tensor:
    """A factor in a form that broadcasts over a batch of matrices."""
    return number if tensor is None else (number * tensor[:, None, None]).to(like.dtype)


# Opaque to torch.compile: the code below unrolls loops over the shape and depends on the machine.
_operation = torch.library.custom_op(
    "muonclip::symmetric_matmul",
    _symmetric_matmul,
    mutates_args=(),
    schema="(Tensor a, Tensor? b, Tensor? c, float alpha, float beta, float gamma, "
    "Tensor? alphas, Tensor? betas, Tensor? gammas) -> Tensor",
)


@_operation.register_fake
def _(a: Tensor, *others: object) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[1], a.shape[1])


def _runs_kernel(a: Tensor) -> bool:
    return a.is_cuda and a.dtype in KERNEL_FROM and a.shape[1] >= KERNEL_FROM[a.dtype] and _has_triton(a.device.index)


@cache
def _has_triton(index: int) -> bool:
    """Whether the device can run the kernel, whose tiles need NVIDIA's Ampere or later."""
    is_nvidia = torch.version.hip is None
    return is_nvidia and find_spec("triton") is not None and torch.cuda.get_device_capability(index) >= (8, 0)


def _whole(
    a: Tensor, b: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0, gamma: float = 0.0
) -> Tensor:
    if c is None:
        out = torch.bmm(a, b.mT)
        if alpha != 1:
            out *= alpha
    else:
        out = torch.baddbmm(c, a, b.mT, beta=beta, alpha=alpha)
    return out if gamma == 0 else _add_identity(out, gamma)


def _by_panels(
    a: Tensor, b: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0, gamma: float = 0.0
) -> Tensor:
    """The CPU twin of the kernel: panels of rows, each cut at the diagonal and mirrored."""
    batch, n, _ = a.shape
    out = a.new_empty(batch, n, n)
    height = -(-n // PANELS)
    room = a.new_empty(height, n + _PADDING)
    # One matrix at a time: torch's batched product is up to four times slower in bfloat16, and never faster here.
    for i, (left, right, own) in enumerate(zip(a, b.mT, out)):
        for top in range(0, n, height):
            bottom = min(top + height, n)
            panel = room[: bottom - top, :bottom]
            if c is not None:
                panel.copy_(c[i, top:bottom, :bottom])
            panel.addmm_(left[top:bottom], right[:, :bottom], beta=0.0 if c is None else beta, alpha=alpha)
            own[top:bottom, :bottom] = panel
            own[:top, top:bottom] = panel[:, :top].mT
            if (
                a.dtype is not torch.bfloat16
            ):  # whose products are exact in float32, so that squares are symmetric anyway
                _mirror(own[top:bottom, top:bottom])
    return out if gamma == 0 else _add_identity(out, gamma)


def _mirror(x: Tensor) -> None:
    """Copies the lower triangle of a matrix onto the upper one."""
    n = len(x)
    for top in range(0, n, _STRIP):
        bottom = min(top + _STRIP, n)
        x[:top, top:bottom] = x[top:bottom, :top].mT
        square = x[top:bottom, top:bottom]
        square.copy_(torch.where(_BELOW[: bottom - top, : bottom - top], square, square.mT))


def _add_identity(x: Tensor, factor: float | Tensor) -> Tensor:
    x.diagonal(dim1=1, dim2=2)[..., None].add_(factor)
    return x
