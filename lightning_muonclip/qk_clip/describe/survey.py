"""Finds the modules that attend in a forward: by hooks that know the stack of modules, and a count at aten level."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_muonclip.qk_clip.describe.count import Count, Frame
from lightning_muonclip.qk_clip.describe.follow import tensors_in
from lightning_muonclip.qk_clip.describe.fused import Channels
from lightning_muonclip.qk_clip.describe.isolate import DetachedCopies, apart, undisturbed
from lightning_muonclip.qk_clip.intercept.registered import RegisteredKernel, looking, reach_registered

_T = TypeVar("_T")

NO_PRODUCT = "no product of queries and keys is seen behind its softmax"
NO_SOFTMAX = "no softmax follows its product of two activations"


@runtime_checkable
class Prepares(Protocol):
    """A hook that changes how a module attends before its first forward, and so before a survey."""

    def prepare(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Does so now, for a module that is about to be given these arguments."""


class Survey:
    """Notes the modules that were in their forward at every attention call, while it is entered.

    Args:
        model: The model.
        name: What messages call it, where it is a part of another.

    Attributes:
        modules: Those that have run.
        opaque: Calls of kernels that no operation of torch can be seen in, but which take queries, keys and values by their
            shapes, as those of flash-attn: the name of each, the stack of modules, and the number of channels.
        channels: What becomes of the output channels of every weight.
    """

    def __init__(self, model: nn.Module, name: str = "") -> None:
        self.modules: set[nn.Module] = set()
        self.opaque: list[tuple[str, list[Frame], int]] = []
        self.channels = Channels()
        self._model, self._name = model, name
        self._stack: list[Frame] = []
        self._copies = DetachedCopies(shared=True)
        self._handles: list[Any] = []
        held = (leaf for module in model.modules() for leaf in tree_leaves(vars(module)) if isinstance(leaf, Tensor))
        self._count = Count(held, self._stack, self._note_opaque)
        self._apply = vars(torch.autograd.Function)["apply"]

    @property
    def calls(self) -> list[list[Frame]]:
        """For every attention call in order, the stack of modules, the innermost last."""
        return [noted.stack for noted in self._count.softmaxes if noted.is_attention]

    @property
    def calls_flex_attention(self) -> bool:
        """Whether FlexAttention was called."""
        return self._count.calls_flex_attention

    @property
    def head_dims(self) -> list[int]:
        """For every attention call, the number of channels of a query."""
        return [noted.head_dim for noted in self._count.softmaxes if noted.is_attention]

    @property
    def others(self) -> list[tuple[list[Frame], str]]:
        """What else may be called attention: the stack of modules, and why it is none whose weights scale logits."""
        softmaxes = (noted.stack for noted in self._count.softmaxes if not noted.is_attention)
        weighing = (noted.stack for noted in self._count.others)
        return [*((stack, NO_PRODUCT) for stack in softmaxes), *((stack, NO_SOFTMAX) for stack in weighing)]

    def __enter__(self) -> Survey:
        for name, module in self._model.named_modules():
            self.channels.register(module, name)
            reach_registered(module)
            self._handles.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        self._eager = torch.compiler.set_stance("force_eager")
        self._eager.__enter__()
        self._count.__enter__()
        self.channels.__enter__()
        torch.autograd.Function.apply = classmethod(self._applied)  # type: ignore[method-assign, assignment]
        looking.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        looking.pop()
        torch.autograd.Function.apply = self._apply  # type: ignore[method-assign]
        self.channels.__exit__(kind, error, trace)
        self._count.__exit__(kind, error, trace)
        self._eager.__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()

    def attend(self, kernel: RegisteredKernel, args: Any, kwargs: Any) -> Any:
        """Notes a call of a registered function; what it does inside is its own."""
        where = ".".join(name for name in (self._name, self._stack[-1].name if self._stack else "") if name)
        with self._count.paused():
            out = kernel.run(args, kwargs)
            looked = kernel.look(where, args, kwargs, out)
        self._count.note(looked.query.shape[-1], True)
        return out

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
        out = self._apply.__get__(None, cls)(*args, **kwargs)  # a method of Python, or of C from torch 2.14 on
        if not (self._count.is_paused or cls.__module__.startswith(("torch.", "lightning_muonclip."))):
            self._note_opaque(f"{cls.__module__}.{cls.__qualname__}", args, out)
        return out

    def _note_opaque(self, name: str, args: Any, out: Any) -> None:
        activations = [
            x for x in tensors_in(args) if x.is_floating_point() and not isinstance(x, nn.Parameter) and x.ndim > 2
        ]
        ndim = next((x.ndim for x in tree_leaves(out) if isinstance(x, Tensor)), 0)
        # Queries, keys and values may be in one tensor, along a dimension that the result does not have.
        packed = (
            max((n for n in x.shape[:-1] if n in (2, 3)), default=1) if x.ndim == ndim + 1 else 1 for x in activations
        )
        if sum(packed) > 2 or any(x.ndim > 4 for x in activations):
            self.opaque.append((name, list(self._stack), activations[0].shape[-1]))

    def _leave(self, *_: Any) -> None:
        if self._stack:
            self._stack.pop()


def run_watched(module: nn.Module, args: Any, kwargs: Any, watching: AbstractContextManager[_T]) -> _T:
    """Evaluates a module on inputs that stay as they are, and leaves it as it was; returns what has watched its forward."""
    with DetachedCopies():  # it must not write to a cache of keys
        args, kwargs = tree_map(kept, (args, kwargs))
    with apart(module), undisturbed(module), torch.no_grad(), watching as seen:
        module(*args, **kwargs)
    return seen


def kept(leaf: Any) -> Any:
    """What a forward is given, to be given again."""
    if isinstance(leaf, nn.Module):
        return leaf
    if isinstance(leaf, Tensor) and torch.compiler.is_compiling():
        return leaf.detach().clone()
    try:
        return copy.deepcopy(leaf)
    except TypeError:  # a lock, a process group
        return leaf
