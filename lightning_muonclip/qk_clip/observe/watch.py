"""Watches one attention module for all its observers: each call is measured once, and recorded in the ledger of each."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muonclip.kernels.max_logits import max_logits
from lightning_muonclip.kernels.measure import Logits, is_bound, measure_max_logits, scale_of
from lightning_muonclip.qk_clip.describe.spec import Softmax
from lightning_muonclip.qk_clip.intercept.patches import Patches
from lightning_muonclip.qk_clip.observe.recorder import Recorder, ReportsMaxLogits
from lightning_muonclip.values import has_values

#: From this threshold on, a bound is above it only where a logit is large too: of a million keys with equal logits, the
#: log-sum-exp is 14, and no more than a few nats above the logarithm of the keys as long as logits are small.
_BOUNDED_FROM = 22.0

#: The attribute of a module that holds its watch, so that neither outlives the other.
_ATTRIBUTE = "_max_logits_watch"


class Watch:
    """What is known of one module, from its first recorder to its last.

    Attributes:
        recorders: One for each observer.
        handles: Of the hooks of the module.
        called: Whether any attention call has been seen in the current forward.
        patches: Of the functions that the module may call.
        is_under_modes: Whether forwards run under modes that see all calls, since one was missed.
        has_warned: Whether somebody was told of a forward without logits.
    """

    def __init__(self, module: nn.Module) -> None:
        self.recorders: list[Recorder] = []
        self.called = False
        self.is_under_modes = False
        self.has_warned = False
        self._module = module
        self.patches = Patches()
        # If the module and its observers are garbage together, nobody is left to remove the recorders.
        weakref.finalize(self, self.patches.remove)
        self.handles: list[Any] = []

    @property
    def name(self) -> str:
        """The name of the module."""
        return self.recorders[0].name

    @property
    def logits(self) -> str | None:
        """How the current forward is measured; ``None`` if it does not count.

        ``"exact"`` if some recorder asks for it. ``"whole"`` if, besides, a bound instead of a maximum could be above a
        threshold that no logit reaches.
        """
        active = [recorder for recorder in self.recorders if recorder.active]
        if "exact" not in [recorder.logits for recorder in active]:
            return "lse" if active else None
        thresholds = [recorder.threshold for recorder in active if recorder.threshold is not None]
        return "whole" if min(thresholds, default=_BOUNDED_FROM) < _BOUNDED_FROM else "exact"

    @property
    def softmaxes(self) -> tuple[Softmax, ...]:
        """Where a module that calls no attention function has its logits."""
        for recorder in self.recorders:
            if recorder.spec.softmaxes:
                return recorder.spec.softmaxes
        return ()

    def is_of(self, module: nn.Module) -> bool:
        """Whether it watches this module."""
        return self._module is module

    def measure(self, source: str, logits: Logits) -> None:
        """Measures the logits of one call."""
        query, key, bounds, scale, is_causal, window, documents, mask = logits
        how = self.logits
        self.called = True
        if how is None or not has_values((query, key)):
            return
        if query.is_nested:
            self.record(_nested_max_logits(query, key, scale_of(logits), is_causal), source)
            return
        if query.ndim == 2:
            query, key = query[None], key[None]
        lead = query.shape[:-2]
        has_heads = query.ndim == 4 and not any(recorder.spec.head_axes for recorder in self.recorders)
        if not has_heads:  # every leading index counts as a head
            if mask is not None:
                mask = mask.expand(*lead, *mask.shape[-2:]).flatten(0, -3)
            if key.shape[:-2] != lead:
                key = key.repeat_interleave(lead[-1] // key.shape[-3], -3).expand(*lead, *key.shape[-2:])
            query, key = query.flatten(0, -3), key.flatten(0, -3)
            bounds = None if bounds is None else bounds.flatten(0, -2)
            if documents is not None:  # of a batch
                query, key = query[None], key[None]
                mask, bounds = (None if x is None else x[None] for x in (mask, bounds))
        logits = Logits(query, key, bounds, scale, is_causal, window, documents, mask)
        source = f"log-sum-exp of {source}" if is_bound(logits, how) else source
        maxima = measure_max_logits(logits, how)
        if has_heads:
            self.record(maxima, source)
        else:
            self.record_all(maxima.view(-1, *lead), source)

    def record(self, maxima: Tensor, source: str = "the module") -> None:
        """Records the maxima of one call, shape ``(heads,)`` or, with upper bounds, ``(2, heads)``."""
        for recorder in self._recording(maxima):
            recorder.record(maxima, source)

    def record_all(self, maxima: Tensor, source: str) -> None:
        """Records the maxima of one call, one for every leading index of the queries, after a dimension of 1 or 2."""
        for recorder in self._recording(maxima):
            if maxima.numel():  # of an empty batch there is none
                recorder.record_all(maxima, source)

    def _recording(self, maxima: Tensor) -> list[Recorder]:
        """The recorders that take the maxima of a call."""
        self.called = True
        return [recorder for recorder in self.recorders if recorder.active] if has_values(maxima) else []

    def add(self, recorder: Recorder) -> None:
        """Records for one more observer."""
        if not self.recorders:
            setattr(self._module, _ATTRIBUTE, self)
        self.recorders.append(recorder)

    def remove(self, recorder: Recorder) -> None:
        """Stops recording for one observer; after the last, the module is as it was."""
        self.recorders.remove(recorder)
        if self.recorders:
            return
        module: Any = self._module
        if isinstance(module, ReportsMaxLogits):
            module.max_logits_recorder = None
        for handle in self.handles:
            handle.remove()
        self.patches.remove()
        delattr(module, _ATTRIBUTE)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # a copy of an observed module, by deepcopy or pickle, is not observed


def _nested_max_logits(query: Any, key: Any, scale: float, is_causal: bool) -> Tensor:
    """The maxima of jagged sequences, of shape (batch, heads, length, channels)."""
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    if query.offsets() is not key.offsets() or query.lengths() is not None:  # attention to other sequences, or holes
        pairs = [(q.transpose(0, 1), k.transpose(0, 1)) for q, k in zip(query.unbind(), key.unbind())]
        return torch.stack([max_logits(q, k, scale=scale, is_causal=is_causal) for q, k in pairs]).amax(0)
    packed = [x.values().transpose(0, 1)[None] for x in (query, key)]
    counts = query.offsets().diff()
    documents = torch.arange(len(counts), device=counts.device).repeat_interleave(
        counts, output_size=packed[0].shape[-2]
    )
    return max_logits(*packed, scale=scale, is_causal=is_causal, documents=documents[None])


def watch_of(module: nn.Module) -> Watch:
    """The watch of a module, which its observers share."""
    return vars(module).get(_ATTRIBUTE) or Watch(module)
