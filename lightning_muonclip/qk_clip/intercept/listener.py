"""Who listens to the attention calls of a module while its forward runs, and what is heard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Logits:
    """Arguments of :func:`~lightning_muonclip.kernels.bounded_max_logits.bounded_max_logits`.

    ``scale`` defaults to ``d ** -0.5``; ``bounds`` is ``None`` if the kernel tells nothing of its logits.
    """

    query: Tensor
    key: Tensor
    scale: float | None = None
    mask: Tensor | None = None
    is_causal: bool = False
    bounds: Tensor | None = None
    window: int | None = None
    documents: Tensor | None = None


class Listener(Protocol):
    """Receives the logits of an attention module, measured as ``logits`` says: ``"exact"``, ``"whole"`` or ``"lse"``."""

    @property
    def logits(self) -> str | None:
        """``None`` if the forward does not count."""

    def measure(self, source: str, logits: Logits) -> None:
        """Receives the queries and keys of one call."""

    def record(self, maxima: Tensor, source: str) -> None:
        """Receives the maxima of one call, shape ``(heads,)`` or, with upper bounds, ``(2, heads)``."""


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
