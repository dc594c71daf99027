"""Tiny models of every family with random weights, and their inputs."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families.known import known_attention
from lightning_muonclip import Attention, AttentionMask, MultiheadLatentAttention
from lightning_muonclip.qk_clip.describe.names import qualified_name

BATCH, LENGTH, WIDTH, HEADS, VOCAB = 2, 10, 32, 4, 32
IMPLEMENTATIONS = ("sdpa", "eager")
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One model and one input.

    Args:
        family: Its row in the table; several cases may share one.
        classes: Qualified names of its attention modules' classes.
        make: Creates the model for an implementation.
        inputs: Creates positional and keyword arguments.
        implementations: The attention implementations of the model.
        variant: Distinguishes cases of one family.
        heads: Number of query heads.
        truth: The implementation that the oracle runs, ``None`` for the same one.
        queries: Which queries count, shape (batch, length), where not all do.
        qk_norm: As in :class:`~lightning_muonclip.QKClip`.
        shared_gain: Whether all heads of a layer are scaled by one gain.
        cached: Whether the model accepts a cache of keys.
        fits: Whether the installed release builds the model as the case says; takes the model and its implementation.
    """

    family: str
    classes: tuple[str, ...]
    make: Callable[[str], nn.Module]
    inputs: Callable[[], Inputs]
    implementations: tuple[str, ...] = ("",)
    variant: str = ""
    heads: int = HEADS
    truth: str | None = None
    queries: Tensor | None = None
    qk_norm: str = "error"
    shared_gain: bool = False
    cached: bool = False
    fits: Callable[[Any, str], bool] = lambda model, implementation: True

    def model(self, implementation: str) -> nn.Module:
        """The model in training mode without dropout, with large, reproducible random weights."""
        return copy.deepcopy(_make(self, implementation))

    def batches(self) -> list[Inputs]:
        """The inputs and, if padding is optional, the same without it."""
        args, kwargs = self.inputs()
        without = {name: value for name, value in kwargs.items() if not name.endswith("attention_mask")}
        return [(args, kwargs), *([(args, without)] if len(without) < len(kwargs) else [])]

    def attention(self, model: nn.Module) -> list[str]:
        """Names of the attention modules."""
        found = known_attention(model)
        assert {qualified_name(type(module)) for module, _ in found.values()} == set(self.classes)
        return list(found)


@functools.cache
def _make(case: Case, implementation: str) -> nn.Module:
    torch.manual_seed(0)
    model = case.make(implementation).train()
    if not case.fits(model, implementation):
        package = case.classes[0].partition(".")[0]
        pytest.skip(f"{package} {metadata.version(package)} builds {case.family} in another way")
    randomize(model)
    return model


def parameters(cases: Sequence[Case]) -> Any:
    """Parametrizes a test by ``case`` and ``implementation``."""
    pairs = [(case, implementation) for case in cases for implementation in case.implementations]
    names = [" ".join(filter(None, (case.family, case.variant, own))) for case, own in pairs]
    return pytest.mark.parametrize(("case", "implementation"), pairs, ids=[name.replace(" ", "-") for name in names])


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Large weights, random biases and gains, no dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    for name, param in model.named_parameters():
        noise = torch.randn_like(param)
        if "norm" in name.lower() or param.ndim < 2:
            param.copy_(name.endswith("weight") + 0.3 * noise)
        else:
            param.copy_(2 * noise * param.shape[-1] ** -0.5)


# Inputs


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCAB, (BATCH, length), generator=torch.Generator().manual_seed(length))


def real(length: int = LENGTH) -> Tensor:
    """Which tokens are no padding, int64: the second sequence is shorter."""
    return (torch.arange(length) < torch.tensor([[length], [length - 3]])).long()


def text() -> Inputs:
    return (), {"input_ids": tokens(), "attention_mask": real()}


def text_beside_an_encoder() -> Inputs:
    encoder = {"encoder_hidden_states": draw(BATCH, 7, WIDTH), "encoder_attention_mask": real(7)}
    return (), {**text()[1], **encoder}


