"""Recognizing attention modules and their specs; refusing unknown ones with a way out."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning_muonclip.qk_clip.describe.registry import find_attention, recognise
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
from lightning_muonclip.qk_clip.describe import registry


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))


def specs(model: nn.Module, **kwargs: Any) -> dict[str, AttentionSpec]:
    return {name: spec for name, (_, spec) in find_attention(model, **kwargs).items()}


def separate(
    query: str, key: str, heads: int, groups: int, dim: int, value: str | None = None, **kwargs: Any
) -> AttentionSpec:
    projections = [Projection(query, "q(H d)"), Projection(key, "k(G d)")]
    if value is not None:
        projections.append(Projection(value, "*(G d)"))
    return AttentionSpec(tuple(projections), heads, groups, {"d": dim}, **kwargs)


def gains(query: str, key: str, offset: float = 0.0) -> tuple[Projection, ...]:
    return Projection(query, "q(d)", offset=offset), Projection(key, "k(d)", offset=offset)


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
        "0": separate("q_proj", "k_proj", 4, 2, 2, "v_proj", qk_norm=True, gains=gains("q_norm", "k_norm")),
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
        ((8, 8), {}, r"q_proj has 8 rows, and no attribute \(num_attention_heads, num_heads.*\) divides them"),
        ((8, 8), {"num_heads": 3}, "number of heads is unknown: q_proj has 8 rows, and no attribute"),
        ((8, 3), {"num_heads": 4}, "k_proj has 3 rows, which are not whole heads of 2 channels"),
        ((8, 8), {"num_heads": 4, "num_kv_heads": 2}, "k_proj has 8 rows, which are not whole heads"),
    ],
)
def test_unknown_numbers_of_heads_are_not_guessed(rows: Any, attributes: Any, message: str) -> None:
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
    names = [f"layers.{i}.self_attn" for i in range(2)]
    expected = separate("q_proj", "k_proj", 4, 2, 8, "v_proj")
    assert llama == dict.fromkeys(names, expected)
    normed = replace(expected, qk_norm=True, gains=gains("q_norm", "k_norm"))
    assert specs(Qwen3Model(Qwen3Config(**sizes, **heads))) == dict.fromkeys(names, normed)


def test_values_are_named_where_they_are_as_many_as_keys() -> None:
    class WithValues(Generic):
        def __init__(self, rows: int) -> None:
            super().__init__((8, 4), num_heads=4)
            self.v_proj = nn.Linear(8, rows)

    assert specs(WithValues(4)) == {"": separate("q_proj", "k_proj", 4, 2, 2, "v_proj")}
    assert specs(WithValues(6)) == {"": separate("q_proj", "k_proj", 4, 2, 2)}


def test_one_module_under_two_names_is_found_under_both() -> None:
    module = Generic((8, 8), num_heads=4)
    module.k_proj = module.q_proj
    assert specs(module) == {"": separate("q_proj", "k_proj", 4, 4, 2)}


def test_a_missing_norm_and_one_without_a_weight_have_no_gain() -> None:
    module = Attention(8, 4, qk_norm=True)
    module.k_norm = nn.RMSNorm(2, elementwise_affine=False)
    found = specs(module)[""]
    assert found.qk_norm and found.gains == gains("q_norm", "k_norm")[:1]
    module.q_norm, module.k_norm = nn.Identity(), None
    assert specs(module) == {"": separate("q_proj", "k_proj", 4, 4, 2, "v_proj")}


def test_recognise_separates_what_it_can_read_from_what_it_cannot() -> None:
    found, refused = recognise(Wrapper())
    assert list(found) == ["other"]
    assert list(refused) == ["encoder.attn"] and "cannot read the attention 'encoder.attn'" in refused["encoder.attn"]


def test_a_module_that_is_used_twice_is_found_once() -> None:
    layer = Attention(8, 2)
    assert list(specs(Residual(layer, layer))) == ["layers.0"]


class StrangeAttention(nn.Module):
    """Attention of an unknown kind."""

    def __init__(self) -> None:
        super().__init__()
        self.in_weight = nn.Parameter(torch.randn(24, 8))
        self.in_bias = nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor) -> Tensor:
        parts = F.linear(x, self.in_weight, self.in_bias).unflatten(-1, (3, 2, 4)).transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)


class Wrapper(nn.Module):
    """A model with an unknown kind of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"attn": StrangeAttention()})
        self.other = SdpaAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.encoder["attn"](x))


def test_unknown_attention_is_refused_with_a_way_out() -> None:
    with pytest.raises(ValueError, match=r"cannot read the attention 'encoder.attn'") as error:
        QKClip(Wrapper())
    message = str(error.value)
    assert "(StrangeAttention)" in message
    assert "in_weight (24, 8)" in message and "in_bias" not in message
    assert "specs={'encoder.attn': None}" in message
    assert "specs={'encoder.attn': AttentionSpec((Projection(" in message
    assert "register_attention" in message


def test_skipped_attention_is_not_observed() -> None:
    with QKClip(Wrapper(), specs={"encoder.attn": None}) as qk_clip:
        assert qk_clip.layers == ["other"]


