"""FlexAttention's functions, which are only fast when they are compiled: each once for all modules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

#: Most graphs of a function in a process: one for every shape, kind of mask and of score_mod. Torch's own limit of 8 is less
#: than a model with two windows needs.
GRAPHS = 256


def fast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a part of the graph that is being traced, or else compiled."""
    return function if torch.compiler.is_compiling() else compiled(function)


@functools.cache
def compiled(function: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """The function compiled.

    Not dynamic: numbers that a score_mod refers to would become symbols, which it cannot hold. And not beyond the limit:
    FlexAttention would go on without its kernel, many times slower.

    Raises:
        torch._dynamo.exc.FailOnRecompileLimitHit: On a call that needs more graphs than :data:`GRAPHS`.
    """
    from torch._dynamo import config

    whole = torch.compile(function, dynamic=False, fullgraph=True, backend=backend)
    limited: Callable[..., Any] = config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=GRAPHS)(whole)
    return limited
