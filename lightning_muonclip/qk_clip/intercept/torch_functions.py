"""Patches of torch's attention functions, which tell the logits of their calls."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_muonclip.kernels.context_parallel import attention_with_blocks, is_split
from lightning_muonclip.kernels.flash import FlashCalls, flash_call
from lightning_muonclip.kernels.hidden import HIDDEN
from lightning_muonclip.kernels.log_sum_exp import SDPA, attention_with_log_sum_exp, bounds_of_logits
from lightning_muonclip.kernels.measure import Logits
from lightning_muonclip.qk_clip.intercept.listener import Listener, current_listener, unrecorded

_VARLEN_ARGUMENTS = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
_MULTI_HEAD_ARGUMENTS = tuple(inspect.signature(F.multi_head_attention_forward).parameters)


def patch_sdpa(original: Callable[..., Any]) -> Callable[..., Any]:
    """Listens to ``scaled_dot_product_attention``."""

    def measure(
        listener: Listener,
        log_sum_exp: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        bounds = None
        if log_sum_exp is not None and not (is_causal and attn_mask is not None):  # together they may hide a whole row
            bounds = bounds_of_logits(log_sum_exp, attn_mask)
        listener.measure("scaled_dot_product_attention", Logits(query, key, bounds, scale, is_causal, mask=attn_mask))

    @functools.wraps(original)
    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Tensor:
        listener = current_listener()
        if listener is None:
            return original(*args, **kwargs)
        if is_split(args[0] if args else kwargs["query"]):
            output, blocks = unrecorded(attention_with_blocks, original, *args, **kwargs)
            for logits in blocks:
                listener.measure("scaled_dot_product_attention in blocks", logits)
            return output
        output, log_sum_exp = unrecorded(attention_with_log_sum_exp, original, *args, **kwargs)
        measure(listener, log_sum_exp, *args, **kwargs)
        return output

    patched: Any = scaled_dot_product_attention
    patched.watches = patched, original  # itself, since whoever wraps it may copy its attributes
    return scaled_dot_product_attention


_any_sdpa = patch_sdpa(SDPA)


class AnySdpa(TorchFunctionMode):
    """Listens to ``scaled_dot_product_attention`` under every name that a caller may have for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_any_sdpa if func is SDPA else func)(*args, **(kwargs or {}))


def patch_multi_head(original: Callable[..., Any]) -> Callable[..., Any]:
    """Listens to ``multi_head_attention_forward``, where it calls no other function."""

    @functools.wraps(original)
    def multi_head_attention_forward(*args: Any, **kwargs: Any) -> Any:
        listener = current_listener()
        asked = {**dict(zip(_MULTI_HEAD_ARGUMENTS, args)), **kwargs}
        # With need_weights it computes the logits itself, and torch.compile does not trace it. Otherwise it calls SDPA.
        if listener is None or not (asked.get("need_weights", True) or torch.compiler.is_compiling()):
            return original(*args, **kwargs)
        with torch.no_grad():
            logits = _multi_head_logits(asked)
        listener.measure("multi_head_attention_forward", logits)
        return unrecorded(original, *args, **kwargs)

    return multi_head_attention_forward


def _multi_head_logits(asked: Mapping[str, Any]) -> Logits:
    """The logits of torch's ``multi_head_attention_forward``, from its arguments."""
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
    if visible is not None:  # appended keys are always visible
        visible = F.pad(visible, (0, key.shape[-2] - visible.shape[-1]), value=True)
    return Logits(query, key, mask=visible)


def patch_flex(original: Callable[..., Any]) -> Callable[..., Any]:
    """Listens to ``flex_attention``."""

    def listen(
        listener: Listener,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_mod: Any = None,
        block_mask: Any = None,
        scale: float | None = None,
        *_: Any,
        **__: Any,
    ) -> None:
        if score_mod is not None and not torch.compiler.is_compiling():
            warnings.warn(
                "QK-Clip counts pairs that a score_mod hides as visible; hide pairs by block_mask instead",
                stacklevel=3,
            )
        listener.measure("flex_attention", Logits(query, key, scale=scale, mask=dense_mask(block_mask, query, key)))

    @functools.wraps(original)
    def flex_attention(*args: Any, **kwargs: Any) -> Any:
        listener = current_listener()
        if listener is not None:
            listen(listener, *args, **kwargs)
        return original(*args, **kwargs)

    return flex_attention


def patch_varlen(original: Callable[..., Any]) -> Callable[..., Any]:
    """Listens to ``varlen_attn``."""

    @functools.wraps(original)
    def varlen_attn(*args: Any, **kwargs: Any) -> Any:
        listener = current_listener()
        if listener is None:
            return original(*args, **kwargs)
        if torch.compiler.is_compiling():  # which cannot trace a mode
            call = flash_call({**dict(zip(_VARLEN_ARGUMENTS, args)), **kwargs}, None)
            if call is not None:
                listener.measure("varlen_attn", call)
            return original(*args, **kwargs)
        with FlashCalls() as seen:
            output = original(*args, **kwargs)
        measure_flash(listener, "varlen_attn", seen)
        return output

    return varlen_attn


def measure_flash(listener: Listener, source: str, seen: FlashCalls) -> bool:
    """Measures what a single kernel of FlashAttention tells; whether it tells enough."""
    call = seen.calls[0] if len(seen.calls) == 1 else None
    if call is not None:
        listener.measure(source, call)
    return call is not None


def dense_mask(block_mask: Any, query: Tensor, key: Tensor) -> Tensor | None:
    """A BlockMask as a boolean tensor; tensors are returned unchanged."""
    if block_mask is None or isinstance(block_mask, Tensor):
        return block_mask
    from torch.nn.attention.flex_attention import create_mask

    (batch, heads), (queries, keys) = block_mask.shape[:2], (query.shape[-2], key.shape[-2])
    rows, columns = block_mask.BLOCK_SIZE
    # A pair is visible if its block is listed and the mask_mod allows it.
    listed = block_mask.to_dense().bool().repeat_interleave(rows, -2).repeat_interleave(columns, -1)
    visible = create_mask(block_mask.mask_mod, batch, heads, queries, keys, str(query.device))
    return visible & listed[..., :queries, :keys]
