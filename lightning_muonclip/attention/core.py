"""Scaled dot-product attention that also returns per-head maximum logits: one function, three backends."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from lightning_muonclip.attention import eager, flex, sdpa
from lightning_muonclip.attention.masks import AttentionMask, checked
from lightning_muonclip.attention.score_mods import ScoreMod, capped, chain, check_cap

BACKENDS = {"eager": eager.attend, "sdpa": sdpa.attend, "flex": flex.attend}
BACKEND_CHOICES = ("auto", *BACKENDS)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    mask: AttentionMask | None = None,
    score_mod: ScoreMod | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    track: str | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Self-attention of all heads.

    Logits are the scaled dot products. They are soft-capped, then passed to ``score_mod``, then masked.

    Args:
        query: Shape ``(batch, heads, length, d)``.
        key: Shape ``(batch, key_heads, length, d)``. Every ``heads / key_heads`` consecutive query heads share a key head.
        value: Shape ``(batch, key_heads, length, d_v)``.
        scale: Factor on the dot products.
        mask: Defaults to a causal mask.
        score_mod: A modification of the logits, in FlexAttention's signature.
        softcap: Cap of the logits, see :class:`~lightning_muonclip.attention.score_mods.SoftCap`.
        sinks: One logit per query head, shape ``(heads,)``, that takes part in the softmax but has no value (GPT-OSS).
        track: ``None`` does not measure the logits. ``"exact"`` does. ``"whole"`` does, and on a GPU computes all products
            rather than bound a maximum. ``"lse"`` uses the kernel's log-sum-exp as an upper bound where it is available, and
            measures elsewhere.
        backend: ``"flex"`` (FlexAttention, no backward on CPUs), ``"sdpa"`` (torch's fused kernels, without ``score_mod``,
            soft-cap or sinks), ``"eager"`` (plain operations on whole logit matrices, the reference), or ``"auto"``: flex on
            a CUDA device, else sdpa where it applies, else eager.

    Returns:
        Output of shape ``(batch, heads, length, d_v)``, and the per-head maxima, float32 of shape ``(heads,)``, or ``None``.
        Where only bounds prove a maximum, on a GPU without FlexAttention's own, the shape is ``(2, heads)``: the largest
        logits that were computed, and upper bounds on the maxima.
        Maxima are those of the scaled dot products over the visible pairs, before soft-cap, ``score_mod`` and sinks, since
        that is what scaling the weights scales (see :func:`~lightning_muonclip.kernels.max_logits.max_logits`).

    Raises:
        ValueError: If shapes do not match, if the backend is unknown or does not support the arguments, or if the mask is
            for another batch, length or device.
    """
    _check(query, key, value, sinks, backend)
    mask = checked(mask)
    if softcap is not None:
        check_cap(softcap)
        score_mod = chain(functools.partial(capped, softcap), score_mod)
    if not query.numel():
        backend = "eager"  # the kernels do not take empty tensors
    elif backend == "auto":
        plain = "eager" if score_mod is not None or sinks is not None else "sdpa"
        backend = "flex" if _fits_flex(query, value) else plain
    return BACKENDS[backend](query, key, value, scale, mask, score_mod, sinks, track)


def _check(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, backend: str) -> None:
    if backend not in BACKEND_CHOICES:
        raise ValueError(f"unknown backend {backend!r}; use one of {', '.join(BACKEND_CHOICES)}")
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(
            "queries, keys and values must have four dimensions, (batch, heads, length, d); got"
            f" {query.ndim}, {key.ndim} and {value.ndim}"
        )
    heads, key_heads = query.shape[1], key.shape[1]
    if not key_heads or heads % key_heads:
        raise ValueError(
            f"the number of query heads must be a multiple of the number of key heads; got {heads}, {key_heads}"
        )
    shapes = query.shape[0], key_heads, query.shape[2]
    if key.shape[:3] != shapes or value.shape[:3] != shapes or query.shape[3] != key.shape[3]:
        raise ValueError(
            "queries, keys and values must have shapes (batch, heads, length, d), (batch, key_heads, length, d) and"
            f" (batch, key_heads, length, d_v); got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks must have shape ({heads},), one logit per query head; got {tuple(sinks.shape)}")


def _fits_flex(query: Tensor, value: Tensor) -> bool:
    # The kernels need at least 16 channels and do not support float64.
    is_large = min(query.shape[-1], value.shape[-1]) >= 16
    return query.device.type == "cuda" and _has_kernels() and is_large and query.dtype is not torch.float64


def _find_kernels() -> bool:
    """Whether Triton is installed and supports the GPU (Volta or later)."""
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability() >= (7, 0)


_has_kernels = torch.compiler.assume_constant_result(_find_kernels)
