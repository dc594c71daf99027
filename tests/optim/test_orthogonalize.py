from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lightning_muonclip.optim.orthogonalize as module
from lightning_muonclip import Muon, orthogonalize
from lightning_muonclip.kernels.costs import COSTS
from lightning_muonclip.optim.coefficients import SCHEDULES, Schedule, resolve_schedule
from lightning_muonclip.optim.orthogonalize import working_dtype

# Rounding of the first step (one unit of the working precision) is amplified by at most the slope of the whole
# schedule at zero, 976 for polar_express and less for the others; the sums of a product add a small factor.
SLOPE = 1000


def rounding(dtype: torch.dtype) -> float:
    return 4 * SLOPE * torch.finfo(dtype).eps


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def polar_factor(x: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return u @ vh


def normalized(s: Tensor, norm: str) -> Tensor:
    """Singular values divided by their norm."""
    power = {"frobenius": 2, "schatten4": 4}[norm]
    return s / s.pow(power).sum(-1, keepdim=True).pow(1 / power)


def mapped_by_svd(x: Tensor, schedule: Schedule) -> Tensor:
    """A Newton-Schulz schedule in exact arithmetic: it acts on the normalized singular values only."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return (u * schedule(normalized(s, schedule.norm)).unsqueeze(-2)) @ vh


#: Turbo's row scaling changes more than singular values.
SPECTRAL = [name for name in SCHEDULES if name != "turbo"]
LONGER = {"polynomials": [[2.0, -1.5, 0.6, -0.1], [1.9, -1.3, 0.5, -0.1, 0.01], [1.5, -0.5]], "norm": "schatten4"}


shapes = st.one_of(
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(1, 12)),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 8), st.integers(1, 8)),
)
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=40)


@quick
@given(
    shapes,
    seeds,
    st.sampled_from([*SPECTRAL, (1.875, -1.25, 0.375), LONGER]),
    st.integers(1, 8),
    st.sampled_from(["auto", "direct", "gram"]),
)
def test_acts_on_the_singular_values_alone(
    shape: tuple[int, ...], seed: int, name: Any, steps: int, method: str
) -> None:
    x = gaussian(*shape, seed=seed)
    result = orthogonalize(x, coefficients=name, steps=steps, method=method, dtype=torch.float64, eps=0.0)
    # In the Gram form, rounding grows by the square of the slope: 6500 after eight steps of polar_express.
    atol = 1e-10 if method == "direct" else 1e-7
    torch.testing.assert_close(result, mapped_by_svd(x, resolve_schedule(name, steps)), rtol=0, atol=atol)


def test_eps_is_added_to_the_norm_over_the_largest_entry() -> None:
    x = gaussian(4, 6)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    schedule = resolve_schedule("jordan", None)
    expected = (u * schedule(s / (s.norm() + 0.5 * x.abs().max()))) @ vh
    for scale in (1.0, 1e-20):
        found = orthogonalize(scale * x, coefficients="jordan", dtype=torch.float64, eps=0.5)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


# Twelve steps of polar_express are within 1e-14 of 1 from any singular value above 1e-3 of the norm, which leaves
# rounding, amplified by 1 / 1e-3 at most: 1e-12.
@pytest.mark.parametrize("shape", [(8, 8), (20, 7), (7, 20), (3, 9, 4), (2, 3, 4, 9), (5, 1), (1, 5), (1, 1)])
def test_many_steps_are_the_polar_factor(shape: tuple[int, ...]) -> None:
    x = gaussian(*shape)
    singular = torch.linalg.svdvals(x)
    assert (singular > 1e-3 * singular.norm(dim=-1, keepdim=True)).all()
    result = orthogonalize(x, coefficients="polar_express", steps=12, method="direct", dtype=torch.float64)
    torch.testing.assert_close(result, polar_factor(x), rtol=0, atol=1e-12)


def test_the_result_has_orthonormal_rows_or_columns() -> None:
    wide = orthogonalize(gaussian(6, 15), steps=12, dtype=torch.float64)
    tall = orthogonalize(gaussian(15, 6), steps=12, dtype=torch.float64)
    torch.testing.assert_close(wide @ wide.mT, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(tall.mT @ tall, torch.eye(6, dtype=torch.float64))


@quick
@given(shapes, seeds)
def test_a_batch_is_its_matrices_one_by_one(shape: tuple[int, ...], seed: int) -> None:
    x = gaussian(*shape, seed=seed)
    together = orthogonalize(x, dtype=torch.float64)
    matrices = x.reshape(-1, *shape[-2:])
    one_by_one = torch.stack([orthogonalize(matrix, dtype=torch.float64) for matrix in matrices]).reshape(shape)
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=1e-10)


@quick
@given(shapes, seeds)
def test_a_transposed_view_gives_the_transposed_result(shape: tuple[int, ...], seed: int) -> None:
    x = gaussian(*shape, seed=seed)
    torch.testing.assert_close(
        orthogonalize(x.mT, dtype=torch.float64), orthogonalize(x, dtype=torch.float64).mT, rtol=0, atol=1e-10
    )


def test_strided_input() -> None:
    x = gaussian(9, 4, 6)
    for view in (x[::2], x[:, ::2], x[..., ::3], x.permute(1, 2, 0), x[:1].expand(3, 4, 6)):
        torch.testing.assert_close(
            orthogonalize(view, dtype=torch.float64), orthogonalize(view.clone(), dtype=torch.float64)
        )


@pytest.mark.parametrize("exponent", [-100, -60, -1, 1, 60, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_power_of_two_changes_no_bit(exponent: int, dtype: torch.dtype) -> None:
    x = gaussian(3, 6, 10).float()
    assert torch.equal(orthogonalize(x * 2.0**exponent, dtype=dtype), orthogonalize(x, dtype=dtype))


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_scale_invariance_in_float32(scale: float) -> None:
    x = gaussian(6, 10).float()
    result = orthogonalize(x * scale, dtype=torch.float32)
    torch.testing.assert_close(result, orthogonalize(x, dtype=torch.float32), rtol=0, atol=rounding(torch.float32))


@quick
@given(shapes, seeds, st.floats(-150, 150))
def test_scale_invariance_in_float64(shape: tuple[int, ...], seed: int, exponent: float) -> None:
    x = gaussian(*shape, seed=seed)
    torch.testing.assert_close(
        orthogonalize(x * 10.0**exponent, method="direct", dtype=torch.float64),
        orthogonalize(x, method="direct", dtype=torch.float64),
        rtol=0,
        atol=rounding(torch.float64),
    )


def test_a_negated_matrix_gives_the_negated_result() -> None:
    x = gaussian(5, 8)
    assert torch.equal(orthogonalize(-x), -orthogonalize(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_zero_matrix_stays_zero_and_does_not_affect_its_batch(dtype: torch.dtype) -> None:
    x = gaussian(3, 4, 7).float()
    with_zero = x.clone()
    with_zero[1] = 0
    result = orthogonalize(with_zero, dtype=dtype)
    assert torch.equal(result[1], torch.zeros(4, 7))
    assert torch.equal(result[[0, 2]], orthogonalize(x, dtype=dtype)[[0, 2]])
    assert torch.equal(orthogonalize(torch.zeros(4, 7), dtype=dtype), torch.zeros(4, 7))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 4, 7), (3, 7, 4)])
def test_a_non_finite_matrix_does_not_affect_its_batch(bad: float, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = gaussian(*shape).float()
    with_bad = x.clone()
    with_bad[1, 2, 3] = bad
    result = orthogonalize(with_bad, dtype=dtype)
    assert not result[1].isfinite().any()
    assert torch.equal(result[[0, 2]], orthogonalize(x, dtype=dtype)[[0, 2]])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    result = orthogonalize(torch.empty(shape))
    assert result.shape == shape
    assert result.dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_vector_becomes_its_direction_times_the_image_of_one(shape: tuple[int, int], name: str) -> None:
    x = gaussian(*shape)
    length = resolve_schedule(name, None)(torch.ones((), dtype=torch.float64))
    result = orthogonalize(x, coefficients=name, dtype=torch.float64, eps=0.0)
    torch.testing.assert_close(result, x / x.norm() * length)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (2, 5, 5)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_input_is_not_modified(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = gaussian(*shape).to(dtype)
    before = x.clone()
    result = orthogonalize(x, dtype=dtype)
    result.add_(1)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_result_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    x = (100 * gaussian(6, 9)).to(dtype)
    result = orthogonalize(x, dtype=torch.float32)
    assert result.dtype == dtype
    atol = rounding(torch.float32) + torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), mapped_by_svd(x, resolve_schedule(None, None)), rtol=0, atol=atol)


def test_the_working_dtype_is_the_one_asked_for() -> None:
    x = gaussian(16, 16).float()
    exact = mapped_by_svd(x, resolve_schedule(None, None))
    errors = {
        dtype: float((orthogonalize(x, dtype=dtype) - exact).abs().max())
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    }
    assert errors[torch.float32] < rounding(torch.float32)
    assert 1e-3 < errors[torch.bfloat16] < 0.1


def test_the_largest_float16_numbers_do_not_overflow() -> None:
    x = torch.full((4, 4), 65504.0, dtype=torch.float16)
    result = orthogonalize(x, steps=12, dtype=torch.float32)
    torch.testing.assert_close(result, torch.full_like(x, 0.25), rtol=0, atol=2e-3)


# The extra room of 0.05 in bfloat16 is about 13 of its units; one unit is 2^-8.
@pytest.mark.parametrize(("dtype", "room"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("name", [name for name in SPECTRAL if name not in ("cans", "cubic5")])  # no safety in bfloat16
def test_a_schedule_keeps_singular_values_in_its_range(name: str, dtype: torch.dtype, room: float) -> None:
    x = gaussian(2, 48, 80)
    schedule = resolve_schedule(name, None)
    singular = normalized(torch.linalg.svdvals(x), schedule.norm)
    interval = torch.linspace(float(singular.min()), float(singular.max()), 20_001, dtype=torch.float64)
    images = schedule(interval)
    result = torch.linalg.svdvals(orthogonalize(x, coefficients=name, dtype=dtype))
    assert result.min() > images.min() - room
    assert result.max() < images.max() + room
    assert 0.6 < images.min() < images.max() < 1.3


def test_turbo_scales_rows_first() -> None:
    """Turbo-Muon (arXiv 2512.04632): rows of the smaller side over the roots of row sums of the absolute Gram matrix."""
    x = gaussian(9, 14)
    rows = (x @ x.mT).abs().sum(-1, keepdim=True)
    schedule = SCHEDULES["turbo"]
    u, s, vh = torch.linalg.svd(x / rows.sqrt(), full_matrices=False)
    expected = (u * schedule(s)) @ vh
    for y, own in ((x, expected), (x.mT, expected.mT), (1e9 * x, expected)):
        torch.testing.assert_close(orthogonalize(y, coefficients="turbo", dtype=torch.float64), own, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["schatten4", "turbo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norms_from_the_gram_matrix_are_zero_safe_and_each_matrix_its_own(name: str, dtype: torch.dtype) -> None:
    x = gaussian(4, 6, 10).float() * torch.tensor([1e-20, 1.0, 0.0, 1e20])[:, None, None]
    found = orthogonalize(x, coefficients=name, dtype=dtype)
    assert torch.equal(found[2], torch.zeros(6, 10))
    one_by_one = torch.stack([orthogonalize(own, coefficients=name, dtype=dtype) for own in x])
    torch.testing.assert_close(found, one_by_one, rtol=0, atol=rounding(dtype) if dtype is torch.float32 else 0.1)
    x[1, 2, 3] = math.nan
    assert not orthogonalize(x, coefficients=name, dtype=dtype)[1].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(300, 300), (1, 3000), (600, 40)])
def test_a_dominant_direction_stays_in_the_range_of_half_precision(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """All of the norm in one entry or in one direction: the largest numbers that a Gram matrix of this size can have."""
    one_entry = torch.zeros(shape)
    one_entry[0, 0] = 3.0
    for x in (one_entry, torch.ones(shape)):
        for name in ("jordan", "you", "polar_express", "schatten4"):
            norm = torch.linalg.matrix_norm(orthogonalize(x, coefficients=name, dtype=dtype).double(), 2).item()
            image = resolve_schedule(name, None)(torch.ones((), dtype=torch.float64)).item()
            assert norm == pytest.approx(
                image, abs=0.2
            )  # divergence would be far off: the largest value is the most sensitive


@pytest.mark.parametrize("method", ["direct", "gram"])
def test_autocast_changes_nothing(method: str) -> None:
    x = gaussian(20, 30).float()
    outside = orthogonalize(x, method=method, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(orthogonalize(x, method=method, dtype=torch.float32), outside)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("factor", [1e-2, 2.5e-4, 1e-5])
def test_turbo_handles_rows_of_any_scale(dtype: torch.dtype, factor: float) -> None:
    x = torch.eye(8, 16)
    x[0] *= factor
    assert torch.linalg.matrix_norm(orthogonalize(x, coefficients="turbo", dtype=dtype), 2) < 1.4


def test_without_a_guard_zero_stays_zero() -> None:
    assert torch.equal(orthogonalize(torch.zeros(3, 4), eps=0.0), torch.zeros(3, 4))


def test_no_gradient_flows() -> None:
    x = gaussian(3, 4).requires_grad_()
    assert not orthogonalize(x).requires_grad


@pytest.mark.parametrize("method", ["direct", "gram"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_methods_differ_by_rounding_alone(method: str, name: str) -> None:
    x = gaussian(5, 9)
    torch.testing.assert_close(
        orthogonalize(x, coefficients=name, method=method, dtype=torch.float64),
        orthogonalize(x, coefficients=name, dtype=torch.float64),
        rtol=0,
        atol=1e-6,  # a slope of 79,000 (deepseek_v4), squared, in units of 1e-16
    )


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.ones(3), {}, r"needs a matrix.*\(3,\)"),
        (torch.ones(()), {}, r"needs a matrix.*\(\)"),
        (torch.ones(2, 2), {"coefficients": "newton"}, "unknown schedule 'newton'"),
        (torch.ones(2, 2), {"coefficients": (1.0,)}, "two coefficients"),
        (torch.ones(2, 2), {"method": "fast"}, "unknown method 'fast'"),
        (torch.ones(2, 2), {"steps": 0}, "got 0"),
        (torch.ones(2, 2), {"steps": 100}, "got 100"),
        (torch.ones(2, 2, dtype=torch.complex64), {}, "real floating-point dtype, got torch.complex64"),
        (torch.ones(2, 2, dtype=torch.int64), {}, "got torch.int64"),
    ],
)
def test_errors(x: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        orthogonalize(x, **options)


def test_by_default_the_shape_and_the_kind_of_the_cpu_choose_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    x, cpu = gaussian(20, 30).float(), torch.device("cpu")
    for bound, expected in ((None, torch.float32), (21, torch.float32), (20, torch.bfloat16)):
        monkeypatch.setattr(module, "cpu_costs", lambda own=bound: COSTS["none"]._replace(bfloat16_from=own))
        assert working_dtype(cpu, 20) is expected
        assert working_dtype(cpu) is (torch.float32 if bound is None else torch.bfloat16)
        for y in (x, x.mT):
            assert torch.equal(orthogonalize(y), orthogonalize(y, dtype=expected))
    assert working_dtype(torch.device("meta")) is torch.float32


def test_a_batch_that_leaves_the_cache_goes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian(5, 6, 4).float()
    whole = orthogonalize(x, dtype=torch.float64)
    monkeypatch.setattr(module, "most_stacked", lambda *_: 2 * 24 + 1)
    torch.testing.assert_close(orthogonalize(x, dtype=torch.float64), whole)


def test_muon_tells_the_dtypes_that_its_shapes_are_worked_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cpu_costs", lambda: COSTS["none"]._replace(bfloat16_from=6))
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((5, 9), (8, 6))]
    assert Muon(params).working_dtypes() == {torch.float32, torch.bfloat16}
    halves = {params[1]: (0, [torch.arange(4), torch.arange(4, 8)])}
    assert Muon(params, parts=halves).working_dtypes() == {torch.float32}
    assert Muon(params, dtype="float64").working_dtypes() == {torch.float64}
