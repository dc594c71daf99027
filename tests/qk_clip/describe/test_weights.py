"""LoRA adapters, quantized and parametrized weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import Residual, SdpaAttention, enlarge, snapshot
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_muonclip import Attention, AttentionSpec, Projection, QKClip

try:
    import peft
except ImportError:
    peft = None
needs_peft = pytest.mark.skipif(peft is None, reason="needs peft")

SIZES = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 11, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def tokens() -> Tensor:
    return torch.randint(11, (3, 9))


def llama(attention_bias: bool = False) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, attention_bias=attention_bias))
    enlarge(model, 12.0)
    return model


def gpt2() -> GPT2LMHeadModel:
    sizes = {"vocab_size": 11, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0))
    enlarge(model, 12.0)
    return model


SEPARATE = Projection("q_proj", "q(H d)"), Projection("k_proj", "k(G d)")
LLAMA_SPECS = {
    f"base_model.model.model.layers.{i}.self_attn": AttentionSpec(SEPARATE, 4, 2, {"d": 4}) for i in range(2)
}


SPEC = AttentionSpec(SEPARATE, 4, sizes={"d": 4})


def adapted(model: nn.Module, targets: list[str], names: tuple[str, ...] = ("default",), **options: Any) -> Any:
    """A model with adapters that are not zero, all of them active."""
    found = None
    for name in names:
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **options)
        if found is None:
            found = peft.get_peft_model(model, config, adapter_name=name)
        else:
            found.add_adapter(name, config)
    assert found is not None
    found.base_model.set_adapter(list(names))
    with torch.no_grad():
        for name, param in found.named_parameters():
            if "lora_B" in name:
                param.normal_(std=0.3)
    return found.train()


def merged(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The effective weight, (in, out) or (out, in), and bias of a LoRA layer; float64."""
    layer: Any = module
    weight = layer.base_layer.weight.detach().double()
    bias = None if layer.base_layer.bias is None else layer.base_layer.bias.detach().double()
    for name in layer.active_adapters:
        a, b = layer.lora_A[name], layer.lora_B[name]
        delta = layer.scaling[name] * (b.weight.detach().double() @ a.weight.detach().double())
        weight = weight + (delta.T if layer.fan_in_fan_out else delta)
        if b.bias is not None:
            extra = layer.scaling[name] * b.bias.detach().double()
            bias = extra if bias is None else bias + extra
    return weight, bias


def close(found: Tensor, expected: Tensor, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=1e-6)


