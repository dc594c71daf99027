"""The matrices inside of fused weights, as far as they are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_muonclip.qk_clip.describe.declared import AttentionModules
from lightning_muonclip.qk_clip.describe.fused import FusedWeights
from lightning_muonclip.qk_clip.describe.split import attention_heads, matrix_parts


class FusedParts:
    """What :meth:`Muon.set_parts <lightning_muonclip.Muon.set_parts>` and ``set_heads`` take, while attention is found.

    Args:
        model: The model.
        split: What is orthogonalized of a fused projection (see :class:`~lightning_muonclip.MuonClip`).
        given: The user's parts, which go before what is found.
    """

    def __init__(self, model: nn.Module, split: str, given: Mapping[Any, tuple[Any, ...]]) -> None:
        self._model, self._split, self._given = model, split, given
        self._attention: AttentionModules = {}
        self._fused: FusedWeights = {}

    def update(self, attention: AttentionModules, fused: FusedWeights) -> bool:
        """Takes what is known now; returns whether that is new, which other dictionaries tell."""
        is_new = attention is not self._attention or fused is not self._fused
        self._attention, self._fused = attention, fused
        return is_new

    @property
    def parts(self) -> dict[Any, tuple[Any, ...]]:
        """The matrices, by weight."""
        return {**matrix_parts(self._model, self._attention, self._split, self._fused), **self._given}

    @property
    def heads(self) -> Callable[[], Mapping[Tensor, Any]]:
        """Finds the heads in the weights of attention."""
        return partial(attention_heads, self._attention)
