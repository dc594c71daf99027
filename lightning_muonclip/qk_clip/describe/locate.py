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
    for product, out in reversed(list(enumerate(base.products))):
        # Large beside the rounding of modules that compute logits in float32, small beside any soft-cap.
        noise = 0.03 * torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
        before, after = _Numbered({product: torch.zeros_like(out)}), _Numbered({product: noise})
        isolated.run_under(before)
        isolated.run_under(after)
        for number, (a, b) in enumerate(zip(before.inputs, after.inputs)):
            change = (b - a).detach().nan_to_num()
            if change.any():  # later softmaxes see it through the outputs of this one
                own = found.setdefault(number, [])
                # A projection changes the logits through a later product.
                if not any(before.differs(after, later.product) for later in own):
                    is_overwritten = out._version != base.versions[product]
                    own.append(Softmax(number, product, _scale(change, noise), is_overwritten))
                break
    several = {number: [Softmax(number, own[0].product, None, False)] for number, own in found.items() if len(own) > 1}
    return tuple(softmax for _, own in sorted((found | several).items()) for softmax in own)


def _scale(change: Tensor, noise: Tensor) -> float | None:
    """The factor between the changes of a product and of the input of a softmax, if it is one number."""
    if change.numel() != noise.numel():
        return None
    is_visible = change != 0
    change, noise = change[is_visible].double(), noise.reshape(change.shape)[is_visible].double()
    scale = float(change @ noise / (noise @ noise))  # least squares
    return scale if bool(((change - scale * noise).abs() < 1e-3 * abs(scale) * noise.abs().mean()).all()) else None


def without_addend(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    """The product alone in a result of ``baddbmm``, to which Bloom adds position biases; any other result as it is."""
    if func not in BADDBMM:
        return out
    addend, beta = args[0] if args else kwargs["input"], kwargs.get("beta", 1)
    return out - beta * addend if beta else out  # without it, the addend may be uninitialized


class _Numbered(TorchFunctionMode):
    """Keeps products and inputs of softmaxes; answers some products by others."""

    def __init__(self, answers: dict[int, Tensor]) -> None:
        super().__init__()
        self.products: list[Tensor] = []
        self.versions: list[int] = []
        self.inputs: list[Tensor] = []
        self._answers = answers

    def differs(self, other: _Numbered, product: int) -> bool:
        """Whether a product is another one in another run."""
        return not torch.equal(self.products[product], other.products[product])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SOFTMAXES:
            self.inputs.append((args[0] if args else kwargs["input"]).detach().clone())
        out = func(*args, **kwargs)
        if func in MATMULS:
            self.products.append(out.detach())
            self.versions.append(out._version)
            answer = self._answers.get(len(self.products) - 1)
            return out if answer is None else answer.clone()  # the module may change it in place
        return out
