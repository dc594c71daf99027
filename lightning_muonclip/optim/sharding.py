"""Newton-Schulz needs whole matrices: gather a sharded one, give each rank its shard of the result back."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def gather_matrix(matrix: Tensor) -> Tensor:
    """The whole matrix, on every rank, of a DTensor; a plain tensor is whole already."""
    return matrix.full_tensor() if isinstance(matrix, DTensor) else matrix


def shard_like(matrix: Tensor, template: Tensor) -> Tensor:
    """Lays a whole matrix, equal on every rank, out as ``template`` is; without communication."""
    if not isinstance(template, DTensor):
        return matrix
    mesh = template.device_mesh
    whole = DTensor.from_local(matrix, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=template.placements)
