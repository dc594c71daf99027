"""The survey sees every attention call, in whatever code, with the modules around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attentions import BATCH, LENGTH, WIDTH, Drawn, Options
from torch import Tensor, nn

from lightning_muonclip.qk_clip.describe.describe import describe
from lightning_muonclip.qk_clip.describe.survey import Survey


def surveyed(model: nn.Module, *args: Any) -> Survey:
    with torch.no_grad(), Survey(model) as survey:
        model(*args)
    return survey


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.norm = attention, nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


@pytest.mark.parametrize("call", ["sdpa", "matmul", "einsum", "merged"])
def test_the_stack_of_modules(call: str) -> None:
    model = nn.Sequential(Block(Drawn(Options(call=call))), Block(Drawn(Options(call=call))))
    survey = surveyed(model, torch.randn(BATCH, LENGTH, WIDTH))
    assert [[frame.name for frame in stack] for stack in survey.calls] == [
        ["", "0", "0.attention"],
        ["", "1", "1.attention"],
    ]
    assert survey.calls[0][-1].args[0].shape == (BATCH, LENGTH, WIDTH)


@torch.jit.script
def _scripted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)), -1), v)


class Hidden(nn.Module):
    """Attention that a function mode does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return _scripted(self.q(x), self.k(x), x)


def test_scripted_attention_is_counted_and_refused() -> None:
    survey = surveyed(Hidden(), torch.randn(BATCH, LENGTH, WIDTH))
    assert len(survey.calls) == 1
    (found,) = describe(survey.calls)
    assert found.layout is None and found.reason


class HalfHidden(Hidden):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q(x), self.k(x), x) + super().forward(x)


def test_attention_of_which_one_call_is_hidden_is_refused() -> None:
    for found in describe(surveyed(HalfHidden(), torch.randn(BATCH, LENGTH, WIDTH)).calls):
        assert found.layout is None
        assert found.reason.startswith("of its 2 attention calls, 1 can be followed when it runs alone")


class HandMade(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        weights = (x @ x.mT).exp()
        return weights / weights.sum(-1, keepdim=True) @ x


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).softmax(-1)


def test_a_softmax_by_hand_counts_and_a_router_does_not() -> None:
    x = torch.randn(BATCH, LENGTH, WIDTH)
    assert len(surveyed(HandMade(), x).calls) == 1
    assert surveyed(Router(), x).calls == []
    assert surveyed(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), Router()), x).calls == []


class Cache:
    def __init__(self) -> None:
        self.keys: list[Tensor] = []


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        cache.keys.append(self.k(x))
        keys = torch.cat(cache.keys, -2)
        return F.scaled_dot_product_attention(self.q(x), keys, keys)


def test_a_cache_is_kept_as_it_was_before_the_forward() -> None:
    survey = surveyed(Cached(), torch.randn(BATCH, LENGTH, WIDTH), Cache())
    assert survey.calls[0][-1].args[1].keys == []


def test_hooks_go_even_if_the_forward_fails() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(RuntimeError), Survey(model):
        model(torch.randn(2, 5))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
