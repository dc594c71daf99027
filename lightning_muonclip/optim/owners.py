"""Who orthogonalises which matrix: every one has one owner, so that all ranks end at about the same time."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def assign_owners(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank that gets each job: the longest job first, always to the rank with the least to do so far.

    The most loaded rank has at most 4/3 of the least possible.

    Args:
        costs: Of every job, in any unit.
        ranks: How many ranks there are.

    Source: Graham, "Bounds on multiprocessing timing anomalies" (1969): longest processing time first.

    Example:
        >>> assign_owners([3.0, 1.0, 1.0, 1.0], ranks=2)
        [0, 1, 1, 1]
    """
    loads = [(0.0, rank) for rank in range(ranks)]
    owners = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = loads[0]
        owners[job] = rank
        heapq.heapreplace(loads, (load + costs[job], rank))
    return owners
