"""A sample of the sweep over public models: nothing is wrong, and every attention gets the verdict that it had."""

from __future__ import annotations

import pytest

from families.sweep import models_of, run, verdicts

#: By library: a model, and for each class of attention in it what a clip scales, or words of the reason of a refusal.
SAMPLE = {
    "transformers": """
        aimv2_text_model | Aimv2Attention: q and k
        altclip_vision_model | AltCLIPAttention: q and k
        arcee | ArceeAttention: q and k
        audio-spectrogram-transformer | ASTAttention: q and k
        blip_vision_model | BlipAttention: q and k
        clipseg_text_model | CLIPSegAttention: q and k
        deepseek_v4 | DeepseekV4Attention: refused, makes something else; watched
        dia_encoder | DiaSelfAttention: q and k
        embedding_gemma2 | EmbeddingGemma2Attention: k, by gains; q and k, by gains
        embedding_gemma2_text | EmbeddingGemma2Attention: k, by gains; q and k, by gains
        ernie4_5 | Ernie4_5Attention: q and k
        esmc | EsmcAttention: q and k, by gains
        eurobert | EuroBertAttention: q and k
        exaone | LlamaAttention: q and k
        flava_image_model | FlavaSelfAttention: q and k
        gemma | GemmaAttention: q and k
        git_vision_model | GitVisionAttention: q and k
        glm4v_moe_vision | Glm4vMoeVisionAttention: q and k
        hyperclovax | HyperCLOVAXAttention: q and k
        idefics2_vision | Idefics2VisionAttention: q and k
        idefics3_vision | Idefics3VisionAttention: q and k
        ijepa | IJepaAttention: q and k
        imagegpt | ImageGPTAttention: q and k
        instructblip_vision_model | InstructBlipAttention: q and k
        instructblipvideo_qformer | InstructBlipVideoQFormerMultiHeadAttention: q and k
        instructblipvideo_vision_model | InstructBlipVideoAttention: q and k
        internvl_vision | InternVLVisionAttention: q and k
        jais2 | Jais2Attention: q and k
        janus_vision_model | JanusVisionAttention: q and k
        jina_embeddings_v3 | JinaEmbeddingsV3Attention: q and k
        kolibri1 | Kolibri1Attention: q and k, by gains
        lfm3_vl_vision | Lfm3VlVisionAttention: q and k, by gains
        minimax | MiniMaxAttention: q and k
        minimax_m3_vl_vision | MiniMaxM3VLVisionAttention: q and k
        mistral | MistralAttention: q and k
        mlcd_vision_model | MLCDAttention: q and k
        mllama_text_model | MllamaTextSelfAttention: q and k
        mpt | MptAttention: q and k
        muse_glimmer_text | MuseGlimmerTextAttention: watched
        muse_glimmer_vision | MuseGlimmerVisionAttention: q and k
        muse_spark_text | MuseSparkTextAttention: watched
        nanochat | NanoChatAttention: watched
        nemotron_asr_streaming_encoder | NemotronAsrStreamingEncoderAttention: k
        nemotron_h | NemotronHAttention: q and k
        olmo_hybrid | OlmoHybridAttention: q and k, by gains
        ovis2_vision | Ovis2VisionAttention: q and k
        owlv2_vision_model | Owlv2Attention: q and k
        owlvit_text_model | OwlViTAttention: q and k
        parakeet_encoder | ParakeetEncoderAttention: k
        phi3 | Phi3Attention: q and k
        qianfan_ocr_vision | QianfanOCRVisionAttention: q and k
        qwen3 | Qwen3Attention: q and k, by gains
        qwen3_5_moe_text | Qwen3_5MoeAttention: q and k, by gains
        qwen3_5_text | Qwen3_5Attention: q and k, by gains
        qwen3_5_vision | Qwen3_5VisionAttention: q and k
        qwen3_next | Qwen3NextAttention: q and k, by gains
        qwen3_omni_moe_text | Qwen3OmniMoeThinkerTextAttention: q and k, by gains
        qwen3_omni_moe_vision_encoder | Qwen3OmniMoeVisionAttention: q and k
        qwen3_vl_moe_vision | Qwen3VLMoeVisionAttention: q and k
        qwen3_vl_text | Qwen3VLTextAttention: q and k, by gains
        qwen3_vl_vision | Qwen3VLVisionAttention: q and k
        radio | RadioAttention: q and k
        recurrent_gemma | RecurrentGemmaAttention: q and k
        rf_detr_dinov2 | RfDetrDinov2Attention: q and k
        roberta | RobertaSelfAttention: q and k
        roberta-prelayernorm | RobertaPreLayerNormSelfAttention: q and k
        sam_hq_vision_model | SamHQVisionSdpaAttention: k
        sew-d | SEWDModel: refused, can be followed
        siglip_text_model | SiglipAttention: q and k
        smollm3 | SmolLM3Attention: q and k
        smolvlm_vision | SmolVLMVisionAttention: q and k
        stablelm | StableLmAttention: q and k
        tipsv2_text_model | Tipsv2TextAttention: q and k
        tipsv2_vision_model | Tipsv2VisionAttention: q and k
        unlimited_ocr_text | UnlimitedOcrTextAttention: q and k
        videoprism_text_model | VideoPrismAttention: q and k
        vit | ViTAttention: q and k
        vit_mae | ViTMAEAttention: q and k
        vit_msn | ViTMSNAttention: q and k
        vitdet | VitDetAttention: q and k
        vitpose_backbone | VitPoseBackboneSelfAttention: q and k
        vits | VitsAttention: k | VitsModel: q
        voxtral_encoder | VoxtralAttention: q and k
        xclip_text_model | XCLIPAttention: q and k
        xlm-roberta-xl | XLMRobertaXLSelfAttention: q and k
        zaya | ZayaAttention: k, by gains
    """,
    "x-transformers": """
        CrossAttender | Attention: q and k
        Decoder attn_add_zero_kv=True | Attention: q and k
        Decoder attn_flash=True | Attention: q and k
        Decoder attn_head_scale=True | Attention: q and k
        Decoder attn_kv_heads=2 | Attention: q
        Decoder attn_one_kv_head=True | Attention: q and k
        Decoder attn_post_talking_heads=True | Attention: q and k
        Decoder attn_qk_norm=True | Attention: watched
        Decoder attn_qk_norm=True, attn_qk_norm_dim_scale=True | Attention: q and k, by gains
        Decoder attn_use_cope=True, attn_cope_max_pos=16 | Attention: refused, more than the products
        Decoder attn_value_dim_head=8 | Attention: q and k
        Decoder polar_pos_emb=True | Attention: refused, do not scale with their weights
        Decoder use_rmsnorm=True | Attention: q and k
        Encoder | Attention: q and k
    """,
    "vit-pytorch": """
        attn_residual_with_dca_simple_vit | Attention: q and k | TransformerBlock: refused, can be followed
        cait | Attention: refused, Bmm stands between
        look_vit | Attention: q and k | LookViT: refused, several attentions
        normalized_vit | Attention: q and k, by gains
        rvt | Attention: k
        vit_for_small_dataset | LSA: q and k
        vit_nd_pope | Attention: refused, do not scale with their weights
        vivit_with_moss | Attention: q
        xcit | XCAttention: watched | Attention: q and k
    """,
    "timm": """
        efficientformerv2_s0 | Attention2dDownsample: q and k, by gains
        gcvit_xxtiny | WindowAttentionGlobal: k; q and k
        test_vit | Attention: q and k
        test_vit_relpos | RelPosAttention: q and k
        xcit_nano_12_p8_224 | XCA: q, by gains | ClassAttn: q and k
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
        swin3d_t | ShiftedWindowAttention3d: q and k
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
