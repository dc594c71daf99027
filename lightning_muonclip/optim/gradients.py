"""The gradient of a parameter, as an optimizer needs it."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def gradient(param: Tensor) -> Tensor:
    """A parameter's gradient, sharded as the parameter is.

    Raises:
        ValueError: If it is sparse.
    """
    grad = param.grad
    assert grad is not None
    if grad.is_sparse:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} has a sparse gradient; make it dense (sparse=False)"
        )
    if isinstance(param, DTensor) and isinstance(grad, DTensor) and grad.placements != param.placements:
        # such as the share of one rank in the gradient of a weight that all have: Partial, under tensor parallelism
        return grad.redistribute(placements=param.placements)
    return grad
