"""Times functions side by side: they take turns, so that whatever else the machine does slows all of them alike."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def side_by_side(
    functions: Mapping[str, Callable[[], Any]], rounds: int = 20, warm_up: int = 3
) -> dict[str, list[float]]:
    """Seconds of every call, by name; every round calls each function once."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(warm_up + rounds):
        for name, function in functions.items():
            _wait()
            start = time.perf_counter()
            function()
            _wait()
            if i >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(benchmark: str, seconds: Mapping[str, list[float]], peer: str, **setting: Any) -> dict[str, Any]:
    """Prints every function's median, spread and ratio to ``peer``, round by round; writes them as JSON."""
    rows = {}
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds[peer])]
        low, _, high = statistics.quantiles(own, n=4)
        rows[name] = {
            "median_ms": 1e3 * statistics.median(own),
            "quartiles_ms": [1e3 * low, 1e3 * high],
            "ratio": statistics.median(ratios),
        }
        print(
            f"{name:32} {rows[name]['median_ms']:10.3f} ms  [{1e3 * low:.3f}, {1e3 * high:.3f}]  {rows[name]['ratio']:8.2%}"
        )
    result = {"benchmark": benchmark, "peer": peer, "setting": setting, "machine": machine(), "results": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{benchmark}.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
