"""Finds the modules that attend in a forward: by hooks that know the stack of modules, and a count at aten level."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

from lightning_muonclip.qk_clip.describe.follow import tensors_in
from lightning_muonclip.qk_clip.describe.fused import Channels
from lightning_muonclip.qk_clip.describe.isolate import DetachedCopies, apart, undisturbed

_T = TypeVar("_T")

#: Kernels whose result is no longer a product of queries and keys, however large it is.
_ENDS = (
    "mm",
    "addmm",
    "bmm",
    "convolution",
    "native_layer_norm",
    "native_batch_norm",
    "native_group_norm",
    "_fused_rms_norm",
    "sigmoid",
)


#: Where torch's own operations are.
_TORCHS = ("aten", "prim", "prims", "c10d", "_c10d_functional", "fsdp", "torchvision", "quantized")


@dataclass(eq=False)
class Frame:
    """One module in its forward, and what it was given."""

    name: str
    module: nn.Module
    args: Any
    kwargs: Any


@runtime_checkable
class Prepares(Protocol):
    """A hook that changes how a module attends before its first forward, and so before a survey."""

    def prepare(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Does so now, for a module that is about to be given these arguments."""


class Survey:
    """Notes the modules that were in their forward at every attention call, while it is entered.

    Attributes:
        calls: For every attention call in order, the stack of modules, the innermost last.
        head_dims: For every attention call, the number of channels of a query.
        modules: Those that have run.
        opaque: Calls of kernels that no operation of torch can be seen in, but which take queries, keys and values by their
            shapes, as those of flash-attn: the name of each, the stack of modules, and the number of channels.
        softmaxes: The innermost modules with a softmax over no product of two activations, as additive attention has it, and
            routers of experts.
        channels: What becomes of the output channels of every weight.
    """

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[list[Frame]] = []
        self.head_dims: list[int] = []
        self.modules: set[nn.Module] = set()
        self.opaque: list[tuple[str, list[Frame], int]] = []
        self.softmaxes: list[list[Frame]] = []
        self.channels = Channels()
        self._model = model
        self._stack: list[Frame] = []
        self._copies = DetachedCopies(shared=True)
        self._handles: list[Any] = []
        self._count = _Count(self._note_call, self._note_opaque, lambda: self.softmaxes.append(list(self._stack)))
        self._apply = vars(torch.autograd.Function)["apply"]

    def __enter__(self) -> Survey:
        for name, module in self._model.named_modules():
            self.channels.register(module, name)
            self._handles.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        self._eager = torch.compiler.set_stance("force_eager")
        self._eager.__enter__()
        self._count.__enter__()
        self.channels.__enter__()
        torch.autograd.Function.apply = classmethod(self._applied)  # type: ignore[method-assign, assignment]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.autograd.Function.apply = self._apply  # type: ignore[method-assign]
        self.channels.__exit__(kind, error, trace)
        self._count.__exit__(kind, error, trace)
        self._eager.__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()

    def _entering(self, name: str) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.modules.add(module)
            self.channels.register(module, name)  # FSDP2 has gathered its parameters
            if any(param.is_floating_point() for param in module.parameters()):
                with self._copies:
                    args, kwargs = tree_map(kept, (args, kwargs))
            else:
                args, kwargs = (), {}
            self._stack.append(Frame(name, module, args, kwargs))

        return enter

    def _applied(self, cls: type, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith(("torch.", "lightning_muonclip.")):
            self._note_opaque(f"{cls.__module__}.{cls.__qualname__}", args)
        return self._apply.__get__(None, cls)(*args, **kwargs)  # a method of Python, or of C from torch 2.14 on

    def _note_call(self, head_dim: int) -> None:
        self.calls.append(list(self._stack))
        self.head_dims.append(head_dim)

    def _note_opaque(self, name: str, args: Any) -> None:
        activations = [x for x in tensors_in(args) if x.is_floating_point() and not isinstance(x, nn.Parameter)]
        if sum(x.ndim > 2 for x in activations) > 2 or any(x.ndim > 4 for x in activations):  # or all in one tensor
            self.opaque.append((name, list(self._stack), activations[0].shape[-1]))

    def _leave(self, *_: Any) -> None:
        if self._stack:
            self._stack.pop()


class _Count(TorchDispatchMode):
    """Calls back for every fused attention kernel and every softmax (or exponential) over a batched product, in any code.

    It tells the number of channels that the logits are summed over.
    """

    supports_higher_order_operators = True

    def __init__(
        self, found: Callable[[int], None], opaque: Callable[[str, Any], None], softmax: Callable[[], None]
    ) -> None:
        super().__init__()
        self._found = found
        self._opaque = opaque
        self._softmax = softmax
        self._products = WeakIdKeyDictionary()  # of tensors that are made of one: its size, and what it sums over

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            if "flex_attention" in str(func):
                self._found(args[0].shape[-1])
            return func(*args, **kwargs)
        library, _, name = func._schema.name.partition("::")
        products = [self._products[arg] for arg in tensors_in(args) if arg in self._products]
        is_exponential = name in ("exp", "exp_", "exp2", "exp2_")
        is_softmax = is_exponential or name in ("_softmax", "_safe_softmax")
        if "scaled_dot_product" in name or "flash_attention" in name or "efficient_attention" in name:
            self._found(args[0].shape[-1])
        elif is_softmax and products:
            self._found(max(products)[1])
        elif is_softmax and not is_exponential:
            self._softmax()
        elif library not in _TORCHS:
            self._opaque(func._schema.name, args)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            if name in ("bmm", "baddbmm"):
                self._products[out] = out.numel(), args[name == "baddbmm"].shape[-1]
            elif (
                products
                and not is_softmax
                and name not in _ENDS
                and out.is_floating_point()
                and out.numel() >= max(products)[0]
            ):
                self._products[out] = max(products)
        return out


def run_watched(module: nn.Module, args: Any, kwargs: Any, watching: AbstractContextManager[_T]) -> _T:
    """Evaluates a module on inputs that stay as they are, and leaves it as it was; returns what has watched its forward."""
    with DetachedCopies():  # it must not write to a cache of keys
        args, kwargs = tree_map(kept, (args, kwargs))
    with apart(module), undisturbed(module), torch.no_grad(), watching as seen:
        module(*args, **kwargs)
    return seen


def kept(leaf: Any) -> Any:
    """What a forward is given, to be given again."""
    # A cache is written to in the forward; a tensor is not.
    if isinstance(leaf, (Tensor, nn.Module)):
        return leaf.detach() if isinstance(leaf, Tensor) else leaf
    try:
        return copy.deepcopy(leaf)
    except TypeError:  # a lock, a process group
        return leaf
