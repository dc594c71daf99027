"""Proves a layout by one trial: every head gets a factor of its own, and nothing but queries and keys may follow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_muonclip.qk_clip.describe.infer import Layout, Unclear
from lightning_muonclip.qk_clip.describe.isolate import Isolated, Run
from lightning_muonclip.qk_clip.describe.layout import KINDS, spread

#: Beyond the bounds that models clamp queries and keys to, such as 8 in DBRX and OLMo.
LARGE = 256.0

CLAMPED = "its queries or keys are clamped: they do not follow when their weights grow"


def factors(layout: Layout, of: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What multiplies each parameter, from the factors of the heads by kind of channel."""
    found: dict[str, Tensor] = {}
    for name, table in layout.tables:
        if not table.scaled.any():
            continue
        own = torch.ones(table.kinds.shape, dtype=torch.float64)
        for kind, values in of.items():
            chosen = table.kinds == KINDS.index(kind)
            own[chosen] = values[table.heads[chosen].clamp_min(0)].to(own)
        own = spread(own, table.dims, params[name])
        found[name] = found[name] * own if name in found else own
    return found


class Trial:
    """A factor of its own for every head of an attention, around ``size``, and what queries and keys do then."""

    def __init__(self, layout: Layout, size: float) -> None:
        self.layout = layout
        generator = torch.Generator().manual_seed(3)

        def draw(count: int) -> Tensor:
            return size * torch.exp2(2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1)

        self._factors = {
            "q": draw(layout.num_heads),
            "k": draw(layout.num_key_value_heads),
            "qr": draw(layout.num_heads),
        }
        if layout.is_tied:  # both sides by both factors
            self._factors |= dict.fromkeys("qk", self._factors["q"])
        self._factors |= {"qn": self._factors["q"], "kn": self._factors["k"]}
        shared = {
            KINDS[kind][0] for _, table in layout.tables for kind in table.kinds[table.scaled & (table.heads < 0)]
        }
        for kind, own in self._factors.items():
            if kind[0] in shared or (shared and layout.is_tied):  # such as the gain of a norm, which all heads share
                self._factors[kind] = own[:1].expand(len(own))

    def factors(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What multiplies each parameter."""
        return factors(self.layout, self._factors, params)

    def expected(self, side: str, number: int) -> Tensor:
        """What multiplies the queries ("q") or keys ("k") of one pair, in the order of the layout's units."""
        units = (self.layout.query_units if side == "q" else self.layout.key_units)[number]
        factor = (
            self._factors[side][units] if side in self.layout.sides else torch.ones(units.shape, dtype=torch.float64)
        )
        factor = factor[..., None, None] ** (2 if self.layout.is_tied else 1)
        if self.layout.own_channels is not None:
            rest = self._factors["qr"][units][..., None, None] if side == "q" else torch.ones_like(factor)
            factor = torch.where(self.layout.own_channels, factor, rest)
        return factor


@dataclass(frozen=True)
class Outcome:
    """What a trial made of one tensor.

    Attributes:
        what: "queries", "keys", "values", or what else.
        before: Without the factors.
        factor: What should have multiplied it; broadcasts.
        after: With them.
        heads: For queries and keys, the head of each leading index.
    """

    what: str
    before: Tensor
    factor: Tensor
    after: Tensor
    heads: Tensor | None = None

    @cached_property
    def error(self) -> float:
        """The largest deviation, relative to the largest element."""
        return deviation(self.before.detach() * self.factor, self.after.detach())

    @property
    def limit(self) -> float:
        """What rounding explains: of the dtype, or of half precision in which some kernels compute."""
        return {torch.float64: 1e-6, torch.float32: 1e-3}.get(self.after.dtype, 2 * torch.finfo(self.after.dtype).eps)


def outcomes(isolated: Isolated, run: Run, layout: Layout, size: float = 1.0) -> Iterator[Outcome]:
    """What becomes of queries, keys, values and everything else if all heads are scaled at once.

    Args:
        isolated: The module.
        run: A forward of it.
        layout: What is to be proven.
        size: How large the factors are.
    """
    trial = Trial(layout, size)
    one = torch.ones(())
    offsets = {name: table.offset for name, table in layout.tables}
    with isolated.scaled(trial.factors(isolated.params), offsets):
        after = isolated.run(run.products)
    yield Outcome("the attention calls", _counts(run), one, _counts(after))
    for a, b in zip(run.rest, after.rest):
        yield Outcome("outputs that do not depend on queries and keys", a, one.to(a.device), b)
    number = 0
    for index, (call, again) in enumerate(zip(run.calls, after.calls)):
        if call.value is not None and again.value is not None:
            yield Outcome("the values", call.value, one.to(call.value.device), again.value)
        for pair, pair_again in zip(call.pairs, again.pairs):
            for side, units, a, b in zip("qk", (layout.query_units, layout.key_units), pair, pair_again):
                is_own = index in layout.calls
                factor = trial.expected(side, number) if is_own else one
                heads = units[number] if is_own else None
                yield Outcome("queries" if side == "q" else "keys", a, factor.to(a.device), b, heads)
            number += index in layout.calls


def _counts(run: Run) -> Tensor:
    return torch.tensor(
        [len(run.calls), len(run.rest), sum(len(call.pairs) for call in run.calls)], dtype=torch.float64
    )


@torch.no_grad()
def deviation(expected: Tensor, found: Tensor) -> float:
    """The largest difference, relative to the largest element."""
    if expected.shape != found.shape:
        return math.inf
    differs = expected != found  # masks are infinite
    if not differs.any():
        return 0.0
    size = expected.abs().masked_fill(~expected.isfinite(), 0).max().clamp_min(1e-30)
    return float(((expected - found)[differs] / size).abs().nan_to_num(nan=math.inf).max())


def proven(isolated: Isolated, run: Run, layouts: Iterable[Sequence[Layout]]) -> Layout:
    """The first of several layouts that passes; of alternatives, the one that errs much less than the one before.

    Raises:
        Unclear: If none does.
    """
    least, is_bounded = math.inf, False
    for alternatives in layouts:
        trials = ((layout, list(outcomes(isolated, run, layout))) for layout in alternatives)
        best, trial = next(trials)
        for layout, other in trials:
            if _error(other) < _error(trial) / 10:
                best, trial = layout, other
        if holds(trial):
            if holds(outcomes(isolated, run, best, LARGE)):
                best.error = _error(trial)
                return best
            is_bounded = True
        least = min(least, _error(trial))
    if is_bounded:
        raise Unclear(CLAMPED)
    raise Unclear(f"the proof fails: with all heads scaled at once, something is off by {least:.1e}")


def holds(trial: Iterable[Outcome]) -> bool:
    """Whether everything followed but for rounding."""
    return all(outcome.error < outcome.limit for outcome in trial)


def _error(trial: Sequence[Outcome]) -> float:
    return max(outcome.error for outcome in trial)
