"""Accuracy and FLOPs of every Newton-Schulz schedule against the polar factor, by spectrum, dtype and form.

python benchmarks/accuracy.py                   # measures (minutes on one core) and prints the tables
python benchmarks/accuracy.py --docs            # writes tables and plots into docs/; measures if there are no results
python benchmarks/accuracy.py --docs --again    # measures in any case
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, machine
from spectra import METRICS, Reference, zoo

from lightning_muonclip import orthogonalize
from lightning_muonclip.optim.coefficients import DEFAULT_SCHEDULE, SCHEDULES, Schedule
from lightning_muonclip.optim.orthogonalize import METHODS
from lightning_muonclip.optim.restarts import best_restarts, flops

DOCS = Path(__file__).parents[1] / "docs"
RESULT = RESULTS / "accuracy.json"

SIZE = 192
RATIOS = (1, 4)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

SOURCES = {
    "jordan": "Keller Jordan (2024); torch.optim.Muon, Moonlight",
    "you": "You Jiacheng; dion, HeavyBall",
    "polar_express": "arXiv 2505.16932, safety 1.01",
    "polar_express_1.05": "the same, safety 1.05; Gram-Newton-Schulz, dmuon",
    "polar_express_1.02": "the same, safety 1.02; modded-nanogpt, dion",
    "cans": "arXiv 2506.10935; Emerging-Optimizers",
    "turbo": "arXiv 2512.04632; flash-newton-schulz, dion",
    "cubic5": "arXiv 2606.00371; Emerging-Optimizers",
    "deepseek_v4": "DeepSeek-V4",
    "schatten4": "ours",
    "muonclip": "ours, the default: schatten4, less steep in bfloat16",
}

#: A spectrum and the ratio of sides.
Case = tuple[str, int]

#: By case, schedule, dtype and method.
Results = dict[tuple[Case, str, str, str], dict[str, float]]


def all_steps(name: str) -> Schedule:
    """The named schedule with its default number of steps."""
    return SCHEDULES[name].first(None)


def measure() -> Results:
    """All metrics of all schedules; spectra with a fixed shape are measured once."""
    results = {}
    cases = {(name, ratio): x for ratio in RATIOS for name, x in zoo(SIZE, ratio).items()}
    for case, x in cases.items():
        if case[1] != RATIOS[0] and x.shape != (SIZE, case[1] * SIZE):
            continue
        reference = Reference(x)
        for name in SCHEDULES:
            exact = orthogonalize(x.double(), coefficients=name, method="direct", dtype=torch.float64)
            results[case, name, "exact", "direct"] = reference.metrics(exact)
            for dtype, working in DTYPES.items():
                for method in METHODS:
                    y = orthogonalize(x, coefficients=name, method=method, dtype=working)
                    results[case, name, dtype, method] = reference.metrics(y)
    return results


def save(results: Results) -> None:
    """Writes one row per line."""
    columns = ["spectrum", "ratio", "schedule", "dtype", "method", *METRICS]
    head = {"benchmark": "accuracy", "size": SIZE, "machine": machine(), "columns": columns}
    rows = [[*case, *key, *(round(row[metric], 6) for metric in METRICS)] for (case, *key), row in results.items()]
    lines = ",\n".join(json.dumps(row) for row in rows)
    RESULTS.mkdir(exist_ok=True)
    RESULT.write_text(f'{json.dumps(head, indent=2)[:-2]},\n  "rows": [\n{lines}\n]}}\n')


def load() -> Results:
    """Reads the file written by :func:`save`."""
    rows = json.loads(RESULT.read_text())["rows"]
    return {((row[0], row[1]), *row[2:5]): dict(zip(METRICS, row[5:])) for row in rows}


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def schedules_table(results: Results) -> str:
    """The schedules, and their images of normalized singular values."""
    rows = []
    for name in SCHEDULES:
        schedule = all_steps(name)
        slope = torch.tensor([entry[0] for entry in schedule.polynomials], dtype=torch.float64).prod()
        ranges = []
        for low in (-2, -3):
            images = schedule(torch.logspace(low, 0, 100_001, dtype=torch.float64))
            ranges.append(f"{images.min():.3f} to {images.max():.3f}")
        label = f"**{name}**" if name == DEFAULT_SCHEDULE else name
        rows.append([label, SOURCES[name], len(schedule.polynomials), schedule.norm, f"{slope:.0f}", *ranges])
    return table(["schedule", "source", "steps", "norm", "slope at 0", "from 1e-2", "from 1e-3"], rows)


def cosine_table(results: Results) -> str:
    """Cosines in exact arithmetic, by spectrum; bold where Jordan's is better."""
    rows = []
    for case in dict.fromkeys(case for case, *_ in results if case[1] == RATIOS[0]):
        cosines = [results[case, name, "exact", "direct"]["cosine"] for name in SCHEDULES]
        rows.append([case[0], *(f"**{own:.3f}**" if own < cosines[0] - 5e-4 else f"{own:.3f}" for own in cosines)])
    return table(["spectrum", *SCHEDULES], rows)


