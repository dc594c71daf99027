"""Attention with separate projections: MHA, GQA or MQA, depending on the number of key heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_muonclip.attention.base import AttentionModule
from lightning_muonclip.attention.masks import AttentionMask
from lightning_muonclip.attention.rotary import RotaryEmbedding, positions, rotate
from lightning_muonclip.attention.score_mods import ScoreMod
from lightning_muonclip.parallel.heads import for_own_heads, split_heads


class Attention(AttentionModule):
    """Causal self-attention with rotary positions; parameters are named and laid out as in Hugging Face Llama.

    Args:
        hidden_size: Width of the residual stream.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key and value heads. Defaults to ``num_attention_heads`` (MHA); fewer is GQA, 1 is
            MQA.
        head_dim: Channels per head. Defaults to ``hidden_size / num_attention_heads``.
        attention_bias: Whether the projections have a bias.
        qk_norm: Applies RMSNorm to every query and key head after its projection, as Qwen3 does.
        rope_theta: Base of the rotary wavelengths. ``None`` disables rotation, for a ``score_mod`` that encodes distances.
        rms_norm_eps: Epsilon of ``qk_norm``.
        output_bias: Whether the output projection has a bias. Defaults to ``attention_bias`` (Qwen2 has none there).
        rope_scaling: See :class:`~lightning_muonclip.attention.rotary.RotaryEmbedding`.
        sliding_window: See :class:`~lightning_muonclip.attention.base.AttentionModule`.
        softcap: See :class:`~lightning_muonclip.attention.base.AttentionModule`.
        sinks: See :class:`~lightning_muonclip.attention.base.AttentionModule`.
        scaling: Factor on the dot products. Defaults to ``head_dim ** -0.5`` (Gemma 2: ``query_pre_attn_scalar ** -0.5``).
        score_mod: See :class:`~lightning_muonclip.attention.base.AttentionModule`.
        backend: See :func:`~lightning_muonclip.attention.core.attention`.

    Under tensor parallelism (queries, keys and values sharded by columns, the output projection by rows), the module attends
    with the heads of its rank.

    Raises:
        ValueError: If the sizes are not divisible, or an option is out of range.

    Example:
        >>> import torch
        >>> module = Attention(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
        >>> module(torch.randn(2, 10, 32)).shape
        torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        attention_bias: bool = False,
        qk_norm: bool = False,
        rope_theta: float | None = 10000.0,
        rms_norm_eps: float = 1e-6,
        output_bias: bool | None = None,
        rope_scaling: Mapping[str, Any] | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        scaling: float | None = None,
        score_mod: ScoreMod | None = None,
        backend: str = "auto",
    ) -> None:
        if head_dim is None and hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size {hidden_size} is not divisible by {num_attention_heads} heads; set head_dim explicitly"
            )
        num_key_value_heads = num_key_value_heads or num_attention_heads
        if num_attention_heads % num_key_value_heads:
            raise ValueError(
                "num_attention_heads must be a multiple of num_key_value_heads; got"
                f" {num_attention_heads} and {num_key_value_heads}"
            )
        if rope_theta is None and rope_scaling is not None:
            raise ValueError(
                "rope_scaling has no effect with rope_theta=None; set rope_theta or leave rope_scaling out"
            )
        head_dim = head_dim or hidden_size // num_attention_heads
        scaling = head_dim**-0.5 if scaling is None else float(scaling)
        super().__init__(num_attention_heads, scaling, sliding_window, softcap, sinks, score_mod, backend)
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        queries, keys = num_attention_heads * head_dim, num_key_value_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, queries, bias=attention_bias)
        self.k_proj = nn.Linear(hidden_size, keys, bias=attention_bias)
        self.v_proj = nn.Linear(hidden_size, keys, bias=attention_bias)
        self.o_proj = nn.Linear(queries, hidden_size, bias=attention_bias if output_bias is None else output_bias)
        self.q_norm = nn.RMSNorm(head_dim, eps=rms_norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, eps=rms_norm_eps) if qk_norm else None
        self.rotary = None if rope_theta is None else RotaryEmbedding(head_dim, rope_theta, rope_scaling)

    @property
    def head_weight(self) -> Tensor:
        """The weight of the query projection."""
        return self.q_proj.weight

    def forward(
        self, hidden_states: Tensor, *, mask: AttentionMask | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Self-attention.

        Args:
            hidden_states: Shape ``(batch, length, hidden_size)``.
            mask: Defaults to a causal mask.
            position_ids: Shape ``(batch, length)`` or ``(1, length)``. Defaults to 0, 1, 2, ...

        Returns:
            Tensor of the shape of ``hidden_states``.
        """
        query, key, value = (
            split_heads(projection(hidden_states), self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query = _normalize(query, self.q_norm, self.q_proj.weight, self.num_attention_heads)
            key = _normalize(key, self.k_norm, self.k_proj.weight, self.num_key_value_heads)
        if self.rotary is not None:
            cos, sin = self.rotary(positions(hidden_states, position_ids))
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        return self.attend(query, key, value, mask)


def _normalize(x: Tensor, norm: nn.RMSNorm, weight: Tensor, heads: int) -> Tensor:
    gain = for_own_heads(norm.weight, weight, heads, x.shape[1])
    return norm(x) if gain is norm.weight else F.rms_norm(x, norm.normalized_shape, gain, norm.eps)
