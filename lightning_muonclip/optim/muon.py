"""The optimizer Muon, for the hidden matrices of a network; it can hold parameter groups for AdamW too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_muonclip.optim.adamw import adamw_step
from lightning_muonclip.optim.coefficients import Coefficients, resolve_schedule
from lightning_muonclip.optim.decay import scalar
from lightning_muonclip.optim.gradients import gradient
from lightning_muonclip.optim.names import bare_name
from lightning_muonclip.optim.options import (
    ADAMW_DEFAULTS,
    NOT_OF_TORCH,
    as_dtype,
    check_matrices,
    check_muon_options,
    check_params,
    check_state,
    dtype_name,
    for_torch,
    from_torch,
)
from lightning_muonclip.optim.parts import KINDS, Parts, PlacedParts, intern_parts, named_parts
from lightning_muonclip.optim.schedules import GroupSchedules, Schedule
from lightning_muonclip.optim.states import has_whole_matrices, momentum_buffer, restore_dtypes, second_moment
from lightning_muonclip.optim.stats import Heads, Stats, Tracker
from lightning_muonclip.optim.step import Matrix, MatrixStep, gain_momentum
from lightning_muonclip.parallel.agreement import check_models
from lightning_muonclip.parallel.holders import group_of, share_key
from lightning_muonclip.parallel.shards import to_local
from lightning_muonclip.parallel.shared import SharedWeights
from lightning_muonclip.rehearsal import is_rehearsal


class Muon(Optimizer):
    r"""Orthogonalizes momentum. Signature, state and update rule are those of ``torch.optim.Muon``.

    .. math::
        B_t = \mu B_{t-1} + (1 - \mu) G_t, \quad
        U_t = \mu B_t + (1 - \mu) G_t, \quad
        W_t = (1 - \eta\lambda) W_{t-1} - \eta\, s(m, n)\, \mathrm{orthogonalize}(U_t)

    A matrix, an expert or a part whose gradient is all zero is only decayed by :math:`\eta\lambda`, and its momentum by
    :math:`\mu`: orthogonalization would move it at full speed along what is left of its momentum, for ever.

    Matrices of the same shape are orthogonalized in one batched call. A group with ``algorithm="adamw"`` is stepped exactly
    as :class:`torch.optim.AdamW` would, so that one optimizer can own a whole model (see
    :func:`~lightning_muonclip.split_params`).

    Args:
        params: Matrices, named matrices, or parameter groups of them. Error messages use the names.
        lr: Learning rate :math:`\eta`.
        weight_decay: Decoupled weight decay :math:`\lambda`, or a function from the number of steps taken, 0 at first, to
            it, such as :func:`~lightning_muonclip.decay_to_zero`. A group may have its own.
        momentum: :math:`\mu`, or such a function, as :func:`~lightning_muonclip.momentum_warmup` makes.
        nesterov: Whether to use Nesterov momentum; otherwise :math:`U_t = B_t`.
        ns_coefficients: A schedule or its name (see :func:`~lightning_muonclip.optim.coefficients.resolve_schedule`);
            ``None`` is the library's default, ``"jordan"`` torch's own.
        eps: Added to a matrix's norm before dividing by it, relative to its largest entry: the scale of a gradient does not
            change its step.
        ns_steps: Number of Newton-Schulz iterations; ``None`` is the schedule's own.
        adjust_lr_fn: The scale :math:`s(m, n)`: ``"original"`` (``None``) :math:`\sqrt{\max(1, m/n)}`,
            ``"match_rms_adamw"`` :math:`0.2\sqrt{\max(m, n)}`, ``"spectral_unclamped"`` :math:`\sqrt{m/n}`.
        dtype: Working dtype of Newton-Schulz, or its name; ``None`` is the fastest for the shape of each matrix that the
            device has in hardware (see :func:`~lightning_muonclip.optim.orthogonalize.working_dtype`).
        stack_numel: Most elements in one batched call, which bounds the transient memory of a step; a larger matrix goes
            alone. ``None`` is the default of the device, :func:`.stacking.most_stacked`.
        parts: The matrices inside of fused weights,
            ``{name: (dimension of the output channels, [channels of each matrix])}``; a name may be a shell-style pattern,
            or the weight itself. They cover all channels once. Each matrix is orthogonalized and scaled as if it were a
            separate parameter.
        cautious_weight_decay: Whether a weight is decayed only where its update has not the other sign (arXiv 2510.12402);
            in groups for AdamW too.
        second_moment: ``"rows"`` divides every row of an orthogonalized update, or every column of a matrix that is wider
            than tall, by a running mean of its length, and restores the norm of the matrix: NorMuon, arXiv 2510.05491.
        second_moment_beta: How much of that mean stays at a step.
        momentum_dtype: The dtype of the momentum, or its name; ``None`` is that of the weight. ``"bfloat16"`` for weights in
            float32 halves the state; it is then rounded up or down by chance, such that small changes are not lost.
        track_stats: Whether :meth:`stats` can tell what the matrices do. May be turned on and off between steps.
        process_group: The data-parallel ranks that replicate the plain weights, as under DDP: each matrix has one owner
            rank, which orthogonalizes it. ``None`` is the default group, if torch.distributed is initialized. DTensors use
            their own mesh. Ranks that train apart need it: a group of one rank, or of those that train together.
        shard_momentum: Whether only the owner rank of a replicated weight keeps its momentum, as in ZeRO-1. Call
            :meth:`consolidate_state_dict` on every rank before ``state_dict()``; Lightning does.

    Raises:
        ValueError: If a hyperparameter is out of range, a parameter is not a matrix, or parts do not cover their weight.
        RuntimeError: At the first step, if ranks have different weights, gradients or settings; at a later one, if other
            weights are in a group, so that their parts or their momentum would be lost.

    Source: Keller Jordan (2024); Kimi K2, arXiv 2507.20534, algorithm 1.

    Example:
        >>> layer = torch.nn.Linear(4, 4, bias=False)
        >>> optimizer = Muon(layer.named_parameters(), lr=0.02)
        >>> layer(torch.randn(2, 4)).sum().backward()
        >>> optimizer.step()
    """

    _shared: SharedWeights | None = None
    _known: frozenset[Tensor] = frozenset()
    _consolidated: dict[Tensor, Tensor] | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float | Schedule = 0.1,
        momentum: float | Schedule = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients | None = None,
        eps: float = 1e-7,
        ns_steps: int | None = None,
        adjust_lr_fn: str | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        stack_numel: int | None = None,
        parts: Mapping[Any, tuple[int, Sequence[Any]]] | None = None,
        cautious_weight_decay: bool = False,
        second_moment: str | None = None,
        second_moment_beta: float = 0.95,
        momentum_dtype: torch.dtype | str | None = None,
        track_stats: bool = False,
        process_group: dist.ProcessGroup | None = None,
        shard_momentum: bool = False,
    ) -> None:
        check_params(params)
        schedule = resolve_schedule(ns_coefficients, ns_steps)
        self.process_group = process_group
        self.shard_momentum = shard_momentum
        defaults: dict[str, Any] = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": schedule.plain(),
            "eps": eps,
            "ns_steps": len(schedule.polynomials),
            "adjust_lr_fn": adjust_lr_fn,
            "cautious_weight_decay": cautious_weight_decay,
            "second_moment": second_moment,
            "second_moment_beta": second_moment_beta,
            "momentum_dtype": dtype_name(momentum_dtype),
        }
        check_muon_options(**defaults, dtype=dtype, stack_numel=stack_numel)
        self._matrix_step = MatrixStep(as_dtype(dtype), stack_numel, Tracker(track_stats))
        self._schedules = GroupSchedules()
        super().__init__(params, defaults)
        self.set_parts(parts or {})

    def working_dtypes(self) -> set[torch.dtype]:
        """The dtypes in which the matrices are orthogonalized."""
        return {dtype for own in self._orthogonalized() for dtype in self._matrix_step.working_dtypes(*own)}

    def flops(self) -> dict[Tensor, float]:
        """Floating-point operations that orthogonalize each weight in one step."""
        return {p: self._matrix_step.flops(p, group, parts) for p, group, parts in self._orthogonalized()}

    def _orthogonalized(self) -> Iterator[tuple[Tensor, dict[str, Any], Parts | None]]:
        """The weights of Muon, with their groups and parts."""
        for number, group in enumerate(self.param_groups):
            if group["algorithm"] == "muon":
                for p, parts in self._placed_parts.of(self.param_groups, number):
                    yield p, group, parts

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; ``algorithm`` is ``"muon"`` (default) or ``"adamw"`` (any shape), ``kind`` one of :data:`KINDS`."""
        algorithm = param_group.setdefault("algorithm", "muon")
        if algorithm not in ("muon", "adamw"):
            raise ValueError(f"unknown algorithm {algorithm!r} in a parameter group; use 'muon' or 'adamw'")
        kind = param_group.setdefault("kind", "matrix")
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r} of a parameter group; use one of {', '.join(KINDS)}")
        if "ns_coefficients" in param_group:  # its own number of steps goes with it
            schedule = resolve_schedule(param_group["ns_coefficients"], param_group.get("ns_steps"))
            param_group.update(ns_coefficients=schedule.plain(), ns_steps=len(schedule.polynomials))
        check_muon_options(**{key: param_group.get(key, value) for key, value in self.defaults.items()})
        self._schedules.take(param_group, self.defaults)
        param_group["schedule"] = (
            None  # its place in a state that torch can load; torch flattens the keys of live groups
        )
        if algorithm == "adamw":
            for key, value in ADAMW_DEFAULTS.items():
                param_group.setdefault(key, value)
        if self._kept_elsewhere():
            raise ValueError(
                "cannot add a parameter group after the first step with shard_momentum=True: each rank then keeps only the"
                " momentum of the matrices that it owns; add the group before the first step, or pass shard_momentum=False"
            )
        super().add_param_group(param_group)
        self._shared = None
        if algorithm == "muon":
            try:
                check_matrices(self.param_groups[-1])
            except ValueError:
                self.param_groups.pop()
                raise

    def set_heads(self, heads: Heads | Callable[[], Heads]) -> None:
        """Tells the heads of attention, whose imbalance :meth:`stats` shows, or how to find them."""
        self._matrix_step.tracker.heads = heads

    def set_parts(self, parts: Mapping[Any, tuple[Any, ...]]) -> None:
        """Replaces ``parts``, once the matrices inside of fused weights are known; the momentum does not depend on them.

        Raises:
            ValueError: If they do not cover their weights, or if a name matches none.
        """
        groups = [group for group in self.param_groups if group["algorithm"] == "muon"]
        pairs = (pair for group in groups for pair in zip(group.get("param_names", ()), group["params"]))
        names = {p: [name, bare_name(name)] for name, p in pairs}
        kinds = {p: group["kind"] for group in groups for p in group["params"]}
        #: The matrices inside of fused weights, by weight.
        self.parts = named_parts(parts, names)
        self._placed_parts = PlacedParts(intern_parts(self.parts, kinds), self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {
            "shard_momentum": self.shard_momentum,
            "_matrix_step": self._matrix_step,
            "_placed_parts": self._placed_parts,
            "_schedules": self._schedules,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("process_group", None)  # cannot be pickled
        self.__dict__.setdefault("_placed_parts", PlacedParts())
        self.__dict__.setdefault("parts", {})
        self.__dict__.setdefault("_schedules", GroupSchedules())
        for group in self.param_groups:  # absent in a checkpoint of torch.optim.Muon
            for key, value in NOT_OF_TORCH.items():
                group.setdefault(key, value)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step, without host synchronization. Parameters without a gradient are skipped."""
        loss = evaluated(closure)
        self._update()
        return loss

    def _update(self) -> None:
        # What a subclass's step() calls: torch wraps the step() of every class in the optimizer's hooks.
        counts = self._schedules.exist and not is_rehearsal(self)
        shared = self._share()
        if not shared.are_proven:
            params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            shared.check_gradients({p: gradient(p) for p in params if shared.place(p)})
        if self._consolidated is not None:  # of the step before; torch.compile sets no attribute up to torch 2.11
            self._consolidated = None
        matrices: list[Matrix] = []
        for number, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            if params and group["algorithm"] == "adamw":
                adamw_step(self.state, group, params)
            elif params:
                with torch.profiler.record_function("muonclip::muon"):  # torch 2.11 compiles no decorator of this kind
                    matrices += self._matrices(number)
        with torch.profiler.record_function("muonclip::muon"):
            self._matrix_step.step(matrices, shared)
        if counts:
            self._schedules.set(self.param_groups, 1)

    def _matrices(self, number: int) -> list[Matrix]:
        """Decays the weights of one group and updates their momentum, each on the shard of this rank."""
        group, elsewhere = self.param_groups[number], self._kept_elsewhere()
        params, parts = zip(
            *((p, own) for p, own in self._placed_parts.of(self.param_groups, number) if p.grad is not None)
        )
        grads = [gradient(p) for p in params]
        buffers = [
            None if p in elsewhere else momentum_buffer(self.state[p], grad, group) for p, grad in zip(params, grads)
        ]
        moments = [second_moment(self.state[p], p, group, own) for p, own in zip(params, parts)]
        locals_ = ([None if state is None else to_local(state) for state in own] for own in (buffers, moments))
        matrices = [
            Matrix(p, to_local(p), to_local(grad), buffer, moment, number, group, own)
            for p, grad, buffer, moment, own in zip(params, grads, *locals_, parts)
        ]
        if self.track_stats:
            for m in matrices:
                self._matrix_step.tracker.begin(m.param, m.weight, m.grad)
        gain_momentum(matrices, group["momentum"])
        if not group["cautious_weight_decay"]:  # which needs the updates
            torch._foreach_mul_([m.weight for m in matrices], 1 - scalar(group["lr"]) * group["weight_decay"])
        return matrices

    @property
    def track_stats(self) -> bool:
        """Whether the next steps are tracked."""
        return self._matrix_step.tracker.is_on

    @track_stats.setter
    def track_stats(self, is_on: bool) -> None:
        self._matrix_step.tracker.is_on = is_on
        self._matrix_step.tracker.forget()

    def stats(self) -> Stats:
        """What the matrices did in the last step, by name; nothing for those without a gradient.

        ``update_rms``: root mean square of the update without the learning rate. ``update_to_weight``: norm of the update
        over that of the weight. ``stable_rank``: squared Frobenius over squared spectral norm of what is orthogonalized, the
        mean over the matrices in a weight. ``head_imbalance``: the largest over the mean norm of its heads, NaN where there
        are none. ``zero_gradients``: share of gradient entries that are zero.

        Waits for the device. Call it on all ranks.

        Raises:
            RuntimeError: If ``track_stats`` is off.
        """
        if not self.track_stats:
            raise RuntimeError(
                "Muon has tracked nothing; create it with track_stats=True, or set track_stats before a step"
            )
        return self._matrix_step.tracker.read(self.param_groups, self._group_of)

    def _group_of(self, param: Tensor) -> dist.ProcessGroup | None:
        """The ranks that hold a weight or parts of it, if there are others."""
        if share_key(param, self.process_group) is None:
            return None
        place = self._share().place(param)
        return group_of(param, self.process_group) if place is None else place[0].group

    # Several ranks --------------------------------------------------------------------------------------------------

    def _share(self) -> SharedWeights:
        """Finds the weights that other ranks hold too and assigns each an owner rank; once for each set of weights."""
        if self._shared is not None and self._are_replaced():
            self._shared = None
        if self._shared is None:
            shared = {p: cost for p, cost in self.flops().items() if share_key(p, self.process_group) is not None}
            kinds = {p: group["kind"] for group in self.param_groups for p in group["params"]}
            local_costs = {p: cost for p, cost in shared.items() if has_whole_matrices(p, kinds[p])}
            costs = {p: cost for p, cost in shared.items() if p not in local_costs}
            check_models(self.param_groups, list(costs), self.process_group, self.working_dtypes())
            self._shared = SharedWeights(costs, local_costs, self.process_group)
            self._known = frozenset(p for group in self.param_groups for p in group["params"])
            self._drop_others_momentum()
        return self._shared

    def _are_replaced(self) -> bool:
        """Whether a group has parameters that it did not have at the last step."""
        params = [p for group in self.param_groups for p in group["params"]]
        if torch.compiler.is_compiling() or self._known.issuperset(params):
            return False
        if lost := self.state.keys() - set(params):
            raise RuntimeError(
                f"{len(lost)} of {len(self.state)} parameters were replaced in param_groups after they were stepped, which"
                " loses their momentum. Replace them before the first step, or save state_dict() before and load it after"
            )
        return True

    def _kept_elsewhere(self) -> set[Tensor]:
        """Weights whose momentum only another rank keeps."""
        return self._shared.unowned if self.shard_momentum and self._shared is not None else set()

    def _drop_others_momentum(self) -> None:
        for param in self._kept_elsewhere():
            self.state[param].pop("momentum_buffer", None)
            if not self.state[param]:
                del self.state[param]

    @torch.no_grad()
    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gathers the momentum of all owner ranks on one rank, whose ``state_dict()`` is then complete.

        Call it on all ranks. Without ``shard_momentum`` every rank has all of it, and this does nothing.

        Args:
            to: The rank within the process group.
        """
        self._consolidated = {}
        if self.shard_momentum:
            shared = self._share()
            momenta = {p: state["momentum_buffer"] for p, state in self.state.items() if "momentum_buffer" in state}
            self._consolidated = shared.collect(momenta, to)

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer, which ``torch.optim.Muon`` can load for the same matrices.

        It has torch's own coefficients then, if this optimizer has none of its kind, and ours under ``"schedule"``.

        Raises:
            RuntimeError: If the momentum is sharded and :meth:`consolidate_state_dict` was not called since the last step.
        """
        if self._consolidated is None and self._kept_elsewhere():
            raise RuntimeError(
                "Muon's momentum is sharded over ranks (shard_momentum=True), so state_dict() is incomplete; call"
                " consolidate_state_dict() on every rank first"
            )
        state_dict: dict[str, Any] = super().state_dict()
        state_dict["param_groups"] = [for_torch(group) for group in state_dict["param_groups"]]
        if self._consolidated:
            numbers = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
            states = state_dict["state"]
            for p, momentum in self._consolidated.items():
                states[numbers[p]] = {"momentum_buffer": momentum, **states.get(numbers[p], {})}
            state_dict["state"] = dict(sorted(states.items()))
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class, or of ``torch.optim.Muon`` for the same parameters.

        Raises:
            ValueError: If it is the state of another optimizer or of other parameters.
        """
        check_state(state_dict, self.param_groups)
        groups = [from_torch(group) for group in state_dict["param_groups"]]
        scheduled = [group.get("scheduled") for group in self.param_groups]
        super().load_state_dict({**state_dict, "param_groups": groups})
        restore_dtypes(self.state, self.param_groups, state_dict)
        self._schedules.restore(self.param_groups, scheduled)
        self._consolidated = None
        self._drop_others_momentum()


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """The loss of a closure, which reevaluates the model."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
