"""Handwritten digits: a LightningDataModule of small images that come with scikit-learn."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_muonclip.experiment.data import Batch, ResumableLoader, resumable_loader
from lightning_muonclip.experiment.optional import optional

#: One image in this many is held out.
HELD_OUT = 5


class DigitsDataModule(pl.LightningDataModule):
    """The 1,797 digits of scikit-learn, 8 by 8 pixels; nothing is downloaded.

    Training batches are shuffled, determined by ``seed`` and the epoch, split over the ranks, and resumed exactly from a
    checkpoint within an epoch. The last fifth, which other people wrote, is held out.

    Args:
        batch_size: Images per batch on each device.
        seed: Determines the order of the training images.
        num_workers: Processes that read images. They are in memory, so 0 is fast.

    Shapes:
        - Each batch is ``(images, labels)``: float32 of shape (batch_size, 1, 8, 8) in [-1, 1], and int64 of shape
          (batch_size,) in 0 to 9.

    Raises:
        ImportError: If scikit-learn cannot be imported.
    """

    num_classes = 10
    img_size = 8
    in_chans = 1

    def __init__(self, *, batch_size: int = 64, seed: int = 0, num_workers: int = 0) -> None:
        super().__init__()
        self._datasets = optional("sklearn.datasets", "data=digits", extra="vision", package="scikit-learn")
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers

    @cached_property
    def parts(self) -> tuple[Dataset[Batch], Dataset[Batch]]:
        """The images to train on and those to validate on, read on first use."""
        digits = self._datasets.load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
        labels = torch.tensor(digits.target)
        end = len(images) - len(images) // HELD_OUT
        parts: Any = (TensorDataset(images[:end], labels[:end]), TensorDataset(images[end:], labels[end:]))
        return parts

    def train_dataloader(self) -> ResumableLoader:
        """Returns this rank's shuffled training batches.

        Raises:
            ValueError: If there are not enough images for one batch on every rank.
        """
        return resumable_loader(self.parts[0], "images", self, self.batch_size, self.seed, self.num_workers)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Returns the validation batches, the same at each call."""
        return DataLoader(self.parts[1], batch_size=self.batch_size, num_workers=self.num_workers)
