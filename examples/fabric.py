"""Lightning Fabric: a MuonClip is an optimizer like any other (python examples/fabric.py)."""

import torch
from lightning.fabric import Fabric
from torch import nn

from lightning_muonclip import MuonClip


def main(steps: int = 50, start: int = 0, state: str = "outputs/fabric.ckpt") -> nn.Module:
    fabric = Fabric(accelerator="auto", devices=1)
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Embedding(16, 32), nn.TransformerEncoder(layer, 2), nn.Linear(32, 16))
    model, optimizer = fabric.setup(model, MuonClip(model, lr=3e-3))
    if start:
        fabric.load(state, {"model": model, "optimizer": optimizer})
    for step in range(start, steps):
        tokens = torch.randint(16, (8, 12), generator=torch.Generator().manual_seed(step)).to(fabric.device)
        fabric.backward(nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten()))
        optimizer.step()
        optimizer.zero_grad()
    fabric.save(state, {"model": model, "optimizer": optimizer})
    fabric.print(f"largest logit {optimizer.optimizer.last.max_logit:.2f}")
    return model.module


if __name__ == "__main__":
    main()
