"""What kernels of FlashAttention tell: the log-sum-exp of every query, and in their arguments which pairs they show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_muonclip.kernels.measure import Logits

#: Their second output is the log-sum-exp, of shape (batch, heads, length) or, of packed sequences, (heads, tokens).
_KERNELS = {
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::_flash_attn_forward",
    "torch_attn::_varlen_attn",
}

#: Arguments under which the log-sum-exp is that of the products of queries and keys alone.
_PLAIN = {
    *("q", "k", "v", "query", "key", "value", "cu_seqlens_q", "cu_seqlens_k", "cu_seq_q", "cu_seq_k"),
    *("max_seqlen_q", "max_seqlen_k", "max_q", "max_k", "dropout_p", "softmax_scale", "scale", "causal", "is_causal"),
    *("window_size", "window_size_left", "window_size_right", "return_softmax", "enable_gqa", "out", "out_"),
    *("num_splits", "pack_gqa", "sm_margin", "scheduler_metadata", "deterministic"),
}


class FlashCalls(TorchDispatchMode):
    """Sees the calls of these kernels.

    Attributes:
        calls: One for every call, in order; ``None`` for one whose log-sum-exp bounds nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Logits | None] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if isinstance(func, torch._ops.OpOverload) and func.name().partition(".")[0] in _KERNELS:
            defaults = {argument.name: argument.default_value for argument in func._schema.arguments}
            given = {**defaults, **dict(zip(defaults, args)), **kwargs}
            others = {
                name: value for name, value in given.items() if name not in _PLAIN and value is not defaults[name]
            }
            is_plain = not any(isinstance(value, Tensor) or value for value in others.values())
            self.calls.append(flash_call(given, out[1].detach()) if is_plain else None)
        return out


def flash_call(given: Mapping[str, Any], log_sum_exp: Tensor | None) -> Logits | None:
    """What a call computes, from its arguments by name; ``None`` for what is no self-attention in its usual forms.

    Args:
        given: As in the functions of flash-attention 2 and 3 or ``torch.nn.attention.varlen.varlen_attn``.
        log_sum_exp: What the kernel returned; ``None`` if that is not known.
    """
    query, key = (given[short] if short in given else given[long] for short, long in (("q", "query"), ("k", "key")))
    if query.shape[:-2] != key.shape[:-2]:
        return None
    left, right = given.get("window_size") or (given.get("window_size_left", -1), given.get("window_size_right", -1))
    is_causal = bool(given.get("causal", given.get("is_causal"))) or right == 0
    if not is_causal and left != right:
        return None
    documents = None
    if query.ndim == 3:
        starts, of_keys = (given.get(f"cu_seqlens_{x}", given.get(f"cu_seq_{x}")) for x in "qk")
        if starts is None or not (of_keys is None or of_keys is starts or _is_same(of_keys, starts)):
            return None
        tokens = torch.arange(query.shape[0], device=query.device)
        # What the kernel leaves in memory behind the last sequence is no number.
        past = tokens >= starts[-1]
        documents = torch.bucketize(tokens, starts[1:].to(tokens.dtype), right=True).masked_fill(past, -1)[None]
        if log_sum_exp is not None:
            log_sum_exp = log_sum_exp.masked_fill(past, float("-inf"))[None]
        query, key = query[None], key[None]
    return Logits(
        query.transpose(1, 2),
        key.transpose(1, 2),
        log_sum_exp,
        given.get("softmax_scale", given.get("scale")),
        is_causal,
        left + 1 if left is not None and left >= 0 else None,
        documents,
    )


def _is_same(one: Tensor, other: Tensor) -> bool:
    return not torch.compiler.is_compiling() and one.data_ptr() == other.data_ptr()
