from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_muonclip.optim.coefficients import DEFAULT_SCHEDULE, SCHEDULES, resolve_schedule

JORDAN = (3.4445, -4.7750, 2.0315)


def scalar_map(polynomials: tuple[tuple[float, ...], ...], values: torch.Tensor) -> torch.Tensor:
    """Applies the polynomials to singular values, term by term."""
    values = values.double()
    for entry in polynomials:
        values = sum(c * values ** (2 * k + 1) for k, c in enumerate(entry))
    return values


def entries(coefficients: Any, steps: int | None = None) -> tuple[tuple[float, ...], ...]:
    return resolve_schedule(coefficients, steps).polynomials


@pytest.mark.parametrize("steps", [1, 3, 5, 12])
def test_one_triple_is_repeated(steps: int) -> None:
    assert entries(JORDAN, steps) == (JORDAN,) * steps
    assert entries("jordan", steps) == (JORDAN,) * steps


def test_single_triples_take_five_steps_and_names_their_own() -> None:
    assert entries(JORDAN) == (JORDAN,) * 5
    assert entries([2, -1.5, 0.5]) == ((2.0, -1.5, 0.5),) * 5
    assert {name: len(entries(name)) for name in SCHEDULES if len(entries(name)) != 5} == {
        "turbo": 4,
        "deepseek_v4": 10,
    }


def test_none_is_the_default() -> None:
    assert resolve_schedule(None, None) == resolve_schedule(DEFAULT_SCHEDULE, None)


def test_jordan_is_the_default_of_torch() -> None:
    torch_default = inspect.signature(torch.optim.Muon).parameters["ns_coefficients"].default
    assert entries("jordan")[0] == torch_default


def test_you_is_the_schedule_of_dion() -> None:
    """``dion/newton_schulz_triton.py`` in github.com/microsoft/dion."""
    a = (4.0848, 3.9505, 3.7418, 2.8769, 2.8366)
    b = (-6.8946, -6.3029, -5.5913, -3.1427, -3.0525)
    c = (2.9270, 2.6377, 2.3037, 1.2046, 1.2012)
    assert entries("you") == tuple(zip(a, b, c))


def test_a_sequence_gives_its_own_number_of_steps() -> None:
    assert entries([[1.0, 2.0, 3.0], (4.0, 5.0)]) == ((1.0, 2.0, 3.0), (4.0, 5.0))


@pytest.mark.parametrize("steps", range(1, 12))
@pytest.mark.parametrize("name", SCHEDULES)
def test_fewer_steps_take_the_first_entries_and_more_repeat_the_last(name: str, steps: int) -> None:
    found, all_of_them = resolve_schedule(name, steps), SCHEDULES[name].polynomials
    assert found.norm == SCHEDULES[name].norm
    assert found.polynomials == tuple(all_of_them[min(i, len(all_of_them) - 1)] for i in range(steps))


@pytest.mark.parametrize("name", SCHEDULES)
def test_plain_data_resolves_to_the_same(name: str) -> None:
    schedule = resolve_schedule(name, 4)
    assert resolve_schedule(schedule, None) == schedule
    plain = schedule.plain()
    assert resolve_schedule(plain, 4) == schedule
    assert resolve_schedule(json.loads(json.dumps(plain)), 4) == schedule


def test_a_constant_schedule_is_kept_as_torch_keeps_it() -> None:
    assert resolve_schedule("jordan", None).plain() == JORDAN


@given(st.lists(st.lists(st.floats(0.1, 3), min_size=2, max_size=5), min_size=1, max_size=2), st.floats(0, 1.1))
def test_calling_a_schedule_applies_its_polynomials(polynomials: list[list[float]], value: float) -> None:
    schedule = resolve_schedule(polynomials, None)
    values = torch.tensor([value, 1.0], dtype=torch.float64)
    torch.testing.assert_close(schedule(values), scalar_map(schedule.polynomials, values), rtol=1e-9, atol=1e-9)


# Ranges over all singular values from 1e-3 of the norm, computed independently of this code.
@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("jordan", 0.470544, 1.202369), ("you", 0.474982, 1.145020), ("polar_express", 0.846177, 1.123559)],
)
def test_five_steps_bring_singular_values_near_one(name: str, low: float, high: float) -> None:
    values = scalar_map(entries(name, 5), torch.logspace(-3, 0, 100_001, dtype=torch.float64))
    assert values.min().item() == pytest.approx(low, abs=1e-6)
    assert values.max().item() == pytest.approx(high, abs=1e-6)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "cans"])  # published without safety
def test_a_norm_rounded_above_one_does_not_diverge(name: str) -> None:
    values = torch.linspace(0, 1.01, 10_001)
    assert all(scalar_map(entries(name, steps), values).max() < 2 for steps in range(1, 20))


def test_polar_express_converges() -> None:
    values = torch.logspace(-3, 0, 10_001, dtype=torch.float64)
    errors = [(scalar_map(entries("polar_express", n), values) - 1).abs().max() for n in (5, 6, 7, 8)]
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
        ((1.0,), None, r"two coefficients \(a, b\), got \(1.0,\)"),
        ((JORDAN, (1.0,)), None, r"got \(1.0,\)"),
        ((JORDAN, 1.0), None, r"sequence of numbers \(a, b, c\), got 1.0"),
        ((JORDAN, ("1", 2.0)), None, r"sequence of numbers \(a, b, c\), got \('1', 2.0\)"),
        (3.4, None, "the name of a schedule, .* got 3.4"),
        ((0.0, 1.5, -0.5), None, "the first of them not 0"),
        ((1.5, float("nan")), None, "must be finite"),
        ("jordan", 2.5, "an integer of at least 1 .* got 2.5"),
        (("abc",), None, "got 'abc'"),
        ({"polynomials": [JORDAN], "norm": "spectral"}, None, "unknown norm 'spectral'; use one of frobenius"),
        (
            {"polynomial": [JORDAN]},
            None,
            "needs the key 'polynomials' and may have 'norm' and 'steps', got: polynomial",
        ),
    ],
)
def test_errors(coefficients: Any, steps: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_schedule(coefficients, steps)
