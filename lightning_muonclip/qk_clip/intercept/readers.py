"""Readers for kernels that return their maxima, or a bound on them, to be registered by ``register_max_logits``.

Each was written from the published signature of its kernel and tested with a stand-in of that signature; none has run on the
hardware that the kernels need.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def transformer_engine(out: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Transformer Engine: the maxima of a ``DotProductAttention(..., return_max_logit=True)``, shape (heads,).

    Register it for ``"transformer_engine.pytorch.DotProductAttention.forward"``.

    ``forward(query_layer, key_layer, value_layer, ..., core_attention_bias_type="no_bias", core_attention_bias=None, ...)``
    returns ``(out, max_logit)``. It adds a bias before it takes the maximum, so that a call with one is refused.

    Raises:
        ValueError: If the kernel returned no maxima, or of other numbers than scaled products.

    Source: NVIDIA/TransformerEngine, transformer_engine/pytorch/attention/dot_product_attention/dot_product_attention.py.
    """
    own = {"core_attention_bias_type": "no_bias", "core_attention_bias": None, "score_mod": None}
    _refuse("a bias", args, 5, kwargs, own)  # the module, queries, keys, values, a mask
    return _returned(out, 1, "DotProductAttention", "create it with return_max_logit=True")


def cudnn_flex_attention(out: Any, *args: Any, **kwargs: Any) -> Tensor:
    """cuDNN: the maxima of ``flex_attn_func(..., return_max_logit=True)``, shape (heads,).

    Register it for ``"cudnn.flex_attention.flex_attn_func"``.

    ``flex_attn_func(q, k, v, *, mask_plan, softmax_scale=None, deterministic=False, return_lse=False,
    return_max_logit=False)`` returns ``(out, max_logit)``, or ``(out, lse, max_logit)`` with ``return_lse=True``.

    Raises:
        ValueError: If the kernel returned no maxima.

    Source: NVIDIA/cudnn-frontend, python/cudnn/flex_attention.
    """
    is_asked = bool(kwargs.get("return_max_logit"))
    return _returned(out if is_asked else None, -1, "flex_attn_func", "call it with return_max_logit=True")


def magi_attention(out: Any, *args: Any, **kwargs: Any) -> Tensor:
    """MagiAttention: the maxima of ``calc_attn`` or ``flex_flash_attn_func``, shape (heads,).

    Register it for ``"magi_attention.api.flex_flash_attn_func"`` or ``"magi_attention.api.calc_attn"``.

    ``flex_flash_attn_func(q, k, v, q_ranges=None, k_ranges=None, attn_type_map=None, *, ..., softcap=0.0, ...,
    return_max_logits=False)`` and ``calc_attn(q, k, v, key, sink=None, softmax_scale=None, softcap=0.0,
    return_max_logits=False)`` return ``(out, meta)``; ``meta.max_logits`` is the maximum over the ranks of context
    parallelism too. A call with a soft-cap is refused.

    Raises:
        ValueError: If the kernel returned no maxima, or of other numbers than scaled products.

    Source: SandAI-org/MagiAttention, magi_attention/functional/flex_flash_attn.py and magi_attention/api.
    """
    _refuse("a soft-cap", args, 6, kwargs, {"softcap": 0.0})
    meta = out[1] if isinstance(out, tuple) else None
    maxima = (out, getattr(meta, "max_logits", None))
    return _returned(maxima, 1, "MagiAttention", "call it with return_max_logits=True")


def flash_attention(out: Any, *args: Any, **kwargs: Any) -> Tensor:
    """A bound from the log-sum-exp of flash-attention 2 or 3, shape (batch, heads), or (heads,) of packed sequences.

    Register it with ``bound=True`` for ``"flash_attn.flash_attn_func"``, ``"flash_attn.flash_attn_varlen_func"``, or
    those of ``flash_attn_interface``. What Hugging Face's interface calls needs no registration.

    ``flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False)`` returns ``(out, softmax_lse, S_dmask)`` with
    ``return_attn_probs=True``; version 3 returns ``(out, softmax_lse)``. The log-sum-exp has shape (batch, heads, length)
    or, of packed sequences, (heads, tokens). A soft-cap and ALiBi lower it, so that it is no bound, and are refused.

    Raises:
        ValueError: If the kernel returned no log-sum-exp, or one that bounds nothing.

    Source: Dao-AILab/flash-attention, flash_attn/flash_attn_interface.py.
    """
    is_packed = len(args) > 3 and isinstance(args[3], Tensor)  # bounds of sequences come before the options
    _refuse("a soft-cap or ALiBi", args, 11 if is_packed else 7, kwargs, {"softcap": 0.0, "alibi_slopes": None})
    log_sum_exp = _returned(out, 1, "flash-attention", "call it with return_attn_probs=True")
    # It is +inf for a query that sees nothing.
    return log_sum_exp.masked_fill(log_sum_exp == float("inf"), float("-inf")).amax(-1)


def _returned(out: Any, place: int, name: str, how: str) -> Tensor:
    told = out[place] if isinstance(out, (tuple, list)) and len(out) > 1 else None
    if not isinstance(told, Tensor):
        raise ValueError(f"{name} returned no maxima; {how}")
    return told


def _refuse(what: str, args: Any, most: int, kwargs: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuses calls with options that change what the kernel tells.

    Args:
        what: Such options, in words.
        args: The positional arguments of the call.
        most: How many of them surely come before these options.
        kwargs: The other arguments of the call.
        defaults: The options, and what they are if they are not used.
    """
    if len(args) > most:
        raise ValueError(
            f"the kernel was given {len(args)} positional arguments, among which may be {' or '.join(defaults)}; pass these"
            " by keyword"
        )
    for name, default in defaults.items():
        value = kwargs.get(name, default)
        if value is not default and not (isinstance(value, (str, float, int)) and value == default):
            raise ValueError(
                f"{name} was given: with {what}, the kernel does not tell of the plain products of queries and keys;"
                " leave such modules alone with specs={name: None}"
            )
