"""Observes per-head maximum logits in training forwards, without changing the model.

The attention modules of this package report their maxima. The attention calls of other modules are intercepted (see
:mod:`~lightning_muonclip.qk_clip.intercept`); the logits of a module that attends by a matrix product and a softmax of its
own are measured between the two (see :mod:`~lightning_muonclip.qk_clip.observe.by_hand`).
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn

from lightning_muonclip.qk_clip.describe.declared import (
    AttentionModules,
    Specs,
    declared_attention,
    named_modules,
    unwrapped,
)
from lightning_muonclip.qk_clip.describe.find import Example
from lightning_muonclip.qk_clip.describe.isolate import device_of
from lightning_muonclip.qk_clip.intercept import Patches, attention_calls, running
from lightning_muonclip.qk_clip.observe.by_hand import Measure, forward_of
from lightning_muonclip.qk_clip.observe.discovery import Discovery
from lightning_muonclip.qk_clip.observe.ledger import Ledger, has_others
from lightning_muonclip.qk_clip.observe.recorder import Recorder, ReportsMaxLogits

LOGITS_CHOICES = ("exact", "lse", "off")


class Observer:
    """Records the maximum logits of attention modules in a ledger, from construction to ``close()``.

    Attention that the user describes is observed from the beginning, all other from its first forward in training, before
    which it is found and inferred. Only modules in training mode record. Recomputation under activation checkpointing
    changes nothing, since taking a maximum twice has no effect. Concurrent forwards in several threads are not supported.

    Args:
        model: The model.
        specs: The user's specs by module name; ``None`` as a value leaves a module alone.
        logits: ``"exact"``, ``"lse"`` (an upper bound, where the kernel returns it for free), or ``"off"``, which records
            nothing.
        unknown: What to do with attention that cannot be read (see :class:`~lightning_muonclip.QKClip`).
        example: Arguments of the model, ``(args, kwargs)``, on which its attention is found at once.

    Raises:
        ValueError: If another observer already observes a module, or attention cannot be read.
    """

    def __init__(
        self,
        model: nn.Module,
        specs: Specs | None = None,
        logits: str = "exact",
        *,
        unknown: str = "error",
        example: Example | None = None,
    ) -> None:
        #: The attention modules, in ``named_modules`` order; another dictionary whenever one is found.
        self.attention: AttentionModules = {}
        self.ledger = Ledger([], device_of(model))
        self.recorders: list[Recorder] = []
        #: Whether forwards are currently recorded; see ``every_n_steps`` of QKClip.
        self.active = True
        self.closed = False
        self._logits = logits
        self._agreed: AttentionModules | None = None
        self._order = {name: number for number, name in enumerate(named_modules(model))}
        self._handles: list[Any] = []
        self._patches = Patches()
        self.discovery = Discovery(model, specs, unknown, self.add)
        try:
            self.add(declared_attention(model, specs))
            if example is not None:
                self.discovery.survey(unwrapped(model), example)
        except BaseException:
            self.close()
            raise

    def add(self, found: AttentionModules, entered: nn.Module | None = None) -> None:
        """Observes further modules; rows stay in ``named_modules`` order.

        Args:
            found: The modules and their specs.
            entered: A module whose forward is about to run, too late for another hook.

        Raises:
            ValueError: If another observer already observes one.
        """
        new = {name: own for name, own in found.items() if name not in self.attention}
        for name, (module, _) in new.items():
            if self._logits != "off" and module in _observed:
                raise ValueError(f"attention {name!r} is observed already; call close() on the other QKClip first")
        before = dict(zip(self.attention, self.recorders))
        attention = sorted({**self.attention, **found}.items(), key=lambda item: self._order[item[0]])
        self.attention = dict(attention)
        self.ledger = self.ledger.rearranged(
            [spec.num_heads for _, (_, spec) in attention],
            [before[name].row if name in before else None for name, _ in attention],
        )
        self.recorders = [
            before.get(name) or Recorder(name, module, spec, self._logits) for name, (module, spec) in attention
        ]
        for row, (recorder, (_, (_, spec))) in enumerate(zip(self.recorders, attention)):
            recorder.row, recorder.ledger, recorder.spec = row, self.ledger, spec
        if self._logits == "off":
            return
        for recorder in self.recorders:
            if recorder.name in new:
                self._watch(recorder, entered)
            if recorder.name in found and recorder.spec.softmaxes:
                self._measure_by_hand(recorder, entered)

    def settle(self, group: dist.ProcessGroup | None = None, *, again: bool = False) -> AttentionModules:
        """The attention that all ranks know, the same on each. A collective call the first time, if they may differ.

        Args:
            group: The ranks.
            again: Whether to exchange anew what each rank has found; of different answers, that of the lowest rank counts.
        """
        self.discovery.close_step()
        if not has_others(group):
            return self.attention
        if again or (self._agreed is None and self.discovery.may_differ):
            modules = {name: module for module, name in self.discovery.names.items()}
            found: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(found, {name: spec for name, (_, spec) in self.attention.items()}, group)
            union = {name: spec for own in reversed(found) for name, spec in own.items()}
            self.add({name: (modules[name], spec) for name, spec in union.items()})
            self._agreed = self.attention
        return self.attention if self._agreed is None else self._agreed

    @property
    def layers(self) -> list[str]:
        """Names of the attention modules, in the order of the ledger's rows."""
        return list(self.attention)

    def close(self) -> None:
        """Stops observing and restores the model and every patched library. May be called twice."""
        if self.closed:
            return
        self.closed = True
        self.discovery.close()
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
        self.discovery.close_step()
        self.ledger.close_step()
        running.clear()

    def discard(self) -> None:
        """Discards what was recorded since the last step."""
        self.discovery.close_step()
        self.ledger.values.fill_(float("-inf"))
        running.clear()

    def pause(self, active: bool) -> None:
        """Turns recording on or off."""
        self.active = active
        if self.closed or self._logits == "off":
            return
        for recorder in self.recorders:
            if isinstance(recorder.module, ReportsMaxLogits):
                _report_to(recorder.module, recorder if active else None)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # a copy observes nothing, as with Recorder

    def _watch(self, recorder: Recorder, entered: nn.Module | None) -> None:
        module = recorder.module
        _observed.add(module)
        if isinstance(module, ReportsMaxLogits):
            _report_to(module, recorder if self.active else None)
            return
        enter = _Enter(self, recorder)
        self._handles.append(module.register_forward_pre_hook(enter))
        self._handles.append(module.register_forward_hook(_Leave(self), always_call=True))
        self._patches.add(attention_calls(type(module)))
        if module is entered:
            enter(module, ())

    def _measure_by_hand(self, recorder: Recorder, entered: nn.Module | None) -> None:
        self._patches.add(forward_of(type(recorder.module)))
        torch.compiler.reset()  # code compiled earlier would not call the patched forward
        if recorder.module is entered and self.active:  # too late for the patch
            recorder.mode = Measure(recorder)
            recorder.mode.__enter__()


