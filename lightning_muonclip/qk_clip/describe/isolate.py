"""A copy of one module with random weights, to run alone on the inputs that the module was given."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from lightning_muonclip.qk_clip.describe.trace import Call, Product, Trace, tracing

#: Elements of parameters without values that are drawn at most: 4 GB of single precision.
MOST_WITHOUT_VALUES = 2**30


@dataclass
class Run:
    """What one forward of an isolated module shows.

    Attributes:
        calls: Its attention calls.
        products: Its products of two activations.
        rest: All else that depends on parameters: what enters the logits beside queries and keys, and the outputs.
        unfollowed: Names of functions that may have made its logits, and cannot be followed.
    """

    calls: list[Call]
    products: list[Product]
    rest: list[Tensor]
    unfollowed: list[str]


class Isolated:
    """A copy of a module whose parameters are random, so that none is zero or like another.

    Whole weights of the global shape are drawn for sharded ones; none is read. Where a module on the meta device or its
    inputs only stand for numbers, random ones are drawn for them too, on the CPU.

    Args:
        module: The module.
        args: What it was given.
        kwargs: The same by name.
        dtype: Of the copy.
        sums: Whether its logits may be sums of products.

    Raises:
        RuntimeError: If a module on the meta device is too large to draw numbers for it.
    """

    def __init__(
        self, module: nn.Module, args: Any, kwargs: Any, dtype: torch.dtype = torch.float64, sums: bool = True
    ) -> None:
        if (size := numel_without_values(module)) > MOST_WITHOUT_VALUES:
            raise RuntimeError(f"its {size:,} parameters have no values, and are too many to draw random ones")
        self.dtype, self.sums = dtype, sums
        self._inputs = args, kwargs
        self._drawn: dict[int, tuple[Tensor, Tensor]] = {}  # by id, with what it belongs to
        # The module's own hooks have acted on the inputs already; those of shards, and their state, have nothing to do here.
        memo: dict[int, Any] = {}
        for child in module.modules():
            is_sharded = isinstance(child, FSDPModule) or any(
                isinstance(p, DTensor) for p in child.parameters(recurse=False)
            )
            if child is module or is_sharded:
                dropped = [
                    value
                    for name, value in vars(child).items()
                    if name.endswith("_hooks") or name.startswith("__composable_api")
                ]
                memo |= {id(value): type(value)() for value in dropped}
        generator = torch.Generator().manual_seed(0)
        for param in module.parameters():
            if _is_real(param):
                device = torch.device("cpu") if param.is_meta else param.device
                noise = torch.randn(param.shape, generator=generator).to(device, dtype)
                fan_in = max(noise[0].numel(), 1) if param.ndim > 1 else 1
                memo[id(param)] = nn.Parameter(1 + noise / 2 if param.ndim < 2 else noise.mul_(fan_in**-0.5))
        memo |= {id(buffer): self._numbers(buffer) for buffer in module.buffers() if buffer.is_meta}
        with DetachedCopies(), _without_fsdp(module):
            self.module = copy.deepcopy(module, memo).to(dtype)
        _normalize_by_batch(self.module)
        for child in self.module.modules():
            child.training = child is self.module  # without dropout, and not by a path for evaluation
        self.params = {name: p for name, p in self.module.named_parameters() if _is_real(p)}

    def run(self, products: Sequence[Product] = (), factor: float = 1.0) -> Run:
        """One forward; products of an earlier one answer for its own, and a factor multiplies all projections."""
        with DetachedCopies():
            args, kwargs = tree_map(self._copied, self._inputs)
        trace = Trace((args, kwargs), products, self.sums, factor)
        with apart(self.module), _full_precision(), torch.enable_grad(), tracing(trace):
            output = self.module(*args, **kwargs)
        rest = [tensor for call in trace.calls for tensor in call.rest]
        rest += [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        return Run(trace.calls, trace.products, rest, trace.unfollowed)

    @contextmanager
    def scaled(self, factors: Mapping[str, Tensor], offsets: Mapping[str, float] = {}) -> Iterator[None]:
        """Multiplies parameters, plus their offsets, by factors that broadcast, for a while."""
        before = {name: self.params[name].data for name in factors}
        try:
            for name, factor in factors.items():
                offset = offsets.get(name, 0.0)
                # Other memory, for queries may be views of a parameter; by .data, which leaves an earlier graph valid.
                scaled = (before[name] + offset if offset else before[name]) * factor.to(before[name])
                self.params[name].data = scaled - offset if offset else scaled
            yield
        finally:
            for name, value in before.items():
                self.params[name].data = value

    @torch.no_grad()
    def run_under(self, mode: TorchFunctionMode) -> None:
        """One forward under another mode."""
        with DetachedCopies():
            args, kwargs = tree_map(self._copied, self._inputs)
        with apart(self.module), _full_precision(), mode:
            self.module(*args, **kwargs)

    def _copied(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            leaf = self._numbers(leaf) if leaf.is_meta else leaf
            return leaf.detach().to(self.dtype, copy=True) if leaf.is_floating_point() else leaf.clone()
        return leaf if isinstance(leaf, nn.Module) else _cast(copy.deepcopy(leaf), self.dtype)

    def _numbers(self, stand_in: Tensor) -> Tensor:
        """Random numbers for a tensor that has none, the same for each of its uses; a mask hides nothing."""
        if id(stand_in) not in self._drawn:
            generator = torch.Generator().manual_seed(4 + len(self._drawn))
            shape, dtype = stand_in.shape, stand_in.dtype
            if dtype.is_floating_point or dtype.is_complex:
                numbers = torch.randn(shape, generator=generator).to(dtype)
            else:
                numbers = torch.full(shape, dtype is torch.bool, dtype=dtype)
            self._drawn[id(stand_in)] = numbers, stand_in
        return self._drawn[id(stand_in)][0]


def numel_without_values(module: nn.Module) -> int:
    """The number of elements of parameters on the meta device."""
    return sum(param.numel() for param in module.parameters() if param.is_meta)


def _normalize_by_batch(model: nn.Module) -> list[nn.Module]:
    """Lets norms whose training is by the batch do so in evaluation, which asks no other rank and counts nothing."""
    norms = [
        module
        for module in model.modules()
        if getattr(module, "track_running_stats", False) and (module.training or not model.training)
    ]
    for norm in norms:
        norm.track_running_stats = False  # type: ignore[assignment]
        norm.running_mean = norm.running_var = None  # type: ignore[assignment]
    return norms


def _is_real(param: Tensor) -> bool:
    return param.is_floating_point() and param.itemsize > 1 and param.numel() > 0


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    """Tensors in an object such as a cache of keys."""
    for value in vars(leaf).values() if hasattr(leaf, "__dict__") else ():
        for layer in value if isinstance(value, list) else ():
            for name, tensor in vars(layer).items() if hasattr(layer, "__dict__") else ():
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    setattr(layer, name, tensor.to(dtype))
    return leaf


@contextmanager
def _without_fsdp(module: nn.Module) -> Iterator[None]:
    """Gives the units of FSDP2, which refuse to be copied, back the class that they were made from."""
    units = {child: type(child) for child in module.modules() if isinstance(child, FSDPModule)}
    try:
        for child, cls in units.items():
            child.__class__ = cls.__bases__[1]
        yield
    finally:
        for child, cls in units.items():
            child.__class__ = cls


class DetachedCopies(TorchFunctionMode):
    """Lets deepcopy copy non-leaf tensors, as detached clones."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self._known = WeakIdKeyDictionary() if shared else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        version, copy = (None, None) if self._known is None else self._known.get(tensor, (None, None))
        if copy is None or version != tensor._version:
            copy = tensor.detach().clone()
            if self._known is not None:
                self._known[tensor] = tensor._version, copy
        memo[id(tensor)] = copy
        return copy


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's parameters."""
    return next((param.device for param in module.parameters()), torch.device("cpu"))


