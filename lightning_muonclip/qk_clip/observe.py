"""Sees every head's largest logit in the forward pass of a model that is trained, without a change to the model.

Our own attention modules report by themselves. For any other, ``torch.nn.functional.scaled_dot_product_attention`` is
rebound while an observer lives: the call that a known attention module makes is measured, then passed on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_muonclip.attention.tracking import Tracked
from lightning_muonclip.kernels.max_logits import max_logits
from lightning_muonclip.qk_clip.ledger import Ledger
from lightning_muonclip.qk_clip.registry import find_attention
from lightning_muonclip.qk_clip.spec import AttentionSpec


class Recorder:
    """Writes what one attention module sees into its row of the ledger."""

    def __init__(self, ledger: Ledger, row: int, name: str) -> None:
        self.ledger = ledger
        self.row = row
        self.name = name
        self.reported = False

    def record(self, maxima: Tensor) -> None:
        """Takes the maxima of one forward, shape ``(heads,)``."""
        heads = self.ledger.heads[self.row]
        if maxima.shape[0] != heads:
            raise ValueError(
                f"attention {self.name!r} computed {maxima.shape[0]} heads, but its spec says {heads}; correct the spec"
            )
        self.reported = True
        self.ledger.record(self.row, maxima)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # A copy of an observed module, by deepcopy or pickle, is not observed: its recorder is None.
        return type(None), ()


class Observer:
    """Finds the attention modules of a model and keeps the ledger of their logits, from construction to ``close()``.

    Only modules in training mode record; evaluation does not. Recomputation under activation checkpointing changes
    nothing, since a maximum may be taken twice.

    Args:
        model: The model to watch.
        specs: The user's word on attention modules, by name; ``None`` as a value leaves a module alone.
        watch: ``False`` finds the modules and records nothing.

    Raises:
        ValueError: If there is no attention, or one that cannot be read.
    """

    def __init__(
        self, model: nn.Module, specs: Mapping[str, AttentionSpec | None] | None = None, *, watch: bool = True
    ) -> None:
        self.attention = find_attention(model, specs)
        device = next(model.parameters()).device
        self.ledger = Ledger([spec.num_heads for _, spec in self.attention.values()], device)
        self._handles: list[Any] = []
        self.closed = not watch
        if watch:
            self._open()

    @property
    def layers(self) -> list[str]:
        """Names of the attention modules, one a row of the ledger."""
        return list(self.attention)

    def close(self) -> None:
        """Stops observing and leaves the model and torch as they were. May be called twice."""
        if self.closed:
            return
        self.closed = True
        for module, _ in self.attention.values():
            _observed.discard(module)
            if isinstance(module, Tracked):
                module.recorder = None
        if self._handles:
            _calls.restore()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # as with Recorder: a copy observes nothing

    def _open(self) -> None:
        for name, (module, _) in self.attention.items():
            if module in _observed:
                raise ValueError(f"attention {name!r} is observed already; close() the other QKClip first")
        for row, (name, (module, _)) in enumerate(self.attention.items()):
            _observed.add(module)
            recorder = Recorder(self.ledger, row, name)
            if isinstance(module, Tracked):
                module.recorder = recorder
            else:
                self._handles.append(module.register_forward_pre_hook(_Enter(recorder)))
                self._handles.append(module.register_forward_hook(_leave, always_call=True))
        if self._handles:
            _calls.rebind()


class _Calls:
    """Which attention module is in its forward just now, and for how many observers the function is rebound."""

    def __init__(self) -> None:
        self.inside: list[Recorder | None] = []
        self.observers = 0
        self.rebound = F.scaled_dot_product_attention

    def rebind(self) -> None:
        if not self.observers:
            self.rebound = F.scaled_dot_product_attention  # torch's own, or what another library has put there
            F.scaled_dot_product_attention = _observed_attention
        self.observers += 1

    def restore(self) -> None:
        self.observers -= 1
        if not self.observers:
            if F.scaled_dot_product_attention is _observed_attention:  # else another library has rebound it since
                F.scaled_dot_product_attention = self.rebound
            self.inside.clear()


_calls = _Calls()

#: Attention modules that an observer watches just now; a copy of one is not watched.
_observed: WeakSet[nn.Module] = WeakSet()


class _Enter:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder: Recorder | None = recorder  # None in a copy of the module

    def __call__(self, module: nn.Module, args: Any) -> None:
        recorder = self.recorder if module.training else None
        if recorder is not None:
            recorder.reported = False
        _calls.inside.append(recorder)


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    recorder = _calls.inside.pop()
    if output is None:
        return  # the forward broke off: an error, or a recomputation under checkpointing that had all it needed
    if recorder is not None and not recorder.reported:
        raise RuntimeError(
            f"attention {recorder.name!r} ({type(module).__name__}) did not call"
            " torch.nn.functional.scaled_dot_product_attention, so its logits cannot be seen. Let it call that function"
            " (in Hugging Face: attn_implementation='sdpa'), or leave it alone with"
            f" specs={{{recorder.name!r}: None}}"
        )


def _observed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if _calls.inside and (recorder := _calls.inside[-1]) is not None:
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        with torch.profiler.record_function("muonclip::max_logits"):
            recorder.record(max_logits(query, key, scale=factor, is_causal=is_causal, mask=attn_mask))
    return _calls.rebound(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
