"""Plots loss against learning rate, one curve per width, to see whether the best rate transfers between widths."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.experimental.callback import Callback as HydraCallback
from omegaconf import DictConfig


class Run(NamedTuple):
    """The settings of one run of the sweep, and its final loss."""

    optimizer: str
    parametrization: str
    width: int
    lr: float
    loss: float


class LearningRateTransfer(HydraCallback):
    """Writes ``transfer.csv`` and ``transfer.png`` into the folder of a sweep (``experiment=mu_transfer``)."""

    def __init__(self) -> None:
        self.runs: list[Run] = []

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        """Adds a run and updates both files, so that an interrupted sweep keeps its results."""
        optimizer = "AdamW" if config.muonclip is None else "MuonClip"
        parametrization = "standard" if config.base_hidden_size is None else "muP"
        loss = float(job_return.return_value)
        self.runs.append(Run(optimizer, parametrization, config.model.hidden_size, config.optimizer.lr, loss))
        folder = Path(config.hydra.sweep.dir)
        with (folder / "transfer.csv").open("w", newline="") as file:
            csv.writer(file).writerows([Run._fields, *self.runs])
        draw_transfer(self.runs, folder / "transfer.png")


def draw_transfer(runs: Sequence[Run], path: Path) -> None:
    """Plots a column per optimizer, a row per parametrization and a curve per width, with its best run marked."""
    from matplotlib.figure import Figure

    rows, columns = sorted({run.parametrization for run in runs}), sorted({run.optimizer for run in runs}, reverse=True)
    figure = Figure(figsize=(4.5 * len(columns), 3.5 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), sharex="col", sharey=True, squeeze=False)
    for parametrization, own_row in zip(rows, grid):
        for optimizer, axes in zip(columns, own_row):
            curves: dict[int, list[tuple[float, float]]] = defaultdict(list)
            for run in runs:
                if (run.optimizer, run.parametrization) == (optimizer, parametrization) and math.isfinite(run.loss):
                    curves[run.width].append((run.lr, run.loss))
            for width, points in sorted(curves.items()):
                (line,) = axes.plot(*zip(*sorted(points)), marker=".", lw=1.2, label=str(width))
                axes.plot(*min(points, key=lambda point: point[1]), marker="*", ms=11, color=line.get_color())
            axes.set(xscale="log", xlabel="learning rate", ylabel="loss", title=f"{optimizer}, {parametrization}")
            if curves:
                axes.legend(title="width", fontsize="small")
    figure.savefig(path, dpi=150)
