"""A tiny transformer as a user would write it, and a Trainer that writes no files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muonclip import Attention
from lightning_muonclip.experiment.gpt import GPT

VOCAB = 17
QUERIES_AND_KEYS = ("*q_proj*", "*k_proj*")


def tiny_gpt(layers: int = 2, heads: int = 2, **attention: Any) -> GPT:
    """A GPT with query and key weights large enough for its logits to pass a threshold of 1."""

    def make(hidden_size: int) -> nn.Module:
        return Attention(hidden_size, heads, **attention)

    model = GPT(make, vocab_size=VOCAB, hidden_size=16, num_hidden_layers=layers, intermediate_size=32)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                param.mul_(40)
    return model


class LitTiny(pl.LightningModule):
    """A LightningModule without any reference to MuonClip."""

    def __init__(
        self, model: nn.Module, optimizer: Callable[[Any], torch.optim.Optimizer], schedule: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.make_optimizer = optimizer
        self.schedule = schedule

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return next_token_loss(self.model, batch[0])

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("val_loss", next_token_loss(self.model, batch[0]))

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if not self.schedule:
            return optimizer
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def token_batches(count: int, batch_size: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    """Tokens of shape (count, batch_size, length)."""
    return torch.randint(VOCAB, (count, batch_size, length), generator=torch.Generator().manual_seed(seed))


def loader(tokens: Tensor) -> DataLoader[Any]:
    """Serves one (batch_size, length) slice after the other, in order."""
    return DataLoader(TensorDataset(tokens.flatten(0, 1)), batch_size=tokens.shape[1], shuffle=False)


def trainer(callbacks: Sequence[pl.Callback] = (), **kwargs: Any) -> pl.Trainer:
    """A quiet Trainer on the CPU."""
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**options, **kwargs})
