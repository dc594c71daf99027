"""The queries, keys and values among the arguments of an attention function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

#: Takes the arguments of a function; returns queries and keys, and values if it can, as (batch, heads, length, channels).
Operands = Callable[..., Sequence[Tensor]]

_NAMES = (("q", "query", "queries"), ("k", "key", "keys"), ("v", "value", "values"))


def operands_of(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    heads: int,
    tell: Callable[[Any, Any], Tensor],
    example: tuple[Any, Any],
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    """Queries, keys and values with the dimensions (..., heads, length, channels), and other tensors with a gradient.

    Args:
        function: The function.
        args: Its arguments.
        kwargs: The same by name.
        heads: How many heads it tells the maxima of.
        tell: Calls it and returns its maxima.
        example: Arguments like these, with which it can be called.

    Raises:
        ValueError: If they are not found, or none of their dimensions counts the heads.
    """
    query, key, value = _found(function, args, kwargs)
    dims = [dim for dim in range(min(1, query.ndim - 3), query.ndim - 1) if query.shape[dim] == heads]
    if not dims or query.ndim != key.ndim:
        raise ValueError(
            f"its reader tells of {heads} heads, but its queries are {tuple(query.shape)} and its keys {tuple(key.shape)};"
            " correct the reader, or tell by operands= which arguments are queries and keys"
        )
    dim = dims[0]
    if len(dims) > 1:
        asked, _, _ = _found(function, *example)
        dim = next((dim for dim in dims if _counts_heads(dim, asked, example, tell)), dims[-1])
    if value is not None and (value.ndim != key.ndim or value.shape[dim] != key.shape[dim]):
        value = None
    own = [x for x in (query, key, value) if x is not None]
    rest = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad and not _is_in(x, own)]
    return query.movedim(dim, -3), key.movedim(dim, -3), None if value is None else value.movedim(dim, -3), rest


def _found(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """By name, or the first floating-point tensors of three dimensions and more."""
    given = dict(_named(function, args, kwargs))
    tensors = {name: x for name, x in given.items() if isinstance(x, Tensor) and x.ndim > 2 and x.is_floating_point()}
    named = [next((tensors.pop(name) for name in names if name in tensors), None) for names in _NAMES]
    rest = iter(tensors.values())
    query, key, value = (next(rest, None) if x is None else x for x in named)
    if query is None or key is None:
        shapes = {name: tuple(x.shape) for name, x in given.items() if isinstance(x, Tensor)}
        raise ValueError(
            f"no queries and keys are found among its arguments, whose tensors are {shapes}; tell by operands= what they"
            " are"
        )
    return query, key, value


def _named(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Arguments in the order of the function's parameters."""
    try:
        bound = inspect.signature(function).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # a builtin
        yield from ((str(number), x) for number, x in enumerate(args))
        yield from kwargs.items()
        return
    for name, x in bound.items():
        if isinstance(x, tuple):
            yield from ((f"{name}.{number}", own) for number, own in enumerate(x))
        elif isinstance(x, dict):
            yield from x.items()
        else:
            yield name, x


def _is_in(x: Tensor, tensors: Sequence[Tensor]) -> bool:
    return any(x is own for own in tensors)


@torch.no_grad()
def _counts_heads(dim: int, query: Tensor, example: tuple[Any, Any], tell: Callable[[Any, Any], Tensor]) -> bool:
    """Whether the last index of a dimension is the last head: the maxima of no other change with its queries.

    If it is a position or a sample, huge queries of one sign or the other exceed the logits of all others.
    """

    def others(factor: float) -> Tensor:
        changed = query.clone()
        changed.select(dim, -1).mul_(factor)
        return tell(*tree_map(lambda x: changed if x is query else x, example))[:-1]

    return all(torch.equal(others(1), others(factor)) for factor in (100, -100))
