"""Reference attention by plain operations on whole logit matrices; trains on any device with any score_mod."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_muonclip.attention.mask_mods import indices
from lightning_muonclip.attention.masks import AttentionMask
from lightning_muonclip.attention.score_mods import ScoreMod


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
    """As :func:`~lightning_muonclip.attention.core.attention`; half precision is computed in float32."""
    batch, heads, length, _ = query.shape
    b, h, q, k = indices(batch, heads, length, query.device)
    plain = (k <= q) if mask.causal else torch.ones_like(k <= q)
    visible = mask.dense(length, query.device, batch=batch, heads=heads)
    visible = plain if visible is None else visible
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        grouped = query.to(dtype).unflatten(1, (key.shape[1], -1))
        logits = (grouped @ key.to(dtype).unsqueeze(2).mT).flatten(1, 2) * scale
        maxima = None
        if track is not None:
            counted = mask.dense(length, query.device, batch=batch, heads=heads, counted=True)
            maxima = _largest(logits.detach(), plain if counted is None else counted)
        scores = logits if score_mod is None else score_mod(logits, b, h, q, k)
        weights = _softmax(scores.masked_fill(~visible, float("-inf")), sinks)
        output = weights.unflatten(1, (key.shape[1], -1)) @ value.to(dtype).unsqueeze(2)
    return output.flatten(1, 2).to(value.dtype), maxima


def _largest(logits: Tensor, counted: Tensor) -> Tensor:
    logits = logits.masked_fill(~counted, float("-inf")).float()
    return logits.amax((0, 2, 3)) if logits.numel() else logits.new_full((logits.shape[1],), float("-inf"))


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax of every row together with its sink; zeros for a row that sees nothing."""
    blind = scores.isneginf().all(-1, keepdim=True)
    scores = scores.masked_fill(blind, 0.0)
    if sinks is not None:
        beside = sinks.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, beside], dim=-1)
    weights = scores.softmax(-1)
    return (weights if sinks is None else weights[..., :-1]).masked_fill(blind, 0.0)
