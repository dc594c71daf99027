"""Judges inferred layouts on the real model, by an oracle that shares no code with the library.

The weights of every head are multiplied by a random factor of its own, as the tables say. Then the products of queries and
keys, read from the model's elementary operations in float64, must be those of before times the factors of their heads, and
those of earlier attention must be the same. Queries multiplied by a power of two and keys divided by it must leave all
outputs of the model as they are, to the bit. Of attention that is said to be normalized, all matrices that reach the logits
are multiplied at once by a large number; a larger one must give the same logits.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from families.brute_force import products

#: As in the library's documentation; its code is not used here.
KINDS = ("q", "k", "qn", "kn", "qr", "*")
MOST = 6  # attentions of a model that are judged head by head


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """No weight is zero or like another."""
    generator = torch.Generator().manual_seed(2)
    for param in model.parameters():
        if param.is_floating_point() and param.numel():
            noise = torch.randn(param.shape, generator=generator)
            scale = param[0].numel() ** -0.5 if param.ndim > 1 else 0.3
            param.copy_(noise * scale + (0 if param.ndim > 1 else param.float().clamp(-1, 1)))


def seeded(run: Any) -> Any:
    """Runs with the same random numbers every time: dropout, dropped layers, masks."""
    torch.manual_seed(5)
    random.seed(5)
    try:
        import numpy

        numpy.random.seed(5)
    except ImportError:
        pass
    return run()


def judge(model: nn.Module, inputs: dict[str, Any], found: list[Any], calls: int) -> tuple[int, list[str], str]:
    """How many attentions were judged head by head, what is wrong, and why others were not judged."""
    described = [own for own in found if own.layout is not None]
    wrong = _outputs_change(model, inputs, described)
    given, tolerance = inputs, 1e-5
    try:
        true = copy.deepcopy(model).double()
        inputs = tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, given)
        before = seeded(lambda: products(true, inputs))
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError):  # it insists on single precision
        true, inputs, tolerance = model, given, 1e-3
        before = seeded(lambda: products(true, inputs))
    if len(before) > calls:
        wrong.append(f"the survey has {calls} attention calls, the oracle {len(before)}")
    if len(before) != calls:
        return 0, wrong, f"the oracle has {len(before)} of {calls} calls"
    step = max(1, -(-len(described) // MOST))
    judged = 0

    def run(own: Any, change: dict[str, Any]) -> list[list[Tensor]]:
        """The products while parameters are changed."""
        params = dict(true.get_submodule(own.name).named_parameters(remove_duplicate=False))
        saved = {name: params[name].detach().clone() for name in change}
        with torch.no_grad():
            for name, changed in change.items():
                params[name].copy_(changed(saved[name]))
        after = seeded(lambda: products(true, inputs))
        with torch.no_grad():
            for name, value in saved.items():
                params[name].copy_(value)
        return after

    for own in described[::step]:
        first = own.calls[0]
        if own.layout.qk_norm and (problem := _moved(own, before[first][0], partial(run, own))):
            wrong.append(f"{own.name}: {problem}")
        factors, expected = _trial(own)
        after = run(own, {n: lambda x, f=f, c=c: (x + c) * f - c for n, (f, c) in factors.items()})
        mine = _weights(model, own)
        since = min(
            call for other in described if other is own or _weights(model, other) & mine for call in other.calls
        )
        if len(after) != calls or not all(map(_equal, before[:since], after[:since])):
            wrong.append(f"{own.name}: earlier attention changes")
            continue
        # Products that stay, as those of positions may, are biases.
        changed = [(a, b) for a, b in zip(before[first], after[first]) if not torch.equal(a, b)] or [
            (before[first][0],) * 2
        ]
        sums = (sum(own[1:], own[0]) for own in map(list, zip(*changed)))
        if problem := _deviation(*sums, expected, tolerance):
            wrong.append(f"{own.name}: {problem}")
        judged += 1
    return judged, wrong, ""


def _moved(own: Any, before: Tensor, run: Callable[[dict[str, Any]], list[list[Tensor]]]) -> str:
    """What is wrong with attention that is said to be normalized, so that no matrix scales its logits.

    Args:
        own: What was described.
        before: The products of its queries and keys.
        run: Gives the products of the model while parameters are changed.
    """

    def after(change: dict[str, Any]) -> Tensor:
        return run(change)[own.calls[0]][0]

    noise = torch.Generator().manual_seed(7)
    gains = {name for name, _ in entries(own.layout)}
    counts = (own.layout.num_heads, own.layout.num_key_value_heads)
    matrices = []
    for name, param in own.module.named_parameters():
        sizes = [size for size in param.shape if size > 1]
        is_gain = len(sizes) < 2 or name in gains or (len(sizes) == 2 and sizes[0] in counts)  # one for every head
        if param.is_floating_point() and not is_gain:
            matrices.append(name)
    other = after(dict.fromkeys(matrices, lambda x: torch.randn(x.shape, generator=noise).to(x) * x.std()))
    if torch.equal(before, other):
        return "no matrix reaches its logits"
    # Beside large weights, biases and what is added against a division by zero are nothing.
    large, larger = (after(dict.fromkeys(matrices, lambda x, f=f: f * x)) for f in (1e3, 1e5))
    error = float((larger - large).abs().max() / large.abs().max())
    return "" if error < 0.05 else f"{', '.join(matrices)} move its logits by {error:.1e}"


def _weights(model: nn.Module, own: Any) -> set[Tensor]:
    """The parameters that are scaled."""
    module = model.get_submodule(own.name)
    return {module.get_parameter(name) for name, _ in entries(own.layout)}


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b))


def entries(layout: Any) -> list[tuple[str, Any]]:
    """Parameters with channels that make queries or keys."""
    return [(name, table) for name, table in layout.tables if (table.kinds != KINDS.index("*")).any()]


def _trial(own: Any) -> tuple[dict[str, tuple[Tensor, float]], Tensor]:
    """What multiplies the parameters of an attention, and what that does to the logits of each query head."""
    layout, generator = own.layout, torch.Generator().manual_seed(len(own.name))
    heads, groups = layout.num_heads, layout.num_key_value_heads

    def spaced(count: int) -> Tensor:
        return torch.exp2(
            torch.linspace(-1, 1, count + 2, dtype=torch.float64)[1:-1][torch.randperm(count, generator=generator)]
        )

    of_query, of_key = 1.17 * spaced(heads), 0.93 * spaced(groups) ** 0.37
    if any((table.heads[table.kinds != KINDS.index("*")] < 0).any() for _, table in layout.tables):
        of_query, of_key = of_query[:1].expand(heads), of_key[:1].expand(groups)
    head = torch.arange(heads)
    group = head * groups // heads
    rotated = of_query * of_key[group]
    factors: dict[str, tuple[Tensor, float]] = {}
    made: set[str] = set()
    sides: dict[str, set[str]] = {}
    for name, table in entries(layout):
        factor = torch.ones(table.kinds.shape, dtype=torch.float64)
        for index, kind in enumerate(KINDS[:5]):
            chosen = table.kinds == index
            values = {"q": of_query, "qn": of_query, "qr": rotated}.get(kind, of_key)
            factor[chosen] = values[table.heads[chosen].clamp_min(0)]
            if chosen.any():
                made.add(kind[0])
                sides.setdefault(name, set()).add(kind[0])
        param = own.module.get_parameter(name)
        factor = factor.reshape([size if dim in table.dims else 1 for dim, size in enumerate(param.shape)])
        factors[name] = (factors[name][0] * factor if name in factors else factor, table.offset)
    expected = torch.ones(heads, dtype=torch.float64)
    if "q" in made:
        expected = expected * of_query
    if "k" in made:
        expected = expected * of_key[group]
    twice = [name for name, _ in entries(layout)]
    if len(set(twice)) < len(twice):  # one weight makes queries and keys
        expected = expected**2
    return factors, expected


def _deviation(before: Tensor, after: Tensor, factors: Tensor, tolerance: float) -> str:
    """What is wrong with logits that should be multiplied by factors of their heads."""
    heads = len(factors)
    if before.shape != after.shape:
        return f"logits of shape {tuple(after.shape)} instead of {tuple(before.shape)}"
    lead = before.shape[:-2]
    if heads == 1 or torch.equal(factors, factors[:1].expand(heads)):
        candidates = [factors[:1].view(1)]
    elif len(lead) == 2 and lead[1] == heads:
        candidates = [factors.view(heads, 1, 1)]
    elif len(lead) == 1 and lead[0] % heads == 0:
        candidates = [
            factors.repeat(lead[0] // heads).view(-1, 1, 1),
            factors.repeat_interleave(lead[0] // heads).view(-1, 1, 1),
        ]
    elif len(lead) == 3 and lead[1] * lead[2] == heads:
        candidates = [factors.view(lead[1], lead[2], 1, 1)]
    else:
        return _mixed(before, after, factors)
    finite = before.isfinite()
    if not finite.any():
        return ""
    size = before[finite].abs().max().clamp_min(1e-30)
    errors = [float((before * factor - after)[finite].abs().max() / size) for factor in candidates]
    return "" if min(errors) < tolerance else f"logits of shape {tuple(lead)} are off by {min(errors):.1e}"


def _mixed(before: Tensor, after: Tensor, factors: Tensor) -> str:
    """For heads on an axis that the oracle does not know: every logit has one of the factors, each as often as another."""
    large = before.abs() > 1e-3 * before.abs().max()
    ratio = (after / before)[large]
    error, index = (ratio[:, None] / factors - 1).abs().min(1)
    if error.max() > 1e-3:
        return f"logits of shape {tuple(before.shape)}: a factor is off by {float(error.max()):.1e}"
    counts = torch.bincount(index, minlength=len(factors)).double()
    return "" if counts.min() > 0.5 * counts.max() else f"heads get the factors {counts.tolist()} times"


@torch.no_grad()
def _outputs_change(model: nn.Module, inputs: dict[str, Any], described: list[Any]) -> list[str]:
    """Whether the model notices queries multiplied by a power of two and keys divided by it."""
    outputs = [seeded(lambda: _numbers(model(**inputs)))]
    scaled = 0
    saved: list[tuple[Tensor, Tensor]] = []
    done: set[int] = set()
    for own in described:
        names = [name for name, _ in entries(own.layout)]
        sides = {KINDS[kind][0] for _, table in own.layout.tables for kind in table.kinds.unique().tolist()} - {"*"}
        if sides != {"q", "k"} or len(set(names)) < len(names) or any(table.offset for _, table in own.layout.tables):
            continue
        params = [own.module.get_parameter(name) for name in names]
        if any(id(param) in done for param in params):
            continue
        done |= set(map(id, params))
        heads, groups = own.layout.num_heads, own.layout.num_key_value_heads
        of_key = torch.exp2(torch.randint(-2, 3, (groups,), generator=torch.Generator().manual_seed(scaled)).double())
        for param, (_, table) in zip(params, entries(own.layout)):
            factor = torch.ones(table.kinds.shape, dtype=torch.float64)
            for kinds, values in ((("q", "qn"), 1 / of_key.repeat_interleave(heads // groups)), (("k", "kn"), of_key)):
                for kind in kinds:
                    chosen = table.kinds == KINDS.index(kind)
                    own_values = (
                        values
                        if not (table.heads[chosen] < 0).any()
                        else values.new_full((1,), 4.0 if kind == "k" else 0.25)
                    )
                    factor[chosen] = own_values[table.heads[chosen].clamp_min(0)]
            saved.append((param, param.detach().clone()))
            param.mul_(factor.reshape([n if dim in table.dims else 1 for dim, n in enumerate(param.shape)]).to(param))
        scaled += 1
    outputs.append(seeded(lambda: _numbers(model(**inputs))))
    for param, value in reversed(saved):
        param.copy_(value)
    same = len(outputs[0]) == len(outputs[1]) and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*outputs)
    )
    return [] if same else [f"queries times f and keys over f on {scaled} attentions change the outputs"]


def _numbers(output: Any) -> list[Tensor]:
    if hasattr(output, "to_tuple"):
        output = {name: own for name, own in output.items() if "key_value" not in name and "attention" not in name}
    return [leaf.clone() for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
