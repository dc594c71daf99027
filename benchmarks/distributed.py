"""Muon's step on many ranks: balance of work, communication volume, and a measurement with real processes.

python benchmarks/distributed.py               # simulated ranks; --docs also writes the tables and the plot into docs/
python benchmarks/distributed.py --network 25  # GB/s that a rank sends and receives: assumed, not measured
python benchmarks/distributed.py --exchange    # 2 and 4 real processes on this machine, gloo

The simulation uses only the shapes of the matrices, the assignment of owners, and the rates of products and copies that this
run measures on this device. It ignores the effect of shapes on these rates, launch overhead and network latency. Its times
show which part dominates, not what a cluster would take.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from harness import copy_rate, device, kind_of_machine, matmul_rate, save
from parameter_sets import MODELS, PARAMETER_SETS, Shape
from peers import LoopMuon
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_muonclip import Muon, orthogonalize
from lightning_muonclip.optim.coefficients import resolve_schedule
from lightning_muonclip.optim.orthogonalize import working_dtype
from lightning_muonclip.optim.restarts import cheapest_flops
from lightning_muonclip.parallel.owners import assign_owners

DOCS = Path(__file__).parents[1] / "docs"
RANKS = tuple(2**i for i in range(1, 13))
#: DDP replicates every weight, for which DeepSeek-V3 is far too large.
CASES = (
    ("gpt2_small", "DDP"),
    ("gpt2_small", "FSDP2"),
    ("llama_7b", "DDP"),
    ("llama_7b", "FSDP2"),
    ("deepseek_v3", "FSDP2"),
)
ROUTED_TO = 8  # experts of a stack that a token meets: num_experts_per_tok of DeepSeek-V3
WEIGHT_BYTES = 4  # weights, gradients and states are float32
LR = 1e-6  # keeps parameters nearly constant over repeated steps


# Simulated ranks ------------------------------------------------------------------------------------------------------


class Traffic(NamedTuple):
    """Bytes that every rank sends and receives before and after the Newton-Schulz iterations."""

    sent: tuple[Tensor, Tensor]
    received: tuple[Tensor, Tensor]

    @property
    def seconds_at_one(self) -> float:
        """Time at one byte per second each way, of the busiest rank; sending and receiving overlap."""
        return sum(float(torch.maximum(sent.max(), received.max())) for sent, received in zip(self.sent, self.received))


def cost(m: int, n: int) -> float:
    """FLOPs of orthogonalizing one matrix, as Muon counts them when it assigns owners."""
    dtype = working_dtype(device(), min(m, n))
    return cheapest_flops(resolve_schedule(None, None, dtype), m, n, torch.finfo(dtype).eps / 2)


def wire_bytes() -> int:
    """Bytes of one element, in each direction."""
    return min(working_dtype(device()).itemsize, WEIGHT_BYTES)


def shares(rows: int, ranks: int) -> Tensor:
    """Rows per rank when sharded as by torch.chunk; the last ranks may hold none."""
    most = -(-rows // ranks)
    return (rows - most * torch.arange(ranks)).clamp(0, most).double()


def weights_of(model: str) -> tuple[list[Shape], list[Shape]]:
    """All matrices of a model, and all stacks of experts, in the order of its layers."""
    shapes = [shape for part in MODELS[model] for _ in range(part.layers) for shape in part.layer]
    return [shape for shape in shapes if len(shape) == 2], [shape for shape in shapes if len(shape) == 3]


def training_flops(matrices: Sequence[Shape], stacks: Sequence[Shape]) -> float:
    """FLOPs of the forward and backward of one token, by the usual 6 per active weight."""
    experts = sum(ROUTED_TO * m * n for _, m, n in stacks)
    return 6.0 * (sum(m * n for m, n in matrices) + experts)


def expert_loads(stacks: Sequence[Shape], ranks: int) -> Tensor:
    """FLOPs on every rank for its own experts, which are sharded by experts and not exchanged."""
    return sum((shares(count, ranks) * cost(m, n) for count, m, n in stacks), torch.zeros(ranks, dtype=torch.float64))


def loads(costs: Sequence[float], owners: Sequence[int], own: Tensor) -> Tensor:
    """FLOPs on every rank, including those of its own experts."""
    return own.index_add(0, torch.tensor(owners), torch.tensor(costs, dtype=torch.float64))


def traffic(strategy: str, matrices: Sequence[Shape], owners: Sequence[int], ranks: int) -> Traffic:
    """Traffic to the owners and back, matrix by matrix and rank by rank."""
    sent, received = torch.zeros(2, 2, ranks, dtype=torch.float64)
    for (m, n), owner in zip(matrices, owners):
        needed = torch.full((ranks,), float(m)) if strategy == "DDP" else shares(m, ranks)
        others = needed.double() * n * wire_bytes()
        others[owner] = 0.0
        if strategy != "DDP":  # the owner has the whole momentum already
            sent[0] += others
            received[0, owner] += others.sum()
        sent[1, owner] += others.sum()
        received[1] += others
    return Traffic((sent[0], sent[1]), (received[0], received[1]))


def least_bytes(strategy: str, matrices: Sequence[Shape], ranks: int) -> float:
    """Lower bound of the bytes received by all ranks: one rank sees each whole matrix, all get their part of the result.

    Under FSDP2, everything but the largest shard is sent, twice. Under DDP, the result is sent to all ranks but one.
    """
    if strategy == "DDP":
        return sum(float(m * n) for m, n in matrices) * (ranks - 1) * wire_bytes()
    return sum(2 * (m - float(shares(m, ranks)[0])) * n for m, n in matrices) * wire_bytes()


def whole_everywhere(strategy: str, matrices: Sequence[Shape], stacks: Sequence[Shape], ranks: int) -> float:
    """Bytes that a rank receives if every rank orthogonalizes everything: whole matrices, in their own dtype."""
    if strategy == "DDP":
        return 0.0
    return sum(float(torch.Size(shape).numel()) for shape in (*matrices, *stacks)) * (1 - 1 / ranks) * WEIGHT_BYTES


def simulate(model: str, strategy: str, ranks: int, network: float) -> dict[str, Any]:
    """One model on a number of ranks."""
    matrices, stacks = weights_of(model)
    costs = [cost(m, n) for m, n in matrices]
    own = expert_loads(stacks, ranks)
    choices = {"owners": assign_owners(costs, own.tolist()), "round_robin": [i % ranks for i in range(len(costs))]}
    work = {name: loads(costs, owners, own) for name, owners in choices.items()}
    sent = {name: traffic(strategy, matrices, owners, ranks) for name, owners in choices.items()}
    total, mean = float(work["owners"].sum()), float(work["owners"].mean())
    everything = whole_everywhere(strategy, matrices, stacks, ranks)
    nbytes = WEIGHT_BYTES * (
        sum(m * n for m, n in matrices)
        if strategy == "DDP"
        else sum(float(shares(shape[0], ranks)[0]) * torch.Size(shape[1:]).numel() for shape in (*matrices, *stacks))
    )
    copies, products = copy_rate(), _rate_of_products()

    def seconds(compute: float, transfer: float, overlap: bool) -> float:
        # Weight and momentum are read and written, the gradient is read.
        parts = (compute / products, transfer / (network * 1e9))
        return 5 * nbytes / copies + (max(parts) if overlap else sum(parts))

    busiest = {name: (float(work[name].max()), own_traffic.seconds_at_one) for name, own_traffic in sent.items()}
    return {
        "model": model,
        "strategy": strategy,
        "ranks": ranks,
        "weights": len(matrices) + len(stacks),
        "largest_over_mean": {
            "owners": busiest["owners"][0] / mean,
            "least possible": max(mean, max(costs), float(own.max())) / mean,
            "round robin": busiest["round_robin"][0] / mean,
        },
        "less_work_than_everything": total / busiest["owners"][0],
        "tokens": busiest["owners"][0] / training_flops(matrices, stacks),
        "bytes": {
            "least": least_bytes(strategy, matrices, ranks) / ranks,
            "owners": sum(float(part.sum()) for part in sent["owners"].received) / ranks,
            "busiest rank sends": float(sum(sent["owners"].sent).max()),  # type: ignore[union-attr]
            "everything everywhere": everything,
        },
        "seconds": {
            "AdamW": 7 * nbytes / copies,  # both states too are read and written
            "Muon": seconds(*busiest["owners"], overlap=True),
            "without overlap": seconds(*busiest["owners"], overlap=False),
            "round robin": seconds(*busiest["round_robin"], overlap=True),
            "everything everywhere": seconds(total, everything, overlap=True),
            "Newton-Schulz alone": busiest["owners"][0] / products,
            "network alone": busiest["owners"][1] / (network * 1e9),
        },
    }


def tables(cases: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Markdown tables with a column per number of ranks."""

    def rows(cells: Callable[[dict[str, Any]], dict[str, str]], kinds: Sequence[tuple[str, str]]) -> str:
        ranks = sorted({case["ranks"] for case in cases})
        lines = [f"| {' | '.join(['', '', *map(str, ranks)])} |", "|" + " --- |" * (len(ranks) + 2)]
        for model, strategy in kinds:
            own = [cells(c) for c in cases if (c["model"], c["strategy"]) == (model, strategy)]
            for i, name in enumerate(own[0]):
                title = f"{model}, {strategy}" if i == 0 else ""
                lines.append(f"| {' | '.join([title, name, *(cell[name] for cell in own)])} |")
        return "\n".join(lines)

    def balance(case: dict[str, Any]) -> dict[str, str]:
        even = {name: f"{value:.2f}" for name, value in case["largest_over_mean"].items()}
        return even | {
            "reduction of work": f"{case['less_work_than_everything']:.1f}",
            "equivalent tokens": _short(case["tokens"]),
        }

    def exchanged(case: dict[str, Any]) -> dict[str, str]:
        return {
            name: _short(value / 1e6)
            for name, value in case["bytes"].items()
            if value or name != "everything everywhere"
        }

    def step(case: dict[str, Any]) -> dict[str, str]:
        own = case["seconds"]
        shown = {name: _short(value) for name, value in own.items() if not name.endswith("alone")}
        return shown | {"Muon over AdamW": f"{own['Muon'] / own['AdamW']:.1f}"}

    once = [case for case in CASES if case[1] == "FSDP2"]  # DDP distributes work in the same way
    return {"balance": rows(balance, once), "bytes": rows(exchanged, CASES), "seconds": rows(step, CASES)}


