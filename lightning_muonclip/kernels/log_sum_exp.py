"""Attention whose kernel also tells the log-sum-exp of every query's logits: an upper bound of the largest one, for free.

``max(s) <= log(sum(exp(s))) <= max(s) + log(n)`` for n visible keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


def tells_log_sum_exp(query: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> bool:
    """Whether :func:`attention_log_sum_exp` can compute this attention.

    So far on CPUs; without dropout; and with no additive mask, whose values would be part of the sum.
    """
    is_plain = mask is None or mask.dtype is torch.bool
    return query.device.type == "cpu" and query.ndim == 4 and dropout == 0 and is_plain


def attention_log_sum_exp(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention and the largest log-sum-exp of every head.

    Args:
        query: Shape ``(batch, heads, L, d)``.
        key: Shape ``(batch, key_heads, S, d)``.
        value: Shape ``(batch, key_heads, S, d)``.
        mask: ``None``, or boolean and broadcastable to ``(batch, heads, L, S)``.
        is_causal: Query i sees keys 0..i only.
        scale: Factor on the dot products.

    Returns:
        Output of shape ``(batch, heads, L, d)`` and bounds of shape ``(heads,)``, float32.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if mask is not None:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    # torch offers the log-sum-exp of its fused kernels only by the kernel's own name.
    output, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return output, log_sum_exp.detach().amax((0, 2)).float()
