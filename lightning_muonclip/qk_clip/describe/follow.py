"""Follows products on their way to a softmax: where their elements are there, and what multiplies them, in every forward.

A factor on the weights scales a product and what multiplies it, such as a temperature, but no soft-cap, mask or bias. What
rearranges a tensor rearranges the values of the product too, and the index that tells the head of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BADDBMMS = {torch.baddbmm, Tensor.baddbmm, Tensor.baddbmm_}
MATMULS = {
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


def _named(*names: str) -> set[Any]:
    """Functions of torch and methods of tensors by name."""
    return {getattr(owner, name) for owner in (torch, Tensor) for name in names if hasattr(owner, name)}


_ADD = _named("add", "add_", "__add__", "__radd__", "__iadd__")
_SUBTRACT = _named("sub", "sub_", "subtract", "subtract_", "__sub__", "__isub__")
_SUBTRACT_FROM = _named("rsub", "__rsub__")
#: Functions after which elements of their first argument are elsewhere.
_ARRANGE = _named(
    *("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel"),
    *("permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "adjoint", "flip", "roll"),
    *("expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave", "__getitem__", "select", "narrow"),
    *("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "index_select", "gather", "take_along_dim"),
) | {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH")}
_JOIN = _named("cat", "concat", "concatenate", "stack")
_PAD = {F.pad}
#: Functions that take a tensor for its shape or dtype alone.
_LIKE = _named(
    *("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "empty_like", "full_like", "ones_like"),
    *("rand_like", "randn_like", "zeros_like"),
)
#: Functions of which the first argument alone is followed.
_OF_FIRST = _ARRANGE | _PAD | _named("to", "type_as")
#: Functions that put one tensor into places of another.
_PUT = _named("__setitem__")
#: Functions that write to their first argument.
_IN_PLACE = {
    getattr(Tensor, name)
    for name in dir(Tensor)
    if name.endswith("_") and not name.startswith("_") and type(getattr(Tensor, name)) is type(Tensor.add_)
} | _named("__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")))
#: Functions that do so if asked, and the place of that argument.
_MAYBE_IN_PLACE = {
    F.dropout: 3,
    F.alpha_dropout: 3,
    F.feature_alpha_dropout: 3,
    F.threshold: 3,
    F.relu: 1,
    F.relu6: 1,
    F.hardtanh: 3,
    F.elu: 2,
    F.leaky_relu: 2,
}


class Part(NamedTuple):
    """What one product is in a tensor that was made of it.

    Attributes:
        numbers: The number of the product; several, if they have been joined.
        size: Number of its elements.
        lead: Shape of the product before rows and columns.
        values: Its elements where they are in the tensor, ``-inf`` beside them; ``None`` if that cannot be told.
        factor: What multiplies them there besides, a number or a tensor that broadcasts; NaN if that cannot be told.
        leads: The index of every element along ``lead``, flattened; broadcasts. ``None`` if rows and columns are the last
            two dimensions of the tensor, as in the product.
    """

    numbers: tuple[int, ...]
    size: int
    lead: tuple[int, ...]
    values: Tensor | None
    factor: Any = 1.0
    leads: Tensor | None = None


#: What a forward has made of products: every tensor, and the products in it.
Ways = list[tuple[Tensor, tuple[Part, ...]]]


def product_of(number: int, func: Any, args: Any, out: Tensor) -> Part:
    """A product as it is made.

    Args:
        number: Its number, larger than those of earlier products.
        func: What has made it.
        args: Of what.
        out: The result, without what else may have been added.
    """
    is_einsum = func is torch.einsum
    places = _einsum_places(args) if is_einsum else tuple(range(out.ndim - 2))
    if places is None or out.ndim < 2:
        return Part((number,), out.numel(), (), None)
    lead = tuple(out.shape[i] for i in places)
    if places == tuple(range(out.ndim - 2)):
        return Part((number,), out.numel(), lead, out.detach())
    leads = torch.arange(math.prod(lead), device=out.device)
    leads = leads.view([out.shape[i] if i in places else 1 for i in range(out.ndim)])
    return Part((number,), out.numel(), lead, out.detach(), 1.0, leads)


def before_in_place(ways: Ways, func: Any, args: Any, kwargs: Any) -> None:
    """Keeps the values of what a function is about to overwrite."""
    place = _MAYBE_IN_PLACE.get(func)
    is_asked = kwargs.get("inplace") or (place is not None and len(args) > place and args[place])
    if not args or not (func in _IN_PLACE or is_asked):
        return
    for number, (tensor, parts) in enumerate(ways):
        if any(part.values is not None for part in parts) and _is_same_memory(tensor, args[0]):
            ways[number] = (
                tensor,
                tuple(own if own.values is None else own._replace(values=own.values.clone()) for own in parts),
            )


def follow(ways: Ways, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Adds what a function has made of what is followed."""
    if not ways:
        return
    if func in _PUT:
        _put(ways, *args)
        return
    operands = [
        (x, parts_of(ways, x)) for x in tensors_in(args[:1] if func in _OF_FIRST else (*args, *kwargs.values()))
    ]
    followed = [(x, parts) for x, parts in operands if parts]
    if not followed or func in _LIKE:
        return
    if func in _JOIN:
        ways.append((out, _joined(func, args, kwargs, operands)))
    elif func in _ARRANGE or func in _PAD:
        _arrange(ways, func, args, kwargs, out, *followed[0])
    elif isinstance(out, Tensor) and out.is_floating_point():
        ways.append((out, _computed(func, args, kwargs, out, followed)))
    elif isinstance(out, tuple):  # such as the largest ones, which may be anywhere
        ways += [(own, tuple(_unknown(part) for _, parts in followed for part in parts)) for own in tensors_in(out)]