def between(maxima: Tensor) -> float:
    low, high = maxima.flatten().sort().values[[maxima.numel() // 2 - 1, maxima.numel() // 2]].tolist()
    return (max(low, 0.0) + high) / 2


# LoRA


@needs_peft
def test_adapted_layers_are_only_watched_by_default() -> None:
    model = adapted(llama(), ["q_proj", "k_proj"], layers_to_transform=[1])
    for param in model.base_model.model.model.layers[0].parameters():
        param.requires_grad_(True)
    before = snapshot(model)
    with QKClip(model, threshold=1e-3, example=((tokens(),), {})) as qk_clip:
        lines = qk_clip.summary().splitlines()
        assert lines[1].endswith("q and k") and lines[2].endswith("watched (adapted by LoRA)")
        found = qk_clip.verify(tokens())
        assert list(found.watched.values()) == ["adapted by LoRA"]
        model(tokens())
        result = qk_clip.step()
        assert (result.max_logits > 1e-3).all()
        assert result.clipped_heads == 4 and (result.gamma[1] == 1).all()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"base_model.model.model.layers.0.self_attn.{x}_proj.weight" for x in "q"}


@needs_peft
def test_adapted_values_do_not_matter() -> None:
    model = adapted(llama(), ["v_proj", "o_proj"])
    for name, param in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            param.requires_grad_(True)
    with QKClip(model, example=((tokens(),), {})) as qk_clip:
        assert all(side == "q and k" for side in qk_clip.sides.values())
        assert len(qk_clip.params) == 4


@needs_peft
@pytest.mark.parametrize(  # every combination of the last three, and two of them with each kind of adapters
    ("names", "options", "attention_bias", "shared_keys", "described"),
    [
        (("default",), {}, False, "query", False),
        (("default",), {}, True, "compensate", True),
        (("one", "two"), {}, True, "compensate", False),
        (("one", "two"), {}, False, "query", True),
        (("default",), {"lora_bias": True}, True, "query", False),
        (("default",), {"lora_bias": True}, False, "compensate", True),
        (("default",), {"use_rslora": True, "init_lora_weights": "gaussian"}, False, "compensate", False),
        (("default",), {"use_rslora": True, "init_lora_weights": "gaussian"}, True, "query", True),
    ],
)
def test_scaled_with_its_adapters_a_replay_has_the_threshold(
    names: tuple[str, ...], options: dict[str, Any], attention_bias: bool, shared_keys: str, described: bool
) -> None:
    base = llama(attention_bias or "lora_bias" in options)
    model, x = adapted(base, ["q_proj", "k_proj"], names, **options), tokens()
    layer = model.base_model.model.model.layers[0].self_attn  # the first one's inputs do not depend on attention
    before = [merged(child) for child in (layer.q_proj, layer.k_proj)]
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    with QKClip(model, None) as watcher:
        model(x)
        maxima = watcher.max_logits
    threshold = between(maxima[0])
    options = {"shared_keys": shared_keys, "lora": "scale", "specs": LLAMA_SPECS if described else None}
    with QKClip(model, threshold, alpha=0.25, **options) as qk_clip:
        qk_clip.verify(x)
        assert qk_clip.layers and all(side == "q and k" for side in qk_clip.sides.values())
        model(x)
        gamma = qk_clip.step().gamma[0].double()
        assert (gamma < 1).sum() == 2
        model(x)
        close(qk_clip.max_logits[0], maxima[0].clamp(max=threshold))
    smallest = gamma.unflatten(0, (2, 2)).amin(1).repeat_interleave(2)
    key = smallest[::2] ** 0.75 if shared_keys == "compensate" else torch.ones(2)
    query = gamma / smallest**0.75 if shared_keys == "compensate" else gamma
    for child, (weight, bias), factor in zip((layer.q_proj, layer.k_proj), before, (query, key)):
        rows = factor.repeat_interleave(4).double()
        found = merged(child)
        close(found[0], weight * rows[:, None])
        assert (found[1] is None) == (bias is None)
        if bias is not None:
            close(found[1], bias * rows)
    assert frozen == {name for name, p in model.named_parameters() if not p.requires_grad}
    logits = model.eval()(x).logits
    close(model.merge_and_unload()(x).logits, logits, rtol=1e-3)


@needs_peft
def test_transposed_weights_of_gpt2_are_scaled_with_their_adapters() -> None:
    model, x = adapted(gpt2(), ["c_attn"], fan_in_fan_out=True), tokens()
    attention = model.base_model.model.transformer.h[0].attn
    weight, bias = merged(attention.c_attn)
    with QKClip(model, None) as watcher:
        model(x)
        maxima = watcher.max_logits
    threshold = between(maxima[0])
    with QKClip(model, threshold, alpha=0.25, lora="scale") as qk_clip:
        qk_clip.verify(x)
        model(x)
        gamma = qk_clip.step().gamma[0].double()
        model(x)
        close(qk_clip.max_logits[0], maxima[0].clamp(max=threshold))
    columns = torch.cat([gamma**0.25, gamma**0.75, torch.ones(4)]).repeat_interleave(4)
    found = merged(attention.c_attn)
    close(found[0], weight * columns)
    assert bias is not None and found[1] is not None
    close(found[1], bias * columns)


@needs_peft
def test_where_only_queries_are_adapted_and_keys_are_frozen_queries_take_all() -> None:
    model, x = adapted(llama(), ["q_proj"]), tokens()
    with QKClip(model, 1e-2, alpha=0.25, lora="scale", example=((x,), {})) as qk_clip:
        assert set(qk_clip.sides.values()) == {"q"}
        assert len(qk_clip.params) == 2 * 2
        model(x)
        maxima = qk_clip.step().max_logits
        model(x)
        close(qk_clip.max_logits[0], maxima[0].clamp(max=1e-2), rtol=1e-3)


ADAPTERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "dora": ("DoRA", lambda: peft.LoraConfig(target_modules=["q_proj"], use_dora=True)),
    "dora of both": ("DoRA", lambda: peft.LoraConfig(target_modules=["q_proj", "k_proj"], use_dora=True)),
    "loha": ("peft.tuners.loha.layer.Linear", lambda: peft.LoHaConfig(target_modules=["q_proj"])),
    "ia3": (
        "peft.tuners.ia3.layer.Linear",
        lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    ),
    "adalora": (
        "peft.tuners.adalora.layer.SVDLinear",
        lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9),
    ),
}


