"""The coordinate check as a test, and small runs of the commands."""

from __future__ import annotations

import csv
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_muonclip import Attention
from lightning_muonclip.experiment import coord_check
from lightning_muonclip.experiment.gpt import GPT
from lightning_muonclip.experiment.train import main

WIDTHS = (64, 128, 256)
ACTIVATIONS = ("layers.*.self_attn", "layers.*.mlp", "layers.[01]", "lm_head")
FLAT = ("AdamW, muP", "Muon, muP, spectral", "Muon, muP, RMS")


def make(width: int) -> nn.Module:
    return GPT(partial(Attention, num_attention_heads=4), 32, width, num_hidden_layers=2, intermediate_size=width)


@pytest.mark.slow
@pytest.mark.parametrize("name", coord_check.methods(1.0, 1.0, 64))
def test_coordinate_check(name: str) -> None:
    method = coord_check.methods(lr=0.002, muon_lr=0.02, base_width=64)[name]
    tokens = torch.randint(32, (8, 33), generator=torch.Generator().manual_seed(0))
    batch = tokens[:, :-1], tokens[:, 1:]
    sizes = coord_check.activation_sizes(make, method, WIDTHS, 64, batch, ACTIVATIONS, steps=4, seeds=3)
    assert len(sizes) == 7
    slopes = {key: coord_check.slope(WIDTHS, [own[-1] for own in size]) for key, size in sizes.items()}
    largest = max(map(abs, slopes.values()))
    if name in FLAT:
        assert largest <= 0.12, slopes
    else:  # the same check fails without muP, and with Muon's learning rate unscaled
        assert largest > 0.3, slopes


def test_the_command_draws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["widths=[16,32]", "base_width=16", "steps=1", "seeds=1", "data.max_bytes=200000", "data.block_size=8"]
    monkeypatch.setattr(sys, "argv", ["muonclip-coord-check", *overrides, "hydra.run.dir=out"])
    coord_check.main()
    assert (tmp_path / "out" / "coord_check.png").stat().st_size > 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("  ")[0] for row in rows[1:7]] == list(coord_check.methods(1.0, 1.0, 16))
    monkeypatch.setattr(sys, "argv", ["muonclip-coord-check", "+width=3"])
    with pytest.raises(SystemExit, match="did you mean 'widths'"):
        coord_check.main()


def test_transfer_sweep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = [
        "experiment=mu_transfer",
        "callbacks=default",
        "model.hidden_size=16,32",
        "optimizer.lr=0.02",
        "optimizer=muonclip,adamw",
        "base_hidden_size=null,16",
        "model.num_hidden_layers=1",
        "model.attention.num_attention_heads=2",
        "data.max_bytes=200000",
        "data.block_size=8",
        "data.batch_size=2",
        "data.val_batches=1",
        "trainer.max_steps=2",
        "+trainer.enable_progress_bar=false",
        "~callbacks.progress_bar",
        "~callbacks.summary",
        "~callbacks.pictures",
        "~callbacks.sample",
        "~callbacks.checkpoint",
        "+trainer.enable_checkpointing=false",
        "hydra.sweep.dir=sweep",
    ]
    monkeypatch.setattr(sys, "argv", ["muonclip-train", *tiny])
    main()
    rows = list(csv.DictReader((tmp_path / "sweep" / "transfer.csv").open()))
    assert len(rows) == 8 and {row["optimizer"] for row in rows} == {"MuonClip", "AdamW"}
    at_base = [row for row in rows if row["width"] == "16"]
    losses = {(r["optimizer"], r["lr"], r["parametrization"]): float(r["loss"]) for r in at_base}
    for (optimizer, lr, _), loss in losses.items():  # at the base width muP is the standard parametrization
        assert loss == losses[optimizer, lr, "standard"]
    assert (tmp_path / "sweep" / "transfer.png").stat().st_size > 0
