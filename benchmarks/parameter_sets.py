"""Hidden matrices of real models, by shape: what Muon gets of them, biases, norms, embeddings and heads left out."""

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
