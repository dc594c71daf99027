"""Finds weights that hold several matrices, by what becomes of their output channels in a forward.

Channels that an operation takes together, or adds up, belong to one matrix. Where a forward cuts an output into pieces that
go different ways, so do the matrices that make them: gate and up, whose product is taken; the queries, keys and values of a
convolution; the inputs of a state space model. The same forward shows which dimension of a weight counts its outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from lightning_muonclip.qk_clip.describe.follow import tensors_in


class FusedWeight(NamedTuple):
    """A weight that holds several matrices.

    Attributes:
        dim: The dimension of its output channels.
        channels: Those of each matrix, which together are all.
        names: What the matrices are called, if that is known.
    """

    dim: int
    channels: list[Tensor]
    names: tuple[str, ...] = ()


#: By parameter name.
FusedWeights = dict[str, FusedWeight]

#: The position of the first factor among the arguments of a product.
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "linear": 0, "_grouped_mm": 0}

#: Operations that move elements or drop some, and so act on the numbers of channels as they do on the channels.
_MOVES = {
    *(
        "_unsafe_view",
        "_reshape_copy",
        "cat",
        "stack",
        "index",
        "index_select",
        "gather",
        "repeat",
        "repeat_interleave",
    ),
    *("flip", "roll", "constant_pad_nd", "pixel_shuffle", "pixel_unshuffle", "tril", "triu"),
}

#: Operations that change the type or the memory of a tensor alone.
_COPIES = {"_to_copy", "clone", "detach", "alias", "native_dropout"}
_FACTORS = {"mul", "mul_", "div", "div_"}
_LINEAR = _FACTORS | {"add", "add_", "sub", "sub_", "rsub", "neg"}


class _Weight:
    """What is known of one parameter.

    Attributes:
        dim: The dimension of its output channels.
        groups: Channels that belong together, as masks that have nothing in common.
        activated: The channels that went through a nonlinear function.
        is_gated: Whether some of its channels were multiplied with others.
        is_clear: Whether it was always used in the same way.
    """

    def __init__(self, param: Tensor) -> None:
        self.param = param
        self.dim: int | None = None
        self.groups: list[Tensor] = []
        self.activated: Tensor | None = None
        self.is_gated = False
        self.is_clear = True

    @property
    def is_whole(self) -> bool:
        """Whether nothing more can be learned: all channels belong together."""
        return not self.is_clear or (len(self.groups) == 1 and bool(self.groups[0].all()))

    def join(self, numbers: Tensor, activated: bool) -> None:
        """These channels, counted from 1, belong to one matrix."""
        assert self.dim is not None
        mask = torch.zeros(self.param.shape[self.dim] + 1, dtype=torch.bool, device=numbers.device)
        mask[_distinct(numbers).flatten().long()] = True
        mask = mask[1:].cpu()
        if activated:
            self.activated = mask if self.activated is None else self.activated | mask
        apart = [group for group in self.groups if not bool((group & mask).any())]
        for group in self.groups:
            if bool((group & mask).any()):
                mask = mask | group
        self.groups = [*apart, mask] if bool(mask.any()) else apart

    def outputs(self, matrix: Tensor) -> Tensor | None:
        """The numbers, from 1, of the output channels of a view (..., in, out) of the parameter; ``None`` if unclear."""
        rows, columns = ((matrix.shape[dim], matrix.stride(dim)) for dim in (-2, -1))
        start = int(matrix.storage_offset()) - int(self.param.storage_offset())
        inputs, outputs = (self._coordinates(start, *side) for side in (rows, columns))
        moving, others = ({dim for dim, own in side.items() if len(own.unique()) > 1} for side in (outputs, inputs))
        dim = next(iter(moving), self.dim)
        is_split = any(len(inputs[other].unique()) < self.param.shape[other] for other in others)
        self.is_clear &= len(moving) == 1 and not moving & others and not is_split and self.dim in (None, dim)
        self.dim = dim
        return outputs[dim] + 1 if self.is_clear and dim is not None else None

    def _coordinates(self, start: int, size: int, stride: int) -> dict[int, Tensor]:
        offsets = start + stride * torch.arange(size, dtype=torch.int32)
        sides = zip(self.param.stride(), self.param.shape)
        return {dim: offsets // by % count for dim, (by, count) in enumerate(sides) if count > 1}

    def parts(self) -> FusedWeight | None:
        """The channels of each matrix in their order; ``None`` if they are unknown."""
        if self.dim is None or not self.is_clear:
            return None
        groups = sorted(self.groups, key=lambda group: int(group.nonzero()[0]))
        # What a forward leaves out may belong anywhere. One channel alone is a vector.
        if not groups or not bool(torch.stack(groups).any(0).all()) or min(int(group.sum()) for group in groups) < 2:
            groups = [torch.ones(self.param.shape[self.dim], dtype=torch.bool)]
        curved = [self.activated is not None and bool((group & self.activated).any()) for group in groups]
        names = (
            tuple("gate" if own else "up" for own in curved)
            if self.is_gated and len(groups) == 2 and sum(curved) == 1
            else ()
        )
        return FusedWeight(self.dim, [group.nonzero()[:, 0] for group in groups], names)


class _Tag(NamedTuple):
    """For each element of an activation, the output channel that it comes from, counted from 1; 0 is none."""

    numbers: Tensor
    activated: bool = False


class Channels(TorchDispatchMode):
    """Follows the output channels of every weight through a forward, while it is entered."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._weights: dict[str, _Weight] = {}
        self._sources = (
            WeakIdKeyDictionary()
        )  # of parameters, their views and copies: a name, and a view of the parameter
        self._tags = WeakIdKeyDictionary()  # of activations: {name: _Tag}

    def register(self, module: nn.Module, name: str) -> None:
        """Follows the parameters of a module, which has this name; FSDP2 puts others into their place in a forward."""
        for leaf, param in module.named_parameters(recurse=False):
            if param.ndim > 1 and param.is_floating_point():
                full = f"{name}.{leaf}".lstrip(".")
                self._weights.setdefault(full, _Weight(param)).param = param
                self._sources.setdefault(param, (full, param.detach()))

    def found(self) -> FusedWeights:
        """The weights that are several matrices, or one that is stored as (in, out)."""
        fused: FusedWeights = {}
        known: dict[Any, FusedWeight] = {}  # one object for layers alike
        for name, weight in self._weights.items():
            own = weight.parts()
            if own is not None and (len(own.channels) > 1 or own.dim == weight.param.ndim - 1):
                key = (own.dim, own.names, *(channels.numpy().tobytes() for channels in own.channels))
                fused[name] = known.setdefault(key, own)
        return fused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        try:
            self._follow(func, args, kwargs, out)
        except (
            RuntimeError,
            TypeError,
            ValueError,
            LookupError,
        ):  # jagged, sparse, of complex numbers
            self._take(args)
        return out

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if not isinstance(func, torch._ops.OpOverload):
            self._take(args)
            return
        name = func._schema.name.partition("::")[2]
        first = _PRODUCTS.get(name, 0)
        if name in _PRODUCTS and self._multiply(args[first], args[first + 1], name == "linear", out):
            return
        if args and self._is_source(args[0]) and self._pass_weight(func, name, args, kwargs, out):
            return
        if name == "convolution":
            self._convolve(args[0], args[1], args[8], args[6], out)
        elif not any(self._tags_of(x) for x in tensors_in(args)):
            return
        elif name in _COPIES:
            self._set_tags(out[0] if isinstance(out, tuple) else out, self._tags_of(args[0]))
        elif name == "copy_":  # what stores does not compute
            own = self._tags_of(args[1]).items()
            self._set_tags(out, {name: _Tag(tag.numbers.expand(out.shape), tag.activated) for name, tag in own})
        elif func.is_view or name in _MOVES:
            self._move(func, args, kwargs, out)
        elif torch.Tag.pointwise in func.tags:
            self._combine(name, [x for x in tensors_in(args) if self._tags_of(x)], out)
        else:
            self._take(args)

    def _is_source(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x in self._sources

    def _pass_weight(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> bool:
        """Follows what is still a part of a parameter, or a copy of one."""
        full, source = self._sources[args[0]]
        if name in _COPIES:
            views = [source]
        elif func.is_view:
            try:
                moved = func(source, *args[1:], **kwargs)
            except RuntimeError:
                return False
            views = list(moved) if isinstance(moved, (list, tuple)) else [moved]
        elif name == "index" and args[1][0] is not None and args[1][0].dtype != torch.bool and len(args[1]) == 1:
            views = [source[:1].expand(out.shape)] if out.ndim == source.ndim else [source[0].expand(out.shape)]
        else:
            return False
        for tensor, view in zip(out if isinstance(out, (list, tuple)) else [out], views):
            self._sources[tensor] = full, view
        return True

    def _multiply(self, left: Any, right: Any, is_linear: bool, out: Any) -> bool:
        """Numbers the channels of a product of an activation and a weight."""
        self._take((left, right))
        is_left = self._is_source(left)
        if is_left == self._is_source(right):
            return False
        name, source = self._sources[left if is_left else right]
        matrix = source.mT if is_left != is_linear else source  # (..., in, out)
        numbers = self._weights[name].outputs(matrix)
        if numbers is not None:
            numbers = numbers.to(_device(out))
            self._set_tags(out, {name: _Tag((numbers[:, None] if is_left else numbers).expand(out.shape))})
        return True

    def _convolve(self, x: Tensor, weight: Tensor, groups: int, is_transposed: bool, out: Tensor) -> None:
        is_batched = x.ndim == weight.ndim
        if is_batched and groups == x.shape[1] == out.shape[1] and not is_transposed:  # every channel by itself
            tags = {}
            for name, tag in self._tags_of(x).items():
                first = tag.numbers.flatten(2)[..., 0]
                tags[name] = _Tag(first.view(*first.shape, *[1] * (x.ndim - 2)).expand(out.shape), tag.activated)
            self._set_tags(out, tags)
            return
        self._take((x,))
        if is_batched and groups == 1 and not is_transposed and weight in self._sources:
            name, source = self._sources[weight]
            numbers = self._weights[name].outputs(source.flatten(1).mT) if source.is_contiguous() else None
            if numbers is not None:
                shaped = numbers.to(_device(out)).view(-1, *[1] * (out.ndim - 2))
                self._set_tags(out, {name: _Tag(shaped.expand(out.shape))})

    def _move(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Moves the numbers of channels as the operation moves the channels."""
        outs = list(out) if isinstance(out, (list, tuple)) else [out]
        found: list[dict[str, _Tag]] = [{} for _ in outs]
        own = {name for x in tensors_in(args[:1]) for name in self._tags_of(x)}
        for name in own:
            tags = [self._tags_of(x).get(name) for x in tensors_in(args[:1])]
            numbers = [
                torch.zeros((), dtype=torch.int32, device=_device(x)).expand(x.shape) if tag is None else tag.numbers
                for x, tag in zip(tensors_in(args[:1]), tags)
            ]
            given = numbers[0] if isinstance(args[0], Tensor) else numbers
            try:
                moved = func(given, *args[1:], **kwargs)
            except RuntimeError:  # a view that their strides do not allow
                if not isinstance(out, Tensor) or not isinstance(given, Tensor) or given.numel() != out.numel():
                    self._take(args)
                    continue
                moved = given.reshape(out.shape)
            activated = any(tag.activated for tag in tags if tag is not None)
            for tags_of_it, piece in zip(found, moved if isinstance(moved, (list, tuple)) else [moved]):
                if piece.dtype == torch.int32:
                    tags_of_it[name] = _Tag(piece, activated)
        for tensor, tags_of_it in zip(outs, found):
            self._set_tags(tensor, tags_of_it)

    def _combine(self, name: str, operands: list[Tensor], out: Any) -> None:
        """Follows an operation on each element."""
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return
        together: dict[str, list[_Tag]] = {}
        for x in operands:
            for own, tag in self._tags_of(x).items():
                together.setdefault(own, []).append(tag)
        alike = {own: _alike(tags) for own, tags in together.items()}
        if name in _FACTORS and len(operands) > 1 and (len(together) > 1 or not all(alike.values())):
            self._take(operands)  # a product of two outputs is no output of either
            for own, tags in together.items():
                self._weights[own].is_gated |= len(tags) > 1
            self._set_tags(out, {})
            return
        result = {}
        for own, tags in together.items():
            activated = any(tag.activated for tag in tags)
            if not alike[own]:
                joined = torch.cat([_distinct(tag.numbers).flatten() for tag in tags])
                self._weights[own].join(joined, activated)
            numbers = next(
                (tag.numbers for tag in tags if tag.numbers.ndim <= out.ndim), None
            )  # those of one stand for all
            is_curved = name not in _LINEAR or (name in _FACTORS and len(tags) > 1)
            if numbers is not None:
                result[own] = _Tag(numbers.expand(out.shape), activated or is_curved)
        self._set_tags(out, result)

    def _take(self, args: Any) -> None:
        """An operation takes each of these tensors as a whole."""
        for x in tensors_in(args):
            for name, tag in self._tags_of(x).items():
                self._weights[name].join(tag.numbers, tag.activated)

    def _tags_of(self, x: Any) -> dict[str, _Tag]:
        """The tags of a tensor, but those of weights that have nothing more to tell."""
        tags = self._tags.get(x, {}) if isinstance(x, Tensor) else {}
        return {name: tag for name, tag in tags.items() if not self._weights[name].is_whole}

    def _set_tags(self, x: Tensor, tags: dict[str, _Tag]) -> None:
        if tags or x in self._tags:
            self._tags[x] = tags


def _device(x: Tensor) -> torch.device:
    """Where the numbers of an activation's channels are: they are known, even if the activation only stands for one."""
    return torch.device("cpu") if x.is_meta else x.device


def _distinct(numbers: Tensor) -> Tensor:
    """The same numbers, without the dimensions along which they are expanded."""
    for dim, stride in enumerate(numbers.stride()):
        if stride == 0 and numbers.shape[dim] > 1:
            numbers = numbers.narrow(dim, 0, 1)
    return numbers


def _alike(tags: list[_Tag]) -> bool:
    """Whether all of them number every element in the same way."""
    first, *others = tags
    try:
        return all(
            bool(torch.equal(*torch.broadcast_tensors(*map(_distinct, (first.numbers, tag.numbers))))) for tag in others
        )
    except RuntimeError:
        return False
