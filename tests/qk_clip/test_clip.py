"""QKClip: the effect of a step on weights, and on nothing else."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import (
    INF,
    Residual,
    SdpaAttention,
    between,
    enlarge,
    policy_factors,
    snapshot,
    true_maxima,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_muonclip import Attention, AttentionSpec, MultiheadLatentAttention, Projection, QKClip
from lightning_muonclip.qk_clip.rule import SHARED_KEYS

ALPHAS = [0.0, 0.25, 0.5, 1.0]
LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 6}

MODULES: dict[str, Callable[[], Any]] = {
    "mha": lambda: Attention(16, 4),
    "mha_bias": lambda: Attention(16, 4, attention_bias=True),
    "gqa": lambda: Attention(16, 4, num_key_value_heads=2),
    "gqa_bias": lambda: Attention(16, 4, num_key_value_heads=2, attention_bias=True, head_dim=6),
    "mqa": lambda: Attention(16, 4, num_key_value_heads=1),
    "mqa_bias": lambda: Attention(16, 4, num_key_value_heads=1, attention_bias=True),
    "mla": lambda: MultiheadLatentAttention(16, 4, **LATENT),
    "mla_lora_bias": lambda: MultiheadLatentAttention(16, 4, **LATENT, q_lora_rank=6, attention_bias=True),
    "third_party": lambda: SdpaAttention(16, 4, 2),
}
every_module = pytest.mark.parametrize("kind", MODULES)


def make(kind: str) -> Any:
    module = MODULES[kind]()
    enlarge(module)
    return module


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=0)


def same(before: dict[str, Tensor], after: dict[str, Tensor], names: Any = None) -> bool:
    return all(torch.equal(before[name], after[name]) for name in names or before)


# The replay: the same batch again, without an update between


@every_module
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("shared_keys", ["query", "compensate"])
def test_a_replay_has_the_threshold_as_its_maximum(kind: str, alpha: float, shared_keys: str) -> None:
    module, x = make(kind), torch.randn(3, 9, 16)
    before = true_maxima(module, x)
    threshold = between(before)
    with QKClip(module, threshold, alpha, shared_keys=shared_keys) as qk_clip:
        module(x)
        result = qk_clip.step()
        close(result.max_logits[0], before)
        assert result.clipped_heads == 2
        close(true_maxima(module, x), before.clamp(max=threshold))
        module(x)
        close(qk_clip.max_logits[0], before.clamp(max=threshold))


@pytest.mark.parametrize("shared_keys", ["group", "min_k"])
@pytest.mark.parametrize(("kind", "groups"), [("gqa", 2), ("gqa_bias", 2), ("mqa", 1), ("third_party", 2)])
def test_megatrons_policies_clip_siblings_more_than_they_need(kind: str, groups: int, shared_keys: str) -> None:
    module, x = make(kind), torch.randn(3, 9, 16)
    before = true_maxima(module, x)
    threshold = float(before.sort().values[-2])
    with QKClip(module, threshold, shared_keys=shared_keys) as qk_clip:
        module(x)
        qk_clip.step()
    after = true_maxima(module, x)
    worst = before.argmax()
    close(after[worst], torch.tensor(threshold))
    group = torch.arange(4) // (4 // groups)
    siblings = (group == group[worst]) & (torch.arange(4) != worst)
    assert (before[siblings] <= threshold).all()
    assert (after[siblings].abs() < 0.999 * before[siblings].abs()).all()


@pytest.mark.parametrize("kinds", [["mha_bias", "mha", "gqa"], ["mla", "mqa_bias", "mla_lora_bias"]])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_replay_of_several_layers_that_cannot_change_each_other(kinds: list[str], alpha: float) -> None:
    model = Residual(*(make(kind) for kind in kinds))
    for layer in model.layers:
        for param in layer.o_proj.parameters():
            nn.init.zeros_(param)
    x = torch.randn(3, 9, 16)
    before = torch.stack([true_maxima(layer, x) for layer in model.layers])
    threshold = between(before)
    with QKClip(model, threshold, alpha) as qk_clip:
        model(x)
        close(qk_clip.step().max_logits, before)
        model(x)
        close(qk_clip.max_logits, before.clamp(max=threshold))


def test_layers_with_different_numbers_of_heads() -> None:
    model = Residual(Attention(16, 2), MultiheadLatentAttention(16, 4, **LATENT), Attention(16, 8, 2))
    enlarge(model)
    for layer in model.layers:
        nn.init.zeros_(layer.o_proj.weight)
    x = torch.randn(3, 9, 16)
    before = [true_maxima(layer, x) for layer in model.layers]
    threshold = between(torch.cat(before))
    with QKClip(model, threshold) as qk_clip:
        model(x)
        result = qk_clip.step()
        assert result.clipped_heads == sum(int((maxima > threshold).sum()) for maxima in before)
        model(x)
        for row, maxima in zip(qk_clip.max_logits, before):
            close(row[: len(maxima)], maxima.clamp(max=threshold))
            assert row[len(maxima) :].isneginf().all()


# Which numbers are multiplied, and by what


@pytest.mark.parametrize("shared_keys", SHARED_KEYS)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("kind", ["mha_bias", "gqa_bias", "mqa_bias", "third_party"])
def test_rows_and_biases_take_the_factors_of_their_heads(kind: str, alpha: float, shared_keys: str) -> None:
    module, x = make(kind), torch.randn(3, 9, 16)
    before = snapshot(module)
    with QKClip(module, between(true_maxima(module, x)), alpha, shared_keys=shared_keys) as qk_clip:
        module(x)
        maxima = qk_clip.step().max_logits[0]
        threshold = qk_clip.threshold
    dim = before["q_proj.weight"].shape[0] // 4
    groups = before["k_proj.weight"].shape[0] // dim
    query, key = policy_factors(maxima.tolist(), threshold, alpha, groups, shared_keys)
    after = module.state_dict()
    for name, factors in (("q_proj", query), ("k_proj", key)):
        for head, factor in enumerate(factors):
            rows = slice(head * dim, (head + 1) * dim)
            for kind_of_param in ("weight", "bias"):
                old, new = (state[f"{name}.{kind_of_param}"][rows] for state in (before, after))
                if factor == 1.0:
                    assert torch.equal(new, old)
                else:
                    torch.testing.assert_close(new, old * factor, rtol=1e-6, atol=0)
    others = [name for name in before if not name.startswith(("q_proj", "k_proj"))]
    assert any(name.startswith("v_proj") for name in others)
    assert same(before, after, others)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("kind", ["mla", "mla_lora_bias"])
def test_of_latent_attention_the_shared_key_and_the_values_stay(kind: str, alpha: float) -> None:
    module, x = make(kind), torch.randn(3, 9, 16)
    before = snapshot(module)
    threshold = between(true_maxima(module, x))
    with QKClip(module, threshold, alpha) as qk_clip:
        module(x)
        maxima = qk_clip.step().max_logits[0].tolist()
    after = module.state_dict()
    query = "q_proj.weight" if kind == "mla" else "q_b_proj.weight"
    assert same(before, after, [name for name in before if name not in (query, "kv_b_proj.weight")])
    gamma = [min(1.0, threshold / s) for s in maxima]
    assert sorted(g < 1 for g in gamma) == [False, False, True, True]
    parts = {query: [(4, lambda g: g**alpha), (2, lambda g: g)]}
    parts["kv_b_proj.weight"] = [(4, lambda g: g ** (1 - alpha)), (6, lambda g: 1.0)]
    for name, pieces in parts.items():
        row = 0
        for g in gamma:
            for size, factor in pieces:
                old, new = before[name][row : row + size], after[name][row : row + size]
                if factor(g) == 1.0:
                    assert torch.equal(new, old)
                else:
                    torch.testing.assert_close(new, old * factor(g), rtol=1e-6, atol=0)
                row += size
        assert row == len(before[name])


@every_module
def test_below_the_threshold_nothing_changes(kind: str) -> None:
    module, x = make(kind), torch.randn(3, 9, 16)
    before = snapshot(module)
    with QKClip(module, threshold=2 * float(true_maxima(module, x).max())) as qk_clip:
        module(x)
        result = qk_clip.step()
    assert same(before, module.state_dict())
    assert result.clipped_heads == 0 and result.min_gamma == 1


@every_module
@pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)])
def test_the_state_of_the_optimizer_is_not_scaled(kind: str, make_optimizer: Any) -> None:
    module, x = make(kind), torch.randn(3, 9, 16)
    optimizer = make_optimizer(module.parameters())
    with QKClip(module, threshold=1e-3) as qk_clip:
        module(x).square().sum().backward()
        optimizer.step()
        states = [[v.clone() for v in s.values() if isinstance(v, Tensor)] for s in optimizer.state.values()]
        gradients = [p.grad.clone() for p in module.parameters()]
        assert qk_clip.step().clipped_heads > 0
    now = [[v for v in s.values() if isinstance(v, Tensor)] for s in optimizer.state.values()]
    assert len(now) == len(list(module.parameters()))
    assert all(torch.equal(a, b) for old, new in zip(states, now) for a, b in zip(old, new))
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), gradients))


def test_weights_are_changed_in_place_and_stay_leaves() -> None:
    module = make("gqa_bias")
    before = list(module.parameters())
    addresses = [p.data_ptr() for p in before]
    with QKClip(module, threshold=1e-3) as qk_clip:
        module(torch.randn(3, 9, 16))
        qk_clip.step()
        assert len(qk_clip.params) == 4
        assert {id(p) for p in qk_clip.params} <= {id(p) for p in before}
    assert all(a is b for a, b in zip(module.parameters(), before))
    assert [p.data_ptr() for p in module.parameters()] == addresses
    assert all(p.requires_grad and p.is_leaf for p in module.parameters())


def test_a_parameter_replaced_after_construction_is_found() -> None:
    module = make("mha")
    with QKClip(module, threshold=1e-3) as qk_clip:
        module.q_proj.weight = nn.Parameter(module.q_proj.weight.detach().clone())
        before = snapshot(module)
        module(torch.randn(3, 9, 16))
        qk_clip.step()
    assert not torch.equal(module.q_proj.weight, before["q_proj.weight"])


def test_a_bfloat16_model_is_scaled_in_float32() -> None:
    module, x = make("mha_bias").bfloat16(), torch.randn(3, 9, 16, dtype=torch.bfloat16)
    before = snapshot(module)
    module(x)
    with QKClip(module, threshold=1.0) as qk_clip:
        module(x)
        result = qk_clip.step()
        assert result.max_logits.dtype is torch.float32
        module(x)
        torch.testing.assert_close(qk_clip.max_logits, result.max_logits.clamp(max=1.0), rtol=0.05, atol=0)
    root = result.gamma[0].sqrt().repeat_interleave(4)
    assert result.clipped_heads == 4
    for name in ("q_proj", "k_proj"):
        expected = (before[f"{name}.weight"].float() * root[:, None]).bfloat16()
        assert torch.equal(module.get_parameter(f"{name}.weight"), expected)
        assert torch.equal(module.get_parameter(f"{name}.bias"), (before[f"{name}.bias"].float() * root).bfloat16())
    assert same(before, module.state_dict(), ["v_proj.weight", "o_proj.weight"])


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_under_autocast_maxima_are_those_of_the_rounded_projections(kind: str) -> None:
    module, x = make(kind), torch.randn(3, 9, 16)
    with QKClip(module) as qk_clip, torch.autocast("cpu", torch.bfloat16):
        module(x)
        torch.testing.assert_close(qk_clip.max_logits[0].double(), true_maxima(module, x), rtol=0.03, atol=0.05)


# When nothing may change


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
@pytest.mark.parametrize("kind", ["mha_bias", "gqa", "mla", "third_party"])
def test_a_logit_that_is_not_finite_changes_nothing_and_is_counted(kind: str, value: float) -> None:
    module, x = make(kind), torch.randn(3, 9, 16)
    name = "q_b_proj" if hasattr(module, "q_b_proj") else "q_proj"
    weight = module.get_parameter(f"{name}.weight")
    rows = weight.shape[0] // 4
    with torch.no_grad():
        weight[rows] = value  # in head 1
    before = snapshot(module)
    with QKClip(module, threshold=1e-3) as qk_clip:
        module(x)
        result = qk_clip.step()
    assert result.nonfinite == 1
    assert result.max_logits[0, 1] == INF and result.gamma[0, 1] == 1
    assert result.max_logits[0, [0, 2, 3]].isfinite().all()
    assert result.max_logit == result.max_logits[0, [0, 2, 3]].max()
    assert 0 < result.clipped_heads <= 3
    after = module.state_dict()
    own, others = slice(rows, 2 * rows), [row for row in range(4 * rows) if not rows <= row < 2 * rows]
    kept = before[f"{name}.weight"], after[f"{name}.weight"]
    assert torch.equal(kept[0][own].nan_to_num(nan=7.0), kept[1][own].nan_to_num(nan=7.0))
    assert not torch.equal(kept[0][others], kept[1][others])
    assert after[f"{name}.weight"][others].isfinite().all()


@every_module
def test_without_a_forward_since_the_last_step_nothing_changes(kind: str) -> None:
    module, x = make(kind), torch.randn(3, 9, 16)
    with QKClip(module, threshold=1e-3) as qk_clip:
        module(x)
        assert qk_clip.step().clipped_heads > 0
        before = snapshot(module)
        assert qk_clip.max_logits.isneginf().all()
        result = qk_clip.step()
        assert result.clipped_heads == 0 and result.max_logits.isneginf().all() and result.nonfinite == 0
        assert result.max_logit == -INF
        module.eval()(x)
        assert qk_clip.step().clipped_heads == 0
        assert same(before, module.state_dict())


def test_discard_forgets_a_skipped_step() -> None:
    module, x = make("gqa"), torch.randn(3, 9, 16)
    before = snapshot(module)
    with QKClip(module, threshold=1e-3) as qk_clip:
        module(x)
        qk_clip.discard()
        assert qk_clip.step().clipped_heads == 0
    assert same(before, module.state_dict())


def test_negative_maxima_are_left_alone() -> None:
    module = make("mha")
    before = snapshot(module)
    with QKClip(module, threshold=1.0) as qk_clip:
        result = qk_clip.step([[-500.0, -1.0, 0.0, -0.0]])
    assert result.gamma.tolist() == [[1.0] * 4] and same(before, module.state_dict())


def test_without_a_threshold_it_only_watches() -> None:
    model = Residual(make("mha"), Attention(16, 2, qk_norm=True))
    shared = model.layers[0]
    shared.q_proj.weight.requires_grad_(False)
    x, before = torch.randn(3, 9, 16), snapshot(model)
    with QKClip(model, threshold=None) as qk_clip:
        model(x)
        close(qk_clip.max_logits[0], true_maxima(model.layers[0], x))
        result = qk_clip.step()
        assert result.clipped_heads == 0 and result.max_logit > 0
        assert qk_clip.params == [] and int(qk_clip.clips.sum()) == 0
    assert same(before, model.state_dict())


def test_normalized_queries_are_refused_or_watched() -> None:
    model = Residual(make("mha"), Attention(16, 2, qk_norm=True))
    with pytest.raises(ValueError, match=r"attention 'layers.1' normalizes queries or keys.*qk_norm='monitor'"):
        QKClip(model, qk_norm="error")
    x = torch.randn(3, 9, 16)
    before = snapshot(model)
    with QKClip(model, threshold=1e-3) as qk_clip:
        model(x)
        result = qk_clip.step()
        assert (result.max_logits[1, :2] > 1e-3).all()
        assert result.gamma[1].tolist() == [1.0] * 4
        assert result.clipped_heads == 4
        assert qk_clip.clips.tolist() == [[1] * 4, [0] * 4]
        assert len(qk_clip.params) == 2
    after = model.state_dict()
    assert same(before, after, [name for name in before if name.startswith("layers.1")])
    assert not same(before, after, ["layers.0.q_proj.weight"])
    with QKClip(model.layers[1], threshold=1e-3, qk_norm="monitor") as qk_clip:
        model.layers[1](x)
        assert qk_clip.step().clipped_heads == 0
    assert same(before, model.state_dict(), [name for name in before if name.startswith("layers.1")])


# Modules and weights that are used more than once, or not to be changed


@pytest.mark.parametrize("kind", ["mha_bias", "mla", "third_party"])
def test_a_module_that_is_used_twice_is_scaled_once(kind: str) -> None:
    layer, x = make(kind), torch.randn(3, 9, 16)
    before = snapshot(layer)
    with QKClip(Residual(layer, layer), threshold=1e-3, example=((x,), {})) as qk_clip:
        qk_clip.step([[1.0] * 4])
    once = MODULES[kind]()
    once.load_state_dict(before)
    with QKClip(once, threshold=1e-3, example=((x,), {})) as qk_clip:
        qk_clip.step([[1.0] * 4])
    assert same(once.state_dict(), layer.state_dict())
    close(true_maxima(once, x), true_maxima(layer, x))


def test_frozen_values_do_not_matter() -> None:
    module = make("mha_bias")
    for name in ("v_proj.weight", "o_proj.bias"):
        module.get_parameter(name).requires_grad_(False)
    with QKClip(module) as qk_clip:
        assert len(qk_clip.params) == 4 and qk_clip.summary().endswith("q and k")


# The caller's maxima


@pytest.mark.parametrize("convert", [lambda rows: rows, lambda rows: [torch.tensor(row) for row in rows]])
def test_the_callers_maxima_are_taken_instead(convert: Any) -> None:
    model = Residual(Attention(16, 2), Attention(16, 4))
    before = snapshot(model)
    with QKClip(model, threshold=10.0, alpha=1.0) as qk_clip:
        model(torch.randn(3, 9, 16))
        result = qk_clip.step(convert([[20.0, 5.0], [math.nan, 40.0, -3.0, 10.0]]))
        assert result.gamma.tolist() == [[0.5, 1, 1, 1], [1, 0.25, 1, 1]]
        assert result.max_logits.tolist() == [[20, 5, -INF, -INF], [INF, 40, -3, 10]]
        assert qk_clip.max_logits.isneginf().all()
    factors = {0: [0.5] * 8 + [1.0] * 8, 1: [1.0] * 4 + [0.25] * 4 + [1.0] * 8}
    for layer, factor in factors.items():
        name = f"layers.{layer}.q_proj.weight"
        assert torch.equal(model.get_parameter(name), before[name] * torch.tensor(factor)[:, None])


def test_a_tensor_is_padded_to_the_most_heads() -> None:
    model = Residual(Attention(16, 2), Attention(16, 4))
    padded = torch.tensor([[200.0, 1.0, 900.0, 900.0], [1.0, 1.0, 1.0, 400.0]], dtype=torch.float64)
    with QKClip(model, logits="off") as qk_clip:
        result = qk_clip.step(padded)
    assert result.gamma.tolist() == [[0.5, 1, 1, 1], [1, 1, 1, 0.25]]
    assert result.max_logits[0].tolist() == [200, 1, -INF, -INF]


@pytest.mark.parametrize(
    "maxima",
    [
        [[1.0, 1.0]],
        [[1.0] * 4, [1.0] * 2],
        [[1.0] * 2, [1.0] * 4, [1.0] * 4],
        [[1.0] * 3, [1.0] * 3],
        torch.ones(2, 2),
        torch.ones(4, 2),
        torch.ones(2, 4, 1),
        torch.ones(6),
        [1.0, 1.0],
        [],
    ],
)
def test_maxima_of_another_shape_are_refused(maxima: Any) -> None:
    model = Residual(Attention(16, 2), Attention(16, 4))
    before = snapshot(model)
    with QKClip(model) as qk_clip:
        with pytest.raises(ValueError, match=r"max_logits has rows of .* one row per layer, of \[2, 4\] heads"):
            qk_clip.step(maxima)
        model(torch.randn(3, 9, 16))
        assert qk_clip.max_logits[0, :2].isfinite().all()
    assert same(before, model.state_dict())


# With an optimizer, and in a checkpoint


def test_attached_it_acts_after_every_step_of_the_optimizer() -> None:
    model, twin = Residual(make("gqa_bias")), Residual(make("gqa_bias"))
    twin.load_state_dict(model.state_dict())
    x = torch.randn(3, 9, 16)
    with QKClip(model, 2.0) as attached, QKClip(twin, 2.0) as by_hand:
        ours, theirs = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin))
        attached.attach(ours)
        for _ in range(3):
            for m in (model, twin):
                m.zero_grad()
                m(x).square().mean().backward()
            ours.step()
            theirs.step()
            by_hand.step()
        assert same(model.state_dict(), twin.state_dict())
        assert torch.equal(attached.clips, by_hand.clips) and int(attached.clips.sum()) > 0
        clips = attached.clips.clone()
    model(x).sum().backward()
    ours.step()
    assert torch.equal(attached.clips, clips)


def test_every_clip_is_counted() -> None:
    model = Residual(Attention(16, 2), Attention(16, 4))
    with QKClip(model, threshold=10.0) as qk_clip:
        qk_clip.step([[20.0, 5.0], [5.0, 5.0, 50.0, math.nan]])
        qk_clip.step([[20.0, 20.0], [5.0, 5.0, 5.0, 5.0]])
        assert qk_clip.clips.tolist() == [[2, 1, 0, 0], [0, 0, 1, 0]]
        assert qk_clip.clips.dtype is torch.int64


def saved_and_loaded(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_counts_survive_a_checkpoint() -> None:
    model = Residual(Attention(16, 2), Attention(16, 4))
    with QKClip(model, threshold=10.0) as qk_clip:
        qk_clip.step([[20.0, 5.0], [5.0, 5.0, 50.0, 5.0]])
        state = saved_and_loaded(qk_clip.state_dict())
    with QKClip(model, threshold=10.0) as qk_clip:
        qk_clip.load_state_dict(state)
        qk_clip.step([[20.0, 5.0], [5.0, 5.0, 5.0, 5.0]])
        assert qk_clip.clips.tolist() == [[2, 0, 0, 0], [0, 0, 1, 0]]
        assert state["clips"].tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]
    with (
        QKClip(model.layers[1]) as qk_clip,
        pytest.raises(ValueError, match=r"of layers that the model does not have: 'layers.0', 'layers.1'"),
    ):
        qk_clip.load_state_dict(state)


# Every n-th step


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_first_of_every_n_steps_is_measured_and_clips(n: int) -> None:
    model = Residual(make("mha"), make("third_party"))
    with QKClip(model, threshold=1e-3, every_n_steps=n) as qk_clip:
        for step in range(2 * n + 1):
            x, before = torch.randn(3, 9, 16), snapshot(model)
            expected = true_maxima(model.layers[0], x)
            assert qk_clip.is_due == (step % n == 0)
            model(x)
            if qk_clip.is_due:
                close(qk_clip.max_logits[0], expected)
            else:
                assert qk_clip.max_logits.isneginf().all()
            result = qk_clip.step()
            is_clipped = not same(before, model.state_dict())
            assert is_clipped == (step % n == 0) == bool((result.gamma < 1).all())
            model.load_state_dict(before)
        assert (qk_clip.clips == 3).all()
    assert model.layers[0].max_logits_recorder is None


def test_a_step_is_not_due_for_the_callers_maxima_either() -> None:
    module = make("mha")
    with QKClip(module, threshold=1.0, every_n_steps=2, logits="off") as qk_clip:
        assert qk_clip.step([[4.0] * 4]).gamma.tolist() == [[0.25] * 4]
        before = snapshot(module)
        assert qk_clip.step([[4.0] * 4]).gamma.tolist() == [[1.0] * 4]
        assert same(before, module.state_dict())
        assert qk_clip.step([[4.0] * 4]).gamma.tolist() == [[0.25] * 4]
        assert module.max_logits_recorder is None
    assert qk_clip.clips.tolist() == [[2] * 4]


def test_the_maxima_between_two_due_steps_do_not_pile_up() -> None:
    module, x = make("mha"), torch.randn(3, 9, 16)
    with QKClip(module, threshold=None, every_n_steps=2) as qk_clip:
        module(x)
        qk_clip.step()
        module(100 * x)
        qk_clip.step()
        module(x)
        close(qk_clip.step().max_logits[0], true_maxima(module, x))


@pytest.mark.parametrize("done", range(5))
def test_resumed_it_counts_its_steps_on(done: int) -> None:
    x = torch.randn(3, 9, 16)
    model, seen = Residual(make("mha"), make("third_party")), {}
    first = snapshot(model)
    for resumes in (False, True):
        model.load_state_dict(first)
        qk_clip = QKClip(model, threshold=1e-2, every_n_steps=3)
        steps = []
        for step in range(5):
            if step == done and resumes:
                state = saved_and_loaded(qk_clip.state_dict())
                assert state["steps"] == step and {"steps", "clips"} <= set(state)
                qk_clip.close()
                qk_clip = QKClip(model, threshold=1e-2, every_n_steps=3)
                qk_clip.load_state_dict(state)
            model((step + 1) * x)
            steps.append((qk_clip.is_due, qk_clip.max_logits, qk_clip.step().gamma, qk_clip.clips.clone()))
        qk_clip.close()
        seen[resumes] = steps
    for straight, resumed in zip(*seen.values()):
        assert straight[0] == resumed[0]
        assert all(torch.equal(a, b) for a, b in zip(straight[1:], resumed[1:]))
    assert [step[0] for step in seen[True]] == [True, False, False, True, False]


def test_counts_saved_without_steps_are_taken_as_of_the_first_step() -> None:
    with QKClip(make("mha"), every_n_steps=2) as qk_clip:
        qk_clip.step()
        qk_clip.load_state_dict({"clips": torch.ones(1, 4, dtype=torch.int64)})
        assert qk_clip.is_due and qk_clip.clips.tolist() == [[1] * 4]


def test_loading_into_a_closed_one_does_not_reopen_it() -> None:
    module = make("mha")
    with QKClip(module, every_n_steps=2) as qk_clip:
        state = qk_clip.state_dict()
    qk_clip.load_state_dict(state)
    assert module.max_logits_recorder is None
    with QKClip(module) as other:
        module(torch.randn(3, 9, 16))
        assert other.max_logits.isfinite().all()


# Summary


def test_the_summary_shows_heads_layouts_sources_and_sides() -> None:
    model = nn.Sequential(make("mha"), make("third_party"), make("mla"), Attention(16, 2, qk_norm=True))
    model[1].k_proj.requires_grad_(False)
    example = (torch.randn(3, 9, 16),), {}
    with QKClip(model, qk_norm="monitor", example=example) as qk_clip:
        lines = [line.split("  ") for line in qk_clip.summary().splitlines()]
        header, *rows = [[cell.strip() for cell in line if cell.strip()] for line in lines]
        assert header == ["layer", "class", "heads", "layout", "logits from", "clip scales"]
        separate = "q_proj: q(H d), k_proj: k(G d), v_proj: *(G d)"
        channels = {"q_proj": "q(H 4)", "k_proj": "k(G 4)", "v_proj": "*(G 4)"}
        inferred = ", ".join(f"{n}.{leaf}: {own}" for n, own in channels.items() for leaf in ("weight", "bias"))
        latent = "q_proj: (H [qn:n, qr:r]), kv_b_proj: (H [kn:n, *:v])"
        assert rows == [
            ["0", "Attention", "4", separate, "not seen", "q and k"],
            ["1", "SdpaAttention", "4 / 2", inferred, "not seen", "q"],
            ["2", "MultiheadLatentAttention", "4", latent, "not seen", "q and k"],
            ["3", "Attention", "2", f"{separate}, q_norm: q(d), k_norm: k(d)", "not seen", "watched (QK-norm)"],
        ]
        model(torch.randn(3, 9, 16))
        sources = [line.split("  ") for line in qk_clip.summary().splitlines()[1:]]
        own = [[cell.strip() for cell in line if cell.strip()][4] for line in sources]
        assert own == ["the module", "scaled_dot_product_attention", "the module", "the module"]
    with QKClip(model, threshold=None, example=example) as qk_clip:
        assert all(line.endswith("watched (threshold=None)") for line in qk_clip.summary().splitlines()[1:])


def test_the_summary_of_a_model_that_is_attention_itself_and_of_a_dimension() -> None:
    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 24))

    spec = AttentionSpec((Projection("weight", "[q(H d) | k(H d) | *]", dim=1),), 2, sizes={"d": 4})
    with QKClip(Columns(), specs={"": spec}) as qk_clip:
        row = [cell.strip() for cell in qk_clip.summary().splitlines()[1].split("  ") if cell.strip()]
        assert row == ["(model)", "Columns", "2", "weight: [q(H d) | k(H d) | *] dim=1", "not seen", "q and k"]


class Operations(TorchDispatchMode):
    """Names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shared_keys", SHARED_KEYS)
