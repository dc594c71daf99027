"""Where the modules of a class look up attention functions.

A function is patched where its caller looks it up: in ``torch.nn.functional``, in the globals of the file that defines an
attention class, or as a method of the class. The patched function measures the logits if an observed module is running its
forward, then calls the original. (A ``TorchFunctionMode`` would miss the calls inside ``nn.MultiheadAttention``.)
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.overrides import get_overridable_functions

from lightning_muonclip.kernels.context_parallel import is_context_parallel
from lightning_muonclip.qk_clip.intercept.hugging_face import interface_places
from lightning_muonclip.qk_clip.intercept.patches import Patch, Place, original_of
from lightning_muonclip.qk_clip.intercept.torch_functions import patch_flex, patch_multi_head, patch_sdpa, patch_varlen


def attention_calls(cls: type[nn.Module]) -> Iterator[Place]:
    """Every place where modules of this class may look up an attention function."""
    get_overridable_functions()  # by which torch.compile knows what modes see; once, before a patch is in the place of one
    if not is_context_parallel():  # its end would not find its own function; modes see what it calls
        yield F, "scaled_dot_product_attention", patch_sdpa
    yield F, "multi_head_attention_forward", patch_multi_head
    for scope in _scopes(cls):
        yield from interface_places(scope)
        yield from _imported_places(scope)


def attends_by_interface(cls: type[nn.Module]) -> bool:
    """Whether the file of a forward has Hugging Face's attention functions, which tell queries and keys of any kernel."""
    forward = inspect.unwrap(cls.forward)
    return inspect.isfunction(forward) and any(True for _ in interface_places(forward.__globals__))


def _scopes(cls: type) -> Iterable[dict[str, Any]]:
    """The globals of every file that defines a method of the class or its bases, each once."""
    methods = (inspect.unwrap(x) for base in cls.__mro__ for x in vars(base).values() if inspect.isfunction(x))
    return {id(x.__globals__): x.__globals__ for x in methods if inspect.isfunction(x)}.values()


def _imported_places(scope: dict[str, Any]) -> Iterator[Place]:
    """Names under which a file has imported, and possibly compiled, torch's functions."""
    patches: list[tuple[Any, Patch]] = [(original_of(F, "scaled_dot_product_attention"), patch_sdpa)]
    flex = sys.modules.get("torch.nn.attention.flex_attention")
    if flex is not None:
        yield flex, "flex_attention", patch_flex
        patches.append((original_of(flex, "flex_attention"), patch_flex))
    varlen = sys.modules.get("torch.nn.attention.varlen")
    if varlen is not None:
        yield varlen, "varlen_attn", patch_varlen
        patches.append((original_of(varlen, "varlen_attn"), patch_varlen))
    for name in list(scope):
        value = original_of(scope, name)
        wrapped = getattr(value, "__wrapped__", value) if inspect.isfunction(value) else value
        for function, patch in patches:
            if wrapped is function:
                yield scope, name, patch
