"""A sample of the sweep over public models: nothing is wrong, and every attention gets the verdict that it had."""

from __future__ import annotations

import pytest

from families.sweep import models_of, run, verdicts

#: By library: a model, and for each class of attention in it what a clip scales, or words of the reason of a refusal.
SAMPLE = {
    "transformers": """
        afmoe | AfmoeAttention: q and k, by gains
        aimv2_text_model | Aimv2Attention: q and k
        altclip_text_model | AltRobertaSelfAttention: q and k
        altclip_vision_model | AltCLIPAttention: q and k
        apertus | ApertusAttention: q and k, by gains
        arcee | ArceeAttention: q and k
        audio-spectrogram-transformer | ASTAttention: q and k
        blip_vision_model | BlipAttention: q and k
        blt_patcher | BltSelfAttention: q and k
        bridgetower_text_model | BridgeTowerSelfAttention: q and k
        canary_decoder | CanarySelfAttention: q and k
        chinese_clip_text_model | ChineseCLIPTextSelfAttention: q and k
        chinese_clip_vision_model | ChineseCLIPVisionAttention: q and k
        clap_text_model | ClapTextSelfAttention: q and k
        clipseg_text_model | CLIPSegAttention: q and k
        codegen | CodeGenAttention: q and k
        cohere2 | Cohere2Attention: q and k
        csm_depth_decoder_model | CsmAttention: q and k
        ctrl | MultiHeadAttention: q and k
        cwm | CwmAttention: q and k
        deepseek_v4 | DeepseekV4Attention: refused, makes something else; watched
        dia_encoder | DiaSelfAttention: q and k
        dinov2 | Dinov2Attention: q and k
        distilbert | DistilBertSelfAttention: q and k
        electra | ElectraSelfAttention: q and k
        embedding_gemma2 | EmbeddingGemma2Attention: k, by gains; q and k, by gains
        embedding_gemma2_text | EmbeddingGemma2Attention: k, by gains; q and k, by gains
        emu3_text_model | Emu3Attention: q and k
        ernie4_5 | Ernie4_5Attention: q and k
        esm | EsmSelfAttention: q and k
        esmc | EsmcAttention: q and k, by gains
        eurobert | EuroBertAttention: q and k
        evolla | EvollaAttention: q and k
        exaone | LlamaAttention: q and k
        exaone4 | Exaone4Attention: q and k, by gains
        exaone_moe | ExaoneMoeAttention: q and k, by gains
        falcon | FalconAttention: q and k
        flava_image_model | FlavaSelfAttention: q and k
        flex_olmo | FlexOlmoAttention: q and k, by gains
        flint | FlintAttention: q and k, by gains
        funnel | FunnelRelMultiheadAttention: refused, do not scale with their weights; refused, more than the products
        fuyu | PersimmonAttention: q and k, by gains
        gemma | GemmaAttention: q and k
        gemma3_text | Gemma3Attention: q and k, by gains
        git_vision_model | GitVisionAttention: q and k
        glm4 | Glm4Attention: q and k
        glm4v_moe_vision | Glm4vMoeVisionAttention: q and k
        glm4v_vision | Glm4vVisionAttention: q and k
        glmasr_encoder | GlmAsrAttention: q and k
        gpt2 | GPT2Attention: q and k
        gpt_neox | GPTNeoXAttention: q and k
        gpt_neox_japanese | GPTNeoXJapaneseAttention: q and k
        gpt_oss | GptOssAttention: refused, more than the products
        granite | GraniteAttention: q and k
        granite_docling_vision | GraniteDoclingVisionAttention: q and k
        granite_speech5_ctc | GraniteSpeech5EncoderAttention: k
        granite_speech5_encoder | GraniteSpeech5EncoderAttention: k
        granite_speech_encoder | GraniteSpeechConformerAttention: k
        granite_swa | GraniteSWAAttention: q and k
        gte | GteAttention: q and k
        helium | HeliumAttention: q and k
        higgs_audio_v2 | HiggsAudioV2Attention: q and k
        hunyuan_v1_dense | HunYuanDenseV1Attention: q and k, by gains
        hunyuan_v1_moe | HunYuanMoEV1Attention: q and k, by gains
        hy_v3 | HYV3Attention: q and k, by gains
        hyperclovax | HyperCLOVAXAttention: q and k
        idefics2_vision | Idefics2VisionAttention: q and k
        idefics3_vision | Idefics3VisionAttention: q and k
        ijepa | IJepaAttention: q and k
        imagegpt | ImageGPTAttention: q and k
        jais2 | Jais2Attention: q and k
        janus_vision_model | JanusVisionAttention: q and k
        jetmoe | JetMoeAttention: q and k
        jina_embeddings_v3 | JinaEmbeddingsV3Attention: q and k
        kimi_linear | KimiLinearAttention: q and k
        kolibri1 | Kolibri1Attention: q and k, by gains
        lasr_encoder | LasrEncoderAttention: q and k
        lfm3_vl_vision | Lfm3VlVisionAttention: q and k, by gains
        llama4_text | Llama4TextAttention: watched
        mimo_v2_flash | MiMoV2FlashAttention: q and k; refused, more than the products
        minicpmv4_7 | Qwen3_5Attention: q and k, by gains
        minimax | MiniMaxAttention: q and k
        minimax_m3_vl_vision | MiniMaxM3VLVisionAttention: q and k
        mistral | MistralAttention: q and k
        mlcd_vision_model | MLCDAttention: q and k
        mllama_text_model | MllamaTextSelfAttention: q and k
    """,
    "x-transformers": """
        Decoder attn_flash=True | Attention: q and k
        Decoder attn_gate_values=True | Attention: q and k
        Decoder attn_head_learned_sink=True | Attention: refused, more than the products
        Decoder attn_kv_heads=2 | Attention: q
        Decoder attn_on_attn=True | Attention: q and k
        Decoder attn_one_kv_head=True | Attention: q and k
        Decoder attn_qk_norm=True | Attention: watched
        Decoder attn_qk_norm=True, attn_qk_norm_dim_scale=True | Attention: q and k, by gains
        Decoder attn_sparse_topk=4 | Attention: q and k
        Decoder attn_use_cope=True, attn_cope_max_pos=16 | Attention: refused, more than the products
        Decoder attn_value_dim_head=8 | Attention: q and k
        Decoder polar_pos_emb=True | Attention: refused, do not scale with their weights
        Decoder sandwich_norm=True | Attention: q and k
        Decoder use_rmsnorm=True | Attention: q and k
    """,
    "vit-pytorch": """
        attn_residual_with_dca_simple_vit | Attention: q and k | TransformerBlock: refused, can be followed
        cait | Attention: refused, Bmm stands between
        crossformer | Attention: q and k; refused, more than the products
        normalized_vit | Attention: q and k, by gains
        rvt | Attention: k
        sep_vit | DSSA: refused, several attentions
        vit_nd_pope | Attention: refused, do not scale with their weights
        vivit_with_moss | Attention: q
        xcit | XCAttention: watched | Attention: q and k
    """,
    "timm": """

    """,
    "litgpt": """
        Falcon | CausalSelfAttention: q and k
        open_llama_3b | CausalSelfAttention: q and k
        open_llama_7b | CausalSelfAttention: q and k
        stable | CausalSelfAttention: q and k
    """,
    "diffusers": """
        AuraFlowTransformer2DModel | Attention: watched
        CogVideoXTransformer3DModel | Attention: q and k, by gains
        FluxTransformer2DModel | FluxAttention: q and k, by gains
    """,
    "torchvision": """

    """,
}

