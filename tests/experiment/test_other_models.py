"""muonclip-train with models of Hugging Face, finetuned too, and with a LightningModule of one's own."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_module
from test_train import TINY
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lightning_muonclip.experiment.train as command
from lightning_muonclip.experiment.corpora import HuggingFace, SubwordTokenizer
from lightning_muonclip.experiment.digits import DigitsDataModule

NOT_OF_GPT = ("model.hidden_size=16", "model.num_hidden_layers=2", "model.attention.num_attention_heads=2")
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
OVERRIDES = [*(f"+model.overrides.{name}={size}" for name, size in SIZES.items()), "+model.overrides.head_dim=8"]
STORIES = ["the cat sat on the mat", "the dog sat on the cat"] * 200
BYTES = SimpleNamespace(vocab_size=256)


@pytest.fixture
def datasets() -> None:
    """Skips a test where Hugging Face's datasets cannot be imported, as with the newest pyarrow beside an old NumPy."""
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the command in this process, in an empty folder, on a model that is not this package's."""
    monkeypatch.chdir(tmp_path)
    tiny = [override for override in TINY if override not in NOT_OF_GPT]

    def run(*overrides: str) -> Path:
        monkeypatch.setattr(sys, "argv", ["muonclip-train", *tiny, "hydra.run.dir=run", *overrides])
        command.main()
        return tmp_path / "run"

    return run


def composed(*overrides: str) -> Any:
    with initialize_config_module("lightning_muonclip.conf", version_base="1.3"):
        return compose("train", list(overrides))


def column(run: Path, name: str) -> list[float]:
    return [float(row[name]) for row in csv.DictReader((run / "metrics.csv").open()) if row[name]]


def test_any_language_model_of_hugging_face(train: Any, tmp_path: Path) -> None:
    keys = "+model.overrides.num_key_value_heads=1"
    out = train("model=hf", *OVERRIDES, keys, "model.type=qwen3", "muonclip.threshold=0.01", "muonclip.qk_norm=gain")
    assert max(column(out, "muonclip/clipped_heads")) == 2
    assert (out / "sample.txt").read_text().startswith("def ")

    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **SIZES))
    model.save_pretrained(tmp_path / "llama")
    lit: Any = command._build_module(composed("model=hf", f"model.pretrained={tmp_path / 'llama'}"), BYTES)
    assert all(torch.equal(a, b) for a, b in zip(lit.model.network.state_dict().values(), model.state_dict().values()))
    config = composed("model=hf", f"model.config={tmp_path / 'llama' / 'config.json'}")
    assert command.build_model(config.model, BYTES).network.lm_head.weight.shape == (256, 16)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=hf"], "give one of model.config, model.type and model.pretrained"),
        (["model=hf", "model.type=qwen33"], "no model type 'qwen33'; the nearest are qwen3"),
        (["model=hf", "model.config=nowhere.json"], "nowhere.json does not exist"),
        (
            ["model=hf", "model.type=llama", "+model.overrides.hidden_sze=3"],
            "no entry 'hidden_sze'; did you mean 'hidden_size'?",
        ),
        (["model=hf", "model.type=llama", "base_hidden_size=16"], "has no hidden_size to compare widths by"),
        (
            ["model=hf", "model.type=llama", *OVERRIDES, "+model.lora={rank: 8}"],
            "peft.LoraConfig takes no such options",
        ),
        (["model=hf", "+model.loar=1"], "unknown key 'model.loar'; did you mean 'lora'?"),
        (["model=timm"], "TimmModel needs num_classes, which TextDataModule does not have"),
        (["lit=own", "lit._target_=nowhere.Mine"], "nowhere"),
        (["lit=own"], "lit._target_"),
        (["+lit.warmup=3"], "unknown key 'lit.warmup'; did you mean 'warmup_steps'?"),
    ],
)
def test_mistakes_are_one_line(train: Any, overrides: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as failure:
        train(*overrides)
    assert message in str(failure.value)


def test_a_model_of_text_does_not_take_digits() -> None:
    config = composed("data=digits")
    assert config.lit._target_.endswith(".LitClassifier")
    with pytest.raises(command.ConfigError, match="GPT needs vocab_size, which SimpleNamespace does not have"):
        command.build_model(config.model, SimpleNamespace(num_classes=10))


def test_digits_without_scikit_learn_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"data=digits needs the package scikit-learn.*lightning-muonclip\[vision\]"):
        DigitsDataModule()


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """A folder with a language model, its tokenizer and stories to finetune it on."""
    words = ["<unk>", "<eos>", *sorted(set(" ".join(STORIES).split()))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "pretrained"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **SIZES)).save_pretrained(folder)
    (tmp_path / "stories.jsonl").write_text("\n".join(json.dumps({"text": story}) for story in STORIES))
    return folder


