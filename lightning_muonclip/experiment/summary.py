"""Prints a table at the end of a run: loss, logits, throughput, and the time of Muon and QK-Clip."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_muonclip.experiment.pictures import LogitPictures
from lightning_muonclip.trainer.callback import MuonClipCallback

#: The library's spans for torch.profiler, and their labels in the table.
_SPANS = {
    "muonclip::muon": "Muon",
    "muonclip::qk_clip": "QK-Clip",
    "muonclip::max_logits": "tracking",
    "muonclip::bounded_max_logits": "tracking",
}


class RunSummary(Callback):
    """Prints validation bits per byte or accuracy, peak logit, head-clips, throughput, and the time of Muon and QK-Clip.

    Times come from :mod:`torch.profiler`, over a few batches after warm-up.

    Args:
        profile_from: Number of batches before profiling starts.
        profile_batches: Number of profiled batches.
    """

    def __init__(self, profile_from: int = 20, profile_batches: int = 10) -> None:
        self.profile_from = profile_from
        self.profile_batches = profile_batches
        self._batches = 0
        self._items = 0
        self._unit = "samples"
        self._seconds = 0.0
        self._started = 0.0
        self._profiler: torch.profiler.profile | None = None
        self._profiled: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Resets the counters."""
        self._batches, self._items, self._seconds, self._profiled = 0, 0, 0.0, {}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts the clock and, at ``profile_from``, the profiler."""
        if self._batches == self.profile_from:
            # The profiler slows down the host, so profiled batches do not count towards throughput.
            self._profiler = torch.profiler.profile(acc_events=True)
            self._profiler.start()
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops the clock and the profiler."""
        self._batches += 1
        if self._profiler is None:
            self._seconds += time.perf_counter() - self._started
            self._unit, count = counted(batch)
            self._items += count * trainer.world_size
        elif self._batches == self.profile_from + self.profile_batches:
            self._read_profile(pl_module.device)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the table."""
        self._stop_profiler()
        self._print(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stops the profiler."""
        self._stop_profiler()

    def _stop_profiler(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _read_profile(self, device: torch.device) -> None:
        assert self._profiler is not None
        self._profiler.stop()
        for event in self._profiler.key_averages():
            if event.key in _SPANS:
                microseconds = event.cpu_time_total if device.type == "cpu" else event.device_time_total
                name = _SPANS[event.key]
                own = microseconds / 1e3 / self.profile_batches
                self._profiled[name] = self._profiled.get(name, 0.0) + own
        self._profiler = None

    @rank_zero_only
    def _print(self, trainer: pl.Trainer) -> None:
        table = Table(title="MuonClip run", show_header=False, title_justify="left")
        for label, value in self.rows(trainer):
            table.add_row(label, value)
        Console().print(table)

    def rows(self, trainer: pl.Trainer) -> list[tuple[str, str]]:
        """The rows of the table, as text."""
        rows = []
        if "val/bits_per_byte" in trainer.callback_metrics:
            rows.append(("validation bits per byte", f"{float(trainer.callback_metrics['val/bits_per_byte']):.4f}"))
        if "val/accuracy" in trainer.callback_metrics:
            rows.append(("validation accuracy", f"{float(trainer.callback_metrics['val/accuracy']):.4f}"))
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LogitPictures) and callback.history:
                rows.append(("peak max logit", f"{float(torch.stack(callback.history).max()):.2f}"))
            if isinstance(callback, MuonClipCallback) and callback.qk_clip is not None:
                rows.append(("head-clips", f"{int(callback.qk_clip.clips.sum())}"))
            if isinstance(callback, MuonClipCallback) and callback.muon is not None:
                names = sorted(str(dtype).removeprefix("torch.") for dtype in callback.muon.working_dtypes())
                rows.append(("Muon works in", ", ".join(names)))
        if self._seconds:
            timed = self._batches - (self.profile_batches if self._profiled else 0)
            per_batch = self._seconds / timed * 1e3
            rows.append((f"{self._unit} per second", f"{self._items / self._seconds:,.0f}"))
            for name in dict.fromkeys(_SPANS.values()):
                if name in self._profiled:
                    milliseconds = self._profiled[name]
                    rows.append(
                        (f"time in {name}", f"{milliseconds:.2f} ms per batch ({milliseconds / per_batch:.1%})")
                    )
        return rows


def counted(batch: Any) -> tuple[str, int]:
    """What a batch has, and how many of them: tokens where its first tensor is a table of integers, else samples.

    Example:
        >>> counted((torch.zeros(4, 16, dtype=torch.long), torch.zeros(4, 16, dtype=torch.long)))
        ('tokens', 64)
        >>> counted({"images": torch.zeros(4, 1, 8, 8)})
        ('samples', 4)
    """
    first = next(_tensors(batch), None)
    if first is None or first.ndim == 0:
        return "batches", 1
    is_table = first.ndim == 2 and not first.is_floating_point()
    return ("tokens", first.numel()) if is_table else ("samples", len(first))


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (list, tuple, Mapping)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)
