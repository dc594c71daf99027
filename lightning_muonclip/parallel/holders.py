"""Which ranks hold a weight, or parts of it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lightning_muonclip.parallel.shards import Box, boxes_of

_T = TypeVar("_T")


def has_others(group: dist.ProcessGroup | None = None) -> bool:
    """Whether a group has other ranks; ``None`` is the default group."""
    return dist.is_initialized() and dist.get_world_size(group) != 1


def share_key(weight: Tensor, group: dist.ProcessGroup | None) -> Hashable | None:
    """A key that is equal for weights that can be exchanged together; ``None`` if only this rank holds the weight.

    Args:
        weight: A parameter.
        group: The ranks that replicate plain tensors.
    """
    if isinstance(weight, DTensor):
        return None if weight.device_mesh.size() == 1 else (weight.device_mesh, weight.dtype, weight.device)
    return (group, weight.dtype, weight.device) if has_others(group) else None


def group_of(weight: Tensor, group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The process group of all ranks that hold a weight or a part of it.

    If theirs has no backend for a weight on the CPU, as NCCL's has none for what FSDP2 offloads, it is a new one of gloo.
    """
    ranks = _group_of_mesh(weight.device_mesh) if isinstance(weight, DTensor) else group or _default_group()
    if weight.device.type != "cpu" or "cpu:" in dist.get_backend_config(ranks):
        return ranks
    return _new_group(dist.get_process_group_ranks(ranks), backend="gloo")


def _group_of_mesh(mesh: DeviceMesh) -> dist.ProcessGroup:
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return _default_group()
    return _new_group(mesh.mesh.flatten().tolist())


def _new_group(ranks: list[int], backend: str | None = None) -> dist.ProcessGroup:
    return dist.new_group(ranks, backend=backend, use_local_synchronization=True)


def _default_group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def boxes_by_rank(weight: Tensor, group: dist.ProcessGroup) -> list[Box]:
    """The box that each rank of the group holds."""
    boxes = boxes_of(weight)
    if not isinstance(weight, DTensor):
        return boxes * dist.get_world_size(group)
    return _in_group_order(weight.device_mesh, boxes, group)


def replicas_by_rank(weight: Tensor, group: dist.ProcessGroup) -> list[Hashable]:
    """The replica that each rank of the group belongs to."""
    if not isinstance(weight, DTensor):
        return list(range(dist.get_world_size(group)))
    mesh = weight.device_mesh
    kept = [i for i, placement in enumerate(weight.placements) if placement.is_replicate()]
    coordinates = torch.cartesian_prod(*(torch.arange(size) for size in mesh.shape)).view(-1, mesh.ndim)
    return _in_group_order(mesh, [tuple(own) for own in coordinates[:, kept].tolist()], group)


def _in_group_order(mesh: DeviceMesh, values: Sequence[_T], group: dist.ProcessGroup) -> list[_T]:
    ranks = [dist.get_group_rank(group, rank) for rank in mesh.mesh.flatten().tolist()]
    return [value for _, value in sorted(zip(ranks, values), key=lambda pair: pair[0])]
