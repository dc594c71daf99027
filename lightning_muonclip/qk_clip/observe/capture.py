"""Keeps what attention modules are given in a forward, so that they can be tried again apart from their model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from lightning_muonclip.qk_clip.observe.observer import Observer


@dataclass(frozen=True)
class Inputs:
    """What a module was given, and the dtype of autocast, if there was any."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: torch.dtype | None

    def copied(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same again, so that what a forward does to them is not seen by the next."""
        with DetachedCopies():
            return tree_map(_copied, (self.args, self.kwargs))


class Capture:
    """Keeps what every attention module is given in its first forward, from construction to :meth:`close`.

    Nothing that the forward does to a cache or another object among its arguments is seen. Also a context manager.
    """

    def __init__(self, observer: Observer) -> None:
        self.inputs: dict[str, Inputs] = {}
        self._handles = [
            module.register_forward_pre_hook(self._keep(name), with_kwargs=True)
            for name, (module, _) in observer.attention.items()
        ]

    def close(self) -> None:
        """Stops; may be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def run(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """An unrecorded forward, after which the model's modes and buffers are as before."""
        modes = {module: module.training for module in model.modules()}
        buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m.named_buffers(recurse=False)]
        fastpath = torch.backends.mha.get_fastpath_enabled()
        try:
            with apart(model):
                # In training a layer may be left out by chance; in evaluation torch's TransformerEncoder would pack what it
                # gives to its layers. Not eval(), which some modules take for a reason to merge their weights.
                torch.backends.mha.set_fastpath_enabled(False)
                for module in modes:
                    module.training = False
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


class DetachedCopies(TorchFunctionMode):
    """Lets deepcopy copy tensors that have a history, without it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        memo[id(tensor)] = tensor.detach().clone()
        return memo[id(tensor)]


def device_of(module: nn.Module) -> torch.device:
    """Where its parameters are."""
    return next((param.device for param in module.parameters()), torch.device("cpu"))


@contextmanager
def apart(module: nn.Module) -> Iterator[None]:
    """Not compiled, and without a trace in the state of random numbers."""
    devices = {param.device for param in module.parameters() if param.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    indices = [device.index or 0 for device in devices]
    with torch.random.fork_rng(indices, device_type=kind), torch.compiler.set_stance("force_eager"):
        yield


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf)


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else copy.deepcopy(leaf)
