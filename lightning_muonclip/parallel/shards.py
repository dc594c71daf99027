"""Which part of a sharded tensor every rank holds: always a box, since it is a chunk of a chunk."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

#: Of every dimension the first index and the one after the last.
Box = tuple[slice, ...]


def whole_box(shape: Sequence[int]) -> Box:
    """All of a tensor."""
    return tuple(slice(0, size) for size in shape)


def boxes_of(tensor: Tensor) -> list[Box]:
    """What every rank of a tensor's mesh holds, in the order of ``device_mesh.mesh.flatten()``; one box if it is plain.

    It goes by the placements; :func:`local_box` checks them.
    """
    if not isinstance(tensor, DTensor):
        return [whole_box(tensor.shape)]
    mesh = tensor.device_mesh
    coordinates = product(*(range(size) for size in mesh.shape))
    return [_box(tensor.shape, mesh.shape, tensor.placements, coordinate) for coordinate in coordinates]


def local_box(tensor: Tensor) -> Box:
    """What this rank holds.

    Raises:
        ValueError: If the tensor is sharded in a way that is not known here.
    """
    if not isinstance(tensor, DTensor):
        return whole_box(tensor.shape)
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:  # a rank outside of the mesh
        return tuple(slice(0, 0) for _ in tensor.shape)
    box = _box(tensor.shape, tensor.device_mesh.shape, tensor.placements, coordinate)
    if extent(box) != tuple(tensor.to_local().shape):
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} and placements {tensor.placements} should have a part of shape"
            f" {extent(box)} on this rank, but has {tuple(tensor.to_local().shape)}; shard it by fully_shard or"
            " parallelize_module"
        )
    return box


def extent(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(side.stop - side.start for side in box)


def to_local(tensor: Tensor) -> Tensor:
    """What this rank holds, sharing memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_dims(tensor: Tensor) -> set[int]:
    """Dimensions of a tensor of which a rank may hold only a part."""
    if not isinstance(tensor, DTensor):
        return set()
    dims = [_dim(placement) for placement in tensor.placements]
    return {dim % tensor.ndim for dim in dims if dim is not None}


def _box(
    shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[Placement], coordinate: Sequence[int]
) -> Box:
    box = list(whole_box(shape))
    # FSDP2 shards what tensor parallelism has sharded already, but comes first in the mesh. If both shard one dimension,
    # torch says so by another kind of placement, which knows into how many shards the dimension had been cut before.
    order = sorted(range(len(placements)), key=lambda i: hasattr(placements[i], "split_factor"))
    for i in order:
        dim = _dim(placements[i])
        if dim is not None:
            box[dim] = _chunk(box[dim], mesh_shape[i], coordinate[i])
    return tuple(box)


def _dim(placement: Placement) -> int | None:
    """The dimension that is sharded; Replicate and Partial have none."""
    return getattr(placement, "dim", None)


def _chunk(side: slice, count: int, index: int) -> slice:
    """One of so many parts, as ``torch.chunk`` cuts them: all of one size but the last, and maybe empty ones after it."""
    size = -(-(side.stop - side.start) // count)
    start = min(side.start + index * size, side.stop)
    return slice(start, min(start + size, side.stop))
