"""Finds all attention that a model computes on some inputs, and infers which weights make its heads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from lightning_muonclip.qk_clip.describe.describe import Found, describe
from lightning_muonclip.qk_clip.describe.gate import gate
from lightning_muonclip.qk_clip.describe.infer import Table
from lightning_muonclip.qk_clip.describe.isolate import DetachedCopies, apart, undisturbed
from lightning_muonclip.qk_clip.describe.layout import ChannelMap
from lightning_muonclip.qk_clip.describe.spec import AttentionSpec, HeadAxis, Projection
from lightning_muonclip.qk_clip.describe.survey import Frame, Survey, kept

#: Positional and keyword arguments of a model.
Example = tuple[Sequence[Any], Mapping[str, Any]]


def find_attention(
    model: nn.Module, example: Example, known: Collection[nn.Module] = ()
) -> tuple[list[Found], set[nn.Module]]:
    """Every attention that the model computes on these inputs; modes, buffers and random numbers are as before.

    Args:
        model: The model.
        example: Its arguments.
        known: Modules whose attention is described already, or left alone.

    Returns:
        The attention, and the modules that have run.

    Raises:
        ValueError: If the example is not a pair of arguments.
    """
    if not isinstance(example, tuple) or len(example) != 2 or not isinstance(example[1], Mapping):
        raise ValueError(
            f"example must be a pair (args, kwargs) of the model's arguments; got {type(example).__name__}"
        )
    with DetachedCopies():  # a survey must not write to a cache of keys
        args, kwargs = tree_map(kept, example)
    with apart(model):
        with undisturbed(model), torch.no_grad(), Survey(model) as survey:
            model(*args, **kwargs)
        calls = [stack for stack in survey.calls if not any(frame.module in known for frame in stack)]
        found = describe(calls)
        if found:
            gate(Frame("", model, *example), found)
    return found, survey.modules


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
