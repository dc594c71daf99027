"""What muP can tell only in a forward: by which number attention scales its logits, and how output heads are applied."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils._pytree import tree_leaves, tree_map

from lightning_muonclip.qk_clip.describe.count import Frame
from lightning_muonclip.qk_clip.describe.describe import FAILURES
from lightning_muonclip.qk_clip.describe.find import Example, first_samples
from lightning_muonclip.qk_clip.describe.isolate import DetachedCopies, apart, device_of, is_apart, undisturbed
from lightning_muonclip.qk_clip.describe.scale import Logits, logits_of, numbers_of, power_of
from lightning_muonclip.qk_clip.describe.survey import Survey, kept, run_watched
from lightning_muonclip.qk_clip.observe.eager import eager
from lightning_muonclip.qk_clip.observe.recorder import ReportsMaxLogits
from lightning_muonclip.values import has_values

#: Nodes of the autograd graph that leave a weight what it is.
_SAME = re.compile(
    r"(T|Transpose|Permute|View|UnsafeView|ReshapeAlias|Alias|Expand|Unsqueeze|Squeeze|ToCopy|Clone|Slice)$"
)

#: Products of an input and a weight, and which operand is the weight.
_APPLIES = {"Mm": 1, "Addmm": 2, "Bmm": 1, "Baddbmm": 2, "Linear": 1, "MkldnnLinear": 1}


class Multiplier:
    """A hook that multiplies the input of a module or, as a forward hook, its output."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        #: Whether it has acted in a forward with gradients.
        self.used = False

    def __call__(self, module: nn.Module, args: Any, output: Tensor | None = None) -> Any:
        """The hook."""
        self.used = self.used or torch.is_grad_enabled()
        return (args[0] * self.factor, *args[1:]) if output is None else output * self.factor


