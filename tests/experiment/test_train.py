"""muonclip-train as a user runs it, on a model that takes seconds."""

from __future__ import annotations

import csv
import functools
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from processes import start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_muonclip.experiment.train as command
from lightning_muonclip import Attention, MultiheadLatentAttention, MuonClipCallback
from lightning_muonclip.experiment import config as schemas
from lightning_muonclip.experiment.corpora import StandardLibrary
from lightning_muonclip.experiment.gpt import GPT
from lightning_muonclip.experiment.lit import LitGPT
from lightning_muonclip.experiment.train import main

TINY = [
    "model.hidden_size=16",
    "model.num_hidden_layers=2",
    "model.attention.num_attention_heads=2",
    "data.block_size=16",
    "data.batch_size=4",
    "data.val_batches=1",
    "trainer.max_steps=8",
    "trainer.val_check_interval=4",
    "+trainer.enable_progress_bar=false",
    "callbacks.summary.profile_from=1000",  # which takes a third of the time
    "callbacks.summary.profile_batches=2",
    "~callbacks.progress_bar",
    "callbacks.sample.length=8",
]


@pytest.fixture(scope="module", autouse=True)
def _corpus_is_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StandardLibrary, "load", functools.cache(StandardLibrary.load))
        yield


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str, out: str = "run") -> Path:
        monkeypatch.setattr(sys, "argv", ["muonclip-train", *TINY, f"hydra.run.dir={out}", *overrides])
        main()
        return tmp_path / out

    return run


def assert_same_weights(a: Path, b: Path) -> None:
    assert_equal_trees(*(torch.load(path, weights_only=True)["state_dict"] for path in (a, b)))


