"""Orthogonalization against the float64 SVD, over many spectra, for the candidate default schedules."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from lightning_muonclip import orthogonalize
from lightning_muonclip.optim.coefficients import DEFAULT_SCHEDULE, SCHEDULES

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from spectra import SPECTRA, Reference, zoo

N = 96
REAL = SPECTRA[-2:]
CASES = [(name, 1) for name in SPECTRA] + [(name, 4) for name in SPECTRA if name not in REAL]
NAMES = list(dict.fromkeys([DEFAULT_SCHEDULE, "schatten4", "polar_express"]))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
UNITS = {dtype: torch.finfo(dtype).eps / 2 for dtype in DTYPES}

over_the_zoo = pytest.mark.parametrize(("spectrum", "ratio"), CASES, ids=lambda value: str(value))
schedules = pytest.mark.parametrize("name", NAMES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@cache
def reference(spectrum: str, ratio: int) -> Reference:
    return Reference(zoo(N, ratio)[spectrum])


@cache
def measured(spectrum: str, ratio: int, name: str, dtype: torch.dtype, method: str = "direct") -> dict[str, float]:
    x = zoo(N, ratio)[spectrum]
    x = x.double() if dtype is torch.float64 else x
    return reference(spectrum, ratio).metrics(orthogonalize(x, coefficients=name, method=method, dtype=dtype))


def noise(spectrum: str, ratio: int, name: str, dtype: torch.dtype) -> float:
    """Bound on the error of the result due to rounding, relative to the result.

    Rounding moves every entry of a matrix by at most a unit, ``unit / sqrt(3)`` in the mean square, and the schedule
    amplifies this by at most its slope at zero. That is large for a matrix of low rank, where everything else is noise. Two
    roundings count, that of the matrix and that of its rescale or first step; later ones are amplified less. Products are
    summed in float32, so for float32 the sums count too: n terms are off by sqrt(n) units.
    """
    schedule = SCHEDULES[name].first(None).for_dtype(dtype)
    s = reference(spectrum, ratio).s
    s = s / s.norm(2 if schedule.norm == "frobenius" else 4)
    slope = torch.tensor([entry[0] for entry in schedule.polynomials]).prod().item()
    unit = UNITS[dtype] * (2 / 3) ** 0.5 * (N**0.5 if dtype is torch.float32 else 1.0)
    return float(slope * unit * s.norm() / schedule(s).norm())


def test_the_spectra_are_as_described() -> None:
    assert tuple(zoo(N)) == SPECTRA
    of = {name: reference(name, 1) for name in SPECTRA}
    assert (of["low rank"].rank, of["rank one"].rank) == (12, 1)
    assert of["log-spaced 1..1e-5"].matters < of["log-spaced 1..1e-3"].matters < of["power law 0.7"].matters == N
    for name in REAL:  # heavy tails: most of the norm in a few directions, most directions below 1 % of the largest
        s = of[name].s
        assert of[name].rank == len(s) == 128
        assert s[:8].square().sum() > 0.9 * s.square().sum()


def test_the_metrics_of_the_polar_factor_and_of_what_is_not() -> None:
    x = zoo(N)["log-spaced 1..1e-3"]
    own = Reference(x)
    polar = own.u @ own.vh
    exact = own.metrics(polar)
    assert exact == pytest.approx({"cosine": 1, "gap": 0, "largest": 1, "smallest": 1, "drift": 0}, abs=1e-6)
    rotated = own.metrics(polar.roll(1, 0))
    assert rotated["cosine"] < 0.2 and rotated["gap"] > 0.5 and rotated["drift"] > 0.9
    unequal = own.metrics(own.u @ (torch.linspace(1.2, 0.5, N, dtype=torch.float64)[:, None] * own.vh))
    assert unequal["largest"] == pytest.approx(1.2) and 0.5 < unequal["smallest"] < 1 and unequal["drift"] < 1e-6


@over_the_zoo
@schedules
def test_in_exact_arithmetic_no_spectrum_is_worse_than_by_jordans(spectrum: str, ratio: int, name: str) -> None:
    jordan = measured(spectrum, ratio, "jordan", torch.float64)
    assert measured(spectrum, ratio, name, torch.float64)["cosine"] > jordan["cosine"] - 1e-9


@over_the_zoo
@schedules
@dtypes
@pytest.mark.parametrize("method", ["direct", "gram"])
def test_rounding_stays_within_its_bound(spectrum: str, ratio: int, name: str, dtype: torch.dtype, method: str) -> None:
    found = measured(spectrum, ratio, name, dtype, method)
    same = SCHEDULES[name].first(None).for_dtype(dtype)
    exact = reference(spectrum, ratio).metrics(
        orthogonalize(zoo(N, ratio)[spectrum].double(), coefficients=same, dtype=torch.float64)
    )
    jordan = measured(spectrum, ratio, "jordan", torch.float64)
    # Noise is at right angles to the result: this is the cosine of the angle by which it turns.
    turned = (1 + noise(spectrum, ratio, name, dtype) ** 2) ** -0.5
    assert found["cosine"] > exact["cosine"] * turned - 1e-4
    assert found["cosine"] > jordan["cosine"] * turned - 1e-4
    # No allowance for rounding: safety and cushion leave more room than it needs, in every dtype. (The default is less steep
    # in bfloat16.)
    assert found["smallest"] > (0.4 if dtype is torch.bfloat16 and name == DEFAULT_SCHEDULE else 0.7)
    assert found["largest"] < 1.3
    if dtype is torch.float32:
        assert found["smallest"] == pytest.approx(exact["smallest"], abs=1e-3)
        assert found["largest"] == pytest.approx(exact["largest"], abs=1e-3)


@over_the_zoo
@dtypes
def test_the_default_is_nowhere_further_from_the_polar_factor_than_torchs(
    spectrum: str, ratio: int, dtype: torch.dtype
) -> None:
    """torch's iteration, run in each dtype: the slope of the default is no steeper than the dtype can carry."""
    x = zoo(N, ratio)[spectrum]
    y = (x / x.norm()).to(dtype)
    y = y.mT if y.shape[0] > y.shape[1] else y
    for _ in range(5):
        gram = y @ y.mT
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), y, beta=3.4445)
    torchs = reference(spectrum, ratio).metrics(y.mT if x.shape[0] > x.shape[1] else y)
    found = [measured(spectrum, ratio, DEFAULT_SCHEDULE, dtype, method)["cosine"] for method in ("direct", "gram")]
    # The float16 of a GPU resolves eight times less noise; there the default stays as steep as in float32.
    assert min(found) > torchs["cosine"] - (0.03 if dtype is torch.float16 else 2e-3)


