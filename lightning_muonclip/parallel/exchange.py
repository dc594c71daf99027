"""Gathers every matrix to its owner rank and scatters the result back to all ranks that hold it.

Newton-Schulz needs whole matrices, and each only once. A matrix may be sharded in any way, or replicated (DDP, or the
replicated dimensions of a mesh). Each direction is one all-to-all that moves only the elements that a rank lacks.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_muonclip.parallel.agreement import REMEDY, extremes, gradients_agree
from lightning_muonclip.parallel.holders import boxes_by_rank, replicas_by_rank
from lightning_muonclip.parallel.owners import assign_owners
from lightning_muonclip.parallel.shards import Box, extent, local_box

#: Exchanges per step, whatever the number of layers. One round is computed while the next is in flight.
ROUNDS = 4

#: Cached plans, one per set of weights with a gradient. Layers dropped at random would make the cache grow without bound.
MOST_PLANS = 64


#: Steps in which ranks may still wait for a gradient that they can compare.
_MOST_TRIES = 8


#: What an owner computes for a weight, and perhaps a note for all ranks that hold it.
Result = tuple[Tensor, ...]


class _Piece(NamedTuple):
    """A part of a matrix that is sent to or received from another rank."""

    peer: int
    number: int
    box: Box


class _Leg(NamedTuple):
    """What this rank sends and receives in one all-to-all, each sorted by peer."""

    sends: list[_Piece]
    receives: list[_Piece]


@dataclass
class _Round:
    """Matrices that are exchanged together.

    Attributes:
        indices: All of them, the same on every rank.
        owned: Those that this rank orthogonalizes.
        sources: Those whose update this rank must compute its own part of.
        is_sharded: Whether any owner needs parts from other ranks; the same on every rank.
    """

    indices: list[int]
    owned: list[int]
    sources: list[int]
    is_sharded: bool
    to_owners: _Leg
    to_holders: _Leg


class Exchange:
    """A set of weights held by the same ranks, each with an owner rank.

    Args:
        weights: DTensors on one mesh, or plain tensors replicated on all ranks of the group; of one dtype and device.
        costs: The cost of orthogonalizing each weight, in any unit.
        loads: The other work of every rank of the group, in the same unit.
        group: The ranks.

    Raises:
        ValueError: If the sharding of a weight is not supported.
        RuntimeError: If the ranks hold different weights.
    """

    def __init__(
        self, weights: Sequence[Tensor], costs: Sequence[float], loads: Sequence[float], group: dist.ProcessGroup
    ) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.shapes = [weight.shape for weight in weights]
        self.owners = assign_owners(costs, loads)
        self._costs = costs
        self._boxes = [boxes_by_rank(weight, group) for weight in weights]
        self._replicas = [replicas_by_rank(weight, group) for weight in weights]
        self._rounds: dict[tuple[int, ...], list[_Round]] = {}
        self._dtype, self._device = weights[0].dtype, weights[0].device
        self._held = [str([own[rank] for own in self._boxes]) for rank in range(self.size)]
        #: Whether no two ranks hold the same, or those that do have had equal gradients.
        self.is_proven = len(set(self._held)) == self.size
        self._tries = 0
        self._check_agreement(weights)

    def check_gradients(self, grads: Mapping[int, Tensor]) -> None:
        """Compares the gradients of ranks that hold the same weights, until there was something to compare.

        In the first steps only: the comparison waits for the device, and some weights never get a gradient.

        Args:
            grads: Those of the weights that have one.

        Raises:
            RuntimeError: If ranks have gradients of different weights, or different ones.
        """
        if not self.is_proven:
            self._check_indices(tuple(grads))
            self._tries += 1
            self.is_proven = gradients_agree(grads, self.shapes, self._held, self.group) or self._tries == _MOST_TRIES

    def run(
        self,
        indices: Sequence[int],
        updates: Callable[[Sequence[int]], list[tuple[Tensor, Tensor]]],
        work: Callable[[Mapping[int, tuple[Tensor, Tensor]]], dict[int, Result]],
        use: Callable[[Mapping[int, Result]], None],
        out: torch.dtype,
        back: torch.dtype,
        notes: Mapping[int, int] | None = None,
    ) -> None:
        """Runs ``work`` for every matrix on its owner, overlapping the computation of one round with communication.

        Args:
            indices: The weights that take part, the same on every rank.
            updates: Returns this rank's parts of the updates of the given weights, each with its marks: a vector, of which
                the owner gets the maximum over the ranks that hold the weight.
            work: Maps the whole updates that this rank owns, with their marks, to results: one tensor each, and perhaps a
                note, a vector that all ranks get as it is.
            use: Consumes this rank's parts of the results.
            out: The dtype in which updates are sent.
            back: The dtype in which results and notes are sent.
            notes: The lengths of the notes, of those results that have one.
        """

        def send(round: _Round) -> Callable[[], dict[int, tuple[Tensor, Tensor]]]:
            return self._gather(round, dict(zip(round.sources, updates(round.sources))), out)

        rounds = self._rounds_of(tuple(indices))
        arriving = send(rounds[0])
        returning: Callable[[], dict[int, Result]] | None = None
        for now, following in zip_longest(rounds, rounds[1:]):
            whole = arriving()
            if following is not None:
                arriving = send(following)
            results = work(whole)
            previous, returning = returning, self._scatter(now, results, back, notes or {})
            if previous is not None:
                use(previous())
        assert returning is not None
        use(returning())

    def collect(self, tensors: Mapping[int, Tensor], to: int) -> dict[int, Tensor]:
        """Gathers the owners' tensors of replicated weights to one rank, which returns those of the other owners.

        Args:
            tensors: Those of this rank.
            to: The destination, as a rank within the group.
        """
        exist = torch.zeros(len(self.shapes), device=self._device)
        for i in tensors:
            exist[i] = 1
        dist.all_reduce(exist, op=dist.ReduceOp.MAX, group=self.group)
        collected = {}
        for i in exist.nonzero().flatten().tolist():
            owner = self.owners[i]
            if owner == to:
                continue
            if self.rank == owner:
                dist.send(tensors[i].contiguous(), group=self.group, group_dst=to)
            elif self.rank == to:
                collected[i] = torch.empty(self.shapes[i], dtype=self._dtype, device=self._device)
                dist.recv(collected[i], group=self.group, group_src=owner)
                collected[i] = collected[i].cpu()  # all of them may not fit into the memory of one device
        return collected

    def _gather(
        self, round: _Round, parts: Mapping[int, tuple[Tensor, Tensor]], wire: torch.dtype
    ) -> Callable[[], dict[int, tuple[Tensor, Tensor]]]:
        """Starts gathering matrices to their owners; the returned function waits for those that this rank owns."""
        if not round.is_sharded:
            return lambda: {i: parts[i] for i in round.owned}
        leg = round.to_owners
        sends = [(piece.peer, tensor) for piece in leg.sends for tensor in parts[piece.number]]
        receives = [
            (piece.peer, shape) for piece in leg.receives for shape in (extent(piece.box), parts[piece.number][1].shape)
        ]
        finish = self._all_to_all(sends, receives, wire)

        def wait() -> dict[int, tuple[Tensor, Tensor]]:
            whole = {i: parts[i][0].new_empty(self.shapes[i]) for i in round.owned}
            marks = {i: parts[i][1].new_zeros(self.size, len(parts[i][1])) for i in round.owned}
            own = [_Piece(self.rank, i, self._boxes[i][self.rank]) for i in round.owned]
            targets = [
                target
                for piece in (*own, *leg.receives)
                for target in (whole[piece.number][piece.box], marks[piece.number][piece.peer])
            ]
            arrived = finish()
            if targets:
                torch._foreach_copy_(targets, [*(tensor for i in round.owned for tensor in parts[i]), *arrived])
            return {i: (update, marks[i].amax(0)) for i, update in whole.items()}

        return wait

    def _scatter(
        self, round: _Round, results: Mapping[int, Result], wire: torch.dtype, notes: Mapping[int, int]
    ) -> Callable[[], dict[int, Result]]:
        """Starts scattering results to all holders; the returned function waits for this rank's parts."""
        sends = [
            (piece.peer, tensor)
            for piece in round.to_holders.sends
            for whole, *note in [results[piece.number]]
            for tensor in (whole[piece.box], *note)
        ]
        receives = [
            (piece.peer, shape)
            for piece in round.to_holders.receives
            for shape in (extent(piece.box), *[(notes[own],) for own in [piece.number] if own in notes])
        ]
        finish = self._all_to_all(sends, receives, wire, self._dtype)

        def wait() -> dict[int, Result]:
            parts: dict[int, Result] = {
                i: (whole[self._boxes[i][self.rank]], *note) for i, (whole, *note) in results.items()
            }
            arrived = iter(finish())
            for piece in round.to_holders.receives:
                parts[piece.number] = tuple(islice(arrived, 2 if piece.number in notes else 1))
            return parts

        return wait

    def _rounds_of(self, indices: tuple[int, ...]) -> list[_Round]:
        """These weights in at most :data:`ROUNDS` rounds, with each owner's work spread evenly over them."""
        if indices not in self._rounds:
            if len(self._rounds) == MOST_PLANS:
                self._rounds.clear()
            self._check_indices(indices)
            self._rounds[indices] = [self._round(members) for members in self._split(indices) if members]
        return self._rounds[indices]

    def _split(self, indices: tuple[int, ...]) -> list[list[int]]:
        """Splits every owner's matrices, sorted so that equal shapes stay together, into shares of equal cost."""
        rounds: list[list[int]] = [[] for _ in range(ROUNDS)]
        for owner in set(self.owners):
            own = sorted(
                (i for i in indices if self.owners[i] == owner), key=lambda i: (-self._costs[i], self.shapes[i], i)
            )
            total, done = sum(self._costs[i] for i in own), 0.0
            for i in own:
                rounds[min(int(ROUNDS * done / total), ROUNDS - 1) if total else 0].append(i)
                done += self._costs[i]
        return [sorted(members) for members in rounds]

    def _round(self, indices: list[int]) -> _Round:
        to_owners, to_holders = _Leg([], []), _Leg([], [])
        for i in indices:
            owner, boxes = self.owners[i], self._boxes[i]
            for rank, box in enumerate(boxes):
                if rank == owner:
                    continue
                # If several ranks hold the same part, the one in the owner's own replica sends it.
                if self._replicas[i][rank] == self._replicas[i][owner] and 0 not in extent(box):
                    if rank == self.rank:
                        to_owners.sends.append(_Piece(owner, i, box))
                    elif owner == self.rank:
                        to_owners.receives.append(_Piece(rank, i, box))
                if rank == self.rank:
                    to_holders.receives.append(_Piece(owner, i, box))
                elif owner == self.rank:
                    to_holders.sends.append(_Piece(rank, i, box))
        for pieces in (*to_owners, *to_holders):
            pieces.sort(key=lambda piece: (piece.peer, piece.number))
        owned = [i for i in indices if self.owners[i] == self.rank]
        sources = sorted({*owned, *(piece.number for piece in to_owners.sends)})
        is_sharded = any(box != self._boxes[i][0] for i in indices for box in self._boxes[i])
        return _Round(indices, owned, sources, is_sharded, to_owners, to_holders)

    def _all_to_all(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Sequence[int]]],
        wire: torch.dtype,
        dtype: torch.dtype | None = None,
    ) -> Callable[[], list[Tensor]]:
        """Starts one collective; the returned function waits for what arrives.

        Args:
            sends: Tensors with their destinations, sorted by these.
            receives: Shapes with their sources, sorted by these.
            wire: The dtype in which all are sent.
            dtype: The dtype of what arrives; ``None`` is that of the wire.
        """
        lengths = [[part.numel() for _, part in sends], [math.prod(shape) for _, shape in receives]]
        outgoing, incoming = (torch.empty(sum(own), dtype=wire, device=self._device) for own in lengths)
        if sends:
            slots = [slot.view(part.shape) for slot, (_, part) in zip(outgoing.split(lengths[0]), sends)]
            torch._foreach_copy_(slots, [part for _, part in sends])
        work = dist.all_to_all_single(
            incoming,
            outgoing,
            self._by_peer([peer for peer, _ in receives], lengths[1]),
            self._by_peer([peer for peer, _ in sends], lengths[0]),
            group=self.group,
            async_op=True,
        )

        def finish() -> list[Tensor]:
            work.wait()
            arrived = incoming.to(dtype or wire).split(lengths[1])
            return [part.view(shape) for part, (_, shape) in zip(arrived, receives)]

        return finish

    def _by_peer(self, peers: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Number of elements sent to or received from every rank."""
        sizes = [0] * self.size
        for peer, length in zip(peers, lengths):
            sizes[peer] += length
        return sizes

    def _check_indices(self, indices: tuple[int, ...]) -> None:
        # Only for a new set of weights. Without it, a layer that one rank never uses would deadlock the collective.
        [(least, largest)] = self._ranges(zlib.crc32(str(indices).encode()))
        if least != largest:
            absent = [str(tuple(shape)) for i, shape in enumerate(self.shapes) if i not in indices]
            raise RuntimeError(
                f"ranks have gradients for different matrices: rank {dist.get_rank()} has {len(indices)} of"
                f" {len(self.shapes)} and lacks those of shapes {', '.join(absent[:8]) or '(none)'}. Give unused weights a"
                f" zero gradient, for example by adding 0 * weight.sum() to the loss. {REMEDY}"
            )

    def _check_agreement(self, weights: Sequence[Tensor]) -> None:
        """Compares the plans of all ranks once, since a mismatch would deadlock later. Also sets up the connections."""
        problem = next(filter(None, map(_problem, weights)), "")
        digest = zlib.crc32(f"{self.shapes}{self.owners}{self._costs}{self._boxes}".encode())
        (_, has_problem), (least, largest) = self._ranges(bool(problem), digest)
        if has_problem:
            raise ValueError(
                problem or "another rank holds a weight with unsupported sharding; see the error of that rank"
            )
        if least != largest:
            shapes = ", ".join(str(tuple(shape)) for shape in self.shapes[:8]) + (", ..." if len(weights) > 8 else "")
            raise RuntimeError(
                f"ranks have different matrices for Muon: rank {dist.get_rank()} has {len(weights)} of shapes {shapes}. Give"
                f" all ranks of a group the same parameters in the same order, on the same type of device. {REMEDY}"
            )

    def _ranges(self, *values: float) -> list[tuple[float, float]]:
        """The minimum and maximum of every value over the ranks. Synchronizes with the host."""
        found = extremes(torch.tensor(values, dtype=torch.float64, device=self._device), self.group)
        return list(zip(*found))


def wires(working: torch.dtype, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of the tensors sent to the owners and back.

    A direction comes back in the dtype that it was computed in, without loss. An update is sent in bfloat16 if that is what
    it would be rounded to anyway. float16 lacks the range for updates that are not normalized yet, so these keep the dtype
    of the weights.

    Args:
        working: Dtype of Newton-Schulz.
        dtype: Dtype of the weights.

    Returns:
        The dtype of updates and the dtype of directions.
    """
    if working.itemsize >= dtype.itemsize:
        return dtype, dtype
    return dtype if working == torch.float16 else working, working


def _problem(weight: Tensor) -> str:
    try:
        local_box(weight)
    except ValueError as error:
        return str(error)
    return ""
