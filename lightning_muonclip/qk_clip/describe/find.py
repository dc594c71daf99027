"""Finds all attention that a model computes on some inputs, and infers which weights make its heads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_muonclip.kernels.context_parallel import without_context_parallel
from lightning_muonclip.parallel.shards import on_all_ranks
from lightning_muonclip.qk_clip.describe.count import Frame, has_matrix
from lightning_muonclip.qk_clip.describe.describe import FAILURES, Found, describe, softmaxes_of
from lightning_muonclip.qk_clip.describe.fused import FusedWeights
from lightning_muonclip.qk_clip.describe.gate import gate, refuse_ties
from lightning_muonclip.qk_clip.describe.infer import Table
from lightning_muonclip.qk_clip.describe.isolate import apart
from lightning_muonclip.qk_clip.describe.layout import ChannelMap
from lightning_muonclip.qk_clip.describe.spec import AttentionSpec, HeadAxis, Projection, Softmax
from lightning_muonclip.qk_clip.describe.survey import Prepares, Survey, run_watched
from lightning_muonclip.qk_clip.describe.trace import flex_attention_traced
from lightning_muonclip.values import has_values

#: How many samples of a batch are tried before all of it.
_SAMPLES = 2

#: Positional and keyword arguments of a model.
Example = tuple[Sequence[Any], Mapping[str, Any]]


class Search(NamedTuple):
    """What a forward shows.

    Attributes:
        found: Every attention that nobody has described.
        softmaxes: Where described modules that attend by hand have their logits.
        modules: The modules that have run.
        others: Modules with a softmax over something else than a product of queries and keys, and others that weigh
            activations without a softmax: why each has no logits to clip.
        fused: Weights that hold several matrices.
    """

    found: list[Found]
    softmaxes: dict[nn.Module, tuple[Softmax, ...]]
    modules: set[nn.Module]
    others: dict[nn.Module, str]
    fused: FusedWeights


def find_attention(
    model: nn.Module,
    example: Example,
    described: Collection[nn.Module] = (),
    alone: Collection[nn.Module] = (),
    name: str = "",
) -> Search:
    """Every attention that the model computes on these inputs; modes, buffers and random numbers are as before.

    On the meta device, layouts are inferred and proven on copies with random weights as elsewhere, but one of several layers
    alike stands for all, and nothing is checked on the whole model.

    Args:
        model: The model.
        example: Its arguments.
        described: Modules whose attention the user has described.
        alone: Modules to leave alone.
        name: What messages call the model, where it is a part of another.

    Raises:
        ValueError: If the example is not a pair of arguments.
    """
    if not isinstance(example, tuple) or len(example) != 2 or not isinstance(example[1], Mapping):
        raise ValueError(
            f"example must be a pair (args, kwargs) of the model's arguments; got {type(example).__name__}"
        )
    with without_context_parallel():
        return _found(model, example, described, alone, name)


def _found(
    model: nn.Module, example: Example, described: Collection[nn.Module], alone: Collection[nn.Module], name: str
) -> Search:
    for hook in list(model._forward_pre_hooks.values()):
        if isinstance(hook, Prepares):
            hook.prepare(model, *example)
    part, search = first_samples(example), None
    if on_all_ranks(model, part is not None):  # ranks run the same forwards
        assert part is not None
        with suppress(*FAILURES):  # a model may insist on a size of its batch
            search = _search(model, part, described, alone, name)
        is_read = search is not None and all(own.layout for own in search.found)
        if on_all_ranks(model, is_read) and search is not None:
            return search
    return _search(model, example, described, alone, name)


def _search(
    model: nn.Module, example: Example, described: Collection[nn.Module], alone: Collection[nn.Module], name: str
) -> Search:
    with apart(model):
        survey = run_watched(model, *example, Survey(model, name))
        calls = [stack for stack in survey.calls if not any(frame.module in alone for frame in stack)]
        of_described = {frame.module: frame for stack in calls for frame in stack if frame.module in described}
        unknown = [stack for stack in calls if not any(frame.module in of_described for frame in stack)]
        with flex_attention_traced(survey.calls_flex_attention):
            found = describe(unknown)
            if found and has_values(list(model.parameters())):
                gate(Frame("", model, *example), found)
            elif found:
                refuse_ties(model, found)
            softmaxes = {module: softmaxes_of(frame) for module, frame in of_described.items()}
        found += _opaque(survey, calls, {*alone, *described})
    known = {own.module for own in found} | {*described, *alone}
    others: dict[nn.Module, str] = {}
    for stack, reason in survey.others:
        if stack and not any(frame.module in known for frame in stack):
            others.setdefault(
                next((f.module for f in reversed(stack) if has_matrix(f.module)), stack[-1].module), reason
            )
    return Search(
        found,
        {module: own for module, own in softmaxes.items() if own},
        survey.modules,
        others,
        survey.channels.found(),
    )


def first_samples(example: Example) -> Example | None:
    """The first samples, which cost less and mostly tell as much, if all tensors agree on the size of the batch."""
    tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor) and leaf.ndim]
    is_nested = any(leaf.is_nested for leaf in tensors)
    samples = 1 if is_nested else _SAMPLES
    sizes = {leaf.shape[0] for leaf in tensors} - {1}
    if len(sizes) != 1 or max(sizes) <= samples:
        return None

    def part(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim:
            return leaf
        return leaf.unbind()[0][None] if leaf.is_nested else leaf[:samples]  # one sequence need not be nested

    return tree_map(part, example)


def _opaque(survey: Survey, calls: Sequence[Sequence[Frame]], known: Collection[nn.Module]) -> list[Found]:
    """Modules with matrices in which nothing was seen but a kernel that may attend."""
    seen = {frame.module for stack in calls for frame in stack} | set(known)
    found: dict[nn.Module, Found] = {}
    for kernel, stack, _ in survey.opaque:
        frames = [frame for frame in reversed(stack) if has_matrix(frame.module)]
        if frames and not any(frame.module in known for frame in stack) and frames[0].module not in seen:
            reason = f"it calls {kernel}, in which no queries and keys can be seen (register_max_logits can tell them)"
            found[frames[0].module] = Found(frames[0].name, frames[0].module, reason=reason)
    return list(found.values())


def spec_of(found: Found) -> AttentionSpec:
    """The spec of an inferred attention."""
    layout = found.layout
    assert layout is not None
    made, scaled = _projections(layout.unscaled), _projections(layout.tables)
    return AttentionSpec(
        made if layout.qk_norm else scaled,
        layout.num_heads,
        layout.num_key_value_heads,
        qk_norm=layout.qk_norm,
        gains=scaled if layout.qk_norm else (),
        set_by=layout.set_by,
        softmaxes=found.softmaxes,
        head_axes=layout.head_axes,
    )


def _projections(tables: Sequence[tuple[str, Table]]) -> tuple[Projection, ...]:
    return tuple(
        Projection(
            name,
            ChannelMap(table.kinds.flatten(), table.heads.flatten()),
            table.dims[0] if len(table.dims) == 1 else table.dims,
            table.offset,
        )
        for name, table in tables
    )


def watched_spec(found: Found) -> AttentionSpec:
    """The spec of an attention that is not understood: its largest logit, of all heads together, is watched."""
    return AttentionSpec((), 1, softmaxes=found.softmaxes, head_axes=(HeadAxis(1, 1),), watched=found.reason)
