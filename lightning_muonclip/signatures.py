"""Classes whose constructors take the keywords of the objects that they build."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

_Class = TypeVar("_Class", bound=type)


def takes_keywords_of(*classes: type, but: Collection[str] = ()) -> Callable[[_Class], _Class]:
    """Gives a class whose constructor ends in ``**options`` the keywords of the classes that it builds.

    An option is then declared and documented only by the class that uses it, but remains a plain keyword for ``help``, Hydra
    and LightningCLI. The constructor receives all of them in ``options``, defaults included, and they replace ``**options``
    in the docstring.

    Args:
        classes: The classes that the constructor builds (see :func:`share_out`).
        but: Keywords of these classes that the constructor provides itself.

    Raises:
        TypeError: If two of the classes declare the same keyword.

    Example:
        >>> class Engine:
        ...     def __init__(self, power: int = 3) -> None: ...
        >>> @takes_keywords_of(Engine)
        ... class Car:
        ...     def __init__(self, seats: int = 4, **options) -> None:
        ...         self.options = options
        >>> str(inspect.signature(Car)), Car().options
        ('(seats: int = 4, *, power: int = 3)', {'power': 3})
    """

    def decorate(cls: _Class) -> _Class:
        init = cls.__init__  # type: ignore[misc]
        *explicit, _options = inspect.signature(init, eval_str=True).parameters.values()
        parameters = {parameter.name: parameter for parameter in explicit}
        own = {*parameters, *but}
        texts: dict[str, str] = {}
        for built in classes:
            for name, parameter in inspect.signature(built, eval_str=True).parameters.items():
                if name not in own:
                    if name in parameters:
                        raise TypeError(f"{cls.__name__} would pass {name} to two classes; declare it there")
                    parameters[name] = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
                    texts[name] = _documented(built).get(name, "")
        signature = inspect.Signature(list(parameters.values()))

        @functools.wraps(init)
        def complete(*args: Any, **kwargs: Any) -> None:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{cls.__name__}(): {error}{_nearest(kwargs, parameters)}") from None
            bound.apply_defaults()
            init(*bound.args, **bound.kwargs)

        complete.__signature__ = signature  # type: ignore[attr-defined]
        cls.__init__ = complete  # type: ignore[misc]
        entries = "\n".join(f"        {name}: {text}" for name, text in texts.items())
        if cls.__doc__:
            cls.__doc__ = re.sub(r"^ +\*\*options: .*(\n {9,}.*)*", lambda _: entries, cls.__doc__, flags=re.MULTILINE)
        return cls

    return decorate


def share_out(options: Mapping[str, Any], *classes: type) -> list[dict[str, Any]]:
    """For each class, the options that its constructor takes."""
    taken = [inspect.signature(cls).parameters for cls in classes]
    return [{name: value for name, value in options.items() if name in parameters} for parameters in taken]


def _documented(cls: type) -> dict[str, str]:
    """The entries under "Args:" in the docstring of a class, each on one line."""
    section = (inspect.getdoc(cls) or "").partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _nearest(given: Collection[str], known: Collection[str]) -> str:
    """Suggests a known keyword for the first unknown one."""
    for name in given:
        if name not in known and (match := difflib.get_close_matches(name, known, n=1)):
            return f"; did you mean {match[0]!r}?"
    return ""
