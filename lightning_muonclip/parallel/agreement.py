"""Whether ranks that are about to share the work of Muon train the same model in the same way; compared at the first step.

Ranks that train alike hold equal weights, average their gradients, and use the same settings. Ranks that do not (independent
trials, DiLoCo's workers, the two sides of a GAN) would get updates of one another.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_muonclip.parallel.holders import has_others
from lightning_muonclip.parallel.shards import to_local

REMEDY = (
    "If each rank trains a model of its own, as in DiLoCo, or steps weights of its own, as under ZeroRedundancyOptimizer,"
    " pass the optimizer the process_group of the ranks that train together, such as dist.new_subgroups(1)[0] for a rank"
    " alone; else wrap the model in DDP or fully_shard"
)

_ONE_DTYPE = (
    "The fastest dtype depends on the device; where that differs between ranks, as between CPUs with and without bfloat16 in"
    " hardware, pass one, such as dtype='float32'"
)

#: Gradients of equal training differ between ranks by rounding alone, those of other data by their noise.
TOLERANCE = 1e-2

#: Settings of a group that ranks must share.
SETTINGS = (
    *("algorithm", "kind", "lr", "initial_lr", "weight_decay", "momentum", "nesterov"),
    *("ns_coefficients", "ns_steps", "eps", "adjust_lr_fn", "betas"),
    *("cautious_weight_decay", "second_moment", "second_moment_beta", "momentum_dtype", "steps"),
)


def check_models(
    groups: Sequence[Mapping[str, Any]],
    weights: Sequence[Tensor],
    group: dist.ProcessGroup | None,
    dtypes: Collection[torch.dtype] = (),
) -> None:
    """Compares what each rank is about to train, if it holds plain tensors; DTensors are shared by construction.

    A rank without any parameter takes part, so that the others do not wait for it.

    Args:
        groups: The parameter groups.
        weights: The matrices of Muon.
        group: The ranks that replicate plain tensors.
        dtypes: The dtypes in which this rank orthogonalizes; by default they depend on its kind of CPU.

    Raises:
        RuntimeError: If ranks differ in their matrices, their values, their settings, or their dtypes.
    """
    params = [p for own in groups for p in own["params"]]
    if not has_others(group):
        return
    if params and all(isinstance(p, DTensor) for p in params):
        return
    plain = [weight.detach() for weight in weights if not isinstance(weight, DTensor)]
    shapes = ", ".join(str(tuple(weight.shape)) for weight in plain[:8]) + (", ..." if len(plain) > 8 else "")
    full = [weight for weight in plain if weight.numel()]
    size = sum(torch.stack([norm.double() for norm in torch._foreach_norm(full)]).tolist()) if full else 0.0
    same = zlib.crc32(str([(weight.shape, weight.dtype) for weight in plain]).encode())
    settings = {key: [_plain(own.get(key)) for own in groups] for key in SETTINGS}
    settings["dtype"] = sorted(map(str, dtypes))
    digests = [zlib.crc32(str(values).encode()) if plain else 0 for values in settings.values()]
    device = params[0].device if params else _device(group)
    least, largest = extremes(torch.tensor([same, size, *digests], dtype=torch.float64, device=device), group)
    rank = dist.get_rank()
    if least[0] != largest[0]:
        raise RuntimeError(
            f"ranks have different matrices for Muon: rank {rank} has {len(plain)} of shapes {shapes or '(none)'}. Give all"
            f" ranks of a group the same parameters in the same order. {REMEDY}"
        )
    if largest[1] - least[1] > 1e-6 * abs(largest[1]):
        raise RuntimeError(
            f"ranks have different weight values, so they do not train the same model: on rank {rank} the sum of the"
            f" weights' norms is {size:.8g}, across ranks {least[1]:.8g} to {largest[1]:.8g}. {REMEDY}"
        )
    for (key, values), low, high in zip(settings.items(), least[2:], largest[2:]):
        if low != high:
            remedy = _ONE_DTYPE if key == "dtype" else REMEDY
            raise RuntimeError(f"ranks have different settings of Muon: rank {rank} has {key} {values}. {remedy}")


def gradients_agree(
    grads: Mapping[int, Tensor], shapes: Sequence[torch.Size], replicas: Sequence[str], group: dist.ProcessGroup
) -> bool:
    """Compares the gradients of ranks that hold the same part of each weight.

    Args:
        grads: Those of some weights, by number; of the same ones on every rank.
        shapes: The shapes of all weights.
        replicas: For each rank, what it holds; equal for ranks that hold the same.
        group: The ranks.

    Returns:
        Whether there was something to compare: gradients that are all zero or not finite show nothing.

    Raises:
        RuntimeError: If ranks have different gradients.
    """
    kinds = sorted(set(replicas))
    device = next((grad.device for grad in grads.values()), None)
    if device is None:
        return False
    own = torch.zeros(2, len(shapes), dtype=torch.float64, device=device)
    for i, grad in grads.items():
        own[:, i] = _probes(to_local(grad))
    table = own.new_full((len(kinds), 2, 2, len(shapes)), -math.inf)
    table[kinds.index(replicas[dist.get_rank(group)])] = torch.stack([-own, own])
    dist.all_reduce(table, op=dist.ReduceOp.MAX, group=group)
    low, high = -table[:, 0], table[:, 1]
    norm = high[:, 0]
    apart = ((high - low).amax(1) > TOLERANCE * norm).any(0).tolist()
    if any(apart):
        different = [str(tuple(shape)) for shape, is_apart in zip(shapes, apart) if is_apart]
        raise RuntimeError(
            f"ranks have different gradients, so they do not train the same model: on rank {dist.get_rank()} those of"
            f" {len(different)} of {len(shapes)} matrices differ from those of other ranks, of shapes"
            f" {', '.join(different[:8])}{', ...' if len(different) > 8 else ''}. {REMEDY}"
        )
    return bool(norm.sum())


def extremes(values: Tensor, group: dist.ProcessGroup | None) -> tuple[list[float], list[float]]:
    """The minimum and the maximum of every value over the ranks. Synchronizes with the host."""
    both = torch.stack([-values, values])
    try:
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    except RuntimeError as error:  # a rank has ended, or has sent something else
        raise RuntimeError(
            f"ranks could not be compared before a step of Muon, which all ranks of its group must take. {REMEDY}"
        ) from error
    least, largest = both.tolist()
    return [-low for low in least], largest


def _probes(grad: Tensor) -> Tensor:
    """The norm of a gradient, and a product with fixed vectors, which knows signs and places. Zeros if not finite."""
    if not grad.numel():
        return torch.zeros(2, dtype=torch.float64, device=grad.device)
    rows = grad.flatten(0, -2).to(torch.promote_types(grad.dtype, torch.float32))
    left, right = (torch.arange(size, device=grad.device).to(rows.dtype).cos() for size in rows.shape)
    norm = torch.linalg.vector_norm(grad, dtype=torch.float64)
    probes = torch.stack([norm, (rows @ right).double() @ left.double()])
    return torch.where(probes.isfinite().all(), probes, 0.0)


def _plain(value: Any) -> str:
    """A setting as text, with floats as exact as different machines compute them."""
    if isinstance(value, Tensor):
        value = value.item()
    if isinstance(value, (list, tuple)):
        return str([_plain(own) for own in value])
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where tensors of a rank without parameters are, as those of the others."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or dist.get_backend(group) == "gloo":
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
