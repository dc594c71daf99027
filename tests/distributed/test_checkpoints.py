"""Checkpoints move between strategies and numbers of ranks, and a rank that dies costs no more than the way back to one."""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_worker import KILLED, PATIENCE, SAVED, STEPS, Run, checkpoint_of, start, train, train_all
from helpers import tiny_gpt
from torch import Tensor, nn

from lightning_muonclip import Muon, MuonClip, split_params

#: Runs are not bitwise equal, since the mean of two halves is rounded otherwise than that of four quarters.
TOLERANCE = 1e-6

SHARDED = (("shard_momentum", True),)

#: What the uninterrupted runs are called, and what they are resumed as.
SAVERS = {
    "ddp": Run("ddp", "ddp"),
    "ddp sharded": Run("ddp sharded", "ddp", options=SHARDED),
    "fsdp2": Run("fsdp2", "fsdp2"),
    "fsdp2 sharded": Run("fsdp2 sharded", "fsdp2 sharded"),
}
