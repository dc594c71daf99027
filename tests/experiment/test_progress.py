import io
import re
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import rich
import torch
from helpers import LitTiny, loader, tiny_gpt, token_batches, trainer
from rich.console import Console

from lightning_muonclip.experiment.progress import OneLineProgress


class LitLogged(LitTiny):
    """Logs figures of the largest size that a run has."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        logged = {"train/loss": 12.345, "val/bits_per_byte": 10.01, "muonclip/max_logit": 1178.04}
        self.log_dict({**logged, "muonclip/clipped_heads": 16.0})
        return loss


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    file = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=file, width=80, force_terminal=True))
    return file


def fit(steps: int, callbacks: list[pl.Callback]) -> None:
    lit = LitLogged(tiny_gpt(), partial(torch.optim.SGD, lr=0.1))
    trainer(callbacks, max_steps=steps, max_epochs=-1, enable_progress_bar=True).fit(lit, loader(token_batches(3)))


def lines(screen: io.StringIO) -> list[str]:
    return [
        line
        for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n").split("\n")
        if line
    ]


def test_progress_is_one_line_of_80_columns(screen):
    fit(7, [OneLineProgress(seconds=0.0)])
    found = lines(screen)
    assert found
    assert all(len(line) <= 80 and re.match(r" *\d/7 ", line) for line in found)
    assert found[-1].startswith("7/7 ")
    assert found[-1].endswith("loss 12.35 · bpb 10.01 · S 1178.0 · clipped 16")


class Stops(pl.Callback):
    def on_train_batch_end(self, fit: pl.Trainer, *_: Any) -> None:
        fit.should_stop = fit.global_step == 2


@pytest.mark.parametrize("is_disabled", [True, False])
def test_a_run_that_stops_early_ends_the_bar(screen, is_disabled):
    bar = OneLineProgress()
    if is_disabled:
        bar.disable()
    fit(7, [bar, Stops()])
    found = lines(screen)
    assert not found if is_disabled else found[-1].startswith("2/7 ")
    assert bar._progress is None
