"""The names of parameters: a wrapper, a tie or a parametrization gives one parameter several."""

from __future__ import annotations

import re

from torch import nn
from torch.nn.parameter import Parameter

#: Attributes under which wrappers keep the module that they wrap: torch.compile, DDP and AveragedModel, FSDP, activation
#: checkpointing, Opacus, Fabric, PEFT.
_WRAPPERS = re.compile(
    r"(^|\.)(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_module|_forward_module|_original_module"
    r"|base_model\.model|base_layer)(?=\.)"
)
_PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.(\w+)\.original\d*$")


def bare_name(name: str) -> str:
    """The name that a parameter has in its model before this is wrapped.

    Example:
        >>> bare_name("module._orig_mod.head.parametrizations.weight.original0")
        'head.weight'
    """
    return _WRAPPERS.sub("", _PARAMETRIZED.sub(r"\1\2", name)).removeprefix(".")


def all_names(module: nn.Module) -> dict[Parameter, list[str]]:
    """Every name of every parameter, in the order of ``named_parameters``; the first is the one used there.

    Tied parameters have a name for each use, and the parameters of wrapped modules their bare names too.
    """
    names: dict[Parameter, list[str]] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        known = names.setdefault(param, [])
        known += [own for own in dict.fromkeys((name, bare_name(name))) if own not in known]
    return names
