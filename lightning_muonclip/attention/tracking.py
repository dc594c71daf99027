"""What an attention module needs so that someone can be told its largest logits."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class MaxLogitsRecorder(Protocol):
    """Whoever wants to know a module's maxima: ``logits`` says how well, ``"exact"`` or ``"lse"``."""

    logits: str

    def record(self, maxima: Tensor, *, pair: tuple[Tensor, Tensor]) -> None:
        """Takes the maxima of one forward pass, shape ``(heads,)``, and the queries and keys that they are of."""


class Tracked(nn.Module):
    """A module that reports its maxima to ``recorder`` while it is trained; evaluation reports nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.recorder: MaxLogitsRecorder | None = None

    @property
    def track(self) -> str | None:
        """How the next forward has to measure its logits, if it has to."""
        return self.recorder.logits if self.training and self.recorder is not None else None

    def report(self, maxima: Tensor | None, query: Tensor, key: Tensor) -> None:
        """Passes on what a forward has measured, if it has."""
        if maxima is not None and self.recorder is not None:
            self.recorder.record(maxima, pair=(query, key))
