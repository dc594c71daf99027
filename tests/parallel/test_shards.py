"""Boxes of sharded tensors against torch.chunk; tests/distributed covers real shardings."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard

from lightning_muonclip.parallel.shards import _box, extent, local_box, sharded_dims, to_local, whole_box

PLACEMENTS = st.sampled_from([Shard(0), Shard(1), Replicate()])


def by_chunks(tensor: torch.Tensor, placements: list[Any], mesh: tuple[int, ...], coordinate: tuple[int, ...]) -> Any:
    """One rank's chunk by torch.chunk."""
    for placement, size, i in zip(placements, mesh, coordinate):
        if placement.is_shard():
            chunks = tensor.chunk(size, placement.dim)
            tensor = chunks[i] if i < len(chunks) else tensor.narrow(placement.dim, 0, 0)
    return tensor


@settings(max_examples=200)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    mesh=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    data=st.data(),
)
def test_boxes_are_chunks_of_chunks(shape: tuple[int, int], mesh: list[int], data: st.DataObject) -> None:
    placements = [data.draw(PLACEMENTS) for _ in mesh]
    tensor = torch.arange(math.prod(shape)).view(shape)
    for coordinate in product(*map(range, mesh)):
        box = _box(shape, mesh, placements, coordinate)
        expected = by_chunks(tensor, placements, tuple(mesh), coordinate)
        assert torch.equal(tensor[box].flatten(), expected.flatten())
        assert math.prod(extent(box)) == expected.numel()


@given(rows=st.integers(1, 20), data=st.integers(1, 4), tensor=st.integers(2, 4))
def test_fsdp_shards_what_tensor_parallelism_has_sharded(rows: int, data: int, tensor: int) -> None:
    placements = [_StridedShard(0, split_factor=tensor), Shard(0)]
    for d, t in product(range(data), range(tensor)):
        expected = by_chunks(torch.arange(rows), [Shard(0), Shard(0)], (tensor, data), (t, d))
        [side] = _box((rows,), (data, tensor), placements, (d, t))
        assert torch.arange(rows)[side].tolist() == expected.tolist()


def test_a_plain_tensor_is_whole() -> None:
    tensor = torch.zeros(3, 4)
    assert local_box(tensor) == whole_box((3, 4)) == (slice(0, 3), slice(0, 4))
    assert to_local(tensor) is tensor
    assert sharded_dims(tensor) == set()
