"""What an attention module needs so that someone can be told its largest logits."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from lightning_muonclip.attention.masks import AttentionMask
from lightning_muonclip.kernels.max_logits import max_logits


class MaxLogitsRecorder(Protocol):
    """Whoever wants to know a module's maxima: ``logits`` says how well, ``"exact"`` or ``"lse"``."""

    logits: str

    def record(self, maxima: Tensor, *, pair: tuple[Tensor, Tensor]) -> None:
        """Takes the maxima of one forward pass, shape ``(heads,)``, and the queries and keys that they are of."""


def measure(query: Tensor, key: Tensor, scale: float, mask: AttentionMask) -> Tensor:
    """The largest logits of every head, shape ``(heads,)``, where the attention's kernel does not tell them."""
    batch, heads, length, _ = query.shape
    return max_logits(query, key, scale=scale, **mask.tiles(length, query.device, batch=batch, heads=heads))


class Tracked(nn.Module):
    """A module that reports its maxima to ``max_logits_recorder`` while it is trained; evaluation reports nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.max_logits_recorder: MaxLogitsRecorder | None = None

    @property
    def track(self) -> str | None:
        """How the next forward has to measure its logits, if it has to."""
        return self.max_logits_recorder.logits if self.training and self.max_logits_recorder is not None else None

    def report(self, maxima: Tensor | None, query: Tensor, key: Tensor) -> None:
        """Passes on what a forward has measured, if it has."""
        if maxima is not None and self.max_logits_recorder is not None:
            self.max_logits_recorder.record(maxima, pair=(query, key))