def with_adapter(kind: str) -> Any:
    model = peft.get_peft_model(llama(), ADAPTERS[kind][1]()).train()
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:  # many start at zero
                param.add_(torch.randn_like(param) * 0.1)
    return model


@needs_peft
@pytest.mark.parametrize("kind", ADAPTERS)
def test_what_other_adapters_train_is_scaled_as_they_use_it(kind: str) -> None:
    model, x = with_adapter(kind), tokens()
    with QKClip(model, None) as watcher:
        model(x)
        maxima = watcher.max_logits
    with QKClip(model, between(maxima[0]), lora="scale") as qk_clip:
        model(x)
        assert set(qk_clip.sides.values()) == {"q"}
        qk_clip.step()
        model(x)
        close(qk_clip.max_logits[0], maxima[0].clamp(max=qk_clip.threshold))


@needs_peft
@pytest.mark.parametrize("kind", ADAPTERS)
def test_other_adapters_cannot_be_described_but_can_be_watched(kind: str) -> None:
    model = with_adapter(kind)
    message = (
        rf"layers.0.self_attn.q_proj is adapted by {ADAPTERS[kind][0]}, but .* only plain LoRA; watch it with lora='mon"
    )
    with pytest.raises(ValueError, match=message):
        QKClip(model, lora="scale", specs=LLAMA_SPECS)
    for options in ({}, {"specs": LLAMA_SPECS}, {"specs": LLAMA_SPECS, "lora": "scale", "threshold": None}):
        before = snapshot(model)
        with QKClip(model, **{"threshold": 1e-3, **options}) as qk_clip:
            model(tokens())
            result = qk_clip.step()
        assert result.max_logits.isfinite().all() and result.clipped_heads == 0
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# Weights that a factor does not scale


def _old_weight_norm(module: nn.Module) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(module)


class Params4bit(nn.Parameter):
    """As bitsandbytes packs weights; the class alone says so."""


def _packed(module: Any) -> None:
    module.weight = Params4bit(module.weight.data)


def _integers(module: Any) -> None:
    module.weight = nn.Parameter(module.weight.data.to(torch.int8), requires_grad=False)


def _eight_bits(module: Any) -> None:
    module.weight = nn.Parameter(module.weight.data.to(torch.float8_e4m3fn), requires_grad=False)


def _as_buffer(module: Any) -> None:
    weight = module.weight.data
    del module.weight
    module.register_buffer("weight", weight)


def _pruned(module: Any) -> None:
    nn.utils.prune.l1_unstructured(module, "weight", amount=0.5)


