"""Remez schedules against published ones, and against the characterization of best polynomials."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_muonclip import orthogonalize
from lightning_muonclip.optim.coefficients import SCHEDULES, Schedule, with_safety
from lightning_muonclip.optim.minimax import best_odd_polynomial, minimax_schedule

PAPER_CUSHION = 0.02407327424182761

# Amsel et al., arXiv 2505.16932, algorithm 1, before any safety.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)


def assert_same(schedule: Schedule, published: Any, atol: float = 1e-6) -> None:
    found = torch.tensor(schedule.polynomials, dtype=torch.float64)
    torch.testing.assert_close(found, torch.tensor(published, dtype=torch.float64), rtol=0, atol=atol)


def test_polar_express() -> None:
    assert_same(minimax_schedule(7, 1e-3, safety=1.0, cushion=PAPER_CUSHION), POLAR_EXPRESS)


@pytest.mark.parametrize(("name", "safety"), [("polar_express", 1.01), ("polar_express_1.05", 1.05)])
def test_polar_express_with_safety_on_every_entry(name: str, safety: float) -> None:
    raw = minimax_schedule(5, 1e-3, safety=1.0, cushion=PAPER_CUSHION).polynomials
    assert_same(SCHEDULES[name].first(5), with_safety(raw, safety))


def test_polar_express_of_modded_nanogpt() -> None:
    found = minimax_schedule(5, 1e-3, cushion=0.02, safety=1.02).polynomials
    first, *others = SCHEDULES["polar_express_1.02"].polynomials
    assert_same(Schedule(found), (*with_safety((first,), 1 / 1.02), *others))  # 1.02 more is that of the norm


def test_cans_is_published_with_four_digits() -> None:
    assert_same(minimax_schedule(5, 1e-3, safety=1.0), SCHEDULES["cans"].polynomials, atol=5.1e-5)


def test_in_the_limit_it_is_newton_schulz() -> None:
    assert_same(Schedule((best_odd_polynomial(5, 1 - 1e-7, 1.0)[0],)), [(15 / 8, -10 / 8, 3 / 8)])
    assert_same(Schedule((best_odd_polynomial(3, 1 - 1e-7, 1.0)[0],)), [(1.5, -0.5)])


@settings(max_examples=150)
@given(st.sampled_from([3, 5, 7, 9, 11]), st.floats(1e-3, 0.9), st.floats(0.5, 3))
def test_the_error_equioscillates(degree: int, ratio: float, high: float) -> None:
    """Chebyshev: a polynomial with k coefficients is best if and only if its error equioscillates k + 1 times."""
    low = ratio * high
    coefficients, error = best_odd_polynomial(degree, low, high)
    x = torch.linspace(low**0.5, high**0.5, 200_001, dtype=torch.float64) ** 2
    errors = 1 - Schedule((coefficients,))(x)
    assert errors.abs().max().item() == pytest.approx(error, rel=1e-5, abs=1e-11)
    if error > 1e-9:  # float64 can tell where it is largest
        at_peak = errors[errors.abs() > error * (1 - 1e-3)].sign()
        assert 1 + int((at_peak[1:] != at_peak[:-1]).sum()) == len(coefficients) + 1


@pytest.mark.parametrize("degree", [3, 5, 9])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_schedule_is_as_near_to_one_as_its_last_error(degree: int, steps: int) -> None:
    schedule = minimax_schedule(steps, 0.03, degree, safety=1.0)
    images = schedule(torch.logspace(-1.5228787, 0, 100_001, dtype=torch.float64))
    assert (images.max() - 1).item() == pytest.approx((1 - images.min()).item(), rel=1e-5, abs=1e-12)
    more = minimax_schedule(steps + 1, 0.03, degree, safety=1.0)(
        torch.logspace(-1.5228787, 0, 100_001, dtype=torch.float64)
    )
    assert (more - 1).abs().max() < (images - 1).abs().max()


def test_schatten4_is_minimax() -> None:
    assert_same(minimax_schedule(5, 2e-3, cushion=0.05, safety=1.02), SCHEDULES["schatten4"].first(None).polynomials)


def test_a_generated_schedule_orthogonalizes() -> None:
    x = torch.randn(12, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    schedule = minimax_schedule(6, 1e-2, degree=9, norm="schatten4", safety=1.0)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(orthogonalize(x, coefficients=schedule, dtype=torch.float64), u @ vh, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 0.1, 1.0), "degree must be odd and at least 3, got 4"),
        ((1, 0.1, 1.0), "at least 3, got 1"),
        ((5, 0.0, 1.0), r"above 0, got \[0.0, 1.0\]"),
        ((5, 1.0, 0.5), r"interval must be non-empty .* got \[1.0, 0.5\]"),
    ],
)
def test_errors(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        best_odd_polynomial(*arguments)


def test_a_schedule_needs_steps() -> None:
    with pytest.raises(ValueError, match="at least one step, got 0"):
        minimax_schedule(0, 1e-3)


@pytest.mark.parametrize("options", [{"low": 2.0}, {"low": 1e-2, "safety": 0.5}, {"low": 1e-2, "cushion": 1.5}])
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"low must be in .* safety at least 1 and cushion in"):
        minimax_schedule(3, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["frobenius", "schatten4"])
def test_the_default_safety_prevents_divergence_in_half_precision(dtype: torch.dtype, norm: str) -> None:
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(64, 1, generator=generator) @ torch.randn(1, 128, generator=generator)
        found = orthogonalize(x, coefficients=minimax_schedule(5, 2e-3, norm=norm), dtype=dtype)
        assert torch.linalg.matrix_norm(found, 2) < 1.5