def worst_table(results: Results) -> str:
    """The worst over all spectra, by schedule and dtype."""
    rows = []
    for name in SCHEDULES:
        for dtype in DTYPES:
            direct, gram = (
                {case: row for (case, *key), row in results.items() if key == [name, dtype, method]}
                for method in ("direct", "gram")
            )
            jordan = {case: results[case, "jordan", dtype, "direct"]["cosine"] for case in direct}
            behind, (where, _) = min((row["cosine"] - jordan[case], case) for case, row in direct.items())
            least = min(row["smallest"] for row in direct.values())
            most = {metric: max(row[metric] for row in direct.values()) for metric in METRICS}
            rows.append(
                [
                    name,
                    dtype,
                    f"{-behind:.3f} ({where})" if behind < -5e-4 else "",
                    f"{least:.3f} to {most['largest']:.3f}",
                    f"{most['gap']:.3f}",
                    f"{most['drift']:.1g}",
                    f"{max(row['drift'] for row in gram.values()):.1g}",
                ]
            )
    head = ["schedule", "dtype", "cosine below Jordan's", "singular values", "gap", "drift, direct", "drift, Gram"]
    return table(head, rows)


def widths_table(results: Results) -> str:
    """The image of 1 % of the largest singular value of a large square Gaussian matrix, by the quarter-circle law."""
    sizes = (256, 1024, 4096, 16384)
    rows = []
    for name in SCHEDULES:
        schedule = all_steps(name)
        if schedule.norm == "aol":
            continue
        cells = []
        for n in sizes:
            size = n if schedule.norm == "frobenius" else (2 * n**3) ** 0.25
            value = torch.tensor(0.01 * 2 * n**0.5 / size, dtype=torch.float64)
            cells.append(f"{float(schedule(value)):.2f}")
        rows.append([name, *cells])
    return table(["schedule", *(f"n = {n}" for n in sizes)], rows)


def work(name: str, method: str, ratio: float, unit: float) -> float:
    """FLOPs over n cubed, with symmetric products at half price."""
    schedule = all_steps(name)
    steps = tuple(range(1, len(schedule.polynomials)))
    asked = {"direct": 0.0, "gram": 1e9, "auto": ratio}[method]
    restarts = best_restarts(schedule.polynomials, asked, unit, 0.5) if asked else steps
    return flops(schedule, restarts, 1000, round(1000 * ratio), 0.5) / 1000**3


def plain(ratio: float) -> float:
    """FLOPs over n cubed of Jordan's five steps, every product in full."""
    return flops(all_steps("jordan"), (1, 2, 3, 4), 1000, round(1000 * ratio), 1.0) / 1000**3


