"""Attention is measured however a forward computes it, with no patch in reach."""

from __future__ import annotations

import functools
import warnings
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


@pytest.mark.parametrize("attends", [(by_hand, by_function), (by_function, by_hand), (by_function, ALIASES["partial"])])
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


@pytest.mark.parametrize("attend", [by_hand, by_function])
def test_two_observers_of_a_model_that_is_attention_see_its_first_forward(attend: Attend) -> None:
    attention, x = Told(attend), torch.randn(2, 5, 16)
    with QKClip(attention, threshold=None) as first, QKClip(attention) as second:
        for scale in (1.0, 2.0):
            attention(scale * x)
            for qk_clip in (first, second):
                sees(qk_clip, attention, scale * x)
                qk_clip.step()


@pytest.mark.parametrize("attend", [by_hand, by_function])
@pytest.mark.parametrize("is_root", [True, False])
def test_an_empty_batch_tells_nothing(attend: Attend, is_root: bool) -> None:
    attention, x = Told(attend), torch.randn(2, 5, 16)
    model: Any = attention if is_root else Residual(attention)
    with QKClip(model, threshold=0.1) as qk_clip:
        model(x[:0])
        assert qk_clip.layers == []
        model(x)
        model(x[:0])
        sees(qk_clip, attention, x)
        assert int(qk_clip.step().clipped_heads) > 0


@pytest.mark.parametrize("is_root", [True, False])
def test_weights_that_are_lent_for_a_forward_tell_nothing(is_root: bool) -> None:
    attention, x = Told(by_function), torch.randn(2, 5, 16)
    model: Any = attention if is_root else Residual(attention)
    lent = {name: 2 * param for name, param in model.named_parameters()}
    with QKClip(model, threshold=0.1) as qk_clip:
        torch.func.functional_call(model, lent, (x,))
        assert qk_clip.layers == []
        model(x)
        sees(qk_clip, attention, x)


class TestModulesThatAModelGetsLater:
    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("how", ["append", "insert", "replace"])
    def test_they_are_found_and_clipped(self, how: str, when: str) -> None:
        model, new = nn.Sequential(Told(by_function), Told(by_function)), Told(by_hand)
        optimizer, x = torch.optim.SGD(model.parameters(), lr=0.0), torch.randn(2, 5, 16)
        qk_clip = QKClip(model, threshold=0.1)
        qk_clip.attach(optimizer)

        def step() -> None:
            model(x).sum().backward()
            optimizer.step()

        if when == "after":
            step()
        if how == "append":
            model.append(new)
        elif how == "insert":
            model.insert(1, new)
        else:
            model[1] = new
        optimizer.add_param_group({"params": list(new.parameters())})
        step()
        step()
        row = list(model).index(new)
        assert qk_clip.layers == [str(number) for number in range(len(model))]
        assert set(qk_clip.sides.values()) == {"q and k"}
        assert (qk_clip.clips[row] > 0).any()
        before = model[:row](x)
        model(x)
        sees(qk_clip, new, before, row)
        qk_clip.close()
        assert not any(vars(module).get("_max_logits_watch") for module in model.modules())

    def test_one_that_a_forward_makes_is_seen_in_it(self) -> None:
        class Late(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                if not hasattr(self, "inner"):
                    self.inner = Told(by_function)
                return self.inner(x)

        model, x = nn.Sequential(nn.Linear(16, 16), Late()), torch.randn(2, 5, 16)
        with QKClip(model) as qk_clip:
            model(x)
            sees(qk_clip, model[1].inner, model[0](x))


class Routing(nn.Module):
    """Attends unless told not to, and routes by a softmax over a product of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))
        self.router = nn.Parameter(torch.randn(16, 6))

    def forward(self, x: Tensor, skips: bool = False, past: Tensor | None = None) -> Tensor:
        weights = (torch.matmul(100 * x, self.router)).softmax(-1)
        if skips:
            return weights
        q, k, v = (p(x).unflatten(-1, (4, 4)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)[..., :6] * weights

    @torch.no_grad()
    def expected(self, x: Tensor) -> Tensor:
        q, k = (p(x).unflatten(-1, (4, 4)).transpose(1, 2) for p in (self.q_proj, self.k_proj))
        return (q @ k.mT / 2).amax((0, 2, 3))


def test_a_forward_that_does_not_attend_changes_no_later_one() -> None:
    model = Routing()
    with QKClip(model, 1e9) as qk_clip, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for batch, skips in ((3, False), (3, True), (4, False), (4, True), (2, False)):
            x = torch.randn(batch, 5, 16, generator=torch.Generator().manual_seed(batch))
            model(x, skips, past=torch.empty(0, 4))  # an empty argument beside the batch hides nothing
            expected = torch.full((4,), -torch.inf) if skips else model.expected(x)
            torch.testing.assert_close(qk_clip.step().max_logits[0], expected, rtol=1e-5, atol=1e-6)
    assert sum("no logits were seen in a forward" in str(own.message) for own in seen) == 1


class Overwrites(Routing):
    def forward(self, x: Tensor, skips: bool = False, past: Tensor | None = None) -> Tensor:
        q, k, v = (p(1.0 * x).unflatten(-1, (4, 4)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        x += torch._C._nn.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x


def test_a_forward_that_writes_to_its_input_gives_what_it_gives_alone() -> None:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    expected = Overwrites()(x.clone())
    model = Overwrites()
    with QKClip(model, 1e9) as qk_clip:
        for _ in range(2):
            torch.testing.assert_close(model(x.clone()), expected, rtol=0, atol=0)
            qk_clip.step()
        model(x.clone())
        torch.testing.assert_close(qk_clip.max_logits[0], model.expected(x), rtol=1e-5, atol=1e-6)
