"""Every Python snippet of the README runs, beside what its reader has already."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import LitTiny, loader, next_token_loss, tiny_gpt, token_batches
from torch import nn

import lightning_muonclip
from lightning_muonclip.hugging_face import MuonClipLogger

README = Path(__file__).parents[1] / "README.md"
PAGE = README.read_text()
#: An application with a file of its own is run as one.
APPLICATION = "import hydra\n"
SNIPPETS = [
    snippet
    for snippet in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    if not snippet.startswith(APPLICATION)
]


def lightning() -> dict[str, Any]:
    trainer = partial(L.Trainer, max_steps=2, logger=False, enable_checkpointing=False, accelerator="cpu")
    quiet = type("L", (), {"Trainer": staticmethod(trainer)})
    model = LitTiny(tiny_gpt(), partial(torch.optim.AdamW, lr=1e-3))
    return {"L": quiet, "model": model, "data": loader(token_batches(2))}


def plain() -> dict[str, Any]:
    class Loss:
        """Is computed once there is an optimizer, which sees the forward."""

        def backward(self) -> None:
            next_token_loss(model, token_batches(1)[0]).backward()

    model = tiny_gpt()
    return {"model": model, "loss": Loss()}


def hugging_face() -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=17, **sizes))
    args = TrainingArguments("outputs", max_steps=2, logging_steps=1, report_to="none", use_cpu=True)
    data = [{"input_ids": row, "labels": row} for row in token_batches(4).flatten(0, 1)]
    return {"Trainer": Trainer, "MuonClipLogger": MuonClipLogger, "model": model, "args": args, "data": data}


def mup() -> dict[str, Any]:
    def make(hidden_size: int) -> nn.Module:
        return nn.Sequential(
            nn.Embedding(8, hidden_size), nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, 8)
        )

    return {"make": make, "plain": make(1024)}


def mixin() -> dict[str, Any]:
    return {}


def summary() -> dict[str, Any]:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt = tiny_gpt()

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.gpt(input_ids)

    return {"model": Model(), "tokens": token_batches(1)[0]}


#: What the reader of each snippet has, in the order of the page.
READERS: list[Callable[[], dict[str, Any]]] = [lightning, plain, hugging_face, mup, mixin, summary, mixin]


def test_every_snippet_has_a_reader() -> None:
    assert len(SNIPPETS) == len(READERS)


@pytest.mark.parametrize(("snippet", "reader"), zip(SNIPPETS, READERS))
def test_snippet(
    snippet: str, reader: Callable[[], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scope = {name: getattr(lightning_muonclip, name) for name in lightning_muonclip.__all__} | reader()
    exec(compile(snippet, str(README), "exec"), scope)
    for value in scope.values():
        if isinstance(value, (lightning_muonclip.MuonClip, lightning_muonclip.QKClip)):
            value.close()
    trainer = scope.get("trainer")
    if reader is lightning:
        assert trainer.global_step == 2
    elif reader is hugging_face:
        assert trainer.train().global_step == 2
        assert all("muonclip/max_logit" in log for log in trainer.state.log_history if "loss" in log)
    elif reader is plain:
        assert scope["optimizer"].last.max_logits.isfinite().all()


#: A LightningModule of the reader.
MINE = """
import lightning as L
import torch.nn.functional as F

class LitMine(L.LightningModule):
    def __init__(self, model, optimizer):
        super().__init__()
        self.network, self.make_optimizer = model, optimizer

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.network(batch[0]).flatten(0, 1), batch[1].flatten())

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())

    def on_train_end(self):
        print("trained", self.global_step, self.trainer.callback_metrics["muonclip/max_logit"] > 0)
"""


def test_the_application_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (config,) = re.findall(r"^```yaml\n# app.yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (script,) = re.findall(rf"^```python\n({APPLICATION}.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for name, text in {"app.yaml": config, "app.py": script, "mine.py": MINE}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    tiny = ["model.hidden_size=16", "model.num_hidden_layers=1", "data.block_size=16", "data.max_bytes=9999"]
    monkeypatch.setattr(sys, "argv", ["app.py", *tiny, "trainer.max_steps=2", "+trainer.logger=false"])
    runpy.run_path("app.py", run_name="__main__")
    assert "trained 2 tensor(True)" in capsys.readouterr().out
