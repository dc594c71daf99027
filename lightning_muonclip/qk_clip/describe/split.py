"""Splits fused projections into the matrices that Muon orthogonalizes separately, from the layouts of QK-Clip."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_muonclip.qk_clip.describe.declared import AttentionModules
from lightning_muonclip.qk_clip.describe.layout import SPLITS, split_channels
from lightning_muonclip.qk_clip.describe.names import TRANSPOSED_LINEARS, qualified_names
from lightning_muonclip.qk_clip.describe.spec import Projection
from lightning_muonclip.qk_clip.describe.weights import channel_map

#: For each weight, its output dimension and the channels of each matrix in it.
MatrixParts = dict[Tensor, tuple[int, list[Tensor]]]


def check_split(split: str) -> None:
    """Raises ValueError unless ``split`` is known."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}")


def matrix_parts(model: nn.Module, attention: AttentionModules, split: str) -> MatrixParts:
    """The parts of every weight that is not a single matrix of shape (out, in).

    Args:
        model: The model.
        attention: Its attention modules and their specs.
        split: ``"qkv"`` separates queries, keys and values; ``"heads"`` also separates their heads (Muon Split of GLM-5,
            arXiv 2602.15763; the per-head Muon of Kimi K3, arXiv 2607.24653, section 2.5); ``"none"`` separates nothing.

    Raises:
        ValueError: If ``split`` is unknown, or if a layout does not match its weight.
    """
    check_split(split)
    parts: MatrixParts = {}
    for module in model.modules():
        if not set(TRANSPOSED_LINEARS).isdisjoint(qualified_names(type(module))):  # fully_shard makes a subclass
            transposed = module.get_parameter("weight")
            parts[transposed] = (1, [torch.arange(transposed.shape[1])])
    for name, (module, spec) in attention.items():
        for projection in spec.projections:
            weight = _matrix(module, projection)
            if weight is None:
                continue
            dims, channels = channel_map(name, projection.name, projection.layout, projection.dims, weight, spec)
            own = split_channels(channels, split)
            if len(dims) == 1 and (dims != (0,) or len(own) > 1):
                parts[weight] = (dims[0], own)
    return parts


def _matrix(module: nn.Module, projection: Projection) -> Tensor | None:
    """The weight of a projection, or ``None`` if it is not a matrix or not a parameter."""
    for path in (f"{projection.name}.weight", projection.name):
        try:
            param = module.get_parameter(path)
        except AttributeError:
            continue
        return param if param.ndim == 2 else None
    return None
