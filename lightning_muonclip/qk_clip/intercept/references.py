"""Where a function is held, and what stands in its place there."""

from __future__ import annotations

import importlib
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from difflib import get_close_matches
from typing import Any

from torch import nn

#: Who holds a function, and under which name: a file, a class, a module, a table, or the cell of a closure.
Holder = tuple[Any, str]

#: What a class has under a name that it inherits.
_INHERITED = object()


class References:
    """The places in which one function has been replaced by another."""

    def __init__(self, original: Callable[..., Any], patched: Callable[..., Any]) -> None:
        self._original, self._patched = original, patched
        self._replaced: list[tuple[Callable[[], Any], str, Any]] = []

    def replace_in_holders(self, holders: list[Holder]) -> None:
        """Replaces it in some places, and under every name that an imported file has for it."""
        for holder, name in [*holders, *self._in_files(self._original), *self._in_table()]:
            self._replace(holder, name)

    def replace_in(self, module: nn.Module) -> None:
        """Replaces it where a module holds it."""
        for holder, name in [*self._in_module(module), *self._in_table()]:
            self._replace(holder, name)

    def restore(self) -> None:
        """Puts it back wherever it still is replaced, and where its replacement was imported from."""
        for ref, name, before in self._replaced:
            holder = ref()
            if holder is not None and _is(_read(holder, name), self._patched):
                _write(holder, name, before)
        self._replaced.clear()
        for holder, name in self._in_files(self._patched):
            _write(holder, name, self._original)

    def _replace(self, holder: Any, name: str) -> None:
        if not _is(_read(holder, name), self._original):
            return
        before, patched = self._original, self._patched
        if isinstance(holder, type):
            before = vars(holder).get(name, _INHERITED)
            if not inspect.isfunction(inspect.getattr_static(holder, name)):
                patched = staticmethod(patched)  # as the original, it is not given the object
        self._replaced.append((_weak(holder), name, before))
        _write(holder, name, patched)

    def _in_files(self, function: Callable[..., Any]) -> Iterator[Holder]:
        for file in list(sys.modules.values()):
            for name, value in list(vars(file).items()) if hasattr(file, "__dict__") else ():
                if _is(value, function):
                    yield file, name

    def _in_table(self) -> Iterator[Holder]:
        """In Hugging Face's table of attention functions."""
        table = getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", None)
        if isinstance(table, MutableMapping):
            yield from ((table, name) for name in list(table))

    def _in_module(self, module: nn.Module) -> Iterator[Holder]:
        yield from ((module, name) for name in list(vars(module)))
        for base in type(module).__mro__:
            for name, value in list(vars(base).items()):
                function = getattr(value, "__func__", value)  # of a static method
                if _is(function, self._original):
                    yield base, name
                elif inspect.isfunction(function):
                    yield from ((cell, "cell_contents") for cell in inspect.unwrap(function).__closure__ or ())


def holders_of(function: Callable[..., Any]) -> list[Holder]:
    """The class of a method; nothing for other functions, which are found by what they are."""
    owner = getattr(function, "__self__", None)
    path = getattr(function, "__qualname__", "").split(".")
    if owner is None and len(path) > 1:
        owner = sys.modules.get(getattr(function, "__module__", None) or "")
        for name in path[:-1]:
            owner = getattr(owner, name, None)
    return [(owner, path[-1])] if isinstance(owner, type) else []


def resolve(path: str) -> tuple[Any, list[Holder]]:
    """The function of a dotted path, and who holds it.

    Raises:
        ValueError: If there is none.
    """
    names = path.split(".")
    holder, count = _imported(names)
    for number, name in enumerate(names[count:], count):
        if not hasattr(holder, name):
            close = get_close_matches(name, dir(holder), 1)
            hint = f"; did you mean {close[0]!r}?" if close else "; see dir() of it"
            raise ValueError(f"there is no {path!r}: {'.'.join(names[:number])} has no {name!r}{hint}")
        owner, holder = holder, getattr(holder, name)
    return _read(owner, names[-1]), [(owner, names[-1])]


def _imported(names: list[str]) -> tuple[Any, int]:
    """The file that begins a dotted path, and how many names it has."""
    for count in range(len(names) - 1, 0, -1):
        name = ".".join(names[:count])
        try:
            return importlib.import_module(name), count
        except ModuleNotFoundError as error:
            if not (error.name and f"{name}.".startswith(f"{error.name}.")):
                raise  # it is there, but what it imports is not
    raise ValueError(
        f"there is no {'.'.join(names)!r}: no module {names[0]!r} can be imported; give 'package.module.function'"
    )


def _is(value: Any, function: Callable[..., Any]) -> bool:
    """Whether it is the function; a bound method is another object each time."""
    return value is function or (type(value) is type(function) and bool(value == function))


def _read(holder: Any, name: str) -> Any:
    try:
        return holder[name] if isinstance(holder, MutableMapping) else getattr(holder, name)
    except (AttributeError, LookupError, ValueError):  # such as an empty cell
        return None


def _write(holder: Any, name: str, value: Any) -> None:
    if isinstance(holder, MutableMapping):
        holder[name] = value
    elif value is _INHERITED:
        delattr(holder, name)
    else:
        setattr(holder, name, value)


def _weak(holder: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(holder)
    except TypeError:  # a cell
        return lambda: holder
