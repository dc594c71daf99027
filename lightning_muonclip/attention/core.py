"""Scaled dot-product attention that also tells each head's largest logit: one function, three backends."""

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
    """Attention of all heads within a sequence.

    Logits are the scaled dot products; they are soft-capped, then given to ``score_mod``, then masked.

    Args:
        query: Shape ``(batch, heads, length, d)``.
        key: Shape ``(batch, key_heads, length, d)``; every run of ``heads / key_heads`` query heads shares a key head.
        value: Shape ``(batch, key_heads, length, d_v)``.
        scale: Factor on the dot products.
        mask: ``None`` is causal.
        score_mod: What is done to logits, in the signature of FlexAttention.
        softcap: Cap of the logits, see :func:`~lightning_muonclip.attention.score_mods.SoftCap`.
        sinks: A logit for every query head, shape ``(heads,)``, that takes part in the softmax and has no value (GPT-OSS).
        track: ``None`` does not measure the logits, ``"exact"`` does, ``"lse"`` takes the kernel's log-sum-exp as an upper
            bound where it can be had, and measures elsewhere.
        backend: ``"flex"`` (FlexAttention, which has no backward on CPUs), ``"sdpa"`` (torch's fused kernels: no
            ``score_mod``, soft-cap or sinks), ``"eager"`` (plain operations and whole logit matrices, the reference), or
            ``"auto"``: flex on a CUDA device, else sdpa where it can, else eager.

    Returns:
        Output of shape ``(batch, heads, length, d_v)``, and the per-head maxima of shape ``(heads,)``, float32, or ``None``.
        Maxima are of the scaled dot products over the visible pairs, before soft-cap, ``score_mod`` and sinks: of what a
        factor on the weights scales (see :func:`~lightning_muonclip.kernels.max_logits.max_logits`).

    Raises:
        ValueError: If shapes do not fit, the backend is unknown or cannot do what is asked, or the mask is for another
            batch, length or device.
    """
    _check(query, key, value, sinks, backend)
    mask = checked(mask)
    if softcap is not None:
        check_cap(softcap)
        score_mod = chain(functools.partial(capped, softcap), score_mod)
    if not query.numel():
        backend = "eager"  # the kernels are not made for nothing
    elif backend == "auto":
        plain = "eager" if score_mod is not None or sinks is not None else "sdpa"
        backend = "flex" if _fits_flex(query, value) else plain
    return BACKENDS[backend](query, key, value, scale, mask, score_mod, sinks, track)


def _check(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, backend: str) -> None:
    if backend not in BACKEND_CHOICES:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKEND_CHOICES)}")
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(
            f"queries, keys and values have four dimensions each: (batch, heads, length, d); got {query.ndim},"
            f" {key.ndim} and {value.ndim}"
        )
    heads, key_heads = query.shape[1], key.shape[1]
    if not key_heads or heads % key_heads:
        raise ValueError(f"{heads} query heads cannot share {key_heads} key heads evenly")
    shapes = query.shape[0], key_heads, query.shape[2]
    if key.shape[:3] != shapes or value.shape[:3] != shapes or query.shape[3] != key.shape[3]:
        raise ValueError(
            "queries, keys and values are of one sequence: (batch, heads, length, d), (batch, key_heads, length, d) and"
            f" (batch, key_heads, length, d_v); got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks are one logit for each of {heads} query heads; got shape {tuple(sinks.shape)}")


def _fits_flex(query: Tensor, value: Tensor) -> bool:
    # Its kernels multiply tiles of at least 16 channels, and know no float64.
    is_large = min(query.shape[-1], value.shape[-1]) >= 16
    return query.device.type == "cuda" and _has_kernels() and is_large and query.dtype is not torch.float64


def _find_kernels() -> bool:
    """Whether triton is there, and runs on the GPU: from Volta on."""
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability() >= (7, 0)


_has_kernels = torch.compiler.assume_constant_result(_find_kernels)