STORY_DATA = ["model.pretrained=pretrained", "data.path=json", "data.data_files=stories.jsonl"]


@pytest.mark.parametrize("experiment", ["finetune", "finetune_lora"])
@pytest.mark.usefixtures("datasets")
def test_a_pretrained_model_is_finetuned_with_its_own_tokenizer(train: Any, pretrained: Path, experiment: str) -> None:
    before = LlamaForCausalLM.from_pretrained(pretrained).state_dict()
    out = train(f"experiment={experiment}", *STORY_DATA, "optimizer.lr=0.01", "muonclip.threshold=1e-4")
    assert column(out, "val/loss")[-1] < column(out, "train/loss")[0]
    assert set((out / "sample.txt").read_text().split()) <= {"<unk>", "<eos>", *" ".join(STORIES).split()}
    after = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    frozen = experiment == "finetune_lora"
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        inside = f"model.layers.0.{name}.base_layer.weight" if frozen else f"model.layers.0.{name}.weight"
        (own,) = (value for key, value in after.items() if key.endswith(inside))
        assert torch.equal(own, before[f"model.layers.0.{name}.weight"]) == frozen
    assert max(column(out, "muonclip/clipped_heads")) == (0 if frozen else 2)  # lora=monitor by default


@pytest.mark.usefixtures("datasets")
def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(vocab_size=30, **SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer; set data\.tokenizer .* null for bytes"):
        SubwordTokenizer(str(tmp_path))
    config = composed("model=hf", "data=hf", "data.path=json", f"model.pretrained={tmp_path}")
    assert command._build(config.data).corpus.tokenizer == str(tmp_path)
    config = composed("data=hf", "data.path=json")
    assert command._build(config.data).corpus == HuggingFace("json")


class Mine(pl.LightningModule):
    """Knows nothing of this package."""

    def __init__(self, model: nn.Module, optimizer: Any, scale: float) -> None:
        super().__init__()
        self.network, self.make_optimizer, self.scale = model, optimizer, scale

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        tokens, targets = batch
        loss = self.scale * F.cross_entropy(self.network(tokens).flatten(0, 1), targets.flatten())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


@pytest.mark.parametrize("optimizer", ["muonclip", "adamw"])
def test_a_lightning_module_of_ones_own(train: Any, optimizer: str) -> None:
    own = ["lit=own", f"lit._target_={__name__}.Mine", "+lit.scale=1.0"]
    out = train(*own, f"optimizer={optimizer}", *NOT_OF_GPT)
    assert len(column(out, "val/loss")) == 2
    assert (out / "max_logits.png").exists() == (optimizer == "muonclip")
    assert not (out / "sample.txt").exists()


@pytest.mark.parametrize("package", ["timm", "transformers", "peft"])
def test_an_absent_package_is_named_with_its_extra(train: Any, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    model = {
        "timm": ["model=timm", "model.num_classes=2", "model.img_size=8", "model.in_chans=1"],
        "transformers": ["model=hf", "model.type=qwen3"],
        "peft": ["model=hf", "model.type=llama", *OVERRIDES, "model.lora={r:2}"],
    }[package]
    extra = "vision" if package == "timm" else "hf"
    with pytest.raises(SystemExit) as failure:
        train(*model)
    assert f"needs the package {package}" in str(failure.value)
    assert str(failure.value).endswith(f"pip install 'lightning-muonclip[{extra}]'")


def test_a_sweeper_that_is_not_installed_is_named_with_its_extra(train: Any) -> None:
    with pytest.raises(SystemExit, match=r"could not find 'hydra/sweeper/absent'.*lightning-muonclip\[sweep\]"):
        train("hydra/sweeper=absent")


def test_optuna_searches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    monkeypatch.chdir(tmp_path)
    search = ["-m", "hparams_search=optuna", "hydra.sweeper.n_trials=2", "hydra.sweep.dir=sweep"]
    monkeypatch.setattr(sys, "argv", ["muonclip-train", *search, *TINY])
    command.main()
    assert "best_value" in (tmp_path / "sweep" / "optimization_results.yaml").read_text()
    assert {path.parent.name for path in tmp_path.glob("sweep/*/metrics.csv")} == {"0", "1"}
