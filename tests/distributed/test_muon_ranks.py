"""Muon in several real processes: every sharding of a matrix gives the result of one process."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_muonclip import Muon
from lightning_muonclip.parallel.exchange import ROUNDS
from lightning_muonclip.parallel.shards import local_box

STEPS = 3

#: Shapes of matrices, experts and convolutions; rows that four ranks share unevenly or not at all.
MATRICES = [(12, 6), (6, 12), (12, 6), (5, 9), (3, 8), (16, 16), (1, 4), (6, 12)]
EXPERTS = [(4, 6, 8), (6, 5, 3), (4, 5, 12)]
CONVOLUTIONS = [(8, 3, 2, 2)]
FUSED = (10, 7)


def weights() -> dict[str, list[Tensor]]:
    """Equal on every rank."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": MATRICES, "experts": EXPERTS, "convolution": CONVOLUTIONS, "fused": [FUSED]}
    return {kind: [torch.randn(shape, generator=generator) for shape in own] for kind, own in shapes.items()}


def gradients(step: int) -> list[Tensor]:
    """After the first step some matrices, experts and parts are idle, or idle but for a part that one rank holds."""
    generator = torch.Generator().manual_seed(1 + step)
    found = {kind: [torch.randn(w.shape, generator=generator) for w in own] for kind, own in weights().items()}
    if step:
        found["matrix"][0].zero_()
        found["matrix"][1][:-1] = 0
        found["matrix"][2][:, :-1] = 0
        found["experts"][0][1] = 0
        found["experts"][0][2, :, :-1] = 0
        found["experts"][1][3:] = 0
        found["experts"][2][1] = 0
        found["experts"][2][2, :, step - 1 :: 2] = 0
        found["convolution"][0][1:] = 0
        found["fused"][0][2 - step :: 2] = 0
    return [gradient for own in found.values() for gradient in own]


def make(params: dict[str, list[Any]], **options: Any) -> tuple[Muon, list[Any]]:
    groups = [
        {"params": own, "kind": "matrix" if kind == "fused" else kind, "lr": 0.02 * (1 + i), "momentum": 0.95 - 0.1 * i}
        for i, (kind, own) in enumerate(params.items())
    ]
    parts = {  # the last experts have gate and up in turns, and inputs first
        params["fused"][0]: (0, [range(0, 10, 2), range(1, 10, 2)]),
        params["experts"][-1]: (2, [range(0, 12, 2), range(1, 12, 2)]),
    }
    options = {"dtype": torch.float32, "adjust_lr_fn": "match_rms_adamw", **options}
    return Muon(groups, parts=parts, **options), [p for own in params.values() for p in own]


def expected(**options: Any) -> list[Tensor]:
    """By one process, without torch.distributed."""
    optimizer, params = make({kind: [nn.Parameter(w) for w in own] for kind, own in weights().items()}, **options)
    for step in range(STEPS):
        for p, gradient in zip(params, gradients(step)):
            p.grad = gradient
        optimizer.step()
    return [p.detach() for p in params]


