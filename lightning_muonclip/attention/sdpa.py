"""Attention by torch's fused kernels, whose log-sum-exp leads to the maximum logits."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_muonclip.attention.masks import AttentionMask
from lightning_muonclip.attention.score_mods import ScoreMod
from lightning_muonclip.attention.tracking import measure
from lightning_muonclip.kernels.context_parallel import ContextParallelError, is_context_parallel, is_split
from lightning_muonclip.kernels.log_sum_exp import attention_with_log_sum_exp, bounds_of_logits


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
        ContextParallelError: If logits are to be measured under context parallelism.
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
    # What QK-Clip has put in the place of torch's function is for modules of other libraries.
    function: Any = F.scaled_dot_product_attention
    patched, original = getattr(function, "watches", (None, None))
    if patched is function:
        function = original
    if track is not None and (is_context_parallel() or is_split(query)):
        raise ContextParallelError(
            "the attention modules of this package do not measure logits under context_parallel: they do not know which"
            " positions a rank has. Use a module that calls scaled_dot_product_attention itself, or leave them alone with"
            " specs={name: None}"
        )
    shares_keys = heads != key.shape[1]
    if track is None:
        output = function(query, key, value, dense, 0.0, is_causal, scale=scale, enable_gqa=shares_keys)
        return output[..., :width], None
    output, log_sum_exp = attention_with_log_sum_exp(
        function, query, key, value, dense, 0.0, is_causal, scale=scale, enable_gqa=shares_keys
    )
    bounds = None
    if log_sum_exp is not None:
        bounds = bounds_of_logits(log_sum_exp, mask.dense(length, query.device, batch=batch, heads=heads, counted=True))
    return output[..., :width], measure(query, key, scale, mask, track, bounds)
