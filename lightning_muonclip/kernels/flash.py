"""What kernels of FlashAttention tell: the log-sum-exp of every query, and in their arguments which pairs they show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Their second output is the log-sum-exp, of shape (batch, heads, length) or, of packed sequences, (heads, tokens).
_KERNELS = {
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::_flash_attn_forward",
    "torch_attn::_varlen_attn",
}

#: Arguments with which the log-sum-exp bounds nothing, or queries and keys are not those of self-attention in training.
_BEYOND = ("alibi_slopes", "softcap", "qv", "k_new", "block_table", "page_table", "leftpad_k", "seqused_q", "seqused_k")


class FlashCall(NamedTuple):
    """Arguments of :func:`~lightning_muonclip.kernels.bounded_max_logits.bounded_max_logits`."""

    query: Tensor
    key: Tensor
    bounds: Tensor
    scale: float
    is_causal: bool
    window: int | None
    documents: Tensor | None


class FlashCalls(TorchDispatchMode):
    """Sees the calls of these kernels.

    Attributes:
        calls: One for every call, in order; ``None`` for one whose log-sum-exp bounds nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[FlashCall | None] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if isinstance(func, torch._ops.OpOverload) and func.name().partition(".")[0] in _KERNELS:
            names = [argument.name for argument in func._schema.arguments]
            self.calls.append(_call({**dict(zip(names, args)), **kwargs}, out[1].detach()))
        return out


def _call(given: Mapping[str, Any], log_sum_exp: Tensor) -> FlashCall | None:
    query, key = (given.get(short, given.get(long)) for short, long in (("q", "query"), ("k", "key")))
    assert query is not None
    assert key is not None
    if any(given.get(name) for name in _BEYOND if not isinstance(given.get(name), Tensor)):
        return None
    if any(isinstance(given.get(name), Tensor) for name in _BEYOND) or query.shape[:-2] != key.shape[:-2]:
        return None
    left, right = given.get("window_size") or (given.get("window_size_left", -1), given.get("window_size_right", -1))
    is_causal = bool(given.get("causal", given.get("is_causal"))) or right == 0
    if not is_causal and left != right:
        return None
    documents = None
    if query.ndim == 3:
        starts, of_keys = (given.get(f"cu_seqlens_{x}", given.get(f"cu_seq_{x}")) for x in "qk")
        if starts is None or not (of_keys is None or of_keys is starts or of_keys.data_ptr() == starts.data_ptr()):
            return None
        tokens = torch.arange(len(query), device=query.device)
        documents = torch.bucketize(tokens, starts[1:].to(tokens.dtype), right=True)[None]
        query, key, log_sum_exp = query[None], key[None], log_sum_exp[None]
    scale = given.get("softmax_scale", given.get("scale"))
    return FlashCall(
        query.transpose(1, 2),
        key.transpose(1, 2),
        log_sum_exp,
        query.shape[-1] ** -0.5 if scale is None else scale,
        is_causal,
        left + 1 if left is not None and left >= 0 else None,
        documents,
    )
