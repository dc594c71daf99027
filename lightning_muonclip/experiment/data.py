"""Batches for a language model: one LightningDataModule for every corpus, and a train loader that resumes exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_muonclip.experiment.corpora import CORPORA, Corpus, Text

Batch = tuple[Tensor, Tensor]


class Windows(Dataset[Batch]):
    """Windows of a token sequence, cut when they are asked for.

    Args:
        tokens: The sequence, of any integer type and shape (tokens,).
        starts: Where the windows start, of shape (windows,).
        block_size: The number of tokens that a model sees.

    Shapes:
        - Each item is ``(inputs, targets)``, int64 of shape (block_size,): the targets are the inputs, one token on.
    """

    def __init__(self, tokens: Tensor, starts: Tensor, block_size: int) -> None:
        self.tokens = tokens
        self.starts = starts
        self.block_size = block_size

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Batch:
        start = int(self.starts[index])
        window = self.tokens[start : start + self.block_size + 1].long()
        return window[:-1], window[1:]


class ShuffledShard(DistributedSampler[int]):
    """One rank's share of a shuffle that depends on the seed and the epoch alone, and that may begin in its middle.

    As it is a ``DistributedSampler``, Lightning calls ``set_epoch`` before each epoch and keeps it under DDP, where it
    would replace any other by one that is seeded with the global seed.

    Attributes:
        start: How many of this rank's items the next iteration leaves out.
    """

    start = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.start, None)


class ResumableLoader(DataLoader[Batch]):
    """A ``DataLoader`` over a :class:`ShuffledShard` that continues in mid-epoch, at the very next batch.

    Lightning saves and restores a train loader that has ``state_dict`` and ``load_state_dict``. The state is the epoch
    and the number of its batches that have been handed out, so it is the same on every rank (Lightning saves that of
    rank 0) and does not depend on what the workers have prefetched.
    """

    # Why not torchdata's StatefulDataLoader: with torchdata 0.11 under Lightning 2.6 a checkpoint of an epoch's last
    # batch resumes without the epoch that follows, and one of a later epoch resumes in a wrong order (with workers, or
    # with the sampler that Lightning injects).

    _epoch = 0
    _batch = 0
    _resuming = False

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # As a generator this runs when the first batch is asked for: Lightning calls iter() before it sets the epoch.
        # (Its overfit_batches puts a sequential sampler here, which has no epoch and always starts at the beginning.)
        epoch = getattr(self.sampler, "epoch", 0)
        # A checkpoint of the last batch of an epoch is resumed in the next epoch, at its beginning.
        self._batch = self._batch if self._resuming and epoch == self._epoch else 0
        self._epoch, self._resuming = epoch, False
        if isinstance(self.sampler, ShuffledShard):
            assert self.batch_size is not None
            self.sampler.start = self._batch * self.batch_size
        for batch in super().__iter__():
            self._batch += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Returns the position: the epoch, and how many of its batches have been handed out."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Makes the next iteration continue behind the position that :meth:`state_dict` returned."""
        self._epoch, self._batch, self._resuming = state_dict["epoch"], state_dict["batch"], True
        if isinstance(self.sampler, ShuffledShard):
            self.sampler.set_epoch(self._epoch)


class TextDataModule(pl.LightningDataModule):
    """Next-token batches of real text.

    Training batches are shuffled windows that do not overlap, determined by ``seed`` and the epoch, split over the
    ranks, and resumed exactly from a checkpoint in mid-epoch. Validation is a fixed set of evenly spaced windows.

    Args:
        corpus: Where the text comes from; read once, on first use. A corpus, or the name of one in
            :data:`~lightning_muonclip.experiment.corpora.CORPORA`, which then takes ``source``.
        batch_size: Windows a batch, on each device.
        block_size: Tokens a window.
        seed: Determines the order of the training windows.
        num_workers: Processes that cut windows; the tokens are in memory, so 0 is fast.
        val_batches: Batches of validation, over all devices; fewer if the held-out text is too short.
        source: Arguments of the corpus, if it was given by name.

    Shapes:
        - Each batch is ``(inputs, targets)``, int64 of shape (batch_size, block_size): the targets are the inputs, one
          token on.

    Raises:
        ValueError: If there is no corpus of that name; on first use, if the corpus is too small. What the corpus
            raises, if it cannot be read.

    Example::

        data = TextDataModule("text", path="notes", block_size=512)
        model = Transformer(vocab_size=data.vocab_size)
        pl.Trainer(max_steps=1000).fit(model, datamodule=data)
    """

    def __init__(
        self,
        corpus: Corpus | str = "stdlib",
        *,
        batch_size: int = 8,
        block_size: int = 256,
        seed: int = 0,
        num_workers: int = 0,
        val_batches: int = 32,
        **source: Any,
    ) -> None:
        super().__init__()
        if isinstance(corpus, str):
            if corpus not in CORPORA:
                raise ValueError(f"unknown corpus {corpus!r}; known: {', '.join(CORPORA)}")
            corpus = CORPORA[corpus](**source)
        self.corpus = corpus
        self.batch_size = batch_size
        self.block_size = block_size
        self.seed = seed
        self.num_workers = num_workers
        self.val_batches = val_batches

    @cached_property
    def text(self) -> Text:
        """The corpus, read on first use: training and validation tokens, and their tokenizer."""
        text = self.corpus.load()
        for name, tokens in (("training", text.train), ("validation", text.validation)):
            if len(tokens) <= self.block_size:
                raise ValueError(
                    f"{self.corpus!r} is too small: its {name} part has {len(tokens)} tokens, and one window takes "
                    f"block_size + 1 = {self.block_size + 1}: give more text or a smaller block_size"
                )
        return text

    @property
    def vocab_size(self) -> int:
        """The number of different tokens."""
        return self.text.tokenizer.vocab_size

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes a token: bits a byte are ``nats_per_token / (math.log(2) * bytes_per_token)``."""
        return self.text.bytes_per_token

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of ``text``."""
        return self.text.tokenizer.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of ``tokens``."""
        return self.text.tokenizer.decode(tokens)

    def train_dataloader(self) -> ResumableLoader:
        """Returns this rank's shuffled training batches.

        Raises:
            ValueError: If the training text is too small for one batch on every rank.
        """
        tokens = self.text.train
        windows = Windows(tokens, torch.arange(0, len(tokens) - self.block_size, self.block_size), self.block_size)
        # Lightning's own answer to "which share is mine", which under tensor parallelism is not the global rank.
        shard = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        shard = shard or {"num_replicas": 1, "rank": 0}
        if len(windows) < self.batch_size * shard["num_replicas"]:
            raise ValueError(
                f"{self.corpus!r} is too small: its training part has {len(windows)} windows of {self.block_size} "
                f"tokens, and one batch takes {self.batch_size} on each of {shard['num_replicas']} ranks: "
                "give more text, a smaller block_size or a smaller batch_size"
            )
        return ResumableLoader(
            windows,
            batch_size=self.batch_size,
            sampler=ShuffledShard(windows, **shard, seed=self.seed, drop_last=True),
            num_workers=self.num_workers,
            drop_last=True,
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Returns the validation batches, the same ones at each call."""
        tokens = self.text.validation
        last = len(tokens) - self.block_size - 1
        count = min(self.val_batches * self.batch_size, last // self.block_size + 1)
        # float64, as float32 misses positions beyond 16 million tokens.
        starts = torch.linspace(0, last, count, dtype=torch.float64).long()
        windows = Windows(tokens, starts, self.block_size)
        return DataLoader(windows, batch_size=self.batch_size, num_workers=self.num_workers)
