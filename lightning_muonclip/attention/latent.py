"""Multi-head latent attention (MLA) of DeepSeek-V2/V3 and Kimi K2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muonclip.attention.base import AttentionModule
from lightning_muonclip.attention.masks import AttentionMask
from lightning_muonclip.attention.rotary import RotaryEmbedding, positions, rotate_interleaved
from lightning_muonclip.attention.score_mods import ScoreMod
from lightning_muonclip.parallel.heads import for_own_heads, split_heads


class MultiheadLatentAttention(AttentionModule):
    """Attention whose keys and values come from one small latent; parameters as in Hugging Face DeepSeek-V3.

    A query or key head has two parts: one without rotation, and a rotated one whose key is shared by all heads. Under tensor
    parallelism (``q_proj``, ``q_b_proj`` and ``kv_b_proj`` sharded by columns, ``o_proj`` by rows, the rest replicated), the
    module attends with the heads of its rank.

    Args:
        hidden_size: Width of the residual stream.
        num_attention_heads: Number of heads.
        kv_lora_rank: Width of the latent of keys and values.
        qk_nope_head_dim: Channels per head without rotation.
        qk_rope_head_dim: Rotated channels per head.
        v_head_dim: Channels per value head.
        q_lora_rank: Width of the latent of queries. ``None`` projects queries directly.
        attention_bias: Whether the down-projections and the output projection have a bias.
        rope_theta: Base of the rotary wavelengths.
        rms_norm_eps: Epsilon of the norms of the latents.
        rope_scaling: See :class:`~lightning_muonclip.attention.rotary.RotaryEmbedding`. YaRN's ``mscale_all_dim`` also
            scales the logits.
        sliding_window: See :class:`~lightning_muonclip.attention.base.AttentionModule`.
        softcap: See :class:`~lightning_muonclip.attention.base.AttentionModule`.
        sinks: See :class:`~lightning_muonclip.attention.base.AttentionModule`.
        score_mod: See :class:`~lightning_muonclip.attention.base.AttentionModule`.
        backend: See :func:`~lightning_muonclip.attention.core.attention`.

    Raises:
        ValueError: If an option is out of range.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.

    Example:
        >>> module = MultiheadLatentAttention(
        ...     hidden_size=32, num_attention_heads=4, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
        ... )
        >>> module(torch.randn(2, 10, 32)).shape
        torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        q_lora_rank: int | None = None,
        attention_bias: bool = False,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-6,
        rope_scaling: Mapping[str, Any] | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        score_mod: ScoreMod | None = None,
        backend: str = "auto",
    ) -> None:
        rotary = RotaryEmbedding(qk_rope_head_dim, rope_theta, rope_scaling)
        qk_head_dim = qk_nope_head_dim + qk_rope_head_dim
        scaling = qk_head_dim**-0.5 * rotary.logit_factor
        super().__init__(num_attention_heads, scaling, sliding_window, softcap, sinks, score_mod, backend)
        self.q_lora_rank = q_lora_rank
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        if q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, num_attention_heads * qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, q_lora_rank, bias=attention_bias)
            self.q_a_layernorm = nn.RMSNorm(q_lora_rank, eps=rms_norm_eps)
            self.q_b_proj = nn.Linear(q_lora_rank, num_attention_heads * qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, kv_lora_rank + qk_rope_head_dim, bias=attention_bias)
        self.kv_a_layernorm = nn.RMSNorm(kv_lora_rank, eps=rms_norm_eps)
        self.kv_b_proj = nn.Linear(kv_lora_rank, num_attention_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.o_proj = nn.Linear(num_attention_heads * v_head_dim, hidden_size, bias=attention_bias)
        self.rotary = rotary

    @property
    def head_weight(self) -> Tensor:
        """The up-projection of keys and values, which exists with and without a latent of queries."""
        return self.kv_b_proj.weight

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
        cos, sin = self.rotary(positions(hidden_states, position_ids))
        query = split_heads(self._queries(hidden_states), self.qk_nope_head_dim + self.qk_rope_head_dim)
        query_nope, query_rope = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        query = torch.cat([query_nope, rotate_interleaved(query_rope, cos, sin)], dim=-1)

        latent, key_rope = self.kv_a_proj_with_mqa(hidden_states).split(
            [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1
        )
        key_value = self.kv_b_proj(self.kv_a_layernorm(latent))
        key_value = split_heads(key_value, self.qk_nope_head_dim + self.v_head_dim)
        key_nope, value = key_value.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        heads = key_nope.shape[1]
        key_rope = for_own_heads(key_rope, self.head_weight, self.num_attention_heads, heads)
        key_rope = rotate_interleaved(key_rope.unsqueeze(1), cos, sin)
        key = torch.cat([key_nope, key_rope.expand(-1, heads, -1, -1)], dim=-1)
        return self.attend(query, key, value, mask)

    def _queries(self, hidden_states: Tensor) -> Tensor:
        if self.q_lora_rank is None:
            return self.q_proj(hidden_states)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
