"""Finds the number by which an attention scales its logits, by what follows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_muonclip.kernels.log_sum_exp import SDPA
from lightning_muonclip.qk_clip.describe.count import Frame
from lightning_muonclip.qk_clip.describe.describe import FAILURES
from lightning_muonclip.qk_clip.describe.follow import BADDBMMS, MATMULS, SOFTMAXES, as_sum
from lightning_muonclip.qk_clip.describe.survey import run_watched
from lightning_muonclip.qk_clip.describe.trace import Trace, tracing
from lightning_muonclip.qk_clip.intercept.registered import RegisteredKernel

#: Factors on a number to see what follows it: small, so that soft-caps are linear there.
_SMALL = (2.0**-10, 2.0**-9)

#: How many queries of a fused kernel are enough.
_QUERIES = 64


def numbers_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The numbers that a module holds as attributes, neither zero nor in its state."""
    for name, value in vars(module).items():
        is_number = isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point()
        if (isinstance(value, float) or is_number) and value:
            yield name, value


class Logits(Trace):
    """Keeps products of activations, and what enters softmaxes; answers nothing."""

    def __init__(self) -> None:
        super().__init__(())
        self.pure: list[Tensor] = []
        self.logits: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in BADDBMMS:
            with self:
                return as_sum(func, args, kwargs)
        if func is SDPA:
            self._keep(*args, **kwargs)
        elif func in SOFTMAXES:
            self.logits.append((args[0] if args else kwargs["input"]).double())
        out = func(*args, **kwargs)
        if func in MATMULS:
            self.pure.append(out.to(torch.float64, copy=True))  # it may be changed in place
        return out

    def flex_attention(
        self, original: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Keeps a call of FlexAttention, which is no torch function."""
        scale = args[2] if len(args) > 2 else kwargs.get("scale")
        self._keep(query, key, value, scale=scale)
        return original(query, key, value, *args, **kwargs)

    def attend(self, kernel: RegisteredKernel, args: Any, kwargs: Any) -> Any:
        """Sees what a registered function does inside."""
        return kernel.run(args, kwargs)

    def _keep(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, scale: float | None = None, **_: Any
    ) -> None:
        query, key = query[..., :_QUERIES, :].double(), key.double()
        if query.ndim > 3 and key.shape[-3] != query.shape[-3]:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        self.pure.append(query @ key.mT)
        scale = args[3] if len(args) > 3 else scale
        self.logits.append(self.pure[-1] * (query.shape[-1] ** -0.5 if scale is None else scale))


def logits_of(frame: Frame) -> Logits:
    """Runs a module as it was, and keeps its logits."""
    logits = run_watched(frame.module, frame.args, frame.kwargs, tracing(Logits()))
    assert isinstance(logits, Logits)
    return logits


def power_of(frame: Frame, owner: nn.Module, attribute: str, value: Any, plain: Logits) -> int:
    """1 if all logits of a module are multiplied by a number of an owner inside, -1 if they are divided by it, else 0."""
    try:
        runs = []
        for factor in _SMALL:
            setattr(owner, attribute, value * factor)
            runs.append(logits_of(frame).logits)
    except FAILURES:
        return 0
    finally:
        setattr(owner, attribute, value)
    if not plain.logits or any(len(run) != len(plain.logits) for run in runs):
        return 0
    powers = {_direction(after - before, plain.pure) for before, after in zip(*runs) if after.shape == before.shape}
    return powers.pop() if len(powers) == 1 else 0


def _direction(change: Tensor, products: list[Tensor]) -> int:
    """The sign of a change that is proportional to a product, wherever it is visible; 0 if it is to none.

    What is subtracted from whole rows, such as their maximum, changes no probability, and does not count.
    """
    change = change.nan_to_num(0.0, 0.0, 0.0)
    for product in products:
        columns = product.shape[-1]
        for own in (change[..., :columns], change[..., -columns:]):  # sinks stand beside the product
            if own.numel() == product.numel():
                visible = own != 0
                count = visible.sum(-1, keepdim=True).clamp_min(1)
                a, b = (
                    ((x - (x * visible).sum(-1, keepdim=True) / count) * visible).flatten()
                    for x in (own, product.reshape(own.shape))
                )
                cosine = float(F.cosine_similarity(a, b, dim=0))
                if abs(cosine) > 0.99:
                    return 1 if cosine > 0 else -1
    return 0
