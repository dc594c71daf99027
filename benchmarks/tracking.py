"""What it costs to watch attention logits and to clip them, beside what a model does anyway.

python benchmarks/tracking.py
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from harness import report, side_by_side

from lightning_muonclip import Attention, MuonClip
from lightning_muonclip.experiment.gpt import GPT
from lightning_muonclip.kernels.max_logits import max_logits


def one_pass(batch: int = 8, heads: int = 8, length: int = 512, dim: int = 64) -> None:
    """The chunked pass over the logits against the forward and backward of the attention that it watches."""
    query, key, value = (torch.randn(batch, heads, length, dim, requires_grad=True) for _ in range(3))
    slope = torch.randn(batch, heads, length, dim)

    def attend() -> None:
        F.scaled_dot_product_attention(query, key, value, is_causal=True).backward(slope)

    seconds = side_by_side(
        {
            "SDPA forward + backward": attend,
            "max_logits": lambda: max_logits(query, key, scale=dim**-0.5, is_causal=True),
        }
    )
    report("max_logits_cpu", seconds, "SDPA forward + backward", batch=batch, heads=heads, length=length, dim=dim)


def one_step(layers: int = 48, hidden: int = 256, heads: int = 8, batch: int = 4, length: int = 256) -> None:
    """QK-Clip's step over many layers against the training step that it is part of."""
    model = GPT(functools.partial(Attention, num_attention_heads=heads), 256, hidden, layers)
    optimizer = MuonClip(model, lr=1e-3, threshold=1e-3)
    tokens = torch.randint(256, (batch, length + 1))
    maxima = torch.full((layers, heads), 2e-3)  # every head is clipped

    def train() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()

    seconds = side_by_side({"training step": train, "QKClip.step": lambda: optimizer.qk_clip.step(maxima)}, rounds=5)
    optimizer.close()
    report(
        "qk_clip_step_cpu",
        seconds,
        "training step",
        layers=layers,
        hidden=hidden,
        heads=heads,
        batch=batch,
        length=length,
    )


if __name__ == "__main__":
    one_pass()
    one_step()
