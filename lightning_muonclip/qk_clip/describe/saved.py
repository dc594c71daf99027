"""Specs in a checkpoint, so that a resumed run need not infer them again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from lightning_muonclip.qk_clip.describe.declared import AttentionModules, named_modules, named_parameters
from lightning_muonclip.qk_clip.describe.layout import ChannelMap
from lightning_muonclip.qk_clip.describe.spec import AttentionSpec, HeadAxis, Projection, Softmax


def saved_attention(model: nn.Module, attention: AttentionModules) -> dict[str, Any]:
    """The specs by module name, and a fingerprint of the model, in plain containers, numbers, strings and tensors."""
    specs = {
        name: {**asdict(replace(spec, sizes=dict(spec.sizes))), "head_axes": [list(own) for own in spec.head_axes]}
        for name, (_, spec) in attention.items()
    }
    return {"specs": specs, "fingerprint": fingerprint(model)}


def restored_attention(model: nn.Module, saved: Mapping[str, Any]) -> AttentionModules | None:
    """What :func:`saved_attention` saved, or ``None`` if it is of another model."""
    if saved.get("fingerprint") != fingerprint(model):
        return None
    modules = named_modules(model)
    return {name: (modules[name], _spec(own)) for name, own in saved["specs"].items() if name in modules}


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, classes of modules, and shapes of parameters."""
    modules = (
        f"{name} {type(module).__qualname__.removeprefix('FSDP')}" for name, module in named_modules(model).items()
    )
    params = (f"{name} {tuple(param.shape)}" for name, param in named_parameters(model).items())
    return hashlib.sha256("\n".join([*modules, *params]).encode()).hexdigest()


def _spec(saved: Mapping[str, Any]) -> AttentionSpec:
    parts = {
        "projections": tuple(map(_projection, saved["projections"])),
        "gains": tuple(map(_projection, saved["gains"])),
        "softmaxes": tuple(Softmax(**own) for own in saved["softmaxes"]),
        "head_axes": tuple(HeadAxis(*own) for own in saved["head_axes"]),
    }
    return AttentionSpec(**{**saved, **parts})


def _projection(saved: Mapping[str, Any]) -> Projection:
    layout = saved["layout"]
    return Projection(**{**saved, "layout": layout if isinstance(layout, str) else ChannelMap(**layout)})
