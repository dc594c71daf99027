"""Newton-Schulz schedules as data: the odd polynomial that each step applies to the singular values.

An entry ``(a, b, c)`` stands for ``x -> a·x + b·x³ + c·x⁵``; shorter (cubic) and longer entries are allowed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

Odd: TypeAlias = tuple[float, ...]

#: Norms that a matrix is divided by before the first polynomial, so that no singular value is above 1.
NORMS = ("frobenius", "schatten4", "aol")

DEFAULT_SCHEDULE = "muonclip"


@dataclass(frozen=True)
class Schedule:
    r"""Odd polynomials, one per step, and the norm that brings singular values into their interval.

    Args:
        polynomials: The coefficients of :math:`x, x^3, x^5, \ldots` of every step.
        norm: ``"frobenius"`` is the usual :math:`\lVert X \rVert_F`. ``"schatten4"`` is
            :math:`\lVert XX^T \rVert_F^{1/2}`: also an upper bound of the largest singular value, much tighter (3.5 to 5
            times on matrices without a dominant direction), and free, since the first step needs the Gram matrix anyway.
            ``"aol"`` divides each row by the root of its absolute row sum in the Gram matrix (Turbo-Muon, arXiv
            2512.04632), which changes the polar factor slightly.
        steps: Default number of steps. ``None`` takes all polynomials; further steps repeat the last one.
        in_bfloat16: Polynomials that take the place of the others in bfloat16, after the Frobenius norm. A schedule
            multiplies small singular values, and with them the rounding of the matrix, by the product of its first
            coefficients: what is steeper than the dtype can carry lifts nothing but noise. Two steps may share one Gram
            matrix, which moves singular values by a few units: leave them room (see :func:`with_safety`).
        in_pairs: Whether the first step and the second, the third and the fourth, and so on may share one Gram matrix
            whatever the bound on rounding says (:mod:`~lightning_muonclip.optim.restarts`).

    Raises:
        ValueError: If there is no polynomial, if one has fewer than two coefficients, or if the norm is unknown.
    """

    polynomials: tuple[Odd, ...]
    norm: str = "frobenius"
    steps: int | None = None
    in_bfloat16: tuple[Odd, ...] | None = None
    in_pairs: bool = False

    def __post_init__(self) -> None:
        if not self.polynomials:
            raise ValueError("ns_coefficients is empty; use (a, b, c), a sequence of them, or the name of a schedule")
        for entry in self.polynomials + (self.in_bfloat16 or ()):
            if len(entry) < 2:
                raise ValueError(f"a Newton-Schulz step needs at least two coefficients (a, b), got {entry!r}")
            if not all(math.isfinite(c) for c in entry) or entry[0] == 0:
                raise ValueError(
                    f"coefficients of a Newton-Schulz step must be finite, the first of them not 0; got {entry!r}"
                )
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}; use one of {', '.join(NORMS)}")

    def __call__(self, values: Tensor) -> Tensor:
        """Applies the schedule to normalized singular values."""
        for polynomial in self.polynomials:
            square, quotient = values * values, 0 * values
            for c in reversed(polynomial):
                quotient = quotient * square + c
            values = values * quotient
        return values

    def first(self, steps: int | None) -> Schedule:
        """The schedule with exactly ``steps`` steps; ``None`` uses its default."""
        steps = steps or self.steps or len(self.polynomials)
        own, half = (
            polynomials and (polynomials + polynomials[-1:] * steps)[:steps]
            for polynomials in (self.polynomials, self.in_bfloat16)
        )
        return replace(self, polynomials=own or (), steps=None, in_bfloat16=half)

    def for_dtype(self, dtype: torch.dtype) -> Schedule:
        """What is run in a working dtype."""
        if dtype is torch.bfloat16 and self.in_bfloat16 is not None:
            return Schedule(self.in_bfloat16, steps=self.steps, in_pairs=True)
        return Schedule(self.polynomials, self.norm, self.steps)

    def plain(self) -> Odd | tuple[Odd, ...] | dict[str, Any]:
        """The schedule as plain data for a checkpoint, in the format of ``torch.optim.Muon`` where possible."""
        others = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("polynomials", "steps")}
        given = {name: value for name, value in others.items() if value != getattr(Schedule, name)}
        if given:
            return {"polynomials": self.polynomials, **given}
        return self.polynomials[0] if len(set(self.polynomials)) == 1 else self.polynomials


def with_safety(polynomials: tuple[Odd, ...], factor: float) -> tuple[Odd, ...]:
    """Evaluates every polynomial at ``x / factor``, so that rounding above 1 cannot push a value out of its interval."""
    return tuple(tuple(c / factor ** (2 * k + 1) for k, c in enumerate(entry)) for entry in polynomials)


_JORDAN = (3.4445, -4.7750, 2.0315)

# Amsel et al., "The Polar Express" (arXiv 2505.16932), algorithm 1: interval from 1e-3, cushion 0.02407327424182761.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)

SCHEDULES: dict[str, Schedule] = {
    # Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024); torch.optim.Muon, Moonlight.
    "jordan": Schedule((_JORDAN,), steps=5),
    # You Jiacheng's five-step schedule, as used by dion and HeavyBall.
    "you": Schedule(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        )
    ),
    # The paper's safety: 1.01 on all but the last entry.
    "polar_express": Schedule((*with_safety(_POLAR_EXPRESS[:-1], 1.01), _POLAR_EXPRESS[-1]), steps=5),
    # The safety of Gram-Newton-Schulz (Dao-AILab) and dmuon: 1.05 on all entries.
    "polar_express_1.05": Schedule(with_safety(_POLAR_EXPRESS[:5], 1.05)),
    # modded-nanogpt and dion: interval from 1e-3, cushion 0.02, safety 1.02, and matrices divided by 1.02 times their norm.
    "polar_express_1.02": Schedule(
        (
            *with_safety(((8.156554524902461, -22.48329292557795, 15.878769915207462),), 1.02),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        )
    ),
    # Grishina et al., "Accelerating Newton-Schulz iteration for orthogonalization via Chebyshev-type polynomials" (arXiv
    # 2506.10935): minimax from 1e-3 without safety; as in NVIDIA's Emerging-Optimizers.
    "cans": Schedule(
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        )
    ),
    # Turbo-Muon (arXiv 2512.04632): almost-orthogonal normalization, then four steps; as in flash-newton-schulz and dion.
    "turbo": Schedule(
        (
            (4.6051, -9.6552, 5.6769),
            (4.7505, -6.0861, 2.1790),
            (2.7763, -2.3190, 0.5523),
            (2.4231, -2.2861, 0.8193),
        ),
        norm="aol",
    ),
    # NVIDIA (arXiv 2606.00371), as in Emerging-Optimizers: cubic, so a step needs two products instead of three.
    "cubic5": Schedule(
        (
            (3.3656577, -3.3420992),
            (2.5744352, -1.4957376),
            (2.5368962, -1.4312570),
            (2.4418906, -1.2764040),
            (2.2230472, -0.9630650),
        )
    ),
    # DeepSeek-V4: eight of Jordan's steps, then two that converge.
    "deepseek_v4": Schedule((*(_JORDAN,) * 8, *((2.0, -1.5, 0.5),) * 2)),
    # Ours: minimax from 2e-3 of the Schatten-4 norm (see Schedule), cushion 0.05, safety 1.02. As many products as The Polar
    # Express. Where no direction dominates, small values end higher; large ones end nearer to 1. Further steps converge.
    "schatten4": Schedule(
        (
            (7.8894912968911575, -20.608723362543316, 14.316675506168117),
            (3.8831374388320357, -2.5763489623740043, 0.4545855389121364),
            (3.6374501323984756, -2.52790373243933, 0.46721095563193227),
            (2.852770670701666, -2.0508268231864184, 0.43008664057722745),
            (2.054400380613441, -1.4375075355854565, 0.394190555245121),
            (1.875, -1.25, 0.375),
        ),
        norm="schatten4",
        steps=5,
    ),
}


# Ours, and the default: schatten4. In bfloat16 its slope of 653 after the Schatten-4 norm lifts the rounding of matrices of
# low rank further than Jordan's of 485 after the Frobenius norm. There, minimax from 3e-3 of the Frobenius norm is nowhere
# further from the polar factor than Jordan's (docs/orthogonalization.md).
SCHEDULES["muonclip"] = replace(
    SCHEDULES["schatten4"],
    in_bfloat16=(
        (7.85787566223906, -20.526137826422243, 14.259304154175627),
        (3.8385424997922155, -2.5668879856597084, 0.4564954833586281),
        (3.4972482966413243, -2.505345804237497, 0.47730709879905947),
        (2.5452381671737627, -1.8124586809406724, 0.4045532774192463),
        (1.9470821793300754, -1.327953708844132, 0.3828767469634254),
        (1.875, -1.25, 0.375),
    ),
)

#: A schedule, its name, its fields, one entry for all steps, or a sequence of entries.
Coefficients: TypeAlias = str | Schedule | Mapping[str, Any] | Sequence[float] | Sequence[Sequence[float]]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def resolve_schedule(
    coefficients: Coefficients | None, steps: int | None, dtype: torch.dtype | None = None
) -> Schedule:
    """Converts any accepted form of coefficients to a schedule with one polynomial per step.

    Args:
        coefficients: The name of a schedule in :data:`SCHEDULES`, a :class:`Schedule` (see
            :func:`~lightning_muonclip.optim.minimax.minimax_schedule`) or its fields as a mapping, one ``(a, b, c)`` for all
            steps, a sequence of them, or ``None`` for the library's default.
        steps: Number of steps. Defaults to that of the schedule; 5 for a single entry.
        dtype: The working dtype, for what is run in it alone; ``None`` for the whole schedule.

    Raises:
        ValueError: If the name is unknown, if an entry is not a polynomial, or if ``steps`` is not in [1, 100).

    Example:
        >>> resolve_schedule("jordan", 2).polynomials
        ((3.4445, -4.775, 2.0315), (3.4445, -4.775, 2.0315))
    """
    if steps is not None and (not isinstance(steps, int) or not 1 <= steps < 100):
        raise ValueError(f"ns_steps must be an integer of at least 1 and below 100, got {steps!r}")
    return _in_steps(_schedule(DEFAULT_SCHEDULE if coefficients is None else coefficients), steps, dtype)


@lru_cache(maxsize=256)
def _in_steps(schedule: Schedule, steps: int | None, dtype: torch.dtype | None) -> Schedule:
    schedule = schedule.first(steps)
    return schedule if dtype is None else schedule.for_dtype(dtype)


def _schedule(coefficients: Coefficients) -> Schedule:
    if isinstance(coefficients, Schedule):
        return coefficients
    if isinstance(coefficients, str):
        if coefficients not in SCHEDULES:
            raise ValueError(f"unknown schedule {coefficients!r}; use one of {', '.join(SCHEDULES)}, or (a, b, c)")
        return SCHEDULES[coefficients]
    if isinstance(coefficients, Mapping):
        lists = ("polynomials", "in_bfloat16")
        if not {"polynomials"} <= coefficients.keys() <= {*lists, "norm", "steps", "in_pairs"}:
            raise ValueError(
                "a schedule needs the key 'polynomials' and may have 'norm' and 'steps', got:"
                f" {', '.join(coefficients) or 'none'}"
            )
        given = {name: coefficients[name] for name in lists if coefficients.get(name) is not None}
        return Schedule(
            **{**coefficients, **{name: tuple(_entry(entry) for entry in own) for name, own in given.items()}}
        )
    if not isinstance(coefficients, Sequence):
        raise ValueError(
            "ns_coefficients must be the name of a schedule, (a, b, c) for all steps, a sequence of them, or a Schedule; got"
            f" {coefficients!r}"
        )
    if len(coefficients) > 0 and all(isinstance(value, (int, float)) for value in coefficients):
        return Schedule((_entry(cast("Sequence[float]", coefficients)),), steps=5)
    return Schedule(tuple(_entry(entry) for entry in cast("Sequence[Sequence[float]]", coefficients)))


def _entry(entry: Sequence[float]) -> Odd:
    is_sequence = isinstance(entry, Sequence) and not isinstance(entry, str)
    if not is_sequence or not all(isinstance(value, (int, float)) for value in entry):
        raise ValueError(f"a Newton-Schulz step must be a sequence of numbers (a, b, c), got {entry!r}")
    return tuple(float(value) for value in entry)
