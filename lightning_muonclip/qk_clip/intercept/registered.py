"""Functions that tell their own maxima: the user registers them, and every call of theirs is read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_muonclip.qk_clip.intercept.listener import current_listener, unrecorded
from lightning_muonclip.qk_clip.intercept.operands import Operands, operands_of
from lightning_muonclip.qk_clip.intercept.references import References, holders_of, resolve

#: Takes what a function returned and its arguments; returns the largest logit of every head.
Reader = Callable[..., Tensor]


class Looked(NamedTuple):
    """What one call of a registered function shows.

    Attributes:
        out: What it returned.
        query: Shape (..., heads, length, channels).
        key: The same.
        value: The same; ``None`` if it is not known.
        rest: Other tensors with a gradient that it was given.
    """

    out: Any
    query: Tensor
    key: Tensor
    value: Tensor | None
    rest: list[Tensor]


class Looks(Protocol):
    """Who looks at a forward takes the calls of registered functions in it."""

    def attend(self, kernel: RegisteredKernel, args: Any, kwargs: Any) -> Any:
        """Returns what the function returns, or what stands for it."""


#: Those who look at the forward that is running, innermost last; ``None`` inside of a registered function.
looking: list[Looks | None] = []

_registered: list[RegisteredKernel] = []


class RegisteredKernel:
    """A registered function, until :meth:`remove`; also a context manager.

    Attributes:
        name: What messages call it.
        original: The function.
        patched: What stands in its place.
    """

    def __init__(
        self, name: str, original: Callable[..., Any], reader: Reader, bound: bool, operands: Operands | None
    ) -> None:
        self.name, self.original = name, original
        self.patched = _patched(self)
        self.source = f"upper bounds of {name}" if bound else name
        self.is_active = True
        self._reader, self._operands = reader, operands
        self._references = References(original, self.patched)

    def remove(self) -> None:
        """Puts the function back wherever it was replaced. May be called twice."""
        if self.is_active:
            self.is_active = False
            _registered.remove(self)
            self._references.restore()

    def __enter__(self) -> RegisteredKernel:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def reach(self, module: nn.Module) -> None:
        """Replaces the function where a module holds it: in its attributes, its class, or a closure of its methods."""
        self._references.replace_in(module)

    def run(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Calls the function, whose own calls of registered functions nobody looks at."""
        looking.append(None)
        try:
            return self.original(*args, **kwargs)
        finally:
            looking.pop()

    @torch.no_grad()
    def maxima(self, where: str, out: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """What the reader tells of one call, float32 of shape (heads,).

        Args:
            where: The name of the attention module.
            out: What the function returned.
            args: What it was given.
            kwargs: The same by name.

        Raises:
            ValueError: If that is no maximum of every head.
        """
        return self._checked(where, self._reader(out, *args, **kwargs))

    def _checked(self, where: str, told: Any) -> Tensor:
        if not isinstance(told, Tensor) or told.ndim not in (1, 2):
            got = f"shape {tuple(told.shape)}" if isinstance(told, Tensor) else f"{type(told).__name__}"
            raise ValueError(
                f"the reader of {self.name} returned {got} in attention {where!r}; it must return the largest logit of every"
                " head as a tensor of shape (heads,) or (batch, heads)"
            )
        told = told.detach().float()
        if told.ndim == 1:
            return told
        return told.amax(0) if told.shape[0] else told.new_full(told.shape[1:], float("-inf"))

    def look(self, where: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, *given: Any) -> Looked:
        """What one call shows, for inference.

        Args:
            where: The name of the attention module.
            args: The arguments whose queries, keys and values are wanted.
            kwargs: The same by name.
            out: What the function returned.
            given: The arguments, positional and by name, that it got instead of these.

        Raises:
            ValueError: If the reader fails, or the queries and keys do not have as many heads as it tells of.
        """
        own_args, own_kwargs = given or (args, kwargs)

        def tell(args: Any, kwargs: Any) -> Tensor:
            return self.maxima(where, self.run(args, kwargs), args, kwargs)

        try:
            told = self._reader(out, *own_args, **own_kwargs)
        except Exception as error:
            raise ValueError(
                f"the reader of {self.name} failed in attention {where!r}: {type(error).__name__}: {error}"
            ) from error
        heads = len(self._checked(where, told))
        try:
            if self._operands is not None:
                query, key, *value = self._operands(*args, **kwargs)
                return Looked(out, query, key, value[0] if value else None, [])
            return Looked(out, *operands_of(self.original, args, kwargs, heads, tell, (own_args, own_kwargs)))
        except ValueError as error:
            raise ValueError(f"{self.name} in attention {where!r}: {error}") from error


def register_max_logits(
    fn: Callable[..., Any] | str, reader: Reader, *, bound: bool = False, operands: Operands | None = None
) -> RegisteredKernel:
    """Takes the largest logits of an attention function from what it returns.

    QK-Clip then reads, proves, watches and clips modules that call it like any others, though nothing can be seen inside
    of it. The function runs as before, and its outputs and gradients are the same.

    It is replaced under every name that an imported file has for it, in Hugging Face's table of attention functions, and,
    once a model is observed, in the attributes, the classes and the closures of its modules. A reference that is kept
    elsewhere, as in a list or a ``functools.partial``, is not found: register what the model calls. Register it before the
    model is built and before its first forward. A model that was built meanwhile goes on calling the function after
    ``remove()`` through a wrapper that does nothing else.

    Args:
        fn: The function that a model calls, or its dotted path: ``"package.module.function"``, or
            ``"package.module.Class.forward"`` for a module.
        reader: Called as ``reader(out, *args, **kwargs)`` with what ``fn`` returned and was given. Returns the largest
            scaled dot product of queries and keys over all visible pairs, before soft-cap, bias and sinks, of shape
            ``(heads,)`` or ``(batch, heads)``. No host synchronization, if training should not wait for it.
        bound: Whether these are upper bounds, such as the log-sum-exp. Heads are then clipped by the bound, as with
            ``logits="lse"``, whatever ``logits`` says: only the kernel knows which pairs it shows.
        operands: Takes the arguments of ``fn``; returns its queries and keys, and its values if it can, of shape
            ``(batch, heads, length, channels)`` each. ``None`` takes the arguments named q, k and v (also query, queries,
            and so on), or the first three tensors, and finds the dimension of the heads by their number.

    Returns:
        A handle; ``handle.remove()`` restores the function.

    Raises:
        TypeError: If ``fn`` or ``reader`` cannot be called.
        ValueError: If there is no such path, or the function is registered already. In the first forward, if the reader does
            not tell one number of every head.

    Example:
        >>> import torch.nn.functional as F
        >>> def kernel(q, k, v):
        ...     logits = q @ k.mT * q.shape[-1] ** -0.5
        ...     return logits.softmax(-1) @ v, logits.detach().amax((-2, -1))
        >>> with register_max_logits(kernel, lambda out, *args, **kwargs: out[1]) as handle:
        ...     handle.name.endswith("kernel")
        True
    """
    if not callable(reader):
        raise TypeError(f"reader must be a function of what fn returned and its arguments; got {type(reader).__name__}")
    if isinstance(fn, (type, nn.Module)):
        cls = fn if isinstance(fn, type) else type(fn)
        raise TypeError(f"fn must be a function; of {cls.__name__}, give a method: {cls.__name__}.forward or its path")
    if not callable(fn) and not isinstance(fn, str):
        raise TypeError(f"fn must be a function or its dotted path; got {type(fn).__name__}")
    name = fn if isinstance(fn, str) else ".".join(getattr(fn, x, "") for x in ("__module__", "__qualname__"))
    original, holders = resolve(fn) if isinstance(fn, str) else (fn, holders_of(fn))
    if not callable(original):
        raise TypeError(f"{name} is no function, but {type(original).__name__}")
    if any(original in (own.original, own.patched) for own in _registered):
        raise ValueError(f"{name} is registered already; remove() that handle first")
    kernel = RegisteredKernel(name.strip(".") or repr(fn), original, reader, bound, operands)
    kernel._references.replace_in_holders(holders)
    _registered.append(kernel)
    return kernel


def reach_registered(module: nn.Module) -> None:
    """Replaces registered functions that a module holds."""
    for kernel in _registered:
        kernel.reach(module)


def is_registered(function: Any) -> bool:
    """Whether a function is what stands in the place of a registered one."""
    return any(kernel.patched is function for kernel in _registered)


def _patched(kernel: RegisteredKernel) -> Callable[..., Any]:
    original = kernel.original

    @functools.wraps(original)
    def attention(*args: Any, **kwargs: Any) -> Any:
        if not kernel.is_active:
            return original(*args, **kwargs)
        looks = looking[-1] if looking else None
        if looks is not None:
            return looks.attend(kernel, args, kwargs)
        listener = current_listener()
        if listener is None:
            return original(*args, **kwargs)
        out = unrecorded(original, *args, **kwargs)
        listener.record_all(kernel.maxima(listener.name, out, args, kwargs)[None], kernel.source)
        return out

    return attention
