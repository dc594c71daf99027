"""Our modules against the Hugging Face modules of the same kind, and their maxima against brute force in float64."""

from __future__ import annotations

import copy
import importlib
import math
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import pytest
import torch
from oracles import INF, brute_max_logits, causal, enlarge, latent_queries_and_keys, module_max_logits, queries_and_keys
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from lightning_muonclip import Attention, AttentionMask, MultiheadLatentAttention
from lightning_muonclip.attention.rotary import RotaryEmbedding
from lightning_muonclip.attention.score_mods import Alibi
from lightning_muonclip.experiment.gpt import GPT

LENGTH = 70  # more than one block of queries
THETA = 5000.0
ORIGINAL = 24  # less than LENGTH
WINDOW = 20
SIZES = {"hidden_size": 32, "num_attention_heads": 4}
LATENT_SIZES = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
GQA: dict[str, Any] = {"num_key_value_heads": 2}
LOCAL: dict[str, Any] = {**GQA, "sliding_window": WINDOW}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


class Kind(NamedTuple):
    """A Hugging Face class, the arguments of its config, ours where they differ, and the scaling of RoPE."""

    family: str
    theirs: dict[str, Any]
    ours: dict[str, Any] | None = None
    rope: dict[str, Any] | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {**(self.theirs if self.ours is None else self.ours), "rope_scaling": self.rope}


ATTENTION = {
    "mha": Kind("Llama", {"num_key_value_heads": 4}),
    "gqa": Kind("Llama", GQA),
    "mqa": Kind("Llama", {"num_key_value_heads": 1}),
    "head_dim": Kind("Llama", {**GQA, "head_dim": 12}),
    "bias": Kind("Llama", {**GQA, "attention_bias": True}),
    "window": Kind("Mistral", LOCAL),
    "qkv_bias": Kind("Qwen2", GQA, {**GQA, "attention_bias": True, "output_bias": False}),
    "qk_norm": Kind("Qwen3", {**GQA, "attention_bias": True}, {**GQA, "attention_bias": True, "qk_norm": True}),
}
LATENT = {
    "mla": Kind("DeepseekV3", {"v_head_dim": 8}),
    "mla_lora": Kind("DeepseekV3", {"v_head_dim": 12, "q_lora_rank": 20}),
    "mla_bias": Kind("DeepseekV3", {"v_head_dim": 8, "q_lora_rank": 20, "attention_bias": True}),
    "mla_wide_values": Kind("DeepseekV3", {"v_head_dim": 20}),
}
#: Modules whose logits the oracles do not compute.
OTHERS = {
    "linear": Kind("Llama", GQA, rope={"rope_type": "linear", "factor": 3.0}),
    "dynamic": Kind("Llama", GQA, rope={**YARN, "rope_type": "dynamic"}),
    "yarn": Kind("Llama", GQA, rope=YARN),
    "llama3": Kind("Llama", GQA, rope=LLAMA3),
    "gemma2": Kind(
        "Gemma2",
        {**LOCAL, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 20},
        {**LOCAL, "softcap": 5.0, "scaling": 20**-0.5},
    ),
    "gpt_oss": Kind("GptOss", LOCAL, {**LOCAL, "attention_bias": True, "sinks": True}, {**YARN, "truncate": False}),
    "mla_yarn": Kind(
        "DeepseekV3", {"v_head_dim": 8, "q_lora_rank": 20}, rope={**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}
    ),
}
EVERY = {**ATTENTION, **LATENT, **OTHERS}
KINDS = [*ATTENTION, *LATENT]
MODULES = {"DeepseekV3": "deepseek_v3", "GptOss": "gpt_oss"}


def pair(kind: str) -> tuple[Any, Any, nn.Module]:
    """Our module, Hugging Face's with the same weights, and the latter's rotary embedding."""
    row = EVERY[kind]
    name = MODULES.get(row.family, row.family.lower())
    library = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    make_config = getattr(importlib.import_module("transformers"), f"{row.family}Config")
    rope = {"rope_type": "default", "rope_theta": THETA, **(row.rope or {})}
    length = rope.pop("original_max_position_embeddings") if kind == "dynamic" else 256
    if row.family == "DeepseekV3":
        sizes = {**LATENT_SIZES, "num_key_value_heads": 4, "q_lora_rank": None}
    else:
        sizes = {"head_dim": 8}
    config = make_config(
        **SIZES, **(sizes | row.theirs), rope_parameters=rope, max_position_embeddings=length, num_hidden_layers=1
    )
    config._attn_implementation = "eager"
    theirs = getattr(library, f"{row.family}Attention")(config, layer_idx=0)
    if hasattr(theirs, "sinks"):
        nn.init.normal_(theirs.sinks)
    enlarge(theirs)
    ours = make(kind, rope_theta=THETA)
    ours.load_state_dict(theirs.state_dict())  # strict: the same names and shapes
    return ours, theirs, getattr(library, f"{row.family}RotaryEmbedding")(config)