def parts_of(ways: Ways, x: Any) -> tuple[Part, ...]:
    """The products that a tensor is made of, in the order in which they were made."""
    for tensor, parts in reversed(ways):
        if tensor is x:
            return parts
    return ()


def entering(ways: Ways, logits: Tensor, is_exponential: bool) -> tuple[Part, ...]:
    """The products that a softmax weighs by; the exponential of something smaller, such as a maximum, weighs nothing."""
    return tuple(part for part in parts_of(ways, logits) if not is_exponential or logits.numel() >= part.size)


def maxima_of(part: Part, logits: Tensor) -> Tensor:
    """The largest logit of every leading index of a product.

    Args:
        part: The product in the input of a softmax.
        logits: The logits, of the shape of the input; ``-inf`` where they are hidden.

    Returns:
        Of shape ``part.lead``.
    """
    if part.leads is None:
        return logits.amax((-2, -1))
    leads = part.leads[(None,) * (logits.ndim - part.leads.ndim)]
    for dim in range(logits.ndim):
        if leads.shape[dim] == 1 or leads.stride(dim) == 0:  # they are alike along it
            logits, leads = logits.amax(dim, keepdim=True), leads.narrow(dim, 0, 1)
    found = logits.new_full((math.prod(part.lead),), -math.inf)
    return found.scatter_reduce(0, leads.reshape(-1), logits.reshape(-1), "amax").view(part.lead)


def _computed(
    func: Any, args: Any, kwargs: Any, out: Tensor, followed: list[tuple[Tensor, tuple[Part, ...]]]
) -> tuple[Part, ...]:
    """The products in what a function has computed element by element, as far as one can tell."""
    if func in _MULTIPLY or func in _DIVIDE or func in _NEGATE:
        x, parts = followed[0]
        by = _by(func, args, kwargs, x) if len(followed) == 1 else math.nan
        return tuple(_broadcast(part._replace(factor=part.factor * by), x, out) for part in parts)
    made: dict[tuple[int, ...], Part] = {}
    for x, parts in followed:
        by = _weight(func, args, kwargs, x)
        for part in parts:
            own = _broadcast(part._replace(factor=part.factor * by), x, out)
            if part.numbers not in made or made[part.numbers].values is None:
                made[part.numbers] = own
    return tuple(made[numbers] for numbers in sorted(made))


def _broadcast(part: Part, x: Tensor, out: Tensor) -> Part:
    """A part of what has the shape of another tensor now."""
    if part.values is None or out.shape == x.shape:
        return part
    if not _fits(x.shape, out.shape):
        return _unknown(part)
    return part._replace(values=part.values.expand(out.shape), leads=_leads(part, x.shape))


def _unknown(part: Part) -> Part:
    """A part whose elements may be anywhere."""
    return Part(part.numbers, part.size, part.lead, None)


def _fits(shape: torch.Size, into: torch.Size) -> bool:
    """Whether a shape broadcasts into another."""
    return len(shape) <= len(into) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(into)))


