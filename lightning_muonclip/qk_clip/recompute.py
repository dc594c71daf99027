"""Attention that calls nothing that can be overheard: where its queries and keys are to be had, a row a class.

:data:`METHODS` are methods of a class that are given queries and keys; :data:`PROJECTIONS` are the rest, whose queries and
keys are made again from the output of their fused projection. Nothing here has a gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_muonclip.kernels.max_logits import HIDDEN
from lightning_muonclip.qk_clip.names import qualified_names


@dataclass(frozen=True)
class Logits:
    """What :func:`~lightning_muonclip.kernels.max_logits.max_logits` takes; a scale of ``None`` is ``d ** -0.5``."""

    query: Tensor
    key: Tensor
    scale: float | None = None
    mask: Tensor | None = None
    is_causal: bool = False


@dataclass(frozen=True)
class Method:
    """A method that attends, and what its arguments mean: ``logits(module, *args, **kwargs)``; ``None`` if not now."""

    method: str
    logits: Callable[..., Logits | None]


@dataclass(frozen=True)
class Recomputation:
    """A fused projection, and how its output becomes logits: ``logits(module, projected, *args, **kwargs)``."""

    projection: str
    logits: Callable[..., Logits]


def find_recomputation(module: nn.Module) -> Recomputation | None:
    """The row of a module's class, if there is one."""
    return next((PROJECTIONS[name] for name in qualified_names(type(module)) if name in PROJECTIONS), None)


def is_heard_by_hooks_alone(module: nn.Module) -> bool:
    """Whether no function that the module calls, and torch.compile guards, is rebound to hear it."""
    return any(name in METHODS or name in PROJECTIONS for name in qualified_names(type(module)))


