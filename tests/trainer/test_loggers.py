"""What loggers write of a run, read back from their files."""

from __future__ import annotations

import csv
import re
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LitTiny, loader, tiny_gpt, token_batches, trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_muonclip import MuonClipCallback

STEPS, HEAD = [1, 3], "max_logits/model.layers.1.self_attn/1"


def fit(logger: Logger) -> MuonClipCallback:
    callback = MuonClipCallback(threshold=0.1, log_heads_every_n_steps=2)
    tokens = loader(token_batches(4))
    trainer([callback], logger=logger, log_every_n_steps=1).fit(LitTiny(tiny_gpt(), torch.optim.AdamW), tokens)
    logger.save()
    return callback


def is_picture(file: Any) -> bool:
    """Whether a file holds a picture with more than one color."""
    from matplotlib.image import imread

    picture = imread(file, format="png")
    return (
        picture.ndim == 3 and min(picture.shape[:2]) > 100 and picture.reshape(-1, picture.shape[-1]).std(0).min() > 0
    )


def check(callback: MuonClipCallback, scalars: dict[int, float], head: dict[int, float]) -> None:
    assert callback.last is not None
    assert sorted(scalars) == [0, 1, 2, 3]
    assert scalars[3] == pytest.approx(float(callback.last.max_logit), rel=1e-5)
    assert sorted(head) == STEPS
    assert head[3] == pytest.approx(float(callback.last.max_logits[1, 1]), rel=1e-5)


def test_csv_has_a_column_for_every_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # which numbers do not need
    logger = CSVLogger(tmp_path)
    callback = fit(logger)
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    check(
        callback,
        *(
            {int(row["step"]): float(row[name]) for row in rows if row.get(name)}
            for name in ("muonclip/max_logit", HEAD)
        ),
    )


def test_tensorboard_has_numbers_and_pictures(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path)
    callback = fit(logger)
    read = events.EventAccumulator(logger.log_dir, {"images": 0, "scalars": 0}).Reload()
    check(callback, *({e.step: e.value for e in read.Scalars(name)} for name in ("muonclip/max_logit", HEAD)))
    pictures = read.Images("muonclip/heads")
    assert [picture.step for picture in pictures] == STEPS
    assert all(is_picture(BytesIO(picture.encoded_image_string)) for picture in pictures)


def test_wandb_has_numbers_and_pictures(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    callback = fit(logger)
    assert callback.last is not None
    summary = logger.experiment.summary
    assert summary["muonclip/max_logit"] == pytest.approx(float(callback.last.max_logit), rel=1e-5)
    assert summary[HEAD] == pytest.approx(float(callback.last.max_logits[1, 1]), rel=1e-5)
    wandb.finish()
    pictures = list(tmp_path.glob("wandb/offline-run-*/files/media/images/muonclip/heads_*.png"))
    assert len(pictures) == len(STEPS)
    assert all(map(is_picture, pictures))


def test_mlflow_has_numbers_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    logger = MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path}/runs.db", artifact_location=str(tmp_path / "artifacts"))
    callback = fit(logger)
    client = logger.experiment
    histories = [client.get_metric_history(logger.run_id, name) for name in ("muonclip/max_logit", HEAD)]
    check(callback, *({e.step: e.value for e in history} for history in histories))
    names = [own.path for own in client.list_artifacts(logger.run_id, "images") if own.path.endswith(".png")]
    assert sorted(int(step) for name in names for step in re.findall(r"step\W(\d+)", name)) == STEPS
    assert all(is_picture(client.download_artifacts(logger.run_id, name)) for name in names)


def test_pictures_need_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"TensorBoardLogger.*pip install 'lightning-muonclip\[plot\]'"):
        fit(TensorBoardLogger(tmp_path))
