"""QKClip.verify accepts correct specs, refuses wrong ones, and changes nothing."""

from __future__ import annotations

import copy
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from drawn import LENGTH, Case, Drawn, cases, other_specs, true_spec
from hypothesis import HealthCheck, given, settings
from oracles import Residual, SdpaAttention, snapshot
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    BartConfig,
    BartModel,
    BloomConfig,
    BloomModel,
    GPTNeoConfig,
    GPTNeoModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lightning_muonclip import Attention, AttentionSpec, MultiheadLatentAttention, Projection, QKClip
from lightning_muonclip.qk_clip.describe.layout import KINDS
from lightning_muonclip.qk_clip.describe.weights import weights_of
from lightning_muonclip.qk_clip.observe.capture import Capture
from lightning_muonclip.qk_clip.verify import Verification

LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 6}
LLAMA = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 11, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def verified(model: nn.Module, *inputs: Any, **options: Any) -> Verification:
    with QKClip(model, **options) as qk_clip:
        return qk_clip.verify(*inputs)


def separate(heads: int, groups: int, dim: int) -> AttentionSpec:
    return AttentionSpec((Projection("q_proj", "q(H d)"), Projection("k_proj", "k(G d)")), heads, groups, {"d": dim})


# Any attention, any mistake


def meaning(module: nn.Module, spec: AttentionSpec) -> set[Any]:
    """The meaning of a spec for every element of every weight. With a single head, dimensions do not matter."""
    said: set[Any] = {(spec.num_heads, spec.num_key_value_heads)}
    projections = spec.gains if spec.qk_norm else spec.projections
    for weight in weights_of(module, "", projections, spec, shared=spec.qk_norm):
        channels = []
        for kind, head in zip((KINDS[kind] for kind in weight.channels.kinds), weight.channels.heads.tolist()):
            heads = spec.num_heads if kind.startswith("q") else spec.num_key_value_heads
            channels.append((kind, 0 if heads == 1 or kind == "*" else head))
        if len(set(channels)) == 1:
            said.add((weight.path, channels[0], weight.offset))
        else:
            said |= {(weight.path, weight.dims, i, c, weight.offset) for i, c in enumerate(channels) if c[0] != "*"}
    return said


def may_scale_alike(case: Case, note: str, spec: AttentionSpec) -> bool:
    """Whether a wrong spec may scale the logits as it should: it takes a part that is its head's own for a rotated one."""
    return note == "both split elsewhere" and spec.sizes["m"] < case.nope


def some(case: Case, count: int) -> Iterator[tuple[str, AttentionSpec]]:
    """Some mistakes, each of another kind."""
    chance = random.Random(case.seed)
    kinds: dict[str, list[AttentionSpec]] = {}
    for note, other in other_specs(case):
        kinds.setdefault(note, []).append(other)
    for note in chance.sample(sorted(kinds), min(count, len(kinds))):
        yield note, chance.choice(kinds[note])


def try_all(case: Case, others: Iterator[tuple[str, AttentionSpec]], tried: Counter[str]) -> None:
    """The correct spec and equivalent ones are accepted, all others are refused."""
    torch.manual_seed(case.seed)
    module, x = Drawn(case), torch.randn(2, LENGTH, case.hidden)
    spec = true_spec(case)
    verified(module, x, specs={"": spec}, qk_norm="gain")
    tried["right"] += 1
    for note, other in others:
        try:
            is_right = meaning(module, other) == meaning(module, spec)
        except ValueError:  # not even the shapes fit
            with pytest.raises(ValueError, match=r"describes|has a key for each|is out of range|does not determine"):
                QKClip(module, specs={"": other}, qk_norm="gain")
            tried["of another shape"] += 1
            continue
        if may_scale_alike(case, note, other):
            continue
        if is_right:  # only another way to say it
            verified(module, x, specs={"": other}, qk_norm="gain")
            tried["right in other words"] += 1
            continue
        tried["wrong"] += 1
        tried[note] += 1
        with pytest.raises(ValueError, match=r"does not describe its attention|its spec says"):
            pytest.fail(f"{note} was accepted: {other}\n{verified(module, x, specs={'': other}, qk_norm='gain')}")


