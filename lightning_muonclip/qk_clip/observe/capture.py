"""Captures the inputs of a model and its attention modules in a forward, so that they can be run again."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from lightning_muonclip.qk_clip.describe.count import Frame
from lightning_muonclip.qk_clip.describe.isolate import DetachedCopies, device_of
from lightning_muonclip.qk_clip.describe.survey import kept
from lightning_muonclip.qk_clip.observe.observer import Observer


class Capture:
    """Captures the inputs of the first forward of every attention module, from construction to :meth:`close`.

    Inputs are captured before the forward modifies them (a cache, for example). Also a context manager.

    Args:
        observer: The observer of the model.
        but: Names of modules to leave out.

    Attributes:
        attention: The modules and their specs.
        frames: Their inputs by name.
        root: The first module of the model to be entered, and its inputs.
        autocast: The dtype of autocast then, if it was enabled.
    """

    def __init__(self, observer: Observer, but: Collection[str] = ()) -> None:
        self.attention = {name: own for name, own in observer.attention.items() if name not in but}
        self.frames: dict[str, Frame] = {}
        self.root: Frame | None = None
        self.autocast: torch.dtype | None = None
        self._names = {module: name for name, (module, _) in self.attention.items()}
        self._handles = [
            module.register_forward_pre_hook(self._keep, with_kwargs=True) for module in observer.discovery.names
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

    def _keep(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        name = self._names.get(module)
        is_new = name is not None and name not in self.frames
        if self.root is not None and not is_new:
            return
        with DetachedCopies():
            frame = Frame(name or "", module, *tree_map(kept, (args, kwargs)))
        if self.root is None:
            device = device_of(module).type
            self.root = frame
            has_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
            self.autocast = torch.get_autocast_dtype(device) if has_autocast else None
        if name is not None and is_new:
            self.frames[name] = frame
