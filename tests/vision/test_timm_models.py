"""muonclip-train with models of timm, on digits."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("sklearn")

from lightning_muonclip.experiment.digits import DigitsDataModule
from lightning_muonclip.experiment.train import main

TINY = [
    "trainer.max_steps=8",
    "trainer.val_check_interval=4",
    "callbacks.summary.profile_from=1000",
    "data.batch_size=16",
]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str, out: str = "run") -> Path:
        chosen = ["model=timm", "data=digits", "~callbacks.progress_bar", f"hydra.run.dir={out}"]
        monkeypatch.setattr(sys, "argv", ["muonclip-train", *chosen, *overrides])
        main()
        return tmp_path / out

    return run


def test_a_vision_transformer_learns_digits(train: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out = train("trainer.max_steps=100", "callbacks.summary.profile_from=1000", "muonclip.threshold=3")
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert float([row["val/accuracy"] for row in rows if row["val/accuracy"]][-1]) > 0.6  # by chance: 0.1
    assert sum(float(row["muonclip/clipped_heads"] or 0) for row in rows) > 0
    assert (out / "max_logits.png").exists() and (out / "checkpoints" / "best.ckpt").exists()
    assert not (out / "sample.txt").exists()
    printed = capsys.readouterr().out
    assert "validation accuracy" in printed and "samples per second" in printed


def test_resumes_bitwise_in_mid_epoch(train: Any) -> None:
    saving = ["callbacks.checkpoint.monitor=null", "+callbacks.checkpoint.every_n_train_steps=2"]
    saving += ["callbacks.checkpoint.filename='{step}'", "+callbacks.checkpoint.auto_insert_metric_name=false"]
    whole = train(*TINY, *saving, "+callbacks.checkpoint.save_top_k=-1", out="whole") / "checkpoints"
    (saved,) = (path for path in whole.iterdir() if torch.load(path, weights_only=True)["global_step"] == 6)
    resumed = train(*TINY, *saving, f"ckpt_path={saved}", out="resumed") / "checkpoints"
    ends = [torch.load(folder / "last.ckpt", weights_only=True) for folder in (whole, resumed)]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 8
    assert all(torch.equal(value, ends[1]["state_dict"][name]) for name, value in ends[0]["state_dict"].items())


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.overrides.depth=1", "+model.overrides.qk_norm=true", "muonclip.qk_norm=gain"],
        ["model.name=vit_tiny_patch16_224", "model.overrides={patch_size: 4, depth: 1, embed_dim: 24, num_heads: 3}"],
        ["model.name=resnet10t", "model.overrides=null", "optimizer=adamw"],
        ["model.name=resnet10t", "model.overrides=null", "muonclip.include=['*.conv?.weight']", "muonclip.logits=off"],
    ],
)
def test_another_model(train: Any, overrides: list[str]) -> None:
    train(*TINY, "trainer.max_steps=1", *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.name=vit_tiny_patch61"], "timm cannot create 'vit_tiny_patch61'"),
        (["model.name=resnet10t"], "'patch_size'.*model.overrides"),
        (["+model.depth=3"], "unknown key 'model.depth'"),
        (["data.batch_size=2000"], "1438 images are too few: one batch needs 2000 on each of 1 ranks"),
    ],
)
def test_mistakes_are_told(train: Any, overrides: list[str], message: str) -> None:
    with pytest.raises((SystemExit, ValueError), match=message):
        train(*overrides)


def test_digits_are_held_out_and_shuffled_by_the_seed() -> None:
    from sklearn.datasets import load_digits

    data = DigitsDataModule(batch_size=100, seed=3)
    images, labels = next(iter(data.val_dataloader()))
    assert torch.equal(labels, torch.tensor(load_digits().target[1438:1538]))
    assert torch.equal((images[:, 0] + 1) * 8, torch.tensor(load_digits().images[1438:1538], dtype=torch.float32))
    first, again, other = (
        torch.cat([y for _, y in DigitsDataModule(batch_size=100, seed=seed).train_dataloader()]) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again) and not torch.equal(first, other) and len(first) == 1400
