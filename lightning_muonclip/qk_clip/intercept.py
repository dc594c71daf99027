"""Intercepts the attention calls of other libraries by patching the functions that they call.

A function is patched where its caller looks it up: in ``torch.nn.functional``, in the globals of the file that defines an
attention class, or as a method of the class. The patched function measures the logits if an observed module is running its
forward, then calls the original. (A ``TorchFunctionMode`` would miss the calls inside ``nn.MultiheadAttention``.)
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_muonclip.kernels.flash import FlashCalls, flash_call
from lightning_muonclip.kernels.hidden import HIDDEN
from lightning_muonclip.kernels.log_sum_exp import attention_with_log_sum_exp, bounds_of_logits


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

#: Takes the original function and returns the patched one.
Patch = Callable[[Any], Any]

#: Where a function is patched: the holder, the name of the function there, and the patch.
Place = tuple[Any, str, Patch]

_VARLEN_ARGUMENTS = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
_MULTI_HEAD_ARGUMENTS = tuple(inspect.signature(F.multi_head_attention_forward).parameters)


class Patches:
    """The functions patched by one observer. A function that several observers need is patched once."""

    def __init__(self) -> None:
        self._keys: list[tuple[int, str]] = []

    def add(self, places: Iterable[Place]) -> None:
        """Patches functions."""
        for holder, name, patch in places:
            key = (id(holder), name)
            if key not in self._keys:
                self._keys.append(key)
                _acquire(key, holder, name, patch)

    def remove(self) -> None:
        """Restores the originals, unless another observer still needs the patch."""
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


def _original(holder: Any, name: str) -> Any:
    """The unpatched function."""
    patched = _patched.get((id(holder), name))
    return _get(holder, name) if patched is None else patched.original


def attention_calls(cls: type[nn.Module]) -> Iterator[Place]:
    """Every place where modules of this class may look up an attention function."""
    yield F, "scaled_dot_product_attention", _patch_sdpa
    yield F, "multi_head_attention_forward", _patch_multi_head
    for scope in _scopes(cls):
        yield from _hugging_face_places(scope)
        yield from _imported_places(scope)


def attends_by_interface(cls: type[nn.Module]) -> bool:
    """Whether the file of a forward has Hugging Face's attention functions, which tell queries and keys of any kernel."""
    forward = inspect.unwrap(cls.forward)
    return inspect.isfunction(forward) and any(True for _ in _hugging_face_places(forward.__globals__))


def _scopes(cls: type) -> Iterable[dict[str, Any]]:
    """The globals of every file that defines a method of the class or its bases, each once."""
    methods = (inspect.unwrap(x) for base in cls.__mro__ for x in vars(base).values() if inspect.isfunction(x))
    return {id(x.__globals__): x.__globals__ for x in methods if inspect.isfunction(x)}.values()


def _hugging_face_places(scope: dict[str, Any]) -> Iterator[Place]:
    """The eager function of a model's file, and the attention interface, which dispatches all others."""
    if "eager_attention_forward" in scope:
        eager = _original(scope, "eager_attention_forward")
        if "scaling" in inspect.signature(eager).parameters:  # otherwise its scale is unknown
            yield scope, "eager_attention_forward", _patch_eager
    if "ALL_ATTENTION_FUNCTIONS" in scope:
        yield scope, "ALL_ATTENTION_FUNCTIONS", _Interface


def _imported_places(scope: dict[str, Any]) -> Iterator[Place]:
    """Names under which a file has imported, and possibly compiled, torch's functions."""
    patches: list[tuple[Any, Patch]] = [(_original(F, "scaled_dot_product_attention"), _patch_sdpa)]
    flex = sys.modules.get("torch.nn.attention.flex_attention")
    if flex is not None:
        yield flex, "flex_attention", _patch_flex
        patches.append((_original(flex, "flex_attention"), _patch_flex))
    varlen = sys.modules.get("torch.nn.attention.varlen")
    if varlen is not None:
        yield varlen, "varlen_attn", _patch_varlen
        patches.append((_original(varlen, "varlen_attn"), _patch_varlen))
    for name in list(scope):
        value = _original(scope, name)
        wrapped = getattr(value, "__wrapped__", value) if inspect.isfunction(value) else value
        for function, patch in patches:
            if wrapped is function:
                yield scope, name, patch


