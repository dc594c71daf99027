"""A progress bar of one line: steps, time left, and the figures of a MuonClip run."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

#: What is shown, by what is logged, as short as 80 columns need it.
_FIGURES = {
    "train/loss": "loss {:.2f}",
    "val/bits_per_byte": "bpb {:.2f}",
    "val/accuracy": "accuracy {:.2f}",
    "muonclip/max_logit": "S {:.1f}",
    "muonclip/clipped_heads": "clipped {:.0f}",
}


class OneLineProgress(ProgressBar):
    """Shows ``loss 1.60 · bpb 2.31 · S 29.5 · clipped 0`` beside the bar.

    ``bpb`` is bits per byte of the last validation (of a classifier, its ``accuracy``), ``S`` the largest attention logit.

    Args:
        seconds: At most this often are figures read, which waits for the device.
    """

    def __init__(self, seconds: float = 0.5) -> None:
        super().__init__()
        self.seconds = seconds
        self._enabled = True
        self._progress: Progress | None = None
        self._read = 0.0

    def disable(self) -> None:
        """Shows nothing."""
        self._enabled = False

    def enable(self) -> None:
        """Shows progress again."""
        self._enabled = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advances the bar; the first step, in which others print, is over when it appears."""
        if not self._enabled or not trainer.is_global_zero:
            return
        if self._progress is None:
            steps = trainer.estimated_stepping_batches
            total = int(steps) if steps != float("inf") else None
            columns = (
                MofNCompleteColumn(),
                BarColumn(None),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
            )
            self._progress = Progress(*columns, expand=True)
            self._progress.add_task("train", total=total, figures="")
            self._progress.start()
        (task,) = self._progress.tasks
        is_over = trainer.global_step == task.total
        if is_over or time.monotonic() - self._read >= self.seconds:
            self._progress.update(task.id, figures=figures(trainer))
            self._read = time.monotonic()
        self._progress.update(task.id, completed=trainer.global_step)
        if is_over:
            self._stop()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the bar, so that what follows stands below it."""
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Ends the bar."""
        self._stop()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints above the bar."""
        if self._progress is None:
            print(*args, **kwargs)
        else:
            self._progress.print(*args, **kwargs)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def figures(trainer: pl.Trainer) -> str:
    """The figures that have been logged, as one line."""
    logged = trainer.callback_metrics
    return " · ".join(form.format(float(logged[name])) for name, form in _FIGURES.items() if name in logged)
