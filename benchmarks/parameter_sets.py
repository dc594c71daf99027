"""Shapes of the hidden matrices of real models, without biases, norms, embeddings and heads."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

Shape: TypeAlias = tuple[int, ...]


class ParameterSet(NamedTuple):
    """Shapes (fan-out, fan-in) of one layer's matrices, expert stacks (experts, fan-out, fan-in); and how many layers."""

    layer: tuple[Shape, ...]
    layers: int


def gpt(width: int, layers: int, fused: bool = True) -> ParameterSet:
    """GPT-2's layer: queries, keys and values in one matrix unless it is split, and a fourfold MLP."""
    qkv: tuple[Shape, ...] = ((3 * width, width),) if fused else ((width, width),) * 3
    return ParameterSet((*qkv, (width, width), (4 * width, width), (width, 4 * width)), layers)


PARAMETER_SETS = {
    # For a rehearsal, with a stack of experts.
    "dry": ParameterSet((*gpt(16, 1).layer, (2, 16, 32)), 1),
    "tiny": gpt(128, 4),
    "gpt2_small": gpt(768, 12),
    "gpt2_small_split": gpt(768, 12, fused=False),
    "gpt2_medium": gpt(1024, 24),
    # Llama 3.2 1B: 32 query and 8 key heads of 64.
    "llama_1b": ParameterSet(
        ((2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)), 16
    ),
    # One layer of DeepSeek-V2-Lite: multi-head latent attention, 64 routed experts of 1408 and 2 shared ones.
    "moe": ParameterSet(
        (
            (3072, 2048),
            (576, 2048),
            (4096, 512),
            (2048, 2048),
            (64, 2816, 2048),
            (64, 2048, 1408),
            (2816, 2048),
            (2816, 2048),
            (2048, 2816),
        ),
        1,
    ),
    # The same with a sixteenth of the experts and a quarter of the width.
    "moe_small": ParameterSet(
        ((768, 512), (144, 512), (1024, 128), (512, 512), (8, 704, 512), (8, 512, 352), (704, 512), (512, 704)), 1
    ),
}


#: q_a_proj, q_b_proj, kv_a_proj_with_mqa, kv_b_proj, o_proj.
DEEPSEEK_V3_ATTENTION: tuple[Shape, ...] = (
    (1536, 7168),
    (128 * (128 + 64), 1536),
    (512 + 64, 7168),
    (128 * (128 + 128), 512),
    (7168, 128 * 128),
)

#: Whole models with several kinds of layers: the matrices of each kind, and its number of layers.
MODELS: dict[str, tuple[ParameterSet, ...]] = {
    "gpt2_small": (PARAMETER_SETS["gpt2_small"],),
    # hidden_size 4096, intermediate_size 11008, 32 layers: LLaMA, arXiv 2302.13971, and its config.json.
    "llama_7b": (ParameterSet((*((4096, 4096),) * 4, (11008, 4096), (11008, 4096), (4096, 11008)), 32),),
    # arXiv 2412.19437, section 4.2, and config.json: hidden_size 7168, 128 heads of 128 + 64 (v: 128), q_lora_rank 1536,
    # kv_lora_rank 512; 3 dense layers of 18432, 58 with 256 routed experts of 2048 and a shared one. Without the
    # multi-token prediction module. Routers are left out, as embeddings are.
    "deepseek_v3": (
        ParameterSet((*DEEPSEEK_V3_ATTENTION, (18432, 7168), (18432, 7168), (7168, 18432)), 3),
        ParameterSet(
            (
                *DEEPSEEK_V3_ATTENTION,
                *((2048, 7168), (2048, 7168), (7168, 2048)),
                *((256, 2048, 7168), (256, 2048, 7168), (256, 7168, 2048)),
            ),
            58,
        ),
    ),
}