def _arrange(ways: Ways, func: Any, args: Any, kwargs: Any, out: Any, x: Tensor, parts: tuple[Part, ...]) -> None:
    """Follows what puts elements elsewhere, by doing the same to the values and their indices."""
    outs = [out] if isinstance(out, Tensor) else list(out)
    made: list[list[Part]] = [[] for _ in outs]
    for part in parts:
        if part.values is None or (func in _PAD and (kwargs.get("mode") or "constant") != "constant"):
            for own in made:
                own.append(_unknown(part))
            continue
        is_number = _is_number(part.factor)
        values = _again(func, args, kwargs, x, part.values if is_number else part.factor * part.values, -math.inf)
        leads = _again(func, args, kwargs, x, _leads(part, x.shape), 0)
        factor = part.factor if is_number else 1.0
        for own, some, their in zip(made, values, leads):
            own.append(part._replace(values=some, factor=factor, leads=their))
    ways += [(own, tuple(new)) for own, new in zip(outs, made)]


def _again(func: Any, args: Any, kwargs: Any, x: Tensor, by: Tensor, beside: float) -> list[Tensor]:
    """Calls a function with one tensor in place of another, which need not be contiguous."""
    if func in _PAD:
        return [F.pad(by, args[1] if len(args) > 1 else kwargs["pad"], value=beside)]
    func = {Tensor.view: Tensor.reshape, Tensor.view_as: Tensor.reshape_as}.get(func, func)
    out = func(*[by if arg is x else arg for arg in args], **{n: by if arg is x else arg for n, arg in kwargs.items()})
    return [out] if isinstance(out, Tensor) else list(out)


def _leads(part: Part, shape: torch.Size) -> Tensor:
    """The index of every element along the leading dimensions of its product."""
    if part.leads is not None:
        return part.leads.expand(shape)
    assert part.values is not None
    count = math.prod(part.lead)
    return torch.arange(count, device=part.values.device).view(*part.lead, 1, 1).expand(shape)


def _joined(func: Any, args: Any, kwargs: Any, operands: list[tuple[Tensor, tuple[Part, ...]]]) -> tuple[Part, ...]:
    """The parts of several tensors that are joined, some of which may have none."""
    kwargs = {name: arg for name, arg in kwargs.items() if name != "tensors"}
    made = []
    for summand in _summands([parts for _, parts in operands]):
        whole, dtype = _together(summand)
        if dtype is not None:
            values, leads = [], []
            for (x, _), part in zip(operands, summand):
                if part is not None:
                    values.append(part.factor * part.values)
                    leads.append(_leads(part, x.shape))
                else:
                    values.append(torch.full_like(x, -math.inf, dtype=dtype))
                    leads.append(torch.zeros_like(x, dtype=torch.long))
            joined = (func(pieces, *args[1:], **kwargs) for pieces in (values, leads))
            whole = whole._replace(values=next(joined), leads=next(joined))
        made.append(whole)
    return tuple(made)


def _put(ways: Ways, x: Tensor, index: Any, value: Any) -> None:
    """Follows what is put into places of another tensor."""
    into, parts = parts_of(ways, x), parts_of(ways, value)
    if not into and not parts:
        return
    made = []
    for summand in _summands([into, parts]):
        whole, dtype = _together(summand)
        if dtype is not None:
            values = torch.full(x.shape, -math.inf, device=x.device, dtype=dtype)
            leads = torch.zeros(x.shape, device=x.device, dtype=torch.long)
            for part, own, place in zip(summand, (x, value), (..., index)):
                if part is not None:
                    values[place] = part.factor * part.values
                    leads[place] = _leads(part, own.shape)
                elif place is index:
                    values[index] = -math.inf
            whole = whole._replace(values=values, leads=leads)
        made.append(whole)
    ways.append((x, tuple(made)))


#: The parts of several tensors that become one; ``None`` for a tensor that has none of it.
_Summand = list[Part | None]


def _summands(pieces: Sequence[tuple[Part, ...]]) -> list[_Summand]:
    """Which parts of several tensors belong together: those of one product, or else the first of each, the second, ..."""
    numbers = [part.numbers for own in pieces for part in own]
    if len(set(numbers)) < len(numbers):
        by_numbers = [{part.numbers: part for part in own} for own in pieces]
        return [[own.get(n) for own in by_numbers] for n in sorted(set(numbers))]
    if len({len(own) for own in pieces if own}) == 1:
        return [[own[i] if own else None for own in pieces] for i in range(max(map(len, pieces)))]
    return [[_unknown(part)] for own in pieces for part in own]