def text_to_text() -> Inputs:
    return (), {**text()[1], "decoder_input_ids": tokens(7), "decoder_attention_mask": real(7)}


def images() -> Inputs:
    return (), {"pixel_values": draw(BATCH, 3, 8, 8)}


def sound() -> Inputs:
    return (), {"input_features": draw(BATCH, 8, 2 * LENGTH), "decoder_input_ids": tokens(7)}


# torch

MULTIHEAD = "torch.nn.modules.activation.MultiheadAttention"
HIDDEN = real() == 0
FUTURE = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


def additive(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)


class Multihead(nn.Module):
    """A layer of torch's attention, and its arguments."""

    def __init__(self, need_weights: bool, masks: dict[str, Any], **kwargs: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **kwargs})
        self.need_weights = need_weights
        self.masks = masks

    def forward(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        key = query if key is None else key
        masks = {k: v.to(query.dtype) if "mask" in k and v.is_floating_point() else v for k, v in self.masks.items()}
        value = key if value is None else value
        return self.attention(query, key, value, need_weights=self.need_weights, **masks)[0]


def multihead(family: str, variant: str, masks: dict[str, Any], *shapes: Sequence[int], **kwargs: Any) -> Case:
    return Case(
        family,
        (MULTIHEAD,),
        lambda implementation: Multihead(implementation == "need_weights", masks, **kwargs),
        lambda: (tuple(draw(*shape) for shape in shapes or [(BATCH, LENGTH, WIDTH)]), {}),
        ("need_weights", "no weights"),
        variant,
    )


_BIASED_MASK = additive(FUTURE) + draw(LENGTH, LENGTH)
_PER_HEAD = (draw(BATCH * HEADS, LENGTH, LENGTH) > 0) & ~torch.eye(LENGTH, dtype=torch.bool)
_FUSED, _SEPARATE, _BIAS = (f"torch MultiheadAttention{what}" for what in ("", ", kdim and vdim", ", add_bias_kv"))
_MEMORY = (BATCH, LENGTH, WIDTH), (BATCH, 7, 12), (BATCH, 7, 20)

TORCH = [
    multihead(_FUSED, "no mask", {}),
    multihead(_FUSED, "no bias", {}, bias=False),
    multihead(_FUSED, "length first", {}, (LENGTH, BATCH, WIDTH), batch_first=False),
    multihead(_FUSED, "no batch", {}, (LENGTH, WIDTH)),
    multihead(_FUSED, "padding", {"key_padding_mask": HIDDEN}),
    multihead(_FUSED, "additive padding", {"key_padding_mask": additive(HIDDEN)}),
    multihead(_FUSED, "causal", {"attn_mask": FUTURE, "is_causal": True}),
    multihead(_FUSED, "causal without the hint", {"attn_mask": FUTURE}),
    multihead(_FUSED, "additive", {"attn_mask": _BIASED_MASK}),
    multihead(_FUSED, "both", {"attn_mask": FUTURE, "key_padding_mask": HIDDEN}),
    multihead(_FUSED, "a mask a head", {"attn_mask": _PER_HEAD}),
    multihead(_FUSED, "zero key", {"key_padding_mask": HIDDEN}, add_zero_attn=True),
    multihead(_SEPARATE, "no mask", {}, *_MEMORY, kdim=12, vdim=20),
    multihead(_SEPARATE, "no bias", {}, *_MEMORY, kdim=12, vdim=20, bias=False),
    multihead(_SEPARATE, "padding", {"key_padding_mask": real(7) == 0}, *_MEMORY, kdim=12, vdim=20),
    multihead(_BIAS, "no mask", {}, add_bias_kv=True),
    multihead(_BIAS, "both", {"attn_mask": FUTURE, "key_padding_mask": HIDDEN}, add_bias_kv=True, add_zero_attn=True),
    multihead(_BIAS, "separate", {}, *_MEMORY, kdim=12, vdim=20, add_bias_kv=True),
]


def _torch_layer(family: str, make: Callable[[], nn.Module], memory: bool, variant: str = "", **kwargs: Any) -> Case:
    shapes = [(BATCH, LENGTH, WIDTH), (BATCH, 7, WIDTH)][: 1 + memory]
    inputs = tuple(draw(*shape) for shape in shapes), kwargs
    return Case(family, (MULTIHEAD,), lambda _: make(), lambda: inputs, variant=variant)


def _encoder_layer(**kwargs: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True, **kwargs)


def _decoder_layer(**kwargs: Any) -> nn.Module:
    return nn.TransformerDecoderLayer(WIDTH, HEADS, 48, batch_first=True, **kwargs)


_SOURCE = {"src_key_padding_mask": HIDDEN}
_CAUSAL = {"tgt_mask": FUTURE, "tgt_is_causal": True, "memory_key_padding_mask": real(7) == 0}
TORCH += [
    _torch_layer("torch TransformerEncoderLayer", _encoder_layer, False, **_SOURCE),
    _torch_layer(
        "torch TransformerEncoderLayer", lambda: _encoder_layer(norm_first=True, bias=False), False, "norm first"
    ),
    _torch_layer("torch TransformerEncoder", lambda: nn.TransformerEncoder(_encoder_layer(), 2), False, **_SOURCE),
    _torch_layer(
        "torch TransformerEncoder",
        lambda: nn.TransformerEncoder(_encoder_layer(norm_first=True), 2, enable_nested_tensor=False),
        False,
        "causal",
        mask=FUTURE,
        is_causal=True,
    ),
    _torch_layer("torch TransformerDecoderLayer", _decoder_layer, True, **_CAUSAL),
    _torch_layer(
        "torch TransformerDecoder", lambda: nn.TransformerDecoder(_decoder_layer(norm_first=True), 2), True, **_CAUSAL
    ),
]

# Hugging Face

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "pad_token_id": 0}
_WIDE_HEADS = {**_GROUPED, "head_dim": 12}
_GPT = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_positions": 64}
_FALCON = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS}
_LATENT = {
    **_COMMON,
    "num_key_value_heads": HEADS,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 2,
    "moe_intermediate_size": 16,
}
_ROPE_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
_MPT = {"vocab_size": VOCAB, "d_model": WIDTH, "n_layers": 2, "n_heads": HEADS, "max_seq_len": 64, "expansion_ratio": 2}
_VISION = {"image_size": 8, "patch_size": 2}
_LOCAL = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}

