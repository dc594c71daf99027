"""Finds attention when it first runs in training, before its forward goes on, so that its maxima are kept.

Every module has a hook until a survey has seen it run. The first such module to be entered in training is surveyed on its
inputs: the whole model at first, later perhaps a branch that was not taken before.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lightning_muonclip.parallel.shards import on_all_ranks
from lightning_muonclip.qk_clip.describe.declared import (
    AttentionModules,
    Specs,
    by_display_name,
    declared_attention,
    display_name,
    is_inside,
    named_modules,
    named_parameters,
    unwrapped,
)
from lightning_muonclip.qk_clip.describe.describe import Found
from lightning_muonclip.qk_clip.describe.find import Example, find_attention, spec_of, watched_spec
from lightning_muonclip.qk_clip.describe.fused import FusedWeight, FusedWeights
from lightning_muonclip.qk_clip.describe.spec import AttentionSpec
from lightning_muonclip.qk_clip.describe.survey import NO_PRODUCT, NO_SOFTMAX
from lightning_muonclip.qk_clip.intercept.calls import attends_by_interface
from lightning_muonclip.qk_clip.intercept.listener import apart_from_running
from lightning_muonclip.qk_clip.observe.eager import eager
from lightning_muonclip.qk_clip.observe.recorder import ReportsMaxLogits
from lightning_muonclip.qk_clip.owned import Owned, has_part_of
from lightning_muonclip.values import has_values, is_exporting

UNKNOWN_CHOICES = ("error", "monitor")


class Discovery:
    """Watches over the modules of a model that no survey has seen yet, until :meth:`close`.

    Args:
        model: The model.
        specs: The user's specs by module name; what they name is not inferred.
        unknown: What to do with attention that cannot be read and that the run trains: ``"error"`` or ``"monitor"``.
        owned: What the run trains.
        add: Receives attention that was found, and the module whose forward is about to run.
    """

    def __init__(
        self,
        model: nn.Module,
        specs: Specs | None,
        unknown: str,
        owned: Owned,
        add: Callable[[AttentionModules, nn.Module | None], None],
    ) -> None:
        #: Attention that is neither scaled nor measured, and why.
        self.unmeasured: dict[str, str] = {}
        self._unknown = unknown
        self._owned = owned
        self._observer_adds = weakref.WeakMethod(add)  # no cycle: what nobody holds ends at once
        self._root, self._specs = unwrapped(model), by_display_name(specs)
        described = declared_attention(model, specs)
        trained = [name for name, param in named_parameters(model).items() if param.requires_grad]
        asked = [self._specs, {name: spec for name, (_, spec) in described.items()}, unknown, trained]
        #: A hash of what inference depends on beside the model.
        self.asked = hashlib.sha256(repr(asked).encode()).hexdigest()
        #: Modules that the user leaves alone.
        self.left_alone = [name for name, spec in self._specs.items() if spec is None]
        #: The display names of all modules, in ``named_modules`` order.
        self.names: dict[nn.Module, str] = {}
        #: Described modules that may attend by hand, so that it must be found where they have their logits.
        self._described: dict[nn.Module, AttentionSpec] = {}
        #: Modules of which a survey need tell nothing.
        self._alone: set[nn.Module] = set()
        #: Weights that hold several matrices, by display name; another dictionary whenever one is found.
        self.fused: FusedWeights = {}
        #: What surveys have found, by display name.
        self.found: dict[str, Found] = {}
        self.has_surveyed = False
        self._is_surveying = False
        self._forwards: dict[nn.Module, Any] = {}
        self._handles: dict[nn.Module, RemovableHandle] = {}
        self._all_handles: list[RemovableHandle] = []
        weakref.finalize(self, _remove, self._all_handles)
        #: Whether ranks may find different attention.
        self.may_differ = False
        self._take_up(described)
        if self._handles:
            eager.acquire(self)

    def look_again(self) -> None:
        """Takes up the modules that the model has got since, and drops those that it has no more."""
        if self._modules == set(self._root.modules()):
            return
        before = self.names
        own = named_modules(self._root)
        declared = declared_attention(self._root, {name: spec for name, spec in self._specs.items() if name in own})
        described = {name: (module, spec) for name, (module, spec) in declared.items() if module not in before}
        self._take_up(described)
        self.found = {name: own for name, own in self.found.items() if own.module in self.names}
        torch.compiler.reset()  # code compiled meanwhile would not call their hooks
        eager.acquire(self)
        self._add(described, None)

    def _take_up(self, described: AttentionModules) -> None:
        """Lets all modules that are new, some of which the user describes, wait for their first forward."""
        known = self.names
        self._modules = set(self._root.modules())
        self.names = {module: name for name, module in named_modules(self._root).items()}
        self._described |= {
            module: spec
            for module, spec in described.values()
            if not (isinstance(module, ReportsMaxLogits) or spec.softmaxes or attends_by_interface(type(module)))
        }
        alone = [name for name, (module, _) in described.items() if module not in self._described]
        self._alone = self._inside([*alone, *self.left_alone]) | (self._alone & self.names.keys())
        inside = {self.names[module] for module in self._alone}
        for module, name in self.names.items():  # what is around comes first
            if module not in known and name.rpartition(".")[0] in inside:
                self._alone.add(module)
                inside.add(name)
        self._forwards = {module: self._forwards.get(module, vars(module).get("forward")) for module in self.names}
        for module in self._handles.keys() - self.names.keys():
            self._handles.pop(module).remove()
        self._watch(module for module in self.names if module not in known)
        self.may_differ = self.may_differ or bool(self._handles.keys() - self._inside(described))

    def survey(self, root: nn.Module, example: Example, *, is_entered: bool = False) -> None:
        """Finds and infers all attention that a module computes on these inputs.

        Args:
            root: The module.
            example: Its arguments.
            is_entered: Whether its forward is about to run.

        Raises:
            ValueError: If some cannot be read, unless it is to be monitored.
        """
        if not is_entered:
            eager.release(self)
        self._is_surveying = True
        try:
            with apart_from_running():  # another observer may have begun to listen to this very forward
                search = find_attention(root, example, self._described, self._alone, self.names.get(root, ""))
        finally:
            self._is_surveying = False
        self.has_surveyed = True
        self.look_again()  # its forward may have made some
        if search.fused:
            prefix = self.names.get(root, "")
            own = {display_name(f"{prefix}.{name}".lstrip(".")): parts for name, parts in search.fused.items()}
            self.fused = {**own, **self.fused}
        for module in search.modules:
            if module in self._handles:
                self._handles.pop(module).remove()
        around = (m for m, name in self.names.items() if is_inside(self.names.get(root, ""), name))
        self._watch(m for m in around if m not in search.modules)
        new = self._understood(search.found)
        for module, reason in search.others.items():
            if module in self.names:
                self.unmeasured.setdefault(self.names[module], reason)
        for module, softmaxes in search.softmaxes.items():
            new[self.names[module]] = module, replace(self._described[module], softmaxes=softmaxes)
        self._alone |= self._inside(new) | search.modules & self._described.keys()
        if new:
            self._add(new, root if is_entered else None)

    def _watch(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            if (
                module not in self._alone
                and module not in self._handles
                and not isinstance(
                    module, (torch.jit.ScriptModule, nn.ModuleList, nn.ModuleDict)
                )  # which have no forward
            ):
                # Before the hooks of FSDP2, which then see a whole forward at a time.
                self._handles[module] = module.register_forward_pre_hook(_Entered(self), prepend=True, with_kwargs=True)
                self._all_handles.append(self._handles[module])

    @property
    def unseen(self) -> list[str]:
        """The names of the modules that no survey has seen run."""
        return [self.names[module] for module in self._handles]

    @property
    def has_found(self) -> bool:
        """Whether any attention was found, if only such as cannot be measured."""
        return any(reason not in (NO_PRODUCT, NO_SOFTMAX) for reason in self.unmeasured.values())

    def state_dict(self) -> dict[str, Any]:
        """What was found beside the attention modules, and what inference depends on, in plain containers."""
        fused = {name: list(own) for name, own in self.fused.items()}
        return {"unseen": self.unseen, "unmeasured": dict(self.unmeasured), "fused": fused, "asked": self.asked}

    def restore(self, attention: AttentionModules, state_dict: Mapping[str, Any]) -> None:
        """Takes up where another run was: what it has seen is not surveyed again.

        Args:
            attention: What it had found.
            state_dict: Its :meth:`state_dict`.
        """
        self.has_surveyed = True
        self.fused = {name: FusedWeight(*own) for name, own in state_dict["fused"].items()}
        self.unmeasured = dict(state_dict.get("unmeasured", {}))
        for module in [module for module in self._handles if self.names[module] not in state_dict["unseen"]]:
            self._handles.pop(module).remove()
        self._alone |= self._inside(attention)
        self._add(attention, None)
        eager.release(self)

    def close_step(self) -> None:
        """Lets torch.compile act again, after the first step: not in the middle of a forward that it could not compile."""
        if self.has_surveyed:
            eager.release(self)

    def close(self) -> None:
        """Removes all hooks. May be called twice."""
        eager.release(self)
        _remove(self._all_handles)
        self._handles = {}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def entered(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Surveys a module that is entered for the first time in training."""
        # A strategy such as DDP may have put another function in the place of the forward, to be called once.
        forward = vars(module).get("forward")  # Lightning puts the bound method back, which was not there before
        is_own = forward is self._forwards[module] or getattr(forward, "__self__", None) is module
        is_trained = module.training and not torch.is_inference_mode_enabled()
        # Ranks that share weights survey together, or none does.
        if is_trained and is_own and not self._is_surveying and on_all_ranks(module, _tells((args, kwargs), module)):
            self.survey(module, (args, kwargs), is_entered=True)

    def doubt(self, name: str, module: nn.Module, spec: AttentionSpec, reason: str) -> None:
        """Takes back the spec of attention that no longer does what it did.

        Raises:
            ValueError: Unless what cannot be read is to be monitored.
        """
        if self._unknown == "error":
            raise ValueError(_refusal({name: Found(name, module, reason=reason)}))
        self._add({name: (module, replace(spec, watched=reason))}, None)

    def _add(self, attention: AttentionModules, entered: nn.Module | None) -> None:
        add = self._observer_adds()
        if add is not None:
            add(attention, entered)

    def _understood(self, found: list[Found]) -> AttentionModules:
        """What is observed from now on.

        Raises:
            ValueError: If something cannot be read, unless it is to be monitored.
        """
        new: AttentionModules = {}
        refused: dict[str, Found] = {}
        for own in found:
            name = self.names.get(own.module, own.name)
            self.found[name] = own
            if name in new or name in refused:
                new.pop(name, None)
                own.layout, own.reason = None, "it computes several attentions, each with heads of its own"
            if own.layout is not None:
                new[name] = own.module, spec_of(own)
            elif self._unknown == "error" and has_part_of(own.module, self._owned.params()):
                refused[name] = own
            elif own.is_measurable:
                new[name] = own.module, watched_spec(own)
            else:
                self.unmeasured[name] = own.reason
        if refused:
            raise ValueError(_refusal(refused))
        return new

    def _inside(self, outer: Iterable[str]) -> set[nn.Module]:
        """The modules of these names, and all inside them."""
        roots = list(outer)
        return {m for m, name in self.names.items() if any(is_inside(name, root) for root in roots)}