class Forwards:
    """Watches the first forwards of a model in muP, until every module has run in one with gradients.

    Before a module runs for the first time, the attention in it is compared with that of the base, on the same inputs. If
    its heads have grown, the number by which it scales its logits is found by what follows it, and set. After a forward
    with gradients its graph tells whether the weight of an output head was applied past the head's multiplier.

    Args:
        model: The model.
        base: The same at the base width.
        counterpart: Finds the base's module by the name of the model's.
        sizes: Sizes of the model that have grown, and those in the base.
        scaling: For modules whose logits muP scales, the new factor and the old; extended by what is found.
        heads: The multipliers on the input of output heads, by the name of the head.
        tables: The same factors for weights that are no heads, unless they are applied as such, by parameter name.
    """

    def __init__(
        self,
        model: nn.Module,
        base: nn.Module,
        counterpart: Callable[[str], nn.Module],
        sizes: Mapping[int, int],
        scaling: dict[str, tuple[float, float]],
        heads: Mapping[str, Multiplier],
        tables: Mapping[str, float],
    ) -> None:
        self._model, self._base, self._counterpart, self._sizes = model, base, counterpart, sizes
        self._scaling, self._heads, self._tables = scaling, heads, tables
        self._names = {module: name for name, module in model.named_modules()}
        self._surveyed: set[nn.Module] = set()
        self._asked: set[str] = set()
        #: The modules that have run in the forward that goes on; ``None`` outside of one.
        self._running: set[nn.Module] | None = None
        self._leaving: Any = None
        #: The weights in that forward, by id, and their names; under FSDP2 they come and go.
        self._weights: dict[int, tuple[Tensor, list[str]]] = {}
        self._handles = {
            module: module.register_forward_pre_hook(self, prepend=True, with_kwargs=True)
            for module in self._names
            if not isinstance(module, torch.jit.ScriptModule)
        }
        # Outside of all forwards, as in a training_step, only a gradient tells that a head was applied.
        weights = [param for _, param in model.named_parameters(remove_duplicate=False)]
        self._on_gradient = {
            name: weight.register_hook(_Gradient(self, name))
            for name in heads
            if (weight := _weight(model, name)).requires_grad and sum(weight is own for own in weights) == 1
        }
        eager.acquire(self)

    def multiplier(self, name: str) -> float:
        """The factor on the input of a head, or of another weight, which is not refused from now on."""
        factor = self._heads[name].factor if name in self._heads else self._tables[name]
        self._asked.add(name)
        return factor

    def run(self, example: Example) -> None:
        """Runs the model on an example and tells now what its forwards would tell later."""
        self.prepare(self._model, *example)
        with apart(self._model), undisturbed(self._model), torch.enable_grad():
            self._check_heads(self._model(*example[0], **example[1]))
        for multiplier in self._heads.values():
            multiplier.used = False  # training may go another way

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The hook on every module."""
        if not torch.compiler.is_compiling() and not is_apart():
            self._entered(module, args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _entered(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._running is not None:
            self._running.add(module)
            self._note_weights()
            return
        if "forward" in vars(module) and getattr(vars(module)["forward"], "__self__", None) is not module:
            return  # a strategy has put another function in its place, to be called once
        if torch.is_inference_mode_enabled() or not has_values((args, kwargs, list(module.parameters()))):
            return
        self.prepare(module, args, kwargs)
        self._running = {module}
        self._leaving = module.register_forward_hook(self._leave, always_call=True)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        ran, self._running = self._running or (), None
        self._leaving.remove()
        eager.release(self)
        if any(leaf.requires_grad for leaf in _tensors(output)):
            self._check_heads(output)
            for own in ran:
                if own in self._handles:
                    self._handles.pop(own).remove()
            for name in [name for name in self._on_gradient if self._heads[name].used]:
                self._on_gradient.pop(name).remove()
        self._weights = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self._model) not in memo:
            return _nothing  # the hook on a module that is copied alone
        new = object.__new__(type(self))
        memo[id(self)] = new
        vars(new).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return new

    # Attention ------------------------------------------------------------------------------------------------------

    def prepare(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Scales the logits of all attention whose heads have grown, in a module that is about to run for the first time.

        Raises:
            ValueError: If no number does that.
        """
        if module in self._surveyed:
            return
        at_base, ran_at_base = self._at_base(module, args, kwargs)
        if ran_at_base and not at_base:  # nothing to compare, so that the model need not run twice
            self._surveyed |= {m for m, name in self._names.items() if self._counterpart(name) in ran_at_base}
            return
        calls, ran = self._attention(module, args, kwargs)
        unknown = []
        for attention, own in calls.items():
            if any(isinstance(frame.module, ReportsMaxLogits) for frame in own[0][0]):
                continue  # our own, whose number is known
            dims, base_dims = [dim for _, dim in own], at_base.get(self._counterpart(self._names[attention]), [])
            if len(dims) != len(base_dims) and len(set(dims)) == len(set(base_dims)) == 1:
                dims, base_dims = dims[:1], base_dims[:1]
            growths = {new / old for new, old in zip(dims, base_dims)}
            if len(dims) != len(base_dims) or len(growths) != 1:
                unknown.append(self._names[attention])
            elif growths != {1.0}:
                self._scale(own[0][0], dims[0], base_dims[0])
        self._surveyed |= ran
        unknown = [name for name in unknown if name not in self._scaling]
        if unknown:
            warnings.warn(
                f"muP cannot tell whether the heads of attention {', '.join(map(repr, unknown))} have grown, since the base"
                " does not attend there on the model's inputs; if they have, their logits must be scaled by"
                " sqrt(d_base) / d: increase the number of heads instead, or set the scale by hand",
                stacklevel=2,
            )

    def _attention(self, root: nn.Module, args: Any, kwargs: Any) -> tuple[dict[nn.Module, Any], set[nn.Module]]:
        """The attention calls of a forward, by the innermost module that was there when muP began, and what ran."""
        survey = _survey(root, args, kwargs)
        calls: dict[nn.Module, list[tuple[list[Frame], int]]] = {}
        for stack, dim in _calls(survey):
            known = [frame for frame in stack if frame.module in self._names]
            if known:
                calls.setdefault(known[-1].module, []).append((known, dim))
        return calls, survey.modules

    def _at_base(self, root: nn.Module, args: Any, kwargs: Any) -> tuple[dict[nn.Module, list[int]], set[nn.Module]]:
        """The head dimensions of the attention of the base, on the same inputs, and what ran; nothing if it cannot run."""
        base = self._counterpart(self._names[root])
        dtype = next((p.dtype for p in base.parameters() if p.is_floating_point()), torch.float32)

        def cast(leaf: Any) -> Any:
            leaf = kept(leaf)
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.to(device_of(base), dtype if leaf.is_floating_point() else None)

        def cut(leaf: Any) -> Any:  # hidden states, of the model's width
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or not leaf.ndim:
                return leaf
            return leaf[..., : self._sizes.get(leaf.shape[-1], leaf.shape[-1])]

        with DetachedCopies():
            inputs = tree_map(cast, (args, kwargs))
        for own in (inputs, tree_map(cut, inputs)):
            with suppress(*FAILURES):
                survey = _survey(base, *own)
                known = {self._counterpart(name) for name in self._names.values()}
                dims: dict[nn.Module, list[int]] = {}
                for stack, dim in _calls(survey):
                    inside = [frame.module for frame in stack if frame.module in known]
                    if inside and not any(isinstance(frame.module, ReportsMaxLogits) for frame in stack):
                        dims.setdefault(inside[-1], []).append(dim)
                return dims, survey.modules
        return {}, set()

    def _scale(self, stack: list[Frame], dim: int, base_dim: int) -> None:
        """Finds the number that scales the logits of an attention, and sets it."""
        growth = dim / base_dim
        for depth, frame in reversed(list(enumerate(stack, 1))):
            name = self._names[frame.module]
            base = self._counterpart(name)
            # A survey keeps the inputs of modules with parameters.
            around = next((f for f in reversed(stack[:depth]) if any(True for _ in f.module.parameters())), frame)
            plain: Logits | None = None
            for attribute, value in list(numbers_of(frame.module)):
                at_base = getattr(base, attribute, None)
                if not at_base:
                    continue
                plain = plain or logits_of(around)
                power = power_of(around, frame.module, attribute, value, plain)
                if power:
                    wanted = float(at_base) * growth**-power
                    _, old = self._scaling.get(name, (0.0, float(value) ** power))
                    if wanted != float(value):
                        setattr(frame.module, attribute, value * 0 + wanted)
                    if wanted**power != old:
                        self._scaling[name] = wanted**power, old
                    return
            if name in self._scaling and plain is not None and not plain.logits:
                return  # a kernel that torch does not see, given a number called scaling
        name, cls = self._names[stack[-1].module], type(stack[-1].module).__name__
        raise ValueError(
            f"the heads of attention {name!r} ({cls}) have {dim} channels, but {base_dim} in the base: muP scales its"
            " logits by 1 / d instead of 1 / sqrt(d), and no number that it holds scales them. Keep one, such as"
            " self.scaling = head_dim**-0.5, and use it (scale=self.scaling in scaled_dot_product_attention), or increase"
            " the number of heads instead"
        )

    # Heads ----------------------------------------------------------------------------------------------------------

    def _note_weights(self) -> None:
        for name in (*self._heads, *self._tables):
            weight = _weight(self._model, name)
            _, names = self._weights.setdefault(id(weight), (weight, []))
            if name not in names:
                names.append(name)

    def _check_heads(self, output: Any) -> None:
        self._note_weights()
        weights, self._weights = self._weights, {}
        for weight in _applied(output, weights):
            self._check_head(weights[weight][1])

    def _check_head(self, names: list[str]) -> None:
        if self._asked.intersection(names) or any(name in self._heads and self._heads[name].used for name in names):
            return
        name = names[0]
        factor = self._heads[name].factor if name in self._heads else self._tables[name]
        weight = f"{name}.weight" if name in self._heads else name
        raise ValueError(
            f"the output head {weight} is applied without {name} being called, so that its input is not multiplied by"
            f" muP's {factor:.4g}; call the module, or multiply the input by multiplier({name!r}) of what parametrize"
            " returned"
            if name in self._heads
            else f"{weight} is applied as an output head, whose input muP multiplies by {factor:.4g}; multiply it by"
            f" multiplier({name!r}) of what parametrize returned, or apply a module nn.Linear with this weight"
        )