UPCAST = "eager, upcast and reordered"


def _pretrained(model: str, config: str, options: dict[str, Any], implementation: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    if implementation == UPCAST:
        implementation, options = "eager", {**options, "reorder_and_upcast_attn": True}
    cls = getattr(transformers, model)
    if implementation == "sdpa" and not cls._supports_sdpa:
        pytest.skip(f"{model} of transformers {transformers.__version__} has no {implementation}")
    return cls(getattr(transformers, config)(**options, attn_implementation=implementation))


def hf(
    family: str,
    prefix: str,
    classes: str,
    config: dict[str, Any],
    variant: str = "",
    *,
    model: str = "Model",
    inputs: Callable[[], Inputs] = text,
    **kwargs: Any,
) -> Case:
    """A model of Hugging Face by the prefix of its classes; ``classes`` are written ``folder.Class``."""
    names = tuple(f"transformers.models.{m}.modeling_{m}.{c}" for m, c in (n.split(".") for n in classes.split()))
    make = functools.partial(_pretrained, prefix + model, f"{prefix}Config", config)
    options = {"implementations": IMPLEMENTATIONS, "truth": "eager", "cached": inputs is text, **kwargs}
    return Case(family, names, make, inputs, variant=variant, **options)


def _has_one_attention_class(model: Any, implementation: str = "") -> bool:
    return any(name.endswith("q_proj") for name, _ in model.named_modules())


def _has_two_attention_classes(model: Any, implementation: str = "") -> bool:
    return not _has_one_attention_class(model)


def _tells_its_scale(model: Any, implementation: str) -> bool:
    return implementation == "sdpa" or hasattr(model.h[0].attn, "scaling")


def _attends_by_an_interface(model: Any, implementation: str) -> bool:
    return hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS")


_EAGER: dict[str, Any] = {"implementations": ("eager",)}
_GAIN = {"qk_norm": "gain"}
_ONE_GAIN = {"qk_norm": "gain", "shared_gain": True}

HUGGING_FACE = [
    hf("Llama", "Llama", "llama.LlamaAttention", {**_WIDE_HEADS, "attention_bias": True}),
    hf("Mistral", "Mistral", "mistral.MistralAttention", {**_GROUPED, "sliding_window": 4}),
    hf(
        "Mixtral",
        "Mixtral",
        "mixtral.MixtralAttention",
        {**_GROUPED, "num_local_experts": 2, "sliding_window": 4, "experts_implementation": "eager"},
    ),
    hf("Qwen2", "Qwen2", "qwen2.Qwen2Attention", {**_GROUPED, "use_sliding_window": True, **_LOCAL}),
    hf("Qwen3", "Qwen3", "qwen3.Qwen3Attention", {**_WIDE_HEADS, "attention_bias": True}, **_ONE_GAIN),
    hf("Gemma", "Gemma", "gemma.GemmaAttention", _WIDE_HEADS),
    hf(
        "Gemma 2",
        "Gemma2",
        "gemma2.Gemma2Attention",
        {**_WIDE_HEADS, **_LOCAL, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 6},
        **_EAGER,
    ),
    hf(
        "Gemma 3",
        "Gemma3Text",
        "gemma3.Gemma3Attention",
        {**_WIDE_HEADS, **_LOCAL, "query_pre_attn_scalar": 6},
        **_ONE_GAIN,
    ),
    hf("Phi-3", "Phi3", "phi3.Phi3Attention", _GROUPED),
    hf(
        "GPT-2",
        "GPT2",
        "gpt2.GPT2Attention",
        {**_GPT, "scale_attn_by_inverse_layer_idx": True},
        implementations=(*IMPLEMENTATIONS, UPCAST),
        truth="sdpa",
        fits=_tells_its_scale,
    ),
    hf(
        "GPT-2 with cross attention",
        "GPT2",
        "gpt2.GPT2Attention",
        {**_GPT, "add_cross_attention": True},
        inputs=text_beside_an_encoder,
        implementations=(*IMPLEMENTATIONS, UPCAST),
        truth="sdpa",
        fits=_tells_its_scale,
    ),
    hf("GPT-BigCode", "GPTBigCode", "gpt_bigcode.GPTBigCodeAttention", _GPT, "one key"),
    hf("GPT-BigCode", "GPTBigCode", "gpt_bigcode.GPTBigCodeAttention", {**_GPT, "multi_query": False}, "many keys"),
    hf("GPT-J", "GPTJ", "gptj.GPTJAttention", {**_GPT, "rotary_dim": 4}, **_EAGER),
    hf(
        "GPT-Neo",
        "GPTNeo",
        "gpt_neo.GPTNeoSelfAttention",
        {
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "num_layers": 2,
            "num_heads": HEADS,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "max_position_embeddings": 64,
        },
        **_EAGER,
    ),
    hf("GPT-NeoX", "GPTNeoX", "gpt_neox.GPTNeoXAttention", _COMMON),
    hf("CodeGen", "CodeGen", "codegen.CodeGenAttention", {**_GPT, "n_head": 8, "rotary_dim": 4}, heads=8, **_EAGER),
    hf("OPT", "OPT", "opt.OPTAttention", {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": WIDTH}),
    hf(
        "BLOOM",
        "Bloom",
        "bloom.BloomAttention",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": 2, "n_head": HEADS},
        **_EAGER,
    ),
    hf(
        "Falcon",
        "Falcon",
        "falcon.FalconAttention",
        {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True},
        "grouped",
    ),
    hf(
        "Falcon",
        "Falcon",
        "falcon.FalconAttention",
        {**_FALCON, "multi_query": True, "new_decoder_architecture": False, "bias": True},
        "one key",
    ),
    hf(
        "Falcon",
        "Falcon",
        "falcon.FalconAttention",
        {**_FALCON, "multi_query": False, "new_decoder_architecture": False, "bias": True},
        "many keys",
    ),
    hf(
        "Falcon",
        "Falcon",
        "falcon.FalconAttention",
        {**_FALCON, "multi_query": False, "new_decoder_architecture": False, "bias": True, "alibi": True},
        "many keys with ALiBi",
        truth=None,  # the eager one counts ALiBi twice
    ),
    hf("MPT", "Mpt", "mpt.MptAttention", _MPT, **_EAGER),
    hf("StarCoder2", "Starcoder2", "starcoder2.Starcoder2Attention", {**_GROUPED, "sliding_window": 4}),
    hf("StableLM", "StableLm", "stablelm.StableLmAttention", {**_GROUPED, "use_qkv_bias": True}),
    hf(
        "StableLM, QK-norm",
        "StableLm",
        "stablelm.StableLmAttention",
        {**_GROUPED, "qk_layernorm": True},
        **_GAIN,
    ),
    hf("Cohere", "Cohere", "cohere.CohereAttention", {**_GROUPED, "attention_bias": True}),
    hf("Cohere, QK-norm", "Cohere", "cohere.CohereAttention", {**_GROUPED, "use_qk_norm": True}, **_GAIN),
    hf("Cohere 2", "Cohere2", "cohere2.Cohere2Attention", {**_WIDE_HEADS, **_LOCAL}),
    hf("OLMo", "Olmo", "olmo.OlmoAttention", _GROUPED),
    hf("OLMo 2", "Olmo2", "olmo2.Olmo2Attention", _GROUPED, **_GAIN),
    hf("DeepSeek-V2", "DeepseekV2", "deepseek_v2.DeepseekV2Attention", {**_LATENT, "q_lora_rank": None}, "plain"),
    hf("DeepSeek-V2", "DeepseekV2", "deepseek_v2.DeepseekV2Attention", {**_LATENT, "q_lora_rank": 12}, "compressed"),
    hf("DeepSeek-V3", "DeepseekV3", "deepseek_v3.DeepseekV3Attention", {**_LATENT, "q_lora_rank": None}, "plain"),
    hf("DeepSeek-V3", "DeepseekV3", "deepseek_v3.DeepseekV3Attention", {**_LATENT, "q_lora_rank": 12}, "compressed"),
    hf(
        "DeepSeek-V3",
        "DeepseekV3",
        "deepseek_v3.DeepseekV3Attention",
        {**_LATENT, "q_lora_rank": 12, "attention_bias": True, "rope_parameters": _ROPE_YARN},
        "YaRN",
    ),
    hf("GLM", "Glm", "glm.GlmAttention", {**_WIDE_HEADS, "attention_bias": True}),
    hf("GLM-4", "Glm4", "glm4.Glm4Attention", {**_WIDE_HEADS, "attention_bias": True}),
    hf("BERT", "Bert", "bert.BertSelfAttention", _COMMON, cached=False),
    hf(
        "BERT with cross attention",
        "Bert",
        "bert.BertSelfAttention bert.BertCrossAttention",
        {**_COMMON, "is_decoder": True, "add_cross_attention": True},
        inputs=text_beside_an_encoder,
    ),
    hf("RoBERTa", "Roberta", "roberta.RobertaSelfAttention", _COMMON, cached=False),
    hf(
        "RoBERTa with cross attention",
        "Roberta",
        "roberta.RobertaSelfAttention roberta.RobertaCrossAttention",
        {**_COMMON, "is_decoder": True, "add_cross_attention": True},
        inputs=text_beside_an_encoder,
    ),
    hf(
        "DistilBERT",
        "DistilBert",
        "distilbert.DistilBertSelfAttention",
        {
            "vocab_size": VOCAB,
            "dim": WIDTH,
            "hidden_dim": 48,
            "n_layers": 2,
            "n_heads": HEADS,
            "max_position_embeddings": 64,
        },
        cached=False,
    ),
    hf("ViT", "ViT", "vit.ViTAttention", {**_COMMON, **_VISION}, inputs=images, fits=_has_one_attention_class),
    hf(
        "ViT",
        "ViT",
        "vit.ViTSelfAttention",
        {**_COMMON, **_VISION},
        "of older releases",
        inputs=images,
        fits=_has_two_attention_classes,
    ),
    hf("CLIP text", "CLIPText", "clip.CLIPAttention", {**_COMMON, "eos_token_id": 2}, cached=False),
    hf("CLIP vision", "CLIPVision", "clip.CLIPAttention", {**_COMMON, **_VISION}, inputs=images),
    hf(
        "Whisper",
        "Whisper",
        "whisper.WhisperAttention",
        {
            "vocab_size": VOCAB,
            "num_mel_bins": 8,
            "d_model": WIDTH,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_source_positions": LENGTH,
            "max_target_positions": 64,
            "pad_token_id": 0,
            "decoder_start_token_id": 1,
        },
        inputs=sound,
    ),
    hf(
        "T5",
        "T5",
        "t5.T5Attention",
        {
            "vocab_size": VOCAB,
            "d_model": WIDTH,
            "d_kv": 12,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": HEADS,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 16,
        },
        inputs=text_to_text,
        fits=_attends_by_an_interface,
    ),
]

#: Models that clamp the outputs of their projections: no factor on a weight scales their logits.
CLAMPED = [
    hf("OLMo", "Olmo", "olmo.OlmoAttention", {**_GROUPED, "clip_qkv": 1.0}),
    hf("MPT", "Mpt", "mpt.MptAttention", {**_MPT, "attn_config": {"clip_qkv": 1.0}}, **_EAGER),
]

# litgpt


def _litgpt(**options: Any) -> nn.Module:
    lit = pytest.importorskip("litgpt.model")
    sizes = {"block_size": 32, "vocab_size": VOCAB, "n_layer": 2, "n_embd": WIDTH, "n_head": HEADS}
    config = {**sizes, "intermediate_size": 48, "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", **options}
    return lit.GPT(lit.Config(**config))


def litgpt(family: str, variant: str = "", case: dict[str, Any] | None = None, **options: Any) -> Case:
    cls = "MultiheadLatentAttention" if "latent_attention" in options else "CausalSelfAttention"
    return Case(
        f"litgpt {family}",
        (f"litgpt.model.{cls}",),
        lambda _: _litgpt(**options),
        lambda: ((tokens(),), {}),
        variant=variant,
        **(case or {}),
    )


_WINDOW = {"sliding_window_size": 4, "sliding_window_indices": [1, 0]}
_SQUEEZED = {"q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
_YARN = {
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_seq_len": 8,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
LITGPT = [
    litgpt("GQA", n_query_groups=2, attn_bias=True),
    litgpt("GQA", "window", n_query_groups=1, head_size=12, rotary_percentage=0.5, **_WINDOW),
    litgpt("GQA", "YaRN", n_query_groups=2, rope_adjustments=_YARN),
    litgpt("soft-cap", "window", n_query_groups=2, attention_logit_softcapping=5.0, **_WINDOW),
    litgpt("soft-cap", "scaled", attention_logit_softcapping=5.0, attention_scores_scalar=6, rope_adjustments=_YARN),
    litgpt("QK-norm a head", case=_ONE_GAIN, n_query_groups=2, norm_qk=True),
    litgpt("QK-norm whole", case=_GAIN, n_query_groups=2, norm_qk=True, norm_qk_type="olmo2"),
    litgpt("MLA", latent_attention=_SQUEEZED),
    litgpt("MLA", "YaRN", latent_attention=_SQUEEZED, rope_adjustments=_YARN),
    litgpt("MLA", "soft-cap", latent_attention=_SQUEEZED, attention_logit_softcapping=5.0, rope_adjustments=_YARN),
]

# Ours


class Layers(nn.Module):
    """Layers on a residual stream, all with one mask."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([make(), make()])

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, **kwargs)
        return x


def ours(
    cls: type[nn.Module], norm: str = "", variant: str = "", case: dict[str, Any] | None = None, **options: Any
) -> Case:
    padding = real().bool()
    return Case(
        f"lightning_muonclip {cls.__name__}{norm}",
        (qualified_name(cls),),
        lambda _: Layers(functools.partial(cls, WIDTH, HEADS, **options)),
        lambda: ((draw(BATCH, LENGTH, WIDTH),), {"mask": AttentionMask(padding=padding)}),
        variant=variant,
        queries=padding,
        **(case or {}),
    )


_SMALL_LATENT = {
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "attention_bias": True,
}
OURS = [
    ours(Attention, attention_bias=True, num_key_value_heads=2, head_dim=12),
    ours(Attention, ", QK-norm", case=_ONE_GAIN, num_key_value_heads=2, qk_norm=True),
    ours(MultiheadLatentAttention, variant="plain", **_SMALL_LATENT),
    ours(MultiheadLatentAttention, variant="compressed", **_SMALL_LATENT, q_lora_rank=12),
]

# timm


class Masked(nn.Module):
    """One attention module and its mask."""

    def __init__(self, attention: nn.Module, **masks: Any) -> None:
        super().__init__()
        self.attention = attention
        self.masks = masks

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, **self.masks)


def _fused(model: nn.Module, implementation: str) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = implementation == "fused"
    return model


def timm(family: str, variant: str, make: Callable[[Any], nn.Module], image: bool = False, **kwargs: Any) -> Case:
    shape = (BATCH, 3, 32, 32) if image else (BATCH, LENGTH, WIDTH)
    return Case(
        f"timm {family}",
        ("timm.layers.attention.Attention",),
        lambda implementation: _fused(make(pytest.importorskip("timm")), implementation),
        lambda: ((draw(*shape),), {}),
        ("fused", "not fused"),
        variant,
        **kwargs,
    )


def _timm_layer(masks: dict[str, Any] | None = None, **options: Any) -> Callable[[Any], nn.Module]:
    return lambda lib: Masked(lib.layers.Attention(WIDTH, HEADS, **options), **(masks or {}))


def _timm_vit(**options: Any) -> Callable[[Any], nn.Module]:
    sizes = {"img_size": 32, "depth": 2, "embed_dim": WIDTH, "num_heads": HEADS, "num_classes": 3}
    return lambda lib: lib.create_model("vit_tiny_patch16_224", **sizes, **options)


TIMM = [
    timm("Attention", "no bias", _timm_layer()),
    timm("Attention", "bias", _timm_layer(qkv_bias=True, attn_head_dim=12)),
    timm("Attention", "boolean mask", _timm_layer({"attn_mask": ~FUTURE}, qkv_bias=True)),
    timm("Attention", "additive mask", _timm_layer({"attn_mask": _BIASED_MASK}, qkv_bias=True)),
    timm("Attention", "causal", _timm_layer({"is_causal": True}, qkv_bias=True)),
    timm("Attention, QK-norm", "layer norm", _timm_layer(qk_norm=True, norm_layer=nn.LayerNorm), **_ONE_GAIN),
    timm("Attention, QK-norm", "RMS norm", _timm_layer(qk_norm=True, norm_layer=nn.RMSNorm), **_ONE_GAIN),
    timm("VisionTransformer", "", _timm_vit(), image=True),
    timm("VisionTransformer, QK-norm", "", _timm_vit(qk_norm=True), image=True, **_ONE_GAIN),
]

CASES = [*OURS, *TORCH, *HUGGING_FACE, *LITGPT, *TIMM]

#: Known classes that the newest releases do not have.
OF_OLDER_RELEASES = {"transformers.models.vit.modeling_vit.ViTSelfAttention": "transformers < 5.9"}
