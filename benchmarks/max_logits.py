"""Cost of per-head maximum logits relative to the attention itself: ``python benchmarks/max_logits.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import report, side_by_side
from torch import Tensor

from lightning_muonclip.attention.core import attention
from lightning_muonclip.kernels.max_logits import max_logits

PEER = "SDPA forward + backward"


def one_length(batch: int, heads: int, length: int, dim: int, dtype: torch.dtype, device: str, name: str) -> None:
    """The pass for causal attention, and for masks that hide more, against SDPA's causal forward and backward."""
    shape = batch, heads, length, dim
    query, key, value, slope = (torch.randn(shape, dtype=dtype, device=device) for _ in range(4))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    documents = (torch.arange(length, device=device) // (length // 8)).expand(batch, length)

    def attend(function: Callable[..., Tensor]) -> Callable[[], None]:
        return lambda: torch.autograd.grad(function(*leaves), leaves, slope) and None

    def largest(**mask: Any) -> Callable[[], Tensor]:
        return lambda: max_logits(query, key, scale=dim**-0.5, is_causal=True, **mask)

    functions: dict[str, Callable[[], Any]] = {
        PEER: attend(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
        "max_logits, causal": largest(),
        "max_logits, window of 1/8": largest(window=length // 8),
        "max_logits, 8 documents": largest(documents=documents),
    }
    if device == "cuda":
        functions |= flex(attend, dim)
    report(name, side_by_side(functions), PEER, batch=batch, heads=heads, length=length, dim=dim, dtype=str(dtype))


def flex(attend: Callable[..., Callable[[], None]], dim: int) -> dict[str, Callable[[], Any]]:
    """FlexAttention, which returns the maximum logits unless a score_mod changes them first."""

    def through(track: str | None, softcap: float | None = None) -> Callable[..., Tensor]:
        options: dict[str, Any] = {"scale": dim**-0.5, "backend": "flex", "track": track, "softcap": softcap}
        return lambda q, k, v: attention(q, k, v, **options)[0]

    return {
        "flex": attend(through(None)),
        "flex, tracked": attend(through("exact")),
        "flex, soft-cap": attend(through(None, 50.0)),
        "flex, soft-cap, tracked": attend(through("exact", 50.0)),
    }


if __name__ == "__main__":
    if torch.cuda.is_available():
        for length in (1024, 2048, 4096, 8192, 16384):
            one_length(2**15 // length, 16, length, 128, torch.bfloat16, "cuda", f"max_logits_{length}")
    else:
        one_length(8, 8, 512, 64, torch.float32, "cpu", "max_logits_512")
