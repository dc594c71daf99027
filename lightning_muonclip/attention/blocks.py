"""Blocks of FlexAttention: padding of sequences to whole blocks, and the BlockMask of causality and a window."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_muonclip.attention.mask_mods import MaskMod

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

#: Queries and keys per block.
BLOCK = 128


def filled(length: int) -> int:
    """The length of a sequence padded to whole blocks."""
    return -(-length // BLOCK) * BLOCK


def clamped(q: Tensor, k: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Indices with those of padding tokens clamped to the last real token."""
    return q.clamp(max=length - 1), k.clamp(max=length - 1)


def band(causal: bool, window: int | None, length: int, device: torch.device, mask_mod: MaskMod) -> BlockMask:
    """The BlockMask of causality and a window, from the distances between blocks rather than from all pairs."""
    from torch.nn.attention.flex_attention import BlockMask

    block = torch.arange(filled(length) // BLOCK, device=device)
    near, far = (BLOCK * (block[:, None] - block) + extent for extent in (1 - BLOCK, BLOCK - 1))
    least = 0 if causal else -math.inf if window is None else 1 - window
    most = math.inf if window is None else window - 1
    whole = (near >= least) & (far <= most) & (BLOCK * (block + 1) <= length)
    part = (far >= least) & (near <= most) & ~whole
    size = filled(length), filled(length)
    return BlockMask.from_kv_blocks(
        *_listed(part), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=size
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Count of chosen blocks per row, and block indices with the chosen ones first; int32, (1, 1, rows[, columns])."""
    chosen = blocks[None, None].to(torch.int32)
    return chosen.sum(-1, dtype=torch.int32), chosen.argsort(stable=True, dim=-1, descending=True).to(torch.int32)
