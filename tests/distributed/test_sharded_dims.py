"""Heads on several dimensions of one parameter that is sharded over two real processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from oracles import brute_max_logits
from processes import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from lightning_muonclip import AttentionSpec, Projection, QKClip
from lightning_muonclip.parallel.shards import local_box, to_local

HEADS, WIDTH, DIM = 3, 5, 4
MAXIMA, THRESHOLD = [[2.0, 0.5, 7.0]], 9.0

#: Shapes and layouts; along most of their dimensions no rank holds whole heads.
SPECS = {
    "heads first": ((HEADS, WIDTH, 3 * DIM), Projection("weight", "(H [q:d, k:d, *:d])", dim=(0, 2), offset=1.0)),
    "parts first": ((WIDTH, 3, HEADS * DIM), Projection("weight", "[q(H d) | k(H d) | *]", dim=(1, 2))),
    "heads last": ((DIM, WIDTH, 3, HEADS), Projection("weight", "[q(H d) | k(H d) | *]", dim=(2, 3, 0))),
}


class Holder(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(shape))


def clipped(module: nn.Module, projection: Projection) -> tuple[Tensor, list[list[int]], int]:
    """This rank's shard after a clip, where it lies, and the number of collectives."""
    spec = AttentionSpec((projection,), HEADS, sizes={"d": DIM})
    with QKClip(module, 1.0, 0.3, specs={"": spec}, logits="off") as qk_clip, CommDebugMode() as comm:
        qk_clip.step(MAXIMA)
    box = [[side.start, side.stop] for side in local_box(module.weight)]
    return to_local(module.weight).detach().clone(), box, comm.get_total_counts()


def every_sharding() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for name, (shape, projection) in SPECS.items():
        for dim in range(len(shape)):
            module = Holder(shape)
            module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Shard(dim)]))
            found[name, f"dimension {dim}"] = clipped(module, projection)
        module = Holder(shape)
        fully_shard(module, mesh=mesh)
        found[name, "fully_shard"] = clipped(module, projection)
    return found


def test_a_clip_of_shards_along_any_dimension_is_exact_and_local() -> None:
    for rank in on_ranks(2, every_sharding):
        assert len(rank) == sum(len(shape) + 1 for shape, _ in SPECS.values())
        for (name, sharding), (part, box, collectives) in rank.items():
            shape, projection = SPECS[name]
            module = Holder(shape)
            before = module.weight.detach().clone()
            whole, _, _ = clipped(module, projection)
            assert not torch.equal(whole, before)
            assert torch.equal(part, whole[tuple(slice(*side) for side in box)]), (name, sharding)
            assert part.numel() < whole.numel() and collectives == 1


class Parallel(nn.Module):
    """Tensor parallel attention, whose weights (heads, width, channels) are sharded along their heads."""

    def __init__(self, heads: int, groups: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = (nn.Parameter(torch.randn(n, WIDTH, DIM)) for n in (heads, groups, groups))

    def parts(self, x: Tensor) -> list[Tensor]:
        return [torch.einsum("bld,hdc->bhlc", x, to_local(w)) for w in (self.query, self.key, self.value)]

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.parts(x), enable_gqa=True)


def inputs() -> Tensor:
    return torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1))


def observed(is_parallel: bool) -> list[Tensor]:
    """Maxima before and after a clip, and the weights that it leaves, whole."""
    module = Parallel(8, 4)
    if is_parallel:
        mesh = init_device_mesh("cpu", (2,))
        for name, param in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(distribute_tensor(param.detach(), mesh, [Shard(0)])))
    projections = Projection("query", "q(H d)", dim=(0, 2)), Projection("key", "k(G d)", dim=(0, 2))
    spec = AttentionSpec(projections, 8, 4, {"d": DIM})
    x = inputs()
    with QKClip(module, THRESHOLD, specs={"": spec}) as qk_clip:
        module(x)
        before = qk_clip.step().max_logits
        module(x)
        after = qk_clip.step().max_logits
    weights = [w.full_tensor() if isinstance(w, DTensor) else w for w in (module.query, module.key)]
    return [before, after, *(w.detach().clone() for w in weights)]


def test_every_rank_knows_which_heads_are_its_own() -> None:
    query, key, _ = Parallel(8, 4).parts(inputs())
    expected = brute_max_logits(query.detach(), key.detach(), DIM**-0.5)
    assert 0 < int((expected > THRESHOLD).sum()) < 8
    alone = observed(is_parallel=False)
    for found in (alone, *on_ranks(2, observed, True)):
        torch.testing.assert_close(found[0][0].double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[1][0].double(), expected.clamp(max=THRESHOLD), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found, alone)