UNSCALABLE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "weight_norm": (nn.utils.parametrizations.weight_norm, "parametrized"),
    "old weight_norm": (_old_weight_norm, "parametrized"),
    "spectral_norm": (nn.utils.parametrizations.spectral_norm, "parametrized"),
    "old spectral_norm": (nn.utils.spectral_norm, "parametrized"),
    "orthogonal": (nn.utils.parametrizations.orthogonal, "parametrized"),
    "pruned": (_pruned, "parametrized"),
    "subclass": (_packed, "a Params4bit"),
    "int8": (_integers, r"quantized \(torch.int8\)"),
    "float8": (_eight_bits, r"quantized \(torch.float8_e4m3fn\)"),
    "buffer": (_as_buffer, "not a parameter of torch.nn.modules.linear.Linear"),
}


@pytest.mark.parametrize("kind", UNSCALABLE)
@pytest.mark.parametrize("child", ["q_proj", "k_proj"])
def test_a_weight_that_cannot_be_scaled_is_refused_with_a_way_out(child: str, kind: str) -> None:
    model, x = Residual(Attention(16, 4), Attention(16, 4)), torch.randn(2, 5, 16)
    change, reason = UNSCALABLE[kind]
    change(model.layers[1].get_submodule(child))
    message = (
        rf"QK-Clip cannot scale layers.1.{child}.weight: it is {reason}. Use a plain weight there, pass"
        r" threshold=None to only watch its logits, or skip the module with specs=\{'layers.1': None\}"
    )
    with pytest.raises(ValueError, match=message):
        QKClip(model)
    with QKClip(model, specs={"layers.1": None}) as qk_clip:
        assert qk_clip.layers == ["layers.0"]
    before = snapshot(model)
    with QKClip(model, threshold=None) as qk_clip:
        if kind not in ("int8", "float8"):  # a plain nn.Linear cannot run those
            model(x)
            assert qk_clip.step().max_logits.isfinite().all()
            found = qk_clip.verify(x)
            assert list(found.watched) == ["layers.1"] and found.watched["layers.1"].startswith(f"{child}.weight is ")
            assert {proof.layer for proof in found.proofs} == {"layers.0"}
    assert all(
        torch.equal(value.float(), before[name].float())
        for name, value in model.state_dict().items()
        if not name.endswith(("_u", "_v"))
    )


PARAMETRIZED = {
    "weight_norm": "q and k",
    "old weight_norm": "q and k",
    "pruned": "q and k",
    "spectral_norm": "k",  # whatever its weight is, the norm of what it makes is the same
    "old spectral_norm": "k",
    "orthogonal": "k",
    "buffer": "k",
}


@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_of_a_parametrized_weight_what_scales_it_is_found(kind: str) -> None:
    module, x = SdpaAttention(16, 4), torch.randn(3, 9, 16)
    enlarge(module)
    UNSCALABLE[kind][0](module.q_proj)
    for _ in range(50):
        module(x)  # the power iteration of spectral_norm converges
    with QKClip(module, None) as watcher:
        module(x)
        maxima = watcher.max_logits
    with QKClip(module, between(maxima), alpha=0.25) as qk_clip:
        module(x)
        assert qk_clip.sides == {"": PARAMETRIZED[kind]}
        assert qk_clip.step().clipped_heads == 2
        module(x)
        close(qk_clip.max_logits, maxima.clamp(max=qk_clip.threshold))


def test_a_packed_weight_that_runs_is_refused_too() -> None:
    model = Residual(SdpaAttention(16, 4), SdpaAttention(16, 4))
    _packed(model.layers[1].q_proj)
    with pytest.raises(ValueError, match=r"QK-Clip cannot scale layers.1.q_proj.weight: it is a Params4bit"):
        QKClip(model, example=((torch.randn(2, 5, 16),), {}))


def test_values_may_be_of_any_kind() -> None:
    for change, _ in UNSCALABLE.values():
        module = SdpaAttention(16, 4)
        change(module.v_proj)
        QKClip(module, specs={"": SPEC}).close()
        if module.v_proj.weight.itemsize > 1:  # a plain nn.Linear cannot run those
            with QKClip(module, example=((torch.randn(2, 5, 16),), {})) as qk_clip:
                assert qk_clip.sides == {"": "q and k"}