@contextmanager
def _full_precision() -> Iterator[None]:
    """Disables autocast."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def apart(module: nn.Module) -> Iterator[None]:
    """Runs code in the middle of a forward that is none of its business.

    torch.compile and activation checkpointing are disabled, and random number generators keep their state.
    """
    devices = {param.device for param in module.parameters() if param.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    indices = [device.index or 0 for device in devices]
    state = random.getstate()
    torch.clear_autocast_cache()
    reentrant = checkpointing.CheckpointFunction
    checkpointing.CheckpointFunction = _Plain  # type: ignore[misc, assignment]
    _apart.append(module)
    try:
        with (
            torch.random.fork_rng(indices, device_type=kind),
            torch.compiler.set_stance("force_eager"),
            torch.autograd.graph.saved_tensors_hooks(_same, _same),
        ):
            yield
    finally:
        _apart.pop()
        checkpointing.CheckpointFunction = reentrant  # type: ignore[misc]
        torch.clear_autocast_cache()  # of casts without a gradient, or of other weights
        random.setstate(state)


class _Plain:
    """What is checkpointed in the reentrant way, which makes no graph, runs as it is."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def is_apart() -> bool:
    """Whether such code is running."""
    return bool(_apart)


#: What runs so, innermost last.
_apart: list[nn.Module] = []


def _same(x: Any) -> Any:
    return x


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluates the model, and puts back its modes and buffers.

    In training, a layer may be dropped by chance; torch's fast path of evaluation hides attention. Norms by the batch stay
    so: with the statistics of a new model, they would leave next to nothing of the inputs of later layers.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m.named_buffers(recurse=False)]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    norms: list[nn.Module] = []
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        norms = _normalize_by_batch(model)
        for module in modes:
            module.training = False  # not eval(), by which some modules merge their weights
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, name, buffer, before in buffers:
            buffer.data.copy_(before)  # by .data, since a graph may have saved it
            module._buffers[name] = buffer
        for norm in norms:
            norm.track_running_stats = True  # type: ignore[assignment]
        for module, training in modes.items():
            module.training = training