def test_of_any_attention_the_right_spec_is_accepted_and_every_wrong_one_refused() -> None:
    tried: Counter[str] = Counter()

    @settings(max_examples=90, database=None, suppress_health_check=list(HealthCheck))
    @given(cases())
    def run(case: Case) -> None:
        try_all(case, some(case, 5), tried)

    run()
    assert tried["right"] >= 80 and tried["wrong"] >= 150 and tried["right in other words"] >= 4, tried
    assert len(tried) >= 25, tried


TYPICAL = {
    "llama": Case("separate", 6, 3, 4),
    "mqa with biases": Case("separate", 4, 1, 3, bias="zero", by_parameter=True),
    "gpt2": Case("concatenated", 4, 4, 2, bias="zero", by_parameter=True, transposed=True, square=True),
    "phi3": Case("concatenated", 6, 3, 4),
    "mqa, values before keys": Case("concatenated", 4, 1, 4, order=("q", "v", "k"), bias="zero"),
    "mqa, keys before values": Case("concatenated", 4, 1, 4, bias="random", scale=1e3),
    "neox": Case("interleaved", 3, 3, 4, bias="zero", square=True),
    "falcon": Case("grouped", 6, 2, 4, seed=1),
    "d-major": Case("concatenated", 6, 3, 4, d_major=True, bias="zero", by_parameter=True),
    "deepseek": Case("latent", 3, 3, 4),
    "deepseek, turned": Case("latent", 3, 3, 4, order=("v", "q", "k"), bias="zero", by_parameter=True),
    "qwen3": Case("separate", 4, 2, 4, gains="shared"),
    "gemma3": Case("separate", 4, 2, 4, gains="shared", offset=1.0),
    "olmo2": Case("concatenated", 4, 2, 4, gains="head"),
}


@pytest.mark.parametrize("kind", TYPICAL)
def test_every_mistake_with_a_typical_attention_is_noticed(kind: str) -> None:
    tried: Counter[str] = Counter()
    try_all(TYPICAL[kind], other_specs(TYPICAL[kind]), tried)
    expected = {
        "llama": {"heads turned", "number of heads"},
        "mqa with biases": {"bias left out", "one bias left out", "heads turned"},
        "gpt2": {"dim", "bias left out", "d too small", "values as keys", "interleaved by something else", "order"},
        "phi3": {"d too large", "d too small", "number of key heads", "interleaved by something else", "order"},
        "mqa, values before keys": {"order", "number of heads"},
        "mqa, keys before values": {"keys and values as keys"},
        "neox": {"q and k swapped", "order", "interleaved by something else", "dim"},
        "falcon": {"order", "interleaved by something else", "values as keys"},
        "d-major": {"heads turned", "one bias left out"},
        "deepseek": {"parts of the query swapped", "keys split elsewhere", "both split elsewhere", "all rotated"},
        "deepseek, turned": {"keys and values swapped", "values only", "no rotated part", "bias left out"},
        "qwen3": {"offset 1.0", "the norm is missing", "number of key heads"},
        "gemma3": {"offset 0.0", "the norm is missing"},
        "olmo2": {"gains turned", "offset 1.0", "the norm is missing"},
    }
    assert expected[kind] <= set(tried), tried