def assert_equal_trees(a: Any, b: Any, path: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal_trees(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_equal_trees(x, y, f"{path}.{i}")
    else:
        assert a == b, path


def test_a_run_writes_its_outputs(train: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train("muonclip.threshold=1e-3", "muonclip.log_stats_every_n_steps=2", "callbacks.summary.profile_from=2")
    for name in ("metrics.csv", "config.yaml", "max_logits.png", "heads.png", "sample.txt", "checkpoints/last.ckpt"):
        assert (folder / name).stat().st_size > 0, name
    assert (folder / "sample.txt").read_text().startswith("def ")
    assert OmegaConf.load(folder / "config.yaml").muonclip.threshold == 1e-3
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [r["step"] for r in rows if r["muonclip/max_logit"]] == [str(i) for i in range(8)]
    table = capsys.readouterr().out
    for line in ("validation bits per byte", "peak max logit", "head-clips", "tokens per second"):
        assert line in table
    for line in ("time in Muon", "time in QK-Clip", "time in tracking"):
        assert line in table
    bits = [float(r["val/bits_per_byte"]) for r in rows if r["val/bits_per_byte"]]
    losses = [float(r["val/loss"]) for r in rows if r["val/loss"]]
    assert bits == pytest.approx([loss / 0.6931471805599453 for loss in losses])
    assert (folder / "muon.png").stat().st_size > 0
    assert [row["step"] for row in rows if row["muon/update_rms"]] == ["1", "3", "5", "7"]
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["callbacks"]["StatPictures"]["history"]


@pytest.mark.parametrize(("model", "optimizer"), [("gqa", "muon"), ("mla", "adamw")])
def test_models_and_optimizers(train: Any, model: str, optimizer: str) -> None:
    folder = train(f"model={model}", f"optimizer={optimizer}", "trainer.max_steps=2", "trainer.val_check_interval=2")
    header = (folder / "metrics.csv").open().readline()
    assert ("muonclip/max_logit" in header) == (optimizer != "adamw")
    assert (folder / "max_logits.png").exists()


def test_another_logger(train: Any) -> None:
    heads = "muonclip.log_heads_every_n_steps=1"
    folder = train("logger=tensorboard", heads, "trainer.max_steps=2", "trainer.val_check_interval=2")
    assert list(folder.glob("tensorboard/events*"))
    events = EventAccumulator(str(folder / "tensorboard"), {"images": 0}).Reload()
    assert {"heads", "max_logits", "muonclip/heads"} <= set(events.Tags()["images"])


@pytest.mark.parametrize("experiment", ["demo", "explosion", "adamw_baseline", "kimi_mla", "mu_transfer"])
def test_experiments_compose_and_hold_to_the_schema(experiment: str) -> None:
    with initialize_config_module("lightning_muonclip.conf", version_base="1.3"):
        composed = compose("train", [f"experiment={experiment}"], return_hydra_config=True)
    assert composed.name == experiment
    OmegaConf.set_struct(composed, False)
    composed.hydra.runtime.output_dir = "out"
    from hydra.core.hydra_config import HydraConfig

    HydraConfig.instance().set_config(composed)
    del composed["hydra"]
    schemas.check_config(composed)


@pytest.mark.parametrize(
    ("config", "node", "target", "given"),
    [
        ("optimizer=muonclip", "muonclip", MuonClipCallback, ()),
        ("model=mha", "model.attention", Attention, ("hidden_size",)),
        ("model=mla", "model.attention", MultiheadLatentAttention, ("hidden_size",)),
        ("model=mha", "model", GPT, ()),
    ],
)
def test_configs_have_every_argument_with_its_default(
    config: str, node: str, target: Any, given: tuple[str, ...]
) -> None:
    with initialize_config_module("lightning_muonclip.conf", version_base="1.3"):
        found = OmegaConf.select(compose("train", [config]), node)
    defaults = {name: p.default for name, p in signature(target).parameters.items() if name not in given}
    assert {key for key in found if not key.startswith("_")} == defaults.keys()
    # The app's own: the defaults of the demo, and the vocabulary of the data.
    chosen = {"threshold", "vocab_size", "log_stats_every_n_steps"}
    for name, default in defaults.items():
        if default is not Parameter.empty and name not in chosen:
            expected = list(default) if isinstance(default, tuple) else default
            assert found[name] == expected, name


@pytest.mark.parametrize(
    ("annotation", "scalar"),
    [(int, int), (float | None, float | None), (torch.dtype | str | None, Any), (Sequence[float], Any)],
)
def test_schemas_check_scalars(annotation: Any, scalar: Any) -> None:
    class Target:
        def __init__(self, x) -> None: ...

    Target.__init__.__annotations__["x"] = annotation
    assert {f.name: f.type for f in fields(schemas.schema_of(Target, "here"))} == {"_target_": str, "x": scalar}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("muonclip.treshold=3", "'muonclip.treshold'; did you mean 'threshold'"),
        ("+muonclip.treshold=3", "'muonclip.treshold'; did you mean 'threshold'"),
        ("experment=demo", "did you mean 'experiment'"),
        ("+model.attention.num_heads=2", "'model.attention.num_heads'; did you mean"),
        ("muonclip.threshold=high", "muonclip.threshold: Value 'high'"),
        ("model=mhb", "mha"),
        ("data=text", "path"),
        ("data=text data.path=absent", "absent does not exist"),
        ("ckpt_path=absent.ckpt", "ckpt_path=absent.ckpt does not exist"),
        ("optimizer.lr=null", "torch.optim.AdamW takes no such options, {'lr': None"),
        ("optimizer.betas=[2,3]", "torch.optim.AdamW takes no such options"),
        ("muonclip=null", "use optimizer=adamw"),
    ],
)
def test_mistakes_are_one_line(train: Any, override: str, message: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        train(*override.split(), "trainer.max_steps=1", "trainer.val_check_interval=1")
    assert message in str(exit_.value)


@pytest.mark.parametrize("model", ["mha", "gqa", "mla"])
def test_every_model_clips(train: Any, model: str) -> None:
    folder = train(f"model={model}", "muonclip.threshold=1e-4")
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    clipped = [float(row["muonclip/clipped_heads"]) for row in rows if row["muonclip/clipped_heads"]]
    largest = [float(row["muonclip/max_logit"]) for row in rows if row["muonclip/max_logit"]]
    assert clipped[0] == 4  # 2 layers of 2 heads: every one starts above the threshold
    assert max(largest[1:]) < 0.1 * largest[0]


SMALL = [own for own in TINY if not own.startswith(("callbacks.", "~callbacks", "trainer.", "+trainer."))]


@pytest.mark.parametrize(
    ("overrides", "checkpoint"),
    [
        (["~logger"], "best"),
        (["logger=none", "trainer.max_steps=2"], "best"),
        (["callbacks=none", "trainer.val_check_interval=2"], "epoch=0-step=3"),
        (["~callbacks", "logger=none"], "epoch=0-step=3"),
        (["~experiment", "~logger", "callbacks.summary=null"], "best"),
        (["trainer.max_epochs=1", "+trainer.limit_train_batches=3", "trainer.max_steps=-1"], "best"),
        (["trainer.max_epochs=2", "+trainer.limit_train_batches=2", "trainer.max_steps=-1"], "best"),
        (["trainer.accumulate_grad_batches=2", "trainer.val_check_interval=4"], "best"),
    ],
)
def test_every_run_is_validated_at_its_end_and_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, overrides: list[str], checkpoint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    losses: list[float] = []
    validated: list[int] = []

    def trained(config: Any, run: Any = command.train) -> float:
        losses.append(run(config))
        return losses[-1]

    def noted(module: LitGPT) -> None:
        validated.append(module.trainer.fit_loop.total_batch_idx)

    monkeypatch.setattr(command, "train", trained)
    monkeypatch.setattr(LitGPT, "on_validation_end", noted)
    arguments = [*SMALL, "hydra.run.dir=run", "trainer.max_steps=3", *overrides]
    monkeypatch.setattr(sys, "argv", ["muonclip-train", *arguments])
    main()
    batches = 4 if "trainer.max_epochs=2" in overrides else 3
    batches *= 2 if "trainer.accumulate_grad_batches=2" in overrides else 1
    batches = 2 if "trainer.max_steps=2" in overrides else batches
    assert math.isfinite(losses[0])
    assert validated[-1] == batches - 1
    assert len(validated) == len(set(validated))
    assert any(path.stem == checkpoint for path in (tmp_path / "run").rglob("*.ckpt"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("value", ["null", "false", "3", ""])
@pytest.mark.parametrize(
    ("group", "known"),
    [
        ("logger", "csv, mlflow, none, tensorboard, wandb; ~logger is a run without"),
        ("callbacks", "default, none; ~callbacks is a run without"),
        (
            "experiment",
            "adamw_baseline, demo, explosion, finetune, finetune_lora, kimi_mla, mu_transfer; ~experiment is a run without",
        ),
        ("model", "gqa, hf, mha, mla, moe, timm"),
    ],
)
def test_a_group_that_is_given_no_choice_names_its_choices(train: Any, group: str, value: str, known: str) -> None:
    with pytest.raises(SystemExit, match=rf"^muonclip-train: {group}={value} is no choice; known: {known}$"):
        train(f"{group}={value}")


def test_a_choice_that_does_not_exist_is_one_line(train: Any) -> None:
    with pytest.raises(
        SystemExit, match=r"^muonclip-train: could not find 'optimizer/none'; known: adamw, muon, muonclip$"
    ):
        train("optimizer=none")


def test_an_existing_run_is_not_overwritten(train: Any) -> None:
    folder = train("trainer.max_steps=1")
    before = (folder / "metrics.csv").read_bytes()
    with pytest.raises(SystemExit, match="already contains a run"):
        train("trainer.max_steps=1")
    assert (folder / "metrics.csv").read_bytes() == before


def test_threshold_must_be_positive(train: Any) -> None:
    with pytest.raises(SystemExit, match="threshold must be positive"):
        train("muonclip.threshold=0")


def test_sweep_returns_the_metric_and_draws_one_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = ["hydra.sweep.dir=sweep", "muonclip.threshold=null,0.001"]
    monkeypatch.setattr(sys, "argv", ["muonclip-train", "-m", *TINY, *sweep])
    main()
    assert (tmp_path / "sweep" / "max_logits.png").stat().st_size > 0
    assert {p.parent.name for p in tmp_path.glob("sweep/*/metrics.csv")} == {"0", "1"}


@pytest.mark.parametrize(
    ("saving", "name"),
    [
        (["callbacks.checkpoint.monitor=null", "+callbacks.checkpoint.every_n_train_steps=2"], "6.ckpt"),
        ([], "4.ckpt"),
    ],
    ids=["saved_after_a_batch", "saved_after_validation"],
)
def test_resumes_bitwise_in_mid_epoch(train: Any, saving: list[str], name: str) -> None:
    naming = [
        "callbacks.checkpoint.filename='{step}'",
        "+callbacks.checkpoint.auto_insert_metric_name=false",
        "+callbacks.checkpoint.save_top_k=-1",
    ]
    whole = train("muonclip.threshold=1e-3", *naming, *saving, out="whole") / "checkpoints"
    resumed = train("muonclip.threshold=1e-3", f"ckpt_path={whole / name}", out="resumed") / "checkpoints"
    ends = [torch.load(folder / "last.ckpt", weights_only=True) for folder in (whole, resumed)]
    for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        assert_equal_trees(ends[0][part], ends[1][part])


LONG = ["trainer.max_steps=30", "trainer.val_check_interval=30", "muonclip.threshold=1e-3"]
SAVE_OFTEN = [
    "callbacks.checkpoint.monitor=null",
    "+callbacks.checkpoint.every_n_train_steps=10",
    "callbacks.checkpoint.save_last=true",
]


class Signal(Callback):
    """Somebody sends the process a signal at the start of a batch."""

    def __init__(self, number: int, batch: int) -> None:
        self.number, self.batch = number, batch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            os.kill(os.getpid(), self.number)


def signal_at(number: signal.Signals, batch: int) -> str:
    return f"+callbacks.signal={{_target_:{__name__}.Signal,number:{int(number)},batch:{batch}}}"


def run_command(folder: Path, *overrides: str) -> None:
    """In another process."""
    os.chdir(folder)
    sys.argv = ["muonclip-train", *TINY, *overrides]
    main()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["muonclip-train", *TINY, *LONG, "hydra.run.dir=whole"])
        main()
    return folder / "whole" / "checkpoints" / "last.ckpt"


def test_resumes_bitwise_after_a_kill(train: Any, tmp_path: Path, uninterrupted: Path) -> None:
    overrides = [*LONG, *SAVE_OFTEN, signal_at(signal.SIGKILL, 15), "hydra.run.dir=killed"]
    assert start(1, tmp_path / "rank", run_command, tmp_path, *overrides).exit_codes() == [-signal.SIGKILL]
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 10
    resumed = train(*LONG, f"ckpt_path={last}", out="resumed")
    assert_same_weights(resumed / "checkpoints" / "last.ckpt", uninterrupted)


def test_ctrl_c_leaves_a_checkpoint_that_resumes(train: Any, uninterrupted: Path) -> None:
    stopped = train(*LONG, *SAVE_OFTEN, signal_at(signal.SIGINT, 14), out="stopped")
    saved = stopped / "checkpoints" / "interrupted.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 15
    last = train(*LONG, f"ckpt_path={saved}", out="resumed") / "checkpoints" / "last.ckpt"
    assert_same_weights(last, uninterrupted)
    assert len(torch.load(last, weights_only=True)["callbacks"]["LogitPictures"]["history"]) == 30


def test_ctrl_c_ends_a_sweep(train: Any, tmp_path: Path) -> None:
    ctrl_c = signal_at(signal.SIGINT, 2)
    with pytest.raises(SystemExit, match="muonclip-train: interrupted"):
        train(*LONG, ctrl_c, "seed=0,1", "hydra.sweep.dir=sweep", "--multirun")
    saved = torch.load(tmp_path / "sweep" / "0" / "checkpoints" / "interrupted.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert not (tmp_path / "sweep" / "1").exists()


def test_a_run_that_ends_while_it_is_profiled_ends_well(train: Any) -> None:
    train("trainer.max_steps=3", "callbacks.summary.profile_from=1", "callbacks.summary.profile_batches=10")
    profiler = torch.profiler.profile()  # there is no other beside it
    profiler.start()
    profiler.stop()


def test_the_command_starts_the_other_process_of_ddp(tmp_path: Path) -> None:
    arguments = [*TINY, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "hydra.run.dir=two"]
    command = [sys.executable, "-m", "lightning_muonclip.experiment.train", *arguments]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=240, stdout=-3, stderr=-3)
    assert_has_a_sample_and_a_picture(tmp_path / "two")


def test_two_processes_of_fsdp2_and_tensor_parallelism(tmp_path: Path) -> None:
    arguments = ["trainer=fsdp2_tp", "trainer.accelerator=cpu", "trainer.devices=2", "hydra.run.dir=two"]
    start(2, tmp_path / "ranks", run_command, tmp_path, *arguments).results()
    assert_has_a_sample_and_a_picture(tmp_path / "two")


def assert_has_a_sample_and_a_picture(folder: Path) -> None:
    assert (folder / "sample.txt").read_text().startswith("def ")
    assert (folder / "max_logits.png").exists()
