"""Observes per-head maximum logits in training forwards, without changing the model.

The attention modules of this package report their maxima. The attention calls of other modules are intercepted (see
:mod:`~lightning_muonclip.qk_clip.intercept`); the logits of a module that attends by a matrix product and a softmax of its
own are measured between the two (see :mod:`~lightning_muonclip.qk_clip.observe.by_hand`).
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any

import torch.distributed as dist
from torch import nn

from lightning_muonclip.parallel.holders import has_others
from lightning_muonclip.qk_clip.describe.declared import (
    AttentionModules,
    Specs,
    declared_attention,
    unwrapped,
)
from lightning_muonclip.qk_clip.describe.find import Example
from lightning_muonclip.qk_clip.describe.fused import FusedWeights
from lightning_muonclip.qk_clip.describe.isolate import device_of
from lightning_muonclip.qk_clip.intercept.listener import running
from lightning_muonclip.qk_clip.observe.discovery import Discovery
from lightning_muonclip.qk_clip.observe.forwards import listen, run_under_modes
from lightning_muonclip.qk_clip.observe.ledger import Ledger
from lightning_muonclip.qk_clip.observe.recorder import Recorder
from lightning_muonclip.qk_clip.observe.watch import Watch, watch_of
from lightning_muonclip.qk_clip.owned import Owned

LOGITS_CHOICES = ("exact", "lse", "off")


class Observer:
    """Records the maximum logits of attention modules in a ledger, from construction to ``close()``.

    Attention that the user describes is observed from the beginning, all other from its first forward in training, before
    which it is found and inferred. Only modules in training mode record. Recomputation under activation checkpointing
    changes nothing, since taking a maximum twice has no effect. Several observers of one module share its hooks, and each
    has its own ledger. Observation ends with :meth:`close`, or when nothing refers to the observer. Concurrent forwards in
    several threads are not supported.

    Args:
        model: The model.
        specs: The user's specs by module name; ``None`` as a value leaves a module alone.
        logits: ``"exact"``, ``"lse"`` (an upper bound, where the kernel returns it for free), or ``"off"``, which records
            nothing.
        unknown: What to do with attention that cannot be read (see :class:`~lightning_muonclip.QKClip`).
        example: Arguments of the model, ``(args, kwargs)``, on which its attention is found at once.

    Raises:
        ValueError: If attention cannot be read.
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
        #: Whether weights are clipped by what is recorded.
        self.threshold: float | None = None
        self.closed = False
        #: Weights that hold several matrices, by display name, as all ranks know them since :meth:`settle`.
        self.fused: FusedWeights = {}
        self._logits = logits
        self._agreed: AttentionModules | None = None
        # Weak, since a module may hold an optimizer that holds this.
        self._watched: list[tuple[weakref.ref[Watch], weakref.ref[Recorder]]] = []
        weakref.finalize(self, _stop, self._watched)  # what nobody holds does not observe
        #: What the run trains.
        self.owned = Owned()
        self.discovery = Discovery(model, specs, unknown, self.owned, self.add)
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
        """
        before = {recorder.module: recorder for recorder in self.recorders}
        specs = {module: spec for module, spec in (*self.attention.values(), *found.values())}
        self.attention = {
            name: (module, specs[module]) for module, name in self.discovery.names.items() if module in specs
        }
        attention = self.attention.items()
        self.ledger = self.ledger.rearranged(
            [spec.num_heads for _, (_, spec) in attention],
            [before[module].row if module in before else None for _, (module, _) in attention],
        )
        self.recorders = [
            before.pop(module) if module in before else Recorder(name, module, spec, self._logits)
            for name, (module, spec) in attention
        ]
        for row, (recorder, (name, (_, spec))) in enumerate(zip(self.recorders, attention)):
            recorder.row, recorder.ledger, recorder.spec, recorder.name = row, self.ledger, spec, name
            recorder.active, recorder.threshold = self.active, self.threshold
        if self._logits != "off":
            self._watch({module for module, _ in found.values()}, entered)
            _stop(self._watched, of=before)  # which the model has no more

    def _watch(self, found: set[nn.Module], entered: nn.Module | None) -> None:
        watched = {recorder() for _, recorder in self._watched}
        for recorder in self.recorders:
            watch = watch_of(recorder.module)
            if recorder not in watched:
                watch.add(recorder)
                self._watched.append((weakref.ref(watch), weakref.ref(recorder)))
                listen(watch, recorder.module, is_entered=recorder.module is entered)
            if recorder.module in found and recorder.spec.softmaxes:
                run_under_modes(watch, recorder.module)

    def settle(self, group: dist.ProcessGroup | None = None, *, again: bool = False) -> AttentionModules:
        """The attention that all ranks know, the same on each. A collective call the first time, if they may differ.

        Args:
            group: The ranks.
            again: Whether to exchange anew what each rank has found; of different answers, that of the lowest rank counts.
        """
        self.discovery.close_step()
        self.discovery.look_again()
        if not has_others(group):
            self.fused = self.discovery.fused
            return self.attention
        if again or (self._agreed is None and self.discovery.may_differ):
            modules = {name: module for module, name in self.discovery.names.items()}
            found: list[Any] = [None] * dist.get_world_size(group)
            specs = {name: spec for name, (_, spec) in self.attention.items()}
            dist.all_gather_object(found, (specs, self.discovery.fused), group)
            union = {name: spec for own, _ in reversed(found) for name, spec in own.items()}
            self.fused = {name: parts for _, own in reversed(found) for name, parts in own.items()}
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
        _stop(self._watched)

    def close_step(self) -> None:
        """Ends a step of the ledger and drops forwards that were interrupted."""
        self.discovery.close_step()
        self.ledger.close_step()
        self._begin_step()

    def discard(self) -> None:
        """Discards what was recorded since the last step."""
        self.discovery.close_step()
        self.ledger.discard()
        self._begin_step()

    def _begin_step(self) -> None:
        running.clear()
        for recorder in self.recorders:
            recorder.has_attended = False

    def pause(self, active: bool) -> None:
        """Turns recording on or off."""
        self.active = active
        for recorder in self.recorders:
            recorder.active = active

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # a copy observes nothing


def _stop(
    watched: list[tuple[weakref.ref[Watch], weakref.ref[Recorder]]], of: Collection[nn.Module] | None = None
) -> None:
    """Ends what an observer has begun, of some modules or of all; not a method, since it outlives the observer."""
    for refs in list(watched):
        watch, recorder = refs[0](), refs[1]()
        if watch is not None and recorder is not None and (of is None or recorder.module in of):
            watched.remove(refs)
            watch.remove(recorder)
