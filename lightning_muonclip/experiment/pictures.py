"""Plots the attention logits of a run, and compares the runs of a sweep."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.experimental.callback import Callback as HydraCallback
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from torch import Tensor

from lightning_muonclip.metrics import MaxLogits
from lightning_muonclip.optim.stats import FIGURES, summarized
from lightning_muonclip.trainer.callback import MuonClipCallback
from lightning_muonclip.trainer.images import log_figure
from lightning_muonclip.trainer.mixin import MaxLogitsMixin


class LogitPictures(Callback):
    """Records per-head maximum logits at every step and plots ``max_logits.png`` and ``heads.png`` when fitting ends.

    Loggers that take images (TensorBoard, W&B, MLflow) get both.

    Works for any LightningModule with MuonClipCallback, and without it for one with a
    :class:`~lightning_muonclip.MaxLogitsMixin`.
    Checkpoints include the history, so that the plots of a resumed run are complete.

    Args:
        dirpath: Folder of the plots.
    """

    def __init__(self, dirpath: str) -> None:
        self.dirpath = Path(dirpath)
        #: Names of the attention modules: the rows of the history.
        self.layers: list[str] = []
        #: One tensor of shape (layers, heads) per step.
        self.history: list[Tensor] = []
        #: Where a maximum is not proven to be one, likewise; booleans.
        self.uncertified: list[Tensor] = []
        self._last_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the step that training starts from."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Records the maxima of the last step."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        clip = _muonclip_callback(trainer)
        if clip is None and isinstance(pl_module, MaxLogitsMixin):
            names, maxima = pl_module.max_logits_layers, pl_module.max_logits
            uncertified = torch.zeros_like(maxima, dtype=torch.bool)
            if not names:
                return
            pl_module.log("max_logit", maxima.max(), prog_bar=True)
        elif clip is not None and clip.qk_clip is not None and clip.last is not None:
            names, maxima, uncertified = clip.qk_clip.layers, clip.last.max_logits, clip.last.uncertified
        else:
            return
        if self.layers != names:  # attention has been found, or is gone
            layers, self.layers = self.layers, list(names)
            self.history = [_arranged(x, layers, self.layers, maxima.shape, -math.inf) for x in self.history]
            self.uncertified = [_arranged(x, layers, self.layers, maxima.shape, False) for x in self.uncertified]
        self.history.append(maxima)
        self.uncertified.append(uncertified)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the plots."""
        if not self.history or not trainer.is_global_zero:
            return
        clip = _muonclip_callback(trainer)
        threshold = clip.qk_clip.threshold if clip is not None and clip.qk_clip is not None else None
        state = self.state_dict()
        _, layers, heads = state["history"].shape
        metric = MaxLogits(layers, heads, threshold)
        self.dirpath.mkdir(parents=True, exist_ok=True)
        trajectory, axes = metric.plot(state["history"])
        _mark(axes, state["history"], state["uncertified"])
        heat_map, _ = metric.plot(state["history"].amax(0))
        for name, figure in (("max_logits", trajectory), ("heads", heat_map)):
            figure.savefig(self.dirpath / f"{name}.png", dpi=150)
            log_figure(trainer, name, figure)

    def state_dict(self) -> dict[str, Any]:
        """The history, the same on every rank under MuonClipCallback."""
        if not self.history:
            return {}
        both = {"history": self.history, "uncertified": self.uncertified}
        return {"layers": self.layers} | {name: torch.stack([x.cpu() for x in own]) for name, own in both.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the history."""
        self.layers = list(state_dict.get("layers", ()))
        self.history = list(state_dict.get("history", ()))
        self.uncertified = list(
            state_dict.get("uncertified", [torch.zeros_like(x, dtype=torch.bool) for x in self.history])
        )


class StatPictures(Callback):
    """Plots what Muon's matrices did as ``muon.png`` when fitting ends, if MuonClipCallback logs it.

    Args:
        dirpath: Folder of the plot.
    """

    def __init__(self, dirpath: str) -> None:
        self.dirpath = Path(dirpath)
        #: The step, and the mean of each figure over the matrices.
        self.history: list[tuple[int, dict[str, float]]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Records what was logged."""
        self._record(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the plot."""
        self._record(trainer)  # MuonClipCallback may come after this one
        if len(self.history) > 1 and trainer.is_global_zero:
            self.dirpath.mkdir(parents=True, exist_ok=True)
            log_figure(trainer, "muon", draw_stats(self.history, self.dirpath / "muon.png"))

    def _record(self, trainer: pl.Trainer) -> None:
        clip = _muonclip_callback(trainer)
        if clip is not None and clip.last_stats and (not self.history or self.history[-1][0] < clip.last_stats_step):
            self.history.append((clip.last_stats_step, summarized(clip.last_stats)))

    def state_dict(self) -> dict[str, Any]:
        """The history."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the history."""
        self.history = list(state_dict["history"])


class CompareRuns(HydraCallback):
    """After a sweep (``muonclip-train -m ...``), plots the largest logit of every run in one figure."""

    def __init__(self) -> None:
        self.runs: list[tuple[list[str], Path]] = []

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        """Remembers the folder of the run."""
        self.runs.append((list(job_return.overrides), Path(job_return.hydra_cfg.hydra.runtime.output_dir)))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Saves ``max_logits.png`` in the folder of the sweep."""
        shared = set.intersection(*(set(overrides) for overrides, _ in self.runs)) if self.runs else set()
        curves = {}
        for overrides, path in self.runs:
            steps, values = read_curve(path / "metrics.csv")
            if steps:
                label = ", ".join(override for override in overrides if override not in shared)
                curves[label or path.name] = steps, values
        if curves:
            draw_curves(curves, Path(config.hydra.sweep.dir) / "max_logits.png")


def read_curve(path: Path) -> tuple[list[int], list[float]]:
    """Steps and largest logits of a run from its ``metrics.csv``; empty if it has none."""
    if not path.is_file():
        return [], []
    with path.open(newline="") as file:
        rows = [(row["step"], row.get("muonclip/max_logit") or row.get("max_logit")) for row in csv.DictReader(file)]
    points = [(int(step), float(value)) for step, value in rows if value]
    return [step for step, _ in points], [value for _, value in points]


def draw_curves(curves: dict[str, tuple[list[int], list[float]]], path: Path) -> None:
    """Plots one curve per run on a logarithmic scale and saves the figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, (steps, values) in curves.items():
        axes.plot(steps, values, lw=1.2, label=label)
    axes.set(xlabel="step", ylabel="max logit", yscale="log", title="Largest attention logit of the model")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _arranged(table: Tensor, before: list[str], after: list[str], shape: torch.Size, fill: float) -> Tensor:
    """The rows of a table at their places among other layers; what is new is filled."""
    new = table.new_full(shape, fill)
    for name, row in zip(before, table):
        if name in after:
            new[after.index(name), : len(row)] = row[: shape[1]]
    return new


def _mark(axes: Any, history: Tensor, uncertified: Tensor) -> None:
    """Marks the points that are not proven to be the maximum of their head; all are of shape (steps, layers, heads)."""
    step, layer, head = uncertified.nonzero(as_tuple=True)
    if len(step):
        axes.scatter(step, history[step, layer, head], marker="x", color="black", s=12, label="not proven")
        axes.legend(fontsize="small", ncols=2)


def draw_stats(history: Sequence[tuple[int, dict[str, float]]], path: Path) -> Any:
    """Plots one panel per figure, over the steps; returns what it has saved."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 2.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(FIGURES)), FIGURES):
        points = [(step, figures[name]) for step, figures in history if name in figures]
        axes.plot(*zip(*points) if points else ((), ()), lw=1.2)
        axes.set(xlabel="step", title=name.replace("_", " "))
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=150)
    return figure


def _muonclip_callback(trainer: pl.Trainer) -> MuonClipCallback | None:
    return next((c for c in trainer.callbacks if isinstance(c, MuonClipCallback)), None)  # type: ignore[attr-defined]
