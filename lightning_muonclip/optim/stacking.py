"""Stacks weights of equal shape and orthogonalizes them in batched calls."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_muonclip.kernels.costs import cpu_costs
from lightning_muonclip.optim.parts import Parts

#: Most elements per stack on a GPU, which is launch-bound.
_ON_GPU = 2**26

Orthogonal = Callable[[Tensor], Tensor]


def most_stacked(device: torch.device, dtype: torch.dtype) -> int:
    """Most elements that are orthogonalized together in a working dtype. On a CPU, only small matrices gain from it."""
    if device.type == "cpu":
        return cpu_costs().stack_bytes // dtype.itemsize
    return _ON_GPU if device.type == "cuda" else 0


def matrix_shape(shape: Sequence[int], kind: str) -> tuple[int, int, int]:
    """The number of matrices in a weight, and their fan-out and fan-in."""
    if kind == "experts":
        return math.prod(shape[:-2]), shape[-2], shape[-1]
    return 1, shape[0], math.prod(shape[1:])


def stacks(shapes: Sequence[torch.Size], alike: Sequence[Hashable], bound: int) -> Iterator[list[int]]:
    """Indices of weights of equal shape, up to transposition, in stacks of at most ``bound`` elements.

    Args:
        shapes: The shape of each weight.
        alike: A key for each weight, equal within a stack.
        bound: Maximum number of elements. A larger weight forms its own stack.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, (shape, key) in enumerate(zip(shapes, alike)):
        if shape.numel():
            groups[(*shape[:-2], *sorted(shape[-2:])), key].append(i)
    for indices in groups.values():
        indices.sort(key=lambda i: shapes[i][-2] > shapes[i][-1])  # few stacks then hold both, which copies columns
        size = max(1, bound // shapes[indices[0]].numel())
        yield from (indices[start : start + size] for start in range(0, len(indices), size))


def directions(
    updates: Sequence[Tensor], moving: Sequence[Tensor], kind: str, orthogonal: Orthogonal, bound: int
) -> list[Tensor]:
    """Orthogonalizes the updates of the weights of one stack.

    Args:
        updates: The update of each weight.
        moving: For each weight, 1 for its matrices that move and 0 for those that stay.
        kind: How the weights are read as matrices.
        orthogonal: Orthogonalizes a batch.
        bound: Most elements in one call.
    """
    batches = [update.reshape(matrix_shape(update.shape, kind)) for update in updates]
    shape = batches[0].shape[1:]
    alike = [batch if batch.shape[1:] == shape else batch.mT for batch in batches]
    stack = torch.cat(alike) if len(alike) > 1 else alike[0]
    result = _in_pieces(stack, orthogonal, bound)  # only experts need more than one
    result *= torch.cat(list(moving))[:, None, None]
    own = zip(result.split([len(batch) for batch in batches]), batches, updates)
    return [(part if part.shape == batch.shape else part.mT).reshape(update.shape) for part, batch, update in own]


def directions_of_parts(
    updates: Sequence[Tensor], moving: Sequence[Tensor], parts: Parts, kind: str, orthogonal: Orthogonal, bound: int
) -> list[Tensor]:
    """The same, where every matrix of a weight is several."""
    batches = [update.reshape(matrix_shape(update.shape, kind)) for update in updates]
    matrices = torch.stack([batch.mT if parts.is_transposed else batch for batch in batches])
    results = torch.empty_like(matrices)
    size = len(batches[0])
    alike = torch.stack(list(moving)).split([size * count for count, _ in parts.sizes()], dim=1)
    for channels, own in zip(parts.channels_on(matrices.device), alike):
        stack = matrices[:, :, channels]  # (weights, batch, parts alike, channels, fan-in)
        found = _in_pieces(stack.flatten(0, 2), orthogonal, bound if size > 1 else stack.numel())
        results[:, :, channels] = found.view_as(stack) * own.view(len(stack), size, -1, 1, 1)
    return [
        result.reshape(update.shape) for result, update in zip(results.mT if parts.is_transposed else results, updates)
    ]


def _in_pieces(stack: Tensor, orthogonal: Orthogonal, bound: int) -> Tensor:
    """Orthogonalizes a batch, at most so many elements in one call."""
    results = [orthogonal(piece) for piece in stack.split(max(1, bound // max(1, stack[0].numel())))]
    return torch.cat(results) if len(results) > 1 else results[0]
