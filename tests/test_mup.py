"""muP against independent tables and arithmetic."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import VOCAB, LitTiny, loader, next_token_loss, token_batches, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_muonclip import Attention, MultiheadLatentAttention, Muon, MuonClip, MuonClipCallback, mup, split_params
from lightning_muonclip.attention.score_mods import RelativeBias
from lightning_muonclip.experiment import coord_check
from lightning_muonclip.experiment.gpt import GPT
from lightning_muonclip.optim.options import LR_ADJUSTMENTS

TOKENS = token_batches(1)[0]
MLA = {"num_attention_heads": 2, "kv_lora_rank": 8, "v_head_dim": 8}


def gpt(width: int, layers: int = 2, attention: Callable[..., nn.Module] | None = None, **kwargs: Any) -> GPT:
    attention = attention or partial(Attention, num_attention_heads=2)
    return GPT(attention, VOCAB, width, layers, intermediate_size=2 * width, **kwargs)


def mlp(width: int, inputs: int = 10, outputs: int = 10) -> nn.Module:
    return nn.Sequential(nn.Embedding(inputs, width), nn.Linear(width, width), nn.Linear(width, outputs))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        next_token_loss(model, TOKENS).backward()
        optimizer.step()


# The multipliers ----------------------------------------------------------------------------------------------------


def test_adamw_has_microsofts_multipliers() -> None:
    # microsoft/mup at width_mult = 4: MuAdam divides lr by 4 and multiplies weight decay by 4 where two dimensions are
    # infinite; MuReadout multiplies its input by 1 / 4; init std sqrt(1 / 4) in hidden weights, 1 in the readout's.
    model, base = mlp(256), mlp(64)
    for module in (*model, *base):
        nn.init.normal_(module.weight, std=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.01, eps=1e-8)
    mup.parametrize(model, base).apply(optimizer)
    found = {g["name"]: (len(g["params"]), g["lr"], g["weight_decay"], g["eps"]) for g in optimizer.param_groups}
    assert found == {
        "input": (1, 0.1, 0.01, 2.5e-9),
        "hidden": (1, 0.025, 0.04, 2.5e-9),
        "vector": (1, 0.1, 0.01, 2.5e-9),
        "output": (1, 0.1, 0.01, 2.5e-9),
        "finite": (1, 0.1, 0.01, 1e-8),
    }
    assert [float(module.weight.detach().std()) for module in model] == pytest.approx([0.1, 0.05, 0.1], rel=0.1)
    x = torch.randn(3, 256)
    assert torch.allclose(model[2](x), F.linear(x / 4, model[2].weight, model[2].bias))


@given(
    st.sampled_from(sorted(LR_ADJUSTMENTS)),
    st.sampled_from([(2, 3), (3, 2), (2, 2), (0, 2), (2, 0)]),
    st.integers(1, 64),
)
@settings(max_examples=60)
def test_muon_keeps_the_spectral_condition(adjust: str, sizes: tuple[int, int], growth: int) -> None:
    # An update's spectral norm, the multiplier included, over sqrt(fan_out / fan_in), is that at the base width.
    def shape(width: int) -> tuple[int, int]:
        fan_out, fan_in = (factor * width or 5 for factor in sizes)  # 0 is a side of 5 that does not grow
        return fan_out, fan_in

    def model(width: int, place: str) -> nn.Module:
        fan_out, fan_in = shape(width)
        return nn.ModuleDict({place: nn.ModuleList([nn.Linear(fan_in, fan_out, bias=False)])})

    for place in ("head", "layers"):  # with a multiplier, and without
        wide = model(8 * growth, place)
        wide = wide if place == "layers" else nn.Sequential(wide[place][0])
        base = model(8, place) if place == "layers" else nn.Sequential(model(8, place)[place][0])
        scaled = mup.parametrize(wide, base)
        optimizer = scaled.apply(Muon(wide.named_parameters(), lr=1.0, adjust_lr_fn=adjust, weight_decay=0.1))
        (group,) = optimizer.param_groups
        linear = next(module for module in wide.modules() if isinstance(module, nn.Linear))
        multiplier = float(linear(torch.ones(shape(8 * growth)[1])).sum() / linear.weight.sum())

        def ratio(width: int) -> float:
            fan_out, fan_in = shape(width)
            return LR_ADJUSTMENTS[adjust](fan_out, fan_in) / math.sqrt(fan_out / fan_in)

        assert group["lr"] * multiplier * ratio(8 * growth) == pytest.approx(ratio(8), rel=1e-3)
        assert group["lr"] * group["weight_decay"] == pytest.approx(0.1)


@pytest.mark.parametrize(("adjust", "rate"), [("spectral_unclamped", 1.0), ("match_rms_adamw", 0.5), (None, 1.0)])
def test_muon_and_adamw_in_one_optimizer(adjust: str | None, rate: float) -> None:
    model = gpt(64)
    optimizer = MuonClip(model, lr=0.02, adjust_lr_fn=adjust)
    mup.parametrize(model, gpt(16)).apply(optimizer)
    lrs = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert lrs == {"muon-hidden": 0.02 * rate, "adamw-input": 0.02, "adamw-vector": 0.02, "adamw-output": 0.02}
    train(model, optimizer)
    optimizer.close()


def test_scale_of_attention() -> None:
    model, base = gpt(64, attention=partial(Attention, num_attention_heads=2)), gpt(16)
    mup.parametrize(model, base)
    assert model.layers[0].self_attn.scaling == pytest.approx(math.sqrt(8) / 32)
    more_heads = gpt(64, attention=partial(Attention, num_attention_heads=8))
    mup.parametrize(more_heads, base)
    assert more_heads.layers[0].self_attn.scaling == 8**-0.5


def test_a_scale_of_its_own_falls_with_the_width_of_heads() -> None:
    # Gemma 2's, which does not follow the head: muP wants 1 / d of it too.
    attention = partial(Attention, num_attention_heads=2, scaling=0.3, softcap=4.0)
    model, base = gpt(64, attention=attention), gpt(16, attention=attention)
    scaled = mup.parametrize(model, base)
    assert [layer.self_attn.scaling for layer in model.layers] == [0.3 / 4] * 2
    plain = gpt(64, attention=attention)
    plain.load_state_dict(scaled.export())
    torch.testing.assert_close(plain(TOKENS), model(TOKENS))


def test_a_learned_position_bias_is_not_a_matrix() -> None:
    def make(width: int) -> GPT:
        score_mod = RelativeBias(width // 8, 8, 20)
        return gpt(width, attention=partial(Attention, num_attention_heads=width // 8, score_mod=score_mod))

    model = make(64)
    name = "layers.0.self_attn.score_mod.relative_attention_bias.weight"
    assert mup.parametrize(model, make(16)).scales[name].kind is mup.INPUT
    (adamw,) = (group for group in split_params(model) if group["algorithm"] == "adamw")
    assert name in [own for own, _ in adamw["params"]]


def test_everything_is_scaled_once() -> None:
    model, base = Attention(64, 2), Attention(16, 2)
    scaled = mup.parametrize(model, base)
    with pytest.raises(ValueError, match="in muP already"):
        mup.parametrize(model, base)
    with pytest.raises(ValueError, match="the base is in muP itself"):
        mup.parametrize(Attention(128, 2), model)
    optimizer = scaled.apply(torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match=r"call apply\(\) once"):
        scaled.apply(optimizer)


def test_classes_of_latent_attention_and_of_bare_parameters() -> None:
    class Model(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.pos_embed = nn.Parameter(torch.randn(1, 7, width))
            self.experts = nn.Parameter(torch.randn(3, width, width))
            self.layers = nn.ModuleList(
                [MultiheadLatentAttention(width, qk_nope_head_dim=8, qk_rope_head_dim=4, **MLA)]
            )
            self.router = nn.Module()
            self.router.weight = nn.Parameter(torch.randn(4, width))
            self.stack = nn.Module()
            self.stack.weight = nn.Parameter(torch.randn(4, width, width))
            self.conv = nn.Conv2d(width, width, 3, bias=False)
            self.stem = nn.Conv2d(3, width, 3, bias=False)
            self.fixed = nn.Linear(3, 3)

    scaled = mup.parametrize(Model(64), Model(32))
    kinds = {name.removeprefix("layers.0."): scale.kind.name for name, scale in scaled.scales.items()}
    assert kinds == {
        "pos_embed": "input",
        "experts": "hidden",
        "q_proj.weight": "bottleneck",  # two heads of twelve channels, whatever the width
        "kv_a_proj_with_mqa.weight": "bottleneck",
        "kv_a_layernorm.weight": "finite",
        "kv_b_proj.weight": "finite",
        "o_proj.weight": "input",
        "router.weight": "bottleneck",
        "stack.weight": "hidden",
        "conv.weight": "hidden",
        "stem.weight": "input",
        "fixed.weight": "finite",
        "fixed.bias": "finite",
    }
    assert {scale.growth for scale in scaled.scales.values()} == {1.0, 2.0}
    assert "bottleneck" in str(scaled)


@pytest.mark.parametrize("kind", ["Conv1D", "subclass", "sharded", "embedding", "experts"])
def test_layers_of_a_class_made_of_another_are_what_they_were(kind: str) -> None:
    # Their weights are (in, out): read as (out, in), what grows would be fan-in.
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

    class Table(nn.Embedding):
        pass

    def make(width: int) -> nn.Module:
        if kind == "embedding":
            return nn.Sequential(Table(7, width))
        if kind == "experts":  # as GPT-OSS has them
            experts = nn.Module()
            experts.is_transposed, experts.is_concatenated = True, False
            experts.weight = nn.Parameter(torch.randn(2, 3, width))
            return nn.Sequential(experts)
        layer = conv1d(width, 3)  # from 3 to the width
        if kind == "subclass":
            layer.__class__ = type("LoRAConv1D", (conv1d,), {})
        if kind == "sharded":  # FSDP2 puts its class before that of the module
            layer.__class__ = type("FSDPConv1D", (FSDPModule, conv1d), {})
        return nn.Sequential(layer)

    scaled = mup.parametrize(make(64), make(16))
    assert scaled.scales["0.weight"] == mup.Scale(mup.INPUT, 4.0)


def test_epsilon_follows_the_gradients() -> None:
    sizes: dict[str, list[float]] = {}
    for width in (32, 512):
        torch.manual_seed(0)
        model = gpt(width, attention=partial(Attention, num_attention_heads=2, attention_bias=True))
        scaled = mup.parametrize(
            model, gpt(32, attention=partial(Attention, num_attention_heads=2, attention_bias=True))
        )
        train(model, scaled.apply(Muon(split_params(model), lr=0.01)))  # so that the gradients are of what is learned
        for name, param in model.named_parameters():
            sizes.setdefault(name, []).append(float(param.grad.abs().mean()))
    exponents = {name: math.log(wide / narrow) / math.log(16) for name, (narrow, wide) in sizes.items()}
    for name, exponent in exponents.items():
        assert exponent == pytest.approx(scaled.scales[name].kind.eps, abs=0.35), name


def test_at_the_base_width_nothing_changes() -> None:
    torch.manual_seed(0)
    plain = gpt(32)
    model = copy.deepcopy(plain)
    optimizer = mup.parametrize(model, gpt(32)).apply(torch.optim.AdamW(model.parameters(), lr=1e-2))
    train(model, optimizer)
    train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters()))


def test_depth() -> None:
    writers = ("*.o_proj", "*.down_proj")
    model = gpt(32, layers=8)
    scaled = mup.parametrize(model, gpt(16, layers=2), residual=writers)
    optimizer = scaled.apply(torch.optim.AdamW(model.parameters(), lr=0.1, eps=1e-8))
    eps = {group["name"]: group["eps"] for group in optimizer.param_groups}
    assert eps["hidden"] == 1e-8 / 8 and eps["input"] == eps["output"] == 1e-8 / 2
    assert {group["lr"] for group in optimizer.param_groups} == {0.1, 0.05}  # whatever the depth
    x = torch.randn(2, 5, 64)
    down = model.layers[7].mlp.down_proj
    assert torch.allclose(down(x), F.linear(x, down.weight) / 4)


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_what_all_layers_write_does_not_grow_with_their_number(name: str) -> None:
    def slope(residual: tuple[str, ...]) -> float:
        written = []
        for layers in (2, 4, 8, 16):
            torch.manual_seed(0)
            model = gpt(64, layers)
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            if name == "Muon":
                optimizer = Muon(split_params(model), lr=0.05, adjust_lr_fn="spectral_unclamped")
            if residual:
                mup.parametrize(model, gpt(64, 2), residual=residual).apply(optimizer)
            train(model, optimizer, steps=4)
            embedded = hidden = model.embed_tokens(TOKENS)
            for layer in model.layers:
                hidden = layer(hidden)
            written.append(float((hidden - embedded).detach().abs().mean()))
        return coord_check.slope((2, 4, 8, 16), written)

    # What the initial weights write shrinks with the root of the depth: the smaller part after these steps.
    assert abs(slope(("*.o_proj", "*.down_proj"))) < 0.3
    assert slope(()) > 0.8


# Export ------------------------------------------------------------------------------------------------------------

ATTENTION: dict[str, Callable[[int], nn.Module]] = {
    "mha": lambda hidden_size: Attention(hidden_size, 2),
    "gqa, biases": lambda hidden_size: Attention(hidden_size, 4, 2, attention_bias=True),
    "qk_norm": lambda hidden_size: Attention(hidden_size, 2, qk_norm=True),
    "mla": lambda hidden_size: MultiheadLatentAttention(
        hidden_size, qk_nope_head_dim=hidden_size // 4, qk_rope_head_dim=hidden_size // 4, **MLA
    ),
}


@pytest.mark.parametrize("depth", [False, True], ids=["", "depth"])
@pytest.mark.parametrize("kind", ATTENTION)
def test_exported_weights_give_the_same_outputs(kind: str, depth: bool) -> None:
    def make(width: int, layers: int) -> GPT:
        return gpt(width, layers, ATTENTION[kind], mlp="swiglu")

    model, base = make(64, 4), make(16, 2 if depth else 4)
    scaled = mup.parametrize(model, base, residual=("*.o_proj", "*.down_proj") if depth else ())
    train(model, scaled.apply(Muon(split_params(model), lr=0.05)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = make(64, 4)
    ours = model(TOKENS)
    assert (plain(TOKENS) - ours).abs().max() > 0.1
    plain.load_state_dict(scaled.export())
    assert torch.allclose(plain(TOKENS), ours, atol=1e-6, rtol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_tied_head() -> None:
    def make(width: int) -> GPT:
        model = gpt(width)
        model.lm_head.weight = model.embed_tokens.weight
        return model

    model = make(64)
    scaled = mup.parametrize(model, make(16))
    x = torch.randn(3, 64)
    assert torch.allclose(model.lm_head(x), x @ model.embed_tokens.weight.T / 4)
    plain = gpt(64)  # which does not tie them
    plain.load_state_dict(scaled.export())
    assert torch.allclose(plain(TOKENS), model(TOKENS), atol=1e-6)


def test_hugging_face_llama() -> None:
    transformers = pytest.importorskip("transformers")

    def make(width: int) -> nn.Module:
        config = transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2
        )
        return transformers.LlamaForCausalLM(config)

    model = make(64)
    scaled = mup.parametrize(model, make(16))
    assert model.model.layers[0].self_attn.scaling == pytest.approx(math.sqrt(8) / 32)
    kinds = [scale.kind.name for scale in scaled.scales.values()]
    assert {kind: kinds.count(kind) for kind in kinds} == {"input": 1, "hidden": 14, "vector": 5, "output": 1}
    plain = make(64)
    plain.load_state_dict(scaled.export(example=((TOKENS,), {})))
    assert torch.allclose(plain(TOKENS).logits, model(TOKENS).logits, atol=1e-6)


def test_copies_and_compiles() -> None:
    model = gpt(64)
    mup.parametrize(model, gpt(16))
    outputs = model(TOKENS)
    assert torch.equal(copy.deepcopy(model)(TOKENS), outputs)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(TOKENS), outputs)


# Lightning ----------------------------------------------------------------------------------------------------------


class LitMuP(LitTiny):
    def configure_optimizers(self) -> Any:
        found = super().configure_optimizers()
        return self.scaled.apply(found)


@pytest.mark.parametrize(
    ("adjust", "lr", "expected"),
    [("match_rms_adamw", None, 0.5), ("spectral_unclamped", None, 1.0), ("match_rms_adamw", 0.02, 0.5)],
)
def test_the_callback_takes_muons_multipliers(adjust: str, lr: float | None, expected: float) -> None:
    model = gpt(64)
    lit = LitMuP(model, lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1))
    lit.scaled = mup.parametrize(model, gpt(16))
    callback = MuonClipCallback(adjust_lr_fn=adjust, lr=lr, weight_decay=None if lr is None else 0.1)
    fit = trainer([callback], max_steps=2)
    fit.fit(lit, loader(token_batches(2)))
    assert callback.muon is not None
    (group,) = callback.muon.param_groups
    assert group["lr"] == pytest.approx((lr or 0.01) * expected)
    assert group["weight_decay"] == pytest.approx(0.1 / expected)
    assert {g["name"]: g["lr"] for g in fit.optimizers[0].param_groups}["input"] == 0.01


def test_a_checkpoint_resumes(tmp_path: Any) -> None:
    def make() -> LitMuP:
        torch.manual_seed(0)
        lit = LitMuP(gpt(64), lambda params: torch.optim.AdamW(params, lr=0.01))
        lit.scaled = mup.parametrize(lit.model, gpt(16))
        return lit

    whole, half = make(), make()
    trainer([MuonClipCallback()], max_epochs=2).fit(whole, loader(token_batches(2)))
    fit = trainer([MuonClipCallback()])
    fit.fit(half, loader(token_batches(2)))
    fit.save_checkpoint(tmp_path / "half.ckpt")
    resumed = make()
    trainer([MuonClipCallback()], max_epochs=2).fit(
        resumed, loader(token_batches(2)), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(half.parameters(), resumed.parameters()))


# Refusals ----------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    model, base = gpt(64), gpt(16)
    with pytest.raises(ValueError, match=r"no 'layers\.2\..*residual"):
        mup.parametrize(gpt(64, layers=3), base)
    with pytest.raises(ValueError, match="matches no module"):
        mup.parametrize(gpt(64, layers=3), base, residual=("*.out",))
    with torch.device("meta"):
        empty = gpt(16)
    with pytest.raises(ValueError, match=r"in the base .* on meta; use the same model, initialized"):
        mup.parametrize(gpt(64), empty)
    with pytest.raises(ValueError, match=r"head_dim of 32, but 8 in the base.* number of its heads"):
        mup.parametrize(nn.MultiheadAttention(64, 2), nn.MultiheadAttention(16, 2))
    scaled = mup.parametrize(model, base)
    with pytest.raises(ValueError, match="already"):
        mup.parametrize(model, base)
    with pytest.raises(ValueError, match="not SGD"):
        scaled.apply(torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="not part of the model"):
        scaled.apply(torch.optim.AdamW([nn.Parameter(torch.zeros(2))]))
    optimizer = torch.optim.AdamW(model.parameters())
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(ValueError, match="fresh"):
        scaled.apply(optimizer)


def test_an_attention_whose_queries_cannot_be_found() -> None:
    class Odd(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(width, width))
            self.scaling = width**-0.5

        def forward(self, x: Tensor) -> Tensor:
            return x

    scaled = mup.parametrize(nn.Sequential(Odd(64)), nn.Sequential(Odd(16)))
    with pytest.raises(ValueError, match="register_attention"):
        scaled.export()
