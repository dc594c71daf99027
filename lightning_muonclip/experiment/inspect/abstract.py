"""Models without values: their parameters are on the meta device, and what depends on none of them has numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_META, _CPU = torch.device("meta"), torch.device("cpu")

#: Elements of the largest tensor that gets numbers. Tables of rotations and masks are smaller, stacks of experts larger.
_LARGEST = 2**20

#: What a forward raises that needs numbers where there are none.
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError, AssertionError)


class Abstract(TorchDispatchMode):
    """Computes what depends on no parameter, such as positions and masks, and only the shapes of all else.

    Tensors are on the meta device if they have no numbers, whatever device the code asks for.
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_off = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if self._is_off or not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        if not tensors:
            return _created(func, args, kwargs)
        is_abstract = any(x.is_meta for x in tensors)
        if kwargs.get("device") is not None:
            kwargs["device"] = _META if is_abstract else _CPU
        if not is_abstract:
            return func(*args, **kwargs)
        if func._schema.is_mutable and isinstance(args[0], Tensor) and not args[0].is_meta:
            return args[0]  # numbers cannot be overwritten by none
        args, kwargs = tree_map(self.without_numbers, (args, kwargs))
        return func(*args, **kwargs)

    def without_numbers(self, leaf: Any) -> Any:
        """A tensor on the meta device, or what is no tensor."""
        if not isinstance(leaf, Tensor) or leaf.is_meta:
            return leaf
        was_off, self._is_off = self._is_off, True
        try:
            return leaf.detach().to(_META)
        finally:
            self._is_off = was_off


def _created(func: Any, args: Any, kwargs: Any) -> Any:
    """A new tensor: with numbers unless it is large."""
    if all(argument.name != "device" for argument in func._schema.arguments):
        return func(*args, **kwargs)
    out = func(*args, **{**kwargs, "device": _META})
    return func(*args, **{**kwargs, "device": _CPU}) if out.numel() <= _LARGEST else out


@contextmanager
def without_values() -> Iterator[None]:
    """Modules that are built here get parameters on the meta device; small buffers get their numbers."""
    mode = Abstract()

    def lay_down(module: nn.Module, name: str, param: Any) -> Any:
        if param is None or param.is_meta:
            return None
        bare = type(param)(mode.without_numbers(param), requires_grad=param.requires_grad)
        bare.__dict__.update(vars(param))
        return bare

    handle = register_module_parameter_registration_hook(lay_down)
    try:
        with mode:
            yield
    finally:
        handle.remove()


class Rehearsal:
    """Lets a model without values run.

    A module whose forward needs values, as that of many experts does, is passed over: it returns its first
    argument.

    Args:
        model: The model; from now on, its forwards compute shapes.

    Attributes:
        passed_over: The names of these modules, and why.
    """

    def __init__(self, model: nn.Module) -> None:
        self.passed_over: dict[str, str] = {}
        self._model = model
        self._names = {module: name for name, module in model.named_modules()}
        self._classes: set[type[nn.Module]] = set()
        self._running: list[ExitStack] = []
        model.register_forward_pre_hook(lambda *_: self._enter())
        model.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def prepare(self, args: Any, kwargs: Any) -> None:
        """Finds the modules that must be passed over; raises what the model raises if that does not help."""
        while True:
            self.passed_over = {}
            try:
                with torch.no_grad():
                    self._model(*args, **kwargs)
                return
            except FAILURES as error:
                culprit = self._culprit(error)
                if culprit is None:
                    raise
                self._classes.add(type(culprit))

    def _culprit(self, error: BaseException) -> nn.Module | None:
        """The innermost module that failed for want of values, unless it is most of the model."""
        inside, files, trace = [], set(), error.__traceback__
        while trace is not None:
            files.add(Path(trace.tb_frame.f_code.co_filename).name)
            module = trace.tb_frame.f_locals.get("self")
            if isinstance(module, nn.Module) and module in self._names:
                inside.append(module)
            trace = trace.tb_next
        is_for_values = "meta" in str(error).lower() or "_meta_registrations.py" in files
        for module in reversed(inside):
            holds_passed = any(self._names.get(child) in self.passed_over for child in module.modules())
            if type(module) not in self._classes and (is_for_values or holds_passed):
                return module if _numel(module) <= _numel(self._model) / 2 else None
        return None

    def _enter(self) -> None:
        stack = ExitStack()
        for cls in self._classes:
            own, forward = vars(cls).get("forward"), cls.forward
            cls.forward = self._passing_over(forward)
            stack.callback(setattr, cls, "forward", own) if own else stack.callback(delattr, cls, "forward")
        stack.enter_context(Abstract())
        self._running.append(stack)

    def _leave(self) -> None:
        self._running.pop().close()

    def _passing_over(self, forward: Any) -> Any:
        def passing_over(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            try:
                return forward(module, *args, **kwargs)
            except FAILURES as error:
                given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()]
                if not given:
                    raise
                self.passed_over[self._names.get(module, "")] = reason_of(error)
                return given[0].clone()  # not a new tensor, which would seem to depend on nothing

        return passing_over


def reason_of(error: BaseException) -> str:
    """An exception in one sentence."""
    first = (str(error).splitlines() or [""])[0].partition(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {first[:160]}"


def _numel(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())
