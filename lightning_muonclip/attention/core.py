"""Scaled dot-product attention that also tells each head's largest logit."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_muonclip.attention.masks import AttentionMask
from lightning_muonclip.kernels.log_sum_exp import attention_log_sum_exp, tells_log_sum_exp
from lightning_muonclip.kernels.max_logits import max_logits

CAUSAL = AttentionMask()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    mask: AttentionMask | None = None,
    track: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of all heads.

    Args:
        query: Shape ``(batch, heads, length, d)``.
        key: Shape ``(batch, key_heads, length, d)``.
        value: Shape ``(batch, key_heads, length, d_v)``.
        scale: Factor on the dot products.
        mask: ``None`` is causal.
        track: ``None`` does not measure the logits, ``"exact"`` does, ``"lse"`` takes the kernel's log-sum-exp as an upper
            bound where it can be had, and measures elsewhere.

    Returns:
        Output of shape ``(batch, heads, length, d_v)``, and the per-head maxima of shape ``(heads,)`` (see
        :func:`~lightning_muonclip.kernels.max_logits.max_logits`) or ``None``.
    """
    mask = CAUSAL if mask is None else mask
    dense = mask.dense(query.shape[-2], query.device)
    is_causal = mask.causal and dense is None
    # The fused kernels want values as wide as keys; zeros that are cut off again are cheaper than the plain kernel.
    width = value.shape[-1]
    if width < key.shape[-1]:
        value = F.pad(value, (0, key.shape[-1] - width))
    if track == "lse" and tells_log_sum_exp(query, key, value, dense, 0.0):
        real = mask.real_pairs(dense)
        output, bounds = attention_log_sum_exp(query, key, value, dense, is_causal, scale, counted=real)
        return output[..., :width], bounds
    maxima = None
    if track is not None:
        # Not by the dense mask: a window and documents tell which tiles need no look.
        maxima = max_logits(
            query,
            key,
            scale=scale,
            is_causal=mask.causal,
            window=mask.window,
            documents=mask.real_documents(),
        )
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
