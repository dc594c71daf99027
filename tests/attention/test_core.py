"""Every backend against the eager one in float64, and that against a loop over pairs."""

from __future__ import annotations

import copy
import math
import pickle
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked import HEADS, Case, atoms, naive_attention, pairs
from oracles import INF, brute_max_logits
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from lightning_muonclip import Attention, AttentionMask, QKClip
from lightning_muonclip.attention.blocks import BLOCK
from lightning_muonclip.attention.compiled import compiled
from lightning_muonclip.attention.core import BACKENDS, attention
from lightning_muonclip.attention.score_mods import Alibi, RelativeBias, ScoreMod, SoftCap, chain, from_head

NAMES = list(atoms(1, 2, 0))
TWO = 2  # sequences

SCORE_MODS: dict[str, tuple[ScoreMod, Any]] = {
    "soft-cap": (SoftCap(2.0), lambda s, h, i, j: 2 * torch.tanh(s / 2)),
    "alibi": (Alibi(HEADS), lambda s, h, i, j: s - 2 ** (-8 * (h + 1) / HEADS) * abs(i - j)),
    "of positions": (
        lambda s, b, h, q, k: s * (1 + q % 2) - 0.125 * k * h,
        lambda s, h, i, j: s * (1 + i % 2) - 0.125 * j * h,
    ),
}


