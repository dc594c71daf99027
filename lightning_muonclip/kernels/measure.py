"""The maximum logits of an attention call, from what its kernel tells or from its queries and keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_muonclip.kernels.bounded_max_logits import bounded_max_logits
from lightning_muonclip.kernels.log_sum_exp import as_multiplied
from lightning_muonclip.kernels.max_logits import max_logits


class Logits(NamedTuple):
    """The logits of an attention call.

    The fields are the arguments of :func:`~lightning_muonclip.kernels.bounded_max_logits.bounded_max_logits`. ``scale``
    defaults to ``d ** -0.5``; ``bounds`` is ``None`` if the kernel tells nothing of its logits.
    """

    query: Tensor
    key: Tensor
    bounds: Tensor | None = None
    scale: float | None = None
    is_causal: bool = False
    window: int | None = None
    documents: Tensor | None = None
    mask: Tensor | None = None


def scale_of(logits: Logits) -> float:
    """The factor on the dot products."""
    return logits.query.shape[-1] ** -0.5 if logits.scale is None else logits.scale


def measure_max_logits(logits: Logits, how: str) -> Tensor:
    """The largest logit of every head, or an upper bound on it.

    Args:
        logits: The logits of a call.
        how: ``"exact"`` computes few products if there are bounds, and all otherwise. ``"whole"`` does too, but on a device
            that the host must not wait for it always computes all. ``"lse"`` returns the bounds if there are some.

    Returns:
        float32 tensor of shape ``(heads,)``; of shape ``(2, heads)``, as :func:`bounded_max_logits
        <lightning_muonclip.kernels.bounded_max_logits.bounded_max_logits>` returns it, where few products are computed on a
        device that the host must not wait for.
    """
    query, key, bounds, _, is_causal, window, documents, mask = logits
    if bounds is not None and is_bound(logits, how):
        return bounds.amax(-1).view(-1, bounds.shape[-2]).amax(0)
    scale = scale_of(logits)
    if bounds is not None:
        query, key = as_multiplied(query, key)
        if how != "whole" or bounds.device.type == "cpu":
            return bounded_max_logits(
                query, key, bounds, scale=scale, is_causal=is_causal, window=window, documents=documents, mask=mask
            )
    return max_logits(query, key, scale=scale, is_causal=is_causal, window=window, documents=documents, mask=mask)


def is_bound(logits: Logits, how: str) -> bool:
    """Whether :func:`measure_max_logits` returns a bound."""
    # An additive mask takes the bound further from the maximum than the logarithm of the number of keys.
    return how == "lse" and logits.bounds is not None and (logits.mask is None or logits.mask.dtype is torch.bool)
