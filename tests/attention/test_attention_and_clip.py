"""Packed documents against separate ones, and QK-Clip with terms other than dot products in the softmax."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import brute_max_logits, causal, enlarge, queries_and_keys
from torch import Tensor, nn

from lightning_muonclip import Attention, AttentionMask, MultiheadLatentAttention, QKClip
from lightning_muonclip.attention.score_mods import Alibi, RelativeBias

HEADS, LENGTH = 4, 40
SIZES: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": HEADS}


def relative_bias() -> RelativeBias:
    bias = RelativeBias(HEADS, 8, 20)
    nn.init.normal_(bias.relative_attention_bias.weight)
    return bias


KINDS: dict[str, Callable[[], Any]] = {
    "plain": lambda: Attention(**SIZES),
    "gqa, window, sinks": lambda: Attention(**SIZES, num_key_value_heads=2, sliding_window=9, sinks=True),
    "soft-cap": lambda: Attention(**SIZES, num_key_value_heads=2, softcap=5.0),
    "alibi": lambda: Attention(**SIZES, rope_theta=None, score_mod=Alibi(HEADS)),
    "alibi and soft-cap": lambda: Attention(**SIZES, rope_theta=None, score_mod=Alibi(HEADS), softcap=5.0),
    "learned bias": lambda: Attention(**SIZES, score_mod=relative_bias()),
    "yarn": lambda: Attention(
        **SIZES, rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    ),
    "latent": lambda: MultiheadLatentAttention(
        **SIZES, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12, softcap=5.0, sinks=True
    ),
}


def make(kind: str) -> Any:
    module = KINDS[kind]()
    enlarge(module)
    return module


@pytest.mark.parametrize("restart", [True, False], ids=["positions restart", "positions go on"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_equal_separate_ones(kind: str, restart: bool) -> None:
    packed, alone = make(kind), None
    alone = copy.deepcopy(packed)
    lengths = [13, 1, 20, 6]
    x = torch.randn(2, LENGTH, 32)
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).expand(2, -1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None] if restart else None
    slope = torch.randn(2, LENGTH, 32)
    with QKClip(packed) as found, QKClip(alone) as expected:
        output = packed(x, mask=AttentionMask(documents=documents), position_ids=positions)
        parts = [alone(part) for part in x.split(lengths, 1)]
        torch.testing.assert_close(found.max_logits, expected.max_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output, torch.cat(parts, 1), rtol=1e-5, atol=1e-5)
    (output * slope).sum().backward()
    (torch.cat(parts, 1) * slope).sum().backward()
    for (name, own), right in zip(packed.named_parameters(), alone.parameters()):
        assert own.grad is not None and right.grad is not None, name
        torch.testing.assert_close(own.grad, right.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_replay_of_the_batch_is_clipped_at_the_threshold(kind: str, backend: str) -> None:
    module = make(kind)
    module.backend = backend
    x = torch.randn(2, LENGTH, 32)
    with QKClip(module) as qk_clip:
        module(x)
        before = qk_clip.max_logits[0].clone()
    threshold = float(before.sort().values[1:3].mean())  # two heads above, two below
    with QKClip(module, threshold=threshold) as qk_clip:
        module(x)
        qk_clip.step()
        module(x)
        after = qk_clip.max_logits[0].clone()
    assert (before > threshold).sum() == 2
    torch.testing.assert_close(after, before.clamp(max=threshold), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["soft-cap", "alibi", "alibi and soft-cap"])
def test_maxima_are_of_the_plain_dot_products(kind: str) -> None:
    module = make(kind)
    x = torch.randn(2, LENGTH, 32)
    query, key = queries_and_keys(module, x, 8) if module.rotary is not None else _unrotated(module, x)
    with QKClip(module) as qk_clip:
        module(x)
        found = qk_clip.max_logits[0].double()
    torch.testing.assert_close(found, brute_max_logits(query, key, 8**-0.5, causal(LENGTH)), rtol=1e-5, atol=1e-5)
    if module.softcap is not None:
        assert (found > module.softcap).any()  # impossible for capped logits


def _unrotated(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    both = (x.double() @ layer.weight.double().T for layer in (module.q_proj, module.k_proj))
    query, key = (heads.unflatten(-1, (-1, 8)).transpose(1, 2).detach() for heads in both)
    return query, key
