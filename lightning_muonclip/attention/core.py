"""Scaled dot-product attention that also tells each head's largest logit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_muonclip.attention.masks import AttentionMask
from lightning_muonclip.kernels.max_logits import max_logits

CAUSAL = AttentionMask()


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, mask: AttentionMask | None = None, track: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention of all heads.

    Args:
        query: Shape ``(batch, heads, length, d)``.
        key: Shape ``(batch, key_heads, length, d)``.
        value: Shape ``(batch, key_heads, length, d_v)``.
        scale: Factor on the dot products.
        mask: ``None`` is causal.
        track: Whether to measure the logits.

    Returns:
        Output of shape ``(batch, heads, length, d_v)``, and the per-head maxima of shape ``(heads,)`` (see
        :func:`~lightning_muonclip.kernels.max_logits.max_logits`) or ``None``.
    """
    mask = CAUSAL if mask is None else mask
    dense = mask.dense(query.shape[-2])
    is_causal = mask.causal and dense is None
    maxima = None
    if track:
        with torch.profiler.record_function("muonclip::max_logits"):
            maxima = max_logits(query, key, scale=scale, is_causal=mask.causal, mask=mask.real_pairs(dense))
    # The fused kernels want values as wide as keys; zeros that are cut off again are cheaper than the plain kernel.
    width = value.shape[-1]
    if width < key.shape[-1]:
        value = F.pad(value, (0, key.shape[-1] - width))
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=dense,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[..., :width], maxima
