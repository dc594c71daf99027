"""Finds where a module that attends by hand has its logits: which product, which softmax, and the factor between them.

Matrix products and softmaxes are counted in the order in which a forward computes them. Each product is changed in turn; the
softmax whose input follows has its logits from it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_muonclip.qk_clip.describe.isolate import Isolated
from lightning_muonclip.qk_clip.describe.spec import Softmax

BADDBMM = {torch.baddbmm, Tensor.baddbmm}
MATMULS = BADDBMM | {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum}
SOFTMAXES = {F.softmax, torch.softmax, Tensor.softmax}


def locate(isolated: Isolated) -> tuple[Softmax, ...]:
    """Every softmax of a forward that follows a product, in order."""
    base = _Numbered({})
    isolated.run_under(base)
    found: dict[int, list[Softmax]] = {}
    for product, out in enumerate(base.products):
        noise = 1e-3 * torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
        before, after = _Numbered({product: torch.zeros_like(out)}), _Numbered({product: noise})
        isolated.run_under(before)
        isolated.run_under(after)
        for number, (a, b) in enumerate(zip(before.inputs, after.inputs)):
            change = (b - a).detach().nan_to_num()
            if a.shape == b.shape and change.any():
                found.setdefault(number, []).append(Softmax(number, product, _scale(change, noise)))
                break  # what follows later sees it through the outputs of this one
    several = {number: [Softmax(number, own[0].product, None)] for number, own in found.items() if len(own) > 1}
    return tuple(softmax for _, own in sorted((found | several).items()) for softmax in own)


def _scale(change: Tensor, noise: Tensor) -> float | None:
    """The factor between the changes of a product and of the input of a softmax, if it is one number."""
    if change.numel() != noise.numel():
        return None
    is_visible = change != 0
    factors = (change / noise.reshape(change.shape))[is_visible]
    scale = float(factors.median())
    return scale if bool(((factors - scale).abs() < 1e-4 * abs(scale)).all()) else None


def without_addend(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    """The product in a result of ``baddbmm``, such as Bloom's, which adds position biases to it; any other result as it is."""
    if func not in BADDBMM:
        return out
    addend = args[0] if args else kwargs["input"]
    return out - kwargs.get("beta", 1) * addend


class _Numbered(TorchFunctionMode):
    """Keeps products and inputs of softmaxes; answers some products by others."""

    def __init__(self, answers: dict[int, Tensor]) -> None:
        super().__init__()
        self.products: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self._answers = answers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SOFTMAXES:
            self.inputs.append((args[0] if args else kwargs["input"]).detach().clone())
        out = func(*args, **kwargs)
        if func in MATMULS:
            self.products.append(out.detach())
            return self._answers.get(len(self.products) - 1, out)
        return out
