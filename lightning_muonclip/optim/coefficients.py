"""Newton-Schulz schedules as data: which odd polynomial each iteration applies to the singular values.

An entry ``(a, b, c)`` stands for ``x -> a·x + b·x³ + c·x⁵``. A schedule is a tuple of entries, one a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, cast

Quintic: TypeAlias = tuple[float, float, float]
Schedule: TypeAlias = tuple[Quintic, ...]

DEFAULT_SCHEDULE = "polar_express"
DEFAULT_STEPS = 5


def _with_safety(schedule: Schedule, factor: float) -> Schedule:
    """Evaluates every polynomial at ``x / factor``, so that rounding above 1 cannot push a value out of its interval."""
    return tuple((a / factor, b / factor**3, c / factor**5) for a, b, c in schedule)


#: Steps beyond a schedule's length repeat its last entry; fewer steps take its first entries.
SCHEDULES: dict[str, Schedule] = {
    # Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024); torch.optim.Muon, Moonlight.
    "jordan": ((3.4445, -4.7750, 2.0315),),
    # You Jiacheng's five-step schedule, as used by dion and HeavyBall.
    "you": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # Amsel et al., "The Polar Express" (arXiv 2505.16932), interval from 1e-3, safety 1.01 on all but the last entry.
    "polar_express": (
        *_with_safety(
            (
                (8.28721201814563, -23.595886519098837, 17.300387312530933),
                (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
                (3.3184196573706015, -2.488488024314874, 0.51004894012372),
                (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
                (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
                (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
            ),
            1.01,
        ),
        (1.875, -1.25, 0.375),
    ),
}


def resolve_schedule(
    coefficients: str | Sequence[float] | Sequence[Sequence[float]] | None, steps: int | None
) -> Schedule:
    """Turns whatever the user gave into one ``(a, b, c)`` a step.

    Args:
        coefficients: The name of a schedule in :data:`SCHEDULES`, one triple for all steps, a sequence of triples, or
            ``None`` for the library's default.
        steps: Number of iterations. ``None`` is 5 for a name or a single triple, else the length of the sequence.

    Returns:
        The schedule, ``steps`` entries long.

    Raises:
        ValueError: If the name is unknown, an entry is not a triple, or ``steps`` is not in [1, 100).

    Example:
        >>> resolve_schedule("jordan", 2)
        ((3.4445, -4.775, 2.0315), (3.4445, -4.775, 2.0315))
    """
    if steps is not None and not 1 <= steps < 100:
        raise ValueError(f"ns_steps must be at least 1 and below 100, got {steps}")
    if coefficients is None:
        coefficients = DEFAULT_SCHEDULE
    if isinstance(coefficients, str):
        if coefficients not in SCHEDULES:
            raise ValueError(f"unknown schedule {coefficients!r}; known: {', '.join(SCHEDULES)}, or give (a, b, c)")
        entries, steps = SCHEDULES[coefficients], steps or DEFAULT_STEPS
    elif len(coefficients) > 0 and all(isinstance(value, (int, float)) for value in coefficients):
        entries, steps = (_quintic(cast("Sequence[float]", coefficients)),), steps or DEFAULT_STEPS
    else:
        entries = tuple(_quintic(entry) for entry in cast("Sequence[Sequence[float]]", coefficients))
        steps = steps or len(entries)
    if not entries:
        raise ValueError("ns_coefficients is empty; give (a, b, c), a sequence of them, or a schedule's name")
    return (entries + entries[-1:] * steps)[:steps]


def _quintic(entry: Sequence[float]) -> Quintic:
    if isinstance(entry, str) or len(entry) != 3:
        raise ValueError(f"a Newton-Schulz step needs exactly three coefficients (a, b, c), got {entry!r}")
    a, b, c = (float(value) for value in entry)
    return a, b, c
