"""What MuonClipCallback logs of a step."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_muonclip.metrics import MaxLogits
from lightning_muonclip.optim.stats import Stats, summarized
from lightning_muonclip.qk_clip.clip import QKClip
from lightning_muonclip.qk_clip.result import ClipResult
from lightning_muonclip.trainer.images import log_figure, takes_images


class ClipLog:
    """Logs the results of QK-Clip in one fit, as metrics of the module."""

    def __init__(self) -> None:
        self._largest: dict[str, Tensor] = {}

    def log(self, pl_module: pl.LightningModule, result: ClipResult) -> None:
        """Logs the result of a step."""
        self._log_largest(pl_module, "muonclip/max_logit", result.max_logit, prog_bar=True)
        if result.owned is not None:
            self._log_largest(pl_module, "muonclip/unowned_max_logit", result.unowned_max_logit)
        pl_module.log("muonclip/clipped_heads", result.clipped_heads.float(), prog_bar=True)
        pl_module.log("muonclip/uncertified_heads", result.uncertified_heads.float())
        pl_module.log("muonclip/min_gamma", result.min_gamma)
        pl_module.log("muonclip/nonfinite", result.nonfinite.float())

    def _log_largest(self, pl_module: pl.LightningModule, name: str, value: Tensor, prog_bar: bool = False) -> None:
        """Logs a maximum; that of the last step, if none was recorded in this one."""
        before = self._largest.get(name, torch.full_like(value, float("nan")))
        self._largest[name] = torch.where(value.isneginf(), before, value)
        pl_module.log(name, self._largest[name], prog_bar=prog_bar)


def log_heads(trainer: pl.Trainer, qk_clip: QKClip, result: ClipResult) -> None:
    """Logs the largest logit of every head, as numbers and as a heat map; rank zero only, and waits for the device."""
    if not trainer.is_global_zero:
        return
    rows = zip(qk_clip.layers, qk_clip.observer.ledger.heads, result.max_logits.tolist())
    _log(
        trainer,
        {f"max_logits/{name}/{h}": row[h] for name, heads, row in rows for h in range(heads) if row[h] > -math.inf},
    )
    if takes_images(trainer):
        layers, most = result.max_logits.shape
        figure, _ = MaxLogits(layers, most, qk_clip.threshold).plot(result.max_logits)
        log_figure(trainer, "muonclip/heads", figure)


def log_stats(trainer: pl.Trainer, stats: Stats) -> None:
    """Logs the figures of every matrix, and the mean over the matrices of each figure."""
    values = {f"muon/{figure}": value for figure, value in summarized(stats).items()}
    for name, own in stats.items():
        values |= {f"muon/{figure}/{name}": value for figure, value in own.items() if not math.isnan(value)}
    _log(trainer, values)


def _log(trainer: pl.Trainer, values: dict[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step - 1)
