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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

RESHAPES = ("view", "_unsafe_view", "reshape")
VIEWS = ("expand", "transpose", "permute", "unsqueeze", "squeeze", "slice", "select")
FACTORS = ("mul", "div")
PASSED = ("alias", "detach", "clone", "_to_copy", "add", "where", "masked_fill", "tanh", "maximum")


class Logits(TorchDispatchMode):
    """Calls ``attended(logits, visible)`` for every softmax over products of queries and keys."""

    def __init__(self, attended: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.attended = attended
        # Every tensor that a product became, with the product as it was before masks and biases; the tensors are kept, so
        # that no other can have the id of one.
        self.products: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if name in ("_softmax", "_safe_softmax"):
            if (product := self.product(args[0])) is not None:
                self.attended(product, args[0].double().softmax(args[1]) > 0)
            return func(*args, **kwargs)
        product = self.after(name, func, args, kwargs)
        output = func(*args, **kwargs)
        if product is not None:
            self.products[id(output)] = output, product
        elif isinstance(output, Tensor):
            self.products.pop(id(output), None)  # written over in place
        return output

    def product(self, value: Any) -> Tensor | None:
        return self.products[id(value)][1] if isinstance(value, Tensor) and id(value) in self.products else None

    def after(self, name: str, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """The product that the output of an operation stands for."""
        if name == "bmm":
            return torch.bmm(args[0].double(), args[1].double())
        if name == "baddbmm":  # beta · input + alpha · product
            return kwargs.get("alpha", 1) * torch.bmm(args[1].double(), args[2].double())
        of = [leaf for leaf in tree_leaves((args, kwargs)) if self.product(leaf) is not None]
        if len(of) != 1:
            return None
        product = self.product(of[0])
        assert product is not None
        if name in RESHAPES:
            return product.reshape(args[1])
        if name in VIEWS:
            return func(product, *args[1:], **kwargs)
        if name in FACTORS and of[0] is args[0]:
            factor = args[1]
            if isinstance(factor, Tensor) and factor.numel() > 1:
                return None
            return product * factor if name == "mul" else product / factor
        return product if name in PASSED else None


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
