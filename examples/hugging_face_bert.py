"""Trains an unmodified Hugging Face BERT in a plain LightningModule; MuonClip needs only the callback.

    python examples/hugging_face_bert.py

A small BERT learns whether a sequence contains a certain token. Half of every sequence is padding.
"""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from lightning_muonclip import MuonClipCallback


class LitBert(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = BertForSequenceClassification(
            BertConfig(vocab_size=12, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        )

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        tokens, labels = batch
        output = self.model(input_ids=tokens, attention_mask=(tokens > 0).long(), labels=labels)
        self.log("loss", output.loss, prog_bar=True)
        self.log("accuracy", (output.logits.argmax(1) == labels).float().mean(), prog_bar=True)
        return output.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)


def main(max_steps: int = 100) -> pl.Trainer:
    pl.seed_everything(0)
    tokens = torch.randint(1, 12, (4096, 16))
    tokens[:, 8:] = 0
    labels = (tokens == 1).any(1).long()
    trainer = pl.Trainer(
        callbacks=[MuonClipCallback()],
        max_steps=max_steps,
        max_epochs=-1,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(LitBert(), DataLoader(TensorDataset(tokens, labels), batch_size=64, shuffle=True))
    return trainer


if __name__ == "__main__":
    print({name: round(float(value), 3) for name, value in main().callback_metrics.items()})
