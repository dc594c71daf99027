"""What an optimizer's state and step cost on every rank, by the shapes of its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muonclip.optim.muon import Muon
from lightning_muonclip.optim.options import as_dtype
from lightning_muonclip.optim.parts import intern_parts
from lightning_muonclip.optim.routing import Route
from lightning_muonclip.optim.second_moment import state_shape
from lightning_muonclip.parallel.owners import assign_owners

STRATEGIES = ("single", "ddp", "fsdp2")

#: What modules and configs call the number of experts that a token takes.
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k", "topk", "moe_topk", "experts_per_token")


@dataclass(frozen=True)
class StateBytes:
    """Bytes of the optimizer states on one rank."""

    momentum: int = 0
    second_moment: int = 0
    adamw: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.momentum + self.second_moment + self.adamw


class Ranks:
    """How weights, and the work on them, lie on ranks.

    Args:
        optimizer: Muon, with groups for AdamW.
        strategy: One of :data:`STRATEGIES`. FSDP2 shards every weight along its first dimension.
        count: The number of ranks.
    """

    def __init__(self, optimizer: Muon, strategy: str, count: int) -> None:
        self._optimizer, self._strategy, self.count = optimizer, strategy, count
        self._groups = optimizer.param_groups
        costs = optimizer.flops()
        kinds = {p: group["kind"] for group in self._groups for p in group["params"]}
        own = {p for p in costs if strategy == "fsdp2" and kinds[p] == "experts"}  # each rank steps its own experts
        loads = [sum(costs[p] * self.share(p, rank) for p in own) for rank in range(count)]
        exchanged = [p for p in costs if p not in own]
        owners = assign_owners([costs[p] for p in exchanged], loads)
        self._owners = dict(zip(exchanged, owners))
        #: Floating-point operations that orthogonalize, on every rank.
        self.flops = [
            load + sum(costs[p] for p, owner in self._owners.items() if owner == rank)
            for rank, load in enumerate(loads)
        ]

    def share(self, param: Tensor, rank: int) -> float:
        """The part of a weight's elements that a rank holds."""
        if self._strategy != "fsdp2" or not param.ndim or not param.shape[0]:
            return 1.0
        rows = math.ceil(param.shape[0] / self.count)
        return max(0, min(rows, param.shape[0] - rank * rows)) / param.shape[0]

    def state_bytes(self) -> list[StateBytes]:
        """Of every rank."""
        return [self._on(rank) for rank in range(self.count)]

    def _on(self, rank: int) -> StateBytes:
        momentum = second_moment = adamw = 0
        for group in self._groups:
            kinds = {p: group["kind"] for p in group["params"]}
            parts = intern_parts(self._optimizer.parts, kinds) if group["algorithm"] == "muon" else {}
            for p in group["params"]:
                held = round(p.numel() * self.share(p, rank))
                if group["algorithm"] == "adamw":
                    adamw += 2 * held * p.itemsize + torch.float32.itemsize  # and the number of steps
                    continue
                is_sharded = self._optimizer.shard_momentum and self._strategy == "ddp"
                if not is_sharded or self._owners[p] == rank:
                    momentum += held * (as_dtype(group["momentum_dtype"]) or p.dtype).itemsize
                if group["second_moment"] is not None:
                    whole = math.prod(state_shape(p.shape, group["kind"], parts.get(p)))
                    size = whole * self.share(p, rank) if group["kind"] == "experts" else whole
                    second_moment += round(size) * torch.promote_types(p.dtype, torch.float32).itemsize
        return StateBytes(momentum, second_moment, adamw)


@dataclass(frozen=True)
class Multiplied:
    """The weights that multiply activations.

    Attributes:
        total: Their number of elements.
        active: Those that one token meets.
        remark: What was assumed.
    """

    total: int
    active: int
    remark: str


def multiplied(model: nn.Module, routes: Sequence[Route]) -> Multiplied:
    """Counts the weights that multiply activations: matrices, but tables only if an output head is tied to them."""
    looked_up = {m.weight for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    used = {p for m in model.modules() if not isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for p in _own(m)}
    total, active, assumed = 0, 0.0, set()
    for route in routes:
        param = route.param
        if param.ndim < 2 or route.reason == "biases of experts" or (param in looked_up and param not in used):
            continue
        total += param.numel()
        share, remark = _share_of_experts(model, route)
        active += param.numel() * share
        assumed.add(remark)
    return Multiplied(total, round(active), "; ".join(sorted(assumed - {""})))


def _own(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


def _share_of_experts(model: nn.Module, route: Route) -> tuple[float, str]:
    """The share of a weight that one token meets, and what that rests on."""
    *path, _ = route.name.split(".")
    is_stack = route.reason.startswith("expert stack")
    at = next((i for i, part in enumerate(path) if part == "experts"), len(path) - 1 if is_stack else None)
    if at is None:
        return 1.0, ""
    modules = [model.get_submodule(".".join(path[:depth])) for depth in range(at + 2)]
    held = modules[-1]
    count = len(held) if isinstance(held, nn.ModuleList) else math.prod(route.param.shape[:-2])
    if count < 2:
        return 1.0, ""
    configs = [getattr(model, "config", None), getattr(getattr(model, "config", None), "text_config", None)]
    places: list[Any] = [*modules[::-1], *(child for m in modules[at:] for child in m.children()), *configs]
    for place in places:
        for name in _EXPERTS_PER_TOKEN:
            taken = getattr(place, name, None)
            if isinstance(taken, int) and 0 < taken <= count:
                return taken / count, f"{taken} of {count} experts for each token"
    return 1.0, f"all {count} experts for each token, since the model does not say how many it takes"