class Collectives(TorchDispatchMode):
    """Counts collectives, and the bytes that this rank sends to others by all-to-all."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d"):
            self.calls[name] += 1
            if "alltoall_base" in name:
                self.bytes += args[1].numel() * args[1].itemsize
        return func(*args, **(kwargs or {}))


def set_gradients(params: list[Any], step: int) -> None:
    for p, gradient in zip(params, gradients(step)):
        gradient = gradient.to(p.dtype)
        if isinstance(p, DTensor):
            own = gradient[local_box(p)]
            p.grad = DTensor.from_local(own, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
        else:
            p.grad = gradient


def train(params: dict[str, list[Any]], **options: Any) -> tuple[list[Tensor], Collectives]:
    optimizer, flat = make(params, **options)
    for step in range(STEPS):
        set_gradients(flat, step)
        with Collectives() as last:
            optimizer.step()
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in flat], last


def sharded(mesh: DeviceMesh, placements: list[Any]) -> dict[str, list[nn.Parameter]]:
    return {
        kind: [nn.Parameter(distribute_tensor(w, mesh, placements)) for w in own] for kind, own in weights().items()
    }


def fully_sharded(mesh: DeviceMesh) -> dict[str, list[nn.Parameter]]:
    """Weights sharded by tensor parallelism, some by columns and some by rows, and then by FSDP2."""
    layers = nn.ModuleList()
    for w in weights()["matrix"] + weights()["fused"]:
        layers.append(nn.Linear(w.shape[1], w.shape[0], bias=False))
        layers[-1].weight.data.copy_(w)
    even = [i for i, layer in enumerate(layers) if layer.weight.shape[0] % 4 == 0 and layer.weight.shape[1] % 2 == 0]
    styles = {str(i): (ColwiseParallel(), RowwiseParallel())[k % 2] for k, i in enumerate(even)}
    parallelize_module(layers, mesh["tp"], styles)
    for layer in layers:
        fully_shard(layer, mesh=mesh["dp"])
    others = {
        kind: [nn.Parameter(distribute_tensor(w, mesh["dp"], [Shard(0)])) for w in weights()[kind]]
        for kind in ("experts", "convolution")
    }
    own = [layer.weight for layer in layers]
    return {"matrix": own[:-1], **others, "fused": own[-1:]}


LAYOUTS: dict[str, tuple[tuple[int, ...], list[Any]]] = {
    "rows": ((4,), [Shard(0)]),
    "columns": ((4,), [Shard(1)]),
    "replicas": ((4,), [Replicate()]),
    "replicas of rows": ((2, 2), [Replicate(), Shard(0)]),
    "rows of replicas": ((2, 2), [Shard(0), Replicate()]),
    "rows and columns": ((2, 2), [Shard(0), Shard(1)]),
    "rows of rows": ((2, 2), [Shard(0), Shard(0)]),
}


def plain() -> dict[str, list[Any]]:
    return {kind: [nn.Parameter(w) for w in own] for kind, own in weights().items()}


def every_layout() -> dict[str, Any]:
    results = {"ddp": train(plain()), "ddp, sharded momentum": train(plain(), shard_momentum=True)}
    for name, (shape, placements) in LAYOUTS.items():
        results[name] = train(sharded(init_device_mesh("cpu", shape), placements))
    turned = DeviceMesh("cpu", torch.tensor([[0, 2], [1, 3]]))
    results["ranks in another order"] = train(sharded(turned, [Shard(0), Shard(1)]))
    results["tensor parallel and FSDP2"] = train(
        fully_sharded(init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")))
    )
    return {name: (trained, dict(last.calls), last.bytes) for name, (trained, last) in results.items()}


def other_cases() -> dict[str, Any]:
    """The other cases that need real ranks."""
    return {
        "missing gradients": missing_gradients(),
        "gradients in parts": gradients_in_parts(),
        "disagreement": disagreement(),
        "other values": other_values(),
        "unknown sharding": unknown_sharding(),
        "late group": late_group(),
        "other gradients": other_gradients(),
        "checkpoint": checkpoint(),
        "options": every_option(),
        "layers": {layers: collectives_of(layers) for layers in (1, 8)},
        "large gradients": train_on_large_gradients(sharded(init_device_mesh("cpu", (2,)), [Shard(0)])),
    }


#: Those that a rank with a part of a matrix could get wrong.
OPTIONS: dict[str, Any] = {
    "second_moment": "rows",
    "cautious_weight_decay": True,
    "weight_decay": 0.5,
    "momentum_dtype": "bfloat16",
}


def every_option() -> dict[str, list[Tensor]]:
    mesh = init_device_mesh("cpu", (2,))
    half = {kind: [nn.Parameter(w.bfloat16()) for w in own] for kind, own in weights().items()}
    halves = {
        kind: [nn.Parameter(distribute_tensor(w.bfloat16(), mesh, [Shard(0)])) for w in own]
        for kind, own in weights().items()
    }
    made = {
        "ddp": train(plain(), **OPTIONS),
        "ddp, sharded momentum": train(plain(), shard_momentum=True, **OPTIONS),
        "rows": train(sharded(mesh, [Shard(0)]), **OPTIONS),
        "columns": train(sharded(mesh, [Shard(1)]), **OPTIONS),
        "ddp, bfloat16": train(half, dtype=torch.bfloat16, second_moment="rows"),
        "rows, bfloat16": train(halves, dtype=torch.bfloat16, second_moment="rows"),
    }
    return {name: trained for name, (trained, _) in made.items()}


def missing_gradients() -> list[Tensor]:
    optimizer, params = make(plain())
    for step in range(STEPS):
        for k, (p, gradient) in enumerate(zip(params, gradients(step))):
            p.grad = None if (k + step) % 3 == 0 else gradient
        optimizer.step()
    return [p.detach() for p in params]


def gradients_in_parts() -> list[Tensor]:
    """Every rank has its own share of the gradient of a weight that all hold."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = sharded(mesh, [Replicate()])
    optimizer, flat = make(params)
    for step in range(STEPS):
        for p, gradient in zip(flat, gradients(step)):
            share = gradient * (dist.get_rank() + 1) / sum(range(1, mesh.size() + 1))
            p.grad = DTensor.from_local(share, mesh, [Partial()])
        optimizer.step()
    return [p.full_tensor() for p in flat]


def train_on_large_gradients(params: dict[str, list[Any]]) -> list[Tensor]:
    """Larger than any number of the working dtype."""
    optimizer, flat = make(params, dtype=torch.float16)
    set_gradients(flat, 0)
    for p in flat:
        p.grad.mul_(1e6)
    optimizer.step()
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in flat]


