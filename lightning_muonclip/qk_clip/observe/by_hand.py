"""Measures the logits of modules that attend by a matrix product and a softmax of their own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_muonclip.kernels.hidden import HIDDEN
from lightning_muonclip.qk_clip.describe.follow import (
    BADDBMMS,
    EXPONENTIALS,
    MATMULS,
    SOFTMAXES,
    Part,
    Ways,
    before_in_place,
    entering,
    follow,
    followed_sum,
    maxima_of,
    product_of,
    tensors_in,
)
from lightning_muonclip.qk_clip.describe.spec import Softmax
from lightning_muonclip.qk_clip.observe.watch import Watch


class Measure(TorchFunctionMode):
    """Follows products to softmaxes, and records the logits of those that the spec names."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch
        self.softmaxes = watch.softmaxes
        self.ways: Ways = []
        self.number_of_softmaxes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SOFTMAXES or func in EXPONENTIALS:
            _measure(self, args[0] if args else kwargs["input"], func)
            return func(*args, **kwargs)
        if func is Tensor.unflatten:
            func = torch.unflatten  # torch.compile cannot trace the method under a mode
        before_in_place(self.ways, func, args, kwargs)
        are_activations = self.softmaxes or not _has_parameter(args)
        if func in BADDBMMS and are_activations:
            return followed_sum(self.ways, func, args, kwargs)
        out = func(*args, **kwargs)
        if func in MATMULS and are_activations:
            self.ways.append((out, (product_of(len(self.ways), func, args, out.detach()),)))
        else:
            follow(self.ways, func, args, kwargs, out)
        return out


# Not methods of the mode: torch.compile cannot trace a bound one.


def _measure(mode: Measure, logits: Tensor, func: Any) -> None:
    parts = entering(mode.ways, logits, func in EXPONENTIALS)
    if not parts:
        return
    number = mode.number_of_softmaxes
    mode.number_of_softmaxes += 1
    if mode.softmaxes and number >= len(mode.softmaxes) and not _are_alike(mode.softmaxes):
        return  # it is an error, once the forward is over
    if mode.softmaxes:
        softmax = mode.softmaxes[min(number, len(mode.softmaxes) - 1)]
    else:  # it was read in a forward that called a function
        softmax = Softmax(len(parts), 0, is_whole=len(parts) > 1)
    if softmax.products != len(parts):
        raise _unlike(mode)
    if softmax.product is not None:
        maxima = EXPONENTIALS.get(func, 1.0) * _maxima(mode, softmax, parts[softmax.product], logits)
        mode.watch.record_all(maxima[None], "softmax")


@torch.no_grad()
def _maxima(mode: Measure, softmax: Softmax, part: Part, logits: Tensor) -> Tensor:
    if part.values is None:
        raise _unlike(mode)
    logits = logits.detach()
    visible = (logits > HIDDEN) & (part.values > -math.inf)
    logits = logits if softmax.is_whole else part.factor * part.values
    return maxima_of(part, logits.masked_fill(~visible, -math.inf))


def check_end(mode: Measure) -> None:
    """Refuses a forward with another number of softmaxes than the one that was read, unless it has none.

    Raises:
        RuntimeError: If it has.
    """
    is_read = mode.softmaxes and not _are_alike(mode.softmaxes)
    if is_read and mode.number_of_softmaxes not in (0, len(mode.softmaxes)):
        raise _unlike(mode)


def _has_parameter(args: Any) -> bool:
    """Whether a factor is a weight, as of a router of experts; such products are no logits unless they were read as such."""
    return any(isinstance(x, nn.Parameter) or isinstance(x._base, nn.Parameter) for x in tensors_in(args))


def _are_alike(softmaxes: tuple[Softmax, ...]) -> bool:
    """Whether any number of softmaxes is told by one."""
    return len(set(softmaxes)) == 1


def _unlike(mode: Measure) -> RuntimeError:
    name = mode.watch.name
    return RuntimeError(
        f"the logits of attention {name!r} cannot be measured: they are made in another way than in the forward in which it"
        f" was read. Skip it with specs={{{name!r}: None}}"
    )
