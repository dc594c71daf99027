"""LightningCLI: --trainer.callbacks+=lightning_muonclip.MuonClipCallback --trainer.callbacks.threshold=30."""

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader


class LitCopy(LightningModule):
    def __init__(self, width: int = 32, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr = lr
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.model = nn.Sequential(nn.Embedding(16, width), nn.TransformerEncoder(layer, 2), nn.Linear(width, 16))

    def training_step(self, tokens: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.randint(16, (512, 12), generator=torch.Generator().manual_seed(0)), batch_size=8)


if __name__ == "__main__":
    LightningCLI(LitCopy)
