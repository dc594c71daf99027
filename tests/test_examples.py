"""The examples run and learn."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_lightning_finetune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = runpy.run_path(str(EXAMPLES / "lightning_finetune.py"))["main"](max_steps=3)
    assert float(trainer.callback_metrics["muonclip/max_logit"]) > 0
    assert [type(optimizer).__name__ for optimizer in trainer.optimizers] == ["AdamW", "Muon"]


def test_packed_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    metrics = runpy.run_path(str(EXAMPLES / "packed_documents.py"))["main"](max_steps=25).callback_metrics
    assert float(metrics["loss"]) < 3.0  # of 5.5 at the start
    assert float(metrics["muonclip/max_logit"]) > 0


def test_plain_pytorch() -> None:
    optimizer = runpy.run_path(str(EXAMPLES / "plain_pytorch.py"))["main"](steps=30)
    assert optimizer.last.max_logits.shape == (1, 4)


@pytest.mark.parametrize(
    ("name", "steps", "loss"),
    [("hugging_face_llama", 40, 3.0), ("hugging_face_bert", 70, 0.5)],  # which begin at 5.5 and 0.7
)
def test_hugging_face(name: str, steps: int, loss: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](max_steps=steps)
    metrics = trainer.callback_metrics
    assert float(metrics["loss"]) < loss
    assert float(metrics["muonclip/max_logit"]) > 0
    assert [type(optimizer).__name__ for optimizer in trainer.optimizers] == ["AdamW", "Muon"]
