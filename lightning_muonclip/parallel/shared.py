"""The weights that this rank shares with others."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_muonclip.parallel.exchange import Exchange
from lightning_muonclip.parallel.holders import boxes_by_rank, group_of, share_key
from lightning_muonclip.parallel.shards import extent


class SharedWeights:
    """Who owns which of the weights that this rank shares with others: agreed upon once.

    Args:
        costs: Of every weight whose matrices other ranks may hold too, what it costs to orthogonalise it.
        local_costs: The same of weights whose matrices are shared out: each rank has its own work with them.
        process_group: The ranks that hold plain tensors alike.
    """

    def __init__(
        self,
        costs: Mapping[Tensor, float],
        local_costs: Mapping[Tensor, float],
        process_group: dist.ProcessGroup | None,
    ) -> None:
        together: dict[Hashable, list[Tensor]] = defaultdict(list)
        for weight in costs:
            together[share_key(weight, process_group)].append(weight)
        #: One for each set of ranks.
        self.exchanges: list[Exchange] = []
        self._places: dict[Tensor, tuple[Exchange, int]] = {}
        for weights in together.values():
            group = group_of(weights[0], process_group)
            exchange = Exchange(weights, [costs[w] for w in weights], _loads(local_costs, weights[0], group), group)
            self.exchanges.append(exchange)
            self._places |= {weight: (exchange, i) for i, weight in enumerate(weights)}
        #: Plain weights that another rank owns.
        self.unowned = {
            weight
            for weight, (exchange, i) in self._places.items()
            if exchange.owners[i] != exchange.rank and not isinstance(weight, DTensor)
        }

    def place(self, weight: Tensor) -> tuple[Exchange, int] | None:
        """The exchange that a weight goes through and its number there; ``None`` if it does not leave this rank."""
        return self._places.get(weight)

    def collect(self, tensors: Mapping[Tensor, Tensor], to: int) -> dict[Tensor, Tensor]:
        """What other owners have of plain weights, on one rank; to be called on all of them.

        Args:
            tensors: Of every weight that this rank owns, what it has.
            to: The rank within the process group.

        Returns:
            On that rank, what it did not have, on the CPU.
        """
        collected: dict[Tensor, Tensor] = {}
        for exchange in self.exchanges:
            own = {i: p for p, (home, i) in self._places.items() if home is exchange and not isinstance(p, DTensor)}
            if own:
                found = exchange.collect({i: tensors[p] for i, p in own.items() if p in tensors}, to)
                collected |= {own[i]: tensor for i, tensor in found.items()}
        return collected


def _loads(local_costs: Mapping[Tensor, float], beside: Tensor, group: dist.ProcessGroup) -> list[float]:
    """What every rank of a group has to do with weights that lie on the same mesh."""
    loads = [0.0] * dist.get_world_size(group)
    for weight, cost in local_costs.items():
        if isinstance(weight, DTensor) and isinstance(beside, DTensor) and weight.device_mesh == beside.device_mesh:
            for rank, box in enumerate(boxes_by_rank(weight, group)):
                loads[rank] += cost * math.prod(extent(box)) / max(1, weight.numel())
    return loads
