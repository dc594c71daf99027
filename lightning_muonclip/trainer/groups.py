"""Muon's parameter groups: taken from the user's optimizer, whose learning rates and weight decay they follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_muonclip.optim.routing import Route, routing_table
from lightning_muonclip.optim.stacking import KINDS


class FollowingGroups:
    """Groups of hidden matrices that leave the user's optimizer for Muon and follow the groups that they came from.

    Emptied groups of the user's optimizer are kept for schedulers and checkpoints.

    Args:
        optimizer: The user's; its groups lose the matrices that Muon takes.
        routes: Where each parameter goes.

    Attributes:
        groups: Parameter groups for :class:`~lightning_muonclip.Muon`.

    Raises:
        ValueError: If Muon takes no parameter.
    """

    def __init__(self, optimizer: Optimizer, routes: Sequence[Route]) -> None:
        self.groups: list[dict[str, Any]] = []
        # The index of the group that each of Muon's follows, and that group's base learning rate. Indices, since loading a
        # checkpoint replaces the dicts.
        self._sources: list[tuple[int, float]] = []
        taken = {route.param: route for route in routes if route.algorithm == "muon"}
        for i, source in enumerate(optimizer.param_groups):
            own = [taken[p] for p in source["params"] if p in taken]
            for kind in sorted({route.kind for route in own}, key=KINDS.index):
                matrices = [(route.name, route.param) for route in own if route.kind == kind]
                self.groups.append({"params": matrices, "kind": kind, **_name_of(source, kind)})
                self._sources.append((i, float(source.get("initial_lr", source["lr"]))))
            if own:
                kept = [j for j, p in enumerate(source["params"]) if p not in taken]
                for key in ("params", "param_names"):
                    if key in source:
                        source[key] = [source[key][j] for j in kept]
        if not self.groups:
            raise ValueError(
                f"Muon takes no parameter of {type(optimizer).__name__}. The parameters go to:\n{routing_table(routes)}\n"
                "Exclude fewer of them (exclude=), include some (include=), or remove the callback"
            )

    def follow(self, optimizer: Optimizer, muon: Optimizer, lr: float | None, weight_decay: float | None) -> None:
        """Updates the learning rate and weight decay of Muon's groups.

        Args:
            optimizer: The user's.
            muon: The optimizer with :attr:`groups`.
            lr: Muon's own base learning rate, under the schedule of the user's groups; ``None`` is theirs.
            weight_decay: Muon's own weight decay; ``None`` is that of the user's groups.
        """
        for (i, base), group in zip(self._sources, muon.param_groups):
            source = optimizer.param_groups[i]
            factors = source.get("mup", {})  # of a group that muP has scaled, for AdamW
            own, users = factors.get(group["adjust_lr_fn"] or "original", 1.0), factors.get("adamw", 1.0)
            rate = source["lr"] / users if lr is None else lr * (source["lr"] / base if base else 1.0)
            decay = source.get("weight_decay", 0.0) * users if weight_decay is None else weight_decay
            group["lr"], group["weight_decay"] = rate * own, decay / own


def _name_of(group: dict[str, Any], kind: str) -> dict[str, Any]:
    """A name for Muon's share of a named group; LearningRateMonitor needs unique names."""
    if "name" not in group:
        return {}
    return {"name": group["name"] if kind == "matrix" else f"{group['name']}-{kind}"}
