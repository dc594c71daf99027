"""Checks layouts on the whole model: what must not notice the factors must not change in a bit.

Where both sides scale, queries are multiplied by powers of two and keys divided by them, in all attention at once. What
notices uses the keys elsewhere, through a cache for example; then the queries alone are scaled. Where one side scales, the
model runs with constants in place of its attention, which is all that may notice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_muonclip.parallel.shards import local_part, on_all_ranks, to_local
from lightning_muonclip.qk_clip.describe.count import Frame
from lightning_muonclip.qk_clip.describe.describe import Found
from lightning_muonclip.qk_clip.describe.infer import Layout
from lightning_muonclip.qk_clip.describe.isolate import DetachedCopies, apart, undisturbed
from lightning_muonclip.qk_clip.describe.prove import factors
from lightning_muonclip.qk_clip.describe.survey import kept
from lightning_muonclip.qk_clip.describe.trace import Product, Trace, tracing

_ELSEWHERE = "its keys are used elsewhere in the model too"


@torch.no_grad()
def gate(root: Frame, found: Sequence[Found]) -> None:
    """Changes the layouts of a model that does not stand by them: queries alone, or none at all.

    Args:
        root: The model and its inputs, the first frame of a survey.
        found: What was described.
    """
    refuse_ties(root.module, found)
    with undisturbed(root.module), _rounded_gains(found):
        trials = _Trials(root)
        for own in trials.noticed([own for own in _described(found) if _takes_both(own.layout)]):
            own.layout.queries_alone(_ELSEWHERE)  # type: ignore[union-attr]
        for own in trials.noticed([own for own in _described(found) if not _takes_both(own.layout)], False):
            own.layout, own.reason = None, "what makes its queries or keys is used elsewhere in the model too"


class _Trials:
    """Forwards of a model whose weights are scaled for a while."""

    def __init__(self, root: Frame) -> None:
        self._root = root
        self._products: Sequence[Product] = ()
        self._plain: dict[bool, list[Tensor]] = {}

    def noticed(self, found: Sequence[Found], attends: bool = True) -> list[Found]:
        """Those whose factors the outputs notice; half of them is tried at a time."""
        if not found:
            return []
        if attends not in self._plain:
            self._plain[attends] = self._run(attends)
        with _scaled(found):
            after = self._run(attends)
        plain = self._plain[attends]
        if on_all_ranks(self._root.module, len(after) == len(plain) and all(map(_same, plain, after))):
            return []
        half = len(found) // 2
        return (self.noticed(found[:half], attends) + self.noticed(found[half:], attends) if half else []) or list(
            found
        )

    def _run(self, attends: bool) -> list[Tensor]:
        with DetachedCopies():
            args, kwargs = tree_map(kept, (self._root.args, self._root.kwargs))
        with apart(self._root.module):
            torch.manual_seed(0)
            if attends:
                return _numbers(self._root.module(*args, **kwargs))
            trace = Trace((args, kwargs), self._products)
            with torch.enable_grad(), tracing(trace):
                output = self._root.module(*args, **kwargs)
            self._products = self._products or trace.products
            return _numbers(output)


def _described(found: Sequence[Found]) -> list[Found]:
    return [own for own in found if own.layout is not None]


def _takes_both(layout: Layout | None) -> bool:
    return layout is not None and layout.sides == "qk" and not layout.is_tied


@contextmanager
def _scaled(found: Sequence[Found]) -> Iterator[None]:
    """Queries times powers of two; keys over them, where both sides scale. A weight of several attentions is scaled once."""
    by: dict[Tensor, tuple[Tensor, float]] = {}
    for own in found:
        assert own.layout is not None
        group = torch.arange(own.layout.num_key_value_heads)
        if any((table.heads[table.scaled] < 0).any() for _, table in own.layout.tables):  # all heads share a gain
            group = torch.zeros_like(group)
        of_key = torch.exp2((1 + group % 3) * (-1.0) ** group)
        of_query = of_key.repeat_interleave(own.layout.num_heads // len(group))
        inverse = of_key if own.layout.is_tied else 1 / of_key
        of = {"q": of_query, "qn": of_query, "k": inverse, "kn": inverse}
        offsets = {name: table.offset for name, table in own.layout.tables}
        params = {name: own.module.get_parameter(name) for name in offsets}
        for name, factor in factors(own.layout, of, params).items():
            # On shards: torch 2.9 redistributes to the wrong ranks what two mesh dimensions shard along one dimension.
            by.setdefault(params[name], (local_part(factor, params[name]).to(to_local(params[name])), offsets[name]))
    before: dict[Tensor, Tensor] = {}
    try:
        for param, (factor, offset) in by.items():
            shard = to_local(param)
            scaled = (shard + offset) * factor - offset
            if not torch.equal((scaled + offset) / factor - offset, shard):  # subnormal numbers, rounded away
                before[param] = shard.clone()
            _write(param, scaled)
        yield
    finally:
        for param, (factor, offset) in by.items():
            _write(param, before[param] if param in before else (to_local(param) + offset) / factor - offset)


def _write(param: Tensor, shard: Tensor) -> None:
    """Changes a parameter by ``.data``, which leaves graphs valid that have saved it."""
    to_local(param).data.copy_(shard)


@contextmanager
def _rounded_gains(found: Sequence[Found]) -> Iterator[None]:
    """Gains that the module adds a number to lose their last digits, so that the factors are exact."""
    gains: set[Tensor] = set()
    for own in _described(found):
        gains |= {own.module.get_parameter(name) for name, table in own.layout.tables if table.offset}  # type: ignore[union-attr]
    before: dict[Tensor, Tensor] = {param: to_local(param).clone() for param in gains}
    try:
        for param in gains:
            _write(param, (to_local(param) * 64).round() / 64)
        yield
    finally:
        for param, shard in before.items():
            _write(param, shard)


def refuse_ties(model: nn.Module, found: Sequence[Found]) -> None:
    """Refuses weights that something else uses too; several attentions may, if they use them alike."""
    owners: dict[Tensor, list[str]] = {}
    names: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(path)
        for name, param in module.named_parameters(recurse=False):
            owners.setdefault(param, []).append(f"{path}.{name}".lstrip("."))
    for own in _described(found):
        for name, table in own.layout.tables:  # type: ignore[union-attr]
            if not table.scaled.any():
                continue
            param = own.module.get_parameter(name)
            inside = tuple(f"{path}." if path else "" for path in names[own.module])
            alike = {
                f"{alias}.{path}".lstrip(".")
                for other in _described(found)
                for alias in names[other.module]
                for path, theirs in other.layout.tables  # type: ignore[union-attr]
                if other.module.get_parameter(path) is param and theirs.equals(table)
            }
            strange = [path for path in owners[param] if not path.startswith(inside) and path not in alike]
            if strange:
                own.layout, own.reason = None, f"its {name} is {strange[0]} too"
                break


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _numbers(output: Any) -> list[Tensor]:
    """What a forward returns; a cache of keys, which is no tree, does not count."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
