"""One step of Muon: momentum, then a step along the orthogonalized update, for many matrices together."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_muonclip.optim.coefficients import resolve_schedule
from lightning_muonclip.optim.decay import decay_cautiously, scalar
from lightning_muonclip.optim.momentum import as_of, gain, nesterov
from lightning_muonclip.optim.options import LR_ADJUSTMENTS
from lightning_muonclip.optim.orthogonalize import orthogonalize, working_dtype
from lightning_muonclip.optim.parts import Parts
from lightning_muonclip.optim.restarts import cheapest_flops
from lightning_muonclip.optim.second_moment import normalizing_factors, received, sums_of_squares, to_send
from lightning_muonclip.optim.stacking import directions, directions_of_parts, matrix_shape, most_stacked, stacks
from lightning_muonclip.optim.stats import Tracker
from lightning_muonclip.parallel.exchange import Exchange, Result, wires
from lightning_muonclip.parallel.shards import local_box, whole_box
from lightning_muonclip.parallel.shared import SharedWeights


class Matrix(NamedTuple):
    """A weight during its step: what this rank holds of it, and the settings of its group.

    Attributes:
        momentum: ``None`` if another rank keeps it.
        second_moment: ``None`` without one.
        number: The number of its group; torch.compile takes no ids of objects.
        parts: The matrices inside a weight that holds several.
    """

    param: Tensor
    weight: Tensor
    grad: Tensor
    momentum: Tensor | None
    second_moment: Tensor | None
    number: int
    group: dict[str, Any]
    parts: Parts | None


class MatrixStep:
    """How matrices are orthogonalized: in which dtype, and how many together.

    Args:
        dtype: Working dtype of Newton-Schulz; ``None`` is the fastest for each (:func:`.orthogonalize.working_dtype`).
        stack_numel: Most elements that are orthogonalized together; ``None`` is :func:`.stacking.most_stacked`.
        tracker: Takes down what the matrices do, if it is on.
    """

    def __init__(self, dtype: torch.dtype | None, stack_numel: int | None, tracker: Tracker) -> None:
        self.tracker = tracker
        self.dtype = dtype
        self.stack_numel = stack_numel

    def step(self, matrices: Sequence[Matrix], shared: SharedWeights) -> None:
        """Subtracts the orthogonalized updates from the weights."""
        here: list[Matrix] = []
        there: dict[tuple[Exchange, torch.dtype], dict[int, Matrix]] = defaultdict(dict)
        for matrix in matrices:
            if place := shared.place(matrix.param):
                exchange, i = place
                widest = max(
                    self.working_dtypes(matrix.param, matrix.group, matrix.parts), key=lambda dtype: dtype.itemsize
                )
                there[exchange, widest][i] = matrix
            else:
                here.append(matrix)
        for stack in self._stacks(here, [matrix.weight.shape for matrix in here]):  # needs memory for itself alone
            own = [here[i] for i in stack]
            found = self._directions(own, updates(own), with_gradient(own, is_shared=False))
            self._subtract(own, [(direction, *self._sums(m, direction)) for m, direction in zip(own, found)])
        for exchange in shared.exchanges:  # in one order on all ranks
            for dtype in sorted({dtype for other, dtype in there if other is exchange}, key=str):
                self._step_shared(exchange, dtype, there[exchange, dtype])

    def flops(self, param: Tensor, group: Mapping[str, Any], parts: Parts | None) -> float:
        """The cost of orthogonalizing a weight."""
        total = 0.0
        for count, m, n in _matrix_shapes(param, group, parts):
            dtype = self._dtype_of(param.device, m, n)
            schedule = resolve_schedule(group["ns_coefficients"], group["ns_steps"], dtype)
            total += count * cheapest_flops(schedule, m, n, torch.finfo(dtype).eps / 2)
        return total

    def working_dtypes(self, param: Tensor, group: Mapping[str, Any], parts: Parts | None) -> set[torch.dtype]:
        """The dtypes in which the matrices of a weight are orthogonalized."""
        return {self._dtype_of(param.device, m, n) for _, m, n in _matrix_shapes(param, group, parts)}

    def _step_shared(self, exchange: Exchange, working: torch.dtype, matrices: Mapping[int, Matrix]) -> None:
        """The same for matrices that other ranks hold too: each is orthogonalized by its owner rank."""
        weight = next(iter(matrices.values())).weight

        def local_updates(indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
            own = [matrices[i] for i in indices]
            return list(zip(updates(own), with_gradient(own, is_shared=True)))

        def orthogonalized(whole: Mapping[int, tuple[Tensor, Tensor]]) -> dict[int, Result]:
            indices = list(whole)
            results: dict[int, Result] = {}
            for stack in self._stacks([matrices[i] for i in indices], [update.shape for update, _ in whole.values()]):
                own = [indices[k] for k in stack]
                found, moving = zip(*(whole[i] for i in own))
                for i, direction in zip(own, self._directions([matrices[i] for i in own], found, moving)):
                    sums = self._sums(matrices[i], direction)
                    results[i] = (direction, *(to_send(own_sums, back) for own_sums in sums))
            return results

        def subtract(shards: Mapping[int, Result]) -> None:
            found = []
            for i, (shard, *terms) in shards.items():
                batch = matrix_shape(matrices[i].param.shape, matrices[i].group["kind"])[0]
                found.append((shard, *(received(own, batch) for own in terms)))
            self._subtract([matrices[i] for i in shards], found)

        out, back = wires(working, weight.dtype)
        notes = {i: 2 * m.second_moment.numel() for i, m in matrices.items() if m.second_moment is not None}
        exchange.run(list(matrices), local_updates, orthogonalized, subtract, out, back, notes)

    def _sums(self, matrix: Matrix, direction: Tensor) -> tuple[Tensor, ...]:
        """What a second moment needs to know of a whole direction, if the matrix has one."""
        if matrix.second_moment is None:
            return ()
        return (sums_of_squares(direction, matrix.group["kind"], matrix.parts),)

    def _stacks(self, matrices: Sequence[Matrix], shapes: Sequence[torch.Size]) -> Iterator[list[int]]:
        if not matrices:
            return iter(())
        alike = [(m.number, m.parts, m.weight.dtype, m.weight.device) for m in matrices]
        return stacks(shapes, alike, self._bound(matrices[0].weight.device))

    def _dtype_of(self, device: torch.device, m: int, n: int) -> torch.dtype:
        return self.dtype or working_dtype(device, min(m, n))

    def _bound(self, device: torch.device) -> int:
        return self.stack_numel or most_stacked(device, self.dtype or working_dtype(device))

    def _directions(
        self, matrices: Sequence[Matrix], whole: Sequence[Tensor], moving: Sequence[Tensor]
    ) -> list[Tensor]:
        """Orthogonalized updates of whole matrices that are stacked together."""
        group = matrices[0].group
        if self.tracker.is_on:
            for matrix, update in zip(matrices, whole):
                self.tracker.note_momentum(matrix.param, update, group["kind"], matrix.parts)
        orthogonal = partial(
            orthogonalize,
            coefficients=group["ns_coefficients"],
            steps=group["ns_steps"],
            eps=group["eps"],
            dtype=self.dtype,
        )
        kind, device = group["kind"], whole[0].device
        # On a CPU, orthogonalize itself takes a batch in pieces.
        bound = self.stack_numel or (sys.maxsize if device.type == "cpu" else self._bound(device))
        if parts := matrices[0].parts:
            return directions_of_parts(whole, moving, parts, kind, orthogonal, bound)
        return directions(whole, moving, kind, orthogonal, bound)

    def _subtract(self, matrices: Sequence[Matrix], shards: Sequence[Result]) -> None:
        """Steps weights along this rank's shards of their directions."""
        alike: dict[tuple[int, float], list[tuple[Matrix, Tensor]]] = defaultdict(list)
        for matrix, (direction, *sums) in zip(matrices, shards):
            if sums:
                direction = direction * self._normalizing(matrix, sums[0], direction.shape)
            scale = self._scale(matrix)
            if self.tracker.is_on:
                self.tracker.note_update(matrix.param, direction, scale)
            if isinstance(scale, Tensor):
                direction, scale = direction * scale, 1.0
            alike[matrix.number, scale].append((matrix, direction))
        for (_, scale), own in alike.items():
            group, weights = own[0][0].group, [matrix.weight for matrix, _ in own]
            found = [direction for _, direction in own]
            if group["cautious_weight_decay"]:
                decay_cautiously(weights, found, scalar(group["lr"]) * group["weight_decay"])
            _add_scaled(weights, found, -scalar(group["lr"]) * scale)

    def _normalizing(self, matrix: Matrix, sums: Tensor, shape: torch.Size) -> Tensor:
        """The factors of this rank's shard of a direction, by which its rows or columns are normalized."""
        assert matrix.second_moment is not None
        group, param = matrix.group, matrix.param
        whole = shape if len(sums) != matrix_shape(param.shape, group["kind"])[0] else param.shape  # its experts alone
        beta = group["second_moment_beta"]
        factors = normalizing_factors(sums, matrix.second_moment, beta, whole, group["kind"], matrix.parts)
        if whole == shape:
            return factors
        return factors[
            tuple(side if factors.shape[dim] > 1 else slice(None) for dim, side in enumerate(local_box(param)))
        ]

    def _scale(self, matrix: Matrix) -> float | Tensor:
        name = matrix.group["adjust_lr_fn"] or "original"
        param, parts = matrix.param, matrix.parts
        shape = matrix_shape(param.shape, matrix.group["kind"])
        if parts is None:
            return LR_ADJUSTMENTS[name](*shape[1:])
        factors = parts.factors(name, _fan_in(shape, parts), matrix.weight)
        side = local_box(param)[parts.dim]
        return factors.narrow(parts.dim, side.start, side.stop - side.start)


