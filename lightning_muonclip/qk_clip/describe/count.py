"""Counts attention at aten level, in any code: softmaxes over what was a product of two activations.

Every tensor is a weight, which depends on no input, or an activation. A product of two activations is followed through all
that its module does with it; elsewhere, and where one factor is a weight, as learned queries and batched projections are,
through elementwise functions only. What was a product and multiplies one more activation weighs it: as probabilities if it
has been through a softmax; else it is another kind of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lightning_muonclip.qk_clip.describe.follow import tensors_in

_BATCHED = {"bmm": (0, 1), "baddbmm": (1, 2)}

#: Kernels that contract two factors, and the places of these.
_CONTRACTIONS = _BATCHED | {
    "mm": (0, 1),
    "mv": (0, 1),
    "dot": (0, 1),
    "addmm": (1, 2),
    "addmv": (1, 2),
    "addbmm": (1, 2),
    "convolution": (0, 1),
    "_trilinear": (0, 2),
    "_cdist_forward": (0, 1),
    "_euclidean_dist": (0, 1),
}

#: Of which a softmax may be made.
_EXPONENTIALS = ("exp", "exp2")

#: Kernels that sum up products, or differences, of channels.
_SUMS = ("sum", "mean", "linalg_vector_norm", "norm")

#: Kernels whose result is not elementwise, or no logits any more.
_ENDS = {
    *_CONTRACTIONS.keys() - {"baddbmm"},
    "native_layer_norm",
    "native_batch_norm",
    "native_group_norm",
    "_fused_rms_norm",
    "sigmoid",
}

#: Where torch's own operations are.
_TORCHS = ("aten", "prim", "prims", "c10d", "_c10d_functional", "fsdp", "torchvision", "quantized")


@dataclass(eq=False)
class Frame:
    """One module in its forward, and what it was given."""

    name: str
    module: nn.Module
    args: Any
    kwargs: Any


@dataclass(eq=False)
class Noted:
    """A call of attention, or what may be one.

    Attributes:
        stack: The modules in their forward, the innermost last.
        head_dim: The number of channels that the logits are summed over.
        is_attention: Whether it attends for sure: it is a fused kernel, or a softmax over a batched product, or weighs
            activations.
    """

    stack: list[Frame]
    head_dim: int = 0
    is_attention: bool = False


@dataclass(frozen=True, eq=False)
class _Product:
    """What a tensor is made of.

    Attributes:
        size: Number of elements of the product.
        channels: How many it sums over.
        owner: The module in its forward that made it of two activations, or was handed it.
        made_in: The modules that were in their forward then, the innermost last.
        is_elementwise: Whether only elementwise functions have changed it.
        is_batched: Whether it is a product of batches of matrices.
        is_summed: Whether the channels have been summed up.
        softmaxes: Those that it has been through.
    """

    size: int
    channels: int
    owner: Frame | None = None
    made_in: tuple[Frame, ...] = ()
    is_elementwise: bool = True
    is_batched: bool = False
    is_summed: bool = True
    softmaxes: tuple[Noted, ...] = field(default=())


class Count(TorchDispatchMode):
    """Follows the products of a forward while it is entered.

    Args:
        held: What the modules hold.
        stack: The modules in their forward, which change meanwhile.
        opaque: Called with the name, the arguments and the result of every kernel that is not torch's.

    Attributes:
        softmaxes: Fused kernels, and softmaxes of any kind, in order.
        others: Where a product weighs an activation without a softmax in between.
        calls_flex_attention: Whether FlexAttention was called.
        is_paused: Whether nothing is counted now.
    """

    supports_higher_order_operators = True

    def __init__(self, held: Iterable[Tensor], stack: list[Frame], opaque: Callable[[str, Any, Any], None]) -> None:
        super().__init__()
        self.softmaxes: list[Noted] = []
        self.others: list[Noted] = []
        self.calls_flex_attention = False
        self.is_paused = False
        self._stack = stack
        self._opaque = opaque
        self._products = WeakIdKeyDictionary()
        self._weights = WeakIdKeyDictionary()
        for tensor in held:
            self._weights[tensor] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.is_paused:
            return func(*args, **kwargs)
        if not isinstance(func, torch._ops.OpOverload):
            if "flex_attention" in str(func):
                self.calls_flex_attention = True
                self.note(args[0].shape[-1], True)
            return func(*args, **kwargs)
        library, _, name = func._schema.name.partition("::")
        is_in_place = name.endswith("_")
        name = name.removesuffix("_")
        if "scaled_dot_product" in name or "flash_attention" in name or "efficient_attention" in name:
            self.note(args[0].shape[-1], True)
        tensors = list(tensors_in(args))
        product = self._softmaxed(name, self._product_of(tensors))
        out = func(*args, **kwargs)
        if library not in _TORCHS:
            self._opaque(func._schema.name, args, out)
        outs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if is_in_place and args[0]._base is not None:  # a view, of which the whole is changed too
            outs.append(args[0]._base)
        is_new = name.startswith("new_") or name.endswith("_like") or name == "lift_fresh"
        if is_new or all(map(self._is_weight, tensors)):
            for tensor in outs:
                self._weights[tensor] = True
        elif outs and (outs[0].is_floating_point() or outs[0].is_complex()):
            product = self._multiplied(name, args, outs[0], product)
            for tensor in outs:
                self._weights.pop(tensor, None)
                if product is not None:
                    self._products[tensor] = product
        return out

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Counts nothing for a while."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    def note(self, head_dim: int, is_attention: bool) -> Noted:
        """Notes a call of attention, or what may be one."""
        self.softmaxes.append(Noted(list(self._stack), head_dim, is_attention))
        return self.softmaxes[-1]

    def _softmaxed(self, name: str, product: _Product | None) -> _Product | None:
        """Notes a softmax, or an exponential of logits."""
        is_exponential = name in _EXPONENTIALS
        if not is_exponential and name not in ("_softmax", "_safe_softmax"):
            return product
        is_logits = product is not None and product.is_summed and not product.softmaxes
        if is_logits and product is not None and (product.is_elementwise or not is_exponential):
            noted = self.note(product.channels, product.is_batched and product.is_elementwise)
            return replace(product, softmaxes=(noted,))
        if not is_exponential:
            self.note(0, False)
        return product

    def _multiplied(self, name: str, args: Any, out: Tensor, product: _Product | None) -> _Product | None:
        """What the result of a kernel is made of; a new product if it multiplies two activations."""
        a, b = (args[place] if place < len(args) else None for place in _CONTRACTIONS.get(name, (0, 1)))
        is_contraction, is_mul = name in _CONTRACTIONS, name == "mul"
        if not (isinstance(a, Tensor) and isinstance(b, Tensor) and (is_contraction or is_mul or name == "sub")):
            return self._followed(name, out, product)
        of_activations = a is not b and not self._is_weight(a) and not self._is_weight(b)
        weighing = [
            (own, x.numel()) for x in (a, b) if (own := self._products.get(x)) and (own.softmaxes or self._is_here(own))
        ]
        if is_contraction and not of_activations:
            is_map = name not in _BATCHED or weighing
            return self._followed(name, out, product) if is_map else _Product(out.numel(), a.shape[-1], is_batched=True)
        is_outer = not is_contraction and _is_outer(a, b)
        if of_activations and (is_contraction or is_mul):
            for own, size in weighing:
                if is_contraction or out.numel() > size:
                    self._weighs(own)
        if not of_activations or not (is_contraction or is_outer):
            is_new = product is None and of_activations and is_mul
            return _Product(0, 1, is_summed=False) if is_new else self._followed(name, out, product)
        if weighing and name not in _BATCHED:
            return None
        made_in = tuple(self._stack)
        owner = None if weighing else self._owner(made_in)
        channels = a.shape[-1] if is_contraction else 1
        return _Product(
            out.numel(),
            channels,
            owner,
            made_in,
            is_elementwise=name != "sub",
            is_batched=name in _BATCHED,
            is_summed=name != "sub",
        )

    def _weighs(self, product: _Product) -> None:
        for noted in product.softmaxes:
            noted.is_attention = True
        if not product.softmaxes and product.is_summed:
            self.others.append(Noted(list(self._stack), product.channels))

    def _followed(self, name: str, out: Tensor, product: _Product | None) -> _Product | None:
        """What a product has become in a kernel that does not multiply it by an activation."""
        if product is None:
            return None
        if name in _SUMS and product.channels == 1:
            return replace(product, size=out.numel(), channels=max(1, product.size // out.numel()), is_summed=True)
        if product.is_elementwise and product.owner is not None and not self._is_here(product):
            product = replace(product, owner=self._owner(product.made_in))  # who has it now
        is_elementwise = product.is_elementwise and name not in _ENDS and out.numel() >= product.size
        if not is_elementwise and not self._is_here(product):
            return None
        return replace(product, is_elementwise=is_elementwise)

    def _product_of(self, tensors: list[Tensor]) -> _Product | None:
        """The largest product among the arguments of a kernel."""
        products = [
            own for own in map(self._products.get, tensors) if own and (own.is_elementwise or self._is_here(own))
        ]
        if not products:
            return None
        softmaxes = dict.fromkeys(noted for own in products for noted in own.softmaxes)
        return replace(max(products, key=lambda own: (self._is_here(own), own.size)), softmaxes=tuple(softmaxes))

    def _is_weight(self, x: Tensor) -> bool:
        return isinstance(x, nn.Parameter) or x in self._weights

    def _is_here(self, product: _Product) -> bool:
        return product.owner is not None and product.owner in self._stack

    def _owner(self, made_in: tuple[Frame, ...]) -> Frame | None:
        return next((own for own in reversed(made_in) if own in self._stack and has_matrix(own.module)), None)


def has_matrix(module: nn.Module) -> bool:
    """Whether a module has parameters that may project."""
    return any(param.ndim > 1 for param in module.parameters())


def _is_outer(a: Tensor, b: Tensor) -> bool:
    """Whether each of two tensors is broadcast along some dimension, as rows and columns are."""
    sizes = list(zip_longest(reversed(a.shape), reversed(b.shape), fillvalue=1))
    return any(x == 1 < y for x, y in sizes) and any(y == 1 < x for x, y in sizes)
