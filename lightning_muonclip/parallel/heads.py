"""Which heads of an attention are on this rank: under tensor parallelism a rank has some of them only."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate


def split_heads(x: Tensor, width: int) -> Tensor:
    """``(batch, length, heads * width)`` as ``(batch, heads, length, width)``, for as many heads as there are.

    Raises:
        ValueError: If that cuts a head.
    """
    if x.shape[-1] % width:
        raise ValueError(
            f"{x.shape[-1]} channels are no whole number of heads of {width}: the size of tensor parallelism must divide"
            " the number of heads and of key heads"
        )
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def first_head(weight: Tensor | None, dim: int, heads: int, local: int) -> int | None:
    """Index of the first of this rank's ``local`` heads, or ``None`` if it cannot have so many.

    Args:
        weight: What makes the queries of all heads.
        dim: The dimension of the weight that the heads lie on.
        heads: How many there are.
        local: How many this rank has computed.
    """
    found = _parallel_dim(weight, dim, heads, local)
    return None if found is None else found[0].get_local_rank(found[1]) * local


def for_own_heads(x: Tensor, weight: Tensor, heads: int, local: int) -> Tensor:
    """``x``, which all heads use, for those of this rank: its gradient is summed over the ranks that have the others."""
    # A DTensor sums by itself.
    found = None if local == heads or isinstance(x, DTensor) else _parallel_dim(weight, 0, heads, local)
    if found is None:
        return x
    mesh, parallel = found
    placements = [Partial() if i == parallel else Replicate() for i in range(mesh.ndim)]
    whole = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.to_local(grad_placements=placements)


def _parallel_dim(weight: Tensor | None, dim: int, heads: int, local: int) -> tuple[DeviceMesh, int] | None:
    """The mesh dimension over which so many heads are shared out: the innermost, since FSDP2 comes before it."""
    if isinstance(weight, DTensor):
        mesh = weight.device_mesh
        for i in reversed(range(mesh.ndim)):
            if weight.placements[i].is_shard(dim % weight.ndim) and mesh.size(i) * local == heads:
                return mesh, i
    return None
