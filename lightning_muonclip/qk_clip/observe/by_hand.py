"""Measures the logits of modules that attend by a matrix product and a softmax of their own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_muonclip.kernels.hidden import HIDDEN
from lightning_muonclip.qk_clip.describe.follow import (
    EXPONENTIALS,
    MATMULS,
    SOFTMAXES,
    Part,
    Ways,
    before_in_place,
    entering,
    follow,
    maxima_of,
    product_of,
    without_addend,
)
from lightning_muonclip.qk_clip.describe.spec import Softmax
from lightning_muonclip.qk_clip.intercept.listener import current_listener, unrecorded
from lightning_muonclip.qk_clip.intercept.patches import Place
from lightning_muonclip.qk_clip.observe.watch import Watch


def measure_by_hand(watch: Watch, module: nn.Module, *, is_entered: bool) -> None:
    """Measures the forwards of a module; also the one that is about to run, too late for a patch, if it is entered."""
    watch.patches.add(_forward_of(type(module)))
    torch.compiler.reset()  # code compiled earlier would not call the patched forward
    if is_entered and watch.logits is not None:
        watch.mode = Measure(watch)
        watch.mode.__enter__()


def _forward_of(cls: type[nn.Module]) -> Iterator[Place]:
    """Where to patch the forward of a class, so that its recorded modules run it under :class:`Measure`."""
    yield next(base for base in cls.__mro__ if "forward" in vars(base)), "forward", _patch_forward


def _patch_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        watch: Any = current_listener()
        if watch is None or not watch.is_of(module) or not watch.softmaxes:
            return original(module, *args, **kwargs)
        measure = Measure(watch)
        with measure:
            output = unrecorded(original, module, *args, **kwargs)
        _check_end(measure)
        return output

    return forward


class Measure(TorchFunctionMode):
    """Follows products to softmaxes, and records the logits of those that the spec names."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch
        self.softmaxes = watch.softmaxes
        self.ways: Ways = []
        self.number_of_products = 0
        self.number_of_softmaxes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SOFTMAXES or func in EXPONENTIALS:
            _measure(self, args[0] if args else kwargs["input"], func)
            return func(*args, **kwargs)
        if func is Tensor.unflatten:
            func = torch.unflatten  # torch.compile cannot trace the method under a mode
        before_in_place(self.ways, func, args, kwargs)
        out = func(*args, **kwargs)
        if func in MATMULS:
            product = without_addend(func, args, kwargs, out.detach())
            self.ways.append((out, (product_of(self.number_of_products, func, args, product),)))
            self.number_of_products += 1
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
    if number >= len(mode.softmaxes) and not _are_alike(mode.softmaxes):
        return  # it is an error, once the forward is over
    softmax = mode.softmaxes[min(number, len(mode.softmaxes) - 1)]
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


def _check_end(mode: Measure) -> None:
    if mode.number_of_softmaxes != len(mode.softmaxes) and not _are_alike(mode.softmaxes):
        raise _unlike(mode)


def _are_alike(softmaxes: tuple[Softmax, ...]) -> bool:
    """Whether any number of softmaxes is told by one."""
    return len(set(softmaxes)) == 1


def _unlike(mode: Measure) -> RuntimeError:
    name = mode.watch.recorders[0].name
    return RuntimeError(
        f"the logits of attention {name!r} cannot be measured: they are made in another way than in the forward in which it"
        f" was read. Skip it with specs={{{name!r}: None}}"
    )