class _Gradient:
    """The hook on the weight of a head."""

    def __init__(self, forwards: Forwards, name: str) -> None:
        self._forwards, self._name = forwards, name

    def __call__(self, grad: Tensor) -> None:
        handle = self._forwards._on_gradient.pop(self._name, None)
        if handle is not None:
            handle.remove()
            self._forwards._check_head([self._name])


def _nothing(*_: Any) -> None:
    """A hook."""


def _weight(model: nn.Module, name: str) -> Tensor:
    """The weight of a module or a parameter, by name."""
    owner, _, leaf = name.rpartition(".")
    found = getattr(model.get_submodule(owner), leaf)
    return getattr(found, "weight", found)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _survey(root: nn.Module, args: Any, kwargs: Any) -> Survey:
    """A survey of a forward; on a few samples, if the module does not insist on the size of its batch."""
    part = first_samples((args, kwargs))
    if part is not None:
        with suppress(*FAILURES):
            return run_watched(root, *part, Survey(root))
    return run_watched(root, args, kwargs, Survey(root))


def _calls(survey: Survey) -> Iterator[tuple[list[Frame], int]]:
    """The stack and the head dimension of every attention call; of kernels that may attend, where nothing else does."""
    yield from zip(survey.calls, survey.head_dims)
    inside = {frame.module for stack in survey.calls for frame in stack}
    yield from ((stack, dim) for _, stack, dim in survey.opaque if stack and stack[-1].module not in inside)


