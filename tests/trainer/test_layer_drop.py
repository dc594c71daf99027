"""Layers that a batch does not use: proven when they are used, and never logged as if they had been."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LitTiny, loader, token_batches, trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_muonclip import Attention, AttentionSpec, MuonClipCallback, Projection

TOKENS = token_batches(4)
NAMES = [f"model.layers.{i}" for i in range(3)]
SWAPPED = AttentionSpec((Projection("in_proj_weight", "[k(H d) | q(H d) | *]"),), 2, sizes={"d": 8})
RIGHT = AttentionSpec((Projection("in_proj_weight", "[q(H d) | k(H d) | *]"),), 2, sizes={"d": 8})


class Dropping(nn.Module):
    """Its forwards use the layers of a plan, one entry a batch."""

    def __init__(self, plan: list[set[int]], ours: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 16)
        self.layers = nn.ModuleList(
            [Attention(16, 2) if ours else nn.MultiheadAttention(16, 2, bias=False, batch_first=True) for _ in range(3)]
        )
        self.head = nn.Linear(16, 17)
        self.plan, self.batch = plan, 0

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for number, layer in enumerate(self.layers):
            if number in self.plan[self.batch]:
                is_torchs = isinstance(layer, nn.MultiheadAttention)
                x = x + (layer(x, x, x, need_weights=False)[0] if is_torchs else layer(x))
        return self.head(x)


class Lit(LitTiny):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.model.batch = batch_idx
        return super().training_step(batch, batch_idx)


def fit(model: nn.Module, callback: MuonClipCallback, **options: Any) -> Any:
    fitter = trainer([callback], **options)
    lit = Lit(model, lambda params: torch.optim.AdamW(params, lr=3e-3))
    try:
        fitter.fit(lit, loader(TOKENS))
    finally:
        callback.steps = fitter.global_step
    return fitter


@pytest.mark.parametrize(
    ("plan", "proofs"),
    [
        ([{0}, {0}, {0, 1, 2}, {0}], [[0], [1, 2]]),
        ([{1, 2}, {0}, {1}, {2}], [[1, 2], [0]]),
        ([{2}, {1}, {0}, {2}], [[2], [1], [0]]),
        ([set(), {0, 1, 2}, set(), {1}], [[0, 1, 2]]),
        ([{0, 1}] * 4, [[0, 1]]),
    ],
)
def test_a_layer_is_proven_once_at_the_first_batch_that_uses_it(
    plan: list[set[int]], proofs: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    callback = MuonClipCallback(threshold=1.0, verify=True, specs=dict.fromkeys(NAMES, RIGHT))
    fit(Dropping(plan), callback)
    assert callback.steps == 4
    told = [record.getMessage() for record in caplog.records if "QK-Clip verified" in record.getMessage()]
    assert [[i for i, name in enumerate(NAMES) if name in text] for text in told] == proofs


@pytest.mark.parametrize(
    ("plan", "wrong", "steps"),
    [([{0}, {0, 1, 2}], 1, 1), ([{0, 1}, {1}, {0}, {2}], 2, 3), ([set(), set(), {0}], 0, 2)],
)
def test_a_wrong_spec_of_a_layer_ends_the_run_when_it_is_used(plan: list[set[int]], wrong: int, steps: int) -> None:
    model = Dropping(plan)
    specs = {name: SWAPPED if i == wrong else RIGHT for i, name in enumerate(NAMES)}
    callback = MuonClipCallback(threshold=1.0, verify=True, specs=specs)
    before: list[Any] = []
    original = callback.on_before_optimizer_step

    def noted(*args: Any) -> None:
        before.append(copy.deepcopy(model.state_dict()))
        original(*args)

    callback.on_before_optimizer_step = noted  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=rf"(?s)does not describe its attention.*{NAMES[wrong]}: "):
        fit(model, callback)
    assert callback.steps == steps
    assert all(torch.equal(value, before[-1][name]) for name, value in model.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in model.layers)


@pytest.mark.parametrize(("ours", "verify"), [(False, True), (True, False)])
@pytest.mark.parametrize("plan", [[{0}, {1}, set(), {2}], [set(), set(), {0, 1, 2}, set()], [set()] * 4])
def test_no_infinity_is_logged(plan: list[set[int]], verify: bool, ours: bool, tmp_path: Path) -> None:
    callback = MuonClipCallback(threshold=1.0, verify=verify, log_heads_every_n_steps=1)
    logger = CSVLogger(tmp_path)
    fitter = fit(Dropping(plan, ours), callback, logger=logger, log_every_n_steps=1)
    logger.save()
    text = (Path(logger.log_dir) / "metrics.csv").read_text() if (Path(logger.log_dir) / "metrics.csv").exists() else ""
    assert "inf" not in text
    assert callback.steps == 4
    value = float(fitter.callback_metrics.get("muonclip/max_logit", torch.tensor(float("nan"))))
    used = any(plan)
    assert (value > float("-inf")) == used  # the last that was seen; NaN if none was


def test_a_second_fit_logs_nothing_of_the_first() -> None:
    callback = MuonClipCallback(threshold=1.0, specs={NAMES[1]: None}, log_stats_every_n_steps=2)
    model = Dropping([{0}] * 4)
    assert float(fit(model, callback).callback_metrics["muonclip/max_logit"]) > 0
    assert callback.last_stats
    model.plan, callback.log_stats_every_n_steps = [{1}] * 4, None
    assert fit(model, callback).callback_metrics["muonclip/max_logit"].isnan()
    assert not callback.last_stats
