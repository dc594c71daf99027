"""Attention by FlexAttention, whose kernel finds the largest logits on its way."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_muonclip.attention.blocks import clamped, filled
from lightning_muonclip.attention.compiled import fast
from lightning_muonclip.attention.masks import AttentionMask
from lightning_muonclip.attention.score_mods import ScoreMod
from lightning_muonclip.attention.tracking import measure


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
        ValueError: If a gradient is wanted where torch has no backward of it: on a CPU.
    """
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    batch, heads, length, _ = query.shape
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype is not torch.float64:
        # As torch's own function does it; else what a norm has made float32 stays that, many times slower.
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    is_complete = device not in ("cpu", "mps")  # where torch has neither the backward nor the maxima
    if not is_complete:
        query, key, value = _without_gradient(query, key, value)
    # The kernel's maxima are of what score_mod has made of the logits, and of each query over all keys.
    tells_maxima = track is not None and score_mod is None and not mask.pads_in_part and is_complete
    maxima = None if track is None or tells_maxima else measure(query, key, scale, mask)
    # Whole blocks: with a mask and a score_mod the backward of others is NaN (pytorch#153799, torch 2.7).
    more = filled(length) - length
    if more:
        query, key, value = (F.pad(x, (0, 0, 0, more)) for x in (query, key, value))
    function: Any = fast(flex_attention) if is_complete else flex_attention
    output, aux = function(
        query,
        key,
        value,
        score_mod=_of_real_tokens(score_mod, length) if score_mod is not None and more else score_mod,
        block_mask=mask.block_mask(length, query.device, batch=batch, heads=heads),
        scale=scale,
        enable_gqa=heads != key.shape[1],
        return_aux=AuxRequest(lse=sinks is not None, max_scores=tells_maxima),
    )
    output = output[:, :, :length]
    if sinks is not None:
        lse = aux.lse[:, :, :length]
        kept = torch.sigmoid(lse - sinks.float()[:, None]).masked_fill(lse.isneginf(), 0.0)
        output = (output * kept.unsqueeze(-1)).to(output.dtype)
    if tells_maxima:
        maxima = _largest(aux.max_scores[:, :, :length], mask.padding)
    return output, maxima


def _without_gradient(*tensors: Tensor) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(
            "FlexAttention has no backward on this device; train with backend='auto' (or 'sdpa', 'eager'), or call it under"
            " torch.no_grad()"
        )
    return tuple(x.detach() for x in tensors)  # it refuses leaves with a gradient even if none is recorded


def _of_real_tokens(score_mod: ScoreMod, length: int) -> ScoreMod:
    return lambda score, b, h, q, k: score_mod(score, b, h, *clamped(q, k, length))


def _largest(scores: Tensor, padding: Tensor | None) -> Tensor:
    """Over the batch and the queries that count; scores are of shape (batch, heads, length)."""
    if padding is not None:
        scores = scores.masked_fill(~padding[:, None], float("-inf"))
    return scores.detach().amax((0, 2))