def _gptj(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Logits:
    return Logits(query, key, 1 / float(module.scale_attn), attention_mask)


def _gpt_neo(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Logits:
    queries, keys = query.shape[-2], key.shape[-2]
    window = module.bias[:, :, keys - queries : keys, :keys]
    if attention_mask is not None:
        window = torch.where(window, attention_mask, torch.finfo(attention_mask.dtype).min)
    return Logits(query, key, 1.0, window)


def _gpt2(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Logits:
    return Logits(query, key, module.scaling, attention_mask)


def _litgpt(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Logits | None:
    config = module.config
    if config.attention_logit_softcapping is None:
        return None  # it calls torch's function
    scale = (config.attention_scores_scalar or q.shape[-1]) ** -0.5 * module.mscale**2
    return Logits(q, k, scale, mask, is_causal=mask is None)


def _with_past(module: Any, key: Tensor, cache: Any) -> Tensor:
    """Keys behind those of a cache of Hugging Face, into which the forward has put them already."""
    return key if cache is None else cache.layers[module.layer_idx].keys


def _bloom(
    module: Any,
    projected: Tensor,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None = None,
    layer_past: Any = None,
    *_: Any,
    **__: Any,
) -> Logits:
    query, key, _value = projected.unflatten(-1, (module.num_heads, 3, module.head_dim)).transpose(1, 2).unbind(3)
    return Logits(query, _with_past(module, key, layer_past), module.inv_norm_factor, attention_mask)


def _mpt(
    module: Any,
    projected: Tensor,
    hidden_states: Tensor,
    position_bias: Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Logits:
    if module.clip_qkv:
        projected = projected.clamp(-module.clip_qkv, module.clip_qkv)
    query, key, _value = projected.unflatten(-1, (3, module.n_heads, module.head_dim)).transpose(1, 3).unbind(2)
    key = _with_past(module, key, past_key_values)
    return Logits(query, key, module.softmax_scale, None if attention_mask is None else ~attention_mask)


def _falcon(
    module: Any,
    projected: Tensor,
    hidden_states: Tensor,
    alibi: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    layer_past: Any = None,
    *_: Any,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **__: Any,
) -> Logits:
    query, key, _value = (part.transpose(1, 2) for part in module._split_heads(projected))
    if alibi is None and position_embeddings is not None:
        rotate = inspect.unwrap(type(module).forward).__globals__["apply_rotary_pos_emb"]
        query, key = rotate(query, key, *position_embeddings)
    return Logits(query, _with_past(module, key, layer_past), module.inv_norm_factor, attention_mask)


def _timm(
    module: Any, projected: Tensor, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Logits:
    query, key, _value = projected.unflatten(-1, (3, module.num_heads, module.head_dim)).transpose(1, 3).unbind(2)
    return Logits(module.q_norm(query), module.k_norm(key), module.scale, attn_mask, is_causal)


def multi_head(asked: Mapping[str, Any]) -> Logits:
    """The logits of torch's ``multi_head_attention_forward``, from its arguments by name."""
    query, key, heads = asked["query"], asked["key"], asked["num_heads"]
    padding, mask = asked.get("key_padding_mask"), asked.get("attn_mask")
    if query.ndim == 2:
        query, key, padding = query[:, None], key[:, None], None if padding is None else padding[None]
    if asked.get("use_separate_proj_weight"):
        query_weight, key_weight = asked["q_proj_weight"], asked["k_proj_weight"]
    else:
        query_weight, key_weight, _ = asked["in_proj_weight"].chunk(3)
    bias = asked["in_proj_bias"]
    query_bias, key_bias, _ = (None, None, None) if bias is None else bias.chunk(3)
    query, key = F.linear(query, query_weight, query_bias), F.linear(key, key_weight, key_bias)
    if asked["bias_k"] is not None:
        key = torch.cat([key, asked["bias_k"].expand(1, key.shape[1], -1)])
    query, key = (x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for x in (query, key))
    if asked.get("static_k") is not None:
        key = asked["static_k"].unflatten(0, (-1, heads))
    if asked["add_zero_attn"]:
        key = F.pad(key, (0, 0, 0, 1))
    masks = [] if padding is None else [padding[:, None, None, :]]
    if mask is not None:
        masks.append(mask.unflatten(0, (-1, heads)) if mask.ndim == 3 else mask)
    visible: Tensor | None = None
    for mask in masks:
        shown = ~mask if mask.dtype is torch.bool else mask > HIDDEN
        visible = shown if visible is None else visible & shown
    if visible is not None:  # what was added behind the keys is always seen
        visible = F.pad(visible, (0, key.shape[-2] - visible.shape[-1]), value=True)
    return Logits(query, key, query.shape[-1] ** -0.5, visible)


METHODS: dict[str, Method] = {
    "transformers.models.gptj.modeling_gptj.GPTJAttention": Method("_attn", _gptj),
    "transformers.models.codegen.modeling_codegen.CodeGenAttention": Method("_attn", _gptj),
    "transformers.models.gpt_neo.modeling_gpt_neo.GPTNeoSelfAttention": Method("_attn", _gpt_neo),
    "transformers.models.gpt2.modeling_gpt2.GPT2Attention": Method("_upcast_and_reordered_attn", _gpt2),
    "litgpt.model.CausalSelfAttention": Method("scaled_dot_product_attention", _litgpt),
    "litgpt.model.MultiheadLatentAttention": Method("scaled_dot_product_attention", _litgpt),
}

PROJECTIONS: dict[str, Recomputation] = {
    "transformers.models.bloom.modeling_bloom.BloomAttention": Recomputation("query_key_value", _bloom),
    "transformers.models.mpt.modeling_mpt.MptAttention": Recomputation("Wqkv", _mpt),
    "transformers.models.falcon.modeling_falcon.FalconAttention": Recomputation("query_key_value", _falcon),
    "timm.layers.attention.Attention": Recomputation("qkv", _timm),
    "timm.models.vision_transformer.Attention": Recomputation("qkv", _timm),  # timm < 1.0.20
}
