"""The formulas of QK-Clip: from per-head maximum logits to the factors of query and key weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SHARED_KEYS = ("query", "group", "min_k", "compensate")


def check_threshold(threshold: float | None) -> None:
    """Raises ValueError unless the threshold is positive or ``None``, which only monitors."""
    if threshold is not None and not threshold > 0:
        raise ValueError(f"threshold must be positive, or None to only monitor; got {threshold}")


def check_alpha(alpha: float) -> None:
    """Raises ValueError unless alpha, the exponent of gamma on the queries, is in [0, 1]."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha, the exponent of gamma on the queries, must be in [0, 1]; got {alpha}")


def qk_clip_gamma(max_logits: Tensor, threshold: float | None) -> Tensor:
    """The factor that brings each head's maximum logit down to the threshold; 1 where no clip is needed.

    Args:
        max_logits: Signed maxima of any shape, ``-inf`` where nothing was seen.
        threshold: Positive; ``None`` clips nothing.

    Returns:
        float32 tensor of the same shape, in (0, 1]. Negative and non-finite maxima give 1.

    Raises:
        ValueError: If the threshold is not positive.

    Source: Kimi K2, arXiv 2507.20534, section 2.1.

    Example:
        >>> qk_clip_gamma(torch.tensor([200.0, 50.0, -200.0, float("nan")]), 100.0)
        tensor([0.5000, 1.0000, 1.0000, 1.0000])
    """
    check_threshold(threshold)
    max_logits = max_logits.float()
    if threshold is None:
        return torch.ones_like(max_logits)
    return torch.where(max_logits.isfinite() & (max_logits > threshold), threshold / max_logits, 1.0)


def key_factors(gamma: Tensor, alpha: float, groups: int, shared_keys: str) -> tuple[Tensor, Tensor]:
    """Factors of the query rows of every head and of the key rows of every key head.

    Args:
        gamma: Shape ``(..., heads)``.
        alpha: Exponent of gamma on the queries where no key is shared; the key gets ``1 - alpha``.
        groups: Number of key heads; each is shared by ``heads / groups`` query heads.
        shared_keys: Rule for a key that several queries share, with G the smallest gamma among them:
            ``"query"``: gamma on the query, the key untouched (exact per head; K2's rule for its shared key);
            ``"group"``: G^alpha on every query, G^(1-alpha) on the key (Megatron-LM);
            ``"min_k"``: the query's own gamma^alpha, G^(1-alpha) on the key;
            ``"compensate"``: gamma / G^(1-alpha) on the query, G^(1-alpha) on the key (exact; a query may grow).

    Returns:
        Query factors of shape ``(..., heads)`` and key factors of shape ``(..., groups)``.
    """
    own = gamma.unflatten(-1, (groups, -1))
    if own.shape[-1] == 1:
        return gamma**alpha, gamma ** (1 - alpha)
    smallest = own.amin(-1, keepdim=True)
    shared = smallest ** (1 - alpha)
    if shared_keys == "query":
        query, shared = own, torch.ones_like(shared)
    elif shared_keys == "group":
        query = (smallest**alpha).expand_as(own)
    elif shared_keys == "min_k":
        query = own**alpha
    else:
        query = own / shared
    return query.flatten(-2), shared.flatten(-2)


def muonclip_qk_clip(
    W_q: Any, W_k: Any, x: Any, t: float, alpha: float = 0.5, eps: float = 1e-7
) -> tuple[list[list[float]], list[list[float]], bool, float]:
    """Reference implementation of QK-Clip for a single head without mask, on plain numbers.

    Args:
        W_q: Query weight, shape ``(d_head, d_model)``; a list, array or tensor.
        W_k: Key weight, same shape.
        x: Inputs, shape ``(batch, seq, d_model)``.
        t: Threshold, positive.
        alpha: Exponent of gamma on the query weight, in [0, 1]; the key weight gets ``1 - alpha``.
        eps: Lower bound of the divisor.

    Returns:
        The query weight and the key weight after the clip, as lists rounded to 4 decimals; whether they were clipped;
        and the maximum logit after the clip (0.0 for an empty ``x``), rounded likewise.

    Raises:
        ValueError: If ``t`` or ``alpha`` is out of range, or if the shapes do not match.

    Example:
        >>> eye = [[2.0, 0.0], [0.0, 2.0]]
        >>> muonclip_qk_clip(eye, eye, [[[1.0, 0.0], [0.0, 1.0]]], t=1.0)
        ([[1.1892, 0.0], [0.0, 1.1892]], [[1.1892, 0.0], [0.0, 1.1892]], True, 1.0)
    """
    check_threshold(t)
    check_alpha(alpha)
    query, key, inputs = (torch.as_tensor(value, dtype=torch.float64).detach() for value in (W_q, W_k, x))
    if query.ndim != 2 or query.shape != key.shape:
        raise ValueError(
            f"W_q and W_k must be matrices of the same shape, got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if inputs.numel() == 0:
        return _rounded(query), _rounded(key), False, 0.0
    if inputs.ndim != 3 or inputs.shape[-1] != query.shape[-1]:
        raise ValueError(f"x must have shape (batch, seq, {query.shape[-1]}), got {tuple(inputs.shape)}")

    def largest_logit() -> float:
        logits = (inputs @ query.mT) @ (inputs @ key.mT).mT / math.sqrt(query.shape[0])
        return float(logits.max())

    before = largest_logit()
    clipped = math.isfinite(before) and before > t
    if clipped:
        gamma = t / max(before, eps)
        query, key = query * gamma**alpha, key * gamma ** (1 - alpha)
    return _rounded(query), _rounded(key), clipped, round(largest_logit(), 4)


def _rounded(matrix: Tensor) -> list[list[float]]:
    rows: Sequence[Sequence[float]] = matrix.tolist()
    return [[round(value, 4) for value in row] for row in rows]
