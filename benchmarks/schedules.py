"""Trains the demo with each Newton-Schulz schedule at its own best learning rate of Muon, and compares loss and cost.

python benchmarks/schedules.py            # hours on one core; runs that are in the results are not repeated
python benchmarks/schedules.py --draw     # the table and the plot from existing results
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import RESULTS, machine

from lightning_muonclip.optim.coefficients import SCHEDULES, Schedule
from lightning_muonclip.optim.minimax import minimax_schedule
from lightning_muonclip.optim.restarts import cheapest_flops

#: A schedule affects the size of Muon's steps, so Muon's rate is tuned for it while AdamW keeps its own. With one rate for
#: both, the schedule whose best rate is closer to AdamW's would look better.
ADAMW_RATE = 0.02
RATES = (0.005, 0.01, 0.02, 0.04)
SEEDS = (0, 1, 2)
RESULT = RESULTS / "schedules.json"
PICTURE = Path(__file__).parents[1] / "docs" / "schedules.png"


def schatten4(steps: int, low: float) -> Schedule:
    """Our schedule with ``steps`` steps from the singular value ``low``."""
    return minimax_schedule(steps, low, norm="schatten4", safety=1.02, cushion=0.05)


CANDIDATES: dict[str, Schedule] = {
    "polar_express": SCHEDULES["polar_express"].first(None),
    "schatten4, 5 steps from 1e-3": schatten4(5, 1e-3),
    "schatten4, 4 steps from 4e-3": schatten4(4, 4e-3),
    "jordan": SCHEDULES["jordan"].first(None),
    "schatten4, 5 steps from 2e-3": schatten4(5, 2e-3),
    "cubic5": SCHEDULES["cubic5"].first(None),
    "schatten4, 4 steps from 1e-2": schatten4(4, 1e-2),
    "schatten4, 3 steps from 1e-2": schatten4(3, 1e-2),
    "you": SCHEDULES["you"].first(None),
}


def train(schedule: Schedule, rate: float, seed: int) -> float:
    """The validation loss, in nats per byte, at the end of ``experiment=demo``."""
    polynomials = [list(entry) for entry in schedule.polynomials]
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"muonclip.ns_coefficients={{polynomials:{polynomials},norm:{schedule.norm}}}".replace(" ", ""),
            f"optimizer.lr={ADAMW_RATE}",
            f"muonclip.lr={rate}",
            f"seed={seed}",
            "callbacks=none",
            "trainer.val_check_interval=400",
            "+trainer.enable_progress_bar=false",
            f"hydra.run.dir={folder}",
        ]
        command = [sys.executable, "-m", "lightning_muonclip.experiment.train", *overrides]
        subprocess.run(command, check=True, capture_output=True)
        with (Path(folder) / "metrics.csv").open() as file:
            losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    return losses[-1]


def run(results: dict[str, Any], names: list[str], rates: list[float], seeds: list[int]) -> None:
    """Runs what is missing: every rate for the first seed, then the other seeds at the best rate and its neighbors."""
    for seed in seeds:
        for rate in rates:
            for name in names:
                losses = results["losses"].setdefault(name, {}).setdefault(str(rate), {})
                if str(seed) in losses or (seed != seeds[0] and rate != best_rate(results["losses"][name])):
                    continue
                losses[str(seed)] = train(CANDIDATES[name], rate, seed)
                print(f"{name:32} lr {rate:<6} seed {seed}  {losses[str(seed)]:.4f}", flush=True)
                RESULT.write_text(json.dumps(results, indent=2) + "\n")


def best_rate(losses: dict[str, dict[str, float]]) -> float:
    """The rate with the least loss of the first seed."""
    return float(min((own for own in losses if losses[own]), key=lambda own: losses[own][str(SEEDS[0])]))


def cost(schedule: Schedule) -> float:
    """FLOPs of one step of the demo's hidden matrices (four 128 x 128 and two 512 x 128 a layer), by the cheapest form."""
    total = 0.0
    for count, (m, n) in ((4, (128, 128)), (2, (512, 128))):
        total += 4 * count * cheapest_flops(schedule, m, n, 2**-24, 0.5)
    return total


def draw(results: dict[str, Any]) -> None:
    """Prints the table and draws loss against FLOPs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    print("| schedule | best rate | validation loss, mean of seeds | range | MFLOPs per step |\n|---|---|---|---|---|")
    for name, by_rate in results["losses"].items():
        rates = sorted(float(rate) for rate in by_rate if by_rate[rate])
        left.plot(rates, [by_rate[str(rate)]["0"] for rate in rates], ".-", label=name)
        best = best_rate(by_rate)
        losses = list(by_rate[str(best)].values())
        mean, work = statistics.mean(losses), cost(CANDIDATES[name]) / 1e6
        right.errorbar(work, mean, [[mean - min(losses)], [max(losses) - mean]], fmt="o", capsize=3)
        right.annotate(name, (work, mean), xytext=(5, 4), textcoords="offset points", fontsize=8)
        print(f"| {name} | {best} | {mean:.4f} | {min(losses):.4f} to {max(losses):.4f} | {work:.0f} |")
    left.set(xscale="log", xlabel="learning rate of Muon", ylabel="validation loss (nats per byte)", title="first seed")
    left.legend(fontsize=7)
    right.set(xlabel="MFLOPs of Newton-Schulz a step", title="at the best rate, mean and range of seeds")
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--schedules", nargs="*", default=list(CANDIDATES))
    parser.add_argument("--rates", nargs="*", type=float, default=RATES)
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    given = parser.parse_args()
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {"machine": machine(), "losses": {}}
    if not given.draw:
        run(results, given.schedules, given.rates, given.seeds)
    draw(results)
