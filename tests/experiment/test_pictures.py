"""The pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_muonclip import MaxLogitsMixin, MuonClipCallback
from lightning_muonclip.experiment.pictures import LogitPictures
from lightning_muonclip.metrics import MaxLogits


class _Trainer:
    is_global_zero = True
    callbacks = ()
    loggers = ()


@pytest.mark.parametrize("is_proven", [True, False])
def test_maxima_that_are_not_proven_are_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_proven: bool
) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    plot = MaxLogits.plot
    monkeypatch.setattr(MaxLogits, "plot", lambda *args: drawn.append(plot(*args)) or drawn[-1])
    pictures = LogitPictures(str(tmp_path))
    for step in range(4):
        maxima, bounds = torch.full((2, 3), float(step)), torch.full((2, 3), float(step))
        if step == 1 and not is_proven:
            bounds[1, 2] += 1
        pictures.history.append(maxima)
        pictures.uncertified.append(bounds > maxima)
    resumed = LogitPictures(str(tmp_path))
    resumed.load_state_dict(pictures.state_dict())
    resumed.on_fit_end(_Trainer(), None)  # type: ignore[arg-type]
    (_, axes), _ = drawn
    crosses = [points for points in axes.collections if points.get_label() == "not proven"]
    assert [points.get_offsets().tolist() for points in crosses] == ([] if is_proven else [[[1.0, 1.0]]])
    assert (tmp_path / "max_logits.png").is_file()
    assert (tmp_path / "heads.png").is_file()


class Late(nn.Module):
    """Its first layer may take no part."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.early = (nn.TransformerEncoderLayer(8, heads, 8, dropout=0.0) for heads in (4, 2))

    def forward(self, x: Tensor, is_late: bool) -> Tensor:
        return self.early(self.late(x) if is_late else x)


class LitLate(MaxLogitsMixin):
    def __init__(self) -> None:
        super().__init__()
        self.model = Late()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(batch, batch_idx > 1).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("callbacks", [[], [MuonClipCallback()]])
def test_attention_that_is_found_later_gets_its_rows(tmp_path: Path, callbacks: list[Any]) -> None:
    pytest.importorskip("matplotlib")
    pictures = LogitPictures(str(tmp_path))
    data = DataLoader(torch.randn(10, 5, 8), batch_size=2)
    trainer([*callbacks, pictures]).fit(LitLate(), data)
    assert pictures.layers == ["model.late.self_attn", "model.early.self_attn"]
    history = pictures.state_dict()["history"]
    assert history.shape == (5, 2, 4)
    assert history[:2, 0].isneginf().all() and history[2:, 0].isfinite().all()
    assert history[:, 1, :2].isfinite().all() and history[:, 1, 2:].isneginf().all()
    assert (tmp_path / "heads.png").is_file()
