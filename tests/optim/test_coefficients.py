from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from lightning_muonclip.optim.coefficients import SCHEDULES, Schedule, resolve_schedule

JORDAN = (3.4445, -4.7750, 2.0315)


def scalar_map(schedule: Schedule, values: torch.Tensor) -> torch.Tensor:
    """What a schedule does to singular values, in exact enough arithmetic."""
    values = values.double()
    for a, b, c in schedule:
        values = a * values + b * values**3 + c * values**5
    return values


@pytest.mark.parametrize("steps", [1, 3, 5, 12])
def test_one_triple_is_repeated(steps: int) -> None:
    assert resolve_schedule(JORDAN, steps) == (JORDAN,) * steps
    assert resolve_schedule("jordan", steps) == (JORDAN,) * steps


def test_names_and_single_triples_take_five_steps() -> None:
    assert resolve_schedule(JORDAN, None) == (JORDAN,) * 5
    assert resolve_schedule([2, -1.5, 0.5], None) == ((2.0, -1.5, 0.5),) * 5
    assert all(len(resolve_schedule(name, None)) == 5 for name in SCHEDULES)


def test_the_default_is_polar_express() -> None:
    assert resolve_schedule(None, None) == resolve_schedule("polar_express", 5)


def test_jordan_is_the_default_of_torch() -> None:
    torch_default = inspect.signature(torch.optim.Muon).parameters["ns_coefficients"].default
    assert resolve_schedule("jordan", None)[0] == torch_default


def test_you_is_the_schedule_of_dion() -> None:
    """``dion/newton_schulz_triton.py`` in github.com/microsoft/dion."""
    a = (4.0848, 3.9505, 3.7418, 2.8769, 2.8366)
    b = (-6.8946, -6.3029, -5.5913, -3.1427, -3.0525)
    c = (2.9270, 2.6377, 2.3037, 1.2046, 1.2012)
    assert resolve_schedule("you", None) == tuple(zip(a, b, c))


def test_a_sequence_gives_its_own_number_of_steps() -> None:
    entries = [[1.0, 2.0, 3.0], (4.0, 5.0, 6.0)]
    assert resolve_schedule(entries, None) == ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))


@pytest.mark.parametrize("steps", range(1, 12))
@pytest.mark.parametrize("name", SCHEDULES)
def test_fewer_steps_take_the_first_entries_and_more_repeat_the_last(name: str, steps: int) -> None:
    schedule, entries = resolve_schedule(name, steps), SCHEDULES[name]
    assert len(schedule) == steps
    assert all(schedule[i] == entries[min(i, len(entries) - 1)] for i in range(steps))


def test_a_resolved_schedule_resolves_to_itself() -> None:
    for name in SCHEDULES:
        schedule = resolve_schedule(name, 4)
        assert resolve_schedule(schedule, 4) == schedule


# Ranges over all singular values from 1e-3 of the norm, computed apart from this code.
@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("jordan", 0.470544, 1.202369), ("you", 0.474982, 1.145020), ("polar_express", 0.846177, 1.123559)],
)
def test_five_steps_bring_singular_values_near_one(name: str, low: float, high: float) -> None:
    values = scalar_map(resolve_schedule(name, 5), torch.logspace(-3, 0, 100_001, dtype=torch.float64))
    assert values.min().item() == pytest.approx(low, abs=1e-6)
    assert values.max().item() == pytest.approx(high, abs=1e-6)


def best_quintic(low: float, high: float) -> tuple[float, float, float]:
    """The odd quintic that is nearest to 1 on an interval: its error takes its largest size four times, in turns."""
    inner = torch.tensor([(3 * low + high) / 4, (low + 3 * high) / 4], dtype=torch.float64)
    for _ in range(100):
        x = torch.stack([torch.tensor(low), inner[0], inner[1], torch.tensor(high)]).double()
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        a, b, c, _ = torch.linalg.solve(torch.stack([x, x**3, x**5, signs], -1), torch.ones_like(x)).tolist()
        root = (9 * b * b - 20 * a * c) ** 0.5
        inner = torch.tensor([(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)], dtype=torch.float64).sqrt()
    return a, b, c


def test_polar_express_is_the_papers_composition() -> None:
    """Algorithm 1 of arXiv 2505.16932: from 1e-3, each quintic is best on what the one before it leaves."""
    low, high, factor = 1e-3, 1.0, 1.01
    for a, b, c in SCHEDULES["polar_express"][:6]:
        best = best_quintic(max(low, 0.02407327424182761 * high), high)
        images = scalar_map((best,), torch.tensor([low, high]))
        best_a, best_b, best_c = (2 / images.sum().item() * value for value in best)
        assert (a * factor, b * factor**3, c * factor**5) == pytest.approx((best_a, best_b, best_c), rel=1e-6)
        low = best_a * low + best_b * low**3 + best_c * low**5
        high = 2 - low


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_norm_rounded_above_one_does_not_run_away(name: str) -> None:
    values = torch.linspace(0, 1.01, 10_001)
    assert all(scalar_map(resolve_schedule(name, steps), values).max() < 2 for steps in range(1, 20))


def test_polar_express_converges() -> None:
    values = torch.logspace(-3, 0, 10_001, dtype=torch.float64)
    errors = [(scalar_map(resolve_schedule("polar_express", n), values) - 1).abs().max() for n in (5, 6, 7, 8)]
    assert all(error < bound for error, bound in zip(errors, (0.16, 6e-3, 1e-5, 1e-14)))


@pytest.mark.parametrize(
    ("coefficients", "steps", "message"),
    [
        ("Jordan", None, "unknown schedule 'Jordan'.*jordan, you, polar_express"),
        ("jordan", 0, "at least 1 and below 100, got 0"),
        ("jordan", -1, "got -1"),
        (None, 100, "got 100"),
        ((), None, "empty"),
        ((), 5, "empty"),
        ((1.0, 2.0), None, r"three coefficients \(a, b, c\), got \(1.0, 2.0\)"),
        ((1.0, 2.0, 3.0, 4.0), None, "three coefficients"),
        ((JORDAN, (1.0, 2.0)), None, r"got \(1.0, 2.0\)"),
        (("abc",), None, "got 'abc'"),
    ],
)
def test_errors(coefficients: Any, steps: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_schedule(coefficients, steps)
