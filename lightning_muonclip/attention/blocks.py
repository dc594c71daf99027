"""Blocks of FlexAttention: sequences are filled up to whole ones, and a BlockMask lists those in which a pair is visible."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_muonclip.attention.mask_mods import MaskMod

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

#: Queries and keys of a block.
BLOCK = 128


def filled(length: int) -> int:
    """Tokens of a sequence that is filled up to whole blocks."""
    return -(-length // BLOCK) * BLOCK


def clamped(q: Tensor, k: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Indices of tokens that are there, for those that have been filled up."""
    return q.clamp(max=length - 1), k.clamp(max=length - 1)


def band(causal: bool, window: int | None, length: int, device: torch.device, mask_mod: MaskMod) -> BlockMask:
    """The BlockMask of causality and a window, from the distances in a block instead of all of its pairs."""
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
    """How many blocks of each row are chosen, and a list that begins with those; int32, shape (1, 1, rows[, columns])."""
    chosen = blocks[None, None].to(torch.int32)
    return chosen.sum(-1, dtype=torch.int32), chosen.argsort(stable=True, dim=-1, descending=True).to(torch.int32)
