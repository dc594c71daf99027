"""Times functions in turn, so that other load on the machine affects all of them equally.

A row may have a floor: the minimum time for its work at the rates of products and copies measured in the same run.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_muonclip.kernels.costs import bfloat16_hardware

#: Rehearses a benchmark: tiny sizes, a round or two, and nothing compiled. The numbers mean nothing.
DRY = os.environ.get("BENCHMARK_DRY") == "1"

#: At most so many rounds; one fills the compilers' caches.
MOST_ROUNDS = int(os.environ.get("BENCHMARK_ROUNDS") or (2 if DRY else 10**9))

RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results")

#: A function takes no more turns after this many seconds.
PATIENCE = 60.0

#: Limits torch, oneDNN and MKL to AVX2, on processors of any vendor. On such a CPU, oneDNN's bfloat16 is slow and MKL's
#: float32 fast. Without the last variable, float32 would keep AVX-512, which would favor us.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}

#: FLOPs per second of products by dtype, measured on demand.
_MATMUL_RATES: dict[torch.dtype, float] = {}


class Work(NamedTuple):
    """The minimum work of a function: floating-point operations of products in a dtype, and bytes read and written."""

    flops: float
    bytes: float
    dtype: torch.dtype = torch.float32

    @property
    def floor(self) -> float:
        """Seconds at the device's measured rates."""
        products = self.flops / matmul_rate(self.dtype) if self.flops else 0.0
        return max(products, self.bytes / copy_rate())


def device() -> torch.device:
    """The device of the benchmarks: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def size_key() -> str:
    """The key of the sizes to measure: ``"dry"``, or the type of the device."""
    return "dry" if DRY else device().type


def compiler() -> str:
    """The backend of torch.compile; a dry run only traces."""
    return "eager" if DRY else "inductor"


def without_bf16_hardware() -> None:
    """Runs this command again, held to AVX2, unless it is already."""
    if any(os.environ.get(key) != value for key, value in AVX2.items()):
        raise SystemExit(subprocess.run([sys.executable, *sys.argv], env=os.environ | AVX2).returncode)


def side_by_side(
    functions: Mapping[str, Callable[[], Any]], rounds: int = 20, warm_up: int = 3, patience: float = PATIENCE
) -> dict[str, list[float]]:
    """Seconds of every call, by name; every round calls each function once.

    A function too slow for its warm-up is measured from its first call.
    """
    rounds, warm_up = min(rounds, MOST_ROUNDS), min(warm_up, MOST_ROUNDS - 1)
    _keep_freed_memory()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    spent = dict.fromkeys(functions, 0.0)
    for i in range(warm_up + rounds):
        for name, function in functions.items():
            if spent[name] > patience:
                continue
            elapsed = _time(function)
            spent[name] += elapsed
            if i >= warm_up or elapsed * warm_up > patience:
                seconds[name].append(elapsed)
    return seconds


def compare(
    seconds: Mapping[str, list[float]], peer: str, work: Mapping[str, Work | None] | None = None
) -> dict[str, dict[str, Any]]:
    """Prints and returns every function's median, quartiles, time over that of ``peer``, and over its own floor."""
    rows = {}
    print(kind_of_machine(), flush=True)
    for name, own in seconds.items():
        low, median, high = statistics.quantiles(own, n=4) if len(own) > 1 else own * 3
        row = rows[name] = {"median_ms": 1e3 * median, "quartiles_ms": [1e3 * low, 1e3 * high], "calls": len(own)}
        line = f"{name:32} {1e3 * median:10.3f} ms  [{1e3 * low:.3f}, {1e3 * high:.3f}]"
        if peer in seconds:
            row["ratio"] = _ratio(own, seconds[peer])
            line += f"  {row['ratio']:8.3f} x {peer}"
        own_work = (work or {}).get(name)
        if own_work is not None:
            row |= {"floor_ms": 1e3 * own_work.floor, "times_floor": median / own_work.floor, "flops": own_work.flops}
            line += f"  floor {row['floor_ms']:.3f} ms, {row['times_floor']:.2f} times that"
        print(line, flush=True)
    return rows


def report(
    benchmark: str,
    seconds: Mapping[str, list[float]],
    peer: str,
    work: Mapping[str, Work | None] | None = None,
    **setting: Any,
) -> dict[str, Any]:
    """Compares functions and saves the result as the only case of a benchmark."""
    return save(benchmark, peer=peer, setting=setting, results=compare(seconds, peer, work))


