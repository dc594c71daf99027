"""Attention whose queries and keys lie on several ranks, as torch's ``context_parallel`` makes it of kernel calls.

A rank has some queries, and meets all keys that they see block by block. Every block is one call of a kernel, whose
arguments and log-sum-exp tell its logits; the largest of all blocks and ranks is the largest logit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_muonclip.kernels.log_sum_exp import SDPA, SDPA_KERNELS, bounds_of_logits, of_queries
from lightning_muonclip.kernels.measure import Logits
from lightning_muonclip.values import has_values


class ContextParallelError(Exception):
    """The logits of attention that is split over ranks cannot be measured. Not among what a trial forward may raise."""


def is_context_parallel() -> bool:
    """Whether torch's ``context_parallel`` has put its own function in the place of ``scaled_dot_product_attention``."""
    function = F.scaled_dot_product_attention
    module = None if function is SDPA else getattr(function, "__module__", None)
    return (module or "").startswith("torch.distributed.tensor.experimental")


def is_split(query: Tensor) -> bool:
    """Whether queries are shards of a longer sequence."""
    return isinstance(query, DTensor) and any(
        isinstance(placement, Shard) and placement.dim == query.ndim - 2 for placement in query.placements
    )


@contextmanager
def without_context_parallel() -> Iterator[None]:
    """Lets every rank attend to its own keys for a while: which weights make which head shows there too."""
    function: Any = F.scaled_dot_product_attention
    if not is_context_parallel():
        yield
        return
    F.scaled_dot_product_attention = SDPA
    try:
        yield
    finally:
        F.scaled_dot_product_attention = function


@torch.compiler.disable(reason="the calls of kernels in it cannot be seen in a graph")  # type: ignore[untyped-decorator]
def attention_with_blocks(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> tuple[Tensor, list[Logits]]:
    """Attention by a function, and the logits of every kernel call that it makes on this rank.

    Args:
        function: Attends.
        args: Its arguments, passed on as they are.
        kwargs: Its arguments, passed on as they are.

    Raises:
        ContextParallelError: If it calls no kernel that tells its logits.
    """
    with _Blocks() as seen:
        output = function(*args, **kwargs)
    if not seen.blocks:
        raise ContextParallelError(
            "attention is split over ranks (context_parallel), and no kernel that returns its log-sum-exp computes it, so"
            " that its largest logits cannot be measured. Let it use a fused kernel (torch.nn.attention.sdpa_kernel: flash,"
            " efficient or cuDNN), or leave such modules alone with specs={name: None}"
        )
    return output, seen.blocks


class _Blocks(TorchDispatchMode):
    """Sees the kernels that attend to local tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[Logits] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(own, DTensor) for own in types):
            return NotImplemented  # first the tensors are taken apart
        out = func(*args, **kwargs)
        if func.name().partition(".")[0] in SDPA_KERNELS and has_values(out[1]):
            given = {**dict(zip((argument.name for argument in func._schema.arguments), args)), **kwargs}
            query, key, mask = given["query"], given["key"], given.get("attn_bias", given.get("attn_mask"))
            bounds = bounds_of_logits(of_queries(out[1], query), mask)
            self.blocks.append(Logits(query, key, bounds, given.get("scale"), given.get("is_causal", False), mask=mask))
        return out
