"""What a run has counted of every head, kept by the name of its layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_muonclip.qk_clip.describe.declared import AttentionModules
from lightning_muonclip.qk_clip.effect import REMEMBERED


class Counts:
    """The clips of every head, and what is remembered of their effect.

    Layers may be found late: counts of a checkpoint wait for theirs.

    Attributes:
        clips: Number of times that each head was clipped, int64, shape (layers, most heads).
        memory: What :class:`~lightning_muonclip.qk_clip.effect.Effect` remembers, float64, shape (:data:`REMEMBERED
            <lightning_muonclip.qk_clip.effect.REMEMBERED>`, layers, most heads).
    """

    def __init__(self) -> None:
        self.clips = torch.zeros(0, 0, dtype=torch.int64)
        self.memory = torch.zeros(REMEMBERED, 0, 0, dtype=torch.float64)
        self._layers: list[str] = []
        #: Those of layers that have yet to be found.
        self._waiting: dict[str, Tensor] = {}

    def arrange(self, attention: AttentionModules) -> None:
        """Brings the rows into the order of these layers."""
        known = self._by_layer()
        shape = len(attention), max((spec.num_heads for _, spec in attention.values()), default=0)
        counts = torch.zeros(1 + REMEMBERED, *shape, dtype=torch.float64)
        for row, (name, (_, spec)) in enumerate(attention.items()):
            if name in known:
                own = known[name][:, : spec.num_heads]
                counts[:, row, : own.shape[1]] = own
        self._waiting = {name: own for name, own in known.items() if name not in attention}
        self._layers = list(attention)
        self.clips, self.memory = counts[0].to(self.clips), counts[1:]

    def _by_layer(self) -> dict[str, Tensor]:
        """For every layer, a row for the clips and one for each remembered number; a column for each head."""
        counts = torch.cat([self.clips.cpu().double()[None], self.memory])
        return {**self._waiting, **{name: counts[:, row] for row, name in enumerate(self._layers)}}

    def state_dict(self) -> dict[str, Any]:
        """The names of the layers, and both tables with a row for each."""
        known = self._by_layer()
        table = torch.zeros(0, 0, 1 + REMEMBERED)
        if known:
            table = pad_sequence([own.T for own in known.values()], batch_first=True)
        return {"layers": list(known), "clips": table[..., 0].long(), "effect": table[..., 1:]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Replaces all counts; :meth:`arrange` then gives them their rows."""
        clips = torch.as_tensor(state_dict["clips"]).double()[..., None]
        effect = torch.as_tensor(state_dict.get("effect", torch.zeros(*clips.shape[:2], REMEMBERED))).double()
        self._waiting = {name: own.T for name, own in zip(state_dict["layers"], torch.cat([clips, effect], -1))}
        self._layers = []
