"""Imports of packages that only some configurations need."""

from __future__ import annotations

import importlib
from types import ModuleType


def optional(module: str, purpose: str, extra: str = "hf", package: str | None = None) -> ModuleType:
    """Imports a module of an optional package.

    Args:
        module: The module.
        purpose: What needs it, for the error.
        extra: The extra of this package that installs it.
        package: The name of its package, if it is not that of the module.

    Raises:
        ImportError: If it cannot be imported, with what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module
        raise ImportError(
            f"{purpose} needs the package {package}, which cannot be imported ({error}): "
            f"pip install {package}, or pip install 'lightning-muonclip[{extra}]'"
        ) from error
