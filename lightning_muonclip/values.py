"""Tensors that have numbers, and those that only stand for some."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

_PLAIN = {Tensor, Parameter}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_exporting() -> bool:
    """``torch.compiler.is_exporting``, which up to torch 2.11 is true in all code that is compiled."""
    return torch.compiler.is_exporting()  # not traced


def has_values(tree: Any) -> bool:
    """Whether no tensor is fake (as in torch.export), on the meta device, or inside a transform of ``torch.func``."""
    if is_exporting():
        return False
    if torch.compiler.is_dynamo_compiling():
        return True  # the numbers come when the graph runs
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    # Detection takes as long as a small layer, and plain tensors outside of all modes need none.
    is_plain = _get_current_dispatch_mode() is None and all(type(x) in _PLAIN for x in tensors)
    if not is_plain and detect_fake_mode(tensors) is not None:
        return False
    return not any(x.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors)
