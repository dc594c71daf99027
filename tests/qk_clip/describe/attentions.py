"""Attention of many kinds, from options that a test draws; every module keeps its queries and keys for a naive oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, LENGTH, WIDTH = 2, 5, 12


@dataclass(frozen=True)
class Options:
    """What a module is like.

    Attributes:
        heads: Number of query heads.
        groups: Number of key heads, which divides it.
        channels: Of a head.
        fused: ``"no"``, ``"blocks"`` (queries | keys | values), ``"heads"`` (head by head), or ``"tensor"``: one parameter
            of shape (heads, width, 3·channels).
        bias: Whether projections have one.
        call: How logits and probabilities are made: ``"sdpa"``, ``"matmul"``, ``"einsum"`` or ``"merged"`` (heads and batch
            in one dimension).
        rotary: Whether half of the channels are rotated.
        norm: ``""``, ``"gain"`` (of the channels of a head), ``"heads"`` (gains of every head) or ``"no gain"``.
        offset: What the norm adds to its gain.
        tied: Whether one weight makes queries and keys.
        relative: Whether products of queries and learned positions are added to the logits.
        every: Whether key heads are shared by every groups-th query head, instead of neighbours.
        clamp: Whether the projections are clamped.
        returns_keys: Whether the keys are returned too.
    """

    heads: int = 4
    groups: int = 2
    channels: int = 4
    fused: str = "no"
    bias: bool = True
    call: str = "sdpa"
    rotary: bool = False
    norm: str = ""
    offset: float = 0.0
    tied: bool = False
    relative: bool = False
    every: bool = False
    clamp: bool = False
    returns_keys: bool = False


class Drawn(nn.Module):
    """Attention as the options say."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = own = options
        if own.fused in ("heads", "tensor") or own.tied:
            self.groups = own.heads
        else:
            self.groups = own.groups
        sizes = [own.heads, self.groups, self.groups]
        if own.fused == "no":
            self.projections = nn.ModuleList(nn.Linear(WIDTH, n * own.channels, own.bias) for n in sizes)
        elif own.fused == "tensor":
            self.weight = nn.Parameter(torch.randn(own.heads, WIDTH, 3 * own.channels))
        else:
            self.projection = nn.Linear(WIDTH, sum(sizes) * own.channels, own.bias)
        if own.norm in ("gain", "heads"):
            shape = (own.channels,) if own.norm == "gain" else (own.heads, 1, own.channels)
            self.gains = nn.ParameterList(
                torch.randn(n if own.norm == "gain" else (k, 1, own.channels)) + 1
                for n, k in ((shape, own.heads), (shape, self.groups))
            )
        if own.relative:
            self.positions = nn.Parameter(torch.randn(LENGTH, own.channels))
        self.out = nn.Linear(own.heads * own.channels, WIDTH)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def projected(self, x: Tensor) -> list[Tensor]:
        own = self.options
        sizes = [own.heads, self.groups, self.groups]
        if own.fused == "no":
            q, k, v = (p(x) for p in self.projections)
            if own.tied:
                k = self.projections[0](x)
        elif own.fused == "blocks":
            q, k, v = self.projection(x).split([n * own.channels for n in sizes], -1)
        elif own.fused == "heads":
            return list(self.projection(x).unflatten(-1, (own.heads, -1)).transpose(1, 2).chunk(3, -1))
        else:
            return list(torch.einsum("bld,hdc->bhlc", x, self.weight).chunk(3, -1))
        return [t.unflatten(-1, (n, own.channels)).transpose(1, 2) for t, n in zip((q, k, v), sizes)]

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Any:
        own = self.options
        q, k, v = self.projected(x)
        if own.clamp:
            q, k = q.clamp(-0.5, 0.5), k.clamp(-0.5, 0.5)
        if own.norm:
            q, k = (t * (t.square().mean(-1, keepdim=True) + 1e-6).rsqrt() for t in (q, k))
        if own.norm in ("gain", "heads"):
            q, k = q * (self.gains[0] + own.offset), k * (self.gains[1] + own.offset)
        if own.rotary:
            q, k = map(rotated, (q, k))
        if keys is not None:
            k = keys
        self.seen.append((q, k))
        y = self.attend(q, k, v)
        y = self.out(y.transpose(1, 2).flatten(2))
        return (y, k) if own.returns_keys else y

    def repeated(self, k: Tensor) -> Tensor:
        times = self.options.heads // k.shape[1]
        return k.repeat(1, times, 1, 1) if self.options.every else k.repeat_interleave(times, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own, scale = self.options, q.shape[-1] ** -0.5
        k, v = self.repeated(k), self.repeated(v)
        bias = (q * scale) @ self.positions.mT if own.relative else None
        if own.call == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        if own.call == "merged":
            logits = torch.bmm(q.flatten(0, 1) * scale, k.flatten(0, 1).mT)
            logits = logits if bias is None else logits + bias.flatten(0, 1)
            return torch.bmm(logits.softmax(-1), v.flatten(0, 1)).unflatten(0, q.shape[:2])
        logits = (q @ k.mT if own.call == "matmul" else torch.einsum("bhic,bhjc->bhij", q, k)) * scale
        logits = logits if bias is None else logits + bias
        return logits.softmax(-1) @ v


def rotated(x: Tensor) -> Tensor:
    """Rotary positions on the first half of the channels."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])[: half // 2]
    cos, sin = angle.cos().to(x).repeat(1, 2), angle.sin().to(x).repeat(1, 2)
    own, rest = x.split([half, x.shape[-1] - half], -1)
    a, b = own.chunk(2, -1)
    return torch.cat([own * cos + torch.cat([-b, a], -1) * sin, rest], -1)