#: What the Gram form may add to the drift. Between two restarts a unit of float32 is amplified 2000 times at most, there are
#: one or two restarts, and sums of n products are off by sqrt(n) units: 2000 · 2 · 10 · 2**-24. In half precision the rule
#: permits 0.03 for the worst singular value, which is a few times that of all of them.
GRAM = {torch.float32: 2.4e-3, torch.float16: 0.01, torch.bfloat16: 0.01}


@over_the_zoo
@schedules
@dtypes
def test_singular_vectors_stay(spectrum: str, ratio: int, name: str, dtype: torch.dtype) -> None:
    tangent = noise(spectrum, ratio, name, dtype)
    direct, gram = (measured(spectrum, ratio, name, dtype, method)["drift"] for method in ("direct", "gram"))
    in_bfloat16 = measured(spectrum, ratio, name, torch.bfloat16, "direct")["drift"]  # what the restarts are placed by
    assert direct < tangent / (1 + tangent**2) ** 0.5 + 4 * UNITS[dtype]  # the last step rounds once more
    assert gram < max(direct + GRAM[dtype], in_bfloat16 if dtype is torch.float16 else 0.0)


@pytest.mark.parametrize("name", ["cubic5", "turbo"])
@pytest.mark.parametrize("spectrum", ["log-spaced 1..1e-3", "power law 1.5", *REAL])
def test_cheaper_schedules_are_worse_on_heavy_tails(spectrum: str, name: str) -> None:
    """As in docs/orthogonalization.md; shows that the other assertions do not hold for every schedule."""
    cheap, jordan = (measured(spectrum, 1, own, torch.float64)["cosine"] for own in (name, "jordan"))
    assert cheap < jordan - 5e-3


@pytest.mark.parametrize(("name", "holds"), [("jordan", False), ("polar_express", False), ("schatten4", True)])
def test_one_percent_of_the_largest_in_a_wide_layer(name: str, holds: bool) -> None:
    """By the quarter-circle law: the Frobenius norm outgrows the largest singular value, the Schatten-4 norm less so."""
    schedule = SCHEDULES[name].first(None)
    for n in (1024, 4096, 16384):
        size = float(n) if schedule.norm == "frobenius" else (2 * n**3) ** 0.25
        image = schedule(torch.tensor(0.02 * n**0.5 / size, dtype=torch.float64))
        assert bool(0.7 < image < 1.3) is holds
