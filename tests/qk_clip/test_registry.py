"""Which modules are attention, and how they are built; unknown ones are refused with a way out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import Residual, SdpaAttention
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model

from lightning_muonclip import (
    Attention,
    AttentionSpec,
    MultiheadLatentAttention,
    Projection,
    QKClip,
    register_attention,
)
from lightning_muonclip.qk_clip import registry
from lightning_muonclip.qk_clip.registry import find_attention


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BY_CLASS", dict(registry._BY_CLASS))


def specs(model: nn.Module, **kwargs: Any) -> dict[str, AttentionSpec]:
    return {name: spec for name, (_, spec) in find_attention(model, **kwargs).items()}


def separate(query: str, key: str, heads: int, groups: int, dim: int, **kwargs: Any) -> AttentionSpec:
    return AttentionSpec((Projection(query, "q(H d)"), Projection(key, "k(G d)")), heads, groups, {"d": dim}, **kwargs)


class Generic(nn.Module):
    """Anything with two linear layers of some name."""

    def __init__(self, rows: tuple[int, int], names: tuple[str, str] = ("q_proj", "k_proj"), **attributes: Any) -> None:
        super().__init__()
        for name, channels in zip(names, rows):
            setattr(self, name, nn.Linear(8, channels))
        for name, value in attributes.items():
            setattr(self, name, value)


def test_our_modules_in_the_order_of_the_model() -> None:
    latent = {"kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 6}
    model = nn.Sequential(
        Attention(8, 4, num_key_value_heads=2, qk_norm=True),
        nn.Linear(8, 8),
        MultiheadLatentAttention(8, 2, **latent),
        nn.Sequential(MultiheadLatentAttention(8, 2, **latent, q_lora_rank=4)),
    )
    kv = Projection("kv_b_proj", "(H [kn:n, *:v])")
    sizes = {"n": 4, "r": 2, "v": 6}
    found = specs(model)
    assert found == {
        "0": separate("q_proj", "k_proj", 4, 2, 2, qk_norm=True),
        "2": AttentionSpec((Projection("q_proj", "(H [qn:n, qr:r])"), kv), 2, 2, sizes),
        "3.0": AttentionSpec((Projection("q_b_proj", "(H [qn:n, qr:r])"), kv), 2, 2, sizes),
    }
    assert list(found) == ["0", "2", "3.0"]


@pytest.mark.parametrize(
    "names",
    [
        ("q_proj", "k_proj"),
        ("query", "key"),
        ("q_lin", "k_lin"),
        ("to_q", "to_k"),
        ("wq", "wk"),
        ("Wq", "Wk"),
        ("q", "k"),
    ],
)
def test_separate_projections_by_name(names: tuple[str, str]) -> None:
    assert specs(Generic((8, 4), names, num_heads=4)) == {"": separate(*names, 4, 2, 2)}


@pytest.mark.parametrize(
    ("rows", "attributes", "expected"),
    [
        ((8, 8), {"num_heads": 4}, (4, 4, 2)),
        ((8, 8), {"n_heads": 2}, (2, 2, 4)),
        ((8, 2), {"n_head": 4, "n_kv_heads": 1}, (4, 1, 2)),
        ((8, 4), {"head_dim": 4}, (2, 1, 4)),
        ((8, 4), {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2}, (4, 2, 2)),
        ((8, 4), {"config": SimpleNamespace(num_attention_heads=4, num_key_value_heads=2)}, (4, 2, 2)),
        ((8, 4), {"num_heads": 2, "config": SimpleNamespace(num_attention_heads=4)}, (2, 1, 4)),
    ],
)
def test_heads_by_attributes_or_config(rows: Any, attributes: Any, expected: tuple[int, int, int]) -> None:
    assert specs(Generic(rows, **attributes)) == {"": separate("q_proj", "k_proj", *expected)}


@pytest.mark.parametrize(
    ("rows", "attributes", "message"),
    [
        ((8, 8), {}, r"q_proj has 8 rows, and no attribute \(num_attention_heads, num_heads"),
        ((8, 8), {"num_heads": 3}, "q_proj has 8 rows, and no attribute"),
        ((8, 3), {"num_heads": 4}, "k_proj has 3 rows, which are not whole heads of 2 channels"),
        ((8, 8), {"num_heads": 4, "num_kv_heads": 2}, "k_proj has 8 rows, which are not whole heads"),
    ],
)
def test_heads_that_nobody_tells_are_not_guessed(rows: Any, attributes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_attention(Generic(rows, **attributes))


@pytest.mark.parametrize("norm", ["q_norm", "k_norm", "q_layernorm"])
def test_a_norm_after_the_projection_is_noticed_unless_it_does_nothing(norm: str) -> None:
    assert specs(Generic((8, 8), num_heads=2, **{norm: nn.LayerNorm(4)}))[""].qk_norm
    assert not specs(Generic((8, 8), num_heads=2, **{norm: nn.Identity()}))[""].qk_norm
    assert not specs(Generic((8, 8), num_heads=2, **{norm: None}))[""].qk_norm


def test_hugging_face_llama_and_qwen() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 5, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    llama = specs(LlamaModel(LlamaConfig(**sizes, **heads)))
    assert llama == {f"layers.{i}.self_attn": separate("q_proj", "k_proj", 4, 2, 8) for i in range(2)}
    assert all(spec.qk_norm for spec in specs(Qwen3Model(Qwen3Config(**sizes, **heads))).values())


def test_a_module_that_is_used_twice_is_found_once() -> None:
    layer = Attention(8, 2)
    assert list(specs(Residual(layer, layer))) == ["layers.0"]


class Wrapper(nn.Module):
    """A model with a kind of attention that is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True)})
        self.other = SdpaAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.encoder["attn"](x, x, x, need_weights=False)[0])


