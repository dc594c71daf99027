"""MuonClip in plain PyTorch: one optimizer for the whole model.

python examples/plain_pytorch.py
"""

import torch
import torch.nn.functional as F
from torch import nn

from lightning_muonclip import Attention, MuonClip


def main(steps: int = 50) -> MuonClip:
    torch.manual_seed(0)
    embed, head = nn.Embedding(10, 64), nn.Linear(64, 10)
    model = nn.ModuleDict(
        {"embed": embed, "attn": Attention(64, num_attention_heads=4, num_key_value_heads=2), "head": head}
    )
    optimizer = MuonClip(model, lr=3e-3, threshold=100.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        tokens = torch.randint(10, (16, 12))
        x = embed(tokens)
        loss = F.cross_entropy(head(x + model["attn"](x))[:, 1:].flatten(0, 1), tokens[:, :-1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}  max logit {optimizer.last.max_logit.item():.2f}")
    optimizer.close()
    return optimizer


if __name__ == "__main__":
    main()