class Fused(nn.Module):
    """``[q | k | v]`` in one weight; a bias that is zero, as it is at the start of training."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.qkv = nn.Linear(size, 3 * size)
        nn.init.zeros_(self.qkv.bias)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, -1)).transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)


def fused(layout: str, *names: str) -> dict[str, AttentionSpec]:
    return {"layers.1": AttentionSpec(tuple(Projection(name, layout) for name in names), 2, sizes={"d": 4})}


CONCATENATED = "[q(H d) | k(G d) | *]"


def test_a_refusal_names_the_layer_the_head_what_was_expected_and_what_was_found() -> None:
    model, x = Residual(SdpaAttention(8, 2), Fused()), torch.randn(2, 5, 8)
    assert len(verified(model, x, specs=fused(CONCATENATED, "qkv")).proofs) == 2
    with pytest.raises(ValueError, match="a spec does not describe its attention") as error:
        verified(model, x, specs=fused("[q(d H) | k(d H) | *]", "qkv"))
    first = str(error.value).splitlines()[1]
    shown = re.fullmatch(
        r"    layers.1: the queries of head 0 should be multiplied by ([\d.]+), but are by ([\d.]+) \(off by .*\)",
        first,
    )
    assert shown is not None and abs(float(shown[1]) - float(shown[2])) > 0.01
    assert "Correct the layout, the sizes or the number of heads" in str(error.value)


def test_a_bias_of_zeros_that_is_left_out_is_missed() -> None:
    model, x = Residual(SdpaAttention(8, 2), Fused()), torch.randn(2, 5, 8)
    verified(model, x, specs=fused(CONCATENATED, "qkv.weight", "qkv.bias"))
    with pytest.raises(ValueError, match=r"layers.1: the queries of head 0 should [\s\S]* must also cover every bias"):
        verified(model, x, specs=fused(CONCATENATED, "qkv.weight"))


def test_swapped_queries_and_keys_are_detected() -> None:
    model, x = Residual(SdpaAttention(8, 2), Fused()), torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match=r"layers.1: the queries of head 0 should be multiplied by"):
        verified(model, x, specs=fused("[k(H d) | q(H d) | *]", "qkv"))


def test_values_among_the_keys_are_noticed() -> None:
    case = Case("concatenated", heads=2, groups=1, dim=3)
    spec = replace(true_spec(case), projections=(Projection("qkv", "[q(H d) | k(G 2·d)]"),))
    with pytest.raises(ValueError, match=r"\(model\): the values should not change when queries and keys are scaled"):
        verified(Drawn(case), torch.randn(2, 5, 7), specs={"": spec})


def test_wrong_numbers_of_heads_are_named() -> None:
    model, x = Residual(SdpaAttention(16, 4, 2)), torch.randn(2, 5, 16)
    with pytest.raises(ValueError, match=r"attention 'layers.0' computed 4 heads, but its spec says 2"):
        verified(model, x, specs={"layers.0": separate(2, 1, 8)})
    case = Case("separate", heads=4, groups=2, dim=4, gains="shared")
    spec = replace(true_spec(case), num_key_value_heads=4, sizes={"d": 4}, projections=())
    with pytest.raises(
        ValueError, match=r"4 query heads share 2 key heads, but its spec says 4; correct num_key_value"
    ):
        verified(Drawn(case), torch.randn(2, 5, 7), specs={"": spec}, qk_norm="gain")


class Unseen(nn.Module):
    """Reports its maxima itself, and attends in a way that cannot be seen."""

    max_logits_recorder: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key = (projection(x).unflatten(-1, (2, 2)).transpose(1, 2) for projection in (self.q_proj, self.k_proj))
        maxima = (query @ key.mT).amax((0, 2, 3))
        if self.max_logits_recorder is not None:
            self.max_logits_recorder.record(maxima)
        return x


def test_attention_that_cannot_be_seen_is_not_proven() -> None:
    with pytest.raises(ValueError, match=r"attention '' cannot be verified: run alone, it makes no attention call"):
        verified(Unseen(), torch.randn(2, 5, 4), specs={"": separate(2, 2, 2)})


# Attention of every kind


def llama(**options: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**LLAMA, **HEADS, **options))


def tokens() -> Tensor:
    return torch.randint(11, (2, 6))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Attention(16, 4, 2, attention_bias=True),
        lambda: MultiheadLatentAttention(16, 4, **LATENT, q_lora_rank=6, attention_bias=True),
        lambda: SdpaAttention(16, 4, 2),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2),
    ],
    ids=["ours", "ours_latent", "third_party", "torch"],
)
@pytest.mark.parametrize("training", [True, False])
def test_known_attention_is_accepted_in_training_and_in_evaluation(
    make: Callable[[], nn.Module], training: bool
) -> None:
    model = make().train(training)
    found = verified(model, torch.randn(2, 5, 16))
    assert found.proofs and max(proof.error for proof in found.proofs) < 1e-12
    assert {proof.scaled for proof in found.proofs} == {"q and k"}
    assert all(module.training == training for module in model.modules())


def test_verification_keeps_torchs_encoder_off_its_fast_path() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2).eval()
    padding = torch.arange(5) >= torch.tensor([[5], [3]])
    with QKClip(model) as qk_clip:
        assert len(qk_clip.verify(torch.randn(2, 5, 16), src_key_padding_mask=padding).proofs) == 2


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_cache_among_the_arguments_is_the_same_for_every_experiment(implementation: str) -> None:
    model = llama(attn_implementation=implementation)
    assert model.config.use_cache
    found = verified(model, tokens())
    assert {proof.layer for proof in found.proofs} == {"model.layers.0.self_attn", "model.layers.1.self_attn"}


GPT_NEO = {"vocab_size": 11, "hidden_size": 16, "num_layers": 1, "num_heads": 4, "attention_types": [[["global"], 1]]}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Attention(16, 4, 2),
        lambda: SdpaAttention(16, 4, 2),
        lambda: nn.MultiheadAttention(16, 4, batch_first=True),
        lambda: BloomModel(BloomConfig(vocab_size=11, hidden_size=16, n_layer=1, n_head=4)).h[0].self_attention,
        lambda: GPTNeoModel(GPTNeoConfig(**GPT_NEO)).h[0].attn.attention,
    ],
    ids=["by itself", "function", "torch", "baddbmm", "by hand"],
)
def test_attention_of_every_source_is_proven(make: Callable[[], Any]) -> None:
    module, x = make(), torch.randn(2, 5, 16)
    arguments: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "MultiheadAttention": ([x, x, x], {}),
        "BloomAttention": ([x, x, torch.zeros(8, 1, 5), None], {}),
    }
    args, kwargs = arguments.get(type(module).__name__, ([x], {}))
    with QKClip(module) as qk_clip:
        [proof] = qk_clip.verify(*args, **kwargs).proofs
        by_hand = any(spec.softmaxes for _, spec in qk_clip.observer.attention.values())
    assert (proof.num_heads, proof.scaled) == (4, "q and k")
    assert by_hand == (type(module).__name__ in ("BloomAttention", "GPTNeoSelfAttention"))


@pytest.mark.parametrize("make", [lambda: SdpaAttention(16, 4, 2), lambda: Attention(16, 4)], ids=["third", "ours"])
def test_inputs_may_be_captured_in_a_compiled_forward(make: Callable[[], nn.Module]) -> None:
    torch.compiler.reset()
    model, x = torch.compile(Residual(make()), backend="eager", fullgraph=True), torch.randn(2, 5, 16)
    with QKClip(model, example=((x,), {})) as qk_clip:
        qk_clip.step()  # the first is not compiled
        capture = Capture(qk_clip.observer)
        model(x)
        capture.close()
        assert {proof.layer for proof in qk_clip.verify_inputs(capture).proofs} == {"layers.0"}
    torch.compiler.reset()


def test_inputs_may_be_captured_in_a_forward_that_is_trained() -> None:
    model = llama()
    with QKClip(model, example=((tokens(),), {})) as qk_clip:
        capture = Capture(qk_clip.observer)
        loss = model(tokens()).logits.square().mean()
        capture.close()
        assert not any(p.requires_grad for p in capture.frames["model.layers.1.self_attn"].args)
        assert len(qk_clip.verify_inputs(capture).proofs) == 2
        loss.backward()
        assert qk_clip.step().max_logits.isfinite().all()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_under_mixed_precision_inputs_may_be_captured_and_verified_outside(qk_norm: bool) -> None:
    model = Residual(SdpaAttention(16, 4, 2), Attention(16, 4, qk_norm=qk_norm))
    with QKClip(model, qk_norm="gain", example=((torch.randn(2, 5, 16),), {})) as qk_clip:
        with Capture(qk_clip.observer) as capture, torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(2, 5, 16, dtype=torch.bfloat16))
            loss = model(torch.randn(2, 5, 16)).square().mean()  # autocast keeps the weights that it has cast
            qk_clip.verify_inputs(capture)
        assert len(qk_clip.verify_inputs(capture).proofs) == 2
        with torch.autocast("cpu", torch.bfloat16):
            qk_clip.verify(torch.randn(2, 5, 16))
        assert not any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
        loss.backward()


class HalfOnly(SdpaAttention):
    """Attends in bfloat16 whatever the dtype of its weights, as flash attention does, and refuses inputs of another."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype is self.q_proj.weight.dtype
        parts = (p(x).bfloat16() for p in (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in parts)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_kernels_that_know_only_half_precision(dtype: torch.dtype) -> None:
    # Half precision is too coarse for inference, not for the proof of a spec.
    found = verified(HalfOnly(16, 4).to(dtype), torch.randn(2, 5, 16, dtype=dtype), specs={"": separate(4, 4, 4)})
    assert max(proof.error for proof in found.proofs) < 2**-7  # bfloat16 rounds by that much
    turned = replace(separate(4, 4, 4), projections=(Projection("q_proj", "q(d H)"), Projection("k_proj", "k(G d)")))
    with pytest.raises(ValueError, match="does not describe"):
        verified(HalfOnly(16, 4).to(dtype), torch.randn(2, 5, 16, dtype=dtype), specs={"": turned})


def test_cross_attention_is_verified_on_what_it_attends_to() -> None:
    ends = {"layers": 1, "attention_heads": 4, "ffn_dim": 16}
    both = {f"{end}_{name}": value for end in ("encoder", "decoder") for name, value in ends.items()}
    model = BartModel(BartConfig(vocab_size=11, d_model=16, **both))
    with QKClip(model) as qk_clip:
        found = qk_clip.verify(input_ids=tokens(), decoder_input_ids=tokens()[:, :3])
    assert [proof.layer for proof in found.proofs if "encoder_attn" in proof.layer]


class Cross(nn.Module):
    """Attends to something else than it is asked from."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor, *, memory: Tensor) -> Tensor:
        parts = self.q_proj(x), self.k_proj(memory), self.v_proj(memory)
        query, key, value = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in parts)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def test_arguments_by_name_are_captured() -> None:
    with QKClip(Cross()) as qk_clip:
        assert qk_clip.verify(torch.randn(2, 5, 8), memory=torch.randn(2, 9, 6)).proofs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_in_every_precision(dtype: torch.dtype, offset: float) -> None:
    model, x = Residual(SdpaAttention(16, 4, 2), Attention(16, 4)).to(dtype), torch.randn(2, 5, 16, dtype=dtype)
    verified(model, x)
    case = Case("separate", heads=4, groups=2, dim=4, gains="head", offset=offset)
    module, x = Drawn(case).to(dtype), torch.randn(2, 5, 7, dtype=dtype)
    verified(module, x, specs={"": true_spec(case)}, qk_norm="gain")
    other = true_spec(replace(case, offset=1 - offset))
    with pytest.raises(ValueError, match="does not describe"):
        verified(module, x, specs={"": other}, qk_norm="gain")


def test_huge_and_tiny_weights_hide_no_bias() -> None:
    for scale in (1e-4, 1e4):
        model, x = Residual(SdpaAttention(8, 2), Fused()), torch.randn(2, 5, 8)
        with torch.no_grad():
            model.layers[1].qkv.weight.mul_(scale)
        with pytest.raises(ValueError, match="does not describe"):
            verified(model, x, specs=fused(CONCATENATED, "qkv.weight"))


class Dropping(SdpaAttention):
    """Drops out what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, self.training))