def save(benchmark: str, **content: Any) -> dict[str, Any]:
    """Writes JSON, one file for each benchmark and kind of device; to ``$OUT`` too, if that is set.

    A benchmark of many cases saves after each, so that one that is stopped keeps what it has.
    """
    result = {"benchmark": benchmark, "machine": machine(), "rates": _rates()} | content
    text = json.dumps(result, indent=2, default=str) + "\n"
    for folder in {RESULTS, Path(os.environ.get("OUT") or RESULTS)}:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{benchmark}_{device().type}.json").write_text(text)
    return result


def attempt(function: Callable[[], Any]) -> Any:
    """What a function returns, or ``{"failed": ...}`` with its error and the last lines of code that led to it."""
    try:
        result = function()
        _wait()
        return result
    except Exception as error:  # one case may fail in any way, and the next is to run
        places = [f"{Path(own.filename).name}:{own.lineno}" for own in traceback.extract_tb(error.__traceback__)[-5:]]
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        print(f"failed: {reason} ({' < '.join(reversed(places))})", flush=True)
        return {"failed": reason, "at": places}


def those_that_work(
    functions: Mapping[str, Callable[[], Any]],
) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """Calls every function once; returns those that work, and what :func:`attempt` says of the others."""
    called = {name: attempt(function) for name, function in functions.items()}
    failures = {name: result for name, result in called.items() if exit_status(result)}
    return {name: function for name, function in functions.items() if name not in failures}, failures


def exit_status(results: Any) -> int:
    """1 if a case of some results failed, at any depth."""
    if not isinstance(results, Mapping):
        return 0
    return int("failed" in results or any(map(exit_status, results.values())))


def skip_failing(functions: Mapping[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """Calls every function once and returns those that work; prints why the others are skipped."""
    able = {}
    for name, function in functions.items():
        try:
            function()
            _wait()
        except Exception as error:  # a peer may fail in any way
            print(f"skipped: {name}: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
        else:
            able[name] = function
    return able


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOPs per second of a large square product on this device."""
    if dtype not in _MATMUL_RATES:
        n = {"cuda": 8192, "cpu": 1024, "dry": 128}[size_key()]
        a, b = (torch.randn(n, n, device=device()).to(dtype) for _ in range(2))
        # Without a fast path for the dtype, one of the two can be several times slower.
        _MATMUL_RATES[dtype] = 2 * n**3 / min(_best(lambda: a @ b), _best(lambda: a @ b.mT))
    return _MATMUL_RATES[dtype]


@functools.cache
def copy_rate() -> float:
    """Bytes per second, read and written, of a copy larger than any cache."""
    source = torch.zeros({"cuda": 2**28, "cpu": 2**25, "dry": 2**16}[size_key()], device=device())
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source))


def machine() -> dict[str, Any]:
    """The machine and versions that the results hold for."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_hardware": bfloat16_hardware(),
        "threads": torch.get_num_threads(),
        "clock": "process" if _clock() is time.process_time else "wall",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version_of("triton"),
        "lightning": _version_of("lightning"),
        "transformers": _version_of("transformers"),
        "python": platform.python_version(),
    }


def kind_of_machine() -> str:
    """The device and, of a CPU, what it multiplies bfloat16 with, for a table or a picture."""
    own = machine()
    if device().type == "cuda":
        return str(own["device"])
    return f"{own['device']} (bfloat16 in hardware: {own['bfloat16_hardware']}), {own['threads']} threads"


@functools.cache
def _keep_freed_memory() -> None:
    """Frees a block of nearly 32 MB, the largest that counts; most trainings free large ones.

    glibc returns freed memory of twice that size to the system, and faults it in again page by page.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")


def _ratio(own: Sequence[float], peer: Sequence[float]) -> float:
    """Ratio of calls in the same round, if both functions completed all rounds."""
    if len(own) == len(peer):
        return statistics.median(a / b for a, b in zip(own, peer))
    return statistics.median(own) / statistics.median(peer)


def _rates() -> dict[str, float]:
    """The rates behind the floors."""
    products = {f"matmul_{str(dtype).removeprefix('torch.')}": rate / 1e9 for dtype, rate in _MATMUL_RATES.items()}
    return {f"{name}_gflops": round(rate, 1) for name, rate in products.items()} | {
        "copy_gbytes": round(copy_rate() / 1e9, 1)
    }


def _best(function: Callable[[], Any]) -> float:
    """Seconds of the fastest of several calls, for peak rates."""
    first = _time(function)
    return min([first] + [_time(function) for _ in range(20 if first < 0.1 else 2)])


def _time(function: Callable[[], Any]) -> float:
    clock = _clock()
    _wait()
    start = clock()
    function()
    _wait()
    return clock() - start


def _clock() -> Callable[[], float]:
    """The clock: process time for a single CPU thread, which excludes other processes; else wall time."""
    return time.process_time if device().type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()
