"""The model of ``muonclip-train`` in a plain loop, on the same text."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_muonclip import Attention, MuonClip
from lightning_muonclip.experiment.data import TextDataModule
from lightning_muonclip.experiment.gpt import GPT

LAYERS, WIDTH, HEADS = 4, 128, 4


class Demo:
    """A model and its optimizer, with a constant learning rate after a warm-up of 20 steps.

    Args:
        logits: As that of MuonClip.
        lr: Learning rate of all weights.
        threshold: As that of MuonClip.
    """

    def __init__(self, logits: str = "exact", lr: float = 0.01, threshold: float | None = 30.0) -> None:
        torch.manual_seed(0)
        self.data = TextDataModule()
        self.model = GPT(functools.partial(Attention, num_attention_heads=HEADS), self.data.vocab_size, WIDTH, LAYERS)
        threshold = None if logits == "off" else threshold
        self.optimizer = MuonClip(self.model, lr=lr, threshold=threshold, logits=logits)
        self.lr = lr
        self.steps = 0
        self._batches = self._forever()

    def _forever(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from self.data.train_dataloader()

    def step(self) -> float:
        """One step of training; returns the loss."""
        tokens, targets = next(self._batches)
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, self.steps / 20)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        self.optimizer.step()
        return loss.item()
