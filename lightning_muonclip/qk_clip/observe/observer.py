"""Observes per-head maximum logits in training forwards, without changing the model.

The attention modules of this package report their maxima. The attention calls of other modules are intercepted (see
:mod:`~lightning_muonclip.qk_clip.intercept`). If a module calls no function that can be intercepted, its logits are
recomputed from the output of its projection (see :mod:`~lightning_muonclip.qk_clip.observe.recompute`).
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lightning_muonclip.qk_clip.describe.registry import AttentionModules
from lightning_muonclip.qk_clip.intercept import Patches, attention_calls, running
from lightning_muonclip.qk_clip.observe.by_hand import forward_of
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
    """An attention module that reports its own maxima through ``max_logits_recorder.record``."""

    max_logits_recorder: Any


class Observer:
    """Records the maximum logits of attention modules in a ledger, from construction to ``close()``.

    Only modules in training mode record. Recomputation under activation checkpointing changes nothing, since taking a
    maximum twice has no effect. Concurrent forwards in several threads are not supported.

    Args:
        attention: The modules to observe (see :func:`~lightning_muonclip.qk_clip.describe.registry.find_attention`).
        logits: ``"exact"``, ``"lse"`` (an upper bound, where the kernel returns it for free), or ``"off"``, which records
            nothing.

    Raises:
        ValueError: If another observer already observes a module.
    """

    def __init__(self, attention: AttentionModules, logits: str = "exact") -> None:
        self.attention = attention
        device = next((param.device for module, _ in attention.values() for param in module.parameters()), None)
        self.ledger = Ledger([spec.num_heads for _, spec in attention.values()], device or torch.device("cpu"))
        self.recorders = [
            Recorder(self.ledger, row, name, module, spec, logits)
            for row, (name, (module, spec)) in enumerate(attention.items())
        ]
        #: Whether forwards are currently recorded; see ``every_n_steps`` of QKClip.
        self.active = True
        self._handles: list[Any] = []
        self._patches = Patches()
        self.closed = logits == "off"
        if not self.closed:
            self._open()

    @property
    def layers(self) -> list[str]:
        """Names of the attention modules, in the order of the ledger's rows."""
        return list(self.attention)

    def close(self) -> None:
        """Stops observing and restores the model and every patched library. May be called twice."""
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
        """Ends a step of the ledger and drops forwards that were interrupted."""
        self.ledger.close_step()
        running.clear()

    def discard(self) -> None:
        """Discards what was recorded since the last step."""
        self.ledger.values.fill_(float("-inf"))
        running.clear()

    def pause(self, active: bool) -> None:
        """Turns recording on or off."""
        self.active = active
        if self.closed:
            return
        for recorder, (module, _) in zip(self.recorders, self.attention.values()):
            if isinstance(module, ReportsMaxLogits):
                _report_to(module, recorder if active else None)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # a copy observes nothing, as with Recorder

    def _open(self) -> None:
        for name, (module, _) in self.attention.items():
            if module in _observed:
                raise ValueError(f"attention {name!r} is observed already; call close() on the other QKClip first")
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
            torch.compiler.reset()  # code compiled earlier would not call the new hooks

    def _watch(self, module: nn.Module, recorder: Recorder) -> None:
        recomputation = find_recomputation(module)
        if recomputation is not None:
            projection = module.get_submodule(recomputation.projection)
            self._handles.append(projection.register_forward_hook(_Keep(recorder)))
        self._handles.append(module.register_forward_pre_hook(_Enter(self, recorder)))
        leave = _Leave(recomputation)
        self._handles.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))
        places = [*attention_calls(type(module)), *methods_of(type(module))]
        self._patches.add([*places, *forward_of(type(module))] if recorder.spec.softmaxes else places)


#: Attention modules that are being observed. A copy of one is not observed.
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
            if recorder in running:  # the previous forward was interrupted, which skips the hooks
                del running[running.index(recorder) :]
        running.append(recorder)


class _Keep:
    """Keeps the output of a fused projection for the recomputation at the end of the forward."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder: Recorder | None = recorder

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.recorder is not None and running and running[-1] is self.recorder:
            self.recorder.projected = output.detach()


class _Leave:
    def __init__(self, recomputation: Recomputation | None) -> None:
        self.recomputation = recomputation

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        recorder = running.pop() if running else None  # empty if another hook raised before _Enter ran
        if not isinstance(recorder, Recorder):
            return
        projected, recorder.projected = recorder.projected, None
        if output is None or recorder.reported:
            return  # no output: an error, or a recomputation under checkpointing that stopped early
        if self.recomputation is None or projected is None:
            raise RuntimeError(
                f"the logits of attention {recorder.name!r} ({type(module).__name__}) cannot be measured: it called neither"
                " torch.nn.functional.scaled_dot_product_attention nor another function that can be intercepted."
                f"{missing(module)} Let it call that function (Hugging Face: attn_implementation='sdpa'), or"
                f" skip it with specs={{{recorder.name!r}: None}}"
            )
        with torch.no_grad():
            logits = recomputed(self.recomputation, module, projected, *args, **kwargs)
        recorder.measure("recomputed", logits)
