"""Attention that also returns each query's log-sum-exp, a free upper bound on its largest logit.

``max(s) <= log(sum(exp(s))) <= max(s) + log(n)`` for n visible keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


def supports_log_sum_exp(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> bool:
    """Whether :func:`attention_log_sum_exp` can compute this attention.

    CPU only, without dropout, and without an additive mask, whose values would enter the sum. The kernel does not validate
    its inputs; the remaining checks are those that torch makes before it calls the kernel.
    """
    tensors = (query, key, value)
    return (
        query.device.type == "cpu"
        and dropout == 0
        and (mask is None or mask.dtype is torch.bool)
        and not torch.is_autocast_enabled("cpu")  # autocast converts the inputs of torch's function, not of its kernel
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
        counted: Same shape as ``mask``. Queries without a visible pair here do not count towards the bound. Defaults to
            ``mask``.

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
    # torch exposes the log-sum-exp of its fused kernels only through the kernels themselves.
    output, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=additive, scale=scale
    )
    counted = mask if counted is None else counted
    if counted is not None:
        # The kernel returns 0 where nothing is visible.
        log_sum_exp = log_sum_exp.masked_fill(~counted.any(-1), float("-inf"))
    return output, log_sum_exp.detach().amax((0, 2)).float()