def _applied(output: Any, weights: Collection[int]) -> Iterator[int]:
    """The ids of the weights that the graph of an output applies to some input."""
    nodes: list[tuple[Any, Any, int]] = [(leaf.grad_fn, None, 0) for leaf in _tensors(output)]
    seen: set[tuple[Any, Any, int]] = set()
    while nodes:
        node, consumer, place = own = nodes.pop()
        if node is None or own in seen:
            continue
        seen.add(own)
        variable = getattr(node, "variable", None)
        function = getattr(type(node), "_forward_cls", None)
        is_torchs = function is not None and function.__module__.startswith("torch.")  # as of DTensor
        if variable is not None:
            if id(variable) in weights and _applies(consumer, place, variable):
                yield id(variable)
        elif _SAME.match(_kind(node)) or is_torchs:  # what it leads to is used by what uses it
            nodes += [(child, consumer, place) for child, _ in node.next_functions]
        else:
            nodes += [(child, node, place) for place, (child, _) in enumerate(node.next_functions)]


def _applies(node: Any, place: int, weight: Tensor) -> bool:
    """Whether a node multiplies an input by a weight (out, in), which is its operand at a place."""
    if isinstance(node, BackwardCFunction):  # a fused cross-entropy
        return True
    if place != _APPLIES.get(_kind(node)):
        return False
    sizes = getattr(node, "_saved_mat2_sym_sizes", (weight.shape[-1],))
    return int(sizes[0]) == weight.shape[-1]  # else a one-hot input looks up


def _kind(node: Any) -> str:
    return "" if node is None else re.sub(r"Backward\d*$", "", node.name())
