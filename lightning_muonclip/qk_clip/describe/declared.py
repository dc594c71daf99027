"""Attention that the user describes: by specs for module names, and by functions for classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lightning_muonclip.qk_clip.describe.names import qualified_name, qualified_names
from lightning_muonclip.qk_clip.describe.spec import AttentionSpec

#: Attention modules of a model by display name, in ``named_modules`` order, each with its spec.
AttentionModules = dict[str, tuple[nn.Module, AttentionSpec]]

#: The user's word by module name; ``None`` leaves a module and all inside it alone.
Specs = Mapping[str, AttentionSpec | None]

#: Takes a module and returns its spec.
SpecFn = Callable[[Any], AttentionSpec]

_REGISTERED: dict[str, SpecFn] = {}


def register_attention(cls: type[nn.Module] | str, spec_fn: SpecFn) -> None:
    """Registers a class of attention modules and its subclasses.

    Args:
        cls: The class, or its qualified name (``"package.module.Class"``).
        spec_fn: Takes a module of that class and returns its :class:`AttentionSpec`.
    """
    _REGISTERED[cls if isinstance(cls, str) else qualified_name(cls)] = spec_fn


def declared_attention(model: nn.Module, specs: Specs | None = None) -> AttentionModules:
    """The attention modules that the user describes, in ``named_modules`` order; a shared module once.

    Args:
        model: The model.
        specs: Specs by module name; they go before registered classes.

    Raises:
        ValueError: If a name in ``specs`` is not a module.
    """
    specs = by_display_name(specs)
    modules = named_modules(model)
    for name in specs:
        if name not in modules:
            raise ValueError(f"specs names {name!r}, but the model has no such module; see model.named_modules()")
    found: AttentionModules = {}
    for name, module in modules.items():
        if name in specs:
            spec = specs[name]
        elif any(is_inside(name, other) for other, own in specs.items() if own is None):
            continue
        else:
            spec = _registered(module)
        if spec is not None:
            found[name] = (module, spec)
    return found


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by display name, each once; without what wraps it."""
    return {display_name(name): module for name, module in unwrapped(model).named_modules()}


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model by display name."""
    return {display_name(name): param for name, param in unwrapped(model).named_parameters()}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel."""
    from torch.nn.parallel import DistributedDataParallel

    return model.module if isinstance(model, DistributedDataParallel) else model


def display_name(name: str) -> str:
    """A module's name without the prefixes of torch.compile."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def by_display_name(specs: Specs | None) -> dict[str, AttentionSpec | None]:
    """The user's specs, under the names that modules are shown with."""
    return {display_name(name): spec for name, spec in (specs or {}).items()}


def is_inside(inner: str, outer: str) -> bool:
    """Whether a module is another one or a part of it, by their names."""
    return outer in ("", inner) or inner.startswith(f"{outer}.")


def _registered(module: nn.Module) -> AttentionSpec | None:
    for name in qualified_names(type(module)):
        if name in _REGISTERED:
            return _REGISTERED[name](module)
    return None
