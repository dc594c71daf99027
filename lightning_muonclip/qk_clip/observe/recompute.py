"""Attention classes that call no function that can be intercepted: how to obtain their queries and keys, one row each.

:data:`METHODS` lists methods whose arguments are the queries and keys. :data:`PROJECTIONS` lists the other classes, whose
queries and keys are recomputed, without gradients, from the output of a fused projection.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muonclip.qk_clip.describe.names import library, qualified_names, reading
from lightning_muonclip.qk_clip.intercept import Logits, Place, patch_method


@dataclass(frozen=True)
class Method:
    """A method that attends; ``logits(module, *args, **kwargs)`` reads its arguments, or returns ``None`` to skip a call."""

    method: str
    logits: Callable[..., Logits | None]


@dataclass(frozen=True)
class Recomputation:
    """A fused projection, and how its output becomes logits: ``logits(module, projected, *args, **kwargs)``."""

    projection: str
    logits: Callable[..., Logits]


def find_recomputation(module: nn.Module) -> Recomputation | None:
    """The row of a module's class, if there is one. One whose projection is gone is left out."""
    rows = (PROJECTIONS[name] for name in qualified_names(type(module)) if name in PROJECTIONS)
    return next((row for row in rows if hasattr(module, row.projection)), None)


def recomputed(row: Recomputation, module: nn.Module, projected: Tensor, *args: Any, **kwargs: Any) -> Logits:
    """The logits of a forward, from the output of its fused projection and its arguments.

    Raises:
        ChangedClassError: If the module's class does not match the row.
    """
    with reading(type(module), f"the queries and keys in the output of its {row.projection}"):
        return row.logits(module, projected, *args, **kwargs)


def methods_of(cls: type[nn.Module]) -> Iterator[Place]:
    """The methods of a class that attend, as places to patch. Methods that no longer exist are skipped."""
    for name in qualified_names(cls):
        row = METHODS.get(name)
        owner = row and next((base for base in cls.__mro__ if row.method in vars(base)), None)
        if row is not None and owner is not None:
            yield owner, row.method, partial(patch_method, partial(_read, row))


def needs_hooks(module: nn.Module) -> bool:
    """Whether a module is observed by hooks or methods alone, which torch.compile does not guard."""
    return find_recomputation(module) is not None or any(methods_of(type(module)))


def missing(module: nn.Module) -> str:
    """A sentence for an error that names what the module's class no longer has; empty if nothing is missing."""
    cls = type(module)
    names = qualified_names(cls)
    sought = [METHODS[name].method for name in names if name in METHODS]
    sought += [PROJECTIONS[name].projection for name in names if name in PROJECTIONS]
    return "".join(f" {cls.__name__} of {library(cls)} no longer has {x}." for x in sought if not hasattr(module, x))


def _read(row: Method, module: nn.Module, *args: Any, **kwargs: Any) -> Logits | None:
    with reading(type(module), f"the queries and keys that its method {row.method} is called with"):
        return row.logits(module, *args, **kwargs)


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
        return None  # it calls SDPA
    scale = (config.attention_scores_scalar or q.shape[-1]) ** -0.5 * module.mscale**2
    return Logits(q, k, scale, mask, is_causal=mask is None)


def _with_past(module: Any, key: Tensor, cache: Any) -> Tensor:
    """All keys, including those of a Hugging Face cache, which the forward has already updated."""
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
    cache: Any = None,
    **__: Any,
) -> Logits:
    query, key, _value = projected.unflatten(-1, (module.num_heads, 3, module.head_dim)).transpose(1, 2).unbind(3)
    return Logits(
        query, _with_past(module, key, layer_past if cache is None else cache), module.inv_norm_factor, attention_mask
    )


def _mpt(
    module: Any,
    projected: Tensor,
    hidden_states: Tensor,
    position_bias: Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    *,
    cache: Any = None,
    **_: Any,
) -> Logits:
    if module.clip_qkv:
        projected = projected.clamp(-module.clip_qkv, module.clip_qkv)
    query, key, _value = projected.unflatten(-1, (3, module.n_heads, module.head_dim)).transpose(1, 3).unbind(2)
    key = _with_past(module, key, past_key_values if cache is None else cache)
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
    cache: Any = None,
    **__: Any,
) -> Logits:
    query, key, _value = (part.transpose(1, 2) for part in module._split_heads(projected))
    if alibi is None and position_embeddings is not None:
        rotate = inspect.unwrap(type(module).forward).__globals__["apply_rotary_pos_emb"]
        query, key = rotate(query, key, *position_embeddings)
    return Logits(
        query, _with_past(module, key, layer_past if cache is None else cache), module.inv_norm_factor, attention_mask
    )


def _timm(
    module: Any, projected: Tensor, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Logits:
    query, key, _value = projected.unflatten(-1, (3, module.num_heads, module.head_dim)).transpose(1, 3).unbind(2)
    return Logits(module.q_norm(query), module.k_norm(key), module.scale, attn_mask, is_causal)


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
}
