"""Our modules against the Hugging Face modules of the same kind, and their maxima against brute force in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from oracles import INF, causal, enlarge, module_max_logits
from torch import Tensor, nn
from transformers import DeepseekV3Config, LlamaConfig, Qwen3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

from lightning_muonclip import Attention, AttentionMask, MultiheadLatentAttention
from lightning_muonclip.attention.rotary import RotaryEmbedding

LENGTH = 70  # more than one block of queries
THETA = 5000.0

ATTENTION: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 12, "num_key_value_heads": 2},
    "bias": {"num_key_value_heads": 2, "attention_bias": True},
    "qk_norm": {"num_key_value_heads": 2, "qk_norm": True, "attention_bias": True},
}
LATENT: dict[str, dict[str, Any]] = {
    "mla": {"v_head_dim": 8},
    "mla_lora": {"v_head_dim": 12, "q_lora_rank": 20},
    "mla_bias": {"v_head_dim": 8, "q_lora_rank": 20, "attention_bias": True},
    "mla_wide_values": {"v_head_dim": 20},
}


def pair(kind: str) -> tuple[Any, nn.Module, nn.Module]:
    """Our module, Hugging Face's with the same weights, and the latter's rotary embedding."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}, "max_position_embeddings": 256}
    if kind in ATTENTION:
        options = {"num_key_value_heads": 4, "head_dim": 8, "attention_bias": False} | ATTENTION[kind]
        qk_norm = options.pop("qk_norm", False)
        config_cls, cls, rotary_cls = (
            (Qwen3Config, Qwen3Attention, Qwen3RotaryEmbedding)
            if qk_norm
            else (LlamaConfig, LlamaAttention, LlamaRotaryEmbedding)
        )
        config: Any = config_cls(**sizes, **options, **rope, num_hidden_layers=1)
        ours: Any = Attention(**sizes, **ATTENTION[kind], rope_theta=THETA)
    else:
        options = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4} | LATENT[kind]
        cls, rotary_cls = DeepseekV3Attention, DeepseekV3RotaryEmbedding
        config = DeepseekV3Config(
            **sizes, num_key_value_heads=4, **({"q_lora_rank": None} | options), **rope, num_hidden_layers=1
        )
        ours = MultiheadLatentAttention(**sizes, **options, rope_theta=THETA)
    config._attn_implementation = "eager"
    theirs = cls(config, layer_idx=0)
    enlarge(theirs)
    ours.load_state_dict(theirs.state_dict())  # strict: the same names and shapes
    return ours, theirs, rotary_cls(config)


def hugging_face(module: nn.Module, rotary: nn.Module, x: Tensor, visible: Tensor, positions: Tensor) -> Tensor:
    hidden = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    return module(x, position_embeddings=rotary(x, positions), attention_mask=hidden)[0]


def right_padding(batch: int, length: int) -> Tensor:
    """Every sequence of another length."""
    return torch.arange(length) < torch.tensor([[length - 9 * b] for b in range(batch)])


KINDS = [*ATTENTION, *LATENT]