def _rates(network: float) -> str:
    dtype = str(working_dtype(device())).removeprefix("torch.")
    return (
        f"Rates: {kind_of_machine()}, torch {torch.__version__}: {_rate_of_products() / 1e9:.0f} GFLOP/s of"
        f" {dtype} products and {copy_rate() / 1e9:.1f} GB/s of copies, both measured; a network of {network:g} GB/s per"
        " rank and direction is **assumed**. Not measured on GPUs or clusters yet."
    )


def _rate_of_products() -> float:
    return matmul_rate(working_dtype(device()))


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw(cases: Sequence[dict[str, Any]], network: float, path: Path) -> None:
    """Plots balance, bytes and modeled time against the number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (even, moved, step) = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    for i, (model, strategy) in enumerate(CASES):
        own = [case for case in cases if (case["model"], case["strategy"]) == (model, strategy)]
        x = [case["ranks"] for case in own]
        if strategy == "FSDP2":
            for name, style in {"owners": "o-", "least possible": ":", "round robin": ".--"}.items():
                even.plot(
                    x, [case["largest_over_mean"][name] for case in own], style, color=f"C{i}", label=f"{model}, {name}"
                )
        moved.plot(
            x,
            [case["bytes"]["busiest rank sends"] / 1e6 for case in own],
            "o-",
            color=f"C{i}",
            label=f"{model}, {strategy}",
        )
        moved.plot(x, [case["bytes"]["least"] / 1e6 for case in own], ":", color=f"C{i}")
        if (model, strategy) == ("llama_7b", "FSDP2"):
            for name in ("AdamW", "Muon", "round robin", "everything everywhere", "network alone"):
                step.plot(x, [case["seconds"][name] for case in own], ".-", label=name)
    even.set(ylabel="largest rank's FLOPs over the mean", title="how even")
    moved.set(ylabel="MB that the busiest rank sends", title="bytes of a step; dotted: least possible mean")
    step.set(ylabel="seconds, modelled", title=f"llama_7b, FSDP2: a CPU, {network:g} GB/s assumed")
    for axes in (even, moved, step):
        axes.set(xscale="log", yscale="log", xlabel="ranks")
        axes.legend(fontsize=6)
    figure.savefig(path, dpi=110)


def write_docs(parts: dict[str, str]) -> None:
    """Inserts tables between their markers in docs/distributed.md."""
    path = DOCS / "distributed.md"
    page = path.read_text()
    for name, table in parts.items():
        before, _, rest = page.partition(f"<!-- {name} -->")
        _, _, after = rest.partition(f"<!-- /{name} -->")
        page = f"{before}<!-- {name} -->\n\n{table}\n\n<!-- /{name} -->{after}"
    path.write_text(page)


# Real processes -------------------------------------------------------------------------------------------------------


class Everyone(LoopMuon):
    """Every rank gathers and orthogonalizes everything."""

    def subtract(self, p: Tensor, update: Tensor, lr: float) -> None:
        """One step, the same on every rank."""
        p.add_(_laid_out_as(p, orthogonalize(_whole(update))), alpha=-lr)


#: Operators in torch's namespaces of collectives that are not collectives.
SEND_NOTHING = ("wait_tensor", "wrap_tensor", "barrier")


class Collectives(TorchDispatchMode):
    """Counts the collectives of this process, and the bytes that this rank receives from others in each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs and counts an operation."""
        name = str(func).removesuffix(".default")
        if name.startswith(("c10d.", "_c10d_functional.")) and not any(kind in name for kind in SEND_NOTHING):
            self.calls.append((name, self._received(name.partition(".")[2], args)))
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor takes its own collectives apart, and these come here
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _received(name: str, args: Sequence[Any]) -> float:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        if name == "alltoall_base_":
            output, splits = args[0], args[3]
            own = splits[rank] if splits else output.shape[0] // ranks
            return float(output.nbytes - own * output.nbytes / max(1, output.shape[0]))
        if name in ("_allgather_base_", "all_gather_into_tensor"):
            shard = args[1] if name.startswith("_") else args[0]
            return float(shard.nbytes * (ranks - 1))
        if name in ("allreduce_", "all_reduce"):
            tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            return sum(2 * t.nbytes * (ranks - 1) / ranks for t in tensors)
        raise ValueError(f"{name}: not known how many bytes it receives")


def _whole(matrix: Tensor) -> Tensor:
    return matrix.full_tensor() if isinstance(matrix, DTensor) else matrix


def _laid_out_as(template: Tensor, matrix: Tensor) -> Tensor:
    if not isinstance(template, DTensor):
        return matrix
    whole = DTensor.from_local(matrix, template.device_mesh, [Replicate()], run_check=False)
    return whole.redistribute(placements=template.placements)


def _parameters(strategy: str, shapes: Sequence[Shape], mesh: DeviceMesh) -> list[tuple[str, Parameter]]:
    """With gradients; the same on every rank, or sharded on the first dimension."""
    torch.manual_seed(0)
    named = []
    for i, shape in enumerate(shapes):
        weight, grad = torch.randn(shape) / shape[-1] ** 0.5, torch.randn(shape)
        if strategy == "FSDP2":
            weight, grad = (distribute_tensor(x, mesh, [Shard(0)]) for x in (weight, grad))
        param = Parameter(weight)
        param.grad = grad
        named.append((f"weight{i}", param))
    return named


def rank_main(rank: int, ranks: int, port: int, strategy: str, layers: int, rounds: int, results: Any) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    shapes = PARAMETER_SETS["gpt2_small"].layer * layers
    named = _parameters(strategy, shapes, init_device_mesh("cpu", (ranks,)))
    params = [param for _, param in named]
    optimizers: dict[str, Optimizer] = {
        "Muon": Muon(named, lr=LR),
        "everything everywhere": Everyone(params, LR),
        "AdamW": AdamW(params, lr=LR, foreach=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for i in range(rounds + 2):  # owners are assigned in the first step
        for name, optimizer in optimizers.items():
            dist.barrier()
            start = time.perf_counter()
            optimizer.step()
            dist.barrier()
            if i >= 2:
                seconds[name].append(time.perf_counter() - start)
    calls = {}
    for name, optimizer in optimizers.items():
        with Collectives() as collectives:
            optimizer.step()
        calls[name] = collectives.calls
    results.put((rank, calls, {name: statistics.median(own) for name, own in seconds.items()}))
    dist.barrier()
    dist.destroy_process_group()


def exchange(ranks: int, strategy: str, layers: int, rounds: int) -> dict[str, Any]:
    """Runs the processes; bytes are summed over all ranks."""
    import torch.multiprocessing as mp

    results = mp.get_context("spawn").SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(rank_main, (ranks, port, strategy, layers, rounds, results), nprocs=ranks)
    found = sorted(results.get() for _ in range(ranks))
    least = least_bytes(strategy, PARAMETER_SETS["gpt2_small"].layer * layers, ranks)
    case: dict[str, Any] = {"ranks": ranks, "strategy": strategy, "layers": layers, "least_bytes": least, "results": {}}
    print(f"\n{strategy}, {ranks} ranks, {layers} layers of gpt2_small; at least {least / 1e6:.2f} MB")
    for name, first in found[0][1].items():
        received = sum(nbytes for _, calls, _ in found for _, nbytes in calls[name])
        row = case["results"][name] = {
            "collectives": len(first),
            "kinds": sorted({call for call, _ in first}),
            "bytes": received,
            "bytes_over_least": received / least,
            "milliseconds": 1e3 * max(own[name] for _, _, own in found),
        }
        print(
            f"{name:24} {row['collectives']:4} collectives  {received / 1e6:9.2f} MB, {row['bytes_over_least']:6.3f} times"
            f" the least  {row['milliseconds']:9.1f} ms",
            flush=True,
        )
    return case


def _exchanges(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for ranks in given.ranks or (2, 4):
        for strategy in ("DDP", "FSDP2"):
            for layers in given.layers:
                yield exchange(ranks, strategy, layers, given.rounds)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exchange", action="store_true", help="real processes instead of simulated ones")
    parser.add_argument("--ranks", nargs="*", type=int)
    parser.add_argument("--layers", nargs="*", type=int, default=(1, 2), help="of the real processes' model")
    parser.add_argument("--rounds", type=int, default=5, help="of the real processes")
    parser.add_argument("--network", type=float, default=50.0, help="GB/s a rank, each way; assumed, not measured")
    parser.add_argument("--docs", action="store_true")
    given = parser.parse_args()
    if given.exchange:
        save("distributed_exchange", cases=list(_exchanges(given)))
        return
    cases = [simulate(*case, ranks, given.network) for case in CASES for ranks in given.ranks or RANKS]
    parts = tables(cases)
    print("\n\n".join(f"{name}\n\n{table}" for name, table in parts.items()))
    save("distributed_balance", network_gbytes_assumed=given.network, dtype=working_dtype(device()), cases=cases)
    if given.docs:
        parts["machine"] = _rates(given.network)
        draw(cases, given.network, DOCS / "distributed_balance.png")
        write_docs(parts)


if __name__ == "__main__":
    main()
