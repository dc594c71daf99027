"""The parts of a fused weight stay with its place in the groups when another tensor takes the place of the weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import SdpaAttention
from torch import Tensor, nn

from lightning_muonclip import Muon, MuonClip

LR = 0.05
ROWS = [torch.tensor([0, 2, 4]), torch.tensor([1, 3, 5])]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False))


def optimizer_of(model: nn.Sequential) -> Muon:
    """The second weight is fused along its rows, the third along its columns."""
    fused, transposed = model[1].weight, model[2].weight
    groups = [{"params": [model[0].weight], "lr": 2 * LR}, {"params": [fused, transposed]}]
    return Muon(groups, LR, parts={fused: (0, ROWS), transposed: (1, ROWS)}, dtype=torch.float64)


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in network().parameters()]


def train(model: nn.Module, optimizer: Muon, steps: range = range(3)) -> list[Tensor]:
    for step in steps:
        for p, grad in zip(model.parameters(), gradients(step)):
            p.grad = grad.to(p.dtype)
        optimizer.step()
    return [p.detach().double() for p in model.parameters()]


def expected() -> list[Tensor]:
    """Every part as a weight of its own."""
    first, fused, transposed = (p.detach().double() for p in network().parameters())
    alone = [first, *(fused[rows] for rows in ROWS), *(transposed[:, rows].mT for rows in ROWS)]
    params = [nn.Parameter(w.clone()) for w in alone]
    optimizer = Muon([{"params": params[:1], "lr": 2 * LR}, {"params": params[1:]}], LR, dtype=torch.float64)
    for step in range(3):
        one, two, three = gradients(step)
        for p, grad in zip(params, [one, *(two[rows] for rows in ROWS), *(three[:, rows].mT for rows in ROWS)]):
            p.grad = grad.clone()
        optimizer.step()
    for i, rows in enumerate(ROWS):
        fused[rows], transposed[:, rows] = params[1 + i].detach(), params[3 + i].detach().mT
    return [params[0].detach(), fused, transposed]


def put_in_place(model: nn.Module, optimizer: Muon, new: Callable[[Tensor], Tensor]) -> None:
    """What accelerate's prepare does: new objects, in the model and at the same places of the groups."""
    found = {}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            found[p] = nn.Parameter(new(p.detach()))
            setattr(module, name, found[p])
    for group in optimizer.param_groups:
        group["params"] = [found[p] for p in group["params"]]


def by_new_parameters(model: nn.Sequential, optimizer: Muon) -> Any:
    put_in_place(model, optimizer, Tensor.double)
    return model, optimizer


def one_by_one(model: nn.Sequential, optimizer: Muon) -> Any:
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            layer = next(layer for layer in model if layer.weight is p)
            layer.weight = group["params"][i] = nn.Parameter(p.detach().double())
    return model, optimizer


def by_conversion(model: nn.Sequential, optimizer: Muon) -> Any:
    return model.double(), optimizer


def by_swapping(model: nn.Sequential, optimizer: Muon) -> Any:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.double(), optimizer
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def by_overwriting(model: nn.Sequential, optimizer: Muon) -> Any:
    before = [list(group["params"]) for group in optimizer.param_groups]
    places = {p: i for i, p in enumerate(model.parameters())}
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    now = list(model.parameters())
    for group, own in zip(optimizer.param_groups, before):
        group["params"] = [now[places[p]] for p in own]
    return model, optimizer


def by_copying(model: nn.Sequential, optimizer: Muon) -> Any:
    return by_new_parameters(*copy.deepcopy((model, optimizer)))


def from_meta(model: nn.Sequential, optimizer: Muon) -> Any:
    with torch.device("meta"):
        model = network()
    optimizer = optimizer_of(model)
    places = {p: i for i, p in enumerate(model.parameters())}
    model.to_empty(device="cpu").double().load_state_dict(network().state_dict())
    now = list(model.parameters())
    for group in optimizer.param_groups:
        group["params"] = [now[places[p]] for p in group["params"]]
    return model, optimizer


REPLACED = [by_new_parameters, one_by_one, by_conversion, by_swapping, by_overwriting, by_copying, from_meta]


@pytest.mark.parametrize("replaced", REPLACED)
def test_fused_weights_stay_fused(replaced: Callable[..., Any]) -> None:
    model = network()
    weights = train(*replaced(model, optimizer_of(model)))
    for weight, other in zip(weights, expected(), strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        lambda groups: groups.pop(0),
        lambda groups: groups[1]["params"].pop(0),
        lambda groups: groups[1]["params"].insert(0, groups[0]["params"].pop()),
        lambda groups: groups[1]["params"].reverse(),
    ],
    ids=["a group is gone", "a weight is gone", "a weight has moved", "another order"],
)
def test_lost_parts_are_an_error(change: Callable[[list[Any]], Any]) -> None:
    model = network()
    optimizer = optimizer_of(model)
    change(optimizer.param_groups)
    with pytest.raises(RuntimeError, match=r"set_parts\(\)"):
        train(model, optimizer)


def test_without_parts_groups_may_change() -> None:
    model = network()
    optimizer = optimizer_of(model)
    optimizer.set_parts({})
    del optimizer.param_groups[1]["params"][0]
    before = model[1].weight.detach().clone()
    train(model, optimizer)
    assert torch.equal(model[1].weight, before)


def test_new_parts_are_found_at_the_new_weights() -> None:
    model = network()
    optimizer = optimizer_of(model)
    optimizer.set_parts({})
    put_in_place(model, optimizer, Tensor.double)
    optimizer.set_parts({model[1].weight: (0, ROWS), model[2].weight: (1, ROWS)})
    for weight, other in zip(train(model, optimizer), expected(), strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=1e-12)


def test_lost_momentum_is_an_error_unless_the_state_is_loaded_anew() -> None:
    model = network().double()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    put_in_place(model, optimizer, Tensor.clone)
    with pytest.raises(RuntimeError, match=r"3 of 3 parameters were replaced .* loses their momentum"):
        train(model, optimizer, range(2, 3))
    optimizer.load_state_dict(state)
    for weight, other in zip(train(model, optimizer, range(2, 3)), expected(), strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=1e-12)


def replaced_in_the_model_alone(model: nn.Module) -> None:
    model.q_proj.weight = nn.Parameter(model.q_proj.weight.detach().clone())


def emptied(model: nn.Module) -> None:
    model.to("meta").to_empty(device="cpu")
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)


@pytest.mark.parametrize("replace", [replaced_in_the_model_alone, emptied])
def test_muonclip_refuses_weights_that_it_would_not_train(replace: Callable[[nn.Module], None]) -> None:
    model = SdpaAttention(16, 2)
    optimizer = MuonClip(model, lr=LR)
    replace(model)
    model(torch.randn(2, 5, 16)).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"q_proj.weight.*param_groups"):
        optimizer.step()
    optimizer.close()
