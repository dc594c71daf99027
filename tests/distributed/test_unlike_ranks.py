"""Ranks that do not train alike are refused at the first step, on all ranks; equal training never is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracles import SdpaAttention
from processes import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_muonclip import Muon, MuonClip

LR = 0.05


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6, bias=False))


def batch(seed: int, step: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(16, 6, generator=torch.Generator().manual_seed(100 * seed + step))


def matrices(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.ndim == 2]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, steps: int = 3) -> list[Tensor]:
    for step in range(steps):
        optimizer.zero_grad()
        model(batch(seed, step)).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def fixed(*grads: Tensor | None, dtype: torch.dtype = torch.float32, **options: Any) -> Muon:
    """Steps weights that are equal on all ranks once along these gradients."""
    torch.manual_seed(0)
    shapes = [(8, 6) if grad is None else grad.shape for grad in grads]
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for p, grad in zip(params, grads):
        p.grad = None if grad is None else grad.to(dtype)
    optimizer = Muon(params, LR, dtype=torch.float32, **options)
    optimizer.step()
    return optimizer


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or (8, 6), generator=torch.Generator().manual_seed(seed))


def own_data(rank: int) -> None:
    model = network()
    train(model, Muon(matrices(model), LR), seed=rank)


def own_data_in_float64(rank: int) -> None:
    model = network().double()
    model(batch(rank).double()).square().mean().backward()
    Muon(matrices(model), LR).step()


def own_data_with_muonclip(rank: int) -> None:
    torch.manual_seed(0)
    model = SdpaAttention(16, 2)
    optimizer = MuonClip(model, lr=LR)
    model(torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(rank))).square().mean().backward()
    optimizer.step()


def zeros_first(rank: int) -> None:
    """The first step shows nothing: an output layer that starts at zero, or a step of a checkpoint's template."""
    optimizer = fixed(torch.zeros(8, 6), torch.zeros(4, 4))
    for p in optimizer.param_groups[0]["params"]:
        p.grad = noise(rank, *p.shape)
    optimizer.step()


def unsynchronized_replicas(rank: int) -> None:
    """Hybrid shards whose replicas do not average."""
    weight = nn.Parameter(distribute_tensor(noise(0), init_device_mesh("cpu", (2, 1)), [Replicate(), Shard(0)]))
    weight.grad = DTensor.from_local(noise(rank), weight.device_mesh, weight.placements)
    Muon([weight], LR).step()


def sides_of_a_gan(rank: int) -> None:
    model = nn.Linear(6, 8) if rank == 0 else nn.Linear(6, 1)
    train(model, Muon(matrices(model), LR), seed=0)


def one_side_without_matrices(rank: int) -> None:
    model = nn.Linear(6, 8) if rank == 0 else nn.BatchNorm1d(6)
    train(model, MuonClip(model, LR), seed=0)


def more_dtypes_on_one_rank(rank: int) -> None:
    params = [nn.Parameter(noise(0)), nn.Parameter(noise(1).bfloat16())][: 2 - rank]
    for p in params:
        p.grad = torch.ones_like(p)
    Muon(params, LR).step()


def redundancy(rank: int, shapes: list[tuple[int, int]]) -> None:
    params = [nn.Parameter(noise(i, *shape)) for i, shape in enumerate(shapes)]
    for p in params:
        p.grad = torch.ones_like(p)
    ZeroRedundancyOptimizer(params, optimizer_class=Muon, lr=LR).step()


