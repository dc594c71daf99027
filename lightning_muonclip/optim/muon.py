"""Muon: momentum, orthogonalised, for the hidden matrices of a network; AdamW groups may live in the same optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_muonclip.optim.adamw import adamw_step
from lightning_muonclip.optim.coefficients import Coefficients, resolve_schedule
from lightning_muonclip.optim.gradients import gradient
from lightning_muonclip.optim.options import (
    ADAMW_DEFAULTS,
    LR_ADJUSTMENTS,
    as_dtype,
    check_matrices,
    check_muon_options,
    check_state,
)
from lightning_muonclip.optim.orthogonalize import orthogonalize, working_dtype
from lightning_muonclip.optim.parts import intern_parts
from lightning_muonclip.optim.restarts import cheapest_flops
from lightning_muonclip.optim.stacking import KINDS, STACK_NUMEL, directions, directions_of_parts, matrix_shape, stacks
from lightning_muonclip.parallel.exchange import Exchange, wires
from lightning_muonclip.parallel.holders import share_key
from lightning_muonclip.parallel.shards import local_box, sharded_dims, to_local
from lightning_muonclip.parallel.shared import SharedWeights


class _Matrix(NamedTuple):
    """A weight in the middle of its step: what this rank holds of it, and its group by number and settings."""

    param: Tensor
    weight: Tensor
    grad: Tensor
    momentum: Tensor | None
    number: int
    group: dict[str, Any]


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
        dtype: Working dtype of Newton-Schulz, or its name; ``None`` is the fastest that the device has in hardware (see
            :func:`~lightning_muonclip.optim.orthogonalize.working_dtype`).
        stack_numel: Most elements that are orthogonalised together, which bounds the memory that a step needs for a while;
            a larger matrix goes alone. ``None`` is :data:`STACK_NUMEL` of the device.
        parts: For a weight that holds several matrices, such as fused queries, keys and values, the dimension of its output
            channels, and the channels of every matrix, which together cover all of them once. Each is orthogonalised and
            scaled for itself, as if it were a parameter of its own.
        process_group: The ranks that train the same plain weights by the same gradients, as under DDP: each matrix is
            orthogonalised by one of them. ``None`` is all ranks, once torch.distributed is initialised. DTensors name their
            ranks themselves.
        shard_momentum: Of plain weights that several ranks share, keeps the momentum only where it is needed: on the rank
            that orthogonalises the weight (as ZeRO-1 does). Call :meth:`consolidate_state_dict` on every rank before
            ``state_dict()``; Lightning does.

    Raises:
        ValueError: If a hyperparameter is out of range, a parameter is not a matrix, or parts do not cover their weight.

    Source: Keller Jordan (2024); Kimi K2, arXiv 2507.20534, algorithm 1.

    Example:
        >>> layer = torch.nn.Linear(4, 4, bias=False)
        >>> optimizer = Muon(layer.named_parameters(), lr=0.02)
        >>> layer(torch.randn(2, 4)).sum().backward()
        >>> optimizer.step()
    """

    _shared: SharedWeights | None = None
    _consolidated: dict[Tensor, Tensor] | None = None

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
        dtype: torch.dtype | str | None = None,
        stack_numel: int | None = None,
        parts: Mapping[Tensor, tuple[int, Sequence[Tensor]]] | None = None,
        process_group: dist.ProcessGroup | None = None,
        shard_momentum: bool = False,
    ) -> None:
        schedule = resolve_schedule(ns_coefficients, ns_steps)
        if stack_numel is not None and (not isinstance(stack_numel, int) or stack_numel < 1):
            raise ValueError(f"stack_numel is a positive integer, or None for the device's own; got {stack_numel!r}")
        self.dtype = as_dtype(dtype)
        self.stack_numel = stack_numel
        self.process_group = process_group
        self.shard_momentum = shard_momentum
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
        if self._lent():
            raise ValueError(
                "with shard_momentum=True, parameter groups have to be added before the first step: after it, each rank has"
                " the momentum of its own matrices only; add them earlier, or pass shard_momentum=False"
            )
        super().add_param_group(param_group)
        self._shared = None
        if algorithm == "muon":
            try:
                check_matrices(self.param_groups[-1])
            except ValueError:
                self.param_groups.pop()
                raise

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {
            "dtype": self.dtype,
            "stack_numel": self.stack_numel,
            "shard_momentum": self.shard_momentum,
            "_parts": self._parts,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Absent in a copy that was pickled before there was one; a process group cannot be pickled.
        self.__dict__ = {"stack_numel": None, "shard_momentum": False, "process_group": None} | self.__dict__
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
        shared = self._meet()
        if self._consolidated is not None:  # of the step before; torch.compile sets no attribute up to torch 2.11
            self._consolidated = None
        matrices = []
        for number, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            if params and group["algorithm"] == "adamw":
                adamw_step(self.state, group, params)
            elif params:
                with torch.profiler.record_function("muonclip::muon"):  # torch 2.11 compiles no decorator of this kind
                    matrices += self._gain_momentum(number, params)
        with torch.profiler.record_function("muonclip::muon"):
            self._step_matrices(matrices, shared)
        return loss

    def _gain_momentum(self, number: int, params: list[Tensor]) -> list[_Matrix]:
        """Weight decay and momentum, of what this rank holds of the weights of one group."""
        group = self.param_groups[number]
        lr, momentum, lent = _scalar(group["lr"]), group["momentum"], self._lent()
        grads = [gradient(p) for p in params]
        buffers = [None if p in lent else self._momentum_buffer(p, grad) for p, grad in zip(params, grads)]
        matrices = [
            _Matrix(p, to_local(p), to_local(grad), None if buffer is None else to_local(buffer), number, group)
            for p, grad, buffer in zip(params, grads, buffers)
        ]
        kept = [(m.momentum, m.grad) for m in matrices if m.momentum is not None]
        if kept:
            torch._foreach_lerp_([buffer for buffer, _ in kept], [grad for _, grad in kept], 1 - momentum)
        torch._foreach_mul_([m.weight for m in matrices], 1 - lr * group["weight_decay"])
        return matrices

    def _step_matrices(self, matrices: Sequence[_Matrix], shared: SharedWeights) -> None:
        """Subtracts orthogonalised momentum from the weights."""
        here: list[_Matrix] = []
        there: dict[Exchange, dict[int, _Matrix]] = {exchange: {} for exchange in shared.exchanges}
        for matrix in matrices:
            if place := shared.place(matrix.param):
                exchange, i = place
                there[exchange][i] = matrix
            else:
                here.append(matrix)
        for stack in self._stacks(here, [matrix.weight.shape for matrix in here]):  # needs memory for itself alone
            own = [here[i] for i in stack]
            self._subtract(own, self._directions(own, _updates(own)))
        for exchange, own_of_it in there.items():
            if own_of_it:
                self._step_shared(exchange, own_of_it)

    def _step_shared(self, exchange: Exchange, matrices: Mapping[int, _Matrix]) -> None:
        """The same for matrices that other ranks hold too."""
        weight = next(iter(matrices.values())).weight

        def updates(indices: Sequence[int]) -> list[Tensor]:
            return _updates([matrices[i] for i in indices])

        def orthogonalized(whole: Mapping[int, Tensor]) -> dict[int, Tensor]:
            indices = list(whole)
            results: dict[int, Tensor] = {}
            for stack in self._stacks([matrices[i] for i in indices], [update.shape for update in whole.values()]):
                own = [indices[k] for k in stack]
                results |= dict(zip(own, self._directions([matrices[i] for i in own], [whole[i] for i in own])))
            return results

        def subtract(parts: Mapping[int, Tensor]) -> None:
            self._subtract([matrices[i] for i in parts], list(parts.values()))

        out, back = wires(self._working_dtype(weight.device), weight.dtype)
        exchange.run(list(matrices), updates, orthogonalized, subtract, out, back)

    def _stacks(self, matrices: Sequence[_Matrix], shapes: Sequence[torch.Size]) -> Iterator[list[int]]:
        if not matrices:
            return iter(())
        alike = [(m.number, self._parts.get(m.param), m.weight.dtype, m.weight.device) for m in matrices]
        return stacks(shapes, alike, self._bound(matrices[0].weight.device))

    def _working_dtype(self, device: torch.device) -> torch.dtype:
        return self.dtype or working_dtype(device)

    def _bound(self, device: torch.device) -> int:
        return STACK_NUMEL.get(device.type, 0) if self.stack_numel is None else self.stack_numel

    def _directions(self, matrices: Sequence[_Matrix], updates: list[Tensor]) -> list[Tensor]:
        """Orthogonalised updates of whole matrices that are stacked together."""
        group = matrices[0].group
        orthogonal = partial(
            orthogonalize,
            coefficients=group["ns_coefficients"],
            steps=group["ns_steps"],
            eps=group["eps"],
            dtype=self._working_dtype(updates[0].device),
        )
        parts = self._parts.get(matrices[0].param)
        if parts is not None:
            return directions_of_parts(updates, parts, orthogonal)
        return directions(updates, group["kind"], orthogonal, self._bound(updates[0].device))

    def _subtract(self, matrices: Sequence[_Matrix], parts: list[Tensor]) -> None:
        """Steps weights along the parts of the directions that this rank holds of them."""
        alike: dict[tuple[int, float], list[tuple[_Matrix, Tensor]]] = defaultdict(list)
        for matrix, direction in zip(matrices, parts):
            scale = self._scale(matrix)
            if isinstance(scale, Tensor):
                direction, scale = direction * scale, 1.0
            alike[matrix.number, scale].append((matrix, direction))
        for (_, scale), own in alike.items():
            rate = -_scalar(own[0][0].group["lr"]) * scale
            _add_scaled([matrix.weight for matrix, _ in own], [direction for _, direction in own], rate)

    def _scale(self, matrix: _Matrix) -> float | Tensor:
        name = matrix.group["adjust_lr_fn"] or "original"
        param, parts = matrix.param, self._parts.get(matrix.param)
        _, fan_out, fan_in = matrix_shape(param.shape, matrix.group["kind"])
        if parts is None:
            return LR_ADJUSTMENTS[name](fan_out, fan_in)
        factors = parts.factors(name, param.shape[1 - parts.dim], matrix.weight.device)
        return factors.narrow(parts.dim, *_start_and_length(local_box(param)[parts.dim]))

    def _momentum_buffer(self, param: Tensor, grad: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad, memory_format=torch.preserve_format)
        return state["momentum_buffer"]

    # Many ranks -----------------------------------------------------------------------------------------------------

    def _meet(self) -> SharedWeights:
        """Once: finds which weights this rank shares with others, and agrees with them on who owns which."""
        if self._shared is None:
            costs: dict[Tensor, float] = {}
            local_costs: dict[Tensor, float] = {}
            for group in self.param_groups:
                for p in group["params"] if group["algorithm"] == "muon" else ():
                    if share_key(p, self.process_group) is not None:
                        (local_costs if _has_whole_matrices(p, group["kind"]) else costs)[p] = self._cost(p, group)
            self._shared = SharedWeights(costs, local_costs, self.process_group)
            self._drop_others_momentum()
        return self._shared

    def _cost(self, param: Tensor, group: dict[str, Any]) -> float:
        """FLOPs of orthogonalising a weight."""
        parts = self._parts.get(param)
        shapes = [matrix_shape(param.shape, group["kind"])]
        if parts is not None:
            shapes = [(count, channels, param.shape[1 - parts.dim]) for count, channels in parts.sizes()]
        schedule = resolve_schedule(group["ns_coefficients"], group["ns_steps"])
        unit = torch.finfo(self._working_dtype(param.device)).eps / 2
        return sum(count * cheapest_flops(schedule, m, n, unit) for count, m, n in shapes)

    def _lent(self) -> set[Tensor]:
        """Weights whose momentum another rank keeps."""
        return self._shared.unowned if self.shard_momentum and self._shared is not None else set()

    def _drop_others_momentum(self) -> None:
        for param in self._lent():
            self.state.pop(param, None)

    @torch.no_grad()
    def consolidate_state_dict(self, to: int = 0) -> None:
        """Brings every owner's momentum to one rank, whose ``state_dict()`` then is whole; to be called on all ranks.

        Without ``shard_momentum`` it is whole everywhere, and this does nothing.

        Args:
            to: The rank within the process group.
        """
        self._consolidated = {}
        if self.shard_momentum:
            shared = self._meet()
            momenta = {p: state["momentum_buffer"] for p, state in self.state.items() if "momentum_buffer" in state}
            self._consolidated = shared.collect(momenta, to)

    def state_dict(self) -> dict[str, Any]:
        """As any optimizer's.

        Raises:
            RuntimeError: If the momentum is sharded, and :meth:`consolidate_state_dict` has not been called since the last
                step.
        """
        if self._consolidated is None and self._lent():
            raise RuntimeError(
                "each rank has only its own share of Muon's momentum (shard_momentum=True); call"
                " consolidate_state_dict() on every rank first, then state_dict() on rank 0"
            )
        state_dict: dict[str, Any] = super().state_dict()
        if self._consolidated:
            numbers = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
            momenta = {numbers[p]: {"momentum_buffer": momentum} for p, momentum in self._consolidated.items()}
            state_dict["state"] = dict(sorted((state_dict["state"] | momenta).items()))
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class, or of ``torch.optim.Muon`` over the same parameters.

        Raises:
            ValueError: If it is another optimizer's, or of other parameters.
        """
        check_state(state_dict, self.param_groups)
        super().load_state_dict(state_dict)
        self._consolidated = None
        self._drop_others_momentum()


def _updates(matrices: Sequence[_Matrix]) -> list[Tensor]:
    """What is to be orthogonalised: the momentum, or Nesterov's."""
    updates: list[Tensor] = []
    for _, members in groupby(matrices, key=lambda matrix: matrix.number):
        own = list(members)
        group, momenta = own[0].group, [m.momentum for m in own if m.momentum is not None]
        if group["nesterov"]:
            momenta = list(torch._foreach_lerp([m.grad for m in own], momenta, group["momentum"]))
        updates += momenta
    return updates


def _has_whole_matrices(param: Tensor, kind: str) -> bool:
    """Whether sharding leaves every matrix on one rank: that of a stack of experts, by experts."""
    dims = sharded_dims(param)
    return kind == "experts" and bool(dims) and max(dims) < param.ndim - 2


def _start_and_length(side: slice) -> tuple[int, int]:
    return side.start, side.stop - side.start


def _scalar(lr: float | Tensor) -> float | Tensor:
    return lr.reshape(()) if isinstance(lr, Tensor) else lr  # a foreach product takes no other one-element tensor


def _add_scaled(params: list[Tensor], directions: list[Tensor], scale: float | Tensor) -> None:
    if isinstance(scale, Tensor):  # a tensor learning rate must not be read on the host
        directions = list(torch._foreach_mul(directions, scale.to(directions[0].device)))
        scale = 1.0
    torch._foreach_add_(params, directions, alpha=scale)
