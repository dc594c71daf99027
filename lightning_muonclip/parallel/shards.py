"""Which part of a sharded tensor each rank holds: always a box, since shards are chunks of chunks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

#: One slice per dimension.
Box = tuple[slice, ...]


def whole_box(shape: Sequence[int]) -> Box:
    """The box of a whole tensor."""
    return tuple(slice(0, size) for size in shape)


def boxes_of(tensor: Tensor) -> list[Box]:
    """The box of each rank of a tensor's mesh, in the order of ``device_mesh.mesh.flatten()``; one box for a plain tensor.

    Derived from the placements, which :func:`local_box` checks.
    """
    if not isinstance(tensor, DTensor):
        return [whole_box(tensor.shape)]
    mesh = tensor.device_mesh
    coordinates = product(*(range(size) for size in mesh.shape))
    return [_box(tensor.shape, mesh.shape, tensor.placements, coordinate) for coordinate in coordinates]


def local_box(tensor: Tensor) -> Box:
    """The box that this rank holds.

    Raises:
        ValueError: If the sharding is not supported.
    """
    if not isinstance(tensor, DTensor):
        return whole_box(tensor.shape)
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:  # this rank is outside the mesh
        return tuple(slice(0, 0) for _ in tensor.shape)
    box = _box(tensor.shape, tensor.device_mesh.shape, tensor.placements, coordinate)
    if extent(box) != tuple(tensor.to_local().shape):
        raise ValueError(
            f"unsupported sharding: a tensor of shape {tuple(tensor.shape)} with placements {tensor.placements} should have"
            f" a shard of shape {extent(box)} on this rank, but has {tuple(tensor.to_local().shape)}; shard it with"
            " fully_shard or parallelize_module"
        )
    return box


def extent(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(side.stop - side.start for side in box)


def to_local(tensor: Tensor) -> Tensor:
    """The local shard, sharing memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_part(values: Tensor, tensor: Tensor) -> Tensor:
    """The part of values that broadcast against a whole tensor which broadcasts against the local shard.

    Raises:
        ValueError: If the sharding is not supported.
    """
    sides = zip(local_box(tensor), values.shape)
    return values[tuple(slice(None) if size == 1 else side for side, size in sides)]


def sharded_dims(tensor: Tensor) -> set[int]:
    """The dimensions along which a tensor is sharded."""
    if not isinstance(tensor, DTensor):
        return set()
    dims = [_dim(placement) for placement in tensor.placements]
    return {dim % tensor.ndim for dim in dims if dim is not None}


def _box(
    shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[Placement], coordinate: Sequence[int]
) -> Box:
    box = list(whole_box(shape))
    # FSDP2 shards what tensor parallelism has sharded already, but comes first in the mesh. If both shard one dimension,
    # torch uses a strided placement, whose split_factor is the number of earlier shards.
    order = sorted(range(len(placements)), key=lambda i: hasattr(placements[i], "split_factor"))
    for i in order:
        dim = _dim(placements[i])
        if dim is not None:
            box[dim] = _chunk(box[dim], mesh_shape[i], coordinate[i])
    return tuple(box)


def _dim(placement: Placement) -> int | None:
    """The sharded dimension; Replicate and Partial have none."""
    return getattr(placement, "dim", None)


def _chunk(side: slice, count: int, index: int) -> slice:
    """One of ``count`` chunks, as ``torch.chunk`` cuts them: of equal size, then a smaller one, then empty ones."""
    size = -(-(side.stop - side.start) // count)
    start = min(side.start + index * size, side.stop)
    return slice(start, min(start + size, side.stop))


def on_all_ranks(model: nn.Module, is_so: bool) -> bool:
    """Whether something holds on all ranks that share the model's weights, which must run the same forwards."""
    mesh = next((param.device_mesh for param in model.parameters() if isinstance(param, DTensor)), None)
    if mesh is None:
        return is_so
    flag = torch.tensor(float(is_so), device=mesh.device_type)
    for group in mesh.get_all_groups():
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=group)
    return bool(flag)