#: What ranks do that do not train alike, and what the refusal says.
UNLIKE: dict[str, tuple[Callable[[int], Any], str]] = {
    "own data": (own_data, "different gradients"),
    "own data in float64": (own_data_in_float64, "different gradients"),
    "own data with MuonClip": (own_data_with_muonclip, "different gradients"),
    "opposite gradients": (lambda rank: fixed(noise(0) * (-1) ** rank), "different gradients"),
    "the same rows in another order": (lambda rank: fixed(noise(0).roll(rank, 0)), "different gradients"),
    "one matrix of many": (lambda rank: fixed(*(noise(i, 4, 4) for i in range(20)), noise(rank)), "1 of 21 matrices"),
    "small gradients": (lambda rank: fixed(1e-30 * noise(rank)), "different gradients"),
    "gradients in half precision": (lambda rank: fixed(noise(rank), dtype=torch.bfloat16), "different gradients"),
    "a NaN on one rank": (lambda rank: fixed(noise(0) * (1 if rank else torch.nan)), "different gradients"),
    "experts": (lambda rank: experts(noise(rank, 3, 4, 5)), "different gradients"),
    "zeros first": (zeros_first, "different gradients"),
    "sharded momentum": (lambda rank: fixed(noise(rank), shard_momentum=True), "different gradients"),
    "unsynchronized replicas": (unsynchronized_replicas, "different gradients"),
    "sweep over lr": (lambda rank: trial(lr=0.1 * (1 + rank)), "different settings of Muon: rank"),
    "sweep over a tensor lr": (lambda rank: trial(lr=torch.tensor(0.1 * (1 + rank))), "lr"),
    "sweep over weight decay": (lambda rank: trial(weight_decay=0.1 * rank), "weight_decay"),
    "sweep over momentum": (lambda rank: trial(momentum=0.9 + 0.05 * rank), "momentum"),
    "sweep over schedules": (lambda rank: trial(ns_coefficients=("jordan", "polar_express")[rank]), "ns_coefficients"),
    "CPUs of different kinds": (lambda rank: trial(dtype=("bfloat16", "float32")[rank]), "pass one, such as dtype="),
    "sweep over AdamW": (lambda rank: other_betas((0.9, 0.95 + 0.01 * rank)), "betas"),
    "sweep after a warm-up": (lambda rank: warm_up(0.1 * (1 + rank)), "initial_lr"),
    "sides of a GAN": (sides_of_a_gan, "different matrices"),
    "one side without matrices": (one_side_without_matrices, "different matrices"),
    "one optimizer for both sides": (lambda rank: fixed(*[noise(0), None][:: 1 - 2 * rank]), "for different matrices"),
    "one rank without any gradient": (lambda rank: fixed(noise(0) if rank else None), "for different matrices"),
    "more dtypes on one rank": (more_dtypes_on_one_rank, "different matrices"),
    "ZeroRedundancyOptimizer": (lambda rank: redundancy(rank, [(6, 4), (4, 6), (5, 5)]), "different matrices"),
    "ZeroRedundancyOptimizer for one weight": (lambda rank: redundancy(rank, [(6, 4)]), "different matrices"),
}


def experts(grad: Tensor) -> None:
    p = nn.Parameter(noise(0, *grad.shape))
    p.grad = grad
    Muon([{"params": [p], "kind": "experts"}], LR).step()


def trial(**options: Any) -> None:
    model = network()
    train(model, Muon(matrices(model), **options), seed=0)


def other_betas(betas: tuple[float, float]) -> None:
    model = network()
    optimizer = MuonClip(model, LR)
    for group in optimizer.param_groups:
        if group["algorithm"] == "adamw":
            group["betas"] = betas
    train(model, optimizer, seed=0)


def warm_up(lr: float) -> None:
    model = network()
    optimizer = Muon(matrices(model), lr)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    train(model, optimizer, seed=0)


def refusals() -> dict[str, str]:
    return {name: refusal(run) for name, (run, _) in UNLIKE.items()}


def refusal(run: Callable[[int], Any]) -> str:
    try:
        run(dist.get_rank())
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.fixture(scope="module")
def refused() -> list[dict[str, str]]:
    return on_ranks(2, refusals)


@pytest.mark.parametrize("name", UNLIKE)
def test_unlike_ranks_are_refused_on_both_with_the_way_out(name: str, refused: list[dict[str, str]]) -> None:
    for rank in refused:
        assert UNLIKE[name][1] in rank[name]
        assert ("dtype='float32'" if "CPUs" in name else "process_group of the ranks") in rank[name]


def hybrid(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))


def in_parts(rank: int) -> None:
    """Each rank has its share of the gradient of a weight that both hold, as under tensor parallelism."""
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(noise(0), mesh, [Replicate()]))
    weight.grad = DTensor.from_local(noise(rank), mesh, [Partial()])
    Muon([weight], LR).step()


