"""The optimizer step on the hidden matrices of models: ours against torch's, a plain loop, AdamW, and installed peers.

python benchmarks/muon_step.py
python benchmarks/muon_step.py --sets gpt2_medium --layers 2
python benchmarks/muon_step.py --no-bf16-hardware    # as on a CPU that multiplies no bfloat16

The cost per layer does not depend on the number of layers, so on a CPU one layer of a large model is measured. A ratio above
1 is slower than our default Muon.
"""

from __future__ import annotations

import argparse
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness import AVX2, Work, compare, device, save, side_by_side, size_key, skip_failing, without_bf16_hardware
from parameter_sets import PARAMETER_SETS, ParameterSet, Shape
from peers import PlainMuon, optimizers
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_muonclip import Muon
from lightning_muonclip.optim.coefficients import resolve_schedule
from lightning_muonclip.optim.orthogonalize import working_dtype
from lightning_muonclip.optim.restarts import cheapest_flops

PEER = "Muon"
LR = 1e-6  # keeps parameters nearly constant over repeated steps
SETS = {
    "cpu": ("tiny", "gpt2_small", "moe_small"),
    "cuda": ("tiny", "gpt2_small", "gpt2_medium", "llama_1b", "moe"),
    "dry": ("dry",),
}

#: On a CPU, larger sets are measured by one layer.
MOST_ON_CPU = 2**24
#: Heads, their channels and the width of one layer's attention.
HEADS = {
    "cpu": {"gpt2_small": (12, 64, 768)},
    "cuda": {"gpt2_small": (12, 64, 768), "wide": (32, 128, 4096)},
    "dry": {"dry": (2, 8, 16)},
}


def parameters(shapes: Sequence[Shape]) -> list[Parameter]:
    """Weights with gradients."""
    params = []
    for shape in shapes:
        p = Parameter(torch.randn(shape, device=device()) / shape[-1] ** 0.5)
        p.grad = torch.randn_like(p)
        params.append(p)
    return params


def ours(params: list[Parameter], **options: Any) -> Muon:
    """Our Muon, with a separate group for expert stacks."""
    kinds = {"matrix": [p for p in params if p.ndim == 2], "experts": [p for p in params if p.ndim == 3]}
    return Muon([{"params": own, "kind": kind} for kind, own in kinds.items() if own], lr=LR, **options)


def step_of(optimizer: Optimizer) -> Callable[[], Any]:
    """Its step, with gradients restored each time: some peers drop or modify them."""
    grads = [(p, p.grad) for group in optimizer.param_groups for p in group["params"]]

    def step() -> None:
        for p, grad in grads:
            p.grad = grad
        optimizer.step()

    return step


def steps(params: list[Parameter]) -> dict[str, Callable[[], Any]]:
    """All available optimizers for these parameters, each with its own state."""
    functions = {"Muon": step_of(ours(params)), "Muon, jordan": step_of(ours(params, ns_coefficients="jordan"))}
    if working_dtype(device()) is not torch.float32:
        functions["Muon, float32"] = step_of(ours(params, dtype=torch.float32))
        functions["Muon, jordan, float32"] = step_of(ours(params, ns_coefficients="jordan", dtype=torch.float32))
    functions["plain float32 loop"] = step_of(PlainMuon(params, LR))
    functions["AdamW foreach"] = step_of(AdamW(params, lr=LR, foreach=True))
    functions["AdamW fused"] = step_of(AdamW(params, lr=LR, fused=True))
    peers = optimizers(LR)
    if "torch.optim.Muon" in peers:
        functions["torch.optim.Muon"] = step_of(peers.pop("torch.optim.Muon")(params))
    return functions | skip_failing({name: _deferred(make, params) for name, make in peers.items()})


def work(name: str, params: Sequence[Tensor]) -> Work | None:
    """The minimum work of a step: its products, and weights, gradients and states read and written once."""
    nbytes = float(sum(p.nbytes for p in params))
    if name.startswith("AdamW"):
        return Work(0.0, 7 * nbytes)
    if name.startswith("Muon"):
        dtype = torch.float32 if name.endswith("float32") else working_dtype(device())
        schedule = resolve_schedule("jordan" if "jordan" in name else None, None, dtype)
        unit = torch.finfo(dtype).eps / 2

        def products(m: int, n: int) -> float:
            return cheapest_flops(schedule, m, n, unit, 0.5)

    elif name in ("plain float32 loop", "torch.optim.Muon"):
        dtype = torch.float32 if name.startswith("plain") else torch.bfloat16

        def products(m: int, n: int) -> float:
            return 20.0 * m * n * min(m, n) + 10.0 * min(m, n) ** 3

    else:
        return None
    return Work(sum(p.shape[:-2].numel() * products(*p.shape[-2:]) for p in params), 5 * nbytes, dtype)


