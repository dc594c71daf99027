"""Follows products on their way to a softmax: what multiplies them there, in this very forward.

A factor on the weights scales a product and what multiplies it, such as a temperature, but no soft-cap, mask or bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BADDBMMS = {torch.baddbmm, Tensor.baddbmm, Tensor.baddbmm_}
MATMULS = BADDBMMS | {
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.linalg.matmul,
    torch.bmm,
    Tensor.bmm,
    torch.mm,
    Tensor.mm,
    torch.einsum,
}
SOFTMAXES = {F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax}
#: Of which a softmax may be made, and the logarithm of their base.
EXPONENTIALS = dict.fromkeys((torch.exp, torch.exp_, Tensor.exp, Tensor.exp_), 1.0) | dict.fromkeys(
    (torch.exp2, torch.exp2_, torch.special.exp2, Tensor.exp2, Tensor.exp2_), math.log(2)
)

_MULTIPLY = {
    torch.mul,
    torch.multiply,
    Tensor.mul,
    Tensor.mul_,
    Tensor.multiply,
    Tensor.multiply_,
    Tensor.__mul__,
    Tensor.__rmul__,
    Tensor.__imul__,
}
_DIVIDE = {
    torch.div,
    torch.divide,
    torch.true_divide,
    Tensor.div,
    Tensor.div_,
    Tensor.divide,
    Tensor.divide_,
    Tensor.true_divide,
    Tensor.true_divide_,
    Tensor.__truediv__,
    Tensor.__itruediv__,
}
_NEGATE = {torch.neg, torch.negative, Tensor.neg, Tensor.neg_, Tensor.negative, Tensor.negative_, Tensor.__neg__}

#: What a forward has made of products: every tensor, and what multiplies each product in it, by the product's number: a
#: number, or a tensor that broadcasts. NaN is no factor that one could tell.
Ways = list[tuple[Tensor, dict[int, Any]]]


def follow(ways: Ways, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Adds what a function has made of what is followed."""
    if out is None and args:  # as of __setitem__
        out = args[0]
    if not ways or not isinstance(out, Tensor) or not out.is_floating_point():
        return
    operands = [(x, factors_in(ways, x)) for x in tensors_in((*args, *kwargs.values()))]
    followed = [(x, factors) for x, factors in operands if factors]
    if not followed:
        return
    made: dict[int, Any] = {}
    if func in _MULTIPLY or func in _DIVIDE or func in _NEGATE:
        by = _by(func, args, kwargs, followed[0][0]) if len(followed) == 1 else math.nan
        made = {product: factor * by for product, factor in followed[0][1].items()}
    else:
        for x, factors in reversed(followed):
            stays = out.shape == x.shape
            made |= {product: own if stays or _is_one(own) else math.nan for product, own in factors.items()}
    ways.append((out, made))


def factors_in(ways: Ways, x: Any) -> dict[int, Any]:
    """What multiplies each of the products that a tensor is made of."""
    for tensor, factors in reversed(ways):
        if tensor is x:
            return factors
    return {}


def _by(func: Any, args: Any, kwargs: Any, x: Tensor) -> Any:
    """What a multiplication, division or negation multiplies ``x`` by."""
    if func in _NEGATE:
        return -1.0
    first, second = (*args, *kwargs.values())[:2]
    other = second if first is x else first
    if isinstance(other, Tensor):
        other = other.detach()
    if func in _MULTIPLY:
        return other
    return 1 / other if first is x else math.nan


def _is_one(factor: Any) -> bool:
    """Whether it is one number, which multiplies whatever the shape."""
    return not isinstance(factor, Tensor) or factor.numel() == 1


def tensors_in(args: Any) -> Iterator[Tensor]:
    """The tensors among the arguments of a function, and in lists among them."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from (item for item in arg if isinstance(item, Tensor))


def without_addend(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    """The product alone in a result of ``baddbmm``, to which Bloom adds position biases; any other result as it is."""
    if func not in BADDBMMS:
        return out
    addend, beta = args[0] if args else kwargs["input"], kwargs.get("beta", 1)
    return out - beta * addend if beta else out  # without it, the addend may be uninitialized


def without_sinks(logits: Tensor, product: Tensor, sinks: int) -> Tensor:
    """The input of a softmax without columns that stand beside the product, as sinks do."""
    return logits if logits.numel() == product.numel() else logits[..., sinks : sinks + product.shape[-1]]
