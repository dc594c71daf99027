"""A sample of the sweep over public models: nothing is wrong, and every attention gets the verdict that it had."""

from __future__ import annotations

import pytest

from families.sweep import models_of, run, verdicts

#: By library: the name of a model, and for each class of attention in it what a clip scales, or words of the reason why it
#: is refused.
SAMPLE = {
    "transformers": """
        afmoe | AfmoeAttention: q and k, by gains
        aimv2_text_model | Aimv2Attention: q and k
        aimv2_vision_model | Aimv2Attention: q and k | Aimv2AttentionPoolingHead: q and k
        albert | AlbertAttention: q and k
        align_text_model | AlignTextSelfAttention: q and k
        altclip_text_model | AltRobertaSelfAttention: q and k
        altclip_vision_model | AltCLIPAttention: q and k
        apertus | ApertusAttention: q and k, by gains
        apertus1p5_text | Apertus1p5TextAttention: q and k, by gains
        arcee | ArceeAttention: q and k
        audio-spectrogram-transformer | ASTAttention: q and k
        audioflamingo3 | Qwen2Attention: q and k
        axk1 | AXK1Attention: q and k
        bailing_hybrid | BailingHybridAttention: q and k
        beam | BeamAttention: q and k, by gains
        beit | BeitAttention: q and k
        bert-generation | BertGenerationSelfAttention: q and k
        big_bird | BigBirdSelfAttention: q and k
        biogpt | BioGptAttention: q and k
        bitnet | BitNetAttention: q and k
        blip_2_vision_model | Blip2Attention: q and k
        blip_vision_model | BlipAttention: q and k
        bloom | BloomAttention: q and k
        blt_patcher | BltSelfAttention: q and k
        bridgetower_text_model | BridgeTowerSelfAttention: q and k
        camembert | CamembertSelfAttention: q and k
        canary_decoder | CanarySelfAttention: q and k
        chinese_clip_text_model | ChineseCLIPTextSelfAttention: q and k
        chinese_clip_vision_model | ChineseCLIPVisionAttention: q and k
        clap_text_model | ClapTextSelfAttention: q and k
        clip_text_model | CLIPAttention: q and k
        clipseg_text_model | CLIPSegAttention: q and k
        clvp_decoder | ClvpSelfAttention: q and k
        codegen | CodeGenAttention: q and k
        cohere | CohereAttention: q and k
        cohere2 | Cohere2Attention: q and k
        cohere2_moe | Cohere2MoeAttention: q and k
        cohere_asr | ParakeetEncoderAttention: k | CohereAsrSelfAttention: q and k | CohereAsrCrossAttention: q and k
        cohere_compass_vision | CohereCompassVisionAttention: q and k
        colmodernvbert | ModernBertAttention: q and k
        convbert | ConvBertSelfAttention: k
        cosmos3_edge_text | Cosmos3EdgeTextAttention: q and k
        cpmant | CpmAntAttention: q and k
        csm_depth_decoder_model | CsmAttention: q and k
        ctrl | MultiHeadAttention: q and k
        cwm | CwmAttention: q and k
        data2vec-vision | Data2VecVisionSdpaSelfAttention: q and k
        deberta | DisentangledSelfAttention: q and k
        decision_transformer | DecisionTransformerGPT2Attention: q and k
        deepseek_ocr2_sam_vision_model | DeepseekOcr2SamVisionSdpaAttention: k
        deepseek_v3 | DeepseekV3Attention: q and k
        deepseek_v32 | DeepseekV32Attention: q and k
        deepseek_v4 | DeepseekV4Attention: refused, makes something else; watched
        deit | DeiTAttention: q and k
        dia_encoder | DiaSelfAttention: q and k
        diffllama | DiffLlamaAttention: q and k
        dinov2 | Dinov2Attention: q and k
        dinov2_with_registers | Dinov2WithRegistersAttention: q and k
        dinov3_vit | DINOv3ViTAttention: q and k
        distilbert | DistilBertSelfAttention: q and k
        doge | DogeAttention: q and k, by gains
        dpr | BertSelfAttention: q and k
        dpt | DPTSelfAttention: q and k
        electra | ElectraSelfAttention: q and k
        embedding_gemma2 | EmbeddingGemma2Attention: k, by gains; q and k, by gains
        embedding_gemma2_text | EmbeddingGemma2Attention: k, by gains; q and k, by gains
        emu3_text_model | Emu3Attention: q and k
        eomt | EomtAttention: q and k
        eomt_dinov3 | EomtDinov3Attention: q and k
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
        gemma2 | Gemma2Attention: q and k
        gemma3_text | Gemma3Attention: q and k, by gains
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