class Skipping(Residual):
    """Leaves out layers in training, as LayerDrop does."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else super().forward(x)


def test_randomness_in_the_model_does_not_matter() -> None:
    model = Skipping(Dropping(16, 4), Dropping(16, 4, 2))
    assert len({proof.layer for proof in verified(model, torch.randn(2, 5, 16)).proofs}) == 2


def test_values_recomputed_in_every_forward_are_accepted() -> None:
    for norm in (nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm):
        module = SdpaAttention(16, 4, 2)
        norm(module.v_proj)
        verified(module, torch.randn(2, 5, 16))


def test_a_weight_that_makes_queries_and_keys_is_proven_as_both() -> None:
    model, x = Residual(SdpaAttention(16, 4), Attention(16, 4)), torch.randn(2, 5, 16)
    for layer in model.layers:
        layer.k_proj = layer.q_proj
    assert len(verified(model, x).proofs) == 2
    spec = replace(separate(4, 4, 4), projections=(Projection("q_proj", "q(H d)"), Projection("k_proj", "k(d H)")))
    with pytest.raises(
        ValueError, match=r"uses one weight as q_proj.weight and k_proj.weight, but with different heads"
    ):
        verified(model, x, specs={"layers.0": spec})


def test_a_compiled_model_is_verified_as_it_was_written_and_stays_compiled() -> None:
    torch.compiler.reset()
    graphs: list[Any] = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model, x = Residual(SdpaAttention(16, 4, 2), Attention(16, 4)), torch.randn(2, 5, 16)
    compiled = torch.compile(model, backend=backend)
    with QKClip(compiled) as qk_clip:
        compiled(x)
        qk_clip.step()  # what comes before is not compiled
        compiled(x)
        before, count = qk_clip.max_logits, len(graphs)
        assert before.isfinite().all() and count
        assert {proof.layer for proof in qk_clip.verify(x).proofs} == {"layers.0", "layers.1"}
        assert torch.equal(qk_clip.max_logits, before)
        compiled(x)
        assert len(graphs) == count
    torch.compiler.reset()


def test_the_magnitude_of_weight_norm_can_be_named_instead_of_the_weight() -> None:
    module, x = SdpaAttention(16, 4, bias=False), torch.randn(2, 5, 16)
    for child in (module.q_proj, module.k_proj):
        nn.utils.parametrizations.weight_norm(child)
    names = "q_proj.parametrizations.weight.original0", "k_proj.parametrizations.weight.original0"
    projections = Projection(names[0], "q(H d)"), Projection(names[1], "k(G d)")
    spec = AttentionSpec(projections, 4, sizes={"d": 4})
    verified(module, x, specs={"": spec})
    direction = replace(projections[0], name=names[0].replace("0", "1"))
    with pytest.raises(ValueError, match="does not describe"):
        verified(module, x, specs={"": replace(spec, projections=(direction, projections[1]))})


# What is not verified, and why


def test_layers_that_are_only_watched_are_listed_so() -> None:
    model = Residual(SdpaAttention(16, 4, 2), Attention(16, 4, qk_norm=True))
    found = verified(model, torch.randn(2, 5, 16), qk_norm="monitor")
    assert found.watched == {"layers.1": "QK-norm"}
    assert {proof.layer for proof in found.proofs} == {"layers.0"}
    assert str(found).splitlines() == [
        "layer     heads  proven            worst error",
        f"layers.0  4      q and k           {found.proofs[0].error:.1e}",
        "layers.1         nothing: QK-norm",
    ]
    assert not verified(model, torch.randn(2, 5, 16), qk_norm="gain").watched


def test_a_gain_of_all_heads_is_verified_at_once() -> None:
    found = verified(Attention(16, 4, 2, qk_norm=True), torch.randn(2, 5, 16), qk_norm="gain")
    assert [(proof.num_heads, proof.scaled) for proof in found.proofs] == [(4, "q and k")]


def test_gains_of_every_head_may_stand_beside_one_that_all_share() -> None:
    class Normed(SdpaAttention):
        def __init__(self) -> None:
            super().__init__(16, 4, 2)
            self.of_heads, self.of_all = nn.Parameter(torch.rand(4, 1, 4)), nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor) -> Tensor:
            parts = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
            query, key, value = parts
            query, key = (F.rms_norm(part, (4,)) * gain for part, gain in ((query, self.of_heads), (key, self.of_all)))
            return F.scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2).flatten(2)

    gains = Projection("of_heads", "q(H d)", dim=(0, 2)), Projection("of_all", "k(d)")
    spec = replace(separate(4, 2, 4), qk_norm=True, gains=gains)
    [proof] = verified(Normed(), torch.randn(2, 5, 16), specs={"": spec}, qk_norm="gain").proofs
    assert proof.scaled == "q and k"


@pytest.mark.parametrize("options", [{"logits": "off"}, {"logits": "lse"}, {"threshold": None}, {"every_n_steps": 3}])
def test_with_every_way_to_observe(options: dict[str, Any]) -> None:
    model, x = Residual(SdpaAttention(16, 4, 2), Attention(16, 4)), torch.randn(2, 5, 16)
    with QKClip(model, **options, example=((x,), {})) as qk_clip:
        qk_clip.step([[1.0] * 4] * 2)  # of three steps the first
        recorder, handles = model.layers[1].max_logits_recorder, len(model.layers[0]._forward_hooks)
        assert len(qk_clip.verify(x).proofs) == 2
        assert model.layers[1].max_logits_recorder is recorder
        assert len(model.layers[0]._forward_hooks) == handles
        assert qk_clip.max_logits.isneginf().all()
    with pytest.raises(ValueError, match=r"attention 'layers.0' computed 4 heads, but its spec says 2"):
        verified(model, x, specs={"layers.0": separate(2, 1, 8)}, **options)


def test_what_is_only_watched_need_not_be_possible_to_scale() -> None:
    model, x = (
        Residual(*(SdpaAttention(16, 4) for _ in range(3)), Attention(16, 4, qk_norm=True)),
        torch.randn(2, 5, 16),
    )
    nn.utils.parametrizations.weight_norm(model.layers[1].k_proj)
    found = verified(model, x, threshold=None, specs={"layers.1": separate(4, 4, 4)})
    assert found.watched == {"layers.1": "k_proj.weight is parametrized", "layers.3": "QK-norm"}
    assert {proof.layer for proof in found.proofs} == {"layers.0", "layers.2"}


def test_a_layer_that_was_not_used_is_an_error() -> None:
    class Partly(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x)

    model = Partly(SdpaAttention(16, 4), SdpaAttention(16, 4))
    with pytest.raises(ValueError, match=r"attention 'layers.1' was not used in this forward"):
        verified(model, torch.randn(2, 5, 16), specs={"layers.1": separate(4, 4, 4)})


@pytest.mark.parametrize("make", [lambda: SdpaAttention(16, 4, bias=False), lambda: Attention(16, 4)])
def test_on_zeros_nothing_can_be_verified(make: Callable[[], nn.Module]) -> None:
    model = Residual(make())
    with pytest.raises(ValueError, match=r"'layers.0'.*: the queries of head 0 are (all )?zero on these inputs"):
        verified(model, torch.zeros(2, 5, 16))


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_sharded_weights_are_proven() -> None:
    model, x = Residual(SdpaAttention(16, 4), SdpaAttention(16, 4)), torch.randn(2, 5, 16)
    fully_shard(model.layers[1], mesh=init_device_mesh("cpu", (1,)))
    specs = {f"layers.{i}": separate(4, 4, 4) for i in range(2)}
    assert max(proof.error for proof in verified(model, x, specs=specs).proofs) < 1e-12
    turned = replace(separate(4, 4, 4), projections=(Projection("q_proj", "q(d H)"), Projection("k_proj", "k(G d)")))
    with pytest.raises(ValueError, match=r"layers.1: the queries of head 0 should be multiplied"):
        verified(model, x, specs={**specs, "layers.1": turned})


def test_keys_that_something_else_uses_are_refused() -> None:
    class Handing(nn.Module):
        """The second layer attends to the keys of the first."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = SdpaAttention(16, 4), SdpaAttention(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            keys = self.first.k_proj(x)
            parts = self.second.q_proj(y), keys, self.second.v_proj(y)
            heads = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in parts)
            return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    with pytest.raises(ValueError, match="first: its keys are used elsewhere in the model too"):
        verified(Handing(), torch.randn(2, 5, 16), specs={"first": separate(4, 4, 4)}, unknown="monitor")


