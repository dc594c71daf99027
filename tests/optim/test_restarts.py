"""The placement of restarts: against all other plans, against counted products, and against actual rounding."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_muonclip.optim.orthogonalize as module
from lightning_muonclip import orthogonalize
from lightning_muonclip.optim.coefficients import SCHEDULES, Schedule, resolve_schedule
from lightning_muonclip.optim.restarts import MOST_UNITS, amplification, best_restarts, flops

UNITS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
FIVE = [name for name in SCHEDULES if name != "deepseek_v4"]


def runs(schedule: Schedule, restarts: tuple[int, ...]) -> list[tuple[Any, ...]]:
    return [schedule.polynomials[i:j] for i, j in pairwise((0, *restarts, len(schedule.polynomials)))]


def permitted(schedule: Schedule, restarts: tuple[int, ...], unit: float) -> bool:
    units = [amplification(run) for run in runs(schedule, restarts)]
    direct = sum(
        entry[0] if abs(entry[1]) < entry[0] ** 2 else abs(entry[1] / entry[0]) for entry in schedule.polynomials
    )
    few = all(own <= MOST_UNITS or len(run) == 1 for own, run in zip(units, runs(schedule, restarts)))
    return few and sum(units) * unit <= direct * max(unit, 2.0**-8) * (1 + 1e-6)


@settings(max_examples=200)
@given(st.sampled_from(FIVE), st.sampled_from([*UNITS.values()]), st.floats(1, 9), st.sampled_from([0.5, 0.7, 1.0]))
def test_no_permitted_plan_is_cheaper(name: str, unit: float, ratio: float, symmetric: float) -> None:
    schedule = resolve_schedule(name, None)
    steps = len(schedule.polynomials)
    ways = [way for k in range(steps) for way in combinations(range(1, steps), k) if permitted(schedule, way, unit)]
    found = best_restarts(schedule.polynomials, ratio, unit, symmetric)
    assert found in ways
    cost = {way: flops(schedule, way, 1000, int(1000 * ratio), symmetric) for way in ways}
    assert cost[found] <= min(cost.values()) * (1 + 1e-12)


def test_ninety_nine_steps_are_planned_quickly() -> None:
    schedule = resolve_schedule("polar_express", 99)
    for unit in UNITS.values():
        restarts = best_restarts(schedule.polynomials, 4.0, unit, 0.5)
        assert permitted(schedule, restarts, unit)


class Counted:
    """Products by their cost over that of two square matrices of the smaller side."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int, symmetric: float) -> None:
        self.total = 0.0
        choose = module.product_for

        def spy(like: torch.Tensor) -> Any:
            multiply = choose(like)

            def counted(a: torch.Tensor, *others: Any) -> torch.Tensor:
                self.total += symmetric * a.shape[-1] / n
                before = self.total
                product = multiply(a, *others)
                self.total = before  # without what it is made of
                return product

            return counted

        monkeypatch.setattr(module, "product_for", spy)
        add_product = torch.baddbmm

        def spy_on_sum(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
            self.total += b.shape[-1] / n
            return add_product(x, a, b, **options)

        monkeypatch.setattr(module.torch, "baddbmm", spy_on_sum)


@pytest.mark.parametrize("coefficients", ["jordan", "cubic5", ((2.0, -1.5, 0.5, 0.1), (2.0, -1.0, 0.1, 0.2, 0.1)) * 2])
@pytest.mark.parametrize("method", ["direct", "gram", "auto"])
def test_flops_are_those_of_the_products(coefficients: Any, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    n, m, symmetric = 8, 24, 0.75
    schedule = resolve_schedule(coefficients, None)
    monkeypatch.setattr(module, "symmetric_cost", lambda _: symmetric)
    restarts = module._restarts(torch.empty(1, n, m), schedule, method)
    counted = Counted(monkeypatch, n, symmetric)
    orthogonalize(torch.randn(n, m), coefficients=schedule, method=method, dtype=torch.float32)
    assert flops(schedule, restarts, m, n, symmetric) == pytest.approx(2 * n**3 * counted.total)


def test_known_costs() -> None:
    """In n cubed, for an aspect ratio a, with symmetric products at half price: 15a + 5 and, with one restart, 6a + 14."""
    schedule = resolve_schedule("jordan", None)
    for a in (1, 2, 4):
        assert flops(schedule, (1, 2, 3, 4), 100, 100 * a, 0.5) == pytest.approx((15 * a + 5) * 100**3)
        assert flops(schedule, (2,), 100, 100 * a, 0.5) == pytest.approx((6 * a + 14) * 100**3)
        assert flops(schedule, (), 100, 100 * a, 0.5) == pytest.approx((3 * a + 17) * 100**3)


def test_wide_matrices_restart_seldom_and_square_ones_by_the_price_of_symmetry() -> None:
    schedule = resolve_schedule("polar_express", None)
    assert len(best_restarts(schedule.polynomials, 4.0, UNITS[torch.float32], 0.5)) == 1
    assert best_restarts(schedule.polynomials, 1.0, UNITS[torch.float32], 1.0) == (1, 2, 3, 4)


def test_coarser_dtypes_need_more_restarts() -> None:
    counts = [
        len(best_restarts(resolve_schedule("polar_express", None).polynomials, 9.0, unit, 0.5))
        for unit in UNITS.values()
    ]
    assert counts == [1, 1, 4]


def test_the_default_takes_wide_matrices_in_pairs_of_steps_in_bfloat16() -> None:
    """As measured: docs/orthogonalization.md."""
    for steps, pairs in ((5, (2, 4)), (6, (2, 4)), (1, ())):
        schedule = resolve_schedule(None, steps, torch.bfloat16)
        plans = [
            best_restarts(schedule.polynomials, ratio, UNITS[torch.bfloat16], 1.0, schedule.in_pairs)
            for ratio in (4.0, 1.0)
        ]
        assert plans == [pairs, tuple(range(1, steps))]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_permitted_plans_stay_close_to_the_direct_form(name: str, dtype: torch.dtype) -> None:
    """Without a dominant direction, the Gram form differs from the exact result by at most the rule's tolerance."""
    x = torch.randn(2, 96, 288, generator=torch.Generator().manual_seed(0))
    exact = orthogonalize(x.double(), coefficients=name, method="direct", dtype=torch.float64)
    found = orthogonalize(x, coefficients=name, method="gram", dtype=dtype).double()
    direct = orthogonalize(x, coefficients=name, method="direct", dtype=dtype).double()
    error, least = (torch.linalg.matrix_norm(y - exact).max() / 96**0.5 for y in (found, direct))
    assert error < 2 * least + 0.01


def test_without_the_rule_rounding_dominates() -> None:
    """The rule is needed: in bfloat16 the Gram form without a restart leaves nothing of the result."""
    spectrum = torch.logspace(0, -3, 64)
    x = torch.linalg.qr(torch.randn(64, 64))[0] * spectrum
    schedule = resolve_schedule("polar_express", None)
    wide = module._normalize(x, "frobenius", 1e-7).bfloat16()[None]
    found = module._iterate(wide, schedule, ())
    assert not torch.linalg.matrix_norm(found.float(), 2).item() < 2
    assert torch.linalg.matrix_norm(orthogonalize(x, method="gram", dtype=torch.bfloat16), 2) < 1.5
