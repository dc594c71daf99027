"""Hugging Face's attention interface: the eager function of a model's file, and the table of all others."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muonclip.kernels.flash import FlashCalls
from lightning_muonclip.kernels.measure import Logits
from lightning_muonclip.qk_clip.intercept.listener import Listener, current_listener, unrecorded
from lightning_muonclip.qk_clip.intercept.patches import Place, original_of
from lightning_muonclip.qk_clip.intercept.registered import is_registered
from lightning_muonclip.qk_clip.intercept.torch_functions import dense_mask, measure_flash


def interface_places(scope: dict[str, Any]) -> Iterator[Place]:
    """The eager function of a model's file, and the attention interface, which dispatches all others."""
    if "eager_attention_forward" in scope:
        eager = original_of(scope, "eager_attention_forward")
        if "scaling" in inspect.signature(eager).parameters:  # otherwise its scale is unknown
            yield scope, "eager_attention_forward", _patch_eager
    if "ALL_ATTENTION_FUNCTIONS" in scope:
        yield scope, "ALL_ATTENTION_FUNCTIONS", _Interface


def _patch_eager(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def eager_attention_forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        listener = current_listener()
        if listener is not None:  # the mask includes causality
            mask = None if attention_mask is None else attention_mask[..., : key.shape[-2]]
            listener.measure("eager_attention_forward", Logits(query, key, scale=kwargs.get("scaling"), mask=mask))
        return original(module, query, key, value, attention_mask, **kwargs)

    return eager_attention_forward


def _through_interface(
    original: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> Any:
    listener = current_listener()
    if listener is None:
        return original(module, query, key, value, attention_mask, **kwargs)
    _measure_interface(listener, module, query, key, attention_mask, kwargs)
    return unrecorded(original, module, query, key, value, attention_mask, **kwargs)


def _measure_interface(
    listener: Listener, module: nn.Module, query: Tensor, key: Tensor, attention_mask: Any, kwargs: Mapping[str, Any]
) -> None:
    visible = _visible(module, query, key, attention_mask, kwargs)
    listener.measure("the attention interface", Logits(query, key, scale=kwargs.get("scaling"), **visible))


def _through_flash(
    original: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> Any:
    """Measures what the kernel tells, which knows the sequences that are packed into one."""
    listener = current_listener()
    if listener is None or torch.compiler.is_compiling():
        return _through_interface(original, module, query, key, value, attention_mask, **kwargs)
    with FlashCalls() as seen:
        output = unrecorded(original, module, query, key, value, attention_mask, **kwargs)
    if not measure_flash(listener, "FlashAttention", seen):
        _measure_interface(listener, module, query, key, attention_mask, kwargs)
    return output


def _through_torch(original: Callable[..., Any], module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Leaves measuring to the patch of SDPA, which gets the final mask, except for a single query.

    A single query may reach SDPA reshaped to several queries of fewer heads.
    """
    if query.shape[-2] > 1:
        return original(module, query, *args, **kwargs)
    return _through_interface(original, module, query, *args, **kwargs)


class _Interface(MutableMapping[str, Callable[..., Any]]):
    """Wraps Hugging Face's table of attention functions and intercepts calls of the functions that it returns."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        function = self._original.get_interface(name, default)
        return function if function is default else self._observed(name, function)

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self._observed(name, self._original[name])

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        self._original[name] = function

    def __delitem__(self, name: str) -> None:
        del self._original[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._original)

    def __len__(self) -> int:
        return len(self._original)

    def __contains__(self, name: object) -> bool:
        return name in self._original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def _observed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        if is_registered(function):  # it tells its own maxima
            return function
        through = _through_torch if name == "sdpa" else _through_flash if "flash" in name else _through_interface
        return functools.partial(through, function)


def _visible(module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The visible pairs of a call through the interface.

    A four-dimensional mask is complete. To a two-dimensional mask, which marks padding, or to none, the function adds
    causality and the window itself.
    """
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim == 4):
        return {"mask": mask[..., : key.shape[-2]] if isinstance(mask, Tensor) else dense_mask(mask, query, key)}
    queries, keys = query.shape[-2], key.shape[-2]
    is_causal = kwargs.get("is_causal")
    is_causal = queries > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    window = kwargs.get("sliding_window")
    visible = None if mask is None else mask[:, None, None, :].bool()
    if window is None and queries == keys:
        return {"mask": visible, "is_causal": is_causal}
    # The last query is aligned with the last key: earlier keys may come from a cache.
    ahead = torch.arange(keys, device=query.device) - torch.arange(keys - queries, keys, device=query.device)[:, None]
    pairs = ahead <= 0 if is_causal else torch.ones_like(ahead, dtype=torch.bool)
    if window is not None:
        pairs = pairs & (ahead.abs() < window)
    return {"mask": pairs if visible is None else visible & pairs}
