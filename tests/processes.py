"""Runs functions in real processes that find one another as those of torchrun do, and import nothing anew."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

#: What the server imports once, for all processes that are forked from it.
PRELOADED = [
    "lightning_muonclip.experiment.train",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.models.llama.modeling_llama",
]


@dataclass
class Ranks:
    """Processes that were started together, and what they leave behind."""

    processes: list[BaseProcess]
    folder: Path

    def exit_codes(self, timeout: float = 240) -> list[int | None]:
        """Those of processes that have ended within so many seconds; ``None`` for the others, which are killed."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes

    def error(self, rank: int) -> str:
        file = self.folder / f"error{rank}.txt"
        return file.read_text() if file.exists() else ""

    def results(self) -> list[Any]:
        codes = self.exit_codes()
        ranks = range(len(codes))
        assert codes == [0] * len(codes), "\n".join([f"exit codes {codes}", *map(self.error, ranks)])
        return [torch.load(self.folder / f"rank{rank}.pt", weights_only=False) for rank in ranks]


def start(count: int, folder: Path, function: Callable[..., Any], *args: Any) -> Ranks:
    """Starts ``function(*args)`` on so many ranks, which write what they return to a new folder."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:  # the order of a set must not matter: give them another
        patch.setenv("PYTHONHASHSEED", "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2")
        forkserver.ensure_running()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir()
    processes: list[BaseProcess] = []
    for rank in range(count):
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": count,
            "RANK": rank,
            "LOCAL_RANK": rank,
            "NODE_RANK": 0,
        }
        processes.append(context.Process(target=_run, args=(rank, environment, folder, function, args)))
        processes[-1].start()
    return Ranks(processes, folder)


def on_ranks(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(*args)`` returns on every rank, where they talk by gloo."""
    with tempfile.TemporaryDirectory() as folder:
        return start(count, Path(folder) / "ranks", _by_gloo, Path(folder) / "store", function, *args).results()


def _by_gloo(store: Path, function: Callable[..., Any], *args: Any) -> Any:
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    return function(*args)


def _run(
    rank: int, environment: dict[str, Any], folder: Path, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update({name: str(value) for name, value in environment.items()})
    try:
        torch.save(function(*args), folder / f"rank{rank}.pt")
    except BaseException:
        (folder / f"error{rank}.txt").write_text(traceback.format_exc())
        raise
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
