"""The user's word on attention: specs by module name, and functions by class; it goes before inference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracles import Residual, SdpaAttention
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_muonclip import (
    Attention,
    AttentionSpec,
    MultiheadLatentAttention,
    Projection,
    QKClip,
    register_attention,
)
from lightning_muonclip.qk_clip.describe import declared
from lightning_muonclip.qk_clip.describe.declared import declared_attention


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(declared, "_REGISTERED", dict(declared._REGISTERED))


def specs(model: nn.Module, **kwargs: Any) -> dict[str, AttentionSpec]:
    return {name: spec for name, (_, spec) in declared_attention(model, **kwargs).items()}


def separate(query: str, key: str, heads: int, groups: int, dim: int) -> AttentionSpec:
    return AttentionSpec((Projection(query, "q(H d)"), Projection(key, "k(G d)")), heads, groups, {"d": dim})


class Swapped(nn.Module):
    """Attention with one weight, whose queries come after its keys; the output channels may be columns, as in GPT-2."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        self.weight = nn.Parameter(torch.randn((8, 24) if transposed else (24, 8)))

    def forward(self, x: Tensor) -> Tensor:
        parts = (x @ self.weight if self.transposed else F.linear(x, self.weight)).unflatten(-1, (3, 2, 4))
        key, query, value = parts.transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


SWAPPED = AttentionSpec((Projection("weight", "[k(H d) | q(H d) | *]"),), 2, sizes={"d": 4})


