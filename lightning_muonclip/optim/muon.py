"""Muon: momentum, orthogonalised, for the hidden matrices of a network; AdamW groups may live in the same optimizer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from lightning_muonclip.optim.coefficients import Coefficients, resolve_schedule
from lightning_muonclip.optim.orthogonalize import orthogonalize
from lightning_muonclip.optim.parts import Parts, intern_parts
from lightning_muonclip.optim.sharding import gather_matrix, shard_like

#: Update scale by shape (m, n) of the weight, m being fan-out. Names are those of torch.optim.Muon.
LR_ADJUSTMENTS: dict[str, Callable[[int, int], float]] = {
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),  # Keller Jordan (2024)
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),  # Moonlight, arXiv 2502.16982, section 2.2
    "spectral_unclamped": lambda m, n: math.sqrt(m / n),  # the muP scale: Yang et al., arXiv 2310.17813
}

ADAMW_DEFAULTS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}

#: How parameters of a group are matrices: as they are; as a batch of them, shape (experts, m, n); or, for convolutions of
#: shape (out, in, kernel...), as one matrix (out, in · kernel).
KINDS = ("matrix", "experts", "convolution")

#: Most elements orthogonalised together. On a CPU only small matrices gain from it (a plain loop over 384-wide ones is 7 to
#: 10 % faster); a GPU is launch-bound.
STACK_NUMEL = {"cpu": 2**18, "cuda": 2**26}


class Muon(Optimizer):
    r"""torch.optim.Muon's signature, state and update rule; same-shape matrices are orthogonalised together.

    .. math::
        B_t = \mu B_{t-1} + (1 - \mu) G_t, \quad
        U_t = \mu B_t + (1 - \mu) G_t, \quad
        W_t = (1 - \eta\lambda) W_{t-1} - \eta\, s(m, n)\, \mathrm{orthogonalize}(U_t)

    A group with ``algorithm="adamw"`` is stepped by AdamW exactly as :class:`torch.optim.AdamW` would, so that one
    optimizer can own a whole model (see :func:`~lightning_muonclip.split_params`).

    Args:
        params: Matrices, or parameter groups. Named parameters are named in error messages.
        lr: Learning rate :math:`\eta`.
        weight_decay: Decoupled weight decay :math:`\lambda`.
        momentum: :math:`\mu`.
        nesterov: ``False`` takes :math:`U_t = B_t`.
        ns_coefficients: A schedule or its name (see :func:`~lightning_muonclip.optim.coefficients.resolve_schedule`);
            ``None`` is the library's default, ``"jordan"`` torch's own.
        eps: Guards the division by a matrix's norm; relative to its largest entry, so tiny gradients keep their step.
        ns_steps: Number of Newton-Schulz iterations; ``None`` is the schedule's own.
        adjust_lr_fn: The scale :math:`s(m, n)`: ``"original"`` (``None``) :math:`\sqrt{\max(1, m/n)}`,
            ``"match_rms_adamw"`` :math:`0.2\sqrt{\max(m, n)}`, ``"spectral_unclamped"`` :math:`\sqrt{m/n}`.
        dtype: Working dtype of Newton-Schulz; ``None`` is the fastest that the device has in hardware (see
            :func:`~lightning_muonclip.optim.orthogonalize.working_dtype`).
        stack_numel: Most elements that are orthogonalised together, which bounds the memory that a step needs for a while;
            a larger matrix goes alone. ``None`` is :data:`STACK_NUMEL` of the device.
        parts: For a weight that holds several matrices, such as fused queries, keys and values, the dimension of its output
            channels, and the channels of every matrix, which together cover all of them once. Each is orthogonalised and
            scaled for itself, as if it were a parameter of its own.

    Raises:
        ValueError: If a hyperparameter is out of range, a parameter is not a matrix, or parts do not cover their weight.

    Source: Keller Jordan (2024); Kimi K2, arXiv 2507.20534, algorithm 1.

    Example:
        >>> layer = torch.nn.Linear(4, 4, bias=False)
        >>> optimizer = Muon(layer.named_parameters(), lr=0.02)
        >>> layer(torch.randn(2, 4)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients | None = None,
        eps: float = 1e-7,
        ns_steps: int | None = None,
        adjust_lr_fn: str | None = None,
        *,
        dtype: torch.dtype | None = None,
        stack_numel: int | None = None,
        parts: Mapping[Tensor, tuple[int, Sequence[Tensor]]] | None = None,
    ) -> None:
        schedule = resolve_schedule(ns_coefficients, ns_steps)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype is a floating-point torch.dtype, such as torch.float32, or None; got {dtype!r}")
        if stack_numel is not None and (not isinstance(stack_numel, int) or stack_numel < 1):
            raise ValueError(f"stack_numel is a positive integer, or None for the device's own; got {stack_numel!r}")
        self.dtype = dtype
        self.stack_numel = stack_numel
        self._parts = intern_parts(parts or {})
        defaults: dict[str, Any] = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": schedule.plain(),
            "eps": eps,
            "ns_steps": len(schedule.polynomials),
            "adjust_lr_fn": adjust_lr_fn,
        }
        check_muon_options(**defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; ``algorithm`` is ``"muon"`` (default) or ``"adamw"`` (any shape), ``kind`` one of :data:`KINDS`."""
        algorithm = param_group.setdefault("algorithm", "muon")
        if algorithm not in ("muon", "adamw"):
            raise ValueError(f"unknown algorithm {algorithm!r} in a parameter group; known: muon, adamw")
        kind = param_group.setdefault("kind", "matrix")
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r} of a parameter group; known: {', '.join(KINDS)}")
        if "ns_coefficients" in param_group:  # with its own number of steps, not that of the optimizer's schedule
            schedule = resolve_schedule(param_group["ns_coefficients"], param_group.get("ns_steps"))
            param_group.update(ns_coefficients=schedule.plain(), ns_steps=len(schedule.polynomials))
        check_muon_options(**{key: param_group.get(key, value) for key, value in self.defaults.items()})
        if algorithm == "adamw":
            for key, value in ADAMW_DEFAULTS.items():
                param_group.setdefault(key, value)
        super().add_param_group(param_group)
        if algorithm == "muon":
            try:
                _require_matrices(self.param_groups[-1])
            except ValueError:
                self.param_groups.pop()
                raise

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {
            "dtype": self.dtype,
            "stack_numel": self.stack_numel,
            "_parts": self._parts,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("stack_numel", None)  # absent in a copy that was pickled before there was one
        for group in self.param_groups:
            group.setdefault("algorithm", "muon")  # absent in a checkpoint of torch.optim.Muon
            group.setdefault("kind", "matrix")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step. Parameters without a gradient are left alone. No host synchronisation."""
        return self._update(closure)

    def _update(self, closure: Callable[[], Any] | None) -> Any:
        # For a subclass's step to call: torch wraps step() of every class in the optimizer's hooks.
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params and group["algorithm"] == "adamw":
                self._adamw_step(group, params)
            elif params:
                self._muon_step(group, params)
        return loss

    @torch.profiler.record_function("muonclip::muon")
    def _muon_step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        if isinstance(lr, Tensor):
            lr = lr.reshape(())  # a foreach product takes no other one-element tensor
        grads = [_dense_gradient(p) for p in params]
        buffers = [self._momentum_buffer(p) for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        for indices in self._stacks(params):  # what follows needs memory for one stack at a time
            own = [params[i] for i in indices]
            updates = [buffers[i] for i in indices]
            if group["nesterov"]:
                updates = list(torch._foreach_lerp([grads[i] for i in indices], updates, momentum))
            whole = [gather_matrix(update) for update in updates]
            directions, scale = self._directions(whole, self._parts.get(own[0]), group)
            _add_scaled(own, [shard_like(d, p) for d, p in zip(directions, own)], -lr * scale)

    def _stacks(self, params: Sequence[Tensor]) -> Iterator[list[int]]:
        """Indices of weights that share shape, or have each other's transposed, in runs within the stack's bound."""
        alike: dict[Any, list[int]] = defaultdict(list)
        for i, p in enumerate(params):
            if p.numel() == 0:
                continue
            parts = self._parts.get(p)
            shape = p.shape if parts else (*p.shape[:-2], *sorted(p.shape[-2:]))
            alike[shape, id(parts), p.dtype, p.device].append(i)
        for (shape, _, _, device), indices in alike.items():
            size = self._stack_size(math.prod(shape), device)
            yield from (indices[start : start + size] for start in range(0, len(indices), size))

    def _stack_size(self, numel: int, device: torch.device) -> int:
        bound = STACK_NUMEL.get(device.type, 0) if self.stack_numel is None else self.stack_numel
        return max(1, bound // max(1, numel))

    def _directions(
        self, updates: list[Tensor], parts: Parts | None, group: dict[str, Any]
    ) -> tuple[list[Tensor], float]:
        """Orthogonalised updates of weights that are stacked together, and a factor that they still lack."""
        adjust = LR_ADJUSTMENTS[group["adjust_lr_fn"] or "original"]
        orthogonal = partial(
            orthogonalize,
            coefficients=group["ns_coefficients"],
            steps=group["ns_steps"],
            eps=group["eps"],
            dtype=self.dtype,
        )
        if parts is not None:
            return _directions_of_parts(updates, parts, orthogonal, adjust), 1.0
        batches = [_as_matrices(update, group["kind"]) for update in updates]
        wide = [batch.mT if _is_tall(batch) else batch for batch in batches]
        stack = torch.cat(wide) if len(wide) > 1 else wide[0]
        pieces = stack.split(self._stack_size(stack[0].numel(), stack.device))  # more than one for experts only
        results = [orthogonal(piece) for piece in pieces]
        result = torch.cat(results) if len(results) > 1 else results[0]
        directions = []
        for own, batch, update in zip(result.split([len(batch) for batch in batches]), batches, updates):
            directions.append((own.mT if _is_tall(batch) else own).reshape(update.shape))
        scales = [adjust(*batch.shape[-2:]) for batch in batches]
        if len(set(scales)) > 1:
            torch._foreach_mul_(directions, scales)
            return directions, 1.0
        return directions, scales[0]

    def _momentum_buffer(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(_dense_gradient(param), memory_format=torch.preserve_format)
        return state["momentum_buffer"]

    def _adamw_step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                zeros = torch.zeros_like(p, memory_format=torch.preserve_format)
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": zeros,
                    "exp_avg_sq": zeros.clone(),
                }
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [_dense_gradient(p) for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def check_muon_options(
    lr: float | Tensor,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    ns_coefficients: Any,
    adjust_lr_fn: str | None,
    eps: float = 1e-7,
    ns_steps: int | None = None,
) -> None:
    """Raises ValueError, naming the option, its value and what is possible, unless Muon can run so."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"a tensor lr must have one element, got shape {tuple(lr.shape)}")
    for name, value in {"lr": lr, "weight_decay": weight_decay, "eps": eps}.items():
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    if adjust_lr_fn is not None and adjust_lr_fn not in LR_ADJUSTMENTS:
        raise ValueError(f"unknown adjust_lr_fn {adjust_lr_fn!r}; known: {', '.join(LR_ADJUSTMENTS)}")
    resolve_schedule(ns_coefficients, ns_steps)


def _require_matrices(group: dict[str, Any]) -> None:
    names = group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
    fits = {"matrix": lambda p: p.ndim == 2, "experts": lambda p: p.ndim >= 3, "convolution": lambda p: p.ndim >= 3}
    for name, p in zip(names, group["params"]):
        if p.is_complex() or not fits[group["kind"]](p):
            raise ValueError(
                f"Muon orthogonalises real matrices, but {name} has shape {tuple(p.shape)} and dtype {p.dtype} in a group of"
                f" kind {group['kind']!r}; put it into one with kind='experts' if it is a batch of matrices, with"
                " kind='convolution' if it is a convolution's (out, in, kernel...), or with algorithm='adamw' (split_params"
                " does so)"
            )


def _dense_gradient(param: Tensor) -> Tensor:
    assert param.grad is not None
    if param.grad.is_sparse:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} has a sparse gradient; make it dense (sparse=False)"
        )
    return param.grad


def _directions_of_parts(
    updates: list[Tensor],
    parts: Parts,
    orthogonal: Callable[[Tensor], Tensor],
    adjust: Callable[[int, int], float],
) -> list[Tensor]:
    """Every part orthogonalised and scaled for itself."""
    matrices = torch.stack([update.mT if parts.dim else update for update in updates])
    directions = torch.empty_like(matrices)
    for channels in parts.channels_on(matrices.device):
        own = matrices[:, channels]  # (weights, parts alike, channels, fan-in)
        directions[:, channels] = orthogonal(own) * adjust(*own.shape[-2:])
    return list(directions.mT if parts.dim else directions)


def _as_matrices(weight: Tensor, kind: str) -> Tensor:
    """A batch of matrices, shape (batch, m, n)."""
    if kind == "experts":
        return weight.flatten(0, -3)
    return weight.flatten(1)[None]


def _is_tall(matrices: Tensor) -> bool:
    return matrices.shape[-2] > matrices.shape[-1]


def _add_scaled(params: list[Tensor], directions: list[Tensor], scale: float | Tensor) -> None:
    if isinstance(scale, Tensor):  # a tensor learning rate must not be read on the host
        directions = list(torch._foreach_mul(directions, scale.to(directions[0].device)))
        scale = 1.0
    torch._foreach_add_(params, directions, alpha=scale)
