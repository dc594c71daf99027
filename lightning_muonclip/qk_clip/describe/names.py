"""Identifies classes by qualified name, so that no library has to be imported to be recognized."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Any

#: Linear layers whose weight has shape (in, out), with output channels on dimension 1.
TRANSPOSED_LINEARS = ("transformers.pytorch_utils.Conv1D",)


def qualified_name(cls: Any) -> str:
    """The name of a class, including its module."""
    return f"{cls.__module__}.{cls.__qualname__}"


def qualified_names(cls: type) -> list[str]:
    """The qualified names of a class and its bases, in method resolution order."""
    return [qualified_name(base) for base in cls.__mro__]


def stores_inputs_first(module: Any) -> bool:
    """Whether the matrices of a module are (in, out), as its class says. Hugging Face's experts have an attribute."""
    has_experts = {"is_transposed", "is_concatenated"} <= vars(module).keys()
    return (has_experts and bool(module.is_transposed)) or not set(TRANSPOSED_LINEARS).isdisjoint(
        qualified_names(type(module))  # fully_shard makes a subclass
    )


def library(cls: type) -> str:
    """The top package of a class and its version, such as ``"transformers 5.24.0"``."""
    package = cls.__module__.partition(".")[0]
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:  # a script, or a package distributed under another name
        return f"{package} {getattr(sys.modules.get(package), '__version__', '')}".strip()