def _tells(example: Any, module: nn.Module) -> bool:
    """Whether a forward tells how a module attends: there are numbers, and samples, and the weights are its own."""
    params = list(module.parameters())
    first = next((leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor) and leaf.ndim), None)
    is_empty = first is not None and not len(first)
    # torch.func.functional_call may lend it tensors that are no parameters.
    return not is_empty and all(isinstance(param, nn.Parameter) for param in params) and has_values((example, params))


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


class _Entered:
    """The hook of a module; that of a copy of the module does nothing."""

    def __init__(self, discovery: Discovery | None = None) -> None:
        self._discovery = (lambda: None) if discovery is None else weakref.ref(discovery)  # hooks keep nobody alive

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        discovery = self._discovery()
        if discovery is not None and module.training and not is_exporting():
            discovery.entered(module, args, kwargs)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


def _refusal(refused: dict[str, Found]) -> str:
    name, own = next(iter(refused.items()))
    matrices = ", ".join(f"{n} {tuple(p.shape)}" for n, p in own.module.named_parameters() if p.ndim > 1)
    others = f"\nAnd {len(refused) - 1} more: {', '.join(list(refused)[1:])}." if len(refused) > 1 else ""
    return (
        f"QK-Clip cannot tell which weights scale the logits of attention {name!r} ({type(own.module).__name__}):"
        f" {own.reason}. Its matrices: {matrices or 'none'}.\n"
        f"Describe it with specs={{{name!r}: AttentionSpec((Projection('wq', 'q(H d)'), Projection('wk', 'k(G d)')),"
        " num_heads, num_key_value_heads, {'d': head_dim})} (one fused weight: Projection('wqkv', '[q(H d) | k(G d) |"
        f" *]')), leave it alone with specs={{{name!r}: None}}, or only watch what cannot be told with unknown='monitor'."
        + others
    )