def _matrix_shapes(param: Tensor, group: Mapping[str, Any], parts: Parts | None) -> list[tuple[int, int, int]]:
    """How many matrices of which fan-out and fan-in there are in a weight."""
    shape = matrix_shape(param.shape, group["kind"])
    if parts is None:
        return [shape]
    return [(shape[0] * count, channels, _fan_in(shape, parts)) for count, channels in parts.sizes()]


def _fan_in(shape: tuple[int, int, int], parts: Parts) -> int:
    """Of the matrices of a weight, which is a batch of this shape."""
    return shape[1] if parts.is_transposed else shape[2]


def gain_momentum(matrices: Sequence[Matrix], momentum: float) -> None:
    """Moves the momentum of the weights of one group towards their gradients."""
    kept = [(m.momentum, m.grad) for m in matrices if m.momentum is not None]
    gain([buffer for buffer, _ in kept], [grad for _, grad in kept], momentum)


def updates(matrices: Sequence[Matrix]) -> list[Tensor]:
    """The tensors to orthogonalize: the momentum, or the Nesterov momentum."""
    found: list[Tensor] = []
    for _, members in groupby(matrices, key=lambda matrix: matrix.number):
        own = list(members)
        group, momenta = own[0].group, [m.momentum for m in own if m.momentum is not None]
        grads = [m.grad for m in own]
        found += nesterov(momenta, grads, group["momentum"]) if group["nesterov"] else as_of(momenta, grads)
    return found


