"""Functions that are patched where their callers look them up, as long as somebody needs it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from lightning_muonclip.qk_clip.intercept.listener import running

#: Takes the original function and returns the patched one.
Patch = Callable[[Any], Any]

#: Where a function is patched: the holder, the name of the function there, and the patch.
Place = tuple[Any, str, Patch]


class Patches:
    """The functions that one observed module needs patched. A function that several need is patched once."""

    def __init__(self) -> None:
        self._keys: list[tuple[int, str]] = []

    def add(self, places: Iterable[Place]) -> bool:
        """Patches functions; returns whether some of them were not patched already."""
        before = len(self._keys)
        for holder, name, patch in places:
            key = (id(holder), name)
            if key not in self._keys:
                self._keys.append(key)
                _acquire(key, holder, name, patch)
        return len(self._keys) > before

    def remove(self) -> None:
        """Restores the originals, unless another module still needs the patch."""
        for key in self._keys:
            _release(key)
        self._keys = []


class _Patched:
    def __init__(self, holder: Any, name: str, patch: Patch) -> None:
        self.holder, self.name = holder, name
        self.original = _get(holder, name)
        self.patched = patch(self.original)
        self.users = 0
        _set(holder, name, self.patched)

    def restore(self) -> None:
        if _get(self.holder, self.name) is self.patched:  # otherwise another library has patched it since
            _set(self.holder, self.name, self.original)


_patched: dict[tuple[int, str], _Patched] = {}


def _acquire(key: tuple[int, str], holder: Any, name: str, patch: Patch) -> None:
    if key not in _patched:
        _patched[key] = _Patched(holder, name, patch)
    _patched[key].users += 1


def _release(key: tuple[int, str]) -> None:
    _patched[key].users -= 1
    if not _patched[key].users:
        _patched.pop(key).restore()
    if not _patched:
        running.clear()


def _get(holder: Any, name: str) -> Any:
    return holder[name] if isinstance(holder, dict) else inspect.getattr_static(holder, name)


def _set(holder: Any, name: str, value: Any) -> None:
    if isinstance(holder, dict):
        holder[name] = value
    else:
        setattr(holder, name, value)


def original_of(holder: Any, name: str) -> Any:
    """The unpatched function."""
    patched = _patched.get((id(holder), name))
    return _get(holder, name) if patched is None else patched.original
