"""Follows the forwards of one attention module, while whatever it calls tells its watch.

A forward in which nobody told anything attends where no patch is, such as by another name of SDPA, or by hand where earlier
ones called a function. It is run once more under modes that see all that torch computes, and so is every later one.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_map

from lightning_muonclip.qk_clip.describe.describe import FAILURES
from lightning_muonclip.qk_clip.describe.isolate import DetachedCopies, apart, undisturbed
from lightning_muonclip.qk_clip.describe.survey import kept
from lightning_muonclip.qk_clip.intercept.calls import attention_calls
from lightning_muonclip.qk_clip.intercept.listener import current_listener, running, unrecorded
from lightning_muonclip.qk_clip.intercept.patches import Place
from lightning_muonclip.qk_clip.intercept.registered import reach_registered
from lightning_muonclip.qk_clip.intercept.torch_functions import AnySdpa
from lightning_muonclip.qk_clip.observe.by_hand import Measure, check_end
from lightning_muonclip.qk_clip.observe.recorder import ReportsMaxLogits
from lightning_muonclip.qk_clip.observe.watch import Watch


def listen(watch: Watch, module: nn.Module, *, is_entered: bool) -> None:
    """Lets a module, or what it calls in its forwards, tell its watch.

    Args:
        watch: The watch.
        module: The module.
        is_entered: Whether its forward is about to run, too late for another hook.
    """
    own: Any = module
    if isinstance(own, ReportsMaxLogits):
        own.max_logits_recorder = watch
    elif not watch.handles:
        watch.handles = [
            module.register_forward_pre_hook(_Enter(watch)),
            # Before the hook of FSDP2 that frees the weights.
            module.register_forward_hook(_Leave(watch), prepend=True, with_kwargs=True, always_call=True),
        ]
        watch.patches.add(attention_calls(type(module)))
        for child in module.modules():
            reach_registered(child)
        if is_entered:  # too late for a hook
            running.append(watch)


class _Enter:
    def __init__(self, watch: Watch) -> None:
        self.watch: Watch | None = watch  # None in a copy of the module

    def __call__(self, module: nn.Module, args: Any) -> None:
        watch = self.watch
        if watch is None:
            return
        if watch in running:  # the previous forward was interrupted, which skips the hooks
            del running[running.index(watch) :]
        watch.called = False
        running.append(watch if module.training and watch.logits is not None else None)


class _Leave:
    def __init__(self, watch: Watch) -> None:
        self.watch: Watch | None = watch  # None in a copy of the module

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.watch is None:
            return
        watch: Any = running.pop() if running else None  # empty if another hook raised before _Enter ran
        # No output: an error, or a recomputation under checkpointing that stopped early.
        if watch is None or output is None or watch.called:
            return
        if not watch.is_under_modes:
            run_under_modes(watch, module)
            watch.is_under_modes = True
            if any(isinstance(child, FSDPModule) for child in module.modules() if child is not module):
                warnings.warn(  # its weights can be gathered only if all ranks run it again
                    f"this forward of attention {watch.recorders[0].name!r} ({type(module).__name__}) was not measured: it"
                    " attends where no patch is, and FSDP2 shards modules inside of it; the next forward is measured",
                    stacklevel=2,
                )
                return
            _run_again(watch, module, args, kwargs)
        if watch.called:
            return
        name = watch.name
        if all(recorder.source is None for recorder in watch.recorders):
            raise RuntimeError(
                f"the logits of attention {name!r} ({type(module).__name__}) cannot be measured: it called neither"
                " torch.nn.functional.scaled_dot_product_attention nor another function that can be intercepted."
                " Let it call that function (Hugging Face: attn_implementation='sdpa'), or"
                f" skip it with specs={{{name!r}: None}}"
            )
        if not watch.has_warned:
            watch.has_warned = True
            warnings.warn(
                f"no logits were seen in a forward of attention {name!r} ({type(module).__name__}), unlike before; if it"
                " attends in such forwards too, QK-Clip does not act on them",
                stacklevel=2,
            )


@torch.compiler.disable(reason="attention that is computed in another way must run once as it is")  # type: ignore[untyped-decorator]
def _run_again(watch: Watch, module: nn.Module, args: Any, kwargs: Any) -> None:
    modes = [(child, child.training) for child in module.modules()]
    with DetachedCopies():  # it must not write to a cache of keys again
        args, kwargs = tree_map(kept, (args, kwargs))
    with apart(module), undisturbed(module):
        for child, training in modes:  # the forward to be looked at is one in training
            child.training = training
        running.append(watch)
        try:
            with suppress(*FAILURES):  # such as of a cache that has grown meanwhile
                module.forward(*args, **kwargs)
        finally:
            running.pop()
    watch.is_under_modes = watch.called  # it may as well not attend in some forwards


def run_under_modes(watch: Watch, module: nn.Module) -> None:
    """Patches the forward of a module, so that modes can act in it, compiled or not."""
    if watch.patches.add(_forward_of(type(module))):
        torch.compiler.reset()  # code compiled earlier would not call the patched forward


def _forward_of(cls: type[nn.Module]) -> Iterator[Place]:
    yield next(base for base in cls.__mro__ if "forward" in vars(base)), "forward", _patch_forward


def _patch_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        watch: Any = current_listener()
        if watch is None or not watch.is_of(module):
            return original(module, *args, **kwargs)
        if not (watch.is_under_modes or watch.softmaxes):
            return original(module, *args, **kwargs)
        measure = Measure(watch)
        if watch.is_under_modes:
            with AnySdpa(), measure:
                output = original(module, *args, **kwargs)
        else:  # softmaxes are all there is
            with measure:
                output = unrecorded(original, module, *args, **kwargs)
        check_end(measure)
        return output

    return forward
