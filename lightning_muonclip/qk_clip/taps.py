"""Where attention modules of other libraries can be overheard: the functions that they call are rebound for a while.

A function is rebound where its caller will look it up: in ``torch.nn.functional``, in the globals of the file that an
attention class is written in, or as a method of the class. The rebound one measures the logits if a watched module is in
its forward just now, and calls the original. (A ``TorchFunctionMode`` would not see inside of ``nn.MultiheadAttention``.)
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from lightning_muonclip.kernels.log_sum_exp import attention_log_sum_exp, tells_log_sum_exp
from lightning_muonclip.qk_clip.names import qualified_names
from lightning_muonclip.qk_clip.recompute import METHODS, Logits, multi_head
from lightning_muonclip.qk_clip.recorder import Recorder

#: The attention modules in their forward just now, innermost last; ``None`` is one that is not recorded.
inside: list[Recorder | None] = []

Tap = Callable[[Any], Any]

_MULTI_HEAD_ARGUMENTS = tuple(inspect.signature(F.multi_head_attention_forward).parameters)


class Bindings:
    """What one observer has rebound; a function that several observers need is rebound once."""

    def __init__(self) -> None:
        self._keys: list[tuple[int, str]] = []

    def bind_for(self, module: nn.Module) -> None:
        """Rebinds whatever a module of this class may call to attend."""
        for holder, name, tap in _places(module):
            key = (id(holder), name)
            if key not in self._keys:
                self._keys.append(key)
                _rebind(key, holder, name, tap)

    def restore(self) -> None:
        """Undoes it, unless another observer still needs it."""
        for key in self._keys:
            _release(key)
        self._keys = []


class _Binding:
    def __init__(self, holder: Any, name: str, tap: Tap) -> None:
        self.holder, self.name = holder, name
        self.original = _get(holder, name)
        self.rebound = tap(self.original)
        self.users = 0
        _set(holder, name, self.rebound)

    def undo(self) -> None:
        if _get(self.holder, self.name) is self.rebound:  # else another library has rebound it since
            _set(self.holder, self.name, self.original)


_bound: dict[tuple[int, str], _Binding] = {}


def _rebind(key: tuple[int, str], holder: Any, name: str, tap: Tap) -> None:
    if key not in _bound:
        _bound[key] = _Binding(holder, name, tap)
    _bound[key].users += 1


def _release(key: tuple[int, str]) -> None:
    _bound[key].users -= 1
    if not _bound[key].users:
        _bound.pop(key).undo()
    if not _bound:
        inside.clear()


def _get(holder: Any, name: str) -> Any:
    return holder[name] if isinstance(holder, dict) else inspect.getattr_static(holder, name)


def _set(holder: Any, name: str, value: Any) -> None:
    if isinstance(holder, dict):
        holder[name] = value
    else:
        setattr(holder, name, value)


def _original(holder: Any, name: str) -> Any:
    """What stands in a place when nothing is rebound."""
    binding = _bound.get((id(holder), name))
    return _get(holder, name) if binding is None else binding.original


def _places(module: nn.Module) -> Iterator[tuple[Any, str, Tap]]:
    """Every place where something has to be rebound for a module: the holder, the name there, and the tap."""
    yield F, "scaled_dot_product_attention", _tap_sdpa
    yield F, "multi_head_attention_forward", _tap_multi_head
    cls = type(module)
    for name in qualified_names(cls):
        if name in METHODS:
            owner = next(base for base in cls.__mro__ if METHODS[name].method in vars(base))
            yield owner, METHODS[name].method, functools.partial(_tap_method, METHODS[name].logits)
    for scope in _scopes(cls):
        yield from _hugging_face_places(scope)
        yield from _imported_places(scope)


def _scopes(cls: type) -> Iterable[dict[str, Any]]:
    """The globals of every file in which a method of the class or its bases is written, each once."""
    methods = (inspect.unwrap(x) for base in cls.__mro__ for x in vars(base).values() if inspect.isfunction(x))
    return {id(x.__globals__): x.__globals__ for x in methods if inspect.isfunction(x)}.values()


def _hugging_face_places(scope: dict[str, Any]) -> Iterator[tuple[Any, str, Tap]]:
    """A model's file has its own eager function, and dispatches all others by the attention interface."""
    if "eager_attention_forward" in scope:
        eager = _original(scope, "eager_attention_forward")
        if "scaling" in inspect.signature(eager).parameters:  # else it knows a scale that it does not tell
            yield scope, "eager_attention_forward", _tap_eager
    if "ALL_ATTENTION_FUNCTIONS" in scope:
        yield scope, "ALL_ATTENTION_FUNCTIONS", _Interface


def _imported_places(scope: dict[str, Any]) -> Iterator[tuple[Any, str, Tap]]:
    """Names under which a file has imported torch's functions for itself, and perhaps compiled them."""
    taps: list[tuple[Any, Tap]] = [(_original(F, "scaled_dot_product_attention"), _tap_sdpa)]
    flex = sys.modules.get("torch.nn.attention.flex_attention")
    if flex is not None:
        yield flex, "flex_attention", _tap_flex
        taps.append((_original(flex, "flex_attention"), _tap_flex))
    for name in list(scope):
        value = _original(scope, name)
        wrapped = getattr(value, "__wrapped__", value) if inspect.isfunction(value) else value
        for function, tap in taps:
            if wrapped is function:
                yield scope, name, tap


def _recorder() -> Recorder | None:
    if not inside or (not torch.compiler.is_dynamo_compiling() and detect_fake_mode() is not None):
        return None  # tensors without values: torch.compile looks at a function that it does not trace
    return inside[-1]


