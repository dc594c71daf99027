"""Trains an unmodified Hugging Face Llama in a plain LightningModule; MuonClip needs only the callback.

    python examples/hugging_face_llama.py

A small Llama learns to write Python, byte by byte, from a module of the standard library.
"""

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_muonclip import MuonClipCallback


class LitLlama(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )

    def training_step(self, tokens: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.model(input_ids=tokens, labels=tokens).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)


def main(max_steps: int = 100) -> pl.Trainer:
    pl.seed_everything(0)
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()
    lines = text[: len(text) // 64 * 64].view(-1, 64)
    trainer = pl.Trainer(
        callbacks=[MuonClipCallback()],
        max_steps=max_steps,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(LitLlama(), DataLoader(lines, batch_size=16, shuffle=True))
    return trainer


if __name__ == "__main__":
    print({name: round(float(value), 3) for name, value in main().callback_metrics.items()})
