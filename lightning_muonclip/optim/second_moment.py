"""NorMuon: divides the rows of orthogonalized updates by a running mean of their lengths.

All that it needs are sums of squares, one for each row, or for each column of a matrix that is wider than tall: its rows are
of one length already. So ranks that hold a part of a matrix need no more than these, and have the same state.

Source: NorMuon, arXiv 2510.05491, algorithm 1; columns of wide matrices: modded-nanogpt and nanochat.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_muonclip.optim.parts import Parts
from lightning_muonclip.optim.stacking import matrix_shape

_EPS = 1e-8


class _Block(NamedTuple):
    """Matrices of one shape in a weight: how many, their channels (all for ``None``) and sides, and where their sums are."""

    matrices: int
    channels: Tensor | None
    fan_out: int
    fan_in: int
    sums: slice

    @property
    def is_tall(self) -> bool:
        return self.fan_out >= self.fan_in


def _blocks(shape: Sequence[int], kind: str, parts: Parts | None, device: torch.device) -> Iterator[_Block]:
    _, fan_out, fan_in = matrix_shape(shape, kind)
    if parts is None:
        yield _Block(1, None, fan_out, fan_in, slice(0, max(fan_out, fan_in)))
        return
    fan_in = fan_out if parts.is_transposed else fan_in
    start = 0
    for channels in parts.channels_on(device):
        size = len(channels) * max(channels.shape[1], fan_in)
        yield _Block(len(channels), channels, channels.shape[1], fan_in, slice(start, start + size))
        start += size


def state_shape(shape: Sequence[int], kind: str, parts: Parts | None) -> tuple[int, ...]:
    """The shape of the state of a weight."""
    batch = tuple(shape[:-2]) if kind == "experts" else ()
    return *batch, max(block.sums.stop for block in _blocks(shape, kind, parts, torch.device("cpu")))


def sums_of_squares(direction: Tensor, kind: str, parts: Parts | None) -> Tensor:
    """The squared lengths of rows or columns of a whole orthogonalized update, shape (batch, rows and columns)."""
    squares = direction.reshape(matrix_shape(direction.shape, kind)).square()
    squares = squares.to(torch.promote_types(squares.dtype, torch.float32))
    squares = squares.mT if parts is not None and parts.is_transposed else squares
    found = []
    for block in _blocks(direction.shape, kind, parts, direction.device):
        own = squares[:, None] if block.channels is None else squares[:, block.channels]
        found.append(own.sum(-1 if block.is_tall else -2).flatten(1))
    return torch.cat(found, 1) if len(found) > 1 else found[0]


def normalizing_factors(
    sums: Tensor, state: Tensor, beta: float, shape: Sequence[int], kind: str, parts: Parts | None
) -> Tensor:
    """Moves the running means, and returns the factors of the elements of a weight, shaped to broadcast over it.

    Args:
        sums: What :func:`sums_of_squares` returns.
        state: The running means, as :func:`state_shape` says.
        beta: How much of them stays.
        shape: The shape of the whole weight.
        kind: How it is read as matrices.
        parts: The matrices inside of it.
    """
    batch, fan_out, fan_in = matrix_shape(shape, kind)
    means = state.view(batch, -1)
    is_transposed = parts is not None and parts.is_transposed
    oriented = (batch, fan_in, fan_out) if is_transposed else (batch, fan_out, fan_in)
    whole = None if parts is None else sums.new_empty(oriented)
    factors = sums
    for block in _blocks(shape, kind, parts, sums.device):
        length, other = sorted((block.fan_out, block.fan_in), reverse=True)
        squares = sums[:, block.sums].view(batch, block.matrices, length)
        mean = means[:, block.sums].view(batch, block.matrices, length)
        mean.lerp_(squares / other, 1 - beta)
        inverse = 1 / (mean.sqrt() + _EPS)
        before, after = squares.sum(-1, True), (squares * inverse.square()).sum(-1, True)
        factors = inverse * torch.where(after > 0, before / after, 0.0).sqrt()  # the norm of each matrix stays
        factors = factors[..., None] if block.is_tall else factors[..., None, :]
        if whole is not None:
            whole[:, block.channels] = factors.expand(batch, block.matrices, block.fan_out, block.fan_in)
    if whole is not None:
        return (whole.mT if is_transposed else whole).reshape(tuple(shape))
    if kind == "experts":
        return factors.reshape(*shape[:-2], *factors.shape[-2:])
    return factors.view([-1, *[1] * (len(shape) - 1)] if fan_out >= fan_in else [1, *shape[1:]])


def to_send(sums: Tensor, wire: torch.dtype) -> Tensor:
    """The sums in a dtype that may have fewer bits, as two terms, so that all ranks have the same."""
    high = sums.to(wire)
    return torch.cat([high.flatten(), (sums - high).to(wire).flatten()])


def received(terms: Tensor, batch: int) -> Tensor:
    """What :func:`to_send` has sent."""
    high, low = terms.to(torch.promote_types(terms.dtype, torch.float32)).chunk(2)
    return (high + low).view(batch, -1)
