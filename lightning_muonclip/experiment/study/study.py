"""A study: which runs it needs, and which of them it compares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lightning_muonclip.experiment.study.runs import Results, Run, rates_of, run_all


@dataclass(frozen=True)
class Configuration:
    """One of the things that a study compares.

    Attributes:
        overrides: Of ``muonclip-train``.
        rates: Learning rates to sweep, by key; every point of the grid is run.
    """

    overrides: tuple[str, ...] = ()
    rates: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """Several configurations, each at its own best learning rate, over seeds.

    Attributes:
        name: Of the study.
        question: What it asks; the heading of its report.
        configurations: By name. The first is what the others are compared with.
        seeds: The first sweeps the rates; the others run at the best, and are compared.
        significance: Of all comparisons of the study together.
    """

    name: str
    question: str
    configurations: Mapping[str, Configuration]
    seeds: Sequence[int]
    significance: float

    @property
    def reference(self) -> str:
        """The configuration that the others are compared with."""
        return next(iter(self.configurations))

    def run(self, results: Results, jobs: int | None = None) -> None:
        """Runs what is missing: every rate with the first seed, then the other seeds at the best rate."""
        first, *others = self.seeds
        sweep = [
            merged(*own.overrides, *rates, f"seed={first}")
            for own in self.configurations.values()
            for rates in rates_of(own.rates)
        ]
        run_all(sweep, results, jobs)
        best = {name: self.best(name, results) for name in self.configurations}
        run_all(
            [merged(*run.overrides, f"seed={seed}") for run in best.values() if run for seed in others], results, jobs
        )

    def sweep(self, name: str, results: Results) -> list[tuple[tuple[str, ...], Run]]:
        """The rates of a configuration that have run with the first seed, and their runs."""
        own = self.configurations[name]
        runs = (
            (rates, results.get(merged(*own.overrides, *rates, f"seed={self.seeds[0]}")))
            for rates in rates_of(own.rates)
        )
        return [(rates, run) for rates, run in runs if run is not None]

    def best(self, name: str, results: Results) -> Run | None:
        """The run of the sweep with the least loss; ``None`` if none has run."""
        return min((run for _, run in self.sweep(name, results)), key=lambda run: run.loss, default=None)

    def by_seed(self, name: str, results: Results) -> list[Run | None]:
        """For every seed but the first, which has chosen the rate, the run at the best rate, if it has run."""
        best, others = self.best(name, results), self.seeds[1:]
        if best is None:
            return [None] * len(others)
        return [results.get(merged(*best.overrides, f"seed={seed}")) for seed in others]

    def at_best(self, name: str, results: Results) -> list[Run]:
        """The runs at the best rate."""
        return [run for run in self.by_seed(name, results) if run is not None]

    def edges(self, name: str, results: Results) -> Iterator[str]:
        """The keys whose best rate is the smallest or the largest of its sweep, so that a better one may lie outside."""
        best = self.best(name, results)
        for key, values in self.configurations[name].rates.items():
            ends = {f"{key}={value:g}" for value in (min(values), max(values))}
            if best is not None and len(values) > 1 and ends & set(best.overrides):
                yield key


def merged(*overrides: str) -> list[str]:
    """Overrides of which a later one replaces an earlier one of the same key."""
    return list({override.partition("=")[0].lstrip("+"): override for override in overrides}.values())
