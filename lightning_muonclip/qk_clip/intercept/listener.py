"""Who listens to the attention calls of a module while its forward runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from lightning_muonclip.kernels.measure import Logits


class Listener(Protocol):
    """Receives the logits of an attention module."""

    @property
    def name(self) -> str:
        """The name of the module."""

    def measure(self, source: str, logits: Logits) -> None:
        """Receives the logits of one call."""

    def record_all(self, maxima: Tensor, source: str) -> None:
        """Receives the maxima of one call, of shape (1, heads)."""


#: Listeners of the attention modules whose forward is running, innermost last; ``None`` for one that is not recorded.
running: list[Listener | None] = []


def current_listener() -> Listener | None:
    """The listener of the innermost module whose forward is running."""
    return running[-1] if running else None


def unrecorded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function whose logits are already measured, so that functions inside it do not measure them again."""
    running.append(None)
    try:
        return function(*args, **kwargs)
    finally:
        running.pop()


@contextmanager
def apart_from_running() -> Iterator[None]:
    """Runs other forwards in the middle of those that are running, which go on afterwards."""
    outer = list(running)
    running.clear()
    try:
        yield
    finally:
        running[:] = outer
