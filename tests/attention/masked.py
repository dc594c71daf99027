"""Masks with equivalent predicates on indices, and attention as a loop over pairs in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_muonclip import AttentionMask

HEADS = 4
Sees = Callable[[int, int, int, int], bool]


@dataclass
class Case:
    """A mask, its visible pairs, and the pairs that count for the maximum."""

    mask: AttentionMask
    sees: Sees
    counts: Sees

    def __and__(self, other: Case) -> Case:
        return Case(self.mask & other.mask, _both(self.sees, other.sees), _both(self.counts, other.counts))

    def __or__(self, other: Case) -> Case:
        return Case(self.mask | other.mask, _either(self.sees, other.sees), _either(self.counts, other.counts))


def _both(one: Sees, other: Sees) -> Sees:
    return lambda *at: one(*at) and other(*at)


def _either(one: Sees, other: Sees) -> Sees:
    return lambda *at: one(*at) or other(*at)


def pairs(sees: Sees, batch: int, length: int) -> Tensor:
    """Shape (batch, heads, length, length)."""
    tokens = range(length)
    return torch.tensor(
        [[[[sees(b, h, i, j) for j in tokens] for i in tokens] for h in range(HEADS)] for b in range(batch)]
    )


def atoms(batch: int, length: int, seed: int, device: str = "cpu") -> dict[str, Case]:
    """A mask of every kind."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator).to(device)

    padding = torch.arange(length, device=device) < draw(length + 1, batch, 1)
    documents = draw(4, batch, length).sort(1).values - 1
    one_for_all = draw(3, 1, length)
    prefix = draw(length + 1, batch)
    window = int(draw(length + 2, 1)) + 1
    table = draw(2, HEADS, length).bool()

    def make(kwargs: dict[str, Any], sees: Sees, counts: Sees | None = None) -> Case:
        return Case(AttentionMask(**{"causal": False, **kwargs}), sees, counts or sees)

    return {
        "all": make({}, lambda b, h, i, j: True),
        "causal": make({"causal": True}, lambda b, h, i, j: j <= i),
        "window": make({"window": window}, lambda b, h, i, j: abs(i - j) < window),
        "padding": make(
            {"padding": padding},
            lambda b, h, i, j: bool(padding[b, j]),
            lambda b, h, i, j: bool(padding[b, i] & padding[b, j]),
        ),
        "documents": make(
            {"documents": documents},
            lambda b, h, i, j: bool(documents[b, i] == documents[b, j]) and int(documents[b, i]) >= 0,
        ),
        "documents of all": make(
            {"documents": one_for_all}, lambda b, h, i, j: bool(one_for_all[0, i] == one_for_all[0, j])
        ),
        "prefix": make({"causal": True, "prefix": prefix}, lambda b, h, i, j: j <= i or j < int(prefix[b])),
        "every third": make(
            {"mask_mod": lambda b, h, q, k: (q + k + b) % 3 == 0}, lambda b, h, i, j: (i + j + b) % 3 == 0
        ),
        "a table a head": make({"mask_mod": lambda b, h, q, k: table[h, k]}, lambda b, h, i, j: bool(table[h, j])),
    }


def naive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    visible: Tensor,
    score: Callable[[Tensor, int, int, int], Tensor] | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Computes one query at a time; ``score(logit, head, i, j)`` modifies one logit."""
    batch, heads, length, _ = query.shape
    groups = heads // key.shape[1]
    rows = []
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                seen = [j for j in range(length) if visible[b, h, i, j]]
                logits = [scale * (query[b, h, i] @ key[b, h // groups, j]) for j in seen]
                if score is not None:
                    logits = [score(logit, h, i, j) for logit, j in zip(logits, seen)]
                if not seen:
                    rows.append(value[b, h // groups, 0] * 0)
                    continue
                powers = torch.stack(logits).exp()
                total = powers.sum() + (0 if sinks is None else sinks[h].exp())
                rows.append((powers[:, None] * value[b, h // groups, seen]).sum(0) / total)
    return torch.stack(rows).view(batch, heads, length, -1)
