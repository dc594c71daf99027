"""The log-sum-exp of every query, which attention's kernels return for their backward: a free bound on its largest logit.

``max(s) <= log(sum(exp(s))) <= max(s) + log(n)`` for n visible keys. The call that the user makes is the one that tells: its
kernel, output and gradients are those of a call that nobody watches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_muonclip.kernels.hidden import HIDDEN
from lightning_muonclip.values import is_exporting

#: Kernels of scaled_dot_product_attention. Their second output is the log-sum-exp, of shape (batch, heads, L or more).
SDPA_KERNELS = {
    f"aten::_scaled_dot_product_{kind}"
    for kind in (
        "flash_attention",
        "flash_attention_for_cpu",
        "efficient_attention",
        "cudnn_attention",
        "fused_attention_overrideable",
    )
}

#: Torch's own function, whoever has replaced it in :mod:`torch.nn.functional`.
SDPA: Callable[..., Tensor] = torch._C._nn.scaled_dot_product_attention


class _Seen(TorchDispatchMode):
    """Keeps the log-sum-exp that a kernel of scaled_dot_product_attention returns."""

    def __init__(self) -> None:
        super().__init__()
        self.log_sum_exp: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.name().partition(".")[0] in SDPA_KERNELS:
            self.log_sum_exp = out[1]
        return out


def attention_with_log_sum_exp(
    function: Callable[..., Tensor], *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention by a function, and the log-sum-exp of every query.

    Args:
        function: :data:`SDPA`, or what stands in its place.
        args: Its arguments, passed on as they are.
        kwargs: Its arguments, passed on as they are.

    Returns:
        The output, and a float32 tensor of shape ``(batch, heads, L)`` without gradient, or ``None`` if the kernel does not
        return it, as the unfused one, and for any other function, which may attend with other queries and keys than it was
        given. It is undefined for a query that sees nothing.
    """
    if function is not SDPA or is_exporting():
        return function(*args, **kwargs), None
    return _seen(*args, **kwargs)


def _seen(query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    with _Seen() as seen:
        output = SDPA(query, *args, **kwargs)
    log_sum_exp = seen.log_sum_exp
    # The memory-efficient kernel returns none without a gradient; inside a transform of torch.func it has other dimensions.
    if log_sum_exp is None or not log_sum_exp.numel() or log_sum_exp.shape[:2] != query.shape[:2]:
        return output, None
    return output, of_queries(log_sum_exp, query)


def of_queries(log_sum_exp: Tensor, query: Tensor) -> Tensor:
    """What a kernel returns for its queries, of shape (batch, heads, L): it may pad them, or keep a last dimension of 1."""
    batch, heads, length = query.shape[:-1]
    return log_sum_exp.detach().float().reshape(batch, heads, -1)[..., :length]


torch.compiler.allow_in_graph(_seen)  # Dynamo cannot trace the mode; what traces the graph afterwards can


def as_multiplied(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Queries and keys in the dtype in which a kernel multiplies them: autocast converts its arguments."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x if x.dtype is torch.float64 else x.to(torch.get_autocast_dtype(device)) for x in tensors)


def bounds_of_logits(log_sum_exp: Tensor, mask: Tensor | None) -> Tensor | None:
    """Upper bounds on the largest logit of every query before the mask is added.

    Args:
        log_sum_exp: Shape ``(batch, heads, L)``.
        mask: As the kernel got it: ``None``, boolean, or additive, broadcastable to ``(batch, heads, L, S)``.

    Returns:
        Shape ``(batch, heads, L)``, ``-inf`` for queries that see nothing. ``None`` for an additive mask on a device whose
        values the host does not know: where it is negative, the bound may be far above every logit.
    """
    if mask is None:
        return log_sum_exp
    if mask.dtype is torch.bool:
        return log_sum_exp.masked_fill(~mask.any(-1), float("-inf"))
    if log_sum_exp.device.type != "cpu":
        return None
    hidden = mask <= HIDDEN
    least = mask.float().masked_fill(hidden, float("inf")).amin(-1)
    return log_sum_exp - least
