"""Finds where a module that attends by hand has its logits: which product, which softmax, and the factor between them.

Matrix products and softmaxes are counted in the order in which a forward computes them. The products that are logits are
those that the layout scales; what else is added to them, such as queries times relative positions, is a bias. Each is
changed in turn; the softmax whose input follows has its logits from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_muonclip.kernels.hidden import HIDDEN
from lightning_muonclip.qk_clip.describe.infer import Layout, Unclear
from lightning_muonclip.qk_clip.describe.isolate import Isolated
from lightning_muonclip.qk_clip.describe.layout import KEY_KINDS, QUERY_KINDS
from lightning_muonclip.qk_clip.describe.prove import deviation, factors
from lightning_muonclip.qk_clip.describe.spec import Softmax

BADDBMM = {torch.baddbmm, Tensor.baddbmm}
MATMULS = BADDBMM | {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum}
SOFTMAXES = {F.softmax, torch.softmax, Tensor.softmax}


def locate(isolated: Isolated, layout: Layout) -> tuple[Softmax, ...]:
    """Every softmax over logits of an attention, in order.

    Raises:
        Unclear: If the logits cannot be measured at one of them.
    """
    base = _run(isolated, {})
    found: dict[int, list[Softmax]] = {}
    for product in reversed(_logits(isolated, layout, base)):
        out = base.products[product]
        # Large beside the rounding of modules that compute logits in float32, small beside any soft-cap.
        noise = 0.03 * torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
        before, after = (_run(isolated, {product: answer}) for answer in (torch.zeros_like(out), noise))
        for number, (a, b) in enumerate(zip(before.inputs, after.inputs)):
            change = (b - a).detach().nan_to_num()
            if change.any():  # later softmaxes see it through the outputs of this one
                own = found.setdefault(number, [])
                # A projection changes the logits through a later product.
                if not any(before.differs(after, later.product) for later in own):
                    sinks = int(change.flatten(0, -2).any(0).int().argmax()) if change.shape != noise.shape else 0
                    scale = _scale(without_sinks(change, noise, sinks), noise)
                    own.append(Softmax(number, product, scale, base.is_overwritten(product), sinks))
                break
    for number, own in found.items():
        if len(own) > 1 or own[0].scale is None:
            more = {softmax.product: base.products[softmax.product] + base.pure[softmax.product] for softmax in own}
            doubled = _run(isolated, more)
            if layout.sides and not _is_double(base.inputs[number], doubled.inputs[number]):
                raise Unclear("what enters its softmax is more than the products of its queries and keys")
            found[number] = [Softmax(number, own[0].product, None, False)]
    return tuple(own[0] for _, own in sorted(found.items()))


def _run(isolated: Isolated, answers: Mapping[int, Tensor], probabilities: Sequence[Tensor] = ()) -> _Numbered:
    mode = _Numbered(answers, probabilities)
    isolated.run_under(mode)
    return mode


def _logits(isolated: Isolated, layout: Layout, base: _Numbered) -> list[int]:
    """The products that follow when one side of the heads is doubled; all, if only what is behind them scales."""
    heads = torch.full((max(layout.num_heads, layout.num_key_value_heads),), 2.0)
    of = dict.fromkeys(QUERY_KINDS if "q" in layout.sides else KEY_KINDS, heads)
    factor = 4 if layout.is_tied else 2
    offsets = {name: table.offset for name, table in layout.tables}
    with isolated.scaled(factors(layout, of, isolated.params), offsets):
        after = _run(isolated, {}, base.probabilities)  # nothing behind a softmax may change
    limit = 1e-6 if isolated.dtype is torch.float64 else 1e-3
    follows = [deviation(factor * a, b) < limit for a, b in zip(base.pure, after.pure)]
    return [number for number, is_logits in enumerate(follows) if is_logits or not any(follows)]


def _is_double(once: Tensor, twice: Tensor) -> bool:
    """Whether logits are twice what they were, wherever they are visible."""
    return deviation(*(x.masked_fill(once < HIDDEN, 0) for x in (2 * once, twice))) < 1e-3


def _scale(change: Tensor, noise: Tensor) -> float | None:
    """The factor between the changes of a product and of the input of a softmax, if it is one number.

    What is subtracted from whole rows, such as their maximum, changes no probability, and does not count.
    """
    if change.numel() != noise.numel():
        return None
    visible = (change != 0).double()
    count = visible.sum(-1, keepdim=True)

    def centered(x: Tensor) -> Tensor:
        x = x.double() * visible
        return x - visible * x.sum(-1, keepdim=True) / count.clamp_min(1) if bool((count > 1).any()) else x

    change, noise = centered(change), centered(noise.reshape(change.shape))
    scale = float((change * noise).sum() / (noise * noise).sum())  # least squares
    return scale if bool(((change - scale * noise).abs() < 1e-3 * abs(scale) * noise.abs().max()).all()) else None


def without_sinks(logits: Tensor, product: Tensor, sinks: int) -> Tensor:
    """The input of a softmax without columns that stand beside the product, as sinks do."""
    return logits if logits.numel() == product.numel() else logits[..., sinks : sinks + product.shape[-1]]


def without_addend(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    """The product alone in a result of ``baddbmm``, to which Bloom adds position biases; any other result as it is."""
    if func not in BADDBMM:
        return out
    addend, beta = args[0] if args else kwargs["input"], kwargs.get("beta", 1)
    return out - beta * addend if beta else out  # without it, the addend may be uninitialized


class _Numbered(TorchFunctionMode):
    """Keeps products, also without what ``baddbmm`` adds, and softmaxes; answers some of them by others."""

    def __init__(self, answers: Mapping[int, Tensor], probabilities: Sequence[Tensor]) -> None:
        super().__init__()
        self.products: list[Tensor] = []
        self.pure: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.probabilities: list[Tensor] = []
        self._versions: list[tuple[Tensor, int]] = []
        self._answers = answers
        self._probabilities = probabilities

    def differs(self, other: _Numbered, product: int) -> bool:
        """Whether a product is another one in another run."""
        return not torch.equal(self.products[product], other.products[product])

    def is_overwritten(self, product: int) -> bool:
        """Whether the module has changed a product in place."""
        out, version = self._versions[product]
        return out._version != version

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SOFTMAXES:
            self.inputs.append((args[0] if args else kwargs["input"]).detach().clone())
        out = func(*args, **kwargs)
        if func in SOFTMAXES:
            number = len(self.probabilities)
            out = self._probabilities[number].clone() if number < len(self._probabilities) else out
            self.probabilities.append(out.detach().clone())
        if func in MATMULS:
            answer = self._answers.get(len(self.products))
            self.pure.append(without_addend(func, args, kwargs, out.detach().clone()))
            out = out if answer is None else answer.clone()  # the module may change it in place
            self.products.append(out.detach().clone())
            self._versions.append((out.detach(), out._version))
        return out