def test_unknown_attention_is_refused_by_name_with_a_way_out() -> None:
    with pytest.raises(ValueError, match=r"cannot read the attention 'encoder.attn'") as error:
        QKClip(Wrapper())
    message = str(error.value)
    assert "(MultiheadAttention)" in message
    assert "in_proj_weight (24, 8)" in message
    assert "specs={'encoder.attn': None}" in message
    assert "specs={'encoder.attn': AttentionSpec((Projection(" in message
    assert "register_attention" in message


def test_attention_that_is_to_be_left_alone_is_left_alone() -> None:
    with QKClip(Wrapper(), specs={"encoder.attn": None}) as qk_clip:
        assert qk_clip.layers == ["other"]


IN_PROJ = (Projection("in_proj_weight", "[q(H d) | k(H d) | *]"), Projection("in_proj_bias", "[q(H d) | k(H d) | *]"))


def test_the_users_spec_comes_first() -> None:
    mine = AttentionSpec(IN_PROJ, 2, sizes={"d": 4})
    assert specs(Wrapper(), specs={"encoder.attn": mine})["encoder.attn"] is mine
    other = separate("q_proj", "k_proj", 4, 4, 2)
    assert specs(Wrapper(), specs={"encoder.attn": mine, "other": other})["other"] is other


def test_a_name_in_specs_that_is_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"specs names 'encoder.attention', but the model has no such module"):
        QKClip(Wrapper(), specs={"encoder.attention": None})


@pytest.mark.parametrize("by_name", [False, True])
def test_a_registered_class_is_known_with_its_subclasses(by_name: bool) -> None:
    class Mine(nn.MultiheadAttention):
        pass

    register_attention(
        "torch.nn.modules.activation.MultiheadAttention" if by_name else nn.MultiheadAttention,
        lambda module: AttentionSpec(IN_PROJ, module.num_heads, sizes={"d": module.head_dim}),
    )
    model = nn.Sequential(nn.MultiheadAttention(8, 2), Mine(8, 4))
    assert {name: spec.num_heads for name, spec in specs(model).items()} == {"0": 2, "1": 4}


def test_the_nearest_class_decides() -> None:
    class Mine(Attention):
        pass

    register_attention(Mine, lambda module: separate("q_proj", "k_proj", 1, 1, 8))
    found = specs(nn.Sequential(Attention(8, 2), Mine(8, 2)))
    assert [spec.num_heads for spec in found.values()] == [2, 1]


def test_a_wrapper_around_known_attention_is_no_mystery() -> None:
    class FancyAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention(8, 2)
            self.out = nn.Linear(8, 8)

    assert list(specs(nn.Sequential(FancyAttention()))) == ["0.inner"]


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential has no attention that QK-Clip knows"):
        QKClip(nn.Sequential(nn.Linear(8, 8)))


class Fused(nn.Module):
    """Keys and queries in one matrix whose output channels are columns, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 24))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (x @ self.weight).unflatten(-1, (3, 2, 4)).unbind(-3)
        return F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (query, key, value)))


@pytest.mark.parametrize("dim", [1, -1])
def test_a_spec_may_name_a_parameter_and_a_dimension(dim: int) -> None:
    model = Fused()
    before = model.weight.detach().clone()
    spec = AttentionSpec((Projection("weight", "[q(H d) | k(H d) | *]", dim=dim),), 2, sizes={"d": 4})
    with QKClip(model, threshold=1.0, specs={"": spec}) as qk_clip:
        qk_clip.step([[1.0, 16.0]])
    factor = torch.tensor([1.0] * 4 + [0.25] * 4).repeat(2)
    assert torch.equal(model.weight, before * torch.cat([factor, torch.ones(8)]))


def test_a_spec_of_other_sizes_is_refused() -> None:
    spec = separate("q_proj", "k_proj", 2, 2, 3)
    with pytest.raises(ValueError, match=r"describes 6 channels .* but the weight has 8"):
        QKClip(SdpaAttention(8, 2), specs={"": spec})


def test_a_spec_of_something_that_is_no_parameter_is_refused() -> None:
    spec = separate("q_proj", "w_k", 2, 2, 4)
    with pytest.raises(ValueError, match=r"attention 'layers.0' has no parameter 'w_k'"):
        QKClip(Residual(SdpaAttention(8, 2)), specs={"layers.0": spec})