def _listener() -> Listener | None:
    return running[-1] if running else None


def unrecorded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function whose logits are already measured, so that functions inside it do not measure them again."""
    running.append(None)
    try:
        return function(*args, **kwargs)
    finally:
        running.pop()


def _patch_sdpa(original: Callable[..., Any]) -> Callable[..., Any]:
    def measure(
        listener: Listener,
        log_sum_exp: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        bounds = None
        if log_sum_exp is not None and not (is_causal and attn_mask is not None):  # together they may hide a whole row
            bounds = bounds_of_logits(log_sum_exp, attn_mask)
        listener.measure("scaled_dot_product_attention", Logits(query, key, scale, attn_mask, is_causal, bounds))

    @functools.wraps(original)
    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Tensor:
        listener = _listener()
        if listener is None:
            return original(*args, **kwargs)
        output, log_sum_exp = attention_with_log_sum_exp(original, *args, **kwargs)
        measure(listener, log_sum_exp, *args, **kwargs)
        return output

    patched: Any = scaled_dot_product_attention
    patched.watches = patched, original  # itself, since whoever wraps it may copy its attributes
    return scaled_dot_product_attention


def _patch_multi_head(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def multi_head_attention_forward(*args: Any, **kwargs: Any) -> Any:
        listener = _listener()
        asked = {**dict(zip(_MULTI_HEAD_ARGUMENTS, args)), **kwargs}
        # With need_weights it computes the logits itself, and torch.compile does not trace it. Otherwise it calls SDPA.
        if listener is None or not (asked.get("need_weights", True) or torch.compiler.is_compiling()):
            return original(*args, **kwargs)
        with torch.no_grad():
            logits = _multi_head_logits(asked)
        listener.measure("multi_head_attention_forward", logits)
        return unrecorded(original, *args, **kwargs)

    return multi_head_attention_forward


def _multi_head_logits(asked: Mapping[str, Any]) -> Logits:
    """The logits of torch's ``multi_head_attention_forward``, from its arguments."""
    query, key, heads = asked["query"], asked["key"], asked["num_heads"]
    padding, mask = asked.get("key_padding_mask"), asked.get("attn_mask")
    if query.ndim == 2:
        query, key, padding = query[:, None], key[:, None], None if padding is None else padding[None]
    if asked.get("use_separate_proj_weight"):
        query_weight, key_weight = asked["q_proj_weight"], asked["k_proj_weight"]
    else:
        query_weight, key_weight, _ = asked["in_proj_weight"].chunk(3)
    bias = asked["in_proj_bias"]
    query_bias, key_bias, _ = (None, None, None) if bias is None else bias.chunk(3)
    query, key = F.linear(query, query_weight, query_bias), F.linear(key, key_weight, key_bias)
    if asked["bias_k"] is not None:
        key = torch.cat([key, asked["bias_k"].expand(1, key.shape[1], -1)])
    query, key = (x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for x in (query, key))
    if asked.get("static_k") is not None:
        key = asked["static_k"].unflatten(0, (-1, heads))
    if asked["add_zero_attn"]:
        key = F.pad(key, (0, 0, 0, 1))
    masks = [] if padding is None else [padding[:, None, None, :]]
    if mask is not None:
        masks.append(mask.unflatten(0, (-1, heads)) if mask.ndim == 3 else mask)
    visible: Tensor | None = None
    for mask in masks:
        shown = ~mask if mask.dtype is torch.bool else mask > HIDDEN
        visible = shown if visible is None else visible & shown
    if visible is not None:  # appended keys are always visible
        visible = F.pad(visible, (0, key.shape[-2] - visible.shape[-1]), value=True)
    return Logits(query, key, query.shape[-1] ** -0.5, visible)


