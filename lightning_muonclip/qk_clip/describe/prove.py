"""Proves a layout by one trial: every head gets a factor of its own, and nothing but queries and keys may follow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_muonclip.qk_clip.describe.infer import Layout, Unclear
from lightning_muonclip.qk_clip.describe.isolate import Isolated, Run
from lightning_muonclip.qk_clip.describe.layout import KINDS, spread

#: Beyond the bounds that models clamp queries and keys to, such as 8 in DBRX and OLMo.
_LARGE = 256.0


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
        if any((table.heads[table.scaled] < 0).any() for _, table in layout.tables):  # shared by all heads
            self._factors = {kind: own[:1].expand(len(own)) for kind, own in self._factors.items()}
        if layout.is_tied:  # both sides by both factors
            self._factors |= dict.fromkeys("qk", self._factors["q"])
        self._factors |= {"qn": self._factors["q"], "kn": self._factors["k"]}

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


def prove(isolated: Isolated, run: Run, layout: Layout, size: float = 1.0) -> float:
    """The largest relative deviation from what should follow, over queries, keys, values and everything else.

    Args:
        isolated: The module.
        run: A forward of it.
        layout: What is to be proven.
        size: How large the factors are.
    """
    trial = Trial(layout, size)
    offsets = {name: table.offset for name, table in layout.tables}
    with isolated.scaled(trial.factors(isolated.params), offsets):
        after = isolated.run(run.products)
    if len(after.calls) != len(run.calls) or len(after.rest) != len(run.rest):
        return math.inf
    errors = [deviation(a, b) for a, b in zip(run.rest, after.rest)]
    number = 0
    for index, (a, b) in enumerate(zip(run.calls, after.calls)):
        if a.value is not None and b.value is not None:
            errors.append(deviation(a.value, b.value))
        if len(a.pairs) != len(b.pairs):
            return math.inf
        for (query, key), (new_query, new_key) in zip(a.pairs, b.pairs):
            factors: tuple[Tensor | float, Tensor | float] = (1.0, 1.0)
            if index in layout.calls:
                factors = trial.expected("q", number).to(query.device), trial.expected("k", number).to(key.device)
                number += 1
            errors += [deviation(query * factors[0], new_query), deviation(key * factors[1], new_key)]
    return max(errors)


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
    limit = 1e-6 if isolated.dtype is torch.float64 else 1e-3
    worst, is_bounded = math.inf, False
    for alternatives in layouts:
        best, least = alternatives[0], math.inf
        for layout in alternatives:
            error = prove(isolated, run, layout)
            if error < least / 10:
                best, least = layout, error
        if least < limit:
            if prove(isolated, run, best, _LARGE) < limit:
                return best
            is_bounded = True
        worst = min(worst, least)
    if is_bounded:
        raise Unclear("its queries or keys are clamped: they do not follow when their weights grow")
    raise Unclear(f"the proof fails: with all heads scaled at once, something is off by {worst:.1e}")
