"""Attention whose kernel also tells the log-sum-exp of every query's logits: an upper bound of the largest one, for free.

``max(s) <= log(sum(exp(s))) <= max(s) + log(n)`` for n visible keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


def tells_log_sum_exp(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> bool:
    """Whether :func:`attention_log_sum_exp` can compute this attention.

    So far on CPUs; without dropout; and with no additive mask, whose values would be part of the sum. The kernel does not
    look at the rest before it reads: torch's own function asks the same before it calls it.
    """
    tensors = (query, key, value)
    return (
        query.device.type == "cpu"
        and dropout == 0
        and (mask is None or mask.dtype is torch.bool)
        and not torch.is_autocast_enabled("cpu")  # which converts for torch's function, and not for its kernel
        and all(x.ndim == 4 and x.dtype is query.dtype and x.shape[0] == query.shape[0] for x in tensors)
        and all(x.shape[-1] == query.shape[-1] and x.stride(-1) == 1 and x.numel() > 0 for x in tensors)
        and key.shape[:-1] == value.shape[:-1]
        and query.shape[1] % key.shape[1] == 0
    )


def attention_log_sum_exp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention and the largest log-sum-exp of every head.

    Args:
        query: Shape ``(batch, heads, L, d)``.
        key: Shape ``(batch, key_heads, S, d)``.
        value: Shape ``(batch, key_heads, S, d)``.
        mask: ``None``, or boolean and broadcastable to ``(batch, heads, L, S)``.
        is_causal: Query i sees keys 0..i only.
        scale: Factor on the dot products.
        counted: Of the shape of ``mask``: a query without a pair here has no say in the bound; ``None`` is ``mask``.

    Returns:
        Output of shape ``(batch, heads, L, d)`` and bounds of shape ``(heads,)``, float32; ``-inf`` for a head that sees
        nothing.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    additive = None
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]
        additive = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    # torch offers the log-sum-exp of its fused kernels only by the kernel's own name.
    output, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=additive, scale=scale
    )
    counted = mask if counted is None else counted
    if counted is not None:
        # The kernel gives 0 where nothing is visible.
        log_sum_exp = log_sum_exp.masked_fill(~counted.any(-1), float("-inf"))
    return output, log_sum_exp.detach().amax((0, 2)).float()
