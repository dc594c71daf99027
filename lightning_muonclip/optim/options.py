"""Checks of Muon's options, parameters and states."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_muonclip.optim.coefficients import SCHEDULES, resolve_schedule
from lightning_muonclip.optim.schedules import Schedule, at_step

#: Update scale by shape (m, n) of the weight, m being fan-out. Names are those of torch.optim.Muon.
LR_ADJUSTMENTS: dict[str, Callable[[int, int], float]] = {
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),  # Keller Jordan (2024)
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),  # Moonlight, arXiv 2502.16982, section 2.2
    "spectral_unclamped": lambda m, n: math.sqrt(m / n),  # the muP scale: Yang et al., arXiv 2310.17813
}

#: What a group of a checkpoint of torch.optim.Muon lacks.
NOT_OF_TORCH: dict[str, Any] = {
    "algorithm": "muon",
    "kind": "matrix",
    "cautious_weight_decay": False,
    "second_moment": None,
    "second_moment_beta": 0.95,
    "momentum_dtype": None,
}

ADAMW_DEFAULTS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}


def check_muon_options(
    lr: float | Tensor,
    weight_decay: float | Schedule,
    momentum: float | Schedule,
    nesterov: bool,
    ns_coefficients: Any,
    adjust_lr_fn: str | None,
    eps: float,
    ns_steps: int | None,
    dtype: torch.dtype | str | None = None,
    stack_numel: int | None = None,
    second_moment: str | None = None,
    second_moment_beta: float = 0.95,
    momentum_dtype: torch.dtype | str | None = None,
    **_: Any,
) -> None:
    """Raises ValueError if an option is out of range, with its value and what is possible."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"a tensor lr must have one element, got shape {tuple(lr.shape)}")
    for name, value in {"lr": lr, "weight_decay": at_step(weight_decay, 0), "eps": eps}.items():
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if not 0 <= at_step(momentum, 0) < 1:
        raise ValueError(f"momentum must be in [0, 1), got {at_step(momentum, 0)}")
    if adjust_lr_fn is not None and adjust_lr_fn not in LR_ADJUSTMENTS:
        raise ValueError(f"unknown adjust_lr_fn {adjust_lr_fn!r}; use one of {', '.join(LR_ADJUSTMENTS)}, or None")
    if stack_numel is not None and (not isinstance(stack_numel, int) or stack_numel < 1):
        raise ValueError(f"stack_numel must be a positive integer, or None for the default; got {stack_numel!r}")
    if second_moment not in (None, "rows"):
        raise ValueError(f"unknown second_moment {second_moment!r}; use 'rows', or None")
    if not 0 <= second_moment_beta < 1:
        raise ValueError(f"second_moment_beta must be in [0, 1), got {second_moment_beta}")
    resolve_schedule(ns_coefficients, ns_steps)
    as_dtype(dtype)
    as_dtype(momentum_dtype, "momentum_dtype")


def as_dtype(dtype: torch.dtype | str | None, option: str = "dtype") -> torch.dtype | None:
    """The dtype of this name, such as ``"float32"``, or itself. Raises ValueError unless it is floating-point."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"{option} must be a floating-point torch.dtype, its name, or None; got {dtype!r}")
    return found


def dtype_name(dtype: torch.dtype | str | None) -> str | None:
    """The name of a dtype, which every checkpoint can hold."""
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


def check_params(params: Any) -> None:
    """Raises TypeError if a model was given instead of its parameters."""
    if isinstance(params, nn.Module):
        raise TypeError(
            f"Muon expects parameters, named parameters, or groups of them, got the model {type(params).__name__}; use"
            " Muon(split_params(model), ...), or MuonClip(model, ...)"
        )


def check_matrices(group: dict[str, Any]) -> None:
    """Raises ValueError if a parameter of a group is not a matrix of the group's kind."""
    names = group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
    fits = {"matrix": lambda p: p.ndim == 2, "experts": lambda p: p.ndim >= 3, "convolution": lambda p: p.ndim >= 3}
    for name, p in zip(names, group["params"]):
        if isinstance(p, UninitializedParameter):
            raise ValueError(
                f"{name} is an UninitializedParameter of a lazy module and has no shape yet; run a forward first, then"
                " create the optimizer"
            )
        if p.is_complex() or not fits[group["kind"]](p):
            raise ValueError(
                f"{name} is not a real matrix: it has shape {tuple(p.shape)} and dtype {p.dtype} in a group of kind"
                f" {group['kind']!r}. Move it to a group with kind='experts' if it is a batch of matrices, with"
                " kind='convolution' if it is a convolution weight (out, in, kernel...), or with algorithm='adamw';"
                " split_params does so"
            )


def check_state(state_dict: dict[str, Any], param_groups: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError if a parameter's saved state is not of the algorithm that steps it."""
    needed = {"muon": "momentum_buffer", "adamw": "exp_avg"}
    for saved, group in zip(state_dict["param_groups"], param_groups):
        names = group.get("param_names") or [f"parameter {i}" for i in saved["params"]]
        for i, name in zip(saved["params"], names):
            state = state_dict["state"].get(i)
            if state and needed[group["algorithm"]] not in state:
                raise ValueError(
                    f"the state to load has {', '.join(state)} for {name}, which {group['algorithm']} steps: it is the state"
                    " of another optimizer, or its groups are in another order. Load it into an optimizer with the same"
                    " groups, or start from the weights alone"
                )


def for_torch(group: dict[str, Any]) -> dict[str, Any]:
    """A group as it is saved, which ``torch.optim.Muon`` can step.

    A schedule that is no ``(a, b, c)`` is kept under ``"schedule"``; torch then goes on with its own coefficients.
    """
    own = {key: group[key] for key in ("ns_coefficients", "ns_steps")}
    coefficients = own["ns_coefficients"]
    if len(coefficients) == 3 and all(isinstance(c, (int, float)) for c in coefficients):
        return group
    jordan = SCHEDULES["jordan"].first(None)
    return group | {"ns_coefficients": jordan.plain(), "ns_steps": len(jordan.polynomials), "schedule": own}


def from_torch(group: dict[str, Any]) -> dict[str, Any]:
    """A saved group, with its own schedule (see :func:`for_torch`)."""
    return group | {"schedule": None} | (group.get("schedule") or {})
