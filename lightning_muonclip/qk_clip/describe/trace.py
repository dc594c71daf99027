"""Traces the attention calls of a module that runs alone: queries, keys, values, and what else enters the logits.

The module runs under a function mode. Fused kernels are attention calls. So is a softmax over a product of two activations;
the autograd graph leads from the softmax back to the product, through whatever scales, masks and reshapes the logits. Each
call is answered by a constant, so that queries, keys and values are outputs of their own, and the module's output depends on
everything else alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from inspect import unwrap
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from lightning_muonclip.kernels.log_sum_exp import SDPA
from lightning_muonclip.qk_clip.describe.follow import BADDBMMS, EXPONENTIALS, MATMULS, SOFTMAXES, as_sum, einsum_roles
from lightning_muonclip.qk_clip.intercept.registered import RegisteredKernel, looking

#: Functions that may hold a weight.
_PROJECTS = MATMULS | {F.linear, torch.addmm, Tensor.addmm, F.conv1d, F.conv2d, F.conv3d}

#: Further functions that contract two activations.
_CONTRACT = {
    F.linear,
    F.bilinear,
    torch.inner,
    Tensor.inner,
    torch.tensordot,
    torch.mv,
    Tensor.mv,
    torch.dot,
    Tensor.dot,
}

#: Nodes of the autograd graph between a product and its softmax that leave every logit to its head.
_ELEMENTWISE = {
    "View",
    "UnsafeView",
    "ReshapeAlias",
    "Alias",
    "T",
    "Transpose",
    "Permute",
    "Expand",
    "Squeeze",
    "Unsqueeze",
    "Select",
    "Slice",
    "Split",
    "SplitWithSizes",
    "Unbind",
    "Index",
    "Gather",
    "Cat",
    "Stack",
    "Clone",
    "ToCopy",
    "Copy",
    "CopySlices",
    "AsStrided",
    "Mul",
    "Div",
    "Add",
    "Sub",
    "Rsub",
    "Neg",
    "MaskedFill",
    "Where",
    "Tanh",
    "Clamp",
    "ClampMin",
    "ClampMax",
    "Maximum",
    "Minimum",
    "ConstantPadNd",
    "Repeat",
    "Roll",
    "Flip",
    "IndexPut",
    "NanToNum",
    "NativeDropout",
}


@dataclass(eq=False)
class Product:
    """A product of two activations: ``query`` (*lead, rows, channels) times ``key`` (*lead, columns, channels)."""

    query: Tensor
    key: Tensor
    out: Tensor
    is_of_activations: bool = True  # else one factor is a weight, or a table that all samples share
    marked: Tensor | None = None  # what the module goes on with
    is_logits: bool = False  # once a softmax has been found

    @property
    def lead(self) -> torch.Size:
        """Shape before rows and channels."""
        return self.query.shape[:-2]


@dataclass(eq=False)
class Call:
    """One attention call.

    Attributes:
        source: What was called.
        pairs: Queries and keys, shape (*lead, length, channels) each; several if the logits are a sum of products.
        value: Shape (*lead, length, channels); ``None`` if nothing was weighted.
        rest: Whatever else enters the logits: masks, biases.
        factors: Learned numbers that multiply all logits of a head, such as a temperature. The queries have them already.
        problem: Why the logits cannot be followed; empty if they can.
        is_by_hand: Whether it is a product and a softmax instead of a call of a function.
    """

    source: str
    pairs: list[tuple[Tensor, Tensor]]
    value: Tensor | None = None
    rest: list[Tensor] = field(default_factory=list)
    factors: list[Tensor] = field(default_factory=list)
    problem: str = ""
    is_by_hand: bool = False


class Trace(TorchFunctionMode):
    """Records attention calls in :attr:`calls`, and answers them; :attr:`unfollowed` names other products of activations.

    Args:
        given: The inputs of the module. What depends on them is an activation; a product with anything else, a projection.
        products: Products of an earlier run. They answer for those of this run, so that nothing behind them may change.
        sums: Whether logits may be a sum of products; else all but one of them are a bias.
        factor: Multiplies whatever weights project.
    """

    def __init__(self, given: Any, products: Sequence[Product] = (), sums: bool = True, factor: float = 1.0) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.products: list[Product] = []
        self.unfollowed: list[str] = []
        self._earlier = products
        self._sums = sums
        self._factor = factor
        self._is_paused = False
        self._activations = WeakIdKeyDictionary()
        self._mark_activations(given)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            number = len(self.calls)
            with self, _without_dispatch():
                out = func(*args, **kwargs)
            for call in self.calls[number:]:
                call.source, call.is_by_hand = "multi_head_attention_forward", False
            return out
        if func in BADDBMMS:
            with self:
                return as_sum(func, args, kwargs)
        # Hooks of activation checkpointing would save nothing here, and run the function again without the trace.
        with torch.autograd.graph.saved_tensors_hooks(_same, _same):
            out = self._answer(func, args, kwargs)
        are_activations = [tensor in self._activations for tensor in _tensors((args, kwargs))]
        if self._factor != 1 and func in _PROJECTS and any(are_activations) and not all(are_activations):
            out = out * self._factor
        is_several = func is torch.einsum and len(are_activations) > 2
        if (func in _CONTRACT or is_several) and sum(are_activations) > 1:
            self.unfollowed.append(f"torch.{func.__name__}")
        if any(are_activations) and isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            self.unfollowed.append(f"torch.ops.{func}")
        if any(are_activations):
            name = getattr(func, "__name__", "")
            in_place = args[:1] if name.endswith("_") or name == "__setitem__" else ()
            self._mark_activations((out, in_place))
        return out

    def flex_attention(
        self, original: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Answers a call of FlexAttention, which is no torch function."""
        score_mod = args[0] if args else kwargs.get("score_mod")
        self.calls.append(Call("flex_attention", [(query, key)], value, list(_captured(score_mod))))
        out = _constant_output(query, value)
        if kwargs.get("return_lse") or kwargs.get("return_aux") is not None:
            out = original(query.detach(), key.detach(), value.detach(), *args, **kwargs)
        self._mark_activations(out)
        return out

    def attend(self, kernel: RegisteredKernel, args: Any, kwargs: Any) -> Any:
        """Answers a call of a registered function by something of the same shapes."""
        self._is_paused = True
        try:
            with torch.no_grad():
                given, out = _called(kernel, args, kwargs)
            looked = kernel.look("", args, kwargs, out, *given)
        finally:
            self._is_paused = False
        self.calls.append(Call(kernel.name, [(looked.query, looked.key)], looked.value, looked.rest))
        generator = torch.Generator().manual_seed(0)

        def constant(x: Any) -> Any:  # not zeros, which hide what multiplies them
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            dtype = looked.query.dtype if x.dtype is torch.bfloat16 else x.dtype
            return torch.randn(x.shape, generator=generator).to(x.device, dtype)

        answer = tree_map(constant, out)
        self._mark_activations(answer)
        return answer

    def _mark_activations(self, tree: Any) -> None:
        for tensor in _tensors(tree):
            self._activations[tensor] = True

    def _answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is SDPA:
            return self._fused(*args, **kwargs)
        if func in SOFTMAXES or func in EXPONENTIALS:
            return self._softmax(func, args, kwargs)
        if func in MATMULS:
            return self._product(func, args, kwargs)
        return func(*args, **kwargs)

    def _fused(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        call = Call("scaled_dot_product_attention", [(query, key)], value)
        if attn_mask is not None and attn_mask.is_floating_point():
            call.rest.append(attn_mask)
        self.calls.append(call)
        return _constant_output(query, value)

    def _softmax(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        logits = args[0] if args else kwargs["input"]
        dim = -1 if func in EXPONENTIALS else kwargs.get("dim", args[1] if len(args) > 1 else -1)
        products, obstacle = _products_behind(logits)
        # The exponential of something smaller, such as of the largest logits, weighs nothing.
        if not products or (func in EXPONENTIALS and logits.numel() < products[0].out.numel()):
            return func(*args, **kwargs)
        # Without weights in them, they are masks, as Longformer makes.
        products = [p for p in products if p.query.requires_grad or p.key.requires_grad] or products
        call = Call(func.__name__, [], rest=[logits], problem=obstacle, is_by_hand=True)
        # Products of another arrangement, such as those of a table of positions, are part of the rest.
        own = [p for p in products if p.is_of_activations] or products
        main = next((p for p in own if p.out.shape == logits.shape == (*p.lead, *p.out.shape[-2:])), own[0])
        for product in (p for p in products if p.lead == main.lead) if self._sums else [main]:
            rows, columns = product.out.shape[-2:]
            if not product.is_logits and (dim % logits.ndim == logits.ndim - 2 or columns != logits.shape[dim] == rows):
                product.query, product.key = product.key, product.query
            product.is_logits = True
            call.pairs.append((product.query, product.key))
        if len(call.pairs) == 1 and self._sums:
            _take_factor(call, main, logits)
        others = [p for p in products if p is not main and p.lead == main.lead and p.is_of_activations]
        if others and not self._sums:  # they are no bias, as a product of queries and a table of positions is
            call.problem = call.problem or "what enters its softmax is more than the products of its queries and keys"
        if logits.shape[dim] < min(main.out.shape[-2:]):
            call.problem = call.problem or f"of {tuple(main.out.shape)} logits it weighs {logits.shape[dim]} at a time"
        self.calls.append(call)
        with torch.no_grad():
            out = func(logits.clone(), *args[1:], **{name: arg for name, arg in kwargs.items() if name != "input"})
        return _mark(torch.full_like(out, 1 / logits.shape[dim]), call)

    def _product(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        a, b = _operands(func, args, kwargs)
        if a is None or b is None or not self._is_product(func, a, b):
            return func(*args, **kwargs)
        for probabilities, value in ((a, b), (b, a)):
            for call in _marks_behind([probabilities.grad_fn], Call)[0]:
                return self._weighted(func, args, kwargs, call, probabilities is a, value)
        pair = _einsum_pair(args[0], a, b) if func is torch.einsum else (a, b.mT)
        out = func(*args, **kwargs)
        if pair is None:
            self.unfollowed.append("torch.einsum")
            return out
        query, key = (x[(None,) * (out.ndim - x.ndim)] for x in pair)
        is_shared = out.ndim > 2 and query.shape[0] != key.shape[0]
        are_activations = a in self._activations and b in self._activations
        product = Product(query, key, out, are_activations and not is_shared)
        self.products.append(product)
        number = len(self.products) - 1
        if (
            number < len(self._earlier)
            and self._earlier[number].is_logits
            and self._earlier[number].out.shape == out.shape
        ):
            out = self._earlier[number].out
        product.marked = _mark(out, product)
        return product.marked

    def _is_product(self, func: Any, a: Tensor, b: Tensor) -> bool:
        """Not a projection; learned queries are several matrices, as the weight of a projection is not."""
        if (a in self._activations) == (b in self._activations):
            return True
        return func is not torch.einsum and min(a.ndim, b.ndim) > 2

    def _weighted(self, func: Any, args: Any, kwargs: Any, call: Call, is_first: bool, value: Tensor) -> Tensor:
        """Values, weighted by the probabilities of a call: nothing behind depends on them."""
        if call.value is None:
            call.value = value
        cut = value.detach()
        replaced = [cut if arg is value else arg for arg in args]
        return func(*replaced, **{name: cut if arg is value else arg for name, arg in kwargs.items()})


#: Traces that are running, innermost last. What is compiled in one, as by Hugging Face, outlives it.
_running: list[Trace] = []


#: Whether calls of FlexAttention are sent to the running trace, if there are any.
_is_cared_for = False


@contextmanager
def flex_attention_traced(is_called: bool = True) -> Iterator[None]:
    """Sends calls of FlexAttention to the running trace, wherever it was imported, compiled or not.

    Enter it once for all traces of a search: it looks through every module that Python has imported.

    Args:
        is_called: Whether there are any such calls, if that is known.
    """
    global _is_cared_for
    flex = sys.modules.get("torch.nn.attention.flex_attention")
    if flex is None or _is_cared_for:
        yield
        return
    original = unwrap(flex.flex_attention)

    def flex_attention(*args: Any, **kwargs: Any) -> Any:
        return _running[-1].flex_attention(original, *args, **kwargs) if _running else original(*args, **kwargs)

    with ExitStack() as stack:
        for module in list(sys.modules.values()) if is_called else ():
            for name, value in list(vars(module).items()) if hasattr(module, "__dict__") else ():
                # By name first, for speed; what wraps a function has its name.
                if type(value) is FunctionType and value.__name__ == "flex_attention" and unwrap(value) is original:
                    stack.callback(setattr, module, name, value)
                    setattr(module, name, flex_attention)
        _is_cared_for = True
        try:
            yield
        finally:
            _is_cared_for = False


@contextmanager
def tracing(trace: Trace) -> Iterator[Trace]:
    """Runs under the trace, FlexAttention included."""
    with flex_attention_traced(), trace:
        _running.append(trace)
        looking.append(trace)
        try:
            yield trace
        finally:
            looking.pop()
            _running.pop()


class _Mark(torch.autograd.Function):
    """Leaves a tensor as it is; its node in the graph says what the tensor is."""

    @staticmethod
    def forward(x: Tensor, anchor: Tensor, what: Product | Call) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.what = inputs[2]

    @staticmethod
    def vmap(*_: Any) -> Any:
        raise NotImplementedError("attention inside of torch.vmap is not followed")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        # Logits depend on queries and keys, which are outputs of their own.
        is_cut = isinstance(ctx.what, Call) or ctx.what.is_logits
        return None if is_cut else grad, None, None


def _same(x: Tensor) -> Tensor:
    return x


def _mark(x: Tensor, what: Product | Call) -> Tensor:
    return _Mark.apply(x, torch.zeros((), requires_grad=True), what)


def _products_behind(x: Tensor) -> tuple[list[Product], str]:
    """The products that logits are made of, and what stands between if it mixes heads or channels; empty if nothing does."""
    products, beyond = _marks_behind([x.grad_fn], Product)
    if products:
        return products, ""
    # One unknown function away; what is further away is hardly logits any more, nor is a gate.
    for node in (node for node in beyond if _name(node) != "Sigmoid"):
        products, _ = _marks_behind([child for child, _ in node.next_functions], Product)
        if products:
            return products, f"{_name(node)} stands between the product of queries and keys and the softmax"
    return [], ""


def _take_factor(call: Call, product: Product, logits: Tensor) -> None:
    """Takes a learned number that multiplies all logits of a head for a gain of the queries, and the rest without it."""
    assert product.marked is not None
    (slope,) = torch.autograd.grad(
        logits, product.marked, torch.ones_like(logits), create_graph=True, allow_unused=True
    )
    if slope is None or not slope.requires_grad:
        return
    if slope.shape != logits.shape:
        return
    visible = (slope != 0) & product.marked.isfinite()
    slope = slope.masked_fill(~visible, 0)
    factor = slope.sum((-2, -1), keepdim=True) / visible.sum((-2, -1), keepdim=True).clamp_min(1)
    if not bool(((slope - factor).abs() <= 1e-5 * factor.abs())[visible].all()):
        return
    own = factor * product.marked.detach().masked_fill(~visible, 0)
    rest = logits - own
    call.rest = [rest.masked_fill(visible & (rest.abs() < 1e-5 * own.abs().max()), 0)]
    call.pairs = [(factor * product.query, product.key)]
    call.factors = [factor]


def _marks_behind(nodes: list[Any], kind: type) -> tuple[list[Any], list[Any]]:
    """Marks that are reached by elementwise functions and changes of shape alone, and the nodes where the search ended."""
    found: list[Any] = []
    ends: list[Any] = []
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        what = getattr(node, "what", None)
        if isinstance(what, kind):
            found.append(what)
        elif what is None and _name(node) in _ELEMENTWISE:
            nodes += [child for child, _ in node.next_functions]
        elif what is None:
            ends.append(node)
    return list(dict.fromkeys(found)), ends


def _name(node: Any) -> str:
    return re.sub(r"^torch::autograd::|Backwards?\d*$", "", node.name())


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Tensors among arguments, also those in objects such as a cache."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, type)):
            for value in vars(leaf).values():
                items = value if isinstance(value, (list, tuple)) else (value,)
                for item in items:
                    if isinstance(item, Tensor):
                        yield item
                    elif hasattr(item, "__dict__") and not isinstance(item, (nn.Module, type)):
                        yield from (own for own in vars(item).values() if isinstance(own, Tensor))


def _captured(function: Any) -> Iterator[Tensor]:
    """Tensors with a gradient that a function such as a score_mod closes over."""
    for cell in getattr(function, "__closure__", None) or ():
        value = cell.cell_contents
        if isinstance(value, Tensor) and value.requires_grad:
            yield value
        elif callable(value):
            yield from _captured(value)


def _called(kernel: RegisteredKernel, args: Any, kwargs: Any) -> tuple[tuple[Any, Any], Any]:
    """What a registered function is given and returns: in the precision at hand or, if it refuses that, in bfloat16."""

    def given(dtype: torch.dtype | None) -> Any:
        def cast(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.detach().to(dtype if x.is_floating_point() else None)

        return tree_map(cast, (args, kwargs))

    own = given(None)
    try:
        return own, kernel.run(*own)
    except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError):
        own = given(torch.bfloat16)
        return own, kernel.run(*own)


def _constant_output(query: Tensor, value: Tensor) -> Tensor:
    """The output of uniform attention, without a path to queries, keys and values in the graph."""
    mean = value.detach().mean(-2, keepdim=True)
    heads = query.shape[-3] if query.ndim > 2 else 1
    if mean.ndim > 2 and mean.shape[-3] not in (1, heads):
        mean = mean.repeat_interleave(heads // mean.shape[-3], -3)
    lead = torch.broadcast_shapes(query.shape[:-2], mean.shape[:-2])
    return mean.expand(*lead, query.shape[-2], mean.shape[-1]).contiguous()


def _operands(func: Any, args: Any, kwargs: Any) -> tuple[Tensor | None, Tensor | None]:
    """The two factors of a product, if they are batches of matrices."""
    factors = [*args, *kwargs.values()]
    if func is torch.einsum:
        factors = list(args[1:]) if len(args) != 2 else list(args[1])
    is_pair = len(factors) >= 2 and all(isinstance(factor, Tensor) and factor.ndim > 1 for factor in factors[:2])
    return (factors[0], factors[1]) if is_pair and not (func is torch.einsum and len(factors) > 2) else (None, None)


def _einsum_pair(equation: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
    """The operands of an einsum as (*lead, rows, channels) and (*lead, columns, channels), if it is a batched product."""
    roles = einsum_roles(equation, (a, b))
    if roles is None:
        return None
    left, right, out, row, column = roles
    if len(left) != a.ndim or len(right) != b.ndim or len(set(left)) != a.ndim or len(set(right)) != b.ndim:
        return None
    contracted = [x for x in left if x in right and x not in out]
    if not contracted or set(left) | set(right) != set(contracted) | set(out):
        return None
    lead = [x for x in out if x not in (row, column)]

    def laid_out(x: Tensor, own: str, length: str) -> Tensor:
        order = [*(letter for letter in lead if letter in own), length, *contracted]
        x = x.permute([own.index(letter) for letter in order]).flatten(len(order) - len(contracted))
        for i, letter in enumerate(lead):
            x = x if letter in own else x.unsqueeze(i)
        return x

    return laid_out(a, left, row), laid_out(b, right, column)


@contextmanager
def _without_dispatch() -> Iterator[None]:
    """Lets a mode see the calls inside of torch's ``multi_head_attention_forward``, which else hands itself over whole."""
    functional: Any = F
    dispatches = functional.has_torch_function
    functional.has_torch_function = lambda *_: False
    try:
        yield
    finally:
        functional.has_torch_function = dispatches