def with_gradient(matrices: Sequence[Matrix], is_shared: bool) -> list[Tensor]:
    """For each weight, which of its matrices have a gradient: 1 or 0 each, a vector on the device.

    A matrix whose gradient is all zero, such as an idle expert, must not move: its momentum decays, but orthogonalization
    would restore the scale of what is left of it for ever.

    Args:
        matrices: The weights, of one dtype and device.
        is_shared: Whether this rank may have a part of each matrix only.
    """
    single = [i for i, m in enumerate(matrices) if m.parts is None and m.group["kind"] != "experts"]
    found: dict[int, Tensor] = {}
    if single:
        largest = _largest([matrices[i].grad for i in single])
        found = dict(zip(single, (largest != 0).to(largest.dtype).split(1)))
    for i, m in enumerate(matrices):
        if i in found:
            continue
        shape, box = (m.param.shape, local_box(m.param)) if is_shared else (m.weight.shape, whole_box(m.weight.shape))
        if m.parts is not None:
            dim, batch = m.parts.dim, len(shape) - 2 if m.group["kind"] == "experts" else 0
            channels = m.grad.new_zeros(*shape[:batch], shape[dim], dtype=torch.bool)
            others = tuple(other for other in range(batch, len(shape)) if other != dim)
            own = (*box[:batch], box[dim])
            channels[own] = _any(m.grad, others)
            found[i] = m.parts.where_any(channels.view(-1, shape[dim])).to(m.grad.dtype)
        else:
            experts = m.grad.new_zeros(shape[:-2], dtype=torch.bool)
            experts[box[:-2]] = _any(m.grad, (-2, -1))
            found[i] = experts.flatten().to(m.grad.dtype)
    return [found[i] for i in range(len(matrices))]


def _largest(tensors: list[Tensor]) -> Tensor:
    """A number for each tensor that is 0 if all of its entries are 0; not a sum of squares, which may underflow."""
    if tensors[0].is_cuda:
        return torch.stack(torch._foreach_norm(tensors, 1))
    # A CPU takes eight times as long for the norm.
    ends = [torch.stack(torch.aminmax(own)).abs().amax() if own.numel() else own.new_zeros(()) for own in tensors]
    return torch.stack(ends)


def _any(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``x.any(dims)``, for which a CPU takes several times as long."""
    return (x.amax(dims) != 0) | (x.amin(dims) != 0) if x.numel() else x.any(dims)


def _add_scaled(params: list[Tensor], along: list[Tensor], scale: float | Tensor) -> None:
    if isinstance(scale, Tensor):  # a tensor learning rate must not be read on the host
        along = list(torch._foreach_mul(along, scale.to(along[0].device)))
        scale = 1.0
    torch._foreach_add_(params, along, alpha=scale)
