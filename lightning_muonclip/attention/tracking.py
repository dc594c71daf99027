"""What an attention module needs so that someone can be told its largest logits."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class MaxLogitsRecorder(Protocol):
    """Whoever wants to know a module's maxima."""

    def record(self, maxima: Tensor) -> None:
        """Takes the maxima of one forward pass, shape ``(heads,)``."""


class Tracked(nn.Module):
    """A module that reports its maxima to ``recorder`` while it is trained; evaluation reports nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.recorder: MaxLogitsRecorder | None = None

    @property
    def is_tracked(self) -> bool:
        """Whether the next forward has to measure its logits."""
        return self.training and self.recorder is not None

    def report(self, maxima: Tensor | None) -> None:
        """Passes on what a forward has measured, if it has."""
        if maxima is not None and self.recorder is not None:
            self.recorder.record(maxima)
