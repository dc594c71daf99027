"""Attention by torch's fused kernels, with a separate pass for the maximum logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_muonclip.attention.masks import AttentionMask
from lightning_muonclip.attention.score_mods import ScoreMod
from lightning_muonclip.attention.tracking import measure
from lightning_muonclip.kernels.log_sum_exp import attention_log_sum_exp, supports_log_sum_exp


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: AttentionMask,
    score_mod: ScoreMod | None,
    sinks: Tensor | None,
    track: str | None,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`~lightning_muonclip.attention.core.attention`.

    Raises:
        ValueError: If there is a score_mod or there are sinks.
    """
    if score_mod is not None or sinks is not None:
        raise ValueError(
            "backend 'sdpa' supports no score_mod, soft-cap or sinks; use backend='auto', 'flex' or 'eager'"
        )
    batch, heads, length, _ = query.shape
    dense = mask.dense(length, query.device, batch=batch, heads=heads)
    is_causal = mask.causal and dense is None
    # The fused kernels need values as wide as keys; padding with zeros is cheaper than the unfused kernel.
    width = value.shape[-1]
    if width < key.shape[-1]:
        value = F.pad(value, (0, key.shape[-1] - width))
    if track == "lse" and supports_log_sum_exp(query, key, value, dense, 0.0):
        counted = mask.dense(length, query.device, batch=batch, heads=heads, counted=True)
        output, bounds = attention_log_sum_exp(query, key, value, dense, is_causal, scale, counted=counted)
        return output[..., :width], bounds
    maxima = None if track is None else measure(query, key, scale, mask)
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=dense,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=heads != key.shape[1],
    )
    return output[..., :width], maxima
