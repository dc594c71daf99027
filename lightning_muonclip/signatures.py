"""Constructors that build other objects and take the keywords of those objects as their own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

_Init = TypeVar("_Init", bound=Callable[..., None])


def takes_keywords_of(*classes: type, but: Collection[str] = ()) -> Callable[[_Init], _Init]:
    """Adds the keywords of the classes that a constructor builds to its signature, in place of ``**options``.

    Each option is declared only by the class that acts on it, but is still a flat keyword of the constructor for ``help``,
    Hydra and LightningCLI. The constructor receives all of them in ``options``, including defaults.

    Args:
        classes: The classes that the constructor builds (see :func:`share_out`).
        but: Keywords of these classes that the constructor passes itself.

    Example:
        >>> class Engine:
        ...     def __init__(self, power: int = 3) -> None: ...
        >>> class Car:
        ...     @takes_keywords_of(Engine)
        ...     def __init__(self, seats: int = 4, **options) -> None:
        ...         self.options = options
        >>> str(inspect.signature(Car)), Car().options
        ('(seats: int = 4, *, power: int = 3)', {'power': 3})
    """

    def decorate(init: _Init) -> _Init:
        *explicit, _options = inspect.signature(init, eval_str=True).parameters.values()
        parameters = {parameter.name: parameter for parameter in explicit}
        for cls in classes:
            for name, parameter in inspect.signature(cls, eval_str=True).parameters.items():
                if name not in but:
                    parameters.setdefault(name, parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        signature = inspect.Signature(list(parameters.values()))

        @functools.wraps(init)
        def complete(*args: Any, **kwargs: Any) -> None:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            init(*bound.args, **bound.kwargs)

        complete.__signature__ = signature  # type: ignore[attr-defined]
        return complete  # type: ignore[return-value]

    return decorate


def share_out(options: Mapping[str, Any], *classes: type) -> list[dict[str, Any]]:
    """The options that each class's constructor takes."""
    taken = [inspect.signature(cls).parameters for cls in classes]
    return [{name: value for name, value in options.items() if name in parameters} for parameters in taken]
