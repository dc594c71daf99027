"""The ledger of maximum logits: one row per layer, one column per head, on the device, without host synchronization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_muonclip.parallel.holders import has_others


class Ledger:
    """Maximum logit of every head since the last optimizer step, and an upper bound on it.

    Both are equal where the maximum is proven; a device that the host must not wait for may leave some unproven.

    A forward without gradients, such as the evaluation of averaged weights, counts for a layer only if none with gradients
    ran there. Not a module, since its buffers would be saved in checkpoints and overwritten by DDP's broadcast.

    Args:
        heads: Number of heads of each layer.
        device: Initial device of the rows; they follow the device of recorded maxima.
    """

    def __init__(self, heads: Sequence[int], device: torch.device) -> None:
        self.heads = tuple(heads)
        shape = (len(self.heads), max(self.heads, default=0))
        # With gradients and without; the maxima and the bounds.
        self._seen = torch.full((2, 2, *shape), float("-inf"), device=device)
        self._with_gradients, self._without = self._seen
        #: The maxima and bounds of the last completed step.
        self._last_step = torch.full((2, *shape), float("-inf"), device=device)

    @property
    def values(self) -> Tensor:
        """Shape (layers, max heads), float32; -inf where there is no such head or nothing was seen since the last step."""
        return self.bounded[0]

    def table_of(self, max_logits: Tensor | Sequence[Sequence[float]]) -> Tensor:
        """Numbers of the caller as :attr:`values`.

        Args:
            max_logits: One list of numbers per layer, or a tensor of shape (layers, heads).

        Raises:
            ValueError: If they are not one row per layer and one number per head.
        """
        table = torch.full_like(self.values, float("-inf"))
        rows = [torch.as_tensor(row, dtype=table.dtype, device=table.device) for row in max_logits]
        given = [tuple(row.shape) for row in rows]
        layers, widest = table.shape
        if given not in ([(heads,) for heads in self.heads], [(widest,)] * layers):
            raise ValueError(
                f"max_logits has rows of shapes {given}; give one row per layer, of {list(self.heads)} heads"
            )
        for target, heads, row in zip(table, self.heads, rows):
            target[:heads] = row[:heads]
        return table

    @property
    def bounded(self) -> Tensor:
        """The values and the upper bounds, shape (2, layers, max heads)."""
        is_untrained = (self._with_gradients == float("-inf")).all((0, 2), keepdim=True)
        return torch.where(is_untrained, self._without, self._with_gradients)

    def rearranged(self, heads: Sequence[int], rows: Sequence[int | None]) -> Ledger:
        """A ledger of other layers.

        Args:
            heads: Number of heads of each layer.
            rows: The row of each layer in this ledger; ``None`` for a new one.
        """
        new = Ledger(heads, self._without.device)
        for row, before in enumerate(rows):
            if before is not None:
                for target, source in zip(new._tables, self._tables):
                    target[..., row, : heads[row]] = source[..., before, : heads[row]]
        return new

    def record(self, row: int, maxima: Tensor, first: int = 0) -> None:
        """Updates a row.

        Args:
            row: The layer.
            maxima: Maxima of its heads, or of some of them: shape ``(heads,)`` or, with upper bounds, ``(2, heads)``.
            first: The first of these heads.
        """
        if maxima.device != self._without.device:
            self._seen, self._last_step = self._seen.to(maxima.device), self._last_step.to(maxima.device)
            self._with_gradients, self._without = self._seen
        table = self._with_gradients if torch.is_grad_enabled() else self._without
        seen = table[:, row, first : first + maxima.shape[-1]]
        seen.copy_(torch.maximum(seen, maxima))

    def forget(self, row: int, heads: Tensor) -> None:
        """Drops what was seen of some heads of one layer since the last step, by a mask of its heads."""
        for table in (self._with_gradients, self._without):
            table[:, row, : len(heads)].masked_fill_(heads, float("-inf"))

    def discard(self) -> None:
        """Drops what was seen since the last step."""
        self._seen.fill_(float("-inf"))

    def close_step(self) -> None:
        """Ends the step: later records belong to the next one."""
        self._last_step = self._latest  # an empty step keeps the previous values, so ending a step twice is harmless
        self.discard()

    @property
    def latest(self) -> Tensor:
        """Maxima of the current step or, before its first forward, of the last one."""
        return self._latest[0]

    @property
    def last_step(self) -> Tensor:
        """The values of the last completed step."""
        return self._last_step[0]

    @property
    def _latest(self) -> Tensor:
        bounded = self.bounded
        return torch.where((bounded == float("-inf")).all(), self._last_step, bounded)

    @property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._with_gradients, self._without, self._last_step


def reduce_max(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The elementwise maximum over the ranks that see different data or heads: one all-reduce for the whole model.

    NaN becomes +inf first, since reductions do not define the order of NaN; QK-Clip treats both as non-finite.
    """
    values = torch.nan_to_num(values, nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
    if has_others(group):
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return values
