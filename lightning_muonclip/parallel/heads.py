"""Which attention heads are on this rank under tensor parallelism."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate


def split_heads(x: Tensor, width: int) -> Tensor:
    """Reshapes ``(batch, length, heads * width)`` to ``(batch, heads, length, width)``, for any number of heads.

    Raises:
        ValueError: If the channels are not a multiple of ``width``.
    """
    if x.shape[-1] % width:
        raise ValueError(
            f"this rank has a fraction of a head: {x.shape[-1]} channels for heads of {width}; choose a tensor-parallel size"
            " that divides the number of heads and of key heads"
        )
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def first_head(weight: Tensor | None, dims: tuple[int, ...], heads: int, local: int) -> int | None:
    """Index of this rank's first head, or ``None`` if no mesh dimension splits ``heads`` into ``local`` per rank.

    Args:
        weight: The weight that computes the queries of all heads.
        dims: The dimensions of the weight along which the heads lie.
        heads: Number of heads on all ranks.
        local: Number of heads on this rank.
    """
    found = _parallel_dim(weight, dims, heads, local)
    return None if found is None else found[0].get_local_rank(found[1]) * local


def for_own_heads(x: Tensor, weight: Tensor, heads: int, local: int) -> Tensor:
    """``x``, used by all heads, for the heads of this rank: its gradient is summed over the tensor-parallel ranks."""
    # A DTensor sums its gradient itself.
    found = None if local == heads or isinstance(x, DTensor) else _parallel_dim(weight, (0,), heads, local)
    if found is None:
        return x
    mesh, parallel = found
    placements = [Partial() if i == parallel else Replicate() for i in range(mesh.ndim)]
    whole = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.to_local(grad_placements=placements)


def _parallel_dim(
    weight: Tensor | None, dims: tuple[int, ...], heads: int, local: int
) -> tuple[DeviceMesh, int] | None:
    """The mesh dimension that splits ``heads`` into ``local`` per rank: the innermost, since FSDP2 comes before it."""
    if isinstance(weight, DTensor):
        mesh = weight.device_mesh
        for i in reversed(range(mesh.ndim)):
            is_split = any(weight.placements[i].is_shard(dim % weight.ndim) for dim in dims)
            if is_split and mesh.size(i) * local == heads:
                return mesh, i
    return None
