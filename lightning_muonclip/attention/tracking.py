"""How attention modules report their maximum logits."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from lightning_muonclip.attention.masks import AttentionMask
from lightning_muonclip.kernels.measure import Logits, measure_max_logits


class MaxLogitsRecorder(Protocol):
    """Receives the maxima of a module, measured as ``logits`` says.

    It is the ``track`` of :func:`~lightning_muonclip.attention.core.attention`.
    """

    @property
    def logits(self) -> str | None:
        """How the current forward is measured."""

    def record(self, maxima: Tensor) -> None:
        """Receives the maxima of one forward, shape ``(heads,)`` or, with upper bounds, ``(2, heads)``."""


def measure(
    query: Tensor, key: Tensor, scale: float, mask: AttentionMask, track: str, bounds: Tensor | None = None
) -> Tensor:
    """Per-head maximum logits, for kernels that do not return them.

    ``bounds`` on the logits of every query have shape ``(batch, heads, length)``. For the result, see
    :func:`~lightning_muonclip.kernels.measure.measure_max_logits`.
    """
    batch, heads, length, _ = query.shape
    pairs = mask.tiles(length, query.device, batch=batch, heads=heads)
    return measure_max_logits(Logits(query, key, bounds, scale, **pairs), track)


class Tracked(nn.Module):
    """A module that reports its maxima to ``max_logits_recorder``, in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.max_logits_recorder: MaxLogitsRecorder | None = None

    @property
    def track(self) -> str | None:
        """How the next forward measures its logits; ``None`` if it does not."""
        return self.max_logits_recorder.logits if self.training and self.max_logits_recorder is not None else None

    def report(self, maxima: Tensor | None) -> None:
        """Passes measured maxima to the recorder."""
        if maxima is not None and self.max_logits_recorder is not None:
            self.max_logits_recorder.record(maxima)
