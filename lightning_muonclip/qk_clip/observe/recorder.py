"""Records the maximum logits of one attention module in the ledger of one observer."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_muonclip.parallel.heads import first_head
from lightning_muonclip.qk_clip.describe.spec import AttentionSpec, HeadAxis
from lightning_muonclip.qk_clip.describe.weights import query_weight
from lightning_muonclip.qk_clip.observe.ledger import Ledger


@runtime_checkable
class ReportsMaxLogits(Protocol):
    """An attention module that reports its own maxima through ``max_logits_recorder.record``."""

    max_logits_recorder: Any


class Recorder:
    """Writes the maxima of one attention module into its row of the ledger."""

    #: The ledger and its row, which change when other modules are found.
    ledger: Ledger
    row: int

    def __init__(self, name: str, module: nn.Module, spec: AttentionSpec, logits: str) -> None:
        self.name = name
        self.module = module
        self.spec = spec
        self.logits = logits
        #: Where the maxima come from; ``None`` until some are recorded.
        self.source: str | None = None
        #: Whether some were recorded with gradients since the last step.
        self.has_attended = False
        #: Whether the observer currently records.
        self.active = True
        #: The threshold above which heads are clipped by the maxima; ``None`` if they are only watched.
        self.threshold: float | None = None

    def record_all(self, maxima: Tensor, source: str) -> None:
        """Records the maxima of every leading index, of which :attr:`AttentionSpec.head_axes` count the heads.

        Args:
            maxima: Shape ``(1, *lead)`` or, with upper bounds, ``(2, *lead)``.
            source: Where they come from.
        """
        maxima = maxima if maxima.ndim > 1 else maxima[:, None]  # one head has no index of its own
        axes = self.spec.head_axes or (HeadAxis(1, maxima.shape[-1]),)  # of this rank
        shape, heads = [maxima.shape[0]], []
        for dim in range(1, maxima.ndim):
            size = maxima.shape[dim]
            own = [(count, is_inner) for axis, count, is_inner in axes if axis == maxima.ndim - dim]
            for count, is_inner in own:
                heads.append(len(shape) + is_inner)
                shape += (size // count, count) if is_inner else (count, size // count)
            if not own:
                shape.append(size)
        maxima = maxima.reshape(shape)
        others = [dim for dim in range(1, len(shape)) if dim not in heads]
        self.record(maxima.amax(others).flatten(1), source)

    def record(self, maxima: Tensor, source: str) -> None:
        """Records the maxima of one forward.

        Args:
            maxima: Shape ``(heads,)`` or, with upper bounds, ``(2, heads)``; under tensor parallelism, the heads of this
                rank.
            source: Where they come from.
        """
        heads, local = self.spec.num_heads, maxima.shape[-1]
        first: int | None = 0
        if local != heads:
            weight, dims = query_weight(self.module, self.spec)
            first = first_head(weight, dims, heads, local)
        if first is None:
            raise ValueError(
                f"attention {self.name!r} computed {local} heads, but its spec says {heads}; correct num_heads in the spec"
            )
        self.source = source
        if torch.is_grad_enabled():
            self.has_attended = True
        self.ledger.record(self.row, maxima, first)
