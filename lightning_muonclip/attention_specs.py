"""The specs of this package's own attention modules, which therefore need no inference."""

from __future__ import annotations

from lightning_muonclip.attention.attention import Attention
from lightning_muonclip.attention.latent import MultiheadLatentAttention
from lightning_muonclip.qk_clip.describe.declared import register_attention
from lightning_muonclip.qk_clip.describe.spec import AttentionSpec, Projection


def _attention(module: Attention) -> AttentionSpec:
    projections = Projection("q_proj", "q(H d)"), Projection("k_proj", "k(G d)"), Projection("v_proj", "*(G d)")
    has_norm = module.q_norm is not None
    gains = (Projection("q_norm", "q(d)"), Projection("k_norm", "k(d)")) if has_norm else ()
    heads, groups = module.num_attention_heads, module.num_key_value_heads
    return AttentionSpec(projections, heads, groups, {"d": module.head_dim}, gains=gains)


def _latent_attention(module: MultiheadLatentAttention) -> AttentionSpec:
    query = "q_proj" if module.q_lora_rank is None else "q_b_proj"
    sizes = {"n": module.qk_nope_head_dim, "r": module.qk_rope_head_dim, "v": module.v_head_dim}
    projections = Projection(query, "(H [qn:n, qr:r])"), Projection("kv_b_proj", "(H [kn:n, *:v])")
    return AttentionSpec(projections, module.num_attention_heads, sizes=sizes)


register_attention(Attention, _attention)
register_attention(MultiheadLatentAttention, _latent_attention)
