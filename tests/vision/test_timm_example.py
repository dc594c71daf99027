"""The timm example runs and learns."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")

EXAMPLE = Path(__file__).parents[2] / "examples" / "timm_vit.py"


def test_timm_vit_reads_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = runpy.run_path(str(EXAMPLE))["main"](max_epochs=4)
    assert float(trainer.callback_metrics["accuracy"]) > 0.4
    assert float(trainer.callback_metrics["muonclip/max_logit"]) > 0
