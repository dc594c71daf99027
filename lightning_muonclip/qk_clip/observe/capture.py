"""Captures the inputs of attention modules in a forward, so that the modules can be run on their own."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_muonclip.qk_clip.describe.isolate import DetachedCopies, apart, device_of
from lightning_muonclip.qk_clip.describe.survey import kept
from lightning_muonclip.qk_clip.observe.observer import Observer


@dataclass(frozen=True)
class Inputs:
    """The inputs of a module, and the dtype of autocast if it was enabled."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: torch.dtype | None

    def copied(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A copy of the inputs, so that a forward may modify them."""
        with DetachedCopies():
            return tree_map(_copied, (self.args, self.kwargs))


class Capture:
    """Captures the inputs of the first forward of every attention module, from construction to :meth:`close`.

    Inputs are captured before the forward modifies them (a cache, for example). Also a context manager.
    """

    def __init__(self, observer: Observer) -> None:
        self.attention = observer.attention
        self.inputs: dict[str, Inputs] = {}
        self._handles = [
            module.register_forward_pre_hook(self._keep(name), with_kwargs=True)
            for name, (module, _) in self.attention.items()
        ]

    def close(self) -> None:
        """Stops capturing. May be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def run(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Runs a forward without recording, then restores the model's modes and buffers."""
        modes = {module: module.training for module in model.modules()}
        buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m.named_buffers(recurse=False)]
        fastpath = torch.backends.mha.get_fastpath_enabled()
        try:
            with apart(model):
                # Training could drop layers at random, and in evaluation torch's TransformerEncoder would pack its inputs.
                # Not eval(), which makes some modules merge their weights.
                torch.backends.mha.set_fastpath_enabled(False)
                for module in modes:
                    module.training = False
                with DetachedCopies():  # the model must not write to the caller's cache of keys
                    args, kwargs = tree_map(kept, (args, kwargs))
                model(*args, **kwargs)
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            for module, name, buffer, before in buffers:
                buffer.copy_(before)
                module._buffers[name] = buffer
            for module, training in modes.items():
                module.training = training

    def _keep(self, name: str) -> Any:
        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            if name not in self.inputs:
                device = device_of(module).type
                autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
                with DetachedCopies():
                    args, kwargs = tree_map(_detached, (args, kwargs))
                self.inputs[name] = Inputs(args, kwargs, autocast)

        return keep


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf)


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else copy.deepcopy(leaf)
