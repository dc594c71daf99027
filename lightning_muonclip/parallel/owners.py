"""Assigns every matrix an owner rank, so that all ranks finish at about the same time."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def assign_owners(costs: Sequence[float], loads: Sequence[float]) -> list[int]:
    """Assigns jobs to ranks, the longest first, each to the rank with the least work so far.

    If all loads are zero, the busiest rank gets at most 4/3 of the optimum.

    Args:
        costs: The cost of each job, in any unit.
        loads: The work that each rank has in any case.

    Source: Graham, "Bounds on multiprocessing timing anomalies" (1969): longest processing time first.

    Example:
        >>> assign_owners([3.0, 1.0, 1.0, 1.0], loads=[0.0, 0.0])
        [0, 1, 1, 1]
    """
    least = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(least)
    owners = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = least[0]
        owners[job] = rank
        heapq.heapreplace(least, (load + costs[job], rank))
    return owners