def flops_table(results: Results) -> str:
    """FLOPs by aspect ratio: the direct form, and the cheapest in float16 and in float32."""
    ratios = (1, 2, 4, 8)
    units = [torch.finfo(dtype).eps / 2 for dtype in (torch.float16, torch.float32)]
    rows = [["plain, five steps", *(f"{plain(ratio):.0f}" for ratio in ratios)]]
    for name in SCHEDULES:
        cells = []
        for ratio in ratios:
            ways = [work(name, "direct", ratio, units[0]), *(work(name, "auto", ratio, unit) for unit in units)]
            cells.append(" / ".join(f"{way:.0f}" for way in ways))
        rows.append([name, *cells])
    return table(["schedule", *(f"1:{ratio}" for ratio in ratios)], rows)


TABLES: dict[str, Callable[[Results], str]] = {
    "schedules": schedules_table,
    "cosines": cosine_table,
    "worst": worst_table,
    "widths": widths_table,
    "flops": flops_table,
}


def write_docs(results: Results) -> None:
    """Replaces the text between the markers of every table."""
    page = DOCS / "orthogonalization.md"
    text = page.read_text()
    for name, make in TABLES.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, rest = text.split(start)
        text = f"{before}{start}\n{make(results)}\n\n{end}{rest.split(end)[1]}"
    page.write_text(text)


def draw_singular_values(path: Path) -> None:
    """Singular values before and after, in the input's order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    rows = figure.subplots(2, 3, sharex="col", gridspec_kw={"height_ratios": [1, 2]})
    for (before, after), spectrum in zip(rows.T, ("Gaussian", "log-spaced 1..1e-3", "momentum, attention")):
        reference = Reference(zoo(SIZE)[spectrum])
        before.plot(reference.s / reference.s[0], color="black", lw=1.2)
        before.axhline(0.01, color="gray", lw=0.6, ls=":")
        before.set(yscale="log", ylim=(1e-5, 2), title=spectrum)
        for i, name in enumerate(SCHEDULES):
            y = orthogonalize(zoo(SIZE)[spectrum], coefficients=name, method="direct", dtype=torch.float32).double()
            kept = (reference.u.mT @ y @ reference.vh.mT).diagonal()
            after.plot(kept, lw=2 if name in ("schatten4", "jordan") else 1, color=f"C{i}", label=name)
        for level in (0.7, 1.3):
            after.axhline(level, color="gray", lw=0.6, ls=":")
        after.set(ylim=(0, 1.4), xlabel="index of the singular value")
    rows[0, 0].set_ylabel("before, over the largest")
    rows[1, 0].set_ylabel("after")
    rows[1, 0].legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=110)


def draw_flops(path: Path) -> None:
    """FLOPs against aspect ratio, by schedule and form."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    ratios = torch.linspace(1, 8, 141).tolist()
    labels = {"schatten4": "five quintic steps", "turbo": "turbo", "cubic5": "cubic5", "deepseek_v4": "deepseek_v4"}
    for axes, dtype in zip(figure.subplots(1, 2, sharey=True), (torch.float16, torch.float32)):
        unit = torch.finfo(dtype).eps / 2
        axes.plot(ratios, [plain(ratio) for ratio in ratios], color="black", lw=1.2, label="plain, five steps")
        for i, (name, label) in enumerate(labels.items()):
            for method, style in (("direct", ":"), ("gram", "--"), ("auto", "-")):
                costs, width = [work(name, method, ratio, unit) for ratio in ratios], 1.8 if method == "auto" else 0.9
                axes.plot(ratios, costs, style, color=f"C{i}", lw=width, label=f"{label}, {method}")
        axes.set(xlabel="larger over smaller side", title=str(dtype).removeprefix("torch."), ylim=(0, 180))
    figure.axes[0].set_ylabel("FLOPs over n³")
    figure.axes[0].legend(fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--again", action="store_true", help="measure although --docs has results")
    given: Any = parser.parse_args()
    if given.again or not given.docs or not RESULT.exists():
        save(measure())
    found = load()
    for title, make_table in TABLES.items():
        print(f"\n{title}\n\n{make_table(found)}")
    if given.docs:
        write_docs(found)
        draw_singular_values(DOCS / "singular_values.png")
        draw_flops(DOCS / "flops.png")
