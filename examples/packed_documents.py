"""Packed sequences: several documents per row, each attending only to itself, in alternating local and global layers.

    python examples/packed_documents.py

The documents are short files of Python's standard library, byte by byte. On a GPU, attention uses FlexAttention, which skips
masked blocks; on a CPU it uses SDPA.
"""

import functools
import os
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_muonclip import Attention, AttentionMask, MuonClipCallback
from lightning_muonclip.experiment.gpt import GPT


def pack(texts: list[bytes], length: int) -> TensorDataset:
    """Rows of tokens and of their document ids; a document that is cut off continues in the next row."""
    tokens = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8).long()
    documents = torch.repeat_interleave(torch.arange(len(texts)), torch.tensor([len(text) for text in texts]))
    rows = len(tokens) // length
    return TensorDataset(*(x[: rows * length].view(rows, length) for x in (tokens, documents)))


class LitPacked(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        attention = functools.partial(Attention, num_attention_heads=4, num_key_value_heads=2)
        self.model = GPT(attention, vocab_size=256, hidden_size=64, num_hidden_layers=2, sliding_window=[32, None])

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        tokens, documents = batch
        logits = self.model(tokens, mask=AttentionMask(documents=documents))
        inside = documents[:, 1:] == documents[:, :-1]  # the first token of a document is unpredictable
        loss = F.cross_entropy(logits[:, :-1][inside], tokens[:, 1:][inside])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def main(max_steps: int = 50) -> pl.Trainer:
    pl.seed_everything(0)
    files = sorted(Path(os.__file__).parent.glob("*.py"), key=lambda path: (path.stat().st_size, path.name))
    data = pack([path.read_bytes() for path in files[10:90]], length=256)
    trainer = pl.Trainer(
        callbacks=[MuonClipCallback()],
        max_steps=max_steps,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(LitPacked(), DataLoader(data, batch_size=8, shuffle=True))
    return trainer


if __name__ == "__main__":
    print({name: round(float(value), 3) for name, value in main().callback_metrics.items()})
