"""The weights that this rank shares with other ranks, and their owners."""

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
    """Assigns owners, once, to the weights that this rank shares with others.

    Args:
        costs: The cost of orthogonalizing each weight whose matrices other ranks may hold too.
        local_costs: The cost of each weight that is sharded along its matrices, so that each rank works on its own.
        process_group: The ranks that replicate plain tensors.
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
        #: One per set of ranks, dtype and device.
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

    @property
    def are_proven(self) -> bool:
        """Whether the gradients need no comparison any more."""
        return all(exchange.is_proven for exchange in self.exchanges)

    def check_gradients(self, grads: Mapping[Tensor, Tensor]) -> None:
        """Compares the gradients of ranks that hold the same weights, until there was something to compare.

        Args:
            grads: Those of the weights that have one.

        Raises:
            RuntimeError: If ranks have different gradients.
        """
        for exchange in self.exchanges:
            own = {i: grads[p] for p, (home, i) in self._places.items() if home is exchange and p in grads}
            exchange.check_gradients(own)

    def place(self, weight: Tensor) -> tuple[Exchange, int] | None:
        """The exchange of a weight and its index there; ``None`` if the weight stays on this rank."""
        return self._places.get(weight)

    def collect(self, tensors: Mapping[Tensor, Tensor], to: int) -> dict[Tensor, Tensor]:
        """Gathers the owners' tensors of plain weights to one rank. Must be called on all ranks.

        Args:
            tensors: Those of the weights that this rank owns.
            to: The destination, as a rank within the process group.

        Returns:
            On the destination, the tensors of the other owners, on the CPU.
        """
        collected: dict[Tensor, Tensor] = {}
        for exchange in self.exchanges:
            own = {i: p for p, (home, i) in self._places.items() if home is exchange and not isinstance(p, DTensor)}
            if own:
                found = exchange.collect({i: tensors[p] for i, p in own.items() if p in tensors}, to)
                collected |= {own[i]: tensor for i, tensor in found.items()}
        return collected


def _loads(local_costs: Mapping[Tensor, float], beside: Tensor, group: dist.ProcessGroup) -> list[float]:
    """Each rank's own work on weights that lie on the same mesh."""
    loads = [0.0] * dist.get_world_size(group)
    for weight, cost in local_costs.items():
        if isinstance(weight, DTensor) and isinstance(beside, DTensor) and weight.device_mesh == beside.device_mesh:
            for rank, box in enumerate(boxes_by_rank(weight, group)):
                loads[rank] += cost * math.prod(extent(box)) / max(1, weight.numel())
    return loads