@pytest.mark.parametrize("kind", KINDS)
def test_causal_output_is_hugging_faces(kind: str) -> None:
    ours, theirs, rotary = pair(kind)
    x = torch.randn(2, LENGTH, 32)
    expected = hugging_face(theirs, rotary, x, causal(LENGTH)[None, None], torch.arange(LENGTH)[None])
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_causal", [True, False])
def test_padded_output_is_hugging_faces_at_real_tokens(kind: str, is_causal: bool) -> None:
    ours, theirs, rotary = pair(kind)
    x, padding = torch.randn(3, 30, 32), right_padding(3, 30)
    visible = padding[:, None, None] & (causal(30) if is_causal else torch.ones(30, 30, dtype=torch.bool))
    expected = hugging_face(theirs, rotary, x, visible, torch.arange(30)[None])
    found = ours(x, mask=AttentionMask(causal=is_causal, padding=padding))
    torch.testing.assert_close(found[padding], expected[padding], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gqa", "mla_lora"])
def test_left_padding_with_its_positions_is_hugging_faces(kind: str) -> None:
    ours, theirs, rotary = pair(kind)
    x, padding = torch.randn(3, 30, 32), right_padding(3, 30).flip(1)
    positions = (padding.cumsum(1) - 1).clamp(min=0)
    expected = hugging_face(theirs, rotary, x, padding[:, None, None] & causal(30), positions)
    found = ours(x, mask=AttentionMask(padding=padding), position_ids=positions)
    torch.testing.assert_close(found[padding], expected[padding], rtol=1e-5, atol=1e-5)
    assert found.isfinite().all()


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_position_ids_of_every_sequence_are_its_own(kind: str) -> None:
    ours, theirs, rotary = pair(kind)
    x, positions = torch.randn(2, 9, 32), torch.randint(200, (2, 9))
    expected = hugging_face(theirs, rotary, x, causal(9)[None, None], positions)
    torch.testing.assert_close(ours(x, position_ids=positions), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours(x), expected, atol=1e-2)


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_positions_count_from_zero_for_all_sequences_unless_told(kind: str) -> None:
    ours, _, _ = pair(kind)
    x = torch.randn(2, 9, 32)
    assert torch.equal(ours(x), ours(x, position_ids=torch.arange(9)[None]))
    assert torch.equal(ours(x), ours(x, position_ids=torch.arange(9).expand(2, 9)))


class Listener:
    """Collects what a module reports."""

    def __init__(self, logits: str = "exact") -> None:
        self.logits = logits
        self.heard: list[Tensor] = []

    def record(self, maxima: Tensor, *, pair: tuple[Tensor, Tensor]) -> None:
        self.heard.append(maxima)


def make(kind: str) -> Any:
    sizes = {"hidden_size": 32, "num_attention_heads": 4}
    latent = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
    module = Attention(**sizes, **ATTENTION[kind]) if kind in ATTENTION else None
    module = module or MultiheadLatentAttention(**sizes, **latent, **LATENT[kind])
    enlarge(module)
    return module


def masked(case: str) -> tuple[Tensor, dict[str, Any]]:
    """Which pairs count, and the arguments that say so to a module."""
    if case == "positions":
        return causal(LENGTH), {"position_ids": torch.randint(200, (3, LENGTH))}
    if case == "causal":
        return causal(LENGTH), {}
    padding = right_padding(3, LENGTH)
    real = padding[:, None, None] & padding[:, None, :, None]  # neither a padded query nor a padded key counts
    is_causal = case == "padded"
    return real & causal(LENGTH) if is_causal else real, {"mask": AttentionMask(causal=is_causal, padding=padding)}


CASES = ["causal", "padded", "padded both ways", "positions"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_maxima_are_those_of_brute_force(kind: str, case: str) -> None:
    module = make(kind)
    module.recorder = Listener()
    x = torch.randn(3, LENGTH, 32)
    visible, options = masked(case)
    module(x, **options)
    (maxima,) = module.recorder.heard
    expected = module_max_logits(module, x, visible, options.get("position_ids"))
    torch.testing.assert_close(maxima.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_the_log_sum_exp_bounds_them_and_attends_alike(kind: str, case: str) -> None:
    module = make(kind)
    twin = copy.deepcopy(module)
    module.recorder, twin.recorder = Listener("lse"), Listener("exact")
    x = torch.randn(3, LENGTH, 32)
    visible, options = masked(case)
    with pytest.MonkeyPatch.context() as patch:
        if kind != "mla_wide_values":  # whose values are wider than its keys, so that torch has no such kernel
            patch.setattr("lightning_muonclip.attention.core.max_logits", None)
        output = module(x, **options)
    expected_output = twin(x, **options)
    torch.testing.assert_close(output, expected_output, rtol=1e-6, atol=1e-6)
    output.square().mean().backward()
    expected_output.square().mean().backward()
    for param, expected in zip(module.parameters(), twin.parameters()):
        torch.testing.assert_close(param.grad, expected.grad, rtol=1e-6, atol=1e-6)
    (bounds,), largest = module.recorder.heard, module_max_logits(module, x, visible, options.get("position_ids"))
    if kind == "mla_wide_values":
        assert torch.equal(bounds, twin.recorder.heard[0])
    else:
        assert (bounds > largest).any()
    assert (bounds >= largest - 1e-5 * largest.abs()).all()
    assert (bounds <= largest + math.log(LENGTH) + 1e-5 * largest.abs()).all()


@pytest.mark.parametrize("logits", ["exact", "lse"])
def test_a_batch_of_padding_alone_has_no_maximum(logits: str) -> None:
    module = make("gqa")
    module.recorder = Listener(logits)
    output = module(torch.randn(1, 5, 32), mask=AttentionMask(padding=torch.zeros(1, 5, dtype=torch.bool)))
    assert module.recorder.heard[0].tolist() == [-INF] * 4
    assert output.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_reporting_changes_neither_output_nor_gradients(kind: str) -> None:
    module = make(kind)
    listened = copy.deepcopy(module)
    listened.recorder = Listener()
    x = torch.randn(2, 9, 32)
    outputs = [m(x) for m in (module, listened)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for plain, watched in zip(module.parameters(), listened.parameters()):
        assert torch.equal(plain.grad, watched.grad)
    assert not listened.recorder.heard[0].requires_grad


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_nothing_is_reported_in_evaluation(kind: str) -> None:
    module = make(kind).eval()
    module.recorder = Listener()
    assert module.track is None
    module(torch.randn(2, 9, 32))
    assert module.recorder.heard == []


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_positions_keep_their_precision_in_a_bfloat16_module(kind: str) -> None:
    module = make(kind)
    positions = torch.tensor([[0, 1, 777, 4096]])
    before = module.rotary(positions)
    after = module.bfloat16().rotary(positions)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert module(torch.randn(2, 9, 32, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_a_module_made_without_memory_turns_as_any_other() -> None:
    with torch.device("meta"):
        module = Attention(32, 4)
    expected = Attention(32, 4).rotary(torch.arange(9)[None])
    assert torch.equal(module.to_empty(device="cpu").rotary(torch.arange(9)[None])[0], expected[0])


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden_size 30 is not divisible by 4 heads; give head_dim"):
        Attention(30, 4)
    with pytest.raises(ValueError, match="4 heads cannot share 3 key heads"):
        Attention(32, 4, num_key_value_heads=3)
    with pytest.raises(ValueError, match="must be even; got 5"):
        RotaryEmbedding(5)