def tensors(length: int, key_heads: int, dim: int, value_dim: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (HEADS, dim), (key_heads, dim), (key_heads, value_dim)
    return [torch.randn(TWO, heads, length, width, generator=generator, dtype=torch.float64) for heads, width in shapes]


masks = st.one_of(
    st.sampled_from(NAMES).map(lambda name: (name,)),
    st.tuples(st.sampled_from("&|"), st.sampled_from(NAMES), st.sampled_from(NAMES)),
    st.tuples(st.sampled_from("&|"), st.sampled_from(NAMES), st.sampled_from(NAMES), st.sampled_from(NAMES)),
)


def combine(drawn: tuple[str, ...], known: dict[str, Case]) -> Case:
    if len(drawn) == 1:
        return known[drawn[0]]
    case = known[drawn[1]]
    for name in drawn[2:]:
        case = case & known[name] if drawn[0] == "&" else case | known[name]
    return case


def run(backend: str, inputs: list[Tensor], dtype: torch.dtype, **options: Any) -> tuple[Tensor, list[Tensor], Tensor]:
    """Output, gradients and maxima."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    if options.get("sinks") is not None:
        options["sinks"] = options["sinks"].to(dtype).requires_grad_()
        leaves.append(options["sinks"])
    output, maxima = attention(*leaves[:3], scale=0.6, track="exact", backend=backend, **options)
    assert maxima is not None and maxima.dtype is torch.float32 and not maxima.requires_grad
    slope = torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output)
    return output, list(torch.autograd.grad(output, leaves, slope)), maxima


@settings(max_examples=150)
@given(
    drawn=masks,
    score=st.sampled_from([None, *SCORE_MODS]),
    with_sinks=st.booleans(),
    length=st.integers(1, 9),
    key_heads=st.sampled_from([1, 2, 4]),
    dims=st.sampled_from([(4, 4), (3, 5), (6, 2)]),
    seed=st.integers(0, 2**16),
)
def test_eager_is_the_loop_over_pairs(
    drawn: tuple[str, ...],
    score: str | None,
    with_sinks: bool,
    length: int,
    key_heads: int,
    dims: tuple[int, int],
    seed: int,
) -> None:
    inputs = tensors(length, key_heads, *dims, seed)
    case = combine(drawn, atoms(TWO, length, seed))
    score_mod, by_hand = SCORE_MODS[score] if score else (None, None)
    sinks = torch.linspace(-1, 1, HEADS, dtype=torch.float64) if with_sinks else None
    output, gradients, maxima = run("eager", inputs, torch.float64, mask=case.mask, score_mod=score_mod, sinks=sinks)
    leaves = [x.clone().requires_grad_() for x in (*inputs, *([] if sinks is None else [sinks]))]
    expected = naive_attention(
        *leaves[:3], 0.6, pairs(case.sees, TWO, length), by_hand, leaves[3] if with_sinks else None
    )
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    slope = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
    if expected.requires_grad:
        for found, right in zip(gradients, torch.autograd.grad(expected, leaves, slope, allow_unused=True)):
            torch.testing.assert_close(
                found, torch.zeros_like(found) if right is None else right, rtol=1e-9, atol=1e-11
            )
    largest = brute_max_logits(inputs[0], inputs[1], 0.6, pairs(case.counts, TWO, length))
    torch.testing.assert_close(maxima.double(), largest, rtol=1e-6, atol=1e-7)


@settings(max_examples=120)
@given(
    drawn=masks,
    length=st.sampled_from([1, 2, 5, 63, 64, 65, 127, 128, 129, 200]),
    key_heads=st.sampled_from([1, 2, 4]),
    dims=st.sampled_from([(16, 16), (24, 16), (10, 24), (64, 64)]),
    seed=st.integers(0, 2**16),
)
def test_sdpa_is_eager(drawn: tuple[str, ...], length: int, key_heads: int, dims: tuple[int, int], seed: int) -> None:
    inputs = tensors(length, key_heads, *dims, seed)
    mask = combine(drawn, atoms(TWO, length, seed)).mask
    expected, gradients, maxima = run("eager", inputs, torch.float64, mask=mask)
    found = run("sdpa", inputs, torch.float32, mask=mask)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-5)
    for own, right in zip(found[1], gradients):
        torch.testing.assert_close(own.double(), right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[2], maxima, rtol=1e-5, atol=1e-5)


@settings(max_examples=15)
@given(
    drawn=masks,
    score=st.sampled_from([None, *SCORE_MODS]),
    with_sinks=st.booleans(),
    length=st.sampled_from([1, 5, 127, 128, 129, 200]),
    key_heads=st.sampled_from([1, 2, 4]),
    dims=st.sampled_from([(16, 16), (24, 16), (10, 24)]),
    seed=st.integers(0, 2**16),
)
def test_flex_in_its_own_eager_mode_is_eager(
    drawn: tuple[str, ...],
    score: str | None,
    with_sinks: bool,
    length: int,
    key_heads: int,
    dims: tuple[int, int],
    seed: int,
) -> None:
    inputs = tensors(length, key_heads, *dims, seed)
    mask = combine(drawn, atoms(TWO, length, seed)).mask
    sinks = torch.linspace(-1, 1, HEADS) if with_sinks else None
    options: dict[str, Any] = {"mask": mask, "score_mod": SCORE_MODS[score][0] if score else None, "sinks": sinks}
    expected, _, maxima = run("eager", inputs, torch.float64, **options)
    with torch.no_grad():
        found, largest = attention(*(x.float() for x in inputs), scale=0.6, track="exact", backend="flex", **options)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(largest, maxima, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(backend: str, dtype: torch.dtype) -> None:
    inputs = tensors(70, 2, 16, 16, seed=0)
    expected, gradients, maxima = run("eager", [x.to(dtype).double() for x in inputs], torch.float64)
    output, found, largest = run(backend, inputs, dtype)
    assert output.dtype is dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), expected, rtol=4 * eps, atol=4 * eps)
    for own, right in zip(found, gradients):
        torch.testing.assert_close(own.double(), right, rtol=16 * eps, atol=16 * eps)
    torch.testing.assert_close(largest, maxima, rtol=1e-5, atol=1e-5)  # products of half precision are exact in float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_inputs(backend: str) -> None:
    for batch, length in ((0, 5), (2, 0)):
        query = torch.randn(batch, 4, length, 16, requires_grad=True)
        output, maxima = attention(query, query, query[..., :8], scale=1.0, track="exact", backend=backend)
        assert output.shape == (batch, 4, length, 8) and maxima is not None
        assert maxima.tolist() == [-INF] * 4
        output.sum().backward()


@pytest.mark.parametrize("backend", ["eager", "flex"])
def test_sinks_of_minus_infinity_change_nothing(backend: str) -> None:
    inputs = [x.float() for x in tensors(6, 2, 16, 16, seed=0)]
    mask = AttentionMask(mask_mod=lambda b, h, q, k: q != 2)
    options: dict[str, Any] = {"scale": 1.0, "mask": mask, "backend": backend}
    found = attention(*inputs, sinks=torch.full((HEADS,), -INF), **options)[0]
    torch.testing.assert_close(found, attention(*inputs, **options)[0])


def test_under_autocast_flex_works_in_half_precision_as_sdpa_does() -> None:
    inputs = [x.float() for x in tensors(70, 2, 16, 16, seed=0)]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        outputs = {name: attention(*inputs, scale=0.25, backend=name)[0] for name in BACKENDS}
    assert outputs["flex"].dtype is outputs["sdpa"].dtype is torch.bfloat16
    for output in outputs.values():
        torch.testing.assert_close(output.float(), outputs["eager"].float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient(backend: str) -> None:
    inputs = [x.float().requires_grad_(backend != "flex") for x in tensors(6, 2, 16, 16, seed=0)]
    mask = AttentionMask(mask_mod=lambda b, h, q, k: (q != 2) & (k != 5)) & AttentionMask(
        padding=torch.tensor([[True] * 6, [False] * 6])
    )
    output, maxima = attention(*inputs, scale=1.0, mask=mask, track="exact", backend=backend)
    assert output.isfinite().all() and maxima is not None and maxima.isfinite().all()
    assert (output[0, :, 2] == 0).all() and (output[1] == 0).all()
    assert (output[0, :, [0, 1, 3, 4, 5]] != 0).any(-1).all()
    if backend != "flex":
        gradients = torch.autograd.grad(output.sum(), inputs)
        assert all(x.isfinite().all() and (x[1] == 0).all() for x in gradients)
        assert (gradients[0][0, :, 2] == 0).all()


def test_a_score_mod_that_hides_all_of_a_row_gives_zeros() -> None:
    inputs = [x.requires_grad_() for x in tensors(4, 4, 4, 4, seed=0)]
    output, _ = attention(*inputs, scale=1.0, score_mod=lambda s, b, h, q, k: torch.where(q == 1, -INF, s))
    assert (output[:, :, 1] == 0).all() and (output[:, :, 2] != 0).all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(output.sum(), inputs))


@pytest.mark.parametrize("score", SCORE_MODS)
def test_maxima_are_taken_before_soft_cap_and_score_mod(score: str) -> None:
    inputs = [x.float() for x in tensors(65, 2, 16, 16, seed=3)]
    plain = attention(*inputs, scale=3.0, track="exact")[1]
    for backend in ("eager", "flex"):
        for options in ({"score_mod": SCORE_MODS[score][0]}, {"softcap": 1.5}, {"sinks": torch.ones(HEADS)}):
            maxima = attention(*inputs, scale=3.0, track="exact", backend=backend, **options)[1]
            torch.testing.assert_close(maxima, plain)


def test_soft_cap_comes_before_the_score_mod() -> None:
    inputs = [x.float() for x in tensors(9, 4, 16, 16, seed=3)]
    bias = Alibi(HEADS)
    found = attention(*inputs, scale=3.0, softcap=1.5, score_mod=bias)[0]
    expected = attention(*inputs, scale=3.0, score_mod=chain(SoftCap(1.5), bias))[0]
    assert torch.equal(found, expected)
    other = attention(*inputs, scale=3.0, score_mod=chain(bias, SoftCap(1.5)))[0]
    assert not torch.allclose(found, other, atol=1e-3)


@pytest.mark.parametrize("heads", [1, 4, 8, 12, 20])
def test_alibi_has_the_slopes_of_hugging_faces_bloom(heads: int) -> None:
    # Bloom adds slope * j, which in a row differs from -slope * (i - j) by a constant.
    theirs = build_alibi_tensor(torch.ones(1, 9), heads, torch.float32).view(heads, 1, 9)
    h, q, k = torch.arange(heads).view(-1, 1, 1), torch.tensor(8), torch.arange(9).view(1, 1, -1)
    ours = Alibi(heads)(torch.zeros(heads, 1, 9), torch.tensor(0), h, q, k)
    torch.testing.assert_close(ours - ours[..., :1], theirs - theirs[..., :1])


def test_modules_with_score_mods_pickle() -> None:
    x = torch.randn(1, 5, 16)
    for score_mod in (Alibi(2), SoftCap(1.0), RelativeBias(2)):
        module = Attention(16, 2, score_mod=score_mod)
        assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20)])
def test_relative_bias_has_the_buckets_of_hugging_faces_t5(
    bidirectional: bool, buckets: int, max_distance: int
) -> None:
    bias = RelativeBias(HEADS, buckets, max_distance, bidirectional)
    with torch.no_grad():
        bias.relative_attention_bias.weight.normal_()
    positions = torch.arange(300)
    theirs = T5Attention._relative_position_bucket(positions - positions[:, None], bidirectional, buckets, max_distance)
    h, zero = torch.arange(HEADS).view(-1, 1, 1), torch.tensor(0)
    ours = bias(torch.zeros(HEADS, 300, 300), zero, h, positions[:, None], positions)
    assert torch.equal(ours, bias.relative_attention_bias.weight[theirs].permute(2, 0, 1))


def test_score_mods_for_other_heads_or_no_distances_are_refused() -> None:
    for score_mod in (Alibi(8), RelativeBias(3)):
        with pytest.raises(
            ValueError, match=r"the score_mod is for \d heads, but the attention has 4; create it with num_heads=4"
        ):
            Attention(16, 4, score_mod=score_mod)
    with pytest.raises(ValueError, match="num_heads must be at least 1"):
        Alibi(0)
    with pytest.raises(
        ValueError, match="max_distance must be above 200, the number of near distances of 400 buckets; got 128"
    ):
        RelativeBias(4, num_buckets=400)
    with pytest.raises(ValueError, match="num_buckets must be at least 4"):
        RelativeBias(4, num_buckets=2, bidirectional=True)


def test_a_relative_bias_trains() -> None:
    bias = RelativeBias(HEADS, 8, 20)
    inputs = tensors(12, 4, 4, 4, seed=0)
    output, _ = attention(*inputs, scale=1.0, score_mod=bias)
    output.square().sum().backward()
    assert (
        bias.relative_attention_bias.weight.grad is not None
        and (bias.relative_attention_bias.weight.grad != 0).any(0).all()
    )
    with torch.no_grad():
        bias.relative_attention_bias.weight.normal_()
    found = attention(*(x.float() for x in inputs), scale=1.0, score_mod=bias, backend="flex")
    torch.testing.assert_close(
        found[0].double(), attention(*inputs, scale=1.0, score_mod=bias)[0], rtol=1e-5, atol=1e-5
    )


def test_from_head_equals_a_slice_of_all_heads() -> None:
    query, key, value = tensors(9, 4, 4, 4, seed=0)
    table = torch.rand(HEADS, 9) < 0.7
    mask = (AttentionMask() | AttentionMask(causal=False, mask_mod=lambda b, h, q, k: table[h, q])) & AttentionMask(
        mask_mod=lambda b, h, q, k: table[h, k] | (q == k)
    )
    whole, maxima = attention(query, key, value, scale=1.0, mask=mask, score_mod=Alibi(HEADS), track="exact")
    part, own = attention(
        *(x[:, 2:] for x in (query, key, value)),
        scale=1.0,
        mask=mask.from_head(2),
        score_mod=from_head(Alibi(HEADS), 2),
        track="exact",
    )
    assert torch.equal(part, whole[:, 2:]) and maxima is not None and torch.equal(own, maxima[2:])


def test_flex_gets_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []

    def listen(query: Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths.append(query.shape[2])
        return flex_attention(query, *args, **kwargs)

    monkeypatch.setattr("torch.nn.attention.flex_attention.flex_attention", listen)
    for length in (1, BLOCK, BLOCK + 1):
        attention(*(x.float() for x in tensors(length, 4, 16, 16, 0)), scale=1.0, backend="flex")
    assert lengths == [BLOCK, BLOCK, 2 * BLOCK]


def test_compiled_once_it_takes_any_number_of_masks_lengths_and_score_mods(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: more graphs than torch's recompile limit allows, without graph breaks and with correct results."""
    plain = torch.nn.attention.flex_attention.flex_attention
    torch._dynamo.reset()
    monkeypatch.setattr("torch.nn.attention.flex_attention.flex_attention", compiled(plain, "aot_eager"))
    count = torch._dynamo.utils.counters["stats"]
    before = count["unique_graphs"]
    cases: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
        *((100, {}, {"score_mod": score}) for score in (None, SoftCap(2.0), SoftCap(3.0), Alibi(4), Alibi(8))),
        *((128, {}, {"softcap": softcap}) for softcap in (2.0, 3.0, 4.0)),
        *((length, {"window": 9}, {}) for length in (100, 128, 256)),
        (100, {"window": 30, "documents": (torch.arange(100) // 50).expand(TWO, -1)}, {}),
    ]
    graphs = []
    for _ in range(2):
        for length, hidden, options in cases:
            inputs = [x.float() for x in tensors(length, 2, 16, 16, seed=0)]
            own: dict[str, Any] = {"scale": 0.6, "mask": AttentionMask(**hidden), **options}
            with torch.no_grad():
                found = attention(*inputs, backend="flex", **own)[0]
            torch.testing.assert_close(found, attention(*inputs, backend="eager", **own)[0])
        graphs.append(count["unique_graphs"] - before)
    assert 8 < graphs[0] == graphs[1]  # torch's limit; no further graph is compiled


def test_a_table_of_positions_is_never_read_out_of_bounds() -> None:
    inputs = [x.float() for x in tensors(9, 4, 16, 16, seed=0)]
    table = torch.randn(9, 9)
    options: dict[str, Any] = {
        "score_mod": lambda s, b, h, q, k: s + table[q, k],
        "mask": AttentionMask(mask_mod=lambda b, h, q, k: table[q, k] < 1),
    }
    found = attention(*inputs, scale=1.0, backend="flex", **options)[0]
    torch.testing.assert_close(found, attention(*inputs, scale=1.0, backend="eager", **options)[0])


def test_auto_on_a_cpu_picks_a_trainable_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in BACKENDS:
        function = BACKENDS[name]
        spy = lambda *args, name=name, function=function: called.append(name) or function(*args)  # noqa: E731
        monkeypatch.setitem(BACKENDS, name, spy)
    inputs = tensors(5, 4, 16, 16, seed=0)
    for options in ({}, {"softcap": 1.0}, {"score_mod": Alibi(HEADS)}, {"sinks": torch.zeros(HEADS)}):
        attention(*inputs, scale=1.0, **options)
    assert called == ["sdpa", "eager", "eager", "eager"]


def test_invalid_arguments_are_refused() -> None:
    query, key, value = (x.float() for x in tensors(5, 2, 16, 16, seed=0))
    cases: dict[str, tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]] = {
        "unknown backend 'flash'; use one of auto, eager, sdpa, flex": ((query, key, value), {"backend": "flash"}),
        "a multiple of the number of key heads; got 4, 3": ((query, key[:, [0, 0, 0]], value[:, [0, 0, 0]]), {}),
        "queries, keys and values must have shapes": ((query, key[:, :, :4], value[:, :, :4]), {}),
        "no score_mod, soft-cap or sinks; use backend='auto'": (
            (query, key, value),
            {"backend": "sdpa", "softcap": 1.0},
        ),
        "sinks must have shape (4,), one logit per query head; got (2,)": (
            (query, key, value),
            {"sinks": torch.zeros(2)},
        ),
        "FlexAttention has no backward on this device": ((query.requires_grad_(), key, value), {"backend": "flex"}),
        "softcap must be positive, got 0": ((query, key, value), {"softcap": 0}),
        "padding is for 7 tokens, but the sequence has 5": (
            (query, key, value),
            {"mask": AttentionMask(padding=torch.ones(2, 7, dtype=torch.bool))},
        ),
        "documents are for 3 sequences, but the batch has 2": (
            (query, key, value),
            {"mask": AttentionMask(documents=torch.ones(3, 5, dtype=torch.long))},
        ),
        "queries, keys and values must have four dimensions": ((query[0], key[0], value[0]), {}),
        "a mask_mod must return a boolean tensor, True where a key is visible; got torch.int64": (
            (query, key, value),
            {"mask": AttentionMask(mask_mod=lambda b, h, q, k: q * k)},
        ),
        "a mask_mod must return a boolean tensor, True where a key is visible; got bool": (
            (query, key, value),
            {"mask": AttentionMask(mask_mod=lambda b, h, q, k: True)},
        ),
        "prefix is on meta, but the sequence is on cpu; move the mask with mask.to": (
            (query, key, value),
            {"mask": AttentionMask(prefix=torch.ones(2, dtype=torch.long, device="meta"))},
        ),
    }
    for message, (inputs, options) in cases.items():
        for backend in BACKENDS if "mask" in options else [options.pop("backend", "auto")]:
            with (
                pytest.raises(ValueError, match=re.escape(message)),
                torch.set_grad_enabled("backward" in message),
            ):
                attention(*inputs, scale=1.0, backend=backend, **options)


def test_the_log_sum_exp_is_a_bound_under_general_masks() -> None:
    inputs = [x.float() for x in tensors(40, 2, 16, 16, seed=0)]
    mask = AttentionMask(window=5) | AttentionMask(mask_mod=lambda b, h, q, k: k < 3)
    exact, bound = (attention(*inputs, scale=1.0, mask=mask, track=track)[1] for track in ("exact", "lse"))
    assert exact is not None and bound is not None
    assert (bound > exact).all() and (bound < exact + math.log(40)).all()


# On a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("drawn", "length", "key_heads", "dims", "score", "with_sinks"),
    [
        (("causal",), 1000, 4, (64, 64), None, False),
        (("causal",), 1000, 4, (64, 64), "soft-cap", True),
        (("&", "causal", "documents"), 1024, 2, (128, 128), None, True),
        (("&", "causal", "documents"), 1023, 2, (128, 128), "alibi", False),
        (("|", "window", "a table a head"), 333, 1, (96, 64), "of positions", False),
        (("|", "padding", "window"), 333, 1, (96, 64), None, False),
        (("&", "prefix", "padding"), 129, 4, (192, 128), None, False),
        (("documents",), 64, 2, (16, 16), None, True),
    ],
    ids=str,
)
def test_flex_compiled_is_eager(
    drawn: tuple[str, ...], length: int, key_heads: int, dims: tuple[int, int], score: str | None, with_sinks: bool
) -> None:
    inputs = [x.cuda() for x in tensors(length, key_heads, *dims, seed=0)]
    mask = combine(drawn, atoms(TWO, length, 0, "cuda")).mask
    sinks = torch.linspace(-1, 1, HEADS, dtype=torch.float64, device="cuda") if with_sinks else None
    score_mod = SCORE_MODS[score][0] if score else None
    expected, gradients, maxima = run("eager", inputs, torch.float64, mask=mask, score_mod=score_mod, sinks=sinks)
    output, found, largest = run("flex", inputs, torch.float32, mask=mask, score_mod=score_mod, sinks=sinks)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)
    for own, right in zip(found, gradients):
        torch.testing.assert_close(own.double(), right, rtol=1e-3, atol=1e-3 * float(right.abs().max()))
    torch.testing.assert_close(largest, maxima, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_a_module_trains_by_flex_and_reports(softcap: float | None) -> None:
    module = Attention(256, 4, num_key_value_heads=2, qk_norm=True, softcap=softcap).cuda()
    reference = copy.deepcopy(module).double()
    reference.backend = "eager"
    x = torch.randn(2, 500, 256, device="cuda")
    with QKClip(module, qk_norm="monitor") as found, QKClip(reference, qk_norm="monitor") as expected:
        with torch.autocast("cuda", torch.bfloat16):
            output = module(x)
        right = reference(x.double())
        torch.testing.assert_close(output.double(), right, rtol=3e-2, atol=3e-2)
        torch.testing.assert_close(found.max_logits, expected.max_logits, rtol=3e-2, atol=3e-2)
    output.square().mean().backward()
    right.square().mean().backward()
    for (name, own), other in zip(module.named_parameters(), reference.parameters()):
        assert own.grad is not None and other.grad is not None
        error = (own.grad - other.grad).norm() / other.grad.norm()
        assert error < 0.05, name


@pytest.mark.gpu
@pytest.mark.parametrize("score", [None, "soft-cap"])
def test_a_model_compiled_around_flex_is_one_graph(score: str | None) -> None:
    inputs = [x.float().cuda() for x in tensors(200, 2, 64, 64, seed=0)]
    score_mod = SCORE_MODS[score][0] if score else None
    mask = AttentionMask(documents=torch.arange(200, device="cuda").expand(TWO, -1) // 70)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return attention(query, key, value, scale=0.6, mask=mask, score_mod=score_mod, track="exact")

    output, maxima = torch.compile(attend, fullgraph=True)(*inputs)
    expected, largest = attention(*inputs, scale=0.6, mask=mask, score_mod=score_mod, track="exact", backend="eager")
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(maxima, largest, rtol=1e-4, atol=1e-4)
