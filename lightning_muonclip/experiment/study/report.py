"""The report of a study: a table, a picture, and a sentence for each comparison that its numbers support."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from scipy import stats

from lightning_muonclip.experiment.study.runs import Results, Run
from lightning_muonclip.experiment.study.study import Study

_COLUMNS = ("configuration", "best rate", "n", "loss", "difference", "interval", "p", "steps to", "largest logit")


def report(study: Study, results: Results, picture: str) -> str:
    """A section of Markdown, which refers to a picture by its file name."""
    compared = {name: Compared(study, results, name) for name in study.configurations}
    machines = {run.machine for own in compared.values() for run in own.runs}
    edges = (
        f"The best {key} of {name} is at the end of its sweep; a better one may lie outside."
        for name in study.configurations
        for key in study.edges(name, results)
    )
    return "\n".join(
        [
            f"## {study.question}",
            "",
            f"{rule(study)} Losses are in nats per token; differences are from {study.reference}, and so is the loss that"
            f" steps are counted to. Machine: {', '.join(sorted(machines))}.",
            "",
            "| " + " | ".join(_COLUMNS) + " |",
            "|" + "---|" * len(_COLUMNS),
            *("| " + " | ".join(own.row()) + " |" for own in compared.values()),
            "",
            *(f"- {sentence}" for sentence in (*(own.sentence() for own in list(compared.values())[1:]), *edges)),
            "",
            f"![{study.question}]({picture})",
        ]
    )


def rule(study: Study) -> str:
    """What decides, stated before anything runs."""
    count = len(study.configurations) - 1
    limit = f"p < {study.significance:g}" + (f" / {count} (Bonferroni)" if count > 1 else "")
    return (
        f"The rates of each configuration are swept with seed {study.seeds[0]}, and its best runs with seeds"
        f" {', '.join(map(str, study.seeds[1:]))}. A difference counts if the two-sided t-test, paired by seed, gives"
        f" {limit}; its interval leaves out zero then."
    )


class Compared:
    """A configuration at its best rate beside the reference at its own, seed by seed."""

    def __init__(self, study: Study, results: Results, name: str) -> None:
        self.study, self.name = study, name
        self.runs = study.at_best(name, results)
        both = zip(study.by_seed(name, results), study.by_seed(study.reference, results))
        self.pairs = [(own, other) for own, other in both if own is not None and other is not None]
        self.differences = [own.loss - other.loss for own, other in self.pairs]

    @property
    def limit(self) -> float:
        """Below which a p-value counts."""
        return self.study.significance / max(1, len(self.study.configurations) - 1)

    def row(self) -> list[str]:
        """The cells of its row."""
        if not self.runs:
            return [self.name, *["not run"] * (len(_COLUMNS) - 1)]
        swept = self.study.configurations[self.name].rates
        rates = [own for own in self.runs[0].overrides if own.partition("=")[0] in swept]
        low, high = interval(self.differences, self.limit)
        own = [
            self.name,
            ", ".join(rates),
            str(len(self.runs)),
            f"{statistics.mean(run.loss for run in self.runs):.4f}",
            f"{statistics.mean(self.differences):+.4f}" if self.differences else "",
            "" if math.isnan(low) else f"{low:+.4f} to {high:+.4f}",
            "" if math.isnan(p := p_value(self.differences)) else f"{p:.2g}",
            self._steps(),
            f"{max(run.max_logit for run in self.runs):.3g}",
        ]
        return [*own[:4], "", "", "", "", own[-1]] if self.name == self.study.reference else own

    def sentence(self) -> str:
        """What the numbers support."""
        reference = self.study.reference
        if self.differences and not any(self.differences):
            return f"{self.name} trains exactly as {reference}."
        p = p_value(self.differences)
        if math.isnan(p):
            return (
                f"{self.name} and {reference} cannot be compared: a run has diverged, fewer than two seeds have run, or all"
                " differ by the same."
            )
        mean = statistics.mean(self.differences)
        if p >= self.limit:
            return f"No difference between {self.name} and {reference} is shown ({mean:+.4f}, p = {p:.2g})."
        return f"{self.name} ends {abs(mean):.4f} nats {'below' if mean < 0 else 'above'} {reference} (p = {p:.2g})."

    def _steps(self) -> str:
        """After how many steps the loss of the reference is reached, on average."""
        steps = [_steps_to(other.loss, own) for own, other in self.pairs]
        return f"{statistics.mean(steps):.0f}" if steps and all(map(math.isfinite, steps)) else "never"


def _steps_to(loss: float, run: Run) -> float:
    """When a run reaches a loss, linear between two validations; infinite if it never does."""
    if run.curve and run.curve[0][1] <= loss:
        return run.curve[0][0]
    for (a, before), (b, after) in zip(run.curve, run.curve[1:]):
        if before > loss >= after:
            return a + (b - a) * (before - loss) / (before - after)
    return math.inf


def p_value(differences: Sequence[float]) -> float:
    """The two-sided t-test that the mean is zero; NaN for fewer than two values, or infinite or equal ones.

    Example:
        >>> round(p_value([0.1, 0.2, 0.3]), 4)
        0.0742
    """
    if len(differences) < 2 or not all(map(math.isfinite, differences)) or len(set(differences)) == 1:
        return math.nan
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def interval(values: Sequence[float], significance: float = 0.05) -> tuple[float, float]:
    """The interval of the mean by Student's t; NaN for fewer than two values, or infinite ones."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan, math.nan
    half = float(stats.t.ppf(1 - significance / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values) - half, statistics.mean(values) + half


def write_section(page: Path, name: str, text: str) -> None:
    """Puts the report of a study into a page, in place of an earlier one; the rest of the page stays."""
    start, end = f"<!-- study {name} -->", f"<!-- end of study {name} -->"
    section = f"{start}\n{text}\n{end}"
    before = page.read_text() if page.exists() else ""
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    page.parent.mkdir(parents=True, exist_ok=True)
    if pattern.search(before):
        page.write_text(pattern.sub(lambda _: section, before))
    else:
        page.write_text(f"{before.rstrip()}\n\n{section}\n".lstrip())


def draw(study: Study, results: Results, path: Path) -> None:
    """Loss against learning rate with the first seed, and the runs of all seeds at the best rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for number, (name, configuration) in enumerate(study.configurations.items()):
        runs = study.at_best(name, results)
        swept = max(configuration.rates, key=lambda key: len(configuration.rates[key]), default="")
        points: dict[float, float] = {}
        for rates, run in study.sweep(name, results):
            values = dict(rate.split("=") for rate in rates)
            rate = float(values.get(swept, "nan"))
            points[rate] = min(points.get(rate, math.inf), run.loss)  # at the best of other rates
        (line,) = left.plot(*zip(*sorted(points.items())), ".-", label=name) if points else left.plot([], label=name)
        right.plot([number] * len(runs), [run.loss for run in runs], "o", color=line.get_color(), alpha=0.7)
        left.set_xlabel(swept)
    left.set(xscale="log", ylabel="loss", title=f"seed {study.seeds[0]}")
    left.legend(fontsize="small")
    right.set_xticks(range(len(study.configurations)), list(study.configurations), rotation=30, ha="right")
    right.set(ylabel="loss", title="other seeds, best rate")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