def _together(summand: _Summand) -> tuple[Part, torch.dtype | None]:
    """One part of several, without values, and their dtype if it can have some."""
    parts = [part for part in summand if part is not None]
    numbers = tuple(sorted({number for part in parts for number in part.numbers}))
    whole = Part(numbers, sum(part.size for part in parts), parts[0].lead, None)
    values = [part.values for part in parts if part.values is not None and part.lead == whole.lead]
    return whole, values[0].dtype if len(values) == len(parts) else None


def _is_same_memory(one: Tensor, other: Any) -> bool:
    if one is other:
        return True
    if torch.compiler.is_compiling() or not isinstance(other, Tensor):
        return False
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


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


def _weight(func: Any, args: Any, kwargs: Any, x: Tensor) -> float:
    """What a sum multiplies a summand ``x`` by; 1 for any other function."""
    is_first = x is (args[0] if args else kwargs.get("input"))
    weight: float = kwargs.get("alpha", 1.0)
    if func in _SUBTRACT_FROM:
        return -weight if is_first else 1.0
    if is_first or not (func in _ADD or func in _SUBTRACT):
        return 1.0
    return -weight if func in _SUBTRACT else weight


def _is_number(factor: Any) -> bool:
    """Whether it is one number, which multiplies whatever the shape."""
    return not isinstance(factor, Tensor) or factor.numel() == 1


def einsum_roles(equation: str, operands: Sequence[Tensor]) -> tuple[str, str, str, str, str] | None:
    """The letters of an einsum of two operands: theirs, those of the result, and which of these are its row and column.

    Row and column are the last letters of the result that one operand alone has.
    """
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if not arrow or len(letters) != 2:
        return None
    unnamed = max(x.ndim - len(own.replace("...", "")) for x, own in zip(operands, letters))
    dots = "ZYXWVUTS"[: unnamed if "..." in inputs else 0]
    left, right, out = (own.replace("...", dots) for own in (*letters, out))
    rows = [x for x in out if x in left and x not in right]
    columns = [x for x in out if x in right and x not in left]
    return (left, right, out, rows[-1], columns[-1]) if rows and columns else None


def _einsum_places(args: Any) -> tuple[int, ...] | None:
    """The dimensions of an einsum's result that are neither its row nor its column."""
    roles = einsum_roles(args[0], args[1] if len(args) == 2 else args[1:])
    if roles is None:
        return None
    _, _, out, row, column = roles
    return tuple(i for i, letter in enumerate(out) if letter not in (row, column))


def tensors_in(args: Any) -> Iterator[Tensor]:
    """The tensors among the arguments of a function, and in lists among them."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from (item for item in arg if isinstance(item, Tensor))


def as_sum(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Calls ``baddbmm``, with which Bloom adds biases of positions to its logits, as a sum of two tensors.

    Called under a mode, it lets the mode see the product alone, and the sum.
    """
    addend, beta, a, b, alpha = _baddbmm(*args, **kwargs)
    product = alpha * torch.bmm(a, b)
    if func is Tensor.baddbmm_:
        return (addend.mul_(beta) if beta else addend.zero_()).add_(product)
    return beta * addend + product if beta else product


def followed_sum(ways: Ways, func: Any, args: Any, kwargs: Any) -> Tensor:
    """Calls ``baddbmm`` as it is, and follows its product and what that is added to."""
    addend, beta, *_ = _baddbmm(*args, **kwargs)
    parts = parts_of(ways, addend) if beta else ()
    added = beta * addend.detach() if beta else 0.0  # a copy, since the result may take its place
    out: Tensor = func(*args, **kwargs)
    parts = tuple(_broadcast(part._replace(factor=part.factor * beta), addend, out) for part in parts)
    ways.append((out, (*parts, product_of(len(ways), func, args, out.detach() - added))))
    return out


def _baddbmm(
    input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
) -> tuple[Tensor, float, Tensor, Tensor, float]:
    """The arguments of ``baddbmm``. Where ``beta`` is 0, ``input`` may be uninitialized."""
    return input, beta, batch1, batch2, alpha
