"""Rotary position embedding (RoPE), Su et al., arXiv 2104.09864."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Angles of every position, for :func:`rotate`.

    Args:
        dim: Number of channels that are rotated; even.
        theta: Base of the wavelengths.

    Raises:
        ValueError: If ``dim`` is odd.
    """

    def __init__(self, dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"rotary embedding turns pairs of channels, so their number must be even; got {dim}")
        self.dim = dim
        self.theta = theta

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32, shape ``(batch, 1, length, dim)``, of positions of shape ``(batch, length)``."""
        # Made anew each time: a buffer of frequencies would lose its precision in ``module.bfloat16()``.
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device=position_ids.device) / self.dim
        angles = position_ids.unsqueeze(-1).float() * self.theta**-exponents
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns channel i together with channel ``i + dim/2``, shape ``(batch, heads, length, dim)`` (Llama's pairing)."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns neighbouring channels together (DeepSeek's pairing); the result lists all first, then all second ones."""
    return rotate(x.unflatten(-1, (-1, 2)).mT.flatten(-2), cos, sin)