def make(kind: str, **options: Any) -> Any:
    options = {**SIZES, **EVERY[kind].options, **options}
    is_latent = EVERY[kind].family == "DeepseekV3"
    module = MultiheadLatentAttention(**LATENT_SIZES, **options) if is_latent else Attention(**options)
    enlarge(module)
    return module


def hugging_face(module: nn.Module, rotary: nn.Module, x: Tensor, visible: Tensor, positions: Tensor) -> Tensor:
    hidden = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    return module(x, position_embeddings=rotary(x, positions), attention_mask=hidden)[0]


def near(module: Any, length: int) -> Tensor:
    """The pairs in the window of a module of ours."""
    position = torch.arange(length)
    return (position[:, None] - position).abs() < (module.sliding_window or length)


def right_padding(batch: int, length: int) -> Tensor:
    """Sequences of different lengths."""
    return torch.arange(length) < torch.tensor([[length - 9 * b] for b in range(batch)])


@pytest.mark.parametrize("kind", EVERY)
def test_output_and_gradients_are_hugging_faces(kind: str) -> None:
    ours, theirs, rotary = pair(kind)
    x = torch.randn(2, LENGTH, 32)
    # Hugging Face's own mask, to use its definition of a window.
    make_mask = create_causal_mask if ours.sliding_window is None else create_sliding_window_causal_mask
    positions = torch.arange(LENGTH)[None]
    of_other_releases = {"cache": None, "past_key_values": None, "cache_position": positions[0]}
    known = {name: value for name, value in of_other_releases.items() if name in signature(make_mask).parameters}
    mask = make_mask(theirs.config, x, attention_mask=None, position_ids=positions, **known)
    expected = theirs(x, position_embeddings=rotary(x, positions), attention_mask=mask)[0]
    output = ours(x)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    output.square().mean().backward()
    expected.square().mean().backward()
    gradients = {name: param.grad for name, param in ours.named_parameters()}
    for name, param in theirs.named_parameters():
        torch.testing.assert_close(
            gradients.pop(name), param.grad, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not gradients


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("is_causal", [True, False])
def test_padded_output_is_hugging_faces_at_real_tokens(kind: str, is_causal: bool) -> None:
    ours, theirs, rotary = pair(kind)
    x, padding = torch.randn(3, 30, 32), right_padding(3, 30)
    visible = padding[:, None, None] & near(ours, 30) & (causal(30) if is_causal else True)
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
def test_positions_default_to_counting_from_zero(kind: str) -> None:
    ours, _, _ = pair(kind)
    x = torch.randn(2, 9, 32)
    assert torch.equal(ours(x), ours(x, position_ids=torch.arange(9)[None]))
    assert torch.equal(ours(x), ours(x, position_ids=torch.arange(9).expand(2, 9)))


class Recorder:
    """Collects the maxima that a module reports."""

    def __init__(self, logits: str = "exact") -> None:
        self.logits = logits
        self.maxima: list[Tensor] = []

    def record(self, maxima: Tensor) -> None:
        self.maxima.append(maxima)


def masked(case: str) -> tuple[Tensor, dict[str, Any]]:
    """The pairs that count, and the arguments of a module for them."""
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
    module.max_logits_recorder = Recorder()
    x = torch.randn(3, LENGTH, 32)
    visible, options = masked(case)
    visible = visible & near(module, LENGTH)
    module(x, **options)
    (maxima,) = module.max_logits_recorder.maxima
    expected = module_max_logits(module, x, visible, options.get("position_ids"))
    torch.testing.assert_close(maxima.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_the_log_sum_exp_bounds_them_and_attends_alike(kind: str, case: str) -> None:
    module = make(kind)
    twin = copy.deepcopy(module)
    module.max_logits_recorder, twin.max_logits_recorder = Recorder("lse"), Recorder("exact")
    x = torch.randn(3, LENGTH, 32)
    visible, options = masked(case)
    visible = visible & near(module, LENGTH)
    with pytest.MonkeyPatch.context() as patch:
        if kind != "mla_wide_values":  # values are wider than keys, for which torch has no such kernel
            patch.setattr("lightning_muonclip.kernels.measure.max_logits", None)
        output = module(x, **options)
    expected_output = twin(x, **options)
    torch.testing.assert_close(output, expected_output, rtol=1e-6, atol=1e-6)
    output.square().mean().backward()
    expected_output.square().mean().backward()
    for param, expected in zip(module.parameters(), twin.parameters()):
        torch.testing.assert_close(param.grad, expected.grad, rtol=1e-6, atol=1e-6)
    (bounds,), largest = (
        module.max_logits_recorder.maxima,
        module_max_logits(module, x, visible, options.get("position_ids")),
    )
    if kind == "mla_wide_values":
        assert torch.equal(bounds, twin.max_logits_recorder.maxima[0])
    else:
        assert (bounds > largest).any()
    assert (bounds >= largest - 1e-5 * largest.abs()).all()
    assert (bounds <= largest + math.log(LENGTH) + 1e-5 * largest.abs()).all()


@pytest.mark.parametrize("logits", ["exact", "lse"])
def test_a_batch_of_padding_alone_has_no_maximum(logits: str) -> None:
    module = make("gqa")
    module.max_logits_recorder = Recorder(logits)
    output = module(torch.randn(1, 5, 32), mask=AttentionMask(padding=torch.zeros(1, 5, dtype=torch.bool)))
    assert module.max_logits_recorder.maxima[0].tolist() == [-INF] * 4
    assert output.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_reporting_changes_neither_output_nor_gradients(kind: str) -> None:
    module = make(kind)
    observed = copy.deepcopy(module)
    observed.max_logits_recorder = Recorder()
    x = torch.randn(2, 9, 32)
    outputs = [m(x) for m in (module, observed)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for plain, watched in zip(module.parameters(), observed.parameters()):
        assert torch.equal(plain.grad, watched.grad)
    assert not observed.max_logits_recorder.maxima[0].requires_grad


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_nothing_is_reported_in_evaluation(kind: str) -> None:
    module = make(kind).eval()
    module.max_logits_recorder = Recorder()
    assert module.track is None
    module(torch.randn(2, 9, 32))
    assert module.max_logits_recorder.maxima == []


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_positions_keep_their_precision_in_a_bfloat16_module(kind: str) -> None:
    module = make(kind)
    positions = torch.tensor([[0, 1, 777, 4096]])
    before = module.rotary(positions)
    after = module.bfloat16().rotary(positions)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert module(torch.randn(2, 9, 32, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_a_module_created_on_meta_rotates_correctly() -> None:
    with torch.device("meta"):
        module = Attention(32, 4)
    expected = Attention(32, 4).rotary(torch.arange(9)[None])
    assert torch.equal(module.to_empty(device="cpu").rotary(torch.arange(9)[None])[0], expected[0])


@torch.no_grad()
def naive(
    module: Any, query: Tensor, key: Tensor, value: Tensor, visible: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention one query of one head at a time, for a batch of one, and its logits before the soft-cap; float64."""
    heads, length = query.shape[1:3]
    output = torch.zeros(1, length, heads, value.shape[-1], dtype=torch.float64)
    logits = torch.zeros(heads, length, length, dtype=torch.float64)
    for h in range(heads):
        for i in range(length):
            group = h * key.shape[1] // heads
            row = logits[h, i] = module.scaling * (key[0, group] @ query[0, h, i])
            if module.softcap is not None:
                row = module.softcap * (row / module.softcap).tanh()
            if bias is not None:
                row = row + bias[h, i]
            exponentials = row.exp() * visible[i]
            sink = 0.0 if module.sinks is None else module.sinks[h].double().exp()
            output[0, i, h] = exponentials @ value[0, group].double() / (exponentials.sum() + sink)
    layer = module.o_proj
    return output.flatten(2) @ layer.weight.double().T + (0 if layer.bias is None else layer.bias.double()), logits


@pytest.mark.parametrize("options", [{}, {"sliding_window": 7, "sinks": True}, {"softcap": 3.0, "sinks": True}])
def test_latent_attention_with_all_options_is_that_of_a_loop(options: dict[str, Any]) -> None:
    module = make("mla_lora", **options)
    module.max_logits_recorder = Recorder()
    x = torch.randn(1, 30, 32)
    query, key = latent_queries_and_keys(module, x)
    latent = module.kv_a_layernorm(module.kv_a_proj_with_mqa(x)[..., :16])
    value = module.kv_b_proj(latent).detach().unflatten(-1, (4, -1)).transpose(1, 2)[..., 8:]
    visible = causal(30) & near(module, 30)
    expected, logits = naive(module, query, key, value, visible)
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5)
    largest = logits.masked_fill(~visible, -INF).amax((1, 2))
    torch.testing.assert_close(module.max_logits_recorder.maxima[0].double(), largest, rtol=1e-5, atol=0)


@pytest.mark.parametrize("logits", ["exact", "lse"])
@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_maxima_are_of_the_visible_dot_products_before_soft_cap_and_sinks(kind: str, logits: str) -> None:
    module = make(kind, rope_scaling=None)
    module.max_logits_recorder = Recorder(logits)
    x = torch.randn(2, LENGTH, 32)
    module(x)
    query, key = queries_and_keys(module, x, module.head_dim)
    expected = brute_max_logits(query, key, module.scaling, causal(LENGTH) & near(module, LENGTH))
    torch.testing.assert_close(module.max_logits_recorder.maxima[0].double(), expected, rtol=1e-5, atol=0)


def test_a_score_mod_replaces_rotation() -> None:
    module = make("gqa", rope_theta=None, score_mod=Alibi(4))
    x = torch.randn(1, 30, 32)
    with torch.no_grad():
        layers = (module.q_proj, module.k_proj, module.v_proj)
        query, key, value = (layer(x).double().unflatten(-1, (-1, 8)).transpose(1, 2) for layer in layers)
    distance = torch.arange(30)[:, None] - torch.arange(30)
    bias = -distance * torch.tensor([2**-2, 2**-4, 2**-6, 2**-8], dtype=torch.float64)[:, None, None]
    expected, _ = naive(module, query, key, value, causal(30), bias)
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(module(x), module(x, position_ids=torch.randint(200, (1, 30))))


def test_a_module_keeps_its_window_in_any_mask() -> None:
    module = make("window")
    wide, narrow = copy.deepcopy(module), copy.deepcopy(module)
    wide.sliding_window, narrow.sliding_window = None, 5
    x, padding = torch.randn(3, 30, 32), right_padding(3, 30)
    for is_causal in (True, False):
        mask = AttentionMask(causal=is_causal, padding=padding, window=5)
        expected = wide(x, mask=mask)
        assert torch.equal(module(x, mask=mask), expected)
        assert torch.equal(narrow(x, mask=AttentionMask(causal=is_causal, padding=padding)), expected)


@pytest.mark.parametrize(("windows", "layers"), [([5, None], 3), ((5,), 2), ([None, 3, 9, 4], 3)])
def test_a_model_cycles_windows_over_its_layers(windows: list[int | None], layers: int) -> None:
    attention = partial(Attention, num_attention_heads=4)
    local = GPT(attention, hidden_size=32, num_hidden_layers=layers, sliding_window=windows)
    enlarge(local)
    plain = GPT(attention, hidden_size=32, num_hidden_layers=layers)
    plain.load_state_dict(local.state_dict())
    tokens = torch.randint(256, (2, 30))
    hidden = plain.embed_tokens(tokens)
    for i, layer in enumerate(plain.layers):
        mask = AttentionMask(window=windows[i % len(windows)])
        hidden = hidden + layer.self_attn(layer.input_layernorm(hidden), mask=mask)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    torch.testing.assert_close(local(tokens), plain.lm_head(plain.norm(hidden)), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(local(tokens), plain(tokens), atol=1e-2)


def test_a_model_passes_no_window_unless_given_one() -> None:
    GPT(lambda hidden_size: nn.Linear(hidden_size, hidden_size), num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"sliding_window needs at least one entry, got \[\]; use None for no window"):
        GPT(partial(Attention, num_attention_heads=4), sliding_window=[])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sliding_window": 0},
            "sliding_window must be an integer of at least 1, got 0; use None for no window",
        ),
        ({"softcap": 0.0}, "softcap must be positive, got 0.0; use None for no cap"),
        ({"softcap": -1.0}, "softcap must be positive, got -1.0"),
        ({"backend": "flash"}, "unknown attention backend 'flash'; use one of auto, eager, sdpa, flex"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_type 'linear' needs 'factor'"),
    ],
)
@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_options_out_of_range_are_refused(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(kind, **options)


def test_rope_scaling_without_rotation_is_refused() -> None:
    with pytest.raises(ValueError, match="rope_scaling has no effect with rope_theta=None"):
        Attention(32, 4, rope_theta=None, rope_scaling=YARN)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden_size 30 is not divisible by 4 heads; set head_dim"):
        Attention(30, 4)
    with pytest.raises(ValueError, match="must be a multiple of num_key_value_heads; got 4 and 3"):
        Attention(32, 4, num_key_value_heads=3)
    with pytest.raises(ValueError, match="must be even; got 5"):
        RotaryEmbedding(5)
