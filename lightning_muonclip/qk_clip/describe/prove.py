"""Proves a layout by one trial: every head gets a factor of its own, and nothing but queries and keys may follow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_muonclip.qk_clip.describe.infer import Layout, Unclear, spread
from lightning_muonclip.qk_clip.describe.isolate import Isolated, Run
from lightning_muonclip.qk_clip.describe.layout import KINDS


class Trial:
    """A factor of its own for every head of an attention, and what queries and keys do then.

    Args:
        layout: The heads and their channels.
        seed: Draws the factors.
        powers: Powers of two, which are exact in floating point.
    """

    def __init__(self, layout: Layout, seed: int, *, powers: bool = False) -> None:
        self.layout = layout
        generator = torch.Generator().manual_seed(seed)

        def draw(count: int) -> Tensor:
            drawn = 4 * torch.rand(count, generator=generator, dtype=torch.float64) - 2
            return torch.exp2(drawn.round() if powers else drawn / 2)

        heads, groups = layout.num_heads, layout.num_key_value_heads
        self._factors = {"q": draw(heads), "k": draw(groups), "qr": draw(heads)}
        if any((table.heads[table.scaled] < 0).any() for _, table in layout.tables):
            self._factors = {
                kind: own[:1].expand(len(own)) for kind, own in self._factors.items()
            }  # shared by all heads
        self._factors |= {"qn": self._factors["q"], "kn": self._factors["k"]}
        self._made = {KINDS[kind] for _, table in layout.tables for kind in table.kinds.unique().tolist()}

    def factors(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What multiplies each parameter."""
        factors: dict[str, Tensor] = {}
        for name, table in self.layout.tables:
            own = torch.ones(table.kinds.shape, dtype=torch.float64)
            for kind, values in self._factors.items():
                chosen = table.kinds == KINDS.index(kind)
                own[chosen] = values[table.heads[chosen].clamp_min(0)]
            own = spread(own, table.dims, params[name])
            factors[name] = factors[name] * own if name in factors else own
        return factors

    def expected(self, side: str, number: int) -> Tensor:
        """What multiplies the queries ("q") or keys ("k") of one pair, in the order of the layout's units."""
        units = (self.layout.query_units if side == "q" else self.layout.key_units)[number]
        kinds = self._made & ({"q", "qn"} if side == "q" else {"k", "kn"})
        factor = self._factors[side][units] if kinds else torch.ones(units.shape, dtype=torch.float64)
        factor = factor[..., None, None]
        if self.layout.own_channels is not None:
            rest = self._factors["qr"][units][..., None, None] if side == "q" else torch.ones_like(factor)
            factor = torch.where(self.layout.own_channels, factor, rest)
        return factor


def prove(isolated: Isolated, run: Run, layout: Layout) -> float:
    """The largest relative deviation from what should follow, over queries, keys, values and everything else.

    Args:
        isolated: The module.
        run: A forward of it.
        layout: What is to be proven.
    """
    trial = Trial(layout, seed=3)
    offsets = {name: table.offset for name, table in layout.tables}
    after = isolated.scaled(trial.factors(isolated.params), run.products, offsets)
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
                factors = trial.expected("q", number), trial.expected("k", number)
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
    size = expected[expected.isfinite()].abs().max().clamp_min(1e-30)
    return float(((expected - found)[differs] / size).abs().nan_to_num(nan=math.inf).max())


def proven(isolated: Isolated, run: Run, layouts: Iterable[Sequence[Layout]]) -> Layout:
    """The first of several layouts that passes; of alternatives, the one that errs much less than the one before.

    Raises:
        Unclear: If none does.
    """
    limit = 1e-6 if isolated.dtype is torch.float64 else 1e-3
    worst = math.inf
    for alternatives in layouts:
        best, least = alternatives[0], math.inf
        for layout in alternatives:
            error = prove(isolated, run, layout)
            if error < least / 10:
                best, least = layout, error
        if least < limit:
            return best
        worst = min(worst, least)
    raise Unclear(f"the proof fails: with all heads scaled at once, something is off by {worst:.1e}")