def _unheard(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function whose logits are measured already, so that the functions in it do not measure them again."""
    inside.append(None)
    try:
        return function(*args, **kwargs)
    finally:
        inside.pop()


def _tap_sdpa(original: Callable[..., Any]) -> Callable[..., Any]:
    is_torchs = inspect.isbuiltin(original)  # else another library's, which is not to be replaced by a kernel of torch

    def listen(
        recorder: Recorder,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        bounded = recorder.logits == "lse" and is_torchs and not (is_causal and attn_mask is not None)
        if bounded and tells_log_sum_exp(query, key, value, attn_mask, dropout_p):
            factor = query.shape[-1] ** -0.5 if scale is None else scale
            output, bound = attention_log_sum_exp(query, key, value, attn_mask, is_causal, factor)
            recorder.record(bound, "log-sum-exp of scaled_dot_product_attention")
            return output
        recorder.measure("scaled_dot_product_attention", Logits(query, key, scale, attn_mask, is_causal))
        return None

    @functools.wraps(original)
    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Tensor:
        recorder = _recorder()
        output = None if recorder is None else listen(recorder, *args, **kwargs)
        return original(*args, **kwargs) if output is None else output

    return scaled_dot_product_attention


def _tap_multi_head(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def multi_head_attention_forward(*args: Any, **kwargs: Any) -> Any:
        recorder = _recorder()
        asked = {**dict(zip(_MULTI_HEAD_ARGUMENTS, args)), **kwargs}
        # Asked for its weights it multiplies by itself, and to torch.compile it is opaque; else it calls the function above.
        if recorder is None or not (asked.get("need_weights", True) or torch.compiler.is_compiling()):
            return original(*args, **kwargs)
        with torch.no_grad():
            recorder.measure("multi_head_attention_forward", multi_head(asked))
        return _unheard(original, *args, **kwargs)

    return multi_head_attention_forward


def _tap_flex(original: Callable[..., Any]) -> Callable[..., Any]:
    def listen(
        recorder: Recorder,
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
                "QK-Clip cannot see what a score_mod hides: hide pairs by block_mask, or their logits count as visible",
                stacklevel=3,
            )
        recorder.measure("flex_attention", Logits(query, key, scale, _dense(block_mask, query, key)))

    @functools.wraps(original)
    def flex_attention(*args: Any, **kwargs: Any) -> Any:
        recorder = _recorder()
        if recorder is not None:
            listen(recorder, *args, **kwargs)
        return original(*args, **kwargs)

    return flex_attention


def _tap_method(read: Callable[..., Logits | None], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        recorder = _recorder()
        logits = None if recorder is None else read(module, *args, **kwargs)
        if recorder is None or logits is None:
            return original(module, *args, **kwargs)
        recorder.measure(f"{type(module).__name__}.{original.__name__}", logits)
        return _unheard(original, module, *args, **kwargs)

    return method


def _tap_eager(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def eager_attention_forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        recorder = _recorder()
        if recorder is not None:  # of itself it is never causal: the mask says everything
            mask = None if attention_mask is None else attention_mask[..., : key.shape[-2]]
            recorder.measure("eager_attention_forward", Logits(query, key, kwargs.get("scaling"), mask))
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
    recorder = _recorder()
    if recorder is None:
        return original(module, query, key, value, attention_mask, **kwargs)
    visible = _visible(module, query, key, attention_mask, kwargs)
    recorder.measure("the attention interface", Logits(query, key, kwargs.get("scaling"), **visible))
    return _unheard(original, module, query, key, value, attention_mask, **kwargs)


def _through_torch(original: Callable[..., Any], module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Torch's function knows its mask better, but a single query it may be given as several of fewer heads."""
    if query.shape[-2] > 1:
        return original(module, query, *args, **kwargs)
    return _through_interface(original, module, query, *args, **kwargs)


class _Interface(MutableMapping[str, Callable[..., Any]]):
    """Stands before Hugging Face's table of attention functions and lends it our ears."""

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
        return functools.partial(_through_torch if name == "sdpa" else _through_interface, function)


def _visible(module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a function of the interface lets see: its mask, or if that only tells padding, also what it adds itself."""
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim == 4):
        return {"mask": mask[..., : key.shape[-2]] if isinstance(mask, Tensor) else _dense(mask, query, key)}
    queries, keys = query.shape[-2], key.shape[-2]
    is_causal = kwargs.get("is_causal")
    is_causal = queries > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    window = kwargs.get("sliding_window")
    visible = None if mask is None else mask[:, None, None, :].bool()
    if window is None and queries == keys:
        return {"mask": visible, "is_causal": is_causal}
    # The last query stands at the last key: those before it may come from a cache.
    ahead = torch.arange(keys, device=query.device) - torch.arange(keys - queries, keys, device=query.device)[:, None]
    pairs = ahead <= 0 if is_causal else torch.ones_like(ahead, dtype=torch.bool)
    if window is not None:
        pairs = pairs & (ahead.abs() < window)
    return {"mask": pairs if visible is None else visible & pairs}


def _dense(block_mask: Any, query: Tensor, key: Tensor) -> Tensor | None:
    """A BlockMask as booleans, or a tensor as it is."""
    if block_mask is None or isinstance(block_mask, Tensor):
        return block_mask
    from torch.nn.attention.flex_attention import create_mask

    (batch, heads), (queries, keys) = block_mask.shape[:2], (query.shape[-2], key.shape[-2])
    rows, columns = block_mask.BLOCK_SIZE
    # Hidden is what the function hides, and every block that is not listed.
    listed = block_mask.to_dense().bool().repeat_interleave(rows, -2).repeat_interleave(columns, -1)
    visible = create_mask(block_mask.mask_mod, batch, heads, queries, keys, str(query.device))
    return visible & listed[..., :queries, :keys]
