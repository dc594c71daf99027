import os
from pathlib import Path

import torch
import torch.distributed as dist
from processes import start

from lightning_muonclip.parallel.holders import group_of


def groups_on(backend: str, store: Path) -> tuple[float, bool]:
    """A sum over the ranks that hold a weight on the CPU, and whether their own group computes it."""
    rank = int(os.environ["RANK"])
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=2)
    group = group_of(torch.zeros(2, 2), None)
    total = torch.tensor(float(rank + 1))
    dist.all_reduce(total, group=group)
    own = group is dist.group.WORLD
    dist.destroy_process_group()
    return float(total), own


def test_weights_on_the_cpu_get_a_group_that_can_move_them(tmp_path):
    # Gloo for CUDA alone, as NCCL: it has nothing for the CPU.
    for backend, is_own in {"gloo": True, "cpu:gloo,cuda:gloo": True, "cuda:gloo": False}.items():
        folder = tmp_path / backend.replace(":", "_").replace(",", "_")
        folder.mkdir()
        found = start(2, folder / "ranks", groups_on, backend, folder / "store").results()
        assert found == [(3.0, is_own)] * 2
