"""Orthogonalization by shape: our methods against plain Newton-Schulz, torch's, and installed peers.

python benchmarks/orthogonalize.py           # the table, a case per shape
python benchmarks/orthogonalize.py --no-bf16-hardware    # as on a CPU that multiplies no bfloat16
python benchmarks/orthogonalize.py --plot    # docs/orthogonalize_time.png from the results
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import (
    AVX2,
    RESULTS,
    Work,
    compare,
    device,
    save,
    side_by_side,
    size_key,
    skip_failing,
    without_bf16_hardware,
)
from peers import each, newton_schulz, orthogonalizers

from lightning_muonclip import orthogonalize
from lightning_muonclip.optim.coefficients import resolve_schedule
from lightning_muonclip.optim.orthogonalize import working_dtype
from lightning_muonclip.optim.restarts import best_restarts, flops

PEER = "ours"
PICTURE = Path(__file__).parents[1] / "docs" / "orthogonalize_time.png"

SIZES = {"cpu": (64, 128, 256, 512, 768, 1024, 2048), "cuda": (64, 128, 256, 512, 768, 1024, 2048, 4096), "dry": (16,)}
RATIOS = (1, 2, 4, 8)
#: Most elements of a single matrix.
MOST = {"cpu": 2**22, "cuda": 2**26, "dry": 2**9}
#: Typical batches: attention matrices of all layers, stacks of experts, and large matrices.
BATCHES = {
    "cpu": ((12, 64, 64), (24, 128, 128), (8, 352, 512), (4, 768, 3072)),
    "cuda": ((48, 768, 768), (96, 1024, 1024), (64, 1408, 2048)),
    "dry": ((2, 16, 24),),
}

#: Ours by name: the schedule, the form and the working dtype.
OURS: dict[str, tuple[str | None, str, torch.dtype | None]] = {
    "ours": (None, "auto", None),
    "ours, float32": (None, "auto", torch.float32),
    "ours, direct": (None, "direct", None),
    "ours, gram": (None, "gram", None),
    "ours, polar_express": ("polar_express", "auto", None),
    "ours, jordan": ("jordan", "auto", None),
}


def work(name: str, batch: int, m: int, n: int) -> Work | None:
    """The minimum work of a method; unknown for a peer's schedule."""
    small, large = sorted((m, n))
    nbytes = 2.0 * 4 * batch * m * n
    if name in OURS:
        coefficients, _, dtype = OURS[name]
        dtype = dtype or working_dtype(device(), small)
        schedule = resolve_schedule(coefficients, None, dtype)
        # Half of a symmetric product is enough.
        unit = torch.finfo(dtype).eps / 2
        restarts = best_restarts(schedule.polynomials, large / small, unit, 0.5, schedule.in_pairs)
        return Work(batch * flops(schedule, restarts, m, n, 0.5), nbytes, dtype)
    if name not in ("plain float32", "plain bfloat16", "torch.optim.Muon"):
        return None
    dense = batch * small**3 * (20 * large / small + 10)
    return Work(dense, nbytes, torch.float32 if name == "plain float32" else torch.bfloat16)


def case(batch: int, m: int, n: int, rounds: int, peers: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    """One shape."""
    print(f"\n{batch} x ({m}, {n})")
    x = torch.randn(batch, m, n, device=device())
    functions: dict[str, Callable[[], Any]] = {
        name: functools.partial(orthogonalize, x, coefficients=schedule, method=method, dtype=dtype)
        for name, (schedule, method, dtype) in OURS.items()
    }
    functions["plain float32"] = functools.partial(each(lambda own: newton_schulz(own, torch.float32)), x)
    functions["plain bfloat16"] = functools.partial(each(lambda own: newton_schulz(own, torch.bfloat16)), x)
    functions |= skip_failing({name: functools.partial(peer, x) for name, peer in peers.items()})
    with torch.no_grad():
        seconds = side_by_side(functions, rounds=rounds, patience=10.0)
    return {
        "shape": [batch, m, n],
        "peer": PEER,
        "results": compare(seconds, PEER, {name: work(name, batch, m, n) for name in functions}),
    }


def draw(kind: str) -> None:
    """Plots time against size, a curve per method and a panel per aspect ratio."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    result = json.loads((RESULTS / f"orthogonalize_{kind}.json").read_text())
    singles = [own for own in result["cases"] if own["shape"][0] == 1]
    ratios = sorted({own["shape"][2] // own["shape"][1] for own in singles})
    figure, panels = plt.subplots(
        1, len(ratios), figsize=(3.4 * len(ratios), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    names = list(dict.fromkeys(name for own in singles for name in own["results"]))
    for ratio, axes in zip(ratios, panels[0]):
        cases = [own for own in singles if own["shape"][2] // own["shape"][1] == ratio]
        for name in names:
            points = [(own["shape"][1], own["results"][name]["median_ms"]) for own in cases if name in own["results"]]
            style = "o-" if name == "ours" else ".-" if name in OURS else ".--"
            axes.plot(*zip(*points), style, label=name, linewidth=2 if name == "ours" else 1)
        axes.set(xscale="log", yscale="log", xlabel="rows", title=f"{ratio} times as many columns")
        axes.set_xticks(sizes := sorted({own["shape"][1] for own in cases}), map(str, sizes), rotation=45, fontsize=7)
        axes.minorticks_off()
    own = result["machine"]
    kind = f"bfloat16 in hardware: {own['bfloat16_hardware']}"
    panels[0, 0].set_ylabel(f"milliseconds, {own['device']} ({kind}), {own['threads']} threads")
    panels[0, 0].legend(fontsize=7)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    """The command line."""
    kind = size_key()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true", help="only draw what is in the results")
    parser.add_argument("--sizes", nargs="*", type=int, default=SIZES[kind])
    parser.add_argument("--ratios", nargs="*", type=int, default=RATIOS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-bf16-hardware", action="store_true", help="hold a CPU to AVX2")
    given = parser.parse_args()
    if given.plot:
        return draw(kind)
    if given.no_bf16_hardware:
        without_bf16_hardware()
    peers = orthogonalizers()
    environment = AVX2 if given.no_bf16_hardware else {}
    benchmark = "orthogonalize_no_bf16" if given.no_bf16_hardware else "orthogonalize"
    cases = []
    for shape in (
        *((1, n, n * ratio) for ratio in given.ratios for n in given.sizes if n * n * ratio <= MOST[kind]),
        *BATCHES[kind],
    ):
        cases.append(case(*shape, given.rounds, peers))
        save(benchmark, environment=environment, cases=cases)


if __name__ == "__main__":
    main()
