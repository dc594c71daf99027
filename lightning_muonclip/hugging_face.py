"""What Hugging Face's Trainer needs beside a MuonClip: a callback that logs what QK-Clip saw and did."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lightning_muonclip.muonclip import MuonClip


class MuonClipLogger(TrainerCallback):
    """Adds the figures of QK-Clip to what a ``transformers.Trainer`` logs, over all steps since it last logged.

    ``muonclip/max_logit`` is the largest attention logit, ``muonclip/min_gamma`` the strongest clip;
    ``muonclip/clipped_heads`` and ``muonclip/nonfinite`` count heads that were clipped, or had a logit that was not finite,
    per step. They are in ``trainer.state.log_history`` and in whatever logs after this callback. A Trainer appends callbacks
    to its own reporters; for TensorBoard and the like, put it before them:
    ``trainer.callback_handler.callbacks.insert(0, MuonClipLogger())``.

    Raises:
        TypeError: At the first step, if the Trainer's optimizer is no :class:`~lightning_muonclip.MuonClip`.

    Example::

        optimizer = MuonClip(model, lr=3e-4)
        trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, None), callbacks=[MuonClipLogger()])
    """

    def __init__(self) -> None:
        self._figures: Tensor | None = None
        self._steps = 0

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keeps the figures of a step on the device."""
        optimizer = kwargs["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if not isinstance(optimizer, MuonClip):
            raise TypeError(
                f"MuonClipLogger needs a MuonClip, but the Trainer steps {type(optimizer).__name__}; pass"
                " optimizers=(MuonClip(model, lr=...), None) to the Trainer"
            )
        if optimizer.last is not None:
            own = optimizer.last
            figures = torch.stack([own.max_logit, -own.min_gamma, own.clipped_heads.float(), own.nonfinite.float()])
            if self._figures is not None:
                figures[:2] = torch.maximum(figures[:2], self._figures[:2])
                figures[2:] += self._figures[2:]
            self._figures, self._steps = figures, self._steps + 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the figures to a log of training."""
        if logs is None or "loss" not in logs or self._figures is None:
            return
        largest, least, clipped, nonfinite = self._figures.tolist()
        values = {"max_logit": largest, "min_gamma": -least}
        values |= {"clipped_heads": clipped / self._steps, "nonfinite": nonfinite / self._steps}
        self._figures, self._steps = None, 0
        own = {f"muonclip/{name}": value for name, value in values.items()}
        logs.update(own)
        state.log_history[-1].update(own)