def _patch_flex(original: Callable[..., Any]) -> Callable[..., Any]:
    def listen(
        listener: Listener,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_mod: Any = None,
        block_mask: Any = None,
        scale: float | None = None,
        *_: Any,
        **__: Any,
    ) -> None:
        if score_mod is not None and not torch.compiler.is_compiling():
            warnings.warn(
                "QK-Clip counts pairs that a score_mod hides as visible; hide pairs by block_mask instead",
                stacklevel=3,
            )
        listener.measure("flex_attention", Logits(query, key, scale, _dense(block_mask, query, key)))

    @functools.wraps(original)
    def flex_attention(*args: Any, **kwargs: Any) -> Any:
        listener = _listener()
        if listener is not None:
            listen(listener, *args, **kwargs)
        return original(*args, **kwargs)

    return flex_attention


def _patch_varlen(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def varlen_attn(*args: Any, **kwargs: Any) -> Any:
        listener = _listener()
        if listener is None:
            return original(*args, **kwargs)
        if torch.compiler.is_compiling():  # which cannot trace a mode
            call = flash_call({**dict(zip(_VARLEN_ARGUMENTS, args)), **kwargs}, None)
            if call is not None:
                listener.measure("varlen_attn", Logits(**call._asdict()))
            return original(*args, **kwargs)
        with FlashCalls() as seen:
            output = original(*args, **kwargs)
        _measure_flash(listener, "varlen_attn", seen)
        return output

    return varlen_attn


def _measure_flash(listener: Listener, source: str, seen: FlashCalls) -> bool:
    """Measures what a single kernel of FlashAttention tells; whether it tells enough."""
    call = seen.calls[0] if len(seen.calls) == 1 else None
    if call is not None:
        listener.measure(source, Logits(**call._asdict()))
    return call is not None


def _patch_eager(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def eager_attention_forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        listener = _listener()
        if listener is not None:  # the mask includes causality
            mask = None if attention_mask is None else attention_mask[..., : key.shape[-2]]
            listener.measure("eager_attention_forward", Logits(query, key, kwargs.get("scaling"), mask))
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
    listener = _listener()
    if listener is None:
        return original(module, query, key, value, attention_mask, **kwargs)
    _measure_interface(listener, module, query, key, attention_mask, kwargs)
    return unrecorded(original, module, query, key, value, attention_mask, **kwargs)


def _measure_interface(
    listener: Listener, module: nn.Module, query: Tensor, key: Tensor, attention_mask: Any, kwargs: Mapping[str, Any]
) -> None:
    visible = _visible(module, query, key, attention_mask, kwargs)
    listener.measure("the attention interface", Logits(query, key, kwargs.get("scaling"), **visible))


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
    listener = _listener()
    if listener is None or torch.compiler.is_compiling():
        return _through_interface(original, module, query, key, value, attention_mask, **kwargs)
    with FlashCalls() as seen:
        output = unrecorded(original, module, query, key, value, attention_mask, **kwargs)
    if not _measure_flash(listener, "FlashAttention", seen):
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
        through = _through_torch if name == "sdpa" else _through_flash if "flash" in name else _through_interface
        return functools.partial(through, function)


def _visible(module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The visible pairs of a call through the interface.

    A four-dimensional mask is complete. To a two-dimensional mask, which marks padding, or to none, the function adds
    causality and the window itself.
    """
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim == 4):
        return {"mask": mask[..., : key.shape[-2]] if isinstance(mask, Tensor) else _dense(mask, query, key)}
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


def _dense(block_mask: Any, query: Tensor, key: Tensor) -> Tensor | None:
    """A BlockMask as a boolean tensor; tensors are returned unchanged."""
    if block_mask is None or isinstance(block_mask, Tensor):
        return block_mask
    from torch.nn.attention.flex_attention import create_mask

    (batch, heads), (queries, keys) = block_mask.shape[:2], (query.shape[-2], key.shape[-2])
    rows, columns = block_mask.BLOCK_SIZE
    # A pair is visible if its block is listed and the mask_mod allows it.
    listed = block_mask.to_dense().bool().repeat_interleave(rows, -2).repeat_interleave(columns, -1)
    visible = create_mask(block_mask.mask_mod, batch, heads, queries, keys, str(query.device))
    return visible & listed[..., :queries, :keys]
