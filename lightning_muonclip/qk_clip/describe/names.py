"""Identifies classes by qualified name, so that no library has to be imported to be recognized."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch

#: Linear layers whose weight has shape (in, out), with output channels on dimension 1.
TRANSPOSED_LINEARS = ("transformers.pytorch_utils.Conv1D",)


def qualified_name(cls: Any) -> str:
    """The name of a class, including its module."""
    return f"{cls.__module__}.{cls.__qualname__}"


def qualified_names(cls: type) -> list[str]:
    """The qualified names of a class and its bases, in method resolution order."""
    return [qualified_name(base) for base in cls.__mro__]


def library(cls: type) -> str:
    """The top package of a class and its version, such as ``"transformers 5.24.0"``."""
    package = cls.__module__.partition(".")[0]
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:  # a script, or a package distributed under another name
        return f"{package} {getattr(sys.modules.get(package), '__version__', '')}".strip()


class ChangedClassError(RuntimeError):
    """A class of another library is not built as this library knows it.

    Args:
        cls: The class.
        what: What is expected in it.
        error: What reading it raised.
    """

    def __init__(self, cls: type, what: str, error: Exception) -> None:
        super().__init__(
            f"QK-Clip cannot read {cls.__name__} of {library(cls)}: expected {what}, got {type(error).__name__}: {error}."
            " Install a release that QK-Clip is tested with (see the README), or skip the module with specs={name: None}"
        )


@contextmanager
def reading(cls: type, what: str) -> Iterator[None]:
    """Turns an error caused by a changed class of another library into an explanation.

    Args:
        cls: The class.
        what: What is expected in it.

    Raises:
        ChangedClassError: With the class, its library and version, what was expected, and the original error.
    """
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ChangedClassError(cls, what, error) from error
