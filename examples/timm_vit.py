"""Trains an unmodified timm vision transformer in a plain LightningModule; MuonClip needs only the callback.

    pip install timm scikit-learn
    python examples/timm_vit.py

A small ViT learns to classify the 8 x 8 digits of scikit-learn.
"""

import lightning.pytorch as pl
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_muonclip import MuonClipCallback


class LitViT(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=8,
            patch_size=2,
            in_chans=1,
            num_classes=10,
            embed_dim=64,
            depth=2,
            num_heads=4,
        )

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("accuracy", (self.model(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=4e-3, weight_decay=0.1)


def main(max_epochs: int = 10) -> pl.Trainer:
    pl.seed_everything(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    training, validation = random_split(TensorDataset(images, torch.tensor(digits.target)), [0.8, 0.2])
    trainer = pl.Trainer(
        callbacks=[MuonClipCallback()],
        max_epochs=max_epochs,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        log_every_n_steps=10,
    )
    trainer.fit(
        LitViT(), DataLoader(training, batch_size=64, shuffle=True), DataLoader(validation, batch_size=len(validation))
    )
    return trainer


if __name__ == "__main__":
    print({name: round(float(value), 3) for name, value in main().callback_metrics.items()})
