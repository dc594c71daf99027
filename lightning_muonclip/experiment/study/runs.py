"""Trains the runs of a study, several at a time, each in a process of its own; what is in the results is not run again."""

from __future__ import annotations

import csv
import itertools
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_muonclip.optim.orthogonalize import working_dtype

#: Of every run of a study: what costs time and says nothing.
_QUIET = (
    "callbacks=none",
    "logger=csv",
    "+trainer.enable_progress_bar=false",
    "+trainer.enable_checkpointing=false",
)


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        overrides: Of ``muonclip-train``, sorted; they tell one run from another.
        loss: The last validation loss in nats per token; infinite if the run has diverged.
        max_logit: The largest attention logit of all steps; NaN if the run observes none.
        curve: Validation loss by step.
        seconds: How long it took.
        machine: The kind of processor, and the dtype in which large matrices are orthogonalized on it.
    """

    overrides: tuple[str, ...]
    loss: float
    max_logit: float
    curve: tuple[tuple[int, float], ...]
    seconds: float
    machine: str


class Results:
    """The runs that are done, in a CSV file that grows by a line a run.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._runs: dict[tuple[str, ...], Run] = {}
        if path.exists():
            with path.open(newline="") as file:
                self._runs = {run.overrides: run for run in map(_from_row, csv.DictReader(file))}

    def __len__(self) -> int:
        return len(self._runs)

    def get(self, overrides: Iterable[str]) -> Run | None:
        """The run with these overrides, in any order, if it is done."""
        return self._runs.get(tuple(sorted(overrides)))

    def add(self, run: Run) -> None:
        """Adds a run and writes it."""
        is_new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, _to_row(run), lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(_to_row(run))
        self._runs[run.overrides] = run


def rates_of(swept: Mapping[str, Sequence[float]]) -> Iterator[tuple[str, ...]]:
    """The overrides of every point of a grid of learning rates."""
    for values in itertools.product(*swept.values()):
        yield tuple(f"{key}={value:g}" for key, value in zip(swept, values))


def run_all(wanted: Iterable[Sequence[str]], results: Results, jobs: int | None) -> None:
    """Runs what is not in the results yet.

    Args:
        wanted: The overrides of each run.
        results: Gets every run as soon as it is done.
        jobs: How many runs at a time; ``None`` is one for each core.

    Raises:
        RuntimeError: If a run fails, once all others are done.
    """
    missing = {tuple(sorted(overrides)) for overrides in wanted if results.get(overrides) is None}
    failures: list[str] = []
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        pending = {pool.submit(train, overrides): overrides for overrides in sorted(missing)}
        for future in as_completed(pending):
            try:
                run = future.result()
            except RuntimeError as error:
                failures.append(str(error))
                continue
            results.add(run)
            print(f"{' '.join(run.overrides)}: loss {run.loss:.4f}, {run.seconds:.0f} s", flush=True)
    if failures:
        raise RuntimeError("\n".join(failures))


def train(overrides: Sequence[str]) -> Run:
    """One run, in a process of its own.

    Raises:
        RuntimeError: If it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lightning_muonclip.experiment.train", *overrides, *_QUIET]
        start = time.perf_counter()
        done = subprocess.run(
            [*command, f"hydra.run.dir={folder}"],
            env={"OMP_NUM_THREADS": "1", **os.environ},
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(overrides)} failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}"
            )
        metrics = Path(folder) / "metrics.csv"
        if not metrics.exists():
            raise RuntimeError(f"{' '.join(overrides)} logged nothing")
        with metrics.open(newline="") as file:
            rows = list(csv.DictReader(file))
    curve = tuple((int(row["step"]) + 1, float(row["val/loss"])) for row in rows if row.get("val/loss"))
    logits = [float(row["muonclip/max_logit"]) for row in rows if row.get("muonclip/max_logit")]
    loss = curve[-1][1] if curve else math.nan
    return Run(
        tuple(sorted(overrides)),
        loss if math.isfinite(loss) else math.inf,
        max(logits, default=math.nan),
        curve,
        seconds,
        kind_of_machine(),
    )


def kind_of_machine() -> str:
    """The device, and the dtype in which Newton-Schulz works on it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return f"{name} in {str(working_dtype(device)).removeprefix('torch.')}"


def _to_row(run: Run) -> dict[str, str]:
    return {
        "overrides": shlex.join(run.overrides),
        "loss": f"{run.loss:.6f}",
        "max_logit": f"{run.max_logit:.4g}",
        "curve": " ".join(f"{step}:{loss:.5f}" for step, loss in run.curve),
        "seconds": f"{run.seconds:.0f}",
        "machine": run.machine,
    }


def _from_row(row: Mapping[str, str]) -> Run:
    points = (point.split(":") for point in row["curve"].split())
    return Run(
        tuple(shlex.split(row["overrides"])),
        float(row["loss"]),
        float(row["max_logit"]),
        tuple((int(step), float(loss)) for step, loss in points),
        float(row["seconds"]),
        row["machine"],
    )
