"""What is known of the attention of many libraries: an oracle for what QK-Clip infers without a name.

One row a class, by qualified name, so that no library has to be imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from lightning_muonclip.qk_clip.describe.declared import AttentionModules, SpecFn, is_inside
from lightning_muonclip.qk_clip.describe.layout import KINDS, ChannelMap
from lightning_muonclip.qk_clip.describe.names import qualified_name
from lightning_muonclip.qk_clip.describe.spec import AttentionSpec, Projection


@dataclass(frozen=True)
class Family:
    """A spec whose numbers are given as paths of a module's attributes.

    Args:
        projections: As in :class:`AttentionSpec`.
        heads: Attribute with the number of query heads.
        key_heads: Attribute with the number of key heads; ``None`` is one for every query head.
        sizes: Attributes with the sizes that the layouts name.
        gains: Gains of norms after the projection, where a module has such norms.
    """

    projections: tuple[Projection, ...]
    heads: str
    key_heads: str | None = None
    sizes: dict[str, str] = field(default_factory=dict)
    gains: tuple[Projection, ...] = ()

    def __call__(self, module: Any) -> AttentionSpec:
        """The spec of one module of the family."""
        gains = tuple(gain for gain in self.gains if is_active(getattr(module, gain.name.split(".")[0], None)))
        return AttentionSpec(
            self.projections,
            attrgetter(self.heads)(module),
            None if self.key_heads is None else attrgetter(self.key_heads)(module),
            {name: attrgetter(path)(module) for name, path in self.sizes.items()},
            qk_norm=bool(gains),
            # A norm without a weight normalizes too, but has no gain to scale.
            gains=tuple(
                gain for gain in gains if getattr(getattr(module, gain.name, None), "weight", None) is not None
            ),
        )


def is_active(norm: Any) -> bool:
    """Whether a norm is there and does something."""
    return isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity)


def separate(query: str, key: str, value: str) -> tuple[Projection, ...]:
    """Three separate projections, each laid out head by head."""
    return Projection(query, "q(H d)"), Projection(key, "k(G d)"), Projection(value, "*(G d)")


def per_dim(query: str, key: str, offset: float = 0.0) -> tuple[Projection, ...]:
    """Gains with one number per channel of a head, shared by all heads."""
    return Projection(query, "q(d)", offset=offset), Projection(key, "k(d)", offset=offset)


def all_of(kind: str, head: int, channels: int) -> ChannelMap:
    """Channels that are all of one head."""
    return ChannelMap(torch.full((channels,), KINDS.index(kind)), torch.full((channels,), head))


def _fused(name: str, layout: str, dim: int = 0) -> tuple[Projection, ...]:
    return (Projection(name, layout, dim),)


def _latent(query: str) -> tuple[Projection, ...]:
    return Projection(query, "(H [qn:n, qr:r])"), Projection("kv_b_proj", "(H [kn:n, *:v])")


CONCATENATED = "[q(H d) | k(G d) | *(G d)]"
INTERLEAVED = "(H [q:d, k:d, *:d])"
GROUPED = "(G [q:r·d, k:d, *:d])"

_QKV = separate("q_proj", "k_proj", "v_proj")
_GROUPED: dict[str, Any] = {
    "heads": "config.num_attention_heads",
    "key_heads": "config.num_key_value_heads",
    "sizes": {"d": "head_dim"},
}
_OWN_HEADS: dict[str, Any] = {"heads": "num_heads", "sizes": {"d": "head_dim"}}

_LLAMA = Family(_QKV, **_GROUPED)
_QWEN3 = Family(_QKV, **_GROUPED, gains=per_dim("q_norm", "k_norm"))
_GEMMA3 = Family(_QKV, **_GROUPED, gains=per_dim("q_norm", "k_norm", offset=1.0))
_OLMO2 = Family(_QKV, **_GROUPED, gains=(Projection("q_norm", "q(H d)"), Projection("k_norm", "k(G d)")))
_COHERE = Family(_QKV, **_GROUPED, gains=(Projection("q_norm", "q(H)"), Projection("k_norm", "k(G)")))
_OPT = Family(_QKV, **_OWN_HEADS)
_BERT = Family(separate("query", "key", "value"), "num_attention_heads", sizes={"d": "attention_head_size"})
_DISTILBERT = Family(separate("q_lin", "k_lin", "v_lin"), "n_heads", sizes={"d": "attention_head_size"})
_T5 = Family(separate("q", "k", "v"), "n_heads", sizes={"d": "key_value_proj_dim"})
_PHI3 = Family(_fused("qkv_proj", CONCATENATED), **_GROUPED)
_NEOX = Family(_fused("query_key_value", INTERLEAVED), "config.num_attention_heads", sizes={"d": "head_size"})
_BLOOM = Family(_fused("query_key_value", INTERLEAVED), **_OWN_HEADS)
_MPT = Family(_fused("Wqkv", CONCATENATED), "n_heads", sizes={"d": "head_dim"})
_TIMM = Family(_fused("qkv", CONCATENATED), **_OWN_HEADS, gains=per_dim("q_norm", "k_norm"))
_OURS = Family(_QKV, "num_attention_heads", "num_key_value_heads", {"d": "head_dim"}, per_dim("q_norm", "k_norm"))
_LITGPT: dict[str, Any] = {
    "heads": "config.n_head",
    "key_heads": "config.n_query_groups",
    "sizes": {"d": "config.head_size"},
}


def _codegen(module: Any) -> AttentionSpec:
    # Four shards, one for each chip that it was trained on; each has its queries, values and keys, in this order.
    heads, dim = module.num_attention_heads, module.head_dim
    return AttentionSpec(_fused("qkv_proj", "(4 [q:h·d, *:h·d, k:h·d])"), heads, sizes={"h": heads // 4, "d": dim})


def _multihead(module: Any) -> AttentionSpec:
    projections = [Projection("in_proj_weight", CONCATENATED)]
    if module.in_proj_weight is None:
        names = ("q_proj_weight", "q(H d)"), ("k_proj_weight", "k(G d)"), ("v_proj_weight", "*(G d)")
        projections = [Projection(name, layout) for name, layout in names]
    if module.in_proj_bias is not None:
        projections.append(Projection("in_proj_bias", CONCATENATED))
    if module.bias_k is not None:
        projections.append(Projection("bias_k", "k(G d)", dim=2))
    return AttentionSpec(tuple(projections), module.num_heads, sizes={"d": module.head_dim})


def _stablelm(module: Any) -> AttentionSpec:
    """A norm for every head."""
    counts = {"q": module.config.num_attention_heads, "k": module.config.num_key_value_heads}
    gains = tuple(
        Projection(f"{kind}_layernorm.norms.{head}", all_of(kind, head, module.head_dim))
        for kind, count in counts.items()
        for head in range(count if module.qk_layernorm else 0)
    )
    return AttentionSpec(_QKV, counts["q"], counts["k"], {"d": module.head_dim}, gains=gains)


def _gpt2(module: Any) -> AttentionSpec:
    projections = _fused("c_attn", CONCATENATED, dim=1)
    if module.is_cross_attention:
        projections = (Projection("q_attn", "q(H d)", 1), Projection("c_attn", "[k(G d) | *(G d)]", 1))
    return AttentionSpec(projections, module.num_heads, sizes={"d": module.head_dim})


def _gpt_bigcode(module: Any) -> AttentionSpec:
    layout = CONCATENATED if module.multi_query else INTERLEAVED
    return AttentionSpec(_fused("c_attn", layout), module.num_heads, module.kv_heads, {"d": module.head_dim})


def _falcon(module: Any) -> AttentionSpec:
    groups, layout = module.num_heads, INTERLEAVED
    if module.new_decoder_architecture:
        groups, layout = module.num_kv_heads, GROUPED
    elif module.multi_query:
        groups, layout = 1, CONCATENATED
    return AttentionSpec(_fused("query_key_value", layout), module.num_heads, groups, {"d": module.head_dim})


def _latent_attention(module: Any) -> AttentionSpec:
    return AttentionSpec(
        _latent("q_proj" if module.q_lora_rank is None else "q_b_proj"),
        getattr(module, "num_attention_heads", None) or module.num_heads,
        sizes={"n": module.qk_nope_head_dim, "r": module.qk_rope_head_dim, "v": module.v_head_dim},
    )


def _litgpt(module: Any) -> AttentionSpec:
    config = module.config
    gains: tuple[Projection, ...] = ()
    if config.norm_qk:
        whole = Projection("norm_q", "q(H d)"), Projection("norm_k", "k(G d)")
        gains = whole if config.norm_qk_type == "olmo2" else per_dim("norm_q", "norm_k")
    return Family(_fused("qkv", CONCATENATED), **_LITGPT, gains=gains)(module)


def _litgpt_latent(module: Any) -> AttentionSpec:
    config = module.config
    return AttentionSpec(
        _latent("q_b_proj"),
        config.n_head,
        sizes={"n": config.qk_nope_head_dim, "r": config.qk_rope_head_dim, "v": config.v_head_dim},
    )


def _hugging_face(**rows: SpecFn) -> dict[str, SpecFn]:
    """Rows under the qualified names of classes, written ``model__Class``."""
    qualified = (name.split("__") for name in rows)
    return {f"transformers.models.{m}.modeling_{m}.{c}": row for (m, c), row in zip(qualified, rows.values())}


FAMILIES: dict[str, SpecFn] = {
    "lightning_muonclip.attention.attention.Attention": _OURS,
    "lightning_muonclip.attention.latent.MultiheadLatentAttention": _latent_attention,
    "torch.nn.modules.activation.MultiheadAttention": _multihead,
    "timm.layers.attention.Attention": _TIMM,
    "litgpt.model.CausalSelfAttention": _litgpt,
    "litgpt.model.MultiheadLatentAttention": _litgpt_latent,
    **_hugging_face(
        llama__LlamaAttention=_LLAMA,
        mistral__MistralAttention=_LLAMA,
        mixtral__MixtralAttention=_LLAMA,
        qwen2__Qwen2Attention=_LLAMA,
        qwen3__Qwen3Attention=_QWEN3,
        gemma__GemmaAttention=_LLAMA,
        gemma2__Gemma2Attention=_LLAMA,
        gemma3__Gemma3Attention=_GEMMA3,
        phi3__Phi3Attention=_PHI3,
        gpt2__GPT2Attention=_gpt2,
        gpt_bigcode__GPTBigCodeAttention=_gpt_bigcode,
        gptj__GPTJAttention=Family(_QKV, "num_attention_heads", sizes={"d": "head_dim"}),
        gpt_neo__GPTNeoSelfAttention=_OPT,
        gpt_neox__GPTNeoXAttention=_NEOX,
        codegen__CodeGenAttention=_codegen,
        opt__OPTAttention=_OPT,
        bloom__BloomAttention=_BLOOM,
        falcon__FalconAttention=_falcon,
        mpt__MptAttention=_MPT,
        starcoder2__Starcoder2Attention=_LLAMA,
        stablelm__StableLmAttention=_stablelm,
        cohere__CohereAttention=_COHERE,
        cohere2__Cohere2Attention=_LLAMA,
        olmo__OlmoAttention=_LLAMA,
        olmo2__Olmo2Attention=_OLMO2,
        deepseek_v2__DeepseekV2Attention=_latent_attention,
        deepseek_v3__DeepseekV3Attention=_latent_attention,
        glm__GlmAttention=_LLAMA,
        glm4__Glm4Attention=_LLAMA,
        bert__BertSelfAttention=_BERT,
        bert__BertCrossAttention=_BERT,
        roberta__RobertaSelfAttention=_BERT,
        roberta__RobertaCrossAttention=_BERT,
        distilbert__DistilBertSelfAttention=_DISTILBERT,
        vit__ViTAttention=Family(_QKV, "num_attention_heads", sizes={"d": "head_dim"}),
        vit__ViTSelfAttention=_BERT,  # transformers < 5.9
        clip__CLIPAttention=_OPT,
        whisper__WhisperAttention=_OPT,
        t5__T5Attention=_T5,
    ),
}


def known_attention(model: nn.Module) -> AttentionModules:
    """The attention modules of the classes that are known, in ``named_modules`` order, each with its spec."""
    known = {name: module for name, module in model.named_modules() if qualified_name(type(module)) in FAMILIES}
    return {
        name: (module, FAMILIES[qualified_name(type(module))](module))
        for name, module in known.items()
        if not any(other != name and is_inside(other, name) for other in known)  # ViTAttention of transformers < 5.9
    }
