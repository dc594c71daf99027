"""The gate finds on the whole model what no module tells by itself."""

from __future__ import annotations

import copy

import torch
from attentions import BATCH, LENGTH, WIDTH, Drawn, Options
from torch import Tensor, nn

from lightning_muonclip.qk_clip.describe.describe import Found, describe
from lightning_muonclip.qk_clip.describe.find import find_attention
from lightning_muonclip.qk_clip.describe.gate import gate
from lightning_muonclip.qk_clip.describe.survey import Survey


def gated(model: nn.Module) -> list[Found]:
    return find_attention(model, ((torch.randn(BATCH, LENGTH, WIDTH),), {})).found


class Handed(nn.Module):
    """The second layer attends to the keys of the first, which it takes from a store on the side."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (Drawn(Options()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.second(x, self.first.seen[-1][1])
        return self.third(x)


def test_keys_that_a_later_layer_takes_are_left_alone() -> None:
    first, second, third = gated(Handed())
    assert first.layout is not None and first.layout.sides == "q"
    assert "used elsewhere" in first.layout.notes[-1]
    assert second.layout is not None and second.layout.sides == "q"  # its keys come from the first
    assert third.layout is not None and third.layout.sides == "qk" and not third.layout.notes


def test_a_weight_that_something_else_uses_is_refused() -> None:
    model = nn.Sequential(Drawn(Options(heads=3, groups=3)), nn.Linear(WIDTH, WIDTH), Drawn(Options()))
    model[1].weight = model[0].projections[0].weight
    tied, free = gated(model)
    assert tied.layout is None and tied.reason == "its projections.0.weight is 1.weight too"
    assert free.layout is not None


def test_attentions_may_share_a_weight_that_they_use_alike() -> None:
    model = nn.Sequential(Drawn(Options()), Drawn(Options()))
    for name in ("weight", "bias"):
        for i in range(2):
            setattr(model[1].projections[i], name, getattr(model[0].projections[i], name))
    assert all(own.layout is not None and own.layout.sides == "qk" for own in gated(model))


def test_weights_modes_and_buffers_are_as_before() -> None:
    model = nn.Sequential(
        Drawn(Options()), nn.BatchNorm1d(LENGTH), nn.Dropout(), Drawn(Options(norm="gain", offset=1.0))
    )
    with torch.no_grad():
        model[0].projections[1].weight[0] = 1e-44  # a subnormal number
    model[2].eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    x = torch.randn(BATCH, LENGTH, WIDTH)
    with torch.no_grad(), Survey(model) as survey:
        model(x)
    found = describe(survey.calls)
    after_survey = copy.deepcopy(model.state_dict())
    random = torch.random.get_rng_state()
    gate(survey.calls[0][0], found)
    assert all(torch.equal(value, after_survey[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(after_survey[name], before[name]) for name, _ in model.named_parameters())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(own.layout is not None for own in found)
