"""Whether clips have an effect: weights that shrink must lower logits, and must not grow back at once.

Everything stays on the device. What is found is said a step later, when the host need not wait for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_muonclip.parallel.shards import local_box, to_local
from lightning_muonclip.qk_clip.describe.layout import NO_HEAD, QUERY_KINDS, spread
from lightning_muonclip.qk_clip.observe.ledger import LateFlag
from lightning_muonclip.qk_clip.plan import ClipPlan, Scaled

#: A clip is of no use if queries times keys have shrunk by so much while the largest logit has fallen by less than that.
_SHRUNK, _FELL = 0.5, 0.9

#: After so many clips in a row, a head starts anew: weights that updates keep at their size never shrink within.
_WINDOW = 32

#: A clip by so much is undone if all norms are back at what they were, up to that, twice.
_STRONG, _SAME, _TWICE = 0.64, 0.05, 2


class Effect:
    """Follows the norms of the rows that a plan scales, from step to step.

    Under sharding each rank sees its rows; what :meth:`measure` returns is then reduced by its maximum over the ranks.

    Args:
        plan: What a clip scales.
        stopped: Heads that an earlier run has stopped to clip.

    Attributes:
        stopped: Heads that are no longer clipped, shape (layers, heads).
    """

    def __init__(self, plan: ClipPlan, stopped: Tensor) -> None:
        self._scaled = plan.scaled
        self._norms = self._reference = self._measured_norms()
        device, shape = self._norms.device, (len(stopped), stopped.shape[1])
        self.stopped = stopped.to(device)
        self._tied, self._key_heads = plan.tied.to(device), plan.key_heads.to(device)
        self._index = torch.cat([_index(own, shape) for own in plan.scaled]).to(device)
        self._gamma = torch.ones(shape, device=device)
        self._start = torch.zeros(shape, device=device)
        self._run = torch.zeros(shape, dtype=torch.int64, device=device)
        self._undone = torch.zeros(shape, dtype=torch.int64, device=device)
        self._news = LateFlag()
        self._told: set[tuple[str, int]] = set()

    def measure(self) -> Tensor:
        """What clips have changed for every head, before the next: shape (3, layers, heads).

        How its queries and how its keys have grown in this run of clips, and how far both are from what they were before
        the last clip.
        """
        norms = self._measured_norms()
        grown = self._of_heads(_ratio(norms, self._reference))
        away = self._of_heads((_ratio(norms, self._norms) - 1).abs()).amax(0, keepdim=True)
        self._norms = norms
        return torch.cat([grown, away])

    def judge(self, measured: Tensor, max_logits: Tensor, gamma: Tensor) -> Tensor:
        """The gammas without those of no use.

        Args:
            measured: What :meth:`measure` has returned.
            max_logits: The largest logit of every head.
            gamma: What it asks for.
        """
        queries, keys, away = measured.masked_fill(measured == float("-inf"), 1.0)
        has_shrunk = queries * keys <= _SHRUNK
        useless = (gamma < 1) & (self._run > 0) & has_shrunk & (max_logits >= _FELL * self._start) & ~self.stopped
        is_back = (self._gamma <= _STRONG) & (away <= _SAME)
        self._undone = torch.where(self._gamma <= _STRONG, (self._undone + 1) * is_back, self._undone)
        self.stopped = self.stopped | useless
        self._news.write((useless | (self._undone == _TWICE)).any().float())
        gamma = gamma.masked_fill(self.stopped, 1.0)
        starts = (gamma < 1) & ((self._run == 0) | (self._run >= _WINDOW))
        self._run = torch.where(gamma < 1, torch.where(starts, 1, self._run + 1), 0)
        self._start = torch.where(starts, max_logits, self._start)
        anew = torch.cat([starts.flatten(), starts.flatten(), starts.new_zeros(1)])[self._index]
        self._reference = torch.where(anew, self._norms, self._reference)
        self._gamma = gamma
        return gamma

    def tell(self, layers: Sequence[str]) -> None:
        """Warns of what the last step has found, once for every layer."""
        if not self._news.read():
            return
        for what, heads in ((_USELESS, self.stopped), (_UNDONE, self._undone >= _TWICE)):
            rows = [row for row in range(len(layers)) if (what, row) not in self._told and heads[row].any()]
            self._told |= {(what, row) for row in rows}
            for row in rows:
                own = ", ".join(map(str, heads[row].nonzero().flatten().tolist()))
                warnings.warn(what.format(layer=layers[row] or "(model)", heads=own), stacklevel=5)

    def _measured_norms(self) -> Tensor:
        norms = []
        for own in self._scaled:
            weight = to_local(own.module.get_parameter(own.weight.path)).detach() + own.weight.offset
            others = [dim for dim in range(weight.ndim) if dim not in own.weight.dims]
            norms.append((torch.linalg.vector_norm(weight, dim=others) if others else weight.abs()).flatten().float())
        return torch.cat(norms)

    def _of_heads(self, values: Tensor) -> Tensor:
        """The largest value of every side of every head, shape (2, layers, heads); -inf if it has no weights of its own."""
        table = values.new_full((2 * self.stopped.numel() + 1,), float("-inf"))
        queries, keys = table.scatter_reduce(0, self._index, values, "amax")[:-1].view(2, *self.stopped.shape)
        return torch.stack([queries, keys.gather(1, self._key_heads)])[:, self._tied]


_USELESS = (
    "QK-Clip no longer clips attention {layer!r}, head {heads}: its clips have halved the query and key weights, but not"
    " lowered the largest logit. Something behind the weights undoes the scaling, such as a norm or a clamp; describe the"
    " attention with specs={{{layer!r}: AttentionSpec(...)}}, or leave it alone with specs={{{layer!r}: None}}"
)
_UNDONE = (
    "the clips of attention {layer!r}, head {heads}, are undone by the next step: the optimizer keeps a copy of the weights,"
    " as float32 masters, Lookahead and schedule-free optimizers do. Use an optimizer that steps the weights themselves"
)


def _index(own: Scaled, shape: tuple[int, int]) -> Tensor:
    """For every local channel of a weight, its side and head in a flat table; the last entry for channels of no one head."""
    layers, heads = shape
    channels = own.weight.channels
    side = (~channels.of_kind(QUERY_KINDS)).long()
    index = (side * layers + own.row) * heads + channels.heads
    index = index.masked_fill((channels.heads == NO_HEAD) | channels.of_kind(("*",)), 2 * layers * heads)
    param = own.module.get_parameter(own.weight.path)
    index = spread(index, own.weight.dims, param)
    if isinstance(param, DTensor):
        index = index[tuple(b if dim in own.weight.dims else slice(None) for dim, b in enumerate(local_box(param)))]
    return index.flatten()


def _ratio(now: Tensor, before: Tensor) -> Tensor:
    return torch.where(before > 0, now / before, 1.0)
