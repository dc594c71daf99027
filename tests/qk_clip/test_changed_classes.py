"""A class of another library that has changed: what was looked for, in which release, and the way out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from intercepted import TOKENS, bloom, llama
from lightning_muonclip.qk_clip.observe.recompute import METHODS, PROJECTIONS, Recomputation, recomputed
from oracles import SdpaAttention
from torch import nn
from transformers import GPTNeoConfig, GPTNeoModel

from lightning_muonclip import AttentionSpec, MuonClip, Projection, QKClip, register_attention
from lightning_muonclip.qk_clip.describe import registry
from lightning_muonclip.qk_clip.describe.names import ChangedClassError, qualified_name

RELEASE = f"of transformers {transformers.__version__}"


def gpt_neo() -> tuple[nn.Module, str]:
    """A model that attends in a method, and the name of its class."""
    sizes = {"hidden_size": 16, "num_heads": 4, "num_layers": 1, "vocab_size": 11, "max_position_embeddings": 256}
    model = GPTNeoModel(GPTNeoConfig(**sizes, attention_types=[[["global"], 1]], attn_implementation="eager")).train()
    return model, qualified_name(type(model.h[0].attn.attention))


@pytest.mark.parametrize("read", [QKClip, MuonClip, functools.partial(MuonClip, logits="off")])
def test_an_attribute_that_a_row_of_the_registry_reads_is_gone(read: Callable[..., Any]) -> None:
    model = llama("sdpa", layers=1)
    del model.layers[0].self_attn.head_dim
    with pytest.raises(ChangedClassError, match=rf"LlamaAttention {RELEASE}: .*AttributeError.*specs={{name: None}}"):
        read(model)


@pytest.mark.parametrize("error", [AttributeError, KeyError, TypeError, RuntimeError])
def test_an_error_in_a_spec_function_of_the_user_is_his(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(module: Any) -> AttentionSpec:
        raise error("n_heads")

    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    register_attention(SdpaAttention, fails)
    with pytest.raises(error, match="n_heads"):
        QKClip(nn.Sequential(SdpaAttention(8, 2)))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_a_full_device_is_no_changed_class(error: type[Exception]) -> None:
    def fails(*_: Any) -> Any:
        raise error("out of memory")

    with pytest.raises(error, match="out of memory"):
        recomputed(Recomputation("q_proj", fails), SdpaAttention(8, 2), torch.ones(1))


def test_a_weight_that_a_row_of_the_registry_names_is_gone() -> None:
    model = llama("sdpa", layers=1)
    attention = model.layers[0].self_attn
    attention.query_proj = attention.q_proj
    del attention.q_proj
    with pytest.raises(
        ValueError, match=r"no parameter 'q_proj', which its spec names; the parameters of .*query_proj"
    ) as error:
        QKClip(model)
    message = str(error.value)
    assert f"LlamaAttention of transformers {transformers.__version__}" in message
    assert "specs={'layers.0.self_attn': None}" in message


def test_a_method_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cls = gpt_neo()
    monkeypatch.setitem(METHODS, cls, replace(METHODS[cls], method="_attend"))
    name = f"GPTNeoSelfAttention of transformers {transformers.__version__}"
    with QKClip(model), pytest.raises(RuntimeError, match=rf"{name} no longer has _attend\. .* specs={{"):
        model(TOKENS)


def test_a_method_is_called_with_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cls = gpt_neo()
    monkeypatch.setitem(METHODS, cls, replace(METHODS[cls], logits=lambda module, query: None))
    with (
        QKClip(model),
        pytest.raises(
            ChangedClassError, match=rf"{RELEASE}: expected .* its method _attn .*got TypeError: .*specs={{name: None}}"
        ),
    ):
        model(TOKENS)


@pytest.mark.parametrize("change", ["another cache", "another name"])
def test_what_is_behind_a_projection_has_changed(change: str) -> None:
    attention: Any = bloom(layers=1).h[0].self_attention
    cache = SimpleNamespace(key_cache=[]) if change == "another cache" else None
    if change == "another name":
        del attention.inv_norm_factor
    row, x = PROJECTIONS[qualified_name(type(attention))], torch.randn(2, 5, 16)
    with pytest.raises(
        ChangedClassError,
        match=rf"{RELEASE}: expected .* its query_key_value, got AttributeError: .*specs={{name: None}}",
    ):
        recomputed(row, attention, torch.randn(2, 5, 48), x, x, torch.zeros(8, 1, 5), None, cache)


def test_a_projection_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bloom(layers=1)
    cls = qualified_name(type(model.h[0].self_attention))
    monkeypatch.setitem(PROJECTIONS, cls, replace(PROJECTIONS[cls], projection="qkv"))
    with QKClip(model), pytest.raises(RuntimeError, match=r"BloomAttention of transformers .* no longer has qkv\."):
        model(TOKENS)


def test_a_class_that_calls_torchs_function_by_now_needs_its_projection_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PROJECTIONS, qualified_name(SdpaAttention), Recomputation("qkv", lambda *_: None))  # type: ignore
    spec = AttentionSpec((Projection("q_proj", "q(H d)"), Projection("k_proj", "k(H d)")), 2, sizes={"d": 4})
    model = SdpaAttention(8, 2)
    with QKClip(model, specs={"": spec}) as qk_clip:
        model(torch.randn(2, 5, 8))
        assert qk_clip.max_logits.isfinite().all()
