"""Next-token batches: a LightningDataModule for any corpus, with a train loader that resumes exactly."""

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
    """Windows of a token sequence, cut on access.

    Args:
        tokens: The sequence, of any integer type and shape (tokens,).
        starts: Start of each window, shape (windows,).
        block_size: Number of tokens per window.

    Shapes:
        - Each item is ``(inputs, targets)``, int64 of shape (block_size,): the targets are the inputs shifted by one.
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
    """One rank's shard of a shuffle that depends only on the seed and the epoch, and that can start in the middle.

    Since it is a ``DistributedSampler``, Lightning calls ``set_epoch`` before each epoch and keeps it under DDP, where it
    would replace any other sampler by one with the global seed.

    Attributes:
        start: Number of this rank's items that the next iteration skips.
    """

    start = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.start, None)


class ResumableLoader(DataLoader[Batch]):
    """A ``DataLoader`` over a :class:`ShuffledShard` that resumes in the middle of an epoch, at the next batch.

    Lightning saves and restores a train loader that has ``state_dict`` and ``load_state_dict``. The state is the epoch
    and the number of batches returned in it, so it is the same on every rank (Lightning saves that of rank 0) and does not
    depend on prefetching.
    """

    # Not torchdata's StatefulDataLoader: with torchdata 0.11 under Lightning 2.6, a checkpoint of the last batch of an epoch
    # skips the next epoch, and one of a later epoch resumes in the wrong order (with workers, or with the sampler that
    # Lightning injects).

    _epoch = 0
    _batch = 0
    _resuming = False

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator, so this runs at the first batch: Lightning calls iter() before it sets the epoch. (With
        # overfit_batches the sampler is sequential, has no epoch and always starts at the beginning.)
        epoch = getattr(self.sampler, "epoch", 0)
        # A checkpoint of the last batch of an epoch resumes at the beginning of the next.
        self._batch = self._batch if self._resuming and epoch == self._epoch else 0
        self._epoch, self._resuming = epoch, False
        if isinstance(self.sampler, ShuffledShard):
            assert self.batch_size is not None
            self.sampler.start = self._batch * self.batch_size
        for batch in super().__iter__():
            self._batch += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The position: the epoch and the number of batches returned in it."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Makes the next iteration continue after the position of a :meth:`state_dict`."""
        self._epoch, self._batch, self._resuming = state_dict["epoch"], state_dict["batch"], True
        if isinstance(self.sampler, ShuffledShard):
            self.sampler.set_epoch(self._epoch)


def resumable_loader(
    items: Dataset[Batch], what: str, data: pl.LightningDataModule, batch_size: int, seed: int, num_workers: int = 0
) -> ResumableLoader:
    """This rank's shuffled batches of a data set, the last one of an epoch dropped if it is not full.

    Args:
        items: The data set.
        what: What its items are, for the error.
        data: The data module that the batches are for.
        batch_size: Items per batch on each device.
        seed: Determines the order, together with the epoch.
        num_workers: Processes that read items.

    Raises:
        ValueError: If there are not enough items for one batch on every rank.
    """
    # Lightning's own replica and rank: under tensor parallelism, the data-parallel rank is not the global one.
    shard = data.trainer.distributed_sampler_kwargs if data.trainer is not None else None
    shard = shard or {"num_replicas": 1, "rank": 0}
    count = len(items)  # type: ignore[arg-type]
    if count < batch_size * shard["num_replicas"]:
        raise ValueError(
            f"{count} {what} are too few: one batch needs {batch_size} on each of {shard['num_replicas']} ranks; "
            "use more data or a smaller batch_size"
        )
    sampler = ShuffledShard(items, **shard, seed=seed, drop_last=True)
    return ResumableLoader(items, batch_size=batch_size, sampler=sampler, num_workers=num_workers, drop_last=True)


class TextDataModule(pl.LightningDataModule):
    """Next-token batches of real text.

    Training batches are shuffled, non-overlapping windows, determined by ``seed`` and the epoch, split over the ranks, and
    resumed exactly from a checkpoint within an epoch. Validation is a fixed set of evenly spaced windows.

    Args:
        corpus: The source of the text, read on first use. A corpus, or the name of one in
            :data:`~lightning_muonclip.experiment.corpora.CORPORA`, which is then created with ``source``.
        batch_size: Windows per batch on each device.
        block_size: Tokens per window.
        seed: Determines the order of the training windows.
        num_workers: Processes that cut windows. The tokens are in memory, so 0 is fast.
        val_batches: Validation batches over all devices; fewer if the held-out text is too short.
        source: Arguments of a corpus that is given by name.

    Shapes:
        - Each batch is ``(inputs, targets)``, int64 of shape (batch_size, block_size): the targets are the inputs shifted
          by one.

    Raises:
        ValueError: If there is no corpus of that name, or on first use, if the corpus is too small. Errors of the corpus
            itself are passed on.

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
                raise ValueError(f"unknown corpus {corpus!r}; use one of {', '.join(CORPORA)}")
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
                    f"{self.corpus!r} is too small: its {name} part has {len(tokens)} tokens, but one window needs "
                    f"block_size + 1 = {self.block_size + 1}; use more text or a smaller block_size"
                )
        return text

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary."""
        return self.text.tokenizer.vocab_size

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token; bits per byte are ``nats_per_token / (math.log(2) * bytes_per_token)``."""
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
        what = f"windows of {self.block_size} tokens, in the training part of {self.corpus!r},"
        return resumable_loader(windows, what, self, self.batch_size, self.seed, self.num_workers)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Returns the validation batches, the same at each call."""
        tokens = self.text.validation
        last = len(tokens) - self.block_size - 1
        count = min(self.val_batches * self.batch_size, last // self.block_size + 1)
        # float64, since float32 skips positions beyond 16 million tokens.
        starts = torch.linspace(0, last, count, dtype=torch.float64).long()
        windows = Windows(tokens, starts, self.block_size)
        return DataLoader(windows, batch_size=self.batch_size, num_workers=self.num_workers)