def test_nothing_is_read_on_the_host(shared_keys: str) -> None:
    model = Residual(make("gqa_bias"), make("mla"), make("third_party"))
    x = torch.randn(3, 9, 16)
    with QKClip(model, threshold=1.0, shared_keys=shared_keys, example=((x,), {})) as qk_clip:
        with Operations() as forward:
            model(x)
        with Operations() as step:
            result = qk_clip.step()
            summary = result.max_logit, result.min_gamma, result.clipped_heads, result.nonfinite
        with Operations() as control:
            assert summary[2].item() > 0
    reading = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}
    assert not reading & {*forward.names, *step.names}
    assert "aten::_foreach_mul_.List" in step.names
    assert "aten::_local_scalar_dense" in control.names


@pytest.mark.parametrize("layers", [1, 6])
def test_a_step_costs_as_many_operations_for_many_layers_as_for_few(layers: int) -> None:
    model = Residual(*(make("mha_bias") for _ in range(layers)))
    with QKClip(model, threshold=1.0) as qk_clip:
        model(torch.randn(3, 9, 16))
        with Operations() as step:
            qk_clip.step()
    assert len([name for name in step.names if "view" not in name and "alias" not in name]) < 60


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, "threshold must be positive, or None to only monitor; got 0.0"),
        ({"threshold": -5.0}, "threshold must be positive"),
        ({"threshold": math.nan}, "threshold must be positive"),
        ({"alpha": -0.1}, r"alpha.* must be in \[0, 1\]; got -0.1"),
        ({"alpha": 1.1}, "alpha"),
        ({"shared_keys": "mean"}, "unknown shared_keys 'mean'; use one of query, group, min_k, compensate"),
        ({"qk_norm": "gian"}, "unknown qk_norm 'gian'; use one of error, monitor, gain"),
        ({"logits": "guess"}, "unknown logits 'guess'; use one of exact, lse, off"),
        ({"lora": "merge"}, "unknown lora 'merge'; use one of monitor, scale"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    module = make("mha")
    with pytest.raises(ValueError, match=message):
        QKClip(module, **options)
    assert module.max_logits_recorder is None


def test_a_shared_observer_outlives_its_users() -> None:
    module, x = make("mha"), torch.randn(3, 9, 16)
    with QKClip(module, threshold=None) as owner:
        with QKClip(module, threshold=1.0, observer=owner.observer) as guest:
            module(x)
            assert torch.equal(guest.max_logits, owner.max_logits)
        module(x)
        close(owner.max_logits[0], true_maxima(module, x))


def test_a_spec_may_describe_one_weight_with_everything_in_it() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 32)  # per group of two queries: q q k v, 4 channels each

        def forward(self, x: Tensor) -> Tensor:
            parts = self.qkv(x).unflatten(-1, (2, 4, 4)).movedim(1, 3)  # batch, groups, slots, length, channels
            query = parts[:, :, :2].flatten(1, 2)
            key, value = (parts[:, :, slot] for slot in (2, 3))
            return nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    module, x = Fused(), torch.randn(3, 9, 16)
    enlarge(module)
    spec = AttentionSpec((Projection("qkv", "(G [q:r·d, k:d, *:d])"),), 4, 2, {"r": 2, "d": 4})
    for shared_keys in ("query", "compensate"):
        with QKClip(module, None, specs={"": spec}) as watcher:
            module(x)
            before = watcher.max_logits
        values = module.qkv.weight.detach().unflatten(0, (2, 4, 4))[:, 3].clone()
        threshold = between(before)
        with QKClip(module, threshold, specs={"": spec}, shared_keys=shared_keys) as qk_clip:
            module(x)
            assert qk_clip.step().clipped_heads == 2
            module(x)
            close(qk_clip.max_logits, before.clamp(max=threshold))
        assert torch.equal(module.qkv.weight.unflatten(0, (2, 4, 4))[:, 3], values)
