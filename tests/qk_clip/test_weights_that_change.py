"""Attention that a module computes by other weights later is not clipped by those that it was read with."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_muonclip import QKClip

HEADS, WIDTH = 2, 8


class Picks(nn.Module):
    """Picks the projection of its queries, or of its keys, or of both."""

    def __init__(self, what: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.what = what
        self.query, self.key = (nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)) for _ in range(2))
        self.bare = nn.ParameterList(torch.randn(WIDTH, WIDTH) for _ in range(2))
        self.whole = nn.Linear(WIDTH, 2 * WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.attends = True

    def parts(self, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        key = self.key[i if self.what in ("keys", "both") else 0](x)
        if self.what == "parameters":
            return x @ self.bare[i].T, key
        if self.what == "rows":
            return self.whole(x).chunk(2, -1)[i], key
        return self.query[i if self.what in ("queries", "both") else 0](x), key

    def forward(self, x: Tensor, i: int = 0) -> Tensor:
        q, k, v = (y.view(*x.shape[:2], HEADS, -1).transpose(1, 2) for y in (*self.parts(x, i), self.value(x)))
        return (F.scaled_dot_product_attention(q, k, v) if self.attends else v).transpose(1, 2).flatten(2)


def step(model: nn.Module, qk_clip: QKClip, *numbers: int) -> set[str]:
    """The names of the weights that one step changes, after a forward with each number."""
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    model.zero_grad()
    for number in numbers:
        model(torch.randn(2, 5, WIDTH), number).square().sum().backward()
    qk_clip.step()
    return {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}


@pytest.mark.parametrize("unknown", ["error", "monitor"])
@pytest.mark.parametrize("what", ["queries", "keys", "both", "parameters"])
def test_a_step_by_other_weights_clips_nothing(what: str, unknown: str) -> None:
    model = Picks(what)
    with QKClip(model, 1e-3, unknown=unknown) as qk_clip:
        assert step(model, qk_clip, 0)
        if unknown == "error":
            with pytest.raises(ValueError, match=r"took no part(.|\n)*specs="):
                step(model, qk_clip, 1)
        else:
            assert not step(model, qk_clip, 1) and "took no part" in qk_clip.sides[""]
            assert qk_clip.layers == [""] and not step(model, qk_clip, 0)


def test_what_did_not_attend_or_has_no_gradient_at_all_is_no_change() -> None:
    model = Picks("queries")
    with QKClip(model, 1e-3) as qk_clip:
        assert step(model, qk_clip, 0)
        model.attends = False
        assert not step(model, qk_clip, 0)  # queries and keys run, but get no gradient
        model.attends = True
        model.zero_grad()
        with torch.no_grad():
            model(torch.randn(2, 5, WIDTH))
        qk_clip.step()
        assert qk_clip.sides == {"": "q and k"}


def test_rows_that_may_take_the_place_of_others_are_refused() -> None:
    with pytest.raises(ValueError, match=r"some channels of whole\.weight make nothing"):
        QKClip(Picks("rows"), example=((torch.randn(2, 5, WIDTH),), {}))
