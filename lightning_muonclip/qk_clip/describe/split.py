"""Splits fused weights into the matrices that Muon orthogonalizes separately."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muonclip.qk_clip.describe.declared import AttentionModules, is_inside, named_modules
from lightning_muonclip.qk_clip.describe.fused import FusedWeight, FusedWeights
from lightning_muonclip.qk_clip.describe.layout import SPLITS, split_channels
from lightning_muonclip.qk_clip.describe.names import stores_inputs_first
from lightning_muonclip.qk_clip.describe.spec import Projection
from lightning_muonclip.qk_clip.describe.weights import channel_map

#: The matrices of each weight that is not a single one of shape (out, in).
MatrixParts = dict[Tensor, FusedWeight]

#: The matrices in the weights of torch's recurrent cells, in their order.
_GATES = {
    "LSTM": ("input", "forget", "cell", "output"),
    "GRU": ("reset", "update", "new"),
}


def check_split(split: str) -> None:
    """Raises ValueError unless ``split`` is known."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}")


def matrix_parts(
    model: nn.Module, attention: AttentionModules, split: str, fused: FusedWeights | None = None
) -> MatrixParts:
    """The parts of every weight that is not a single matrix of shape (out, in).

    Of a weight that is known in several ways, the layout of attention counts first, then its class, then what a forward
    has shown.

    Args:
        model: The model.
        attention: Its attention modules and their specs.
        split: What becomes of attention: ``"qkv"`` separates queries, keys and values; ``"heads"`` also separates their
            heads (Muon Split of GLM-5, arXiv 2602.15763; the per-head Muon of Kimi K3, arXiv 2607.24653, section 2.5);
            ``"pairs"`` leaves two neighbouring heads together (modded-nanogpt, record 80); ``"none"`` separates nothing.
        fused: What a forward has shown, by parameter name.

    Raises:
        ValueError: If ``split`` is unknown, or if a layout does not match its weight.
    """
    check_split(split)
    return {
        **_seen(model, attention if split == "none" else {}, fused or {}),
        **_declared(model),
        **_of_attention(attention, split),
    }


def _seen(model: nn.Module, whole: AttentionModules, fused: Mapping[str, FusedWeight]) -> MatrixParts:
    """What a forward has shown, but inside of attention that stays whole."""
    parts: MatrixParts = {}
    for name, module in named_modules(model).items():
        if not any(is_inside(name, outer) for outer in whole):
            for leaf, param in module.named_parameters(recurse=False):
                own = fused.get(f"{name}.{leaf}".lstrip("."))
                if own is not None and own.dim < param.ndim and sum(map(len, own.channels)) == param.shape[own.dim]:
                    parts[param] = own
    return parts


def _declared(model: nn.Module) -> MatrixParts:
    """The parts that a class tells."""
    parts: MatrixParts = {}
    for module in model.modules():
        if stores_inputs_first(module):
            for param in module.parameters(recurse=False):
                if param.ndim > 1:
                    parts[param] = FusedWeight(param.ndim - 1, [torch.arange(param.shape[-1])])
        parts |= _of_experts(module) | _of_gates(module)
    return parts


def _of_experts(module: nn.Module) -> MatrixParts:
    """Gate and up in the experts of Hugging Face, one after the other or in turns."""
    param = module._parameters.get("gate_up_proj")
    if param is None or param.ndim != 3 or not vars(module).get("has_gate"):
        return {}
    dim = 2 if stores_inputs_first(module) else 1
    channels = torch.arange(param.shape[dim])
    halves = channels.chunk(2) if module.is_concatenated else (channels[::2], channels[1::2])
    return {param: FusedWeight(dim, list(halves), ("gate", "up"))}


def _of_gates(module: nn.Module) -> MatrixParts:
    """Of torch's recurrent layers, which one kernel computes."""
    if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return {}
    cell = getattr(module, "mode", type(module).__name__.removesuffix("Cell"))
    names = _GATES.get(cell, ())
    return {
        param: FusedWeight(0, list(torch.arange(len(param)).chunk(len(names))), names)
        for name, param in module.named_parameters(recurse=False)
        if names and name.startswith(("weight_ih", "weight_hh"))
    }


def attention_heads(attention: AttentionModules) -> dict[Tensor, tuple[int, list[list[Tensor]]]]:
    """The heads in the weights of attention: their output dimension, and the channels of each; queries, keys, the rest."""
    whole, apart = _of_attention(attention, "qkv", single=True), _of_attention(attention, "heads", single=True)
    return {
        weight: (dim, [[head for head in apart[weight].channels if bool(torch.isin(head, own).all())] for own in kinds])
        for weight, (dim, kinds, _) in whole.items()
    }


def _of_attention(attention: AttentionModules, split: str, single: bool = False) -> MatrixParts:
    parts: MatrixParts = {}
    for name, (module, spec) in attention.items():
        for projection in spec.projections:
            weight = _matrix(module, projection)
            if weight is None:
                continue
            dims, channels = channel_map(name, projection.name, projection.layout, projection.dims, weight, spec)
            own = split_channels(channels, split)
            if len(dims) == 1 and (single or dims != (0,) or len(own) > 1):
                parts[weight] = FusedWeight(dims[0], own)
    return parts


def _matrix(module: nn.Module, projection: Projection) -> Tensor | None:
    """The weight of a projection, or ``None`` if it is no matrix, no convolution, or no parameter."""
    for path in (f"{projection.name}.weight", projection.name):
        try:
            param: Any = module.get_parameter(path)
        except AttributeError:
            continue
        is_convolution = param.ndim > 2 and projection.dims == (0,)
        return param if param.ndim == 2 or is_convolution else None
    return None
