"""Finds where a module that attends by hand has its logits: which product, and which softmax.

Every product is followed to the softmaxes that it enters (see :mod:`.follow`). The products that are logits are those that
the layout scales; what else is added to them, such as queries times relative positions, is a bias. Each is changed in turn;
the softmaxes whose input changes by what was followed have their logits from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_muonclip.kernels.hidden import HIDDEN
from lightning_muonclip.qk_clip.describe.follow import (
    BADDBMMS,
    EXPONENTIALS,
    MATMULS,
    SOFTMAXES,
    Part,
    Ways,
    as_sum,
    before_in_place,
    entering,
    follow,
    product_of,
)
from lightning_muonclip.qk_clip.describe.infer import Layout, Unclear
from lightning_muonclip.qk_clip.describe.isolate import Isolated
from lightning_muonclip.qk_clip.describe.layout import KEY_KINDS, QUERY_KINDS
from lightning_muonclip.qk_clip.describe.prove import deviation, factors
from lightning_muonclip.qk_clip.describe.spec import Softmax


def locate(isolated: Isolated, layout: Layout) -> tuple[Softmax, ...]:
    """Every softmax over products, in order, if some of them have the logits of an attention.

    Raises:
        Unclear: If the logits cannot be measured at one of them.
    """
    base = _run(isolated, {})
    found: dict[int, list[int]] = {}
    whole: set[int] = set()
    for product in reversed(_logits(isolated, layout, base)):
        out = base.products[product]
        # Large beside the rounding of modules that compute logits in float32, small beside any soft-cap.
        noise = 0.03 * torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
        # Later softmaxes do not see it through the outputs of earlier ones.
        before, after = (
            _run(isolated, {product: answer}, base.probabilities) for answer in (torch.zeros_like(out), noise)
        )
        for number, (a, b) in enumerate(zip(before.inputs, after.inputs)):
            change = (b - a).detach().nan_to_num()
            is_smaller = number in base.exponentials and change.numel() < noise.numel()  # such as of the largest logits
            own = found.get(number, [])
            # A projection changes the logits through a later product.
            if change.any() and not is_smaller and not any(before.differs(after, later) for later in own):
                found[number] = [*own, product]
                zero, one = (run.part(number, product) for run in (before, after))
                if not _follows(change, zero, one, a > HIDDEN):
                    whole.add(number)
    for number, own in found.items():
        joined = [product for product in own if len(base.part(number, product).numbers) > 1]
        if len(joined) > 1 and layout.sides and not _share_channels(isolated, layout, base, joined):
            raise Unclear("its softmax is over several products, whose heads are different channels", final=True)
        if len({base.place(number, product) for product in own}) > 1 or number in whole:
            more = {product: base.products[product] + base.pure[product] for product in own}
            doubled = _run(isolated, more, base.probabilities)
            if layout.sides and not _is_double(base.inputs[number], doubled.inputs[number]):
                raise Unclear("what enters its softmax is more than the products of its queries and keys")
            whole.add(number)
    if not found:
        return ()
    return tuple(
        Softmax(len(parts), base.place(number, found[number][0]) if number in found else None, number in whole)
        for number, parts in enumerate(base.parts)
        if parts
    )


def _run(isolated: Isolated, answers: Mapping[int, Tensor], probabilities: Sequence[Tensor] = ()) -> _Numbered:
    mode = _Numbered(answers, probabilities)
    isolated.run_under(mode)
    return mode


def _logits(isolated: Isolated, layout: Layout, base: _Numbered) -> list[int]:
    """The products that follow when one side of the heads is doubled; all, if only what is behind them scales."""
    factor = 4 if layout.is_tied else 2
    with isolated.scaled(_doubled(isolated, layout), _offsets(layout)):
        after = _run(isolated, {}, base.probabilities)  # nothing behind a softmax may change
    limit = 1e-6 if isolated.dtype is torch.float64 else 1e-3
    follows = [deviation(factor * a, b) < limit for a, b in zip(base.pure, after.pure)]
    return [number for number, is_logits in enumerate(follows) if is_logits or not any(follows)]


def _share_channels(isolated: Isolated, layout: Layout, base: _Numbered, products: Sequence[int]) -> bool:
    """Whether one channel is in all products or in none, as in chunks of queries or of keys, but not of heads."""
    name, factor = next(iter(_doubled(isolated, layout).items()))
    is_scaled = (factor != 1).flatten()
    is_first = (is_scaled & (is_scaled.cumsum(0) == 1)).view(factor.shape)
    with isolated.scaled({name: torch.where(is_first, factor, 1.0)}, _offsets(layout)):
        after = _run(isolated, {}, base.probabilities)
    return len({base.differs(after, product) for product in products}) < 2


def _doubled(isolated: Isolated, layout: Layout) -> dict[str, Tensor]:
    """What doubles one side of the heads."""
    heads = torch.full((max(layout.num_heads, layout.num_key_value_heads),), 2.0)
    of = dict.fromkeys(QUERY_KINDS if "q" in layout.sides else KEY_KINDS, heads)
    return factors(layout, of, isolated.params)


def _offsets(layout: Layout) -> dict[str, float]:
    return {name: table.offset for name, table in layout.tables}


def _is_double(once: Tensor, twice: Tensor) -> bool:
    """Whether logits are twice what they were, wherever they are visible."""
    return deviation(*(x.masked_fill(once < HIDDEN, 0) for x in (2 * once, twice))) < 1e-3


def _follows(change: Tensor, before: Part, after: Part, visible: Tensor) -> bool:
    """Whether the input of a softmax changes by what a product changes in it, where it changes, or wherever it is visible.

    What is subtracted from whole rows, such as their maximum, changes no probability, and does not count. (The maximum
    itself then stays as it is.)
    """
    expected = (after.factor * after.values - before.factor * before.values).nan_to_num()  # -inf beside the product
    if expected.shape != change.shape:
        return False
    return any(_is_shifted(change.double(), expected.double(), where.double()) for where in (change != 0, visible))


def _is_shifted(x: Tensor, by_rows: Tensor, where: Tensor) -> bool:
    """Whether two tensors differ by one number a row; as they are, if rows have one number each."""
    count = where.sum(-1, keepdim=True)
    x, expected = x * where, by_rows * where
    if bool((count > 1).any()):
        x, expected = (y - where * y.sum(-1, keepdim=True) / count.clamp_min(1) for y in (x, expected))
    return bool(((x - expected).abs() < 1e-3 * expected.abs().max()).all())


class _Numbered(TorchFunctionMode):
    """Keeps products and softmaxes; answers some of them by others.

    Attributes:
        parts: For every softmax, the products in its input.
        exponentials: The numbers of those that are exponentials.
    """

    def __init__(self, answers: Mapping[int, Tensor], probabilities: Sequence[Tensor]) -> None:
        super().__init__()
        self.products: list[Tensor] = []
        self.pure: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.probabilities: list[Tensor] = []
        self.parts: list[tuple[Part, ...]] = []
        self.exponentials: set[int] = set()
        self._ways: Ways = []
        self._answers = answers
        self._probabilities = probabilities

    def differs(self, other: _Numbered, product: int) -> bool:
        """Whether a product is another one in another run."""
        return not torch.equal(self.products[product], other.products[product])

    def place(self, softmax: int, product: int) -> int:
        """Which of the products in the input of a softmax it is.

        Raises:
            Unclear: If it cannot be followed to there.
        """
        for place, part in enumerate(self.parts[softmax]):
            if product in part.numbers and part.values is not None:
                return place
        raise Unclear(
            "its logits cannot be measured: what is made of its products before the softmax cannot be followed"
        )

    def part(self, softmax: int, product: int) -> Part:
        """A product in the input of a softmax."""
        return self.parts[softmax][self.place(softmax, product)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SOFTMAXES or func in EXPONENTIALS:
            return self._softmax(func, args, kwargs)
        if func in BADDBMMS:
            with self:
                return as_sum(func, args, kwargs)
        before_in_place(self._ways, func, args, kwargs)
        out = func(*args, **kwargs)
        if func in MATMULS:
            return self._product(func, args, out)
        follow(self._ways, func, args, kwargs, out)
        return out

    def _softmax(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        logits = args[0] if args else kwargs["input"]
        self.inputs.append(logits.detach().clone())
        number = len(self.probabilities)
        if func in EXPONENTIALS:
            self.exponentials.add(number)
        self.parts.append(entering(self._ways, logits, func in EXPONENTIALS))
        out: Tensor = func(*args, **kwargs)
        out = self._probabilities[number].clone() if number < len(self._probabilities) else out
        self.probabilities.append(out.detach().clone())
        return out

    def _product(self, func: Any, args: Any, out: Tensor) -> Tensor:
        number = len(self.products)
        answer = self._answers.get(number)
        self.pure.append(out.detach().clone())
        out = out if answer is None else answer.clone()  # the module may change it in place
        self.products.append(out.detach().clone())
        self._ways.append((out, (product_of(number, func, args, out.detach().clone()),)))
        return out
