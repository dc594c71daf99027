"""The ledger of maxima: one row a layer, one column a head, all on the device, no host synchronisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Ledger:
    """Largest logit of every head since the last optimizer step.

    A plain object and not a module: a buffer would be saved in checkpoints and overwritten by DDP's broadcast.

    Args:
        heads: Number of heads of every layer.
        device: Where the rows are kept until the first record says otherwise.
    """

    def __init__(self, heads: Sequence[int], device: torch.device) -> None:
        self.heads = tuple(heads)
        #: Shape (layers, most heads); -inf where there is no such head or nothing was seen since the last step.
        self.values = torch.full(
            (len(self.heads), max(self.heads, default=0)), float("-inf"), dtype=torch.float32, device=device
        )
        #: The same for the last step made.
        self.last_step = self.values.clone()

    def record(self, row: int, maxima: Tensor, first: int = 0) -> None:
        """Raises a row to at least ``maxima``, which are of all heads, or of some from ``first`` on."""
        if maxima.device != self.values.device:
            self.values, self.last_step = self.values.to(maxima.device), self.last_step.to(maxima.device)
        seen = self.values[row, first : first + maxima.shape[0]]
        seen.copy_(torch.maximum(seen, maxima))

    def close_step(self) -> None:
        """Ends the step: what is recorded next belongs to the next one."""
        self.last_step = self.latest  # of an empty step nothing is kept, so ending a step twice does no harm
        self.values.fill_(float("-inf"))

    @property
    def latest(self) -> Tensor:
        """Maxima of the step under way, or, before its first forward, of the step before."""
        return torch.where((self.values == float("-inf")).all(), self.last_step, self.values)


def reduce_max(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The elementwise maximum over the ranks that see different data or heads: one collective for the whole model.

    NaN becomes +inf first, since the order of NaN in a reduction is undefined; both mean "non-finite" to QK-Clip.
    """
    values = torch.nan_to_num(values, nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
    if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return values