IN_PROJ = (Projection("in_weight", "[q(H d) | k(H d) | *]"), Projection("in_bias", "[q(H d) | k(H d) | *]"))


def test_the_spec_that_an_error_proposes_works() -> None:
    with pytest.raises(ValueError, match=r"Projection\('wqkv', '(.*?)'\)") as error:
        QKClip(Wrapper())
    layout = str(error.value).split("Projection('wqkv', '")[1].split("'")[0]
    spec = AttentionSpec((Projection("in_weight", layout), Projection("in_bias", layout)), 2, sizes={"d": 4})
    with QKClip(Wrapper(), specs={"encoder.attn": spec}) as qk_clip:
        assert {check.layer for check in qk_clip.verify(torch.randn(2, 5, 8)).checks} == {"encoder.attn", "other"}


def test_the_users_spec_comes_first() -> None:
    mine = AttentionSpec(IN_PROJ, 2, sizes={"d": 4})
    assert specs(Wrapper(), specs={"encoder.attn": mine})["encoder.attn"] is mine
    other = separate("q_proj", "k_proj", 4, 4, 2)
    assert specs(Wrapper(), specs={"encoder.attn": mine, "other": other})["other"] is other


def test_a_name_in_specs_that_is_not_a_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"specs names 'encoder.attention', but the model has no such module"):
        QKClip(Wrapper(), specs={"encoder.attention": None})


@pytest.mark.parametrize("by_name", [False, True])
def test_a_registered_class_is_known_with_its_subclasses(by_name: bool) -> None:
    class Mine(StrangeAttention):
        heads = 4

    name = f"{StrangeAttention.__module__}.StrangeAttention"
    register_attention(
        name if by_name else StrangeAttention,
        lambda module: AttentionSpec(IN_PROJ, getattr(module, "heads", 2), sizes={"d": 4}),
    )
    model = nn.Sequential(StrangeAttention(), Mine())
    assert {name: spec.num_heads for name, spec in specs(model).items()} == {"0": 2, "1": 4}


def test_a_registered_class_comes_before_the_one_that_is_known() -> None:
    register_attention(nn.MultiheadAttention, lambda module: separate("q", "k", 1, 1, 8))
    assert specs(nn.Sequential(nn.MultiheadAttention(8, 2)))["0"].num_heads == 1


def test_torchs_own_attention_with_all_of_its_parameters() -> None:
    fused = Projection("in_proj_weight", "[q(H d) | k(G d) | *(G d)]")
    both = fused, replace(fused, name="in_proj_bias")
    assert specs(nn.MultiheadAttention(8, 2, bias=False)) == {"": AttentionSpec((fused,), 2, sizes={"d": 4})}
    assert specs(nn.MultiheadAttention(8, 2)) == {"": AttentionSpec(both, 2, sizes={"d": 4})}
    extra = Projection("bias_k", "k(G d)", dim=2)
    assert specs(nn.MultiheadAttention(8, 2, add_bias_kv=True))[""].projections == (*both, extra)
    apart = (
        Projection("q_proj_weight", "q(H d)"),
        Projection("k_proj_weight", "k(G d)"),
        Projection("v_proj_weight", "*(G d)"),
    )
    assert specs(nn.MultiheadAttention(8, 2, kdim=6))[""].projections == (*apart, both[1])


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 6, "vdim": 6}]
)
@pytest.mark.parametrize("need_weights", [True, False])
def test_torchs_own_attention_is_as_its_spec_says(options: dict[str, Any], need_weights: bool) -> None:
    module, x = nn.MultiheadAttention(8, 2, batch_first=True, **options), torch.randn(2, 5, 8)
    memory = torch.randn(2, 7, options.get("kdim", 8))
    with QKClip(module) as qk_clip:
        assert len(qk_clip.verify(x, memory, memory, need_weights=need_weights).checks) == 13


def test_the_nearest_class_decides() -> None:
    class Mine(Attention):
        pass

    register_attention(Mine, lambda module: separate("q_proj", "k_proj", 1, 1, 8))
    found = specs(nn.Sequential(Attention(8, 2), Mine(8, 2)))
    assert [spec.num_heads for spec in found.values()] == [2, 1]


def test_a_wrapper_around_known_attention_is_accepted() -> None:
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


def test_a_spec_of_something_that_is_not_a_parameter_is_refused() -> None:
    spec = separate("q_proj", "w_k", 2, 2, 4)
    with pytest.raises(
        ValueError, match=r"'layers.0' has no parameter 'w_k', which its spec names; the parameters of .* are: q_proj"
    ):
        QKClip(Residual(SdpaAttention(8, 2)), specs={"layers.0": spec})


@pytest.mark.parametrize("name", ["add_q_proj", "query_global", "k_proj_ip"])
def test_a_second_set_of_projections_is_refused(name: str) -> None:
    module = Generic((8, 8), num_heads=2)
    setattr(module, name, nn.Linear(8, 8))
    with pytest.raises(
        ValueError, match=f"besides q_proj and k_proj it has {name}, which may compute queries or keys too"
    ):
        find_attention(module)
