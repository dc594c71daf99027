"""Hugging Face's accelerate: prepare the model and a MuonClip (accelerate launch examples/accelerate_loop.py)."""

import torch
from accelerate import Accelerator
from torch import nn

from lightning_muonclip import MuonClip


def main(steps: int = 50, start: int = 0, state: str = "outputs/accelerate_loop") -> nn.Module:
    accelerator = Accelerator()
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Embedding(16, 32), nn.TransformerEncoder(layer, 2), nn.Linear(32, 16))
    model, optimizer = accelerator.prepare(model, MuonClip(model, lr=3e-3))
    if start:
        accelerator.load_state(state)
    for step in range(start, steps):
        tokens = torch.randint(16, (8, 12), generator=torch.Generator().manual_seed(step)).to(accelerator.device)
        accelerator.backward(nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten()))
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(state)
    accelerator.print(f"largest logit {optimizer.optimizer.last.max_logit:.2f}")
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    main()
