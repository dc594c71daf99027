"""attention_log_sum_exp bounds the largest logit and computes torch's attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import INF, brute_max_logits, causal
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_muonclip.kernels.log_sum_exp import attention_log_sum_exp, supports_log_sum_exp


def normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def brute_log_sum_exp(query: Tensor, key: Tensor, scale: float, visible: Tensor) -> Tensor:
    """The largest log-sum-exp per head, from the whole logit matrix in float64; queries that see nothing do not count."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = scale * torch.einsum("bhid,bhjd->bhij", query.double(), key.double())
    visible = visible.expand(logits.shape)
    sums = logits.masked_fill(~visible, -INF).logsumexp(-1)
    return sums.masked_fill(~visible.any(-1), -INF).amax((0, 2))


@st.composite
def inputs(draw: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool, float]:
    batch, key_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    dim, length, seed = (
        draw(st.sampled_from([1, 5, 16])),
        draw(st.sampled_from([1, 3, 17, 70])),
        draw(st.integers(0, 999)),
    )
    key_length = draw(st.sampled_from([1, 3, 17, 70]))
    query = draw(st.sampled_from([1.0, 4.0])) * normal((batch, key_heads * group, length, dim), seed)
    key, value = (normal((batch, key_heads, key_length, dim), seed + i) for i in (1, 2))
    full = (batch, key_heads * group, length, key_length)
    shape = tuple(size if draw(st.booleans()) else 1 for size in full)[draw(st.sampled_from([0, 2])) :]
    mask = normal(shape, seed + 3) > draw(st.sampled_from([-1.0, 0.5, 2.0])) if draw(st.booleans()) else None
    is_causal = mask is None and draw(st.booleans())
    return query, key, value, mask, is_causal, draw(st.sampled_from([dim**-0.5, 1.3]))


@settings(max_examples=80)
@given(inputs())
def test_bounds_the_largest_logit_and_attends_as_torch_does(drawn: Any) -> None:
    query, key, value, mask, is_causal, scale = drawn
    assert supports_log_sum_exp(query, key, value, mask, 0.0)
    query.requires_grad_()
    output, bounds = attention_log_sum_exp(*drawn)
    keys = key.shape[-2]
    visible = torch.ones(1, 1, dtype=torch.bool) if mask is None else mask
    if is_causal:
        visible = causal(query.shape[-2], keys)
    torch.testing.assert_close(bounds.double(), brute_log_sum_exp(query, key, scale, visible), rtol=1e-5, atol=1e-5)
    largest = brute_max_logits(query, key, scale, visible)
    rounding = 1e-5 + 1e-5 * largest.abs().clamp(max=1e3)  # finite also where a head sees nothing
    assert (bounds >= largest - rounding).all()
    assert (bounds <= largest + math.log(keys) + rounding).all()
    assert bounds.dtype is torch.float32 and not bounds.requires_grad
    (gradient,) = torch.autograd.grad(output.square().sum(), query)
    exact = query.detach().double().requires_grad_()
    options = {"is_causal": is_causal, "scale": scale, "enable_gqa": True}
    with sdpa_kernel([SDPBackend.MATH]):
        expected = F.scaled_dot_product_attention(exact, key.double(), value.double(), mask, **options)
    sees = visible.any(-1, keepdim=True).expand_as(expected[..., :1])
    expected = torch.where(sees, expected, 0.0)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)
    if sees.all():
        (expected_gradient,) = torch.autograd.grad(expected.square().sum(), exact)
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_same_kernel_gives_the_same_bits(dtype: torch.dtype) -> None:
    query, key, value = (normal((2, 4, 33, 8), seed).to(dtype) for seed in range(3))
    output, bounds = attention_log_sum_exp(query, key, value, None, True, 0.3)
    assert torch.equal(output, F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3))
    assert bounds.dtype is torch.float32
    expected = brute_log_sum_exp(query, key, 0.3, causal(33))
    torch.testing.assert_close(bounds.double(), expected, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=0)


def test_a_query_that_sees_nothing_does_not_count() -> None:
    query = key = value = torch.ones(1, 2, 3, 1)
    visible = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    _, bounds = attention_log_sum_exp(query, -key, value, visible, False, 5.0)  # all logits are -5
    torch.testing.assert_close(bounds, torch.full((2,), -5 + math.log(2)))
    _, bounds = attention_log_sum_exp(query, -key, value, visible, False, 5.0, counted=visible & (torch.arange(3) == 1))
    torch.testing.assert_close(bounds, torch.full((2,), -5.0))
    _, bounds = attention_log_sum_exp(query, -key, value, torch.zeros(3, 3, dtype=torch.bool), False, 5.0)
    assert bounds.tolist() == [-INF, -INF]


@pytest.mark.parametrize("fill", [INF, torch.nan])
def test_non_finite_logits_propagate(fill: float) -> None:
    query, key = normal((2, 3, 33, 8)), normal((2, 3, 33, 8), 1)
    query[1, 2, 4, 3] = fill
    assert attention_log_sum_exp(query, key, key, None, True, 1.0)[1].isfinite().tolist() == [True, True, False]


Q, K = normal((2, 4, 5, 6)), normal((2, 2, 7, 6), 1)
ALL = torch.ones(5, 7, dtype=torch.bool)
REFUSED: dict[str, tuple[Tensor, Tensor, Tensor, Tensor | None, float]] = {
    "dropout": (Q, K, K, None, 0.1),
    "an additive mask": (Q, K, K, ALL.float(), 0.0),
    "values of another width": (Q, K, normal((2, 2, 7, 8)), None, 0.0),
    "a batch that is broadcast": (Q, K[:1], K[:1], None, 0.0),
    "heads that cannot share keys": (Q[:, :3], K, K, None, 0.0),
    "values of other heads": (Q, K, K[:, :1], None, 0.0),
    "two batch dimensions": (Q[None], K[None], K[None], None, 0.0),
    "no batch dimension": (Q[0], K[0], K[0], None, 0.0),
    "keys of another dtype": (Q, K.double(), K, None, 0.0),
    "channels that are not contiguous": (Q, K, normal((2, 2, 6, 7)).mT, None, 0.0),
    "no queries": (Q[:, :, :0], K, K, None, 0.0),
    "no keys": (Q, K[:, :, :0], K[:, :, :0], None, 0.0),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_inputs_are_left_to_torch(case: str) -> None:
    assert supports_log_sum_exp(Q, K, K, ALL, 0.0)
    assert not supports_log_sum_exp(*REFUSED[case])


def test_autocast_is_left_to_torch() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert not supports_log_sum_exp(Q, K, K, None, 0.0)
    assert not supports_log_sum_exp(*(x.to("meta") for x in (Q, K, K)), None, 0.0)


def test_is_traced_into_one_graph() -> None:
    def attend(query: Tensor, key: Tensor, mask: Tensor) -> Any:
        assert supports_log_sum_exp(query, key, key, mask, 0.0)
        return attention_log_sum_exp(query, key, key, mask, False, 0.5)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(Q, K, ALL), attend(Q, K, ALL)):
        assert torch.equal(found, expected)
