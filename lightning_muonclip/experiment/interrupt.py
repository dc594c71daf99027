"""Stops a run on Ctrl-C after the current step, with a checkpoint that resumes exactly there."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info


class StopOnInterrupt(Callback):
    """On the first Ctrl-C, finishes the step, saves ``interrupted.ckpt`` and stops; a second one stops at once.

    An interrupt in the middle of a step would leave some weights updated and others not.

    Args:
        dirpath: Folder of the checkpoint.
    """

    def __init__(self, dirpath: str) -> None:
        self.path = Path(dirpath) / "interrupted.ckpt"
        #: Whether Ctrl-C was pressed.
        self.interrupted = False
        self._last_step = 0
        self._previous: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Installs the SIGINT handler."""
        self.interrupted = False
        self._last_step = trainer.global_step
        self._previous = signal.signal(signal.SIGINT, self._on_interrupt)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves and stops after an interrupt on any rank; only between steps, since accumulated gradients are not saved."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        self.interrupted = trainer.strategy.reduce_boolean_decision(self.interrupted, all=False)
        if self.interrupted:
            trainer.save_checkpoint(self.path)
            rank_zero_info(f"Interrupted. To resume from here: ckpt_path={self.path}")
            trainer.should_stop = True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restores the SIGINT handler."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restores the SIGINT handler."""
        self._restore()

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        self.interrupted = True
        self._restore()

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