def test_dynamically_quantized_layers_are_refused_and_watched() -> None:
    model = Residual(SdpaAttention(16, 4))
    with pytest.warns(DeprecationWarning, match="torch.ao.quantization"):
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    specs = {"layers.0": SPEC}
    with pytest.raises(
        ValueError, match=r"QK-Clip cannot scale .*q_proj.weight: it is not a parameter of torch.*quantized.*\.Linear"
    ):
        QKClip(model, specs=specs)
    with QKClip(model.train(), threshold=None, specs=specs) as qk_clip:
        model(torch.randn(2, 5, 16))
        assert qk_clip.step().max_logits.isfinite().all()


@pytest.mark.parametrize("old", [True, False])
def test_the_magnitude_of_weight_norm_is_a_weight_that_can_be_scaled(old: bool) -> None:
    module, x = SdpaAttention(16, 4, 2), torch.randn(3, 9, 16)
    enlarge(module)
    projections = []
    for child, layout in (("q_proj", "q(H d)"), ("k_proj", "k(G d)")):
        linear = module.get_submodule(child)
        if old:
            _old_weight_norm(linear)
        else:
            nn.utils.parametrizations.weight_norm(linear)
        magnitude = f"{child}.weight_g" if old else f"{child}.parametrizations.weight.original0"
        projections += [Projection(magnitude, layout), Projection(f"{child}.bias", layout)]
    specs = {"": AttentionSpec(tuple(projections), 4, 2, {"d": 4})}
    with QKClip(module, None, specs=specs) as watcher:
        module(x)
        old_maxima = watcher.max_logits
    with QKClip(module, between(old_maxima), specs=specs, shared_keys="compensate") as qk_clip:
        qk_clip.verify(x)
        module(x)
        assert qk_clip.step().clipped_heads == 2
        module(x)
        close(qk_clip.max_logits, old_maxima.clamp(max=qk_clip.threshold))


# Specs that do not fit their module


@pytest.mark.parametrize(
    ("projection", "message"),
    [
        (
            Projection("w_q", "q(H d)"),
            "has no parameter 'w_q', which its spec names; the parameters of .* are: q_proj.weight, q_proj.bias, k_",
        ),
        (Projection("attn.w_q", "q(H d)"), "has no parameter 'attn.w_q', which its spec names"),
        (Projection("q_proj.wait", "q(H d)"), "has no parameter 'q_proj.wait'"),
        (Projection("q_proj", "q(H d)", dim=2), "q_proj.weight: dim=2 is out of range for 2 dimensions"),
        (Projection("q_proj", "q(H d)", dim=-3), "q_proj.weight: dim=-3 is out of range for 2 dimensions"),
        (Projection("q_proj.bias", "q(H d)", dim=1), "q_proj.bias: dim=1 is out of range for 1 dimensions"),
        (
            Projection("q_proj", "q(H 3)"),
            r"q_proj.weight: layout 'q\(H 3\)' describes 12 channels .* the weight has 16",
        ),
    ],
)
def test_a_missing_projection_is_refused(projection: Projection, message: str) -> None:
    model = Residual(SdpaAttention(16, 4))
    specs = {"layers.0": replace(SPEC, projections=(projection, SPEC.projections[1]))}
    with pytest.raises(ValueError, match=rf"attention 'layers.0'.*{message}"):
        QKClip(model, specs=specs)


def test_a_dimension_may_be_counted_from_the_end() -> None:
    model = Residual(SdpaAttention(16, 4))
    projections = Projection("q_proj", "q(H d)", dim=-2), Projection("q_proj.bias", "q(H d)", dim=-1)
    specs = {"layers.0": replace(SPEC, projections=(*projections, SPEC.projections[1]))}
    before = model.layers[0].q_proj.weight.detach().clone()
    with QKClip(model, 1.0, specs=specs) as qk_clip:
        qk_clip.step([[4.0] * 4])
    assert torch.equal(model.layers[0].q_proj.weight, before / 2)
