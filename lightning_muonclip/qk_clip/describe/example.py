"""The attention of a model, inferred from a forward on example inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_muonclip.qk_clip.describe.describe import Found, describe
from lightning_muonclip.qk_clip.describe.gate import gate
from lightning_muonclip.qk_clip.describe.isolate import apart
from lightning_muonclip.qk_clip.describe.layout import ChannelMap, layout_kinds
from lightning_muonclip.qk_clip.describe.spec import AttentionSpec, Projection
from lightning_muonclip.qk_clip.describe.survey import Frame, Survey

#: Positional and keyword arguments of a model.
Example = tuple[Sequence[Any], Mapping[str, Any]]


def attention_on(model: nn.Module, example: Example) -> list[Found]:
    """Every attention that the model computes on these inputs; modes, buffers and random numbers are as before.

    Raises:
        ValueError: If the example is not a pair of arguments.
    """
    if not isinstance(example, tuple) or len(example) != 2 or not isinstance(example[1], Mapping):
        raise ValueError(
            f"example must be a pair (args, kwargs) of the model's arguments; got {type(example).__name__}"
        )
    args, kwargs = example
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        # torch's fast path of evaluation hides attention; in training a layer may be dropped by chance.
        torch.backends.mha.set_fastpath_enabled(False)
        for module in modes:
            module.training = False
        with apart(model), torch.no_grad(), Survey(model) as survey:
            model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, training in modes.items():
            module.training = training
        for buffer, before in buffers:
            buffer.copy_(before)
    found = describe(survey.calls)
    gate(Frame("", model, args, kwargs), found)
    return found


def spec_of(found: Found) -> AttentionSpec:
    """The spec of an inferred attention."""
    layout = found.layout
    assert layout is not None
    projections = tuple(
        Projection(
            name,
            ChannelMap(table.kinds.flatten(), table.heads.flatten()),
            table.dims[0] if len(table.dims) == 1 else table.dims,
            table.offset,
        )
        for name, table in layout.tables
    )
    heads, groups = layout.num_heads, layout.num_key_value_heads
    values = tuple(own for own in projections if layout_kinds(own.layout) == {"*"})
    gains = tuple(own for own in projections if layout_kinds(own.layout) != {"*"}) if layout.qk_norm else ()
    return AttentionSpec(
        values if layout.qk_norm else projections,
        heads,
        groups,
        qk_norm=layout.qk_norm,
        gains=gains,
        softmaxes=found.softmaxes,
        head_axes=layout.head_axes,
    )
