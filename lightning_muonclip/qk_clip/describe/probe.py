"""Gradients of an isolated module's outputs, by which every channel of every weight tells what it feeds.

One backward passes the same random cotangents as another, but for weights that are powers of two: 2 ** digit of a
coordinate (the head, say) of each output element. Where the ratio of the two gradients of a channel is exactly such a power,
the channel feeds that one coordinate and nothing else. log16(heads) backwards tell all heads; gradients are projected onto
one or two dimensions of a weight at once, so nothing of a weight's size is kept. What is projected is compared on the CPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_muonclip.qk_clip.describe.isolate import Isolated, Run

SIDES = ("q", "k", "v", "*")

#: Instead of a coordinate: the channel feeds several, or nothing.
MIXED, NOTHING = -1, -2

_BASE = 16

#: A parameter's name, and the dimensions that its channels lie on.
Key = tuple[str, tuple[int, ...]]


@dataclass(eq=False)
class Output:
    """Queries, keys or values of a call, or something else that depends on parameters.

    Attributes:
        side: Index into :data:`SIDES`.
        call: The number of the call.
        slices: For every leading axis, an index for each of its slices; equal slices, such as repeated keys, share one.
    """

    side: int
    call: int
    tensor: Tensor
    cotangent: Tensor
    slices: list[Tensor] = field(default_factory=list)

    @property
    def lead(self) -> torch.Size:
        """Shape before length and channels."""
        return self.tensor.shape[:-2]

    def size(self, axis: int) -> int:
        """Number of different slices along a leading axis, counted from the innermost, which is 1."""
        return int(self.slices[-axis].max()) + 1


class Probe:
    """What feeds what in one run of an isolated module.

    Attributes:
        outputs: Of the run.
        params: The parameters that queries, keys or values depend on.
        keys: Wherever their channels may lie.
        shares: For every key, ``<gradient, weight>`` of each channel: by Euler's theorem, channels for which it sums up to
            ``<output, cotangent>`` scale the output when they are scaled.
        slopes: The gradients of vectors.
    """

    def __init__(self, isolated: Isolated, run: Run) -> None:
        self._isolated = isolated
        is_double = isolated.dtype is torch.float64
        self.tolerance = 1e-6 if is_double else 2e-3
        self._noise = 1e-10 if is_double else 1e-5
        self._generator = torch.Generator().manual_seed(1)
        self.outputs: list[Output] = []
        for number, call in enumerate(run.calls):
            for query, key in call.pairs:
                self._add(0, number, query)
                self._add(1, number, key)
            if call.value is not None:
                self._add(2, number, call.value)
        reached = _variables([output.tensor.grad_fn for output in self.outputs])
        for tensor in run.rest:
            self._add(3, 0, tensor)
        self.params = {name: p for name, p in isolated.params.items() if p in reached}
        self._random = {
            name: [torch.randn(size, 2, generator=self._generator).to(p) for size in p.shape]
            for name, p in self.params.items()
        }
        gradients = self._gradients([output.cotangent for output in self.outputs])
        self.keys = [key for name in gradients for key in _keys(name, self.params[name])]
        self.slopes = {name: gradient.cpu() for name, gradient in gradients.items() if gradient.ndim == 1}
        self._base = self._projected(gradients)
        self.shares = self._shares(gradients)

    def of(self, side: int, calls: Sequence[int]) -> list[Output]:
        """The outputs of one side in these calls."""
        return [output for output in self.outputs if output.side == side and output.call in calls]

    def behind(self, outputs: Sequence[Output]) -> set[str]:
        """The parameters that some outputs depend on."""
        reached = _variables([output.tensor.grad_fn for output in outputs])
        return {name for name, param in self.params.items() if param in reached}

    def reaching(self, tensors: Sequence[Tensor]) -> tuple[str, ...]:
        """The parameters that some tensors change with."""
        params, total = (
            self._isolated.params,
            sum((x.square().nan_to_num(0, 0, 0).sum() for x in tensors), torch.zeros(())),
        )
        if not total.requires_grad:
            return ()
        found = torch.autograd.grad(total, list(params.values()), retain_graph=True, allow_unused=True)
        return tuple(name for name, gradient in zip(params, found) if gradient is not None and gradient.any())

    def coordinates(self, index: Callable[[Output], Tensor | int], count: int) -> dict[Key, Tensor]:
        """For every channel, the one coordinate that it feeds, :data:`MIXED` or :data:`NOTHING`.

        Args:
            index: The coordinate of an output's elements: a number, or a tensor that broadcasts.
            count: How many coordinates there are.
        """
        found: dict[Key, Tensor] = {}
        for place in range(max(1, math.ceil(math.log(max(count, 2), _BASE) - 1e-9))):
            weights = [_digit(index(output), place) for output in self.outputs]
            weighted = self._gradients([o.cotangent * _on(o, w) for o, w in zip(self.outputs, weights)])
            for key, projected in self._projected(weighted).items():
                digit = self._digits(projected, self._base[key])
                if key in found:
                    before = found[key]
                    both = before + digit * _BASE**place
                    digit = torch.where((before < 0) | (digit < 0), torch.minimum(before, digit), both)
                found[key] = digit
            del weighted  # of the size of the weights
            if all(bool((own < 0).all()) for own in found.values()):
                break  # no channel feeds one coordinate alone
        return {key: torch.where(own >= count, MIXED, own) for key, own in found.items()}

    def shares_of(self, outputs: Sequence[Output]) -> dict[Key, Tensor]:
        """:attr:`shares` of some outputs alone."""
        return self._shares(
            self._gradients([o.cotangent if o in outputs else torch.zeros_like(o.cotangent) for o in self.outputs])
        )

    def _add(self, side: int, call: int, tensor: Tensor) -> None:
        random = torch.randn(tensor.shape, generator=self._generator).to(tensor)
        cotangent = random + tensor.detach().sign() / 2  # keeps <output, cotangent> away from zero
        slices = [] if side == 3 else [_equal_slices(tensor.detach(), axis) for axis in range(tensor.ndim - 2)]
        self.outputs.append(Output(side, call, tensor, cotangent, slices))

    def _gradients(self, cotangents: Sequence[Tensor]) -> dict[str, Tensor]:
        pairs = [(o.tensor, c) for o, c in zip(self.outputs, cotangents) if o.tensor.requires_grad]
        if not pairs:
            return {}
        tensors, weights = zip(*pairs)
        found = torch.autograd.grad(tensors, list(self.params.values()), weights, retain_graph=True, allow_unused=True)
        return {name: grad for name, grad in zip(self.params, found) if grad is not None}

    def _shares(self, gradients: dict[str, Tensor]) -> dict[Key, Tensor]:
        shares: dict[Key, Tensor] = {}
        for name, keys in itertools.groupby(self.keys, key=lambda key: key[0]):
            if name in gradients:  # of one parameter at a time, for the sake of memory
                product = gradients[name] * self.params[name].detach()
                shares |= {key: _summed(product, key[1]).cpu() for key in keys}
        return shares

    def _projected(self, gradients: dict[str, Tensor]) -> dict[Key, Tensor]:
        """Two random projections of every channel: with one, some of thousands seem to feed one coordinate by chance."""
        found: dict[Key, Tensor] = {}
        for key in self.keys:
            name, dims = key
            x, letters = gradients[name], "abcdefgh"[: gradients[name].ndim]
            kept = "".join(letters[dim] for dim in dims)
            others = [dim for dim in range(x.ndim) if dim not in dims]
            if not others:
                found[key] = x[..., None].expand(*x.shape, 2).cpu()
                continue
            equation = ",".join([letters, *(f"{letters[dim]}z" for dim in others)]) + f"->{kept}z"
            found[key] = torch.einsum(equation, x, *(self._random[name][dim] for dim in others)).cpu()
        return found

    def _digits(self, weighted: Tensor, base: Tensor) -> Tensor:
        size = base.abs().amax(-1)
        feeds = size > self._noise * size.max()
        ratio = torch.where(feeds[..., None], weighted / torch.where(feeds[..., None], base, 1), 1)
        power = ratio.clamp_min(1e-30).log2().round()
        is_exact = ((ratio / torch.exp2(power) - 1).abs() < self.tolerance) & (power >= 0) & (power < _BASE)
        is_one = is_exact.all(-1) & (power[..., 0] == power[..., 1])
        return torch.where(feeds, torch.where(is_one, power[..., 0].long(), MIXED), NOTHING)


def _keys(name: str, param: Tensor) -> list[Key]:
    """Dimensions that the channels of a parameter may lie on: one, or two of three and more."""
    singles = itertools.combinations(range(param.ndim), min(param.ndim, 1))
    pairs = itertools.combinations(range(param.ndim), 2) if param.ndim > 2 else ()
    return [(name, dims) for dims in (*singles, *pairs)]


def _summed(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The sum over all other dimensions."""
    others = [dim for dim in range(x.ndim) if dim not in dims]
    return x.sum(others) if others else x


def _variables(nodes: list[Any]) -> set[Tensor]:
    """The leaves of an autograd graph."""
    found: set[Tensor] = set()
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        nodes += [child for child, _ in node.next_functions]
    return found


def _digit(index: Tensor | int, place: int) -> Tensor | float:
    digit = index // _BASE**place % _BASE
    return torch.exp2(digit.double()).float() if isinstance(digit, Tensor) else 2.0**digit


def _on(output: Output, weight: Tensor | float) -> Tensor | float:
    """A weight on the device of the output."""
    return weight.to(output.cotangent.device) if isinstance(weight, Tensor) else weight


def _equal_slices(x: Tensor, axis: int) -> Tensor:
    index = x.movedim(axis, 0).reshape(x.shape[axis], -1).unique(dim=0, return_inverse=True)[1].cpu()
    first = (index == torch.arange(int(index.max()) + 1)[:, None]).int().argmax(1)  # numbered in the order of the axis
    return first.argsort().argsort()[index]
