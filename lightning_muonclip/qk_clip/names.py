"""Classes by name, so that no library has to be imported to be recognised."""

from __future__ import annotations

from typing import Any

#: Linear layers whose weight is (in, out): output channels lie on dimension 1.
TRANSPOSED_LINEARS = ("transformers.pytorch_utils.Conv1D",)


def qualified_name(cls: Any) -> str:
    """The name of a class with its module."""
    return f"{cls.__module__}.{cls.__qualname__}"


def qualified_names(cls: type) -> list[str]:
    """Those of a class and its bases, in the order in which Python looks things up."""
    return [qualified_name(base) for base in cls.__mro__]
