"""The state of a weight of Muon: its dtype, its shape, and which rank has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_muonclip.optim.options import as_dtype
from lightning_muonclip.optim.parts import Parts
from lightning_muonclip.optim.second_moment import state_shape
from lightning_muonclip.parallel.shards import sharded_dims, to_local


def momentum_buffer(state: dict[str, Any], grad: Tensor, group: Mapping[str, Any]) -> Tensor:
    """The momentum of a weight, zero at first."""
    if "momentum_buffer" not in state:
        dtype = as_dtype(group["momentum_dtype"])
        state["momentum_buffer"] = torch.zeros_like(grad, dtype=dtype, memory_format=torch.preserve_format)
    return state["momentum_buffer"]


def second_moment(state: dict[str, Any], param: Tensor, group: Mapping[str, Any], parts: Parts | None) -> Tensor | None:
    """The running means of a weight, zero at first; ``None`` without the option.

    They are sharded as the experts are; of other weights, all ranks have all of them.
    """
    if group["second_moment"] is None:
        return None
    shape = torch.Size(state_shape(param.shape, group["kind"], parts))
    if "second_moment" in state and state["second_moment"].shape == shape:  # parts may have become known
        return state["second_moment"]
    own = to_local(param)
    dtype = torch.promote_types(own.dtype, torch.float32)
    zeros = torch.zeros(shape, dtype=dtype, device=own.device)
    if isinstance(param, DTensor) and has_whole_matrices(param, group["kind"]):
        local = torch.zeros(state_shape(own.shape, group["kind"], parts), dtype=dtype, device=own.device)
        mesh, placements = param.device_mesh, param.placements
        zeros = DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=zeros.stride())
    state["second_moment"] = zeros
    return zeros


def restore_dtypes(
    states: Mapping[Tensor, dict[str, Any]], groups: Sequence[Mapping[str, Any]], saved: Mapping[str, Any]
) -> None:
    """Gives loaded states the dtypes that they were saved in; torch gives them those of the weights."""
    numbers = [i for group in saved["param_groups"] for i in group["params"]]
    params = [p for group in groups for p in group["params"]]
    for i, p in zip(numbers, params):
        for key in ("momentum_buffer", "second_moment"):
            tensor = saved["state"].get(i, {}).get(key)
            if tensor is not None and tensor.dtype != states[p][key].dtype:
                states[p][key] = tensor.to(states[p][key].device, copy=True)


def has_whole_matrices(param: Tensor, kind: str) -> bool:
    """Whether every matrix is whole on one rank, as in an expert stack that is sharded by experts."""
    dims = sharded_dims(param)
    return kind == "experts" and bool(dims) and max(dims) < param.ndim - 2