def transient_memory(step: Callable[[], Any]) -> int:
    """Peak bytes of the temporaries of a step."""
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with Allocations() as allocations:
        step()
    return allocations.peak


class Allocations(TorchDispatchMode):
    """Tracks the peak bytes of the results of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and counts new storages."""
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in known | self.alive.keys():
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def case(name: str, own: ParameterSet, layers: int, rounds: int) -> dict[str, Any]:
    """All optimizers on one set."""
    gc.collect()  # memory of the previous set
    params = parameters(own.layer * layers)
    hidden = sum(p.nbytes for p in params)
    print(f"\n{name}, {layers} of {own.layers} layers, {hidden / 2**20:.1f} MiB of hidden matrices")
    functions = steps(params)
    seconds = side_by_side(functions, rounds=rounds, warm_up=2)
    results = compare(seconds, PEER, {key: work(key, params) for key in functions})
    for key in ("Muon", "Muon, jordan", "plain float32 loop"):
        results[key]["transient_memory"] = transient_memory(functions[key]) / hidden
        print(f"{key:32} {results[key]['transient_memory']:10.2f} times the matrices' bytes, for a while")
    return {"set": name, "layers": own.layers, "layers_measured": layers, "peer": PEER, "results": results}


def shape_case(shape: Shape, rounds: int) -> dict[str, Any]:
    """One matrix alone: ours against the plain loop, in float32."""
    print(f"\n{shape}")
    params = parameters([shape])
    options: dict[str, Any] = {"dtype": torch.float32}
    functions = {
        "Muon": step_of(ours(params, **options)),
        "Muon, jordan": step_of(ours(params, ns_coefficients="jordan", **options)),
        "plain float32 loop": step_of(PlainMuon(params, LR)),
    }
    seconds = side_by_side(functions, rounds=rounds, warm_up=2)
    return {"shape": shape, "peer": PEER, "results": compare(seconds, PEER)}


def heads_case(name: str, heads: int, head_dim: int, width: int, rounds: int) -> dict[str, Any]:
    """Queries, keys and values of one layer as one weight: whole, apart, in pairs of heads, and head by head."""
    print(f"\n{name}: {heads} heads of {head_dim}x{width}")
    rows, functions = heads * head_dim, {}
    sizes = {"whole": 3 * rows, "qkv": rows, "pairs": 2 * head_dim, "heads": head_dim}
    for split, size in sizes.items():
        [weight] = parameters([(3 * rows, width)])
        parts = {weight: (0, list(torch.arange(3 * rows).split(size)))}
        functions[split] = step_of(Muon([weight], LR, parts=parts, dtype=torch.float32))
    seconds = side_by_side(functions, rounds=rounds, warm_up=2)
    return {"heads": [heads, head_dim, width], "peer": "qkv", "results": compare(seconds, "qkv")}


def main() -> None:
    """The command line."""
    kind = size_key()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="*", choices=PARAMETER_SETS, default=SETS[kind])
    parser.add_argument("--layers", type=int, help="how many layers of each set; all of them on a GPU")
    parser.add_argument("--rounds", type=int, default=10 if kind == "cuda" else 5)
    parser.add_argument("--by-shape", action="store_true", help="also every 2-D shape by itself, in float32")
    parser.add_argument("--heads", action="store_true", help="also one layer's attention, whole and head by head")
    parser.add_argument("--no-bf16-hardware", action="store_true", help="hold a CPU to AVX2")
    given = parser.parse_args()
    if given.no_bf16_hardware:
        without_bf16_hardware()
    environment = AVX2 if given.no_bf16_hardware else {}
    results: dict[str, list[Any]] = {"cases": [], "shapes": [], "heads": []}

    def keep(kind: str, result: dict[str, Any]) -> None:
        results[kind].append(result)
        save("muon_step_no_bf16" if given.no_bf16_hardware else "muon_step", environment=environment, **results)

    for name, heads in HEADS[kind].items() if given.heads else ():
        keep("heads", heads_case(name, *heads, given.rounds))
    for name in given.sets:
        own = PARAMETER_SETS[name]
        numel = sum(torch.Size(shape).numel() for shape in own.layer) * own.layers
        layers = given.layers or (1 if kind == "cpu" and numel > MOST_ON_CPU else own.layers)
        keep("cases", case(name, own, min(layers, own.layers), given.rounds))
        for shape in dict.fromkeys(own.layer) if given.by_shape else ():
            if len(shape) == 2:
                keep("shapes", shape_case(shape, given.rounds))


def _deferred(make: Callable[[list[Parameter]], Optimizer], params: list[Parameter]) -> Callable[[], Any]:
    """A peer's step. The optimizer is created at the first call, which may fail."""
    made: list[Callable[[], Any]] = []

    def step() -> None:
        if not made:
            made.append(step_of(make(params)))
        made[0]()

    return step


if __name__ == "__main__":
    main()
