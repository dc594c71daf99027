"""Whether clips have an effect: weights that shrink must lower logits, and must not grow back at once.

The device measures; the host decides, a step later, when it need not wait for the numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_muonclip.parallel.shards import local_box, to_local
from lightning_muonclip.qk_clip.describe.layout import KEY_KINDS, KINDS, NO_HEAD, QUERY_KINDS
from lightning_muonclip.qk_clip.observe.deferred_read import DeferredRead
from lightning_muonclip.qk_clip.plan import ClipPlan, Scaled

#: Clips in a row are of no use if queries times keys have shrunk by so much while the largest logit has fallen by less than
#: that, and if at least half of what was clipped, in logarithms, is still gone. Clips that hold the logits against updates
#: multiply to almost nothing, while the updates keep the weights near their size.
_SHRUNK, _FELL, _KEPT = 0.5, 0.9, 0.5

#: A batch of larger logits may look like it once, unless clips have multiplied to less than logits vary.
_STRONGEST = 0.1

#: A clip by so much is undone if the norms are back at what they were, up to that, twice.
_STRONG, _SAME, _TWICE = 0.64, 0.05, 2

#: How many numbers of a head are remembered.
REMEMBERED = 8


class Effect:
    """Follows the norms of what a plan scales, from step to step, by some channels of every head.

    Under sharding each rank measures its own; the maximum over the ranks is what counts.

    Args:
        plan: What a clip scales.
        layers: The names of the layers.
        memory: What an earlier one remembers; zeros if there was none.

    Attributes:
        stopped: Heads that are no longer clipped, shape (layers, heads).
    """

    def __init__(self, plan: ClipPlan, layers: Sequence[str], memory: Tensor) -> None:
        self._scaled = [own for own in plan.scaled if not own.weight.offset]
        self._tied, self._key_heads = plan.tied.numpy(), plan.key_heads.numpy()
        self._layers = [name or "(model)" for name in layers]
        self._last = DeferredRead()
        self._told: set[tuple[str, int]] = set()
        # What the host knows of every head: whether it is no longer clipped; the norms and the gamma of the last step; the
        # norms and the largest logit at the first of the present row of clips, and their product, 0 if there are none; how
        # often one was undone, and whether the last one looked useless.
        (
            stopped,
            self._norms,
            self._gamma,
            self._first_norms,
            self._first_logits,
            self._product,
            self._undone,
            self._suspected,
        ) = memory.numpy()
        self.stopped = torch.from_numpy(stopped > 0).to(plan.params[0].device)
        self._follow(self._weights())

    @property
    def memory(self) -> Tensor:
        """What it knows of every head, for a checkpoint: float64, shape (:data:`REMEMBERED`, layers, heads)."""
        self.consider()
        numbers = self._norms, self._gamma, self._first_norms, self._first_logits, self._product, self._undone
        return torch.from_numpy(np.stack([self.stopped.cpu().numpy(), *numbers, self._suspected]).astype(np.float64))

    def measure(self) -> Tensor:
        """The norms of the queries and of the keys of every head, before a clip; shape (2, layers, heads)."""
        weights = self._weights()
        if [weight.data_ptr() for weight in weights] != self._addresses:  # sharded or replaced since
            self._follow(weights)
        table = torch.zeros(2 * self.stopped.numel(), device=self.stopped.device)
        if self._views:  # otherwise all are on other ranks
            norms = torch.stack(torch._foreach_norm(self._views))
            norms = norms if norms.dtype is torch.float32 else norms.float()
            table = table.scatter_reduce(0, self._index, norms, "amax")
        return table.view(2, *self.stopped.shape)

    def judge(self, norms: Sequence[Tensor], max_logits: Tensor, gamma: Tensor) -> Tensor:
        """The gammas without those of no use, as far as the steps before this one have shown.

        Args:
            norms: Those of queries and of keys, as :meth:`measure` returns them.
            max_logits: The largest logit of every head.
            gamma: What it asks for.
        """
        self.consider()
        gamma = gamma.masked_fill(self.stopped, 1.0)
        self._last.write(torch.stack([*norms, max_logits, gamma]))
        return gamma

    def consider(self) -> None:
        """Decides on what the last step has shown."""
        last = self._last.read()
        if last is None:
            return
        queries, keys, logits, gamma = last
        queries, keys = (norms[self._tied] for norms in (queries, np.take_along_axis(keys, self._key_heads, 1)))
        # Of heads without a forward since, and of those whose weights are not followed, this step tells nothing.
        is_new = np.isfinite(logits) & ((queries > 0) | (keys > 0))
        norms = np.where(queries > 0, queries, 1.0) * np.where(keys > 0, keys, 1.0)
        with np.errstate(invalid="ignore"):  # infinite weights
            is_back = np.abs(norms - self._norms) <= _SAME * self._norms
        clipped = gamma < 1
        has_shrunk = (self._product > 0) & (norms <= np.minimum(_SHRUNK, self._product**_KEPT) * self._first_norms)
        looks_useless = clipped & has_shrunk & (logits >= _FELL * self._first_logits)
        useless = is_new & looks_useless & ((self._suspected > 0) | (self._product <= _STRONGEST))
        self._suspected = np.where(is_new, looks_useless, self._suspected)
        if useless.any():
            self.stopped = self.stopped | torch.from_numpy(useless).to(self.stopped.device)
        self._undone = np.where(is_new & (self._gamma <= _STRONG), (self._undone + 1) * is_back, self._undone)
        starts = is_new & clipped & (self._product == 0)
        product = np.where(clipped, np.where(starts, gamma, self._product * gamma), 0.0)
        self._product = np.where(is_new, product, self._product)
        self._first_norms = np.where(starts, norms, self._first_norms)
        self._first_logits = np.where(starts, logits, self._first_logits)
        self._norms, self._gamma = np.where(is_new, norms, self._norms), np.where(is_new, gamma, self._gamma)
        self._tell(_USELESS, useless)
        self._tell(_UNDONE, self._undone >= _TWICE)

    def _tell(self, what: str, heads: Any) -> None:
        """Warns once for every layer."""
        for row in np.flatnonzero(heads.any(1)).tolist():
            if (what, row) not in self._told:
                self._told.add((what, row))
                own = ", ".join(map(str, np.flatnonzero(heads[row]).tolist()))
                warnings.warn(what.format(layer=self._layers[row], heads=own), stacklevel=6)

    def _weights(self) -> list[Tensor]:
        return [to_local(own.module.get_parameter(own.weight.path)) for own in self._scaled]

    def _follow(self, weights: Sequence[Tensor]) -> None:
        """Takes up the weights where they are now."""
        self._addresses = [weight.data_ptr() for weight in weights]
        boxes = [_firsts(own, self.stopped.shape) for own in self._scaled]
        self._views = [weight.detach()[box] for weight, own in zip(weights, boxes) for box in own.values()]
        places = [place for own in boxes for place in own]
        self._index = torch.tensor(places, dtype=torch.int64, device=self.stopped.device)


_USELESS = (
    "QK-Clip no longer clips attention {layer!r}, head {heads}: its clips have halved the query and key weights, but not"
    " lowered the largest logit. Something behind the weights undoes the scaling, such as a norm or a clamp; describe the"
    " attention with specs={{{layer!r}: AttentionSpec(...)}}, or leave it alone with specs={{{layer!r}: None}}"
)
_UNDONE = (
    "the clips of attention {layer!r}, head {heads}, are undone by the next step: either the optimizer keeps a copy of the"
    " weights, as float32 masters, Lookahead and schedule-free optimizers do, or its updates are as large as the weights."
    " Use an optimizer that steps the weights themselves, or a lower learning rate"
)


def _firsts(own: Scaled, shape: torch.Size) -> dict[int, tuple[slice, ...]]:
    """For every side and head, by its place in a flat table, the first of its local channels that lie together.

    These stand for all: a clip scales every channel of a head by the same factor.
    """
    layers, heads = shape
    dims, kinds, of = own.weight.dims, own.weight.channels.kinds.numpy(), own.weight.channels.heads.numpy()
    is_query, is_key = (np.isin(kinds, [KINDS.index(kind) for kind in side]) for side in (QUERY_KINDS, KEY_KINDS))
    place = (is_key * layers + own.row) * heads + of
    place[~(is_query | is_key) | (of == NO_HEAD)] = -1
    param = own.module.get_parameter(own.weight.path)
    box = local_box(param)
    place = place.reshape([param.shape[dim] for dim in dims])[tuple(box[dim] for dim in dims)]
    found: dict[int, tuple[slice, ...]] = {}
    for at in np.ndindex(place.shape):
        head = int(place[at])
        if head < 0 or head in found:
            continue
        sides = {dim: slice(i, i + 1) for dim, i in zip(dims, at)}
        if dims:
            others = (place[at[:-1]][at[-1] :] != head).nonzero()[0]
            sides[dims[-1]] = slice(at[-1], at[-1] + int(others[0]) if len(others) else None)
        found[head] = tuple(sides.get(dim, slice(None)) for dim in range(param.ndim))
    return found
