"""Captures the inputs of attention modules in a forward, so that the modules can be run on their own."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_muonclip.qk_clip.describe.isolate import DetachedCopies, apart, device_of, undisturbed
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
        with DetachedCopies():  # the model must not write to the caller's cache of keys
            args, kwargs = tree_map(kept, (args, kwargs))
        with apart(model), undisturbed(model):
            model(*args, **kwargs)

    def _keep(self, name: str) -> Any:
        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            if name not in self.inputs:
                device = device_of(module).type
                autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
                with DetachedCopies():
                    args, kwargs = tree_map(kept, (args, kwargs))
                self.inputs[name] = Inputs(args, kwargs, autocast)

        return keep


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf)
