r"""Plans the restarts of a Gram-Newton-Schulz iteration: as few as rounding permits.

With :math:`R = XX^T`, every step is :math:`X \to ZX` for a polynomial Z of R, and the next Gram matrix is ZRZ. These are
small square products; X itself is needed only at the end, as :math:`Z_k \cdots Z_1 X` (Dao-AILab, Gram-Newton-Schulz). But
later steps amplify the rounding errors of R and of the product of the Z, so X and R must be recomputed now and then: a
restart. Restarting after every step is the usual, direct form.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch

from lightning_muonclip.optim.coefficients import Odd, Schedule

#: Maximum amplification of a unit of rounding between two restarts. A whole schedule amplifies a unit of the matrix itself
#: about 1000 times; this bound keeps float32 close to its best accuracy.
MOST_UNITS = 2000.0

_BFLOAT16_UNIT = 2.0**-8


def amplification(polynomials: tuple[Odd, ...]) -> float:
    r"""Amplification of a unit of rounding by steps without a restart, as relative error of a singular value.

    A small singular value grows by the first coefficient a of each polynomial, so the rounded product of the Z has an error
    of :math:`\prod a` units on large ones. An eigenvalue of R near 0 starts with an error of one unit, which grows by
    :math:`a^2` per step; a polynomial :math:`a + br` turns it into a relative error, times :math:`|b/a|`.
    """
    product, worst = 1.0, 0.0
    for a, b, *_ in polynomials:
        worst = max(worst, abs(b / a) * product**2)
        product *= abs(a)
    return max(worst, product)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@lru_cache(maxsize=4096)
def best_restarts(
    polynomials: tuple[Odd, ...], ratio: float, unit: float, symmetric: float, in_pairs: bool = False
) -> tuple[int, ...]:
    """The steps that start with a restart: the cheapest choice that is as accurate as the direct form in bfloat16.

    bfloat16 is what Muon has always run in. So float16 can skip most restarts, and bfloat16 hardly any but those inside of
    pairs, for schedules that were measured to permit them.

    Args:
        polynomials: The steps of a schedule.
        ratio: Larger over smaller side of the matrix.
        unit: Half the distance from 1 to the next number in the working dtype.
        symmetric: Cost of a symmetric product relative to a general one.
        in_pairs: As in :class:`~lightning_muonclip.optim.coefficients.Schedule`.

    Returns:
        Increasing indices of steps, without the first. All of them are the direct form.
    """
    budget = sum(amplification((polynomial,)) for polynomial in polynomials) * max(unit, _BFLOAT16_UNIT)
    # Pareto-optimal plans for the first k steps: cost, error and restarts.
    ways: list[list[tuple[float, float, tuple[int, ...]]]] = [[(0.0, 0.0, ())]]
    for end in range(1, len(polynomials) + 1):
        candidates = []
        for start in range(end):
            run = polynomials[start:end]
            is_pair = in_pairs and len(run) == 2 and start % 2 == 0
            units = sum(amplification((polynomial,)) for polynomial in run) if is_pair else amplification(run)
            if len(run) == 1 or units <= MOST_UNITS:
                cost = _cost(run, ratio, symmetric)
                candidates += [(c + cost, e + units * unit, (*way, start)) for c, e, way in ways[start]]
        best: list[tuple[float, float, tuple[int, ...]]] = []
        for way in sorted(candidates):
            if way[1] <= budget * (1 + 1e-9) and (not best or way[1] < best[-1][1]):
                best.append(way)
        ways.append(best)
    return ways[-1][0][2][1:]


def flops(schedule: Schedule, restarts: tuple[int, ...], m: int, n: int, symmetric: float = 1.0) -> float:
    """Floating-point operations for one (m, n) matrix; ``symmetric`` as in :func:`best_restarts`."""
    small, large = sorted((m, n))
    bounds = (0, *restarts, len(schedule.polynomials))
    runs = [schedule.polynomials[i:j] for i, j in pairwise(bounds)]
    return 2.0 * small**3 * sum(_cost(run, large / small, symmetric) for run in runs)


def cheapest_flops(schedule: Schedule, m: int, n: int, unit: float, symmetric: float = 1.0) -> float:
    """Floating-point operations for one (m, n) matrix with the restarts of :func:`best_restarts`."""
    if not m or not n:
        return 0.0
    restarts = best_restarts(schedule.polynomials, max(m, n) / min(m, n), unit, symmetric, schedule.in_pairs)
    return flops(schedule, restarts, m, n, symmetric)


def _cost(run: tuple[Odd, ...], ratio: float, symmetric: float) -> float:
    """Cost of the steps between two restarts, in products of two square matrices of the smaller side."""
    on_whole = (1 + symmetric) * ratio  # the product with the matrix, and its Gram matrix
    between = 3 * (len(run) - 1)  # the product of the Z, and ZRZ
    return on_whole + symmetric * (between + sum(products(len(polynomial)) for polynomial in run))


def products(terms: int) -> int:
    """Number of matrix products for a polynomial of ``terms`` coefficients, by Horner's rule in R²."""
    return terms // 2 if terms > 2 else 0