MODELS = [
    (library, *line.strip().split(" | ", 1)) for library, lines in SAMPLE.items() for line in lines.strip().splitlines()
]


@pytest.mark.parametrize(("library", "name", "expected"), MODELS, ids=[" ".join(model[:2]) for model in MODELS])
def test_a_model_gets_its_verdict(library: str, name: str, expected: str) -> None:
    if name not in models_of(library):
        pytest.skip(f"the installed {library} has no {name}")
    result = run(library, name, models_of(library)[name])
    if "not built" in result:
        pytest.skip(f"the installed {library} builds {name} in another way: {result['not built'][:80]}")
    assert not result["wrong"]
    found = {cls: sorted(told) for cls, told in verdicts(result).items()}
    known = {cls: told.split("; ") for cls, told in (part.split(": ", 1) for part in expected.split(" | "))}
    if set(found) != set(known):
        pytest.skip(f"the installed {library} builds {name} of {', '.join(found)}")
    for cls, told in found.items():
        assert len(told) == len(known[cls])
        assert all(any(is_told(own, one) for one in known[cls]) for own in told), f"{cls}: {told}"


def is_told(verdict: str, expected: str) -> bool:
    return verdict == expected or (expected.startswith("refused, ") and expected.removeprefix("refused, ") in verdict)
