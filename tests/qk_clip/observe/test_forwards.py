"""Attention is measured however a forward computes it, with no patch in reach."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import Residual, SdpaAttention, enlarge
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lightning_muonclip import QKClip

Attend = Callable[..., Tensor]


def by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    hidden = torch.ones(query.shape[-2], key.shape[-2]).triu(1).bool()
    return (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ value


def by_function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def by_default(q: Tensor, k: Tensor, v: Tensor, attend: Attend = scaled_dot_product_attention) -> Tensor:
    return attend(q, k, v, is_causal=True)


class Told(SdpaAttention):
    """Attends by what it is told."""

    def __init__(self, *attends: Attend) -> None:
        super().__init__(16, 4)
        self.attends, self.number = attends, 0
        enlarge(self)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(*x.shape[:2], 4, 4).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.attends[self.number](q, k, v).transpose(1, 2).flatten(2)


def sees(qk_clip: QKClip, module: Told, x: Tensor, row: int = 0) -> None:
    torch.testing.assert_close(qk_clip.max_logits[row].double(), module.max_logits(x), rtol=1e-5, atol=1e-6)


ALIASES: dict[str, Attend] = {
    "partial": functools.partial(scaled_dot_product_attention, is_causal=True),
    "attribute": type("Holder", (), {"attend": staticmethod(by_default)}).attend,
}


@pytest.mark.parametrize("alias", ALIASES)
@pytest.mark.parametrize("is_root", [True, False])
def test_another_name_of_sdpa_is_seen_from_the_first_forward_on(alias: str, is_root: bool) -> None:
    attention, x = Told(ALIASES[alias]), torch.randn(2, 5, 16)
    model: Any = attention if is_root else nn.Sequential(attention, nn.Dropout(0.5))
    torch.manual_seed(0)
    expected = model(x)
    state = torch.get_rng_state()
    with QKClip(model, threshold=0.1) as qk_clip:
        torch.manual_seed(0)
        assert torch.equal(model(x), expected) and torch.equal(torch.get_rng_state(), state)
        sees(qk_clip, attention, x)
        assert (qk_clip.step().gamma < 1).any()
        model(2 * x)
        sees(qk_clip, attention, 2 * x)
        qk_clip.discard()
        torch.compile(model, fullgraph=True, backend="aot_eager")(3 * x)
        sees(qk_clip, attention, 3 * x)


@pytest.mark.parametrize("attends", [(by_hand, by_function), (by_function, ALIASES["partial"])])
@pytest.mark.parametrize("is_root", [True, False])
def test_a_module_may_attend_in_several_ways(attends: tuple[Attend, ...], is_root: bool) -> None:
    attention, x = Told(*attends), torch.randn(2, 5, 16)
    model: Any = attention if is_root else Residual(attention)
    with QKClip(model, threshold=1.0) as qk_clip:
        for attention.number in (0, 1, 1, 0):
            model(0.1 * x).sum().backward()
            model(x).sum().backward()
            sees(qk_clip, attention, x)
            qk_clip.step()
