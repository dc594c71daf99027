"""Total norm and clipping of gradients that are sharded over different meshes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@torch.no_grad()
def total_norm(tensors: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm of all tensors, as of one vector: a plain tensor, the same on every rank, without host synchronization.

    ``torch.nn.utils.get_total_norm`` needs all tensors on one mesh. With FSDP2 and tensor parallelism there are two.
    """
    norms = [torch.nn.utils.get_total_norm(own, norm_type) for own in _by_mesh(tensors).values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.nn.utils.get_total_norm(whole, norm_type)


def clip_grad_norm_(params: Iterable[Tensor], max_norm: float) -> None:
    """``torch.nn.utils.clip_grad_norm_`` for parameters on any meshes."""
    params = [p for p in params if p.grad is not None]
    norm = total_norm(p.grad for p in params if p.grad is not None)
    for own in _by_mesh(params).values():
        torch.nn.utils.clip_grads_with_norm_(own, max_norm, norm)


def _by_mesh(tensors: Iterable[Tensor]) -> dict[Any, list[Tensor]]:
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.device_mesh if isinstance(tensor, DTensor) else None].append(tensor)
    return groups
