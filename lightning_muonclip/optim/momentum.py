"""Momentum, in the dtype of the weights or in another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gain(buffers: Sequence[Tensor], grads: Sequence[Tensor], momentum: float) -> None:
    """Moves momentum towards the gradients."""
    alike = [(buffer, grad) for buffer, grad in zip(buffers, grads) if buffer.dtype == grad.dtype]
    if alike:
        torch._foreach_lerp_([buffer for buffer, _ in alike], [grad for _, grad in alike], 1 - momentum)
    for buffer, grad in zip(buffers, grads):
        if buffer.dtype != grad.dtype:
            exact = torch.promote_types(torch.promote_types(buffer.dtype, grad.dtype), torch.float32)
            moved = buffer.to(exact).lerp_(grad.to(exact), 1 - momentum)
            is_rounded = buffer.dtype == torch.bfloat16
            buffer.copy_(rounded_by_chance(moved.float(), grad.float()) if is_rounded else moved)


def nesterov(buffers: Sequence[Tensor], grads: Sequence[Tensor], momentum: float) -> list[Tensor]:
    """The gradients, moved towards the momentum."""
    return list(torch._foreach_lerp(list(grads), as_of(buffers, grads), momentum))


def as_of(buffers: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """The momentum in the dtype of the gradients."""
    return [buffer.to(grad.dtype) for buffer, grad in zip(buffers, grads)]


def rounded_by_chance(x: Tensor, seed: Tensor) -> Tensor:
    """Rounds float32 to bfloat16, up or down with probabilities such that the mean is right.

    What is too small to change a bfloat16 is then not lost step by step. Chance is a hash of the bits of ``x`` and of a seed
    of its shape: no state is kept, and every rank and every resumed run rounds alike.
    """
    bits = x.contiguous().view(torch.int32)
    noise = bits * 0x01000193 ^ seed.contiguous().view(torch.int32) * 0x3C6EF372
    noise = (noise ^ (noise >> 15)) * 0x2C1B3C6D
    noise = (noise ^ (noise >> 12)) * 0x297A2D39
    rounded = (bits + ((noise >> 15) & 0xFFFF)) & -0x10000
    return torch.where(x.isfinite(), rounded.view(torch.float32), x).to(torch.bfloat16)
