r"""Where a Newton-Schulz iteration returns from its Gram matrix to the matrix itself: as seldom as rounding permits.

With :math:`R = XX^T` every step is :math:`X \to ZX` for a polynomial Z of R, and the next Gram matrix is ZRZ: small square
products, and X is needed only at the end, as :math:`Z_k \cdots Z_1 X` (Dao-AILab, Gram-Newton-Schulz). But what is rounded
off R or off the product of the Z is amplified by the steps that follow, so once in a while X and R have to be made anew: a
restart. To restart after every step is the usual, direct form.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

from lightning_muonclip.optim.coefficients import Odd, Schedule

#: Most drift (see :func:`drift`) that is permitted between two restarts: as much as one step of the direct form has in
#: bfloat16. On spectra with a long tail the error of the result, in the spectral norm, is about ten times the drift.
TOLERANCE = 0.03


def drift(polynomials: tuple[Odd, ...], unit: float) -> float:
    r"""How far rounding can move a singular value, relative to it, in steps without a restart.

    A small singular value grows by the first coefficient a of each polynomial, so the product of Z that are rounded to
    ``unit`` has an error of :math:`\prod a` units on large ones. An eigenvalue of R near 0 is off by a unit from the start;
    this error grows by :math:`a^2` in a step, and a polynomial :math:`a + br` makes a relative one of it, times
    :math:`|b/a|`.

    Args:
        polynomials: The steps between two restarts.
        unit: Half the distance from 1 to the next number in the working dtype.
    """
    product, worst = 1.0, 0.0
    for a, b, *_ in polynomials:
        worst = max(worst, abs(b / a) * product**2)
        product *= abs(a)
    return unit * max(worst, product)


@lru_cache(maxsize=4096)
def best_restarts(schedule: Schedule, ratio: float, unit: float, symmetric: float) -> tuple[int, ...]:
    """The steps before which a restart is made: the cheapest way of those that rounding permits.

    Args:
        schedule: The polynomials.
        ratio: Larger over smaller side of the matrix.
        unit: Half the distance from 1 to the next number in the working dtype.
        symmetric: Cost of a product that is known to be symmetric, over that of any other.

    Returns:
        Increasing indices of steps, without the first. All of them are the direct form.
    """
    polynomials = schedule.polynomials
    # The cheapest way through the first k steps, and where its last restart is.
    ways: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for end in range(1, len(polynomials) + 1):
        ways.append(
            min(
                (ways[start][0] + _cost(polynomials[start:end], ratio, symmetric), (*ways[start][1], start))
                for start in range(end)
                if start == end - 1 or drift(polynomials[start:end], unit) <= TOLERANCE
            )
        )
    return ways[-1][1][1:]


def flops(schedule: Schedule, restarts: tuple[int, ...], m: int, n: int, symmetric: float = 1.0) -> float:
    """Floating-point operations for one (m, n) matrix; ``symmetric`` as in :func:`best_restarts`."""
    small, large = sorted((m, n))
    bounds = (0, *restarts, len(schedule.polynomials))
    runs = [schedule.polynomials[i:j] for i, j in pairwise(bounds)]
    return 2.0 * small**3 * sum(_cost(run, large / small, symmetric) for run in runs)


def _cost(run: tuple[Odd, ...], ratio: float, symmetric: float) -> float:
    """Of the steps between two restarts, in products of two square matrices of the smaller side."""
    on_whole = (1 + symmetric) * ratio  # the matrix is multiplied, and its Gram matrix made
    between = 3 * (len(run) - 1)  # the product of the Z, and ZRZ
    return on_whole + symmetric * (between + sum(products(len(polynomial)) for polynomial in run))


def products(terms: int) -> int:
    """Matrix products that a polynomial with so many coefficients takes, by Horner's rule in the square."""
    return terms // 2 if terms > 2 else 0
