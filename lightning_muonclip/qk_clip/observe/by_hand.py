"""Measures the logits of modules that attend by a matrix product and a softmax of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_muonclip.kernels.hidden import HIDDEN
from lightning_muonclip.qk_clip.describe.follow import (
    EXPONENTIALS,
    MATMULS,
    SOFTMAXES,
    Ways,
    factors_in,
    follow,
    without_addend,
    without_sinks,
)
from lightning_muonclip.qk_clip.describe.spec import Softmax
from lightning_muonclip.qk_clip.observe.watch import Watch


class Measure(TorchFunctionMode):
    """Counts products and softmaxes, and records the logits of those that the spec names."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch
        self.products: dict[int, Tensor] = {}
        self.ways: Ways = []
        self.number_of_products = 0
        self.number_of_softmaxes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SOFTMAXES or func in EXPONENTIALS:
            _measure(self, args[0] if args else kwargs["input"], EXPONENTIALS.get(func, 1.0))
            self.number_of_softmaxes += 1
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        follow(self.ways, func, args, kwargs, out)
        if func in MATMULS:
            for softmax in self.watch.softmaxes:
                if softmax.product == self.number_of_products and not softmax.is_whole:
                    product = without_addend(func, args, kwargs, out.detach())
                    self.products[softmax.product] = product.clone() if softmax.is_overwritten else product
                    self.ways.append((out, {softmax.product: 1.0}))
            self.number_of_products += 1
        return out


def _measure(mode: Measure, logits: Tensor, log_base: float) -> None:
    # Not a method of the mode: torch.compile cannot trace a bound one.
    for softmax in mode.watch.softmaxes:
        if softmax.number == mode.number_of_softmaxes:
            mode.watch.record_all(log_base * _maxima(mode, softmax, logits)[None], "softmax")
    if mode.watch.softmaxes and mode.watch.softmaxes[-1].number == mode.number_of_softmaxes:
        mode.ways, mode.products = [], {}  # nothing is kept for long


@torch.no_grad()
def _maxima(mode: Measure, softmax: Softmax, logits: Tensor) -> Tensor:
    visible = logits.detach() > HIDDEN
    if softmax.is_whole:
        logits = logits.detach()
    else:
        factors = factors_in(mode.ways, logits)
        if softmax.product not in factors:
            raise RuntimeError(
                f"the logits of attention {mode.watch.recorders[0].name!r} cannot be measured: they are made in another way"
                f" than in the forward in which it was read. Skip it with specs={{{mode.watch.recorders[0].name!r}: None}}"
            )
        product = mode.products[softmax.product]
        visible = without_sinks(visible, product, softmax.sinks)
        logits = factors[softmax.product] * product.reshape(visible.shape)
    return logits.masked_fill(~visible, float("-inf")).amax((-2, -1))
