"""An oracle for the maximum logits of any model, from its elementary operations only.

It shares no code or idea with the library under test: it knows no modules, projections, tensor names or attention
functions, and patches nothing. A ``TorchDispatchMode`` shows every elementary operation of a model in float64. Each batched
matrix product is a candidate for queries times keys. The oracle follows it to a softmax, through reshapes and factors, which
it applies, and through additive masks, position biases, soft-caps and fills, which it does not. A pair is visible where the
softmax gives a probability above zero. An unknown operation ends the trail, and the oracle has no answer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

RESHAPES = ("view", "_unsafe_view", "reshape")
VIEWS = ("expand", "transpose", "permute", "unsqueeze", "squeeze", "slice", "select", "t", "roll")
FACTORS = ("mul", "div")
SUMS = ("add", "sub", "rsub")
PASSED = ("alias", "detach", "clone", "_to_copy", "where", "masked_fill", "tanh", "maximum", "cat", "clamp", "copy")


class Logits(TorchDispatchMode):
    """Calls ``attended(logits, visible)`` for every softmax over products of queries and keys.

    Logits may be a sum of products, as of contents and of positions; those that an earlier softmax took do not count.

    Args:
        attended: What is called.
        of_heads: Whether a factor may differ from head to head; then the products of a sum are a list.
    """

    supports_higher_order_operators = True

    def __init__(self, attended: Callable[[Any, Tensor], None], of_heads: bool = False) -> None:
        super().__init__()
        self.attended, self.of_heads = attended, of_heads
        # Every tensor that products became, with the products by number as they were before masks and biases; the tensors
        # are kept, so that no other can have the id of one.
        self.products: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}
        self.made = 0
        self.taken: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_operation = isinstance(func, torch._ops.OpOverload)
        name = func._schema.name.removeprefix("aten::").rstrip("_") if is_operation else str(func)
        if name in ("_softmax", "_safe_softmax", "exp"):
            every = self.of(args[0])
            own = [product for number, product in every.items() if number not in self.taken] or list(every.values())
            if own:
                self.taken |= set(self.of(args[0]))
                self.attended(
                    own if self.of_heads else sum(own[1:], own[0]),
                    args[0].double().softmax(args[1] if name != "exp" else -1) > 0,
                )
            return func(*args, **kwargs)
        if name.startswith(("_scaled_dot_product", "flex_attention")):  # a fused kernel, where a model insists on one
            query, key = args[0].double(), args[1].double()
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            product = query @ key.mT
            self.attended([product] if self.of_heads else product, torch.ones_like(product, dtype=torch.bool))
            return func(*args, **kwargs)
        if not is_operation:
            return func(*args, **kwargs)
        products = self.after(name, func, args, kwargs)
        output = func(*args, **kwargs)
        if products:
            self.products[id(output)] = output, products
        elif isinstance(output, Tensor):
            self.products.pop(id(output), None)  # written over in place
        return output

    def of(self, value: Any) -> dict[int, Tensor]:
        return self.products[id(value)][1] if isinstance(value, Tensor) and id(value) in self.products else {}

    def after(self, name: str, func: Any, args: Any, kwargs: Any) -> dict[int, Tensor]:
        """The products that the output of an operation stands for."""
        if name in ("bmm", "baddbmm"):  # beta · input + alpha · product
            self.made += 1
            a, b = args[-2:]
            own = {self.made: kwargs.get("alpha", 1) * torch.bmm(a.double(), b.double())}
            return {**(self.of(args[0]) if name == "baddbmm" else {}), **own}
        read = args[1:] if name == "copy" else args
        before = [leaf for leaf in tree_leaves((read, kwargs)) if self.of(leaf)]
        if len(before) == 2 and name in SUMS:
            a, b = map(self.of, before)
            sign = 1 if name == "add" else -1
            return {number: a.get(number, 0) + sign * b.get(number, 0) for number in a | b}
        if len(before) != 1:
            return {}
        found: dict[int, Tensor] = {}
        for number, product in self.of(before[0]).items():
            with suppress(RuntimeError, IndexError):  # it has another shape than the logits
                if (followed := self.follow(name, func, product, before[0], args, kwargs)) is not None:
                    found[number] = followed
        return found

    def follow(self, name: str, func: Any, product: Tensor, before: Tensor, args: Any, kwargs: Any) -> Tensor | None:
        if name in RESHAPES:
            return product.reshape(args[1])
        if name in VIEWS:
            return func(product, *args[1:], **kwargs)
        if name in FACTORS and before is args[0]:
            factor = args[1]
            if isinstance(factor, Tensor) and factor.numel() > 1 and not self.of_heads:
                return None
            return product * factor if name == "mul" else product / factor
        return product if name in (*PASSED, *SUMS) else None


@torch.no_grad()
def brute_force(
    model: nn.Module, attention: Iterable[str], heads: int, inputs: Any, queries: Tensor | None = None
) -> list[Tensor]:
    """Largest visible logit of every head of some modules of a model, float64.

    Args:
        model: Not modified: a copy runs in float64, with torch's attention in plain operations.
        attention: The names of the modules, in order.
        heads: Number of heads of each.
        inputs: Positional and keyword arguments of the model.
        queries: Which queries count, shape (batch, length); ``None`` is all.
    """
    model = copy.deepcopy(model).double()
    maxima: dict[str, Tensor] = {name: torch.full((heads,), -torch.inf, dtype=torch.float64) for name in attention}
    inside: list[str] = []

    def attended(logits: Tensor, visible: Tensor) -> None:
        assert inside, "attention outside of the modules that were named"
        if logits.ndim == 3:  # heads and batch in one dimension, the batch outermost
            logits, visible = (x.unflatten(0, (-1, heads)) for x in (logits, visible))
        assert logits.ndim == 4 and logits.shape[1] == heads
        if queries is not None:
            visible = visible & queries[:, None, :, None]
        own = logits.masked_fill(~visible, -torch.inf).amax((0, 2, 3))
        maxima[inside[-1]] = maxima[inside[-1]].maximum(own)

    for name in maxima:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, name=name: inside.append(name))
        module.register_forward_hook(lambda *_: inside.pop() and None)
    args, kwargs = tree_map(
        lambda leaf: leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, inputs
    )
    with sdpa_kernel(SDPBackend.MATH), Logits(attended):
        model(*args, **kwargs)
    assert all(own.isfinite().all() for own in maxima.values()), f"the oracle has no answer: {maxima}"
    return list(maxima.values())


@torch.no_grad()
def products(model: nn.Module, inputs: Any) -> list[list[Tensor]]:
    """The products of queries and keys of every attention in a forward of a float64 model, before masks and biases."""
    found: list[list[Tensor]] = []
    eager = torch.compiler.set_stance("force_eager")
    with (
        eager,
        sdpa_kernel(SDPBackend.MATH),
        Logits(lambda own, _: found.append([x.clone() for x in own]), of_heads=True),
    ):
        model(**inputs)
    return found
