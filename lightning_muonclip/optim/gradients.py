"""Reads gradients in the form that an optimizer needs."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def gradient(param: Tensor) -> Tensor:
    """The gradient of a parameter, with the placements of the parameter.

    Raises:
        ValueError: If the gradient is sparse.
    """
    grad = param.grad
    assert grad is not None
    if grad.is_sparse:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} has a sparse gradient, which is not supported; set sparse=False in"
            " its embedding"
        )
    if isinstance(param, DTensor) and isinstance(grad, DTensor) and grad.placements != param.placements:
        # For example Partial, for a replicated weight under tensor parallelism.
        return grad.redistribute(placements=param.placements)
    return grad
