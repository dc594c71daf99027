"""Muon's own options under the callback: schedules, cycled momentum, and fused weights that are found."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import LitTiny, loader, tiny_gpt, token_batches, trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from lightning_muonclip import MuonClipCallback, decay_to_zero, momentum_warmup

STEPS = 4


class Seen(Callback):
    """What groups have at every step of Muon."""

    def __init__(self, callback: MuonClipCallback) -> None:
        self.callback, self.rows = callback, []

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        assert self.callback.muon is not None
        users = trainer.optimizers[0].param_groups[0]
        (group, *_) = self.callback.muon.param_groups
        self.rows.append((users.get("betas", (users.get("momentum"),))[0], group["momentum"], group["weight_decay"]))


def fit(callback: MuonClipCallback, make: Any, lit: Any = None) -> list[Any]:
    torch.manual_seed(0)
    seen = Seen(callback)
    lit = lit or LitTiny(tiny_gpt(), make)
    trainer([callback, seen], max_steps=STEPS).fit(lit, loader(token_batches(STEPS)))
    return seen.rows


class Cycling(LitTiny):
    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        cycle = OneCycleLR(optimizer, 0.01, total_steps=STEPS + 1, cycle_momentum=self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.AdamW(p, 0.01), lambda p: torch.optim.SGD(p, 0.01, momentum=0.9)]
)
@pytest.mark.parametrize("cycles", [True, False])
@pytest.mark.filterwarnings("ignore:Muon trains with the learning rate")
def test_momentum_follows_what_onecycle_cycles_and_only_that(make: Any, cycles: bool) -> None:
    rows = fit(MuonClipCallback(threshold=None), make, Cycling(tiny_gpt(), make, schedule=cycles))
    if cycles:
        assert len({users for users, _, _ in rows}) > 2
        assert all(users == own for users, own, _ in rows)
    else:
        assert {own for _, own, _ in rows} == {0.95}


def test_functions_of_the_step() -> None:
    callback = MuonClipCallback(threshold=None, momentum=momentum_warmup(3), weight_decay=decay_to_zero(0.4, STEPS))
    rows = fit(callback, lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1))
    # Lightning clears the gradients before a step, so at the first Muon has what is to come.
    assert [momentum for _, momentum, _ in rows] == pytest.approx([momentum_warmup(3)(step) for step in range(STEPS)])
    assert [decay for _, _, decay in rows] == pytest.approx([decay_to_zero(0.4, STEPS)(step) for step in range(STEPS)])
    none = fit(
        MuonClipCallback(threshold=None, weight_decay=decay_to_zero(0.4, STEPS)),
        lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.0),
    )
    assert {decay for _, _, decay in none} == {0.0}


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 8)
        self.gate_up, self.down = nn.Linear(8, 12), nn.Linear(6, 17)

    def forward(self, tokens: Tensor) -> Tensor:
        gate, up = self.gate_up(self.embedding(tokens)).chunk(2, -1)
        return self.down(nn.functional.silu(gate) * up)


def test_fused_weights_are_found_and_told(caplog: pytest.LogCaptureFixture) -> None:
    def make(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, 0.01)

    callback = MuonClipCallback(threshold=None)
    with caplog.at_level("INFO"):
        fit(callback, make, LitTiny(Gated(), make))
    assert "model.gate_up.weight" in caplog.text
    assert "hidden matrix, 2 parts: gate, up" in caplog.text
    given = MuonClipCallback(threshold=None, parts={"*gate_up.weight": (0, [range(0, 12, 2), range(1, 12, 2)])})
    lit = LitTiny(Gated(), make)
    fit(given, make, lit)
    assert given.muon is not None
    assert given.muon.parts[lit.model.gate_up.weight][1][0].tolist() == [0, 2, 4, 6, 8, 10]
