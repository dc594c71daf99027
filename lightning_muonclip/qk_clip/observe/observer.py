"""Sees every head's largest logit in the forward pass of a model that is trained, without a change to the model.

This package's own attention modules report their maxima. The calls of any other module are intercepted (see
:mod:`~lightning_muonclip.qk_clip.intercept`); where it calls no function that can be, its logits are recomputed from the
output of its projection (see :mod:`~lightning_muonclip.qk_clip.observe.recompute`).
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lightning_muonclip.qk_clip.describe.registry import AttentionModules
from lightning_muonclip.qk_clip.intercept import Patches, attention_calls, running
from lightning_muonclip.qk_clip.observe.ledger import Ledger
from lightning_muonclip.qk_clip.observe.recompute import (
    Recomputation,
    find_recomputation,
    methods_of,
    missing,
    needs_hooks,
    recomputed,
)
from lightning_muonclip.qk_clip.observe.recorder import Recorder

LOGITS_CHOICES = ("exact", "lse", "off")


@runtime_checkable
class ReportsMaxLogits(Protocol):
    """An attention module that measures its own maxima and reports them by ``max_logits_recorder.record``."""

    max_logits_recorder: Any


class Observer:
    """Keeps the ledger of the logits of attention modules, from construction to ``close()``.

    Only modules in training mode record; evaluation does not. Recomputation under activation checkpointing changes
    nothing, since a maximum may be taken twice. Forwards in several threads at once are not told apart.

    Args:
        attention: The modules to watch (see :func:`~lightning_muonclip.qk_clip.describe.registry.find_attention`).
        logits: ``"exact"``, ``"lse"`` (an upper bound, where the attention's kernel tells it for free), or ``"off"``,
            which records nothing.

    Raises:
        ValueError: If another observer watches a module already.
    """

    def __init__(self, attention: AttentionModules, logits: str = "exact") -> None:
        self.attention = attention
        device = next((param.device for module, _ in attention.values() for param in module.parameters()), None)
        self.ledger = Ledger([spec.num_heads for _, spec in attention.values()], device or torch.device("cpu"))
        self.recorders = [
            Recorder(self.ledger, row, name, module, spec, logits)
            for row, (name, (module, spec)) in enumerate(attention.items())
        ]
        #: Whether forwards are recorded just now; see ``every_n_steps`` of QKClip.
        self.active = True
        self._handles: list[Any] = []
        self._patches = Patches()
        self.closed = logits == "off"
        if not self.closed:
            self._open()

    @property
    def layers(self) -> list[str]:
        """Names of the attention modules, one a row of the ledger."""
        return list(self.attention)

    def close(self) -> None:
        """Stops observing and leaves the model and every library as they were. May be called twice."""
        if self.closed:
            return
        self.closed = True
        for module, _ in self.attention.values():
            _observed.discard(module)
            if isinstance(module, ReportsMaxLogits):
                _report_to(module, None)
        self._patches.remove()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def close_step(self) -> None:
        """Ends a step of the ledger, and forwards that an interrupt has cut off."""
        self.ledger.close_step()
        running.clear()

    def discard(self) -> None:
        """Forgets what was recorded since the last step."""
        self.ledger.values.fill_(float("-inf"))
        running.clear()

    def pause(self, active: bool) -> None:
        """Records the next forwards, or does not."""
        self.active = active
        if self.closed:
            return
        for recorder, (module, _) in zip(self.recorders, self.attention.values()):
            if isinstance(module, ReportsMaxLogits):
                _report_to(module, recorder if active else None)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # as with Recorder: a copy observes nothing

    def _open(self) -> None:
        for name, (module, _) in self.attention.items():
            if module in _observed:
                raise ValueError(f"attention {name!r} is observed already; close() the other QKClip first")
        try:
            for recorder, (module, _) in zip(self.recorders, self.attention.values()):
                _observed.add(module)
                if isinstance(module, ReportsMaxLogits):
                    _report_to(module, recorder)
                else:
                    self._watch(module, recorder)
        except BaseException:
            self.close()
            raise
        if any(needs_hooks(module) for module, _ in self.attention.values()):
            torch.compiler.reset()  # code that is compiled already would not call hooks that were not there

    def _watch(self, module: nn.Module, recorder: Recorder) -> None:
        recomputation = find_recomputation(module)
        if recomputation is not None:
            projection = module.get_submodule(recomputation.projection)
            self._handles.append(projection.register_forward_hook(_Keep(recorder)))
        self._handles.append(module.register_forward_pre_hook(_Enter(self, recorder)))
        leave = _Leave(recomputation)
        self._handles.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))
        self._patches.add([*attention_calls(type(module)), *methods_of(type(module))])


#: Attention modules that an observer watches just now; a copy of one is not watched.
_observed: WeakSet[nn.Module] = WeakSet()


def _report_to(module: Any, recorder: Recorder | None) -> None:
    module.max_logits_recorder = recorder


class _Enter:
    def __init__(self, observer: Observer, recorder: Recorder) -> None:
        self.observer: Observer | None = observer  # None in a copy of the module
        self.recorder: Recorder | None = recorder

    def __call__(self, module: nn.Module, args: Any) -> None:
        recorder = self.recorder if module.training and self.observer is not None and self.observer.active else None
        if recorder is not None:
            recorder.reported = False
            if recorder in running:  # the forward before was interrupted, which calls no hook
                del running[running.index(recorder) :]
        running.append(recorder)


class _Keep:
    """Keeps what a fused projection gives, for the recomputation at the end of the forward."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder: Recorder | None = recorder

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.recorder is not None and running and running[-1] is self.recorder:
            self.recorder.projected = output.detach()


class _Leave:
    def __init__(self, recomputation: Recomputation | None) -> None:
        self.recomputation = recomputation

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        recorder = running.pop() if running else None  # empty if another hook broke off before the module was entered
        if not isinstance(recorder, Recorder):
            return
        projected, recorder.projected = recorder.projected, None
        if output is None or recorder.reported:
            return  # without output it broke off: an error, or a recomputation under checkpointing that had all it needed
        if self.recomputation is None or projected is None:
            raise RuntimeError(
                f"attention {recorder.name!r} ({type(module).__name__}) called neither"
                " torch.nn.functional.scaled_dot_product_attention nor any other function that can be intercepted, so its"
                f" logits cannot be measured.{missing(module)} Let it call that function (Hugging Face:"
                f" attn_implementation='sdpa'), or leave it alone with specs={{{recorder.name!r}: None}}"
            )
        with torch.no_grad():
            logits = recomputed(self.recomputation, module, projected, *args, **kwargs)
        recorder.measure("recomputed", logits)
