"""How many rows of largest log-sum-exp prove the largest logit, over whole runs: ``python benchmarks/certificates.py``."""

from __future__ import annotations

from typing import Any

import torch
from demo import Demo
from harness import save
from torch import Tensor

from lightning_muonclip.kernels import measure
from lightning_muonclip.kernels.bounded_max_logits import bounded_max_logits, top_rows

ROWS = (1, 2, 4, 8, 16)
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "demo": (400, {}),
    "explosion, threshold 30": (300, {"lr": 0.06}),
    "explosion, no clip": (300, {"lr": 0.06, "threshold": None}),
}


class Spy:
    """Stands in the place of bounded_max_logits, and compares what some rows prove with the maximum."""

    def __init__(self) -> None:
        #: For every number of rows: (steps * layers, heads) of computed maxima, bounds and true maxima.
        self.seen: dict[int, list[Tensor]] = {count: [] for count in ROWS}

    def __call__(self, query: Tensor, key: Tensor, bounds: Tensor, **options: Any) -> Tensor:
        """The maximum, as ever."""
        exact = bounded_max_logits(query, key, bounds, **options)
        for count, seen in self.seen.items():
            seen.append(torch.stack([*top_rows(*measure.Logits(query, key, bounds, **options), count=count), exact]))
        return exact


def run(name: str, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """Trains, and prints a row of the table for every number of rows."""
    spy = measure.bounded_max_logits = Spy()  # type: ignore[assignment]
    demo = Demo(**options)
    for _ in range(steps):
        loss = demo.step()
    measure.bounded_max_logits = bounded_max_logits
    results: dict[str, Any] = {"loss": loss}
    for count, seen in spy.seen.items():
        found, bound, exact = torch.stack(seen, 1)
        is_proven = found == bound
        rest = (bound - exact)[~is_proven]
        rounding = 1e-4 + 1e-5 * exact.abs()
        results[str(count)] = row = {
            "proven": float(is_proven.float().mean()),
            "proven after step 100": float(is_proven[400:].float().mean()),
            "equal to the maximum": float((found >= exact - rounding).float().mean()),
            "largest bound - maximum": float(rest.max()) if len(rest) else 0.0,
            "proven and wrong": int((is_proven & ((found - exact).abs() > rounding)).sum()),
        }
        print(f"{name:26} {count:3} rows  " + "  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    return results


if __name__ == "__main__":
    save("certificates", results={name: run(name, *args) for name, args in RUNS.items()})
