"""Whose learning rate Muon follows, where the user's optimizer has none that suits it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers import LitTiny, loader, tiny_gpt, token_batches, trainer
from torch.optim.lr_scheduler import LambdaLR

from lightning_muonclip import MuonClipCallback


class RelativeSteps(torch.optim.SGD):
    """Finds its learning rate itself, as Adafactor does with relative steps: its groups have None."""

    def __init__(self, params: Any, lr: Any = None) -> None:
        super().__init__(params, lr=0.01)
        for group in self.param_groups:
            group["lr"] = lr

    def step(self, closure: Any = None) -> Any:
        return closure()


class Distance(torch.optim.AdamW):
    """As Prodigy and D-Adaptation: lr is a multiplier of what a group calls d."""

    def __init__(self, params: Any, lr: float = 0.5) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["d"] = 1e-6


class Renamed(torch.optim.NAdam):
    """Adam by its base."""


def fit(make: Any, **options: Any) -> tuple[list[str], Any]:
    torch.manual_seed(0)
    callback = MuonClipCallback(threshold=None, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer([callback]).fit(LitTiny(tiny_gpt(), make), loader(token_batches(2)))
    return [str(w.message) for w in caught if "learning rate of" in str(w.message)], callback.muon


@pytest.mark.parametrize("lr", [None, "auto"])
def test_a_rate_that_is_no_number_is_refused_and_the_optimizer_is_untouched(lr: Any) -> None:
    made = []

    def make(params: Any) -> Any:
        made.append(RelativeSteps(params, lr))
        return made[-1]

    with pytest.raises(ValueError, match=rf"learning rate of RelativeSteps, which is {lr!r}; .* MuonClipCallback\(lr="):
        fit(make)
    assert len(made[0].param_groups[0]["params"]) == len(list(tiny_gpt().parameters()))


@pytest.mark.parametrize("lr", [None, "auto"])
def test_with_its_own_rate_muon_needs_none(lr: Any) -> None:
    told, muon = fit(lambda params: RelativeSteps(params, lr), lr=0.004)
    assert told == []
    assert {group["lr"] for group in muon.param_groups} == {0.004}


@pytest.mark.parametrize(
    ("make", "rate"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.03), "0.03"),
        (lambda p: torch.optim.Adagrad(p, lr=0.02), "0.02"),
        (lambda p: torch.optim.RMSprop([{"params": [q], "lr": 0.01 + (q.ndim > 1) / 100} for q in p]), "0.02"),
        (lambda p: torch.optim.AdamW(p, lr=1.0), "1"),
        (Distance, "0.5"),
    ],
)
def test_a_rate_that_may_not_suit_muon_is_told_once(make: Any, rate: str) -> None:
    told, _ = fit(make)
    assert len(told) == 1
    assert f", {rate}, which may be none for Muon" in told[0]
    assert fit(make, lr=0.001)[0] == []


@pytest.mark.parametrize("make", [lambda p: torch.optim.AdamW(p, lr=0.1), Renamed, torch.optim.RAdam])
def test_the_rates_of_adam_and_its_kin_are_followed_in_silence(make: Any) -> None:
    assert fit(make)[0] == []


def test_the_rate_told_is_that_before_the_warm_up() -> None:
    def make(params: Any) -> Any:
        optimizer = torch.optim.SGD(params, lr=0.03)
        LambdaLR(optimizer, lambda step: step / 10)
        return optimizer

    assert "SGD, 0.03, which" in fit(make)[0][0]
