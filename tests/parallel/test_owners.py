"""Every job has one owner, and the work is balanced."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from lightning_muonclip.parallel.owners import assign_owners

COSTS = st.lists(st.integers(0, 20).map(float), max_size=6)


def largest_load(costs: list[float], owners: list[int] | tuple[int, ...], ranks: int) -> float:
    return max(sum(cost for cost, owner in zip(costs, owners) if owner == rank) for rank in range(ranks))


@given(costs=COSTS, ranks=st.integers(1, 4))
def test_largest_load_is_near_the_least_possible(costs: list[float], ranks: int) -> None:
    owners = assign_owners(costs, [0.0] * ranks)
    assert len(owners) == len(costs) and set(owners) <= set(range(ranks))
    best = min(largest_load(costs, every, ranks) for every in product(range(ranks), repeat=len(costs)))
    assert largest_load(costs, owners, ranks) <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-9


@given(costs=COSTS, ranks=st.integers(1, 4))
def test_owners_are_the_same_on_every_rank(costs: list[float], ranks: int) -> None:
    assert assign_owners(costs, [0.0] * ranks) == assign_owners(list(costs), [0.0] * ranks)


def test_equal_jobs_are_spread_evenly() -> None:
    owners = assign_owners([1.0] * 12, [0.0] * 4)
    assert [owners.count(rank) for rank in range(4)] == [3, 3, 3, 3]


def test_a_loaded_rank_gets_less() -> None:
    assert assign_owners([1.0, 1.0, 1.0], [2.5, 0.0, 1.0]) == [1, 1, 2]