def rounded(rank: int, dtype: torch.dtype) -> None:
    """Gradients that ranks have computed in a different order."""
    error = torch.finfo(dtype).eps * noise(1 + rank, 64, 48)
    fixed(noise(0, 64, 48) * (1 + error), noise(0, 3, 2) * (1 + error[:3, :2]), dtype=dtype)


def averaged(wrap: Callable[[nn.Module], nn.Module], dtype: torch.dtype = torch.float32) -> None:
    model = wrap(network().to(dtype))
    for step in range(2):
        model(batch(dist.get_rank(), step).to(dtype)).square().mean().backward()
        if step == 0:
            optimizer = Muon(matrices(model), LR)
        optimizer.step()


#: Equal training.
ALIKE: dict[str, Callable[[int], Any]] = {
    "DDP": lambda rank: averaged(DistributedDataParallel),
    "DDP in bfloat16": lambda rank: averaged(DistributedDataParallel, torch.bfloat16),
    "FSDP2": lambda rank: averaged(fully_shard),
    "HSDP": lambda rank: averaged(hybrid),
    "HSDP in bfloat16": lambda rank: averaged(hybrid, torch.bfloat16),
    "partial gradients": in_parts,
    "rounded to float32": lambda rank: rounded(rank, torch.float32),
    "rounded to bfloat16": lambda rank: rounded(rank, torch.bfloat16),
    "rounded to float16": lambda rank: rounded(rank, torch.float16),
    "zeros": lambda rank: fixed(torch.zeros(8, 6), torch.zeros(3, 3)),
    "NaN on all ranks": lambda rank: fixed(torch.full((8, 6), torch.nan), noise(0, 3, 3)),
    "no gradient at all": lambda rank: fixed(None, None),
}


def way_out(seed: int, zero: bool = False) -> list[Tensor]:
    alone = dist.new_subgroups(1)[0]
    model = network()
    options = {"lr": LR, "dtype": torch.float32}
    if not zero:
        return train(model, Muon(matrices(model), process_group=alone, **options), seed)
    adapted = partial(Muon, process_group=alone)
    return train(model, ZeroRedundancyOptimizer(matrices(model), optimizer_class=adapted, **options), seed)


def accepted() -> dict[str, Any]:
    rank = dist.get_rank()
    return {
        "refusals": {name: refusal(run) for name, run in ALIKE.items()},
        "own group": way_out(seed=rank),
        "ZeroRedundancyOptimizer": way_out(seed=0, zero=True),
    }


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return on_ranks(2, accepted)


@pytest.mark.parametrize("name", ALIKE)
def test_equal_training_is_not_refused(name: str, results: list[dict[str, Any]]) -> None:
    assert [rank["refusals"][name] for rank in results] == ["no error"] * 2


@pytest.mark.parametrize("name", ["own group", "ZeroRedundancyOptimizer"])
def test_with_a_process_group_each_rank_trains_as_one_process_does(name: str, results: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(results):
        model = network()
        alone = train(model, Muon(matrices(model), LR, dtype=torch.float32), seed=rank if name == "own group" else 0)
        for weight, expected in zip(found[name], alone, strict=True):
            torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)


def reductions_of_late_steps(rank_count: int) -> list[int]:
    """How many all-reduces each step takes, where one matrix never gets a gradient."""
    torch.manual_seed(0)
    used, idle = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6, 4, dtype=torch.bfloat16))
    optimizer = Muon([used, idle], lr=1e-2)
    counts = []
    all_reduce = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[-1] += 1
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counted
    try:
        for _ in range(12):
            counts.append(0)
            used.grad = torch.ones_like(used)
            optimizer.step()
    finally:
        dist.all_reduce = all_reduce
    return counts


def test_ranks_do_not_wait_for_ever_for_a_gradient_to_compare() -> None:
    for counts in on_ranks(2, reductions_of_late_steps, 2):
        assert counts[0] > 0 and counts[8:] == [0, 0, 0, 0]
