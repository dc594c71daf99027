"""MuonClip in Lightning: add one callback, change nothing else.

    python examples/lightning_finetune.py

A sequence classifier with custom attention in plain PyTorch. MuonClip sees its call of scaled_dot_product_attention, and
infers from what the module does which weights make which head.
"""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muonclip import MuonClipCallback


class SelfAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class LitClassifier(pl.LightningModule):
    """Classifies whether the sum of the tokens is even."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.attn = nn.ModuleList(SelfAttention(64, 4) for _ in range(2))
        self.norm = nn.ModuleList(nn.LayerNorm(64) for _ in range(2))
        self.head = nn.Linear(64, 2)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        tokens, labels = batch
        x = self.embed(tokens)
        for attn, norm in zip(self.attn, self.norm):
            x = x + attn(norm(x))
        loss = F.cross_entropy(self.head(x.mean(1)), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)


def main(max_steps: int = 50) -> pl.Trainer:
    torch.manual_seed(0)
    tokens = torch.randint(10, (4096, 6))
    data = DataLoader(TensorDataset(tokens, tokens.sum(1) % 2), batch_size=64, shuffle=True)
    trainer = pl.Trainer(
        callbacks=[MuonClipCallback()],
        max_steps=max_steps,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(LitClassifier(), data)
    return trainer


if __name__ == "__main__":
    print({name: round(float(value), 3) for name, value in main().callback_metrics.items()})
