"""Runs a function in several real processes connected by gloo."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 240


def on_ranks(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """The results of ``function(*args)`` on every rank."""
    context = multiprocessing.get_context("forkserver")  # imports once, not on every rank
    context.set_forkserver_preload([function.__module__])
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_run, args=(rank, count, folder, function, args)) for rank in range(count)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT)
            if process.exitcode != 0:
                break
        for process in processes:
            process.kill()  # ranks that still wait for one that failed
        errors = [file.read_text() for file in sorted(Path(folder).glob("*.txt"))]
        assert not errors, "\n".join(errors)
        files = [Path(folder) / f"rank{rank}.pt" for rank in range(count)]
        assert all(file.exists() for file in files), f"exit codes {[process.exitcode for process in processes]}"
        return [torch.load(file, weights_only=False) for file in files]


def _run(rank: int, count: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    try:
        torch.save(function(*args), f"{folder}/rank{rank}.pt")
    except Exception:
        Path(f"{folder}/rank{rank}.txt").write_text(traceback.format_exc())
        raise
    dist.barrier()
    dist.destroy_process_group()