def disagreement() -> str:
    return refusal(nn.Parameter(torch.zeros(4 + dist.get_rank(), 3)))


def other_values() -> str:
    return refusal(nn.Parameter(torch.full((4, 3), 1.0 + dist.get_rank())))


def unknown_sharding() -> str:
    """Rank 0 has more rows than torch would shard to it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    local = torch.zeros(3 if dist.get_rank() == 0 else 1, 3)
    return refusal(nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], shape=(4, 3), stride=(3, 1))))


def refusal(p: nn.Parameter) -> str:
    p.grad = torch.ones_like(p)
    try:
        Muon([p]).step()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "no error"


def other_gradients() -> str:
    params = [nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(5, 2))]
    own = params[dist.get_rank()]
    own.grad = torch.ones_like(own)
    try:
        Muon(params).step()
    except RuntimeError as error:
        return str(error)
    return "no error"


def late_group() -> str:
    optimizer, params = make(plain(), shard_momentum=True)
    set_gradients(params, 0)
    optimizer.step()
    try:
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, 3))]})
    except ValueError as error:
        return str(error)
    return "no error"


def checkpoint() -> dict[str, Any]:
    """Trains 2 steps with sharded momentum, and goes on from the state of rank 0 with momentum everywhere."""
    first, params = make(plain(), shard_momentum=True)
    for step in range(2):
        set_gradients(params, step)
        first.step()
    refused = [refusal_to_save(first)]
    kept = sum(bool(state) for state in first.state.values())
    first.consolidate_state_dict()
    box = [copy.deepcopy(first.state_dict()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    results = {}
    for shard_momentum in (True, False):
        copies = {kind: [nn.Parameter(p.detach().clone()) for p in own] for kind, own in grouped(params)}
        second, others = make(copies, shard_momentum=shard_momentum)
        second.load_state_dict(copy.deepcopy(box[0]))  # it keeps the tensors
        set_gradients(others, 2)
        second.step()
        results[shard_momentum] = [p.detach() for p in others]
    first.step()
    refused.append(refusal_to_save(first))
    return {"refused": refused, "kept": kept, "saved": box[0], "resumed": results}


def refusal_to_save(optimizer: Muon) -> str:
    try:
        optimizer.state_dict()
    except RuntimeError as error:
        return str(error)
    return "no error"


def grouped(params: list[Any]) -> list[tuple[str, list[Any]]]:
    remaining = iter(params)
    return [(kind, [next(remaining) for _ in own]) for kind, own in weights().items()]


def collectives_of(layers: int) -> dict[str, int]:
    params = [nn.Parameter(torch.ones(shape)) for _ in range(layers) for shape in MATRICES]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = Muon(params, dtype=torch.float32)
    optimizer.step()
    with Collectives() as calls:
        optimizer.step()
    return dict(calls.calls)


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return on_ranks(4, every_layout)


@pytest.fixture(scope="module")
def others() -> list[dict[str, Any]]:
    return on_ranks(2, other_cases)


#: Elements that must be sent to an owner and back, because each rank holds only a part.
PARTED = sum(w.numel() for kind, own in weights().items() for w in own if kind != "experts")
ALL = sum(w.numel() for own in weights().values() for w in own)


@pytest.mark.parametrize(
    "layout", ["ddp", "ddp, sharded momentum", *LAYOUTS, "ranks in another order", "tensor parallel and FSDP2"]
)
class TestEveryLayout:
    def test_is_what_one_process_computes(self, layout: str, results: list[dict[str, Any]]) -> None:
        for weight, whole in zip(results[0][layout][0], expected()):
            torch.testing.assert_close(weight, whole, atol=1e-6, rtol=1e-6)

    def test_ranks_agree_bitwise(self, layout: str, results: list[dict[str, Any]]) -> None:
        for other in results[1:]:
            assert all(map(torch.equal, results[0][layout][0], other[layout][0]))

    def test_a_step_only_exchanges(self, layout: str, results: list[dict[str, Any]]) -> None:
        for rank in results:
            calls = rank[layout][1]
            assert set(calls) == {"c10d.alltoall_base_.default"}
            legs = 1 if layout in ("ddp", "ddp, sharded momentum", "replicas") else 2
            meshes = 2 if layout == "tensor parallel and FSDP2" else 1
            assert 0 < calls["c10d.alltoall_base_.default"] <= ROUNDS * legs * meshes


def sent(layout: str, results: list[dict[str, Any]]) -> int:
    """Elements that all ranks together send in a step."""
    return sum(rank[layout][2] for rank in results) // 4


def test_ranks_receive_only_what_they_lack(results: list[dict[str, Any]]) -> None:
    assert sent("ddp", results) == sent("replicas", results) == 3 * ALL
    # The owner of a matrix lacks all rows but its own; the other ranks lack their rows of the result.
    own = sum(biggest_possible(w, 4) for kind, ws in weights().items() for w in ws if kind != "experts")
    assert 2 * (PARTED - own) <= sent("rows", results) <= 2 * PARTED


def biggest_possible(weight: Tensor, ranks: int) -> int:
    return -(-weight.shape[0] // ranks) * weight[0].numel()


def test_matrices_without_a_gradient_are_left_alone(others: list[dict[str, Any]]) -> None:
    optimizer, params = make(plain())
    for step in range(STEPS):
        for k, (p, gradient) in enumerate(zip(params, gradients(step))):
            p.grad = None if (k + step) % 3 == 0 else gradient
        optimizer.step()
    for rank in others:
        for weight, p in zip(rank["missing gradients"], params):
            torch.testing.assert_close(weight, p.detach(), atol=1e-6, rtol=1e-6)


def test_options_are_exact_on_every_rank(others: list[dict[str, Any]]) -> None:
    whole = expected(**OPTIONS)
    for layout, trained in others[0]["options"].items():
        assert all(map(torch.equal, trained, others[1]["options"][layout]))
        for weight, p in zip(trained, whole if "bfloat16" not in layout else ()):
            torch.testing.assert_close(weight, p, atol=1e-5, rtol=1e-5)


def test_gradients_may_be_larger_than_the_working_dtype_holds(others: list[dict[str, Any]]) -> None:
    for rank in others:
        for weight, whole in zip(rank["large gradients"], train_on_large_gradients(plain())):
            torch.testing.assert_close(weight, whole, atol=1e-4, rtol=0)


def test_gradients_that_are_sums_over_ranks(others: list[dict[str, Any]]) -> None:
    for rank in others:
        for weight, whole in zip(rank["gradients in parts"], expected()):
            torch.testing.assert_close(weight, whole, atol=1e-6, rtol=1e-6)


def test_ranks_with_different_matrices_are_refused(others: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(others):
        assert f"ranks have different matrices for Muon: rank {number} has" in rank["disagreement"]
        assert f"({4 + number}, 3)" in rank["disagreement"]


def test_ranks_with_different_weights_are_refused(others: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(others):
        assert "ranks have different weight values" in rank["other values"]
        assert f"on rank {number} " in rank["other values"]


def test_ranks_with_different_gradients_are_refused(others: list[dict[str, Any]]) -> None:
    for rank, absent in zip(others, ["(5, 2)", "(4, 3)"]):
        assert "has 1 of 2 and lacks those of shapes" in rank["other gradients"]
        assert f"of shapes {absent}" in rank["other gradients"]


def test_unsupported_sharding_is_refused_on_all_ranks(others: list[dict[str, Any]]) -> None:
    for rank in others:
        assert "unsupported sharding" in rank["unknown sharding"]


class TestShardedMomentum:
    def test_late_groups_are_refused(self, others: list[dict[str, Any]]) -> None:
        assert all("before the first step" in rank["late group"] for rank in others)

    def test_every_rank_keeps_its_own(self, others: list[dict[str, Any]]) -> None:
        kept = [rank["checkpoint"]["kept"] for rank in others]
        assert sum(kept) == sum(map(len, weights().values())) and min(kept) > 0

    def test_state_has_to_be_consolidated_after_every_step(self, others: list[dict[str, Any]]) -> None:
        for rank in others:
            assert all("consolidate_state_dict()" in refused for refused in rank["checkpoint"]["refused"])

    def test_saved_state_is_that_of_one_process(self, others: list[dict[str, Any]]) -> None:
        optimizer, params = make(plain())
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
        saved, whole = others[0]["checkpoint"]["saved"], optimizer.state_dict()
        assert saved["param_groups"] == whole["param_groups"]
        assert list(saved["state"]) == list(whole["state"])
        for own, other in zip(saved["state"].values(), whole["state"].values()):
            assert torch.equal(own["momentum_buffer"], other["momentum_buffer"])

    @pytest.mark.parametrize("shard_momentum", [True, False])
    def test_resumes_from_the_consolidated_state(self, shard_momentum: bool, others: list[dict[str, Any]]) -> None:
        for rank in others:
            for weight, whole in zip(rank["checkpoint"]["resumed"][shard_momentum], expected()):
                torch.testing.assert_close(weight, whole, atol=1e-6, rtol=1e-6)


def test_collectives_do_not_grow_with_the_model(others: list[dict[str, Any]]) -> None:
    for rank in others:
        assert rank["layers"][1] == rank["layers"][8] == {"c10d.alltoall_base_.default": ROUNDS}
