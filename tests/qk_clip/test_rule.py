"""The formulas: gamma, the factors of shared keys, and the reference function."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import INF, policy_factors
from torch import nn

from lightning_muonclip import muonclip_qk_clip, qk_clip_gamma
from lightning_muonclip.qk_clip.rule import SHARED_KEYS, key_factors

EYE = [[2.0, 0.0], [0.0, 2.0]]
TWO_TOKENS = [[[1.0, 0.0], [0.0, 1.0]]]


def times(factor: float) -> list[list[float]]:
    return [[factor, 0.0], [0.0, factor]]


def test_gamma_touches_nothing_but_finite_logits_above_the_threshold() -> None:
    maxima = torch.tensor([200.0, 50.0, 100.0, 0.0, -0.0, -5.0, -INF, INF, math.nan])
    gamma = qk_clip_gamma(maxima, 100.0)
    assert gamma.dtype is torch.float32
    assert gamma.tolist() == [0.5, 1, 1, 1, 1, 1, 1, 1, 1]


def test_gamma_has_no_epsilon() -> None:
    assert qk_clip_gamma(torch.tensor([4e-30, 1e-30]), 2e-30).tolist() == [0.5, 1.0]


def test_gamma_keeps_the_shape_and_works_in_float32() -> None:
    assert (
        qk_clip_gamma(torch.full((2, 3), 300.0, dtype=torch.bfloat16), 100.0).tolist()
        == [[pytest.approx(1 / 3, rel=1e-6)] * 3] * 2
    )


def test_without_a_threshold_gamma_is_one() -> None:
    assert qk_clip_gamma(torch.tensor([200.0, INF, math.nan]), None).tolist() == [1, 1, 1]


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan])
def test_a_threshold_that_is_not_positive_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold must be positive, or None to only monitor"):
        qk_clip_gamma(torch.ones(1), threshold)


@settings(max_examples=100)
@given(
    st.sampled_from(SHARED_KEYS),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    st.integers(1, 4).flatmap(
        lambda groups: st.tuples(
            st.just(groups),
            st.integers(1, 4).flatmap(
                lambda size: st.lists(
                    st.floats(-50, 500) | st.sampled_from([-INF, INF, math.nan]),
                    min_size=groups * size,
                    max_size=groups * size,
                )
            ),
        )
    ),
)
def test_factors_are_those_of_a_loop(shared_keys: str, alpha: float, drawn: tuple[int, list[float]]) -> None:
    groups, maxima = drawn
    expected = policy_factors(maxima, 100.0, alpha, groups, shared_keys)
    found = key_factors(qk_clip_gamma(torch.tensor(maxima), 100.0), alpha, groups, shared_keys)
    for a, b in zip(found, expected):
        assert a.tolist() == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize("shared_keys", SHARED_KEYS)
def test_layers_are_computed_side_by_side(shared_keys: str) -> None:
    gamma = torch.rand(3, 6)
    query, key = key_factors(gamma, 0.25, 2, shared_keys)
    assert query.shape == (3, 6) and key.shape == (3, 2)
    for layer in range(3):
        alone = key_factors(gamma[layer], 0.25, 2, shared_keys)
        assert torch.equal(query[layer], alone[0]) and torch.equal(key[layer], alone[1])


def test_what_each_policy_does_to_a_group() -> None:
    gamma = torch.tensor([0.25, 1.0])
    by_hand = {
        "query": ([0.25, 1.0], [1.0]),
        "group": ([0.5, 0.5], [0.5]),
        "min_k": ([0.5, 1.0], [0.5]),
        "compensate": ([0.5, 2.0], [0.5]),
    }
    found = {name: tuple(f.tolist() for f in key_factors(gamma, 0.5, 1, name)) for name in SHARED_KEYS}
    assert found == by_hand


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor, lambda x: nn.Parameter(torch.tensor(x))])
@pytest.mark.parametrize(
    ("t", "alpha", "expected"),
    [
        (1.0, 0.5, (times(1.1892), times(1.1892), True, 1.0)),
        (4.0, 0.5, (EYE, EYE, False, 2.8284)),
        (1.0, 0.0, (EYE, times(0.7071), True, 1.0)),
        (1.0, 1.0, (times(0.7071), EYE, True, 1.0)),
        (1.0, 0.25, (times(1.5422), times(0.917), True, 1.0)),
    ],
)
def test_the_reference_on_examples(convert: Any, t: float, alpha: float, expected: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = muonclip_qk_clip(convert(EYE), convert(EYE), convert(TWO_TOKENS), t, alpha)
    assert found == expected
    assert [type(value) for value in found] == [list, list, bool, float]


@pytest.mark.parametrize("x", [[], [[]], np.zeros((0, 3, 2)), torch.zeros(2, 0, 2)])
def test_the_reference_on_nothing(x: Any) -> None:
    assert muonclip_qk_clip(EYE, EYE, x, 1.0) == (EYE, EYE, False, 0.0)


def test_the_reference_takes_the_largest_logit_and_not_the_largest_magnitude() -> None:
    negative = [[-2.0, 0.0], [0.0, -2.0]]
    assert muonclip_qk_clip(EYE, negative, [[[3.0, 0.0]]], 1.0) == (EYE, negative, False, -25.4558)


def test_the_reference_looks_at_pairs_within_a_sequence_only() -> None:
    x = [[[5.0, 0.0]], [[0.0, 1.0]], [[0.1, 0.0]]]
    query, key = [[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]
    assert muonclip_qk_clip(query, key, x, 1.0) == (query, key, False, 0.0)
    together = [[token for (token,) in x]]
    assert muonclip_qk_clip(query, key, together, 1.0)[2:] == (True, 1.0)


def test_the_reference_leaves_its_arguments_alone() -> None:
    weight = torch.tensor(EYE, dtype=torch.float64)
    muonclip_qk_clip(weight, weight, TWO_TOKENS, 1.0)
    assert weight.tolist() == EYE


def test_the_reference_rounds_to_four_decimals() -> None:
    query, key, clipped, largest = muonclip_qk_clip([[1 / 3]], [[2 / 3]], [[[1.0]]], 5.0)
    assert (query, key, clipped, largest) == ([[0.3333]], [[0.6667]], False, 0.2222)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((EYE, EYE, TWO_TOKENS, 0.0), "threshold must be positive"),
        ((EYE, EYE, TWO_TOKENS, -1.0), "threshold must be positive"),
        ((EYE, EYE, TWO_TOKENS, 1.0, -0.1), r"alpha.* must be in \[0, 1\]; got -0.1"),
        ((EYE, EYE, TWO_TOKENS, 1.0, 1.1), r"alpha.* must be in \[0, 1\]; got 1.1"),
        ((EYE, EYE, [], 0.0), "threshold must be positive"),
        ((EYE, EYE[:1], TWO_TOKENS, 1.0), r"matrices of the same shape, got \(2, 2\) and \(1, 2\)"),
        ((EYE[0], EYE[0], TWO_TOKENS, 1.0), "matrices of the same shape"),
        ((EYE, EYE, EYE, 1.0), r"x must have shape \(batch, seq, 2\), got \(2, 2\)"),
        ((EYE, EYE, [[[1.0, 2.0, 3.0]]], 1.0), r"x must have shape \(batch, seq, 2\), got \(1, 1, 3\)"),
    ],
)
def test_the_reference_refuses(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        muonclip_qk_clip(*arguments)