def test_an_output_that_queries_change_by_themselves_is_noticed() -> None:
    class Gated(SdpaAttention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.q_proj(x).sigmoid()

    with pytest.raises(ValueError, match="outputs that do not depend on queries and keys should not change"):
        verified(Residual(Gated(16, 4)), torch.randn(2, 5, 16), specs={"layers.0": separate(4, 4, 4)})


def test_clamped_queries_are_refused() -> None:
    class Clamping(SdpaAttention):
        def forward(self, x: Tensor) -> Tensor:
            parts = (p(x).clamp(-50, 50) for p in (self.q_proj, self.k_proj, self.v_proj))
            heads = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in parts)
            return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    with pytest.raises(ValueError, match="its queries or keys are clamped"):
        verified(Residual(Clamping(16, 4)), torch.randn(2, 5, 16), specs={"layers.0": separate(4, 4, 4)})


# It leaves no trace


class Counting(nn.Module):
    """A forward updates buffers and replaces one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        self.total.add_(1)
        return F.dropout(self.norm(x.transpose(1, 2)).transpose(1, 2), 0.1, training=True)


def test_nothing_is_changed() -> None:
    model = Residual(Counting(), SdpaAttention(16, 4, 2), Attention(16, 4), nn.Dropout(0.5), Fused(16))
    model.layers[1].eval()
    model.layers[3].train(False)
    model.layers[2].q_proj.weight.requires_grad_(False)
    calls: list[Any] = []
    model.layers[1].register_forward_hook(lambda *_: calls.append("attention"))
    model.layers[1].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    x = torch.randn(2, 5, 16)
    specs = {"layers.4": AttentionSpec((Projection("qkv", CONCATENATED),), 2, sizes={"d": 8})}
    with QKClip(model, specs=specs) as qk_clip:
        model(x).sum().backward()
        qk_clip.step()
        model(x)
        calls.clear()
        state, objects = snapshot(model), [id(t) for t in (*model.parameters(), *model.buffers())]
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        modes = [module.training for module in model.modules()]
        hooks = [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()]
        seen, last, random_state = qk_clip.max_logits, qk_clip.observer.ledger.last_step.clone(), torch.get_rng_state()
        functions = F.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()
        found = qk_clip.verify(x)
        assert {proof.layer for proof in found.proofs} == {"layers.1", "layers.2", "layers.4"}
        assert set(calls) == {"attention"} and len(calls) == 3  # by forwards of the model, not of modules alone
        assert torch.equal(torch.get_rng_state(), random_state)
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        assert objects == [id(t) for t in (*model.parameters(), *model.buffers())]
        now = [p.grad for p in model.parameters()]
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(gradients, now))
        assert modes == [module.training for module in model.modules()]
        assert hooks == [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()]
        assert torch.equal(qk_clip.max_logits, seen) and torch.equal(qk_clip.observer.ledger.last_step, last)
        assert functions == (F.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled())
        assert not model.layers[2].q_proj.weight.requires_grad
        model(x)
        assert (qk_clip.max_logits >= seen).all()


def test_nothing_is_changed_by_a_refusal_or_an_error_either() -> None:
    model, x = Residual(SdpaAttention(16, 4, 2), Attention(16, 4)), torch.randn(2, 5, 16)
    twin = copy.deepcopy(model)
    with QKClip(model, specs={"layers.0": separate(4, 2, 4)}, example=((x,), {})) as qk_clip:
        before = [(list(m._forward_hooks), list(m._forward_pre_hooks), m.training) for m in model.modules()]
        function = F.scaled_dot_product_attention
        wrong = replace(separate(4, 2, 4), projections=(Projection("q_proj", "q(d H)"), Projection("k_proj", "k(G d)")))
        qk_clip.observer.attention["layers.0"] = (model.layers[0], wrong)
        for inputs, message in ((x, "does not describe"), (torch.randn(2, 5, 17), "shapes cannot be multiplied")):
            with pytest.raises((ValueError, RuntimeError), match=message):
                qk_clip.verify(inputs)
            after = [(list(m._forward_hooks), list(m._forward_pre_hooks), m.training) for m in model.modules()]
            assert before == after and F.scaled_dot_product_attention is function
        assert qk_clip.max_logits.isneginf().all()
        model(x)
        with QKClip(twin) as other:
            twin(x)
            assert torch.equal(other.max_logits, qk_clip.max_logits)
