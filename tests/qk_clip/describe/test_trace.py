"""What the trace takes for attention, and what it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_muonclip.qk_clip.describe.trace import Call, Trace, tracing

q, k, v = (torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))


def calls(function: Callable[..., object], *given: Tensor) -> list[Call]:
    given = tuple(x.clone().requires_grad_() for x in given or (q, k, v))
    with Trace(given) as trace:
        function(*given)
    return trace.calls


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "matmul": lambda q, k, v: (q @ k.mT / 2).softmax(-1) @ v,
    "bmm": lambda q, k, v: torch.bmm(torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1), v.flatten(0, 1)),
    "baddbmm": lambda q, k, v: (
        torch.baddbmm(torch.zeros(1), q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1) @ v.flatten(0, 1)
    ),
    "einsum": lambda q, k, v: torch.einsum("bhij,bhjd->bihd", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v),
    "masked": lambda q, k, v: (q @ k.mT).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1) @ v,
    "soft cap": lambda q, k, v: (5 * (q @ k.mT / 5).tanh()).softmax(-1) @ v,
    "a sink": lambda q, k, v: torch.cat([q @ k.mT, torch.ones(2, 3, 5, 1)], -1).softmax(-1)[..., :-1] @ v,
    "by hand": lambda q, k, v: (lambda e: e / e.sum(-1, keepdim=True))((q @ k.mT - 3).exp()) @ v,
    "turned": lambda q, k, v: (k @ q.mT).softmax(-2).mT @ v,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_attention_is_a_call(form: str) -> None:
    (call,) = calls(FORMS[form])
    query, key = call.pairs[0]
    assert torch.equal(query.reshape(2, 3, 5, 4), q) and torch.equal(key.reshape(2, 3, 5, 4), k)
    assert call.value is not None and torch.equal(call.value.reshape(2, 3, 5, 4), v)
    assert not call.problem


OTHERS: dict[str, Callable[..., object]] = {
    "a projection": lambda x, *_: (x @ torch.randn(4, 6, requires_grad=True)).softmax(-1),
    "a router": lambda x, *_: F.linear(x, torch.randn(7, 4, requires_grad=True)).softmax(-1),
    "a product without a softmax": lambda q, k, v: q @ k.mT @ v,
    "a softmax without a product": lambda q, *_: q.softmax(-1),
}


@pytest.mark.parametrize("form", OTHERS)
def test_what_is_no_attention(form: str) -> None:
    assert calls(OTHERS[form]) == []


def test_heads_that_mix_before_the_softmax_are_a_problem() -> None:
    mix = torch.randn(3, 3, requires_grad=True)
    (call,) = calls(lambda q, k, v: torch.einsum("bhij,hg->bgij", q @ k.mT, mix).softmax(-1) @ v)
    assert "stands between the product of queries and keys and the softmax" in call.problem


def test_queries_and_relative_positions_are_a_further_product_of_the_same_logits() -> None:
    (call,) = calls(lambda q, k, v: (q @ k.mT + q @ k.roll(1, -2).mT).softmax(-1) @ v)
    assert len(call.pairs) == 2


def test_products_in_the_mask_of_a_kernel_are_a_bias() -> None:
    (masked,) = calls(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=q @ k.roll(1, -2).mT))
    assert len(masked.pairs) == len(masked.rest) == 1


@pytest.mark.parametrize("needs_weights", [True, False])
def test_multihead_attention_is_seen_inside(needs_weights: bool) -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    (call,) = calls(lambda x: module(x, x, x, need_weights=needs_weights), x)
    assert call.pairs[0][0].shape[-1] == 4


def test_flex_attention_wherever_it_was_imported() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    given = q.clone().requires_grad_()
    globals()["flex_attention"] = flex_attention
    with tracing(Trace((given, k, v))) as trace:
        globals()["flex_attention"](given, k, v)
    assert [call.source for call in trace.calls] == ["flex_attention"]
    assert globals()["flex_attention"] is flex_attention


def test_nothing_behind_depends_on_queries_keys_and_values() -> None:
    for function in FORMS.values():
        given = tuple(x.clone().requires_grad_() for x in (q, k, v))
        with Trace(given):
            output = function(*given)
        gradients = torch.autograd.grad(output.sum(), given, allow_unused=True) if output.requires_grad else (None,)
        assert all(gradient is None or not gradient.any() for gradient in gradients)