#: Attention modules that are being observed. A copy of one is not observed.
_observed: WeakSet[nn.Module] = WeakSet()


def _report_to(module: Any, recorder: Recorder | None) -> None:
    module.max_logits_recorder = recorder


class _Enter:
    def __init__(self, observer: Observer, recorder: Recorder) -> None:
        self.observer: Observer | None = observer  # None in a copy of the module
        self.recorder: Recorder | None = recorder

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.observer is None:
            return
        recorder = self.recorder if module.training and self.observer.active else None
        if recorder is not None and recorder in running:  # the previous forward was interrupted, which skips the hooks
            del running[running.index(recorder) :]
        running.append(recorder)


class _Leave:
    def __init__(self, observer: Observer) -> None:
        self.observer: Observer | None = observer  # None in a copy of the module

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.observer is None:
            return
        recorder = running.pop() if running else None  # empty if another hook raised before _Enter ran
        if isinstance(recorder, Recorder) and recorder.mode is not None:
            recorder.mode.__exit__(None, None, None)
            recorder.mode = None
        # No output: an error, or a recomputation under checkpointing that stopped early.
        if isinstance(recorder, Recorder) and output is not None and recorder.source is None:
            raise RuntimeError(
                f"the logits of attention {recorder.name!r} ({type(module).__name__}) cannot be measured: it called neither"
                " torch.nn.functional.scaled_dot_product_attention nor another function that can be intercepted."
                " Let it call that function (Hugging Face: attn_implementation='sdpa'), or"
                f" skip it with specs={{{recorder.name!r}: None}}"
            )
