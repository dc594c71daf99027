"""Rotary embeddings against those of Hugging Face, within the original length and beyond."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lightning_muonclip.attention.rotary import RotaryEmbedding

THETA = 5000.0
ORIGINAL = 64
LENGTHS = {"original_max_position_embeddings": ORIGINAL}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 1.3, **LENGTHS},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **LENGTHS},
    "yarn, no whole channels": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 16.0,
        "beta_slow": 2,
        "truncate": False,
        **LENGTHS,
    },
    "yarn, attention_factor": {"rope_type": "yarn", "factor": 1.0, "attention_factor": 1.25, **LENGTHS},
    "yarn of DeepSeek": {"rope_type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 0.7, **LENGTHS},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LENGTHS},
}


def theirs(dim: int, scaling: dict[str, Any]) -> LlamaRotaryEmbedding:
    rope = {"rope_theta": THETA, **scaling}
    if scaling["rope_type"] == "dynamic":
        del rope["original_max_position_embeddings"]  # Hugging Face takes it from the config
    config = LlamaConfig(
        hidden_size=2 * dim,
        num_attention_heads=2,
        head_dim=dim,
        max_position_embeddings=ORIGINAL,
        rope_parameters=rope,
    )
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("dim", [8, 128])
def test_cosines_and_sines_are_hugging_faces(name: str, dim: int) -> None:
    rotary, expected = RotaryEmbedding(dim, THETA, SCALINGS[name]), theirs(dim, SCALINGS[name])
    for length in (10, ORIGINAL, ORIGINAL + 1, 200, 100_000):
        positions = torch.arange(length)[None, -100:]
        for found, own in zip(rotary(positions), expected(torch.zeros(1), positions)):
            torch.testing.assert_close(found[:, 0], own, rtol=0, atol=1e-6)
            assert found.shape == (1, 1, positions.shape[1], dim) and found.dtype is torch.float32


@pytest.mark.parametrize("name", SCALINGS)
def test_a_scaling_changes_what_it_should(name: str) -> None:
    positions = torch.arange(200)[None]
    cos, plain = RotaryEmbedding(64, THETA, SCALINGS[name])(positions)[0], RotaryEmbedding(64, THETA)(positions)[0]
    assert torch.equal(cos, plain) == (name == "default")


def test_dynamic_scaling_depends_on_the_current_forward_only() -> None:
    rotary, plain = RotaryEmbedding(64, THETA, SCALINGS["dynamic"]), RotaryEmbedding(64, THETA)
    short, long = torch.arange(ORIGINAL)[None], torch.arange(200)[None]
    before = rotary(short)
    assert torch.equal(before[0], plain(short)[0])
    assert not torch.equal(rotary(long)[0][:, :, :ORIGINAL], before[0])
    assert torch.equal(rotary(short)[0], before[0])


@pytest.mark.parametrize("name", SCALINGS)
def test_no_host_synchronization(name: str) -> None:
    positions = torch.arange(200)[None]
    rotary = RotaryEmbedding(64, THETA, SCALINGS[name])
    cos, _ = rotary(positions.to("meta"))  # no values can be read there
    assert cos.is_meta and cos.shape == (1, 1, 200, 64)
    assert torch.equal(rotary.bfloat16()(positions)[0], RotaryEmbedding(64, THETA, SCALINGS[name])(positions)[0])
    assert not rotary.state_dict()


@pytest.mark.parametrize("name", SCALINGS)
def test_one_graph_serves_short_and_long(name: str) -> None:
    torch.compiler.reset()  # the cases are graphs of one forward
    rotary = RotaryEmbedding(64, THETA, SCALINGS[name])
    compiled = torch.compile(rotary, backend="aot_eager", fullgraph=True)
    for length in (10, 200):
        positions = torch.arange(length)[None]
        for found, expected in zip(compiled(positions), rotary(positions)):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_deepseeks_factor_on_logits() -> None:
    mscale = 0.1 * 0.7 * math.log(40) + 1
    assert RotaryEmbedding(8, THETA, SCALINGS["yarn of DeepSeek"]).logit_factor == pytest.approx(mscale**2, rel=1e-12)
    for name in SCALINGS.keys() - {"yarn of DeepSeek"}:
        assert RotaryEmbedding(8, THETA, SCALINGS[name]).logit_factor == 1


def test_scalings_as_configs_have_them() -> None:
    positions = torch.arange(100)[None]
    expected, _ = RotaryEmbedding(8, THETA, SCALINGS["linear"])(positions)
    for scaling in (
        {"type": "linear", "factor": 3},
        {"type": "linear", "rope_type": "linear", "factor": 3.0, "rope_theta": THETA, "partial_rotary_factor": 1.0},
        {"rope_type": "linear", "factor": 3.0, "original_max_position_embeddings": None},
        OmegaConf.create(SCALINGS["linear"]),
    ):
        assert torch.equal(RotaryEmbedding(8, THETA, scaling)(positions)[0], expected)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "linear",
            {"rope_type": "ntk"},
            "unknown rope_type 'ntk' in rope_scaling; use one of default, linear, dynamic",
        ),
        ("linear", {"rope_type": None}, "unknown rope_type None"),
        ("linear", {"factor": None}, "rope_type 'linear' needs 'factor' in rope_scaling"),
        ("dynamic", {"original_max_position_embeddings": None}, "needs 'original_max_position_embeddings'"),
        ("llama3", {"low_freq_factor": None}, "rope_type 'llama3' needs 'low_freq_factor'"),
        ("linear", {"beta_fast": 32}, "unknown key 'beta_fast' in rope_scaling of rope_type 'linear'; known: factor"),
        ("default", {"factor": 2.0}, "unknown key 'factor' in rope_scaling of rope_type 'default'; known: none"),
        ("linear", {"factor": 0.5}, "factor in rope_scaling must be a number of at least 1; got 0.5"),
        ("linear", {"factor": "3"}, "factor in rope_scaling must be a number of at least 1; got '3'"),
        ("yarn", {"original_max_position_embeddings": 0}, "must be a number of at least 1; got 0"),
        ("yarn", {"attention_factor": -1.0}, "attention_factor in rope_scaling must be a number of at least 0"),
        ("yarn", {"beta_slow": 40}, "beta_slow in rope_scaling must be below beta_fast; got 40 and 32"),
        ("llama3", {"low_freq_factor": 4.0}, "low_freq_factor in rope_scaling must be below high_freq_factor"),
        ("linear", {"rope_theta": 1e4}, "rope_theta in rope_scaling is 10000.0, but here it is 5000.0; leave it out"),
        ("linear", {"partial_rotary_factor": 0.5}, "partial_rotary_factor in rope_scaling is 0.5, but here it is 1.0"),
    ],
)
def test_invalid_scalings_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RotaryEmbedding(8, THETA, SCALINGS[name] | changes)
