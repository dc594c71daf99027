"""The pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_muonclip.experiment.pictures import LogitPictures
from lightning_muonclip.metrics import MaxLogits


class _Trainer:
    is_global_zero = True


@pytest.mark.parametrize("is_proven", [True, False])
def test_maxima_that_are_not_proven_are_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_proven: bool
) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    plot = MaxLogits.plot
    monkeypatch.setattr(MaxLogits, "plot", lambda *args: drawn.append(plot(*args)) or drawn[-1])
    pictures = LogitPictures(str(tmp_path))
    pictures.metric = MaxLogits(2, 3, threshold=2.0)
    for step in range(4):
        maxima, bounds = torch.full((2, 3), float(step)), torch.full((2, 3), float(step))
        if step == 1 and not is_proven:
            bounds[1, 2] += 1
        pictures.metric.update(maxima)
        pictures.history.append(maxima)
        pictures.uncertified.append(bounds > maxima)
    resumed = LogitPictures(str(tmp_path))
    resumed.load_state_dict(pictures.state_dict())
    resumed.metric = pictures.metric
    resumed.on_fit_end(_Trainer(), None)  # type: ignore[arg-type]
    (_, axes), _ = drawn
    crosses = [points for points in axes.collections if points.get_label() == "not proven"]
    assert [points.get_offsets().tolist() for points in crosses] == ([] if is_proven else [[[1.0, 1.0]]])
    assert (tmp_path / "max_logits.png").is_file()
    assert (tmp_path / "heads.png").is_file()
