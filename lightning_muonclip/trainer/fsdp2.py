"""``Trainer(strategy="fsdp2")``: shards a LightningModule block by block with FSDP2."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

#: What chooses the modules to shard.
Wrap = type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[nn.Module], bool]

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class FSDP2Strategy(ModelParallelStrategy):
    """Shards parameters, gradients and optimizer states over all devices with FSDP2 (``fully_shard``).

    Blocks are sharded one by one, so that only the weights of one block at a time are gathered, and then the rest of the
    LightningModule. A LightningModule that shards itself in ``configure_model`` stays as it is. With ``bf16-mixed`` or
    ``16-mixed`` precision, weights are gathered in half precision and gradients are reduced in single precision.

    Args:
        wrap: The modules to shard one by one: a class, a tuple of classes, or a function from a module to whether it is one.
            ``None`` takes repeated blocks: the children of a ``ModuleList`` or ``Sequential`` that have a class in common
            and contain modules themselves. Experts inside of a block are gathered with it, whether they get tokens or not.
        reshard_after_forward: Whether the weights of a block are freed after its forward, and gathered again for its
            backward; or the number of devices to reshard them over (see :func:`torch.distributed.fsdp.fully_shard`).
        cpu_offload: Whether parameters, gradients and optimizer states are in the memory of the CPU, where the optimizer
            steps.
        save_distributed_checkpoint: Whether every rank saves its own shards into a folder; otherwise one file has all.
        process_group_backend: The backend of the process group; ``None`` chooses by device.
        timeout: Of a collective.

    Raises:
        ValueError: In ``setup``, if ``wrap`` chooses no module, or one that shares a weight with a module outside of it.

    Example::

        trainer = Trainer(strategy="fsdp2", devices=8, callbacks=[MuonClipCallback()])
        trainer = Trainer(strategy=FSDP2Strategy(wrap=LlamaDecoderLayer, cpu_offload=True), devices=8)
    """

    def __init__(
        self,
        wrap: Wrap | None = None,
        reshard_after_forward: bool | int = True,
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        if cpu_offload and process_group_backend is None and torch.cuda.is_available():
            process_group_backend = "cpu:gloo,cuda:nccl"  # the optimizer exchanges what is on the CPU
        super().__init__(1, 1, save_distributed_checkpoint, process_group_backend, timeout)
        self.wrap = wrap
        self.reshard_after_forward = reshard_after_forward
        self.cpu_offload = cpu_offload

    def setup_environment(self) -> None:
        """Connects the processes; all of them are data-parallel."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """Shards what ``configure_model`` has not, and sets up the optimizers."""
        assert self.lightning_module is not None
        if not _is_sharded(self.lightning_module):
            self._shard(self.lightning_module)
        with _configured(self.lightning_module):
            super().setup(trainer)

    def model_to_device(self) -> None:
        """Moves the module to its device, unless its weights stay on the CPU; FSDP2 has moved its buffers."""
        if not self.cpu_offload:
            super().model_to_device()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates a batch without inference mode, whose tensors FSDP2 could not write to in the next training step."""
        with _without_inference_mode():
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Tests a batch, likewise."""
        with _without_inference_mode():
            return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Predicts a batch, likewise."""
        with _without_inference_mode():
            return super().predict_step(*args, **kwargs)

    def _shard(self, module: pl.LightningModule) -> None:
        options: dict[str, Any] = {"mesh": self.device_mesh["data_parallel"], "mp_policy": self._mixed_precision()}
        if self.cpu_offload:
            if any(param.is_meta for param in module.parameters()):
                raise ValueError(
                    "cpu_offload=True needs weights with values, but some of the module's are on the meta device;"
                    " create the module on the CPU"
                )
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda")
        units = repeated_blocks(module) if self.wrap is None else chosen_modules(module, self.wrap)
        for unit in units:
            fully_shard(unit, reshard_after_forward=self.reshard_after_forward, **options)
        # The batch keeps its precision: labels and times may need it.
        options["mp_policy"] = replace(options["mp_policy"], cast_forward_inputs=False)
        fully_shard(module, **options)
        for step in _STEPS:  # they need not call forward
            register_fsdp_forward_method(module, step)
        _tell(module, units)

    def _mixed_precision(self) -> MixedPrecisionPolicy:
        if not isinstance(self.precision_plugin, MixedPrecision):
            return MixedPrecisionPolicy()
        dtype = torch.float16 if self.precision_plugin.precision == "16-mixed" else torch.bfloat16
        return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks of a network, the inner ones first; those that share weights with other modules are left out.

    Args:
        module: The network.
    """
    return [unit for unit in dict.fromkeys(_blocks(module, False)) if not _shared_names(module, unit)]


def chosen_modules(module: nn.Module, wrap: Wrap) -> list[nn.Module]:
    """The modules that ``wrap`` chooses, the inner ones first.

    Raises:
        ValueError: If there is none, or if one shares a weight with a module outside of it.
    """
    is_chosen = (lambda own: isinstance(own, wrap)) if isinstance(wrap, (type, tuple)) else wrap
    units = [own for own in reversed(list(module.modules())) if own is not module and is_chosen(own)]
    if not units:
        known = ", ".join(sorted({type(own).__name__ for own in module.modules() if list(own.children())}))
        raise ValueError(f"wrap={wrap!r} chooses no module of {type(module).__name__}; its modules are {known}")
    for unit in units:
        if shared := _shared_names(module, unit):
            raise ValueError(
                f"wrap={wrap!r} chooses a {type(unit).__name__} that shares {shared[0]} with a module outside of it, so that"
                " they cannot be sharded apart; choose a module that contains both"
            )
    return units


@contextmanager
def _without_inference_mode() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def _blocks(module: nn.Module, is_inside: bool) -> Iterator[nn.Module]:
    counts = Counter(map(type, module)) if isinstance(module, (nn.ModuleList, nn.Sequential)) else Counter()
    for child in module.children():
        if is_inside and isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            continue  # an expert that gets no tokens on one rank would never be gathered there; a Sequential runs whole
        parts = (
            [own for grandchild in child.children() for own in grandchild.children()] if is_inside else child.children()
        )
        is_block = counts[type(child)] > 1 and any(True for _ in parts) and _runs(child)
        yield from _blocks(child, is_inside or is_block)
        if is_block:
            yield child


def _runs(module: nn.Module) -> bool:
    """Whether a module has a forward and parameters: a ``ModuleList`` has none."""
    return not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and any(True for _ in module.parameters())


def _shared_names(module: nn.Module, unit: nn.Module) -> list[str]:
    """The parameters of a unit that a module outside of it has too."""
    holders: dict[Tensor, set[nn.Module]] = defaultdict(set)
    for own in module.modules():
        for param in own.parameters(recurse=False):
            holders[param].add(own)
    inside = set(unit.modules())
    return [name for name, param in unit.named_parameters() if not holders[param] <= inside]


def _is_sharded(module: nn.Module) -> bool:
    return any(isinstance(own, FSDPModule) for own in module.modules()) or any(
        isinstance(param, DTensor) for param in module.parameters()
    )


@contextmanager
def _configured(module: pl.LightningModule) -> Iterator[None]:
    """Lightning insists on a ``configure_model``; what it would do is done."""
    if is_overridden("configure_model", module):
        yield
        return
    module.configure_model = lambda: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.configure_model


def _tell(module: pl.LightningModule, units: Sequence[nn.Module]) -> None:
    counts = Counter(type(unit).__name__.removeprefix("FSDP") for unit in units)
    if counts:
        blocks = ", ".join(f"{count} {name}" for name, count in counts.items())
        rank_zero_info(f"FSDP2 shards {blocks}, one by one, and the rest of the module together")
    else:
        rank_zero_warn(
            f"FSDP2 finds no repeated blocks in {type(module).__name__.removeprefix('FSDP')}, so that all weights are"
            " gathered at once; choose modules by FSDP2Strategy(wrap=...)"
        )


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Shards any LightningModule block by block with FSDP2")
