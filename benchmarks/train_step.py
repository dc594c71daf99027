"""Whole training steps, and the share of Muon and QK-Clip: ``python benchmarks/train_step.py``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import report, side_by_side
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_muonclip import Attention, Muon, MuonClip, split_params
from lightning_muonclip.experiment.gpt import GPT

PEER = "AdamW"
MATCH = "match_rms_adamw"


@dataclass(frozen=True)
class Size:
    """A GPT and its batch."""

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    batch: int
    length: int

    def model(self, device: str) -> nn.Module:
        """The same weights at every call."""
        torch.manual_seed(0)
        attention = functools.partial(Attention, num_attention_heads=self.heads)
        return GPT(attention, self.vocabulary, self.hidden, self.layers).to(device)

    def tokens(self, device: str) -> Tensor:
        """A batch with one more token, to be predicted."""
        return torch.randint(self.vocabulary, (self.batch, self.length + 1), device=device)


SIZES = {
    "cpu": {"demo": Size(4, 128, 4, 256, 8, 256), "48_layers": Size(48, 256, 8, 256, 4, 256)},
    "cuda": {"124M": Size(12, 768, 12, 50304, 16, 1024), "350M": Size(24, 1024, 16, 50304, 8, 1024)},
}


class TorchMuon:
    """``torch.optim.Muon`` for hidden matrices and AdamW for the rest, in the usual way."""

    def __init__(self, model: nn.Module) -> None:
        hidden, rest = ([p for _, p in group["params"]] for group in split_params(model))
        self.optimizers = [torch.optim.Muon(hidden, adjust_lr_fn=MATCH), AdamW(rest, fused=True)]

    def step(self) -> None:
        """One after the other."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Of all parameters."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def training_step(size: Size, device: str, make: Callable[[nn.Module], Optimizer | TorchMuon]) -> Callable[[], None]:
    """Forward, backward and step of a separate model; in bfloat16 on a GPU."""
    model, tokens = size.model(device), size.tokens(device)
    optimizer = make(model)
    forward = torch.compile(model) if device == "cuda" else model

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = forward(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()

    return step


def steps_alone(size: Size, device: str) -> dict[str, Callable[[], object]]:
    """The shares of Muon and of QK-Clip in a step, with every head clipped."""
    model = size.model(device)
    [muon] = [group for group in split_params(model) if group["name"] == "muon"]
    for _, p in muon["params"]:
        p.grad = torch.randn_like(p)
    optimizer = Muon([muon], adjust_lr_fn=MATCH)
    clip = MuonClip(size.model(device), threshold=1e-3).qk_clip
    assert clip is not None
    maxima = torch.full((size.layers, size.heads), 2e-3, device=device)
    return {"Muon.step alone": optimizer.step, "QKClip.step alone": lambda: clip.step(maxima)}


def compare(name: str, size: Size, device: str) -> None:
    """Every optimizer on the same model, taking turns."""
    step = functools.partial(training_step, size, device)
    functions: dict[str, Callable[[], object]] = {
        PEER: step(lambda model: AdamW(model.parameters(), fused=True)),
        "torch.optim.Muon and AdamW": step(TorchMuon),
        "Muon and AdamW in one": step(lambda model: Muon(split_params(model), adjust_lr_fn=MATCH)),
        "MuonClip, exact": step(lambda model: MuonClip(model)),
        "MuonClip, lse": step(lambda model: MuonClip(model, logits="lse")),
        **steps_alone(size, device),
    }
    report(f"train_step_{name}", side_by_side(functions, rounds=10), PEER, device=device, **vars(size))


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, size in SIZES[device].items():
        compare(name, size, device)
