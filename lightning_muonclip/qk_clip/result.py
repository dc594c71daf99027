"""What a step of QK-Clip returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClipResult:
    """Maxima and clips of one step, as tensors on the device.

    Attributes:
        max_logits: Shape (layers, most heads), reduced over ranks; -inf where a layer has no such head or nothing was
            recorded, +inf where a logit was not finite.
        gamma: Same shape; 1 where nothing was clipped.
        owned: Shape (layers, 1); whether the run trains the layer. ``None`` if it trains all.
        bounds: Shape of ``max_logits``; at least the largest logit, and equal to ``max_logits`` where that is proven to be
            the largest. Heads are clipped by it. ``None`` if all are proven.
    """

    max_logits: Tensor
    gamma: Tensor
    owned: Tensor | None = None
    bounds: Tensor | None = None

    @property
    def max_logit(self) -> Tensor:
        """The largest finite logit of the attention that the run trains, a scalar; -inf if none was recorded."""
        return self._largest(self.owned)

    @property
    def unowned_max_logit(self) -> Tensor:
        """The largest finite logit of all other attention, such as a teacher's, a scalar; -inf if none was recorded."""
        return self._largest(None if self.owned is None else ~self.owned)

    def _largest(self, rows: Tensor | None) -> Tensor:
        hidden = self.max_logits.isposinf()
        if rows is not None:
            hidden = hidden | ~rows
        return _at_least_one(self.max_logits.masked_fill(hidden, float("-inf")), float("-inf")).max()

    @property
    def min_gamma(self) -> Tensor:
        """The strongest clip, a scalar."""
        return _at_least_one(self.gamma, 1.0).min()

    @property
    def clipped_heads(self) -> Tensor:
        """Number of heads clipped, a scalar."""
        return (self.gamma < 1).sum()

    @property
    def uncertified_heads(self) -> Tensor:
        """Number of heads whose largest logit is not proven to be the largest, a scalar; 0 on a CPU."""
        return self.uncertified.sum()

    @property
    def uncertified(self) -> Tensor:
        """Where the largest logit is not proven to be the largest, shape (layers, most heads)."""
        return self.max_logits < (self.max_logits if self.bounds is None else self.bounds)

    @property
    def nonfinite(self) -> Tensor:
        """Number of heads whose largest logit was not finite, a scalar."""
        return (self.max_logits if self.bounds is None else self.bounds).isposinf().sum()


def _at_least_one(table: Tensor, nothing: float) -> Tensor:
    """The numbers of a table, and one more that stands for none."""
    return torch.cat([table.flatten(), table.new_full((1,), nothing)])
