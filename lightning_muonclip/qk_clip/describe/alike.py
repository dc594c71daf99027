"""Tells whether modules are alike but for the values of their weights."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lightning_muonclip.qk_clip.describe.count import Frame

#: How deep the attributes of attributes are looked at.
_DEEPEST = 4

#: Elements of tensors that are compared by their values.
_COMPARED = 2**14

#: Attributes of every module that are looked at by themselves, or that say nothing of what a forward computes.
_OWN = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class Likeness:
    """What a module in its forward is and was given: classes, shapes, ties, settings and inputs.

    Args:
        frame: The module and its arguments.
    """

    def __init__(self, frame: Frame) -> None:
        self._layers = [int(part) for part in frame.name.split(".") if part.isdigit()]
        self._places: dict[int, int] = {}
        self._facts = list(self._of_frame(frame))

    def is_of(self, other: Likeness) -> bool:
        """Whether both are alike; a setting may be the number of a layer, which is in its name."""
        if len(self._facts) != len(other._facts) or len(self._layers) != len(other._layers):
            return False
        numbers = set(zip(self._layers, other._layers))
        return all(a == b or _is_number(a, b, numbers) for a, b in zip_longest(self._facts, other._facts))

    def _of_frame(self, frame: Frame) -> Iterator[Any]:
        for path, module in frame.module.named_modules(remove_duplicate=False):
            yield path, type(module)
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    yield name, tensor.requires_grad
                    yield self._of_tensor(tensor)
            own = {key: x for key, x in vars(module).items() if key not in _OWN and "_hooks" not in key}
            yield from self._of_value(own, 0)
        leaves, structure = tree_flatten((frame.args, frame.kwargs))
        yield str(structure)
        for leaf in leaves:
            yield from self._of_value(leaf, 0)

    def _of_tensor(self, x: Tensor) -> Any:
        """Its shape, which of all tensors it is, and its values if there are some."""
        place = self._places.setdefault(id(x), len(self._places))
        values = None if x.is_meta or x.numel() > _COMPARED else str(x.detach().tolist())
        return place, tuple(x.shape), x.dtype, values

    def _of_value(self, value: Any, depth: int) -> Iterator[Any]:
        """Of objects, their attributes; of functions, their names."""
        if isinstance(value, Tensor):
            yield self._of_tensor(value)
        elif isinstance(value, (bool, int, float, str, bytes, types.NoneType, torch.dtype, torch.device, type)):
            yield value
        elif isinstance(value, nn.Module) or depth == _DEEPEST or callable(value):
            yield type(value), getattr(value, "__qualname__", "")
        elif isinstance(value, (Mapping, list, tuple)):
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            yield type(value), len(value)
            for key, own in items:
                yield str(key)
                yield from self._of_value(own, depth + 1)
        else:
            yield type(value)
            yield from self._of_value(dict(getattr(value, "__dict__", {})), depth + 1)


def _is_number(a: Any, b: Any, numbers: set[tuple[int, int]]) -> bool:
    return type(a) is int and type(b) is int and (a, b) in numbers
