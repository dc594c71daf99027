"""Who orthogonalises which matrix: every one has one owner, so that all ranks end at about the same time."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def assign_owners(costs: Sequence[float], loads: Sequence[float]) -> list[int]:
    """The rank that gets each job: the longest job first, always to the rank with the least to do so far.

    If none has anything to do before, the most loaded rank ends up with at most 4/3 of the least possible.

    Args:
        costs: Of every job, in any unit.
        loads: Of every rank, what it has to do in any case.

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