class Model(nn.Module):
    """Attention deep inside, and attention beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"attn": Swapped()})
        self.other = SdpaAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.encoder["attn"](x))


# Our own modules


def test_our_modules_are_known_in_the_order_of_the_model() -> None:
    latent = {"kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 6}
    layer = Attention(8, 4, num_key_value_heads=2)
    model = nn.Sequential(
        Attention(8, 4, num_key_value_heads=2, qk_norm=True),
        nn.Linear(8, 8),
        MultiheadLatentAttention(8, 2, **latent),
        nn.Sequential(MultiheadLatentAttention(8, 2, **latent, q_lora_rank=4)),
        Residual(layer, layer),
        SdpaAttention(8, 2),
    )
    qkv = Projection("q_proj", "q(H d)"), Projection("k_proj", "k(G d)"), Projection("v_proj", "*(G d)")
    gains = Projection("q_norm", "q(d)"), Projection("k_norm", "k(d)")
    kv = Projection("kv_b_proj", "(H [kn:n, *:v])")
    sizes = {"n": 4, "r": 2, "v": 6}
    found = specs(model)
    assert found == {
        "0": AttentionSpec(qkv, 4, 2, {"d": 2}, gains=gains),
        "2": AttentionSpec((Projection("q_proj", "(H [qn:n, qr:r])"), kv), 2, 2, sizes),
        "3.0": AttentionSpec((Projection("q_b_proj", "(H [qn:n, qr:r])"), kv), 2, 2, sizes),
        "4.layers.0": AttentionSpec(qkv, 4, 2, {"d": 2}),
    }
    assert list(found) == ["0", "2", "3.0", "4.layers.0"]
    with QKClip(model) as qk_clip:
        assert qk_clip.layers == list(found)


# Specs by name


def test_a_spec_is_known_at_once_and_the_rest_is_inferred() -> None:
    model, x = Model(), torch.randn(2, 5, 8)
    with QKClip(model, specs={"encoder.attn": SWAPPED}) as qk_clip:
        assert qk_clip.layers == ["encoder.attn"]
        model(x)
        assert qk_clip.layers == ["encoder.attn", "other"]
        assert qk_clip.observer.attention["encoder.attn"][1] is SWAPPED
        assert {proof.layer for proof in qk_clip.verify(x).proofs} == {"encoder.attn", "other"}


def test_the_users_spec_goes_before_inference_even_where_it_is_wrong() -> None:
    wrong = AttentionSpec((Projection("weight", "[q(H d) | k(H d) | *(H d)]"),), 2, sizes={"d": 4})
    model, x = Swapped(), torch.randn(2, 5, 8)
    with QKClip(model, specs={"": wrong}, example=((x,), {})) as qk_clip:
        assert qk_clip.observer.attention[""][1] is wrong
        with pytest.raises(ValueError, match="a spec does not describe its attention"):
            qk_clip.verify(x)


@pytest.mark.parametrize("name", ["encoder", "encoder.attn"])
def test_what_is_left_alone_is_not_observed_nor_what_is_inside_of_it(name: str) -> None:
    model, x = Model(), torch.randn(2, 5, 8)
    with QKClip(model, threshold=1e-3, specs={name: None}) as qk_clip:
        model(x)
        assert qk_clip.layers == ["other"]
        before = model.encoder["attn"].weight.detach().clone()
        assert qk_clip.step().clipped_heads == 2
        assert torch.equal(model.encoder["attn"].weight, before)
    with QKClip(nn.Sequential(Residual(Attention(8, 2))), specs={"0": None}) as qk_clip:
        assert qk_clip.layers == []


def test_a_spec_inside_of_what_is_left_alone_counts() -> None:
    assert specs(Model(), specs={"encoder": None, "encoder.attn": SWAPPED}) == {"encoder.attn": SWAPPED}


def test_a_name_in_specs_that_is_not_a_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"specs names 'encoder.attention', but the model has no such module"):
        QKClip(Model(), specs={"encoder.attention": None})


def test_names_are_those_of_the_model_inside_of_its_wrappers() -> None:
    compiled = Model()
    compiled.encoder["attn"] = torch.compile(compiled.encoder["attn"], backend="eager")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole = torch.compile(Model(), backend="eager")
        for model in (whole, compiled, DistributedDataParallel(Model()), DistributedDataParallel(whole)):
            assert specs(model, specs={"encoder.attn": SWAPPED}) == {"encoder.attn": SWAPPED}
            with QKClip(model, specs={"encoder.attn": SWAPPED}) as qk_clip:
                model(torch.randn(2, 5, 8))
                assert qk_clip.layers == ["encoder.attn", "other"]
        assert specs(compiled, specs={"encoder._orig_mod.attn._orig_mod": SWAPPED}) == {"encoder.attn": SWAPPED}
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dim", [1, -1])
def test_a_spec_may_name_a_parameter_and_a_dimension(dim: int) -> None:
    model = Swapped(transposed=True)
    before = model.weight.detach().clone()
    spec = AttentionSpec((Projection("weight", "[k(H d) | q(H d) | *]", dim=dim),), 2, sizes={"d": 4})
    with QKClip(model, threshold=1.0, specs={"": spec}) as qk_clip:
        qk_clip.step([[1.0, 16.0]])
    factor = torch.tensor([1.0] * 4 + [0.25] * 4).repeat(2)
    assert torch.equal(model.weight, before * torch.cat([factor, torch.ones(8)]))


def test_a_spec_of_other_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"describes 6 channels .* but the weight has 8"):
        QKClip(SdpaAttention(8, 2), specs={"": separate("q_proj", "k_proj", 2, 2, 3)})


def test_a_spec_of_something_that_is_not_a_parameter_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"'layers.0' has no parameter 'w_k', which its spec names; the parameters of .* are: q_proj"
    ):
        QKClip(Residual(SdpaAttention(8, 2)), specs={"layers.0": separate("q_proj", "w_k", 2, 2, 4)})


# Functions by class


@pytest.mark.parametrize("by_name", [False, True])
def test_a_registered_class_is_known_with_its_subclasses(by_name: bool) -> None:
    class Mine(Swapped):
        heads = 4

    register_attention(
        f"{Swapped.__module__}.Swapped" if by_name else Swapped,
        lambda module: AttentionSpec(SWAPPED.projections, getattr(module, "heads", 2), sizes={"d": 4}),
    )
    model = nn.Sequential(Swapped(), Mine())
    assert {name: spec.num_heads for name, spec in specs(model).items()} == {"0": 2, "1": 4}
    assert specs(model, specs={"0": SWAPPED})["0"] is SWAPPED


def test_a_registered_class_is_not_inferred() -> None:
    spec = AttentionSpec((Projection("in_proj_weight", "[q(H d) | k(H d) | *]"),), 2, sizes={"d": 4})
    register_attention(nn.MultiheadAttention, lambda module: spec)
    x = torch.randn(5, 2, 8)
    with QKClip(nn.MultiheadAttention(8, 2), example=((x, x, x), {})) as qk_clip:
        assert qk_clip.observer.attention[""][1] is spec


def test_the_nearest_class_decides() -> None:
    class Mine(Attention):
        pass

    register_attention(Mine, lambda module: separate("q_proj", "k_proj", 1, 1, 8))
    found = specs(nn.Sequential(Attention(8, 2), Mine(8, 2)))
    assert [spec.num_heads for spec in found.values()] == [2, 1]


# Unknown attention


class Clamped(Swapped):
    """Nothing but its user can know what to do with it."""

    def forward(self, x: Tensor) -> Tensor:
        key, query, value = F.linear(x, self.weight).clamp(-1, 1).unflatten(-1, (3, 2, 4)).transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def test_unknown_attention_is_refused_with_three_ways_out() -> None:
    model, x = Residual(SdpaAttention(8, 2), Clamped()), torch.randn(2, 5, 8)
    with QKClip(model) as qk_clip, pytest.raises(ValueError, match="cannot tell which weights") as error:
        model(x)
    message = str(error.value)
    assert "'layers.1' (Clamped)" in message and "weight (24, 8)" in message
    assert "specs={'layers.1': AttentionSpec((Projection(" in message
    with QKClip(model, specs={"layers.1": None}) as qk_clip:
        model(x)
        assert qk_clip.layers == ["layers.0"]
    with QKClip(model, unknown="monitor") as qk_clip:
        model(x)
        assert qk_clip.layers == ["layers.0", "layers.1"] and "watched" in qk_clip.sides["layers.1"]


def test_the_layout_that_a_refusal_proposes_for_one_fused_weight_works() -> None:
    model = Clamped()
    with QKClip(model), pytest.raises(ValueError, match=r"Projection\('wqkv', '(.*?)'\)") as error:
        model(torch.randn(2, 5, 8))
    layout = str(error.value).split("Projection('wqkv', '")[1].split("'")[0]
    spec = AttentionSpec((Projection("weight", layout),), 2, sizes={"d": 4})
    with QKClip(model, specs={"": spec}) as qk_clip:
        assert qk_clip.sides == {"": "q and k"}
