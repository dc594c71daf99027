"""Minimax Newton-Schulz schedules: odd polynomials whose composition maps an interval closest to 1.

For an interval and a degree there is one best odd polynomial, found by the Remez algorithm. It maps the interval onto one
around 1, for which there is again one best polynomial. This greedy composition is optimal (Amsel et al., "The Polar
Express", arXiv 2505.16932, theorem 3.1).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial

from lightning_muonclip.optim.coefficients import Schedule, with_safety

_ROUNDS = 100


def best_odd_polynomial(degree: int, low: float, high: float) -> tuple[tuple[float, ...], float]:
    r"""The odd polynomial that minimizes :math:`\max |1 - p(x)|` over ``[low, high]``, by the Remez algorithm.

    Args:
        degree: Odd, at least 3.
        low: Lower end of the interval, above 0.
        high: Upper end, at least ``low``.

    Returns:
        The coefficients of :math:`x, x^3, x^5, \ldots`, and the largest error.

    Raises:
        ValueError: If the degree is even or below 3, or if the interval is empty or contains 0.

    Example:
        >>> coefficients, error = best_odd_polynomial(3, 0.5, 1.0)
        >>> [round(c, 4) for c in coefficients], round(error, 4)
        ([2.1328, -1.2187], 0.086)
    """
    if degree < 3 or degree % 2 == 0:
        raise ValueError(f"the degree must be odd and at least 3, got {degree}")
    if not 0 < low <= high < math.inf:
        raise ValueError(f"the interval must be non-empty and above 0, got [{low}, {high}]")
    terms = (degree + 1) // 2
    if high / low - 1 < 1e-5:  # in float64 indistinguishable from the limit
        return _newton_schulz(terms, (low + high) / 2), 0.0
    signs = (-1.0) ** np.arange(terms + 1)
    points = (low + high) / 2 - (high - low) / 2 * np.cos(np.pi * np.arange(terms + 1) / terms)
    error = 0.0
    for _ in range(_ROUNDS):
        # p(x) = x·q(x²), where 1 - p has the same magnitude and alternating signs at the points.
        on_interval = (2 * points**2 - low**2 - high**2) / (high**2 - low**2)
        basis = points[:, None] * np.polynomial.chebyshev.chebvander(on_interval, terms - 1)
        *solution, level = np.linalg.solve(np.column_stack([basis, signs]), np.ones(terms + 1))
        quotient = Chebyshev(solution, domain=[low**2, high**2])
        points = np.array([low, *_extrema(quotient), high])
        if abs(abs(level) - error) <= 1e-15 + 1e-12 * error:
            break
        error = abs(level)
    if not math.isfinite(level):
        raise ValueError(f"float64 is too coarse for the best polynomial of degree {degree}; use a lower degree")
    coefficients = quotient.convert(kind=Polynomial, domain=[-1, 1], window=[-1, 1]).coef
    return tuple(float(c) for c in coefficients), float(abs(level))


def minimax_schedule(
    steps: int,
    low: float,
    degree: int = 5,
    *,
    norm: str = "frobenius",
    safety: float = 1.02,
    cushion: float = 0.0,
) -> Schedule:
    """The schedule of ``steps`` polynomials that maps all singular values in ``[low, 1]`` closest to 1.

    Args:
        steps: Number of polynomials.
        low: Smallest normalized singular value that matters. Smaller ones grow by the product of the first coefficients.
        degree: Degree of each polynomial, odd.
        norm: The norm that matrices are divided by (see :class:`~lightning_muonclip.optim.coefficients.Schedule`).
        safety: Every polynomial but the last is evaluated at ``x / safety``, so that rounding cannot push a value out of
            its interval. With 1.0, half precision diverges on matrices of rank one.
        cushion: Lower bound of each interval relative to its upper end. It keeps the first polynomials from compressing
            large values, at little cost for small ones (The Polar Express, section 4.3).

    Raises:
        ValueError: If there is no such polynomial, or if ``steps`` is not positive.

    Example:
        >>> schedule = minimax_schedule(5, 1e-3, safety=1.0)
        >>> [round(c, 2) for c in schedule.polynomials[0]]
        [8.47, -25.11, 18.63]
    """
    if steps < 1:
        raise ValueError(f"a schedule needs at least one step, got {steps}")
    if not 0 < low < 1 or not safety >= 1 or not 0 <= cushion < 1:
        raise ValueError(
            f"low must be in (0, 1), safety at least 1 and cushion in [0, 1); got {low}, {safety} and {cushion}"
        )
    low, high = float(low), 1.0
    polynomials = []
    for i in range(steps):
        start = max(low, cushion * high)
        coefficients, error = best_odd_polynomial(degree, start, high)
        if start > low:  # center the image of the whole interval on 1
            factor = 2 / (_evaluate(coefficients, low) + 1 + error)
            coefficients = tuple(factor * c for c in coefficients)
        if i < steps - 1:
            [coefficients] = with_safety((coefficients,), safety)
        polynomials.append(coefficients)
        low = min(_evaluate(coefficients, low), 1.0)
        high = 2 - low
    return Schedule(tuple(polynomials), norm=norm)


def _extrema(quotient: Chebyshev) -> list[float]:
    """The stationary points of x·q(x²) inside the interval of q."""
    squares = Chebyshev([np.mean(quotient.domain), np.ptp(quotient.domain) / 2], domain=quotient.domain)
    roots = (quotient + 2 * squares * quotient.deriv()).roots()
    low, high = quotient.domain
    return sorted(math.sqrt(root.real) for root in roots if abs(root.imag) < 1e-9 and low < root.real < high)


def _newton_schulz(terms: int, center: float) -> tuple[float, ...]:
    """The limit for an interval that shrinks to a point: x times the Taylor polynomial of 1/sqrt at its square."""
    series = Polynomial([0.0])
    for k in range(terms):
        series = series + math.prod((-0.5 - i) / (i + 1) for i in range(k)) * Polynomial([-1.0, 1.0]) ** k
    return tuple(float(c) / center ** (2 * k + 1) for k, c in enumerate(series.coef))


def _evaluate(coefficients: tuple[float, ...], x: float) -> float:
    return sum(c * x ** (2 * k + 1) for k, c in enumerate(coefficients))
