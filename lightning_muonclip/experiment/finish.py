"""Ends a run with a validation, whatever the validation interval."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class ValidateAtEnd(Callback):
    """Validates after the last batch, so that a run that is shorter than the validation interval is validated and saved."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Asks the Trainer to stop after the last batch; it validates before it stops."""
        is_last_step = 0 < trainer.max_steps <= trainer.global_step
        is_last_epoch = trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch + 1
        if is_last_step or (is_last_epoch and trainer.is_last_batch):
            trainer.should_stop = True
