"""The examples run and learn."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

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


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", ["fabric", "accelerate_loop"])
def test_a_loop_resumes_bitwise(name: str, tmp_path: Path) -> None:
    main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    whole = main(steps=6, state=str(tmp_path / "whole"))
    main(steps=3, state=str(tmp_path / "half"))
    assert_equal(main(steps=6, start=3, state=str(tmp_path / "half")), whole)


def test_hugging_face_trainer_logs_and_resumes_bitwise(tmp_path: Path) -> None:
    try:
        import datasets  # noqa: F401  the Trainer imports it where it is installed
    except ImportError as error:  # the newest pyarrow beside an old NumPy
        pytest.skip(str(error))
    example = runpy.run_path(str(EXAMPLES / "hugging_face_trainer.py"))
    arguments = example["TrainingArguments"]
    example["main"].__globals__["TrainingArguments"] = lambda *args, **kwargs: arguments(
        *args, **{**kwargs, "logging_steps": 2, "save_steps": 4, "save_strategy": "steps", "disable_tqdm": True}
    )
    whole = example["main"](str(tmp_path), max_steps=8)
    logs = [log for log in whole.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [2, 4, 6, 8]
    assert all(0 < log["muonclip/max_logit"] < 100 and log["muonclip/min_gamma"] == 1 for log in logs)
    assert all(log["muonclip/clipped_heads"] == log["muonclip/nonfinite"] == 0 for log in logs)
    resumed = example["main"](str(tmp_path), 8, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [log["muonclip/max_logit"] for log in resumed.state.log_history if "loss" in log] == [
        log["muonclip/max_logit"] for log in logs
    ]
    assert_equal(resumed.model, whole.model)


def test_lightning_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.max_steps=2", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    callback = ["--trainer.callbacks+=lightning_muonclip.MuonClipCallback", "--trainer.callbacks.threshold=30"]
    monkeypatch.setattr(sys, "argv", ["lightning_cli.py", "fit", "--trainer.accelerator=cpu", *options, *callback])
    example = runpy.run_path(str(EXAMPLES / "lightning_cli.py"))
    cli = example["LightningCLI"](example["LitCopy"])
    assert float(cli.trainer.callback_metrics["muonclip/max_logit"]) > 0
    assert [type(optimizer).__name__ for optimizer in cli.trainer.optimizers] == ["AdamW", "Muon"]
