"""Attention by FlexAttention, whose kernel returns the maximum logits."""

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
        ValueError: If a gradient is required on a device where FlexAttention has no backward, such as a CPU.
    """
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    batch, heads, length, _ = query.shape
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype is not torch.float64:
        # As SDPA does. Otherwise a float32 query or key from a norm would stay float32, which is many times slower.
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    is_complete = device not in ("cpu", "mps")  # these have neither the backward nor the maxima
    if not is_complete:
        query, key, value = _without_gradient(query, key, value)
    # The kernel's maxima come after score_mod, one per query over all keys.
    has_maxima = track is not None and score_mod is None and not mask.pads_in_part and is_complete
    has_bounds = track is not None and score_mod is None and not has_maxima
    plain = query, key
    # Whole blocks: with a mask and a score_mod, the backward of partial ones is NaN (pytorch#153799, torch 2.7).
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
        return_aux=AuxRequest(lse=sinks is not None or has_bounds, max_scores=has_maxima),
    )
    output = output[:, :, :length]
    if sinks is not None:
        lse = aux.lse[:, :, :length]
        kept = torch.sigmoid(lse - sinks.float()[:, None]).masked_fill(lse.isneginf(), 0.0)
        output = (output * kept.unsqueeze(-1)).to(output.dtype)
    if track is None:
        return output, None
    if has_maxima:
        return output, _counted(aux.max_scores[:, :, :length], mask.padding).amax((0, 2))
    bounds = _counted(aux.lse[:, :, :length].float(), mask.padding) if has_bounds else None
    return output, measure(*plain, scale, mask, track, bounds)


def _without_gradient(*tensors: Tensor) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(
            "FlexAttention has no backward on this device; train with backend='auto', 'sdpa' or 'eager', or call it under"
            " torch.no_grad()"
        )
    return tuple(x.detach() for x in tensors)  # FlexAttention rejects leaves that require a gradient even under no_grad


def _of_real_tokens(score_mod: ScoreMod, length: int) -> ScoreMod:
    return lambda score, b, h, q, k: score_mod(score, b, h, *clamped(q, k, length))


def _counted(scores: Tensor, padding: Tensor | None) -> Tensor:
    """-inf for queries that do not count; of shape (batch, heads, length)."""
    scores = scores.detach()
    return scores if padding is None else scores.masked_fill(~padding[:, None], float("-inf"))
