"""Compiles the functions of FlexAttention, each once for all modules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

#: Recompile limit per function: every shape, kind of mask and score_mod needs a graph. A model with two windows already
#: exceeds torch's default of 8.
GRAPHS = 256


def fast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself while a graph is being traced, else its compiled form."""
    return function if torch.compiler.is_compiling() else compiled(function)


@functools.cache
def compiled(function: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """The compiled function.

    Without dynamic shapes, since a score_mod cannot hold the symbols that its numbers would become. Past the recompile limit
    it fails, since FlexAttention would silently fall back to running without its kernel, many times slower.

    Raises:
        torch._dynamo.exc.FailOnRecompileLimitHit: On a call that needs more graphs than :data:`GRAPHS`.
    """
    from torch._dynamo import config

    whole = torch.compile(function, dynamic=False, fullgraph=True, backend=backend)
    limited: Callable[..., Any] = config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=GRAPHS)(whole)
    return limited
