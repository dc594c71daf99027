"""Follows the forwards of one attention module, while whatever it calls tells its watch.

A forward in which nobody told anything attends where no patch is, such as by another name of SDPA, or by hand where earlier
ones called a function. It is run once more under modes that see all that torch computes, and so is every later one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_muonclip.qk_clip.describe.isolate import apart, undisturbed
from lightning_muonclip.qk_clip.intercept.listener import current_listener, running, unrecorded
from lightning_muonclip.qk_clip.intercept.patches import Place
from lightning_muonclip.qk_clip.intercept.torch_functions import AnySdpa
from lightning_muonclip.qk_clip.observe.by_hand import Measure

if TYPE_CHECKING:
    from lightning_muonclip.qk_clip.observe.watch import Watch


class Enter:
    """The hook before a forward."""

    def __init__(self, watch: Watch) -> None:
        self.watch: Watch | None = watch  # None in a copy of the module

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Lets the watch listen, if the forward counts."""
        watch = self.watch
        if watch is None:
            return
        if watch in running:  # the previous forward was interrupted, which skips the hooks
            del running[running.index(watch) :]
        watch.called = False
        running.append(watch if module.training and watch.logits is not None else None)


class Leave:
    """The hook behind a forward."""

    def __init__(self, watch: Watch) -> None:
        self.watch: Watch | None = watch  # None in a copy of the module

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Looks again at a forward that has told nothing."""
        if self.watch is None:
            return
        watch: Any = running.pop() if running else None  # empty if another hook raised before Enter ran
        # No output: an error, or a recomputation under checkpointing that stopped early.
        if watch is None or output is None or watch.called:
            return
        if not watch.is_under_modes:
            _look_again(watch, module, args, kwargs)
        if not watch.called and all(recorder.source is None for recorder in watch.recorders):
            name = watch.recorders[0].name
            raise RuntimeError(
                f"the logits of attention {name!r} ({type(module).__name__}) cannot be measured: it called neither"
                " torch.nn.functional.scaled_dot_product_attention nor another function that can be intercepted."
                " Let it call that function (Hugging Face: attn_implementation='sdpa'), or"
                f" skip it with specs={{{name!r}: None}}"
            )


@torch.compiler.disable(
    reason="attention that is computed in another way than before must run once without torch.compile"
)
def _look_again(watch: Watch, module: nn.Module, args: Any, kwargs: Any) -> None:
    watch.is_under_modes = True
    run_under_modes(watch, module)
    modes = [(child, child.training) for child in module.modules()]
    with apart(module), undisturbed(module):
        for child, training in modes:  # the forward to be looked at is one in training
            child.training = training
        running.append(watch)
        try:
            module.forward(*args, **kwargs)
        finally:
            running.pop()


def run_under_modes(watch: Watch, module: nn.Module) -> None:
    """Patches the forward of a module, so that modes can act in it, compiled or not."""
    watch.patches.add(_forward_of(type(module)))
    torch.compiler.reset()  # code compiled earlier would not call the patched forward


def _forward_of(cls: type[nn.Module]) -> Iterator[Place]:
    yield next(base for base in cls.__mro__ if "forward" in vars(base)), "forward", _patch_forward


def _patch_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        watch: Any = current_listener()
        if watch is None or not watch.is_of(module):
            return original(module, *args, **kwargs)
        if watch.is_under_modes:
            with AnySdpa(), Measure(watch):
                return original(module, *args, **kwargs)
        if watch.softmaxes:  # which measure all there is
            with Measure(watch):
                return unrecorded(original, module, *args, **kwargs)
        return original(module, *args, **kwargs)

    return forward
