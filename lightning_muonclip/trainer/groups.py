"""Muon's parameter groups: taken from the user's optimizer, whose learning rates and weight decay they follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_muonclip.optim.parts import KINDS
from lightning_muonclip.optim.routing import Route, routing_table
from lightning_muonclip.optim.schedules import Schedule, at_step


class FollowingGroups:
    """Groups of hidden matrices that leave the user's optimizer for Muon and follow the groups that they came from.

    Emptied groups of the user's optimizer are kept for schedulers and checkpoints.

    Args:
        optimizer: The user's; its groups lose the matrices that Muon takes.
        routes: Where each parameter goes.
        lr: Muon's own base learning rate, under the schedule of the user's groups; ``None`` is theirs.
        weight_decay: Muon's own weight decay, which may be scheduled; ``None`` is that of the user's groups.

    Attributes:
        groups: Parameter groups for :class:`~lightning_muonclip.Muon`.

    Raises:
        ValueError: If Muon takes no parameter, or if it should follow a group that has no learning rate.
    """

    def __init__(
        self, optimizer: Optimizer, routes: Sequence[Route], lr: float | None, weight_decay: float | Schedule | None
    ) -> None:
        self._optimizer, self._lr, self._weight_decay = optimizer, lr, weight_decay
        self.groups: list[dict[str, Any]] = []
        # The index of the group that each of Muon's follows, and that group's base learning rate. Indices, since loading a
        # checkpoint replaces the dicts.
        self._sources: list[tuple[int, float]] = []
        taken = {route.param: route for route in routes if route.algorithm == "muon"}
        if lr is None:
            _check_rates(optimizer, [g for g in optimizer.param_groups if any(p in taken for p in g["params"])])
        for i, source in enumerate(optimizer.param_groups):
            own = [taken[p] for p in source["params"] if p in taken]
            for kind in sorted({route.kind for route in own}, key=KINDS.index):
                matrices = [(route.name, route.param) for route in own if route.kind == kind]
                self.groups.append({"params": matrices, "kind": kind, **_name_of(source, kind)})
                self._sources.append((i, _base_rate(source)))
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

    def follow(self, muon: Optimizer) -> None:
        """Updates the learning rate and weight decay of Muon's groups; their momentum under a schedule that cycles it.

        Args:
            muon: The optimizer with :attr:`groups`.
        """
        for (i, base), group in zip(self._sources, muon.param_groups):
            source = self._optimizer.param_groups[i]
            factors = source.get("mup", {})  # of a group that muP has scaled, for AdamW
            own, users = factors.get(group["adjust_lr_fn"] or "original", 1.0), factors.get("adamw", 1.0)
            rate = source["lr"] / users if self._lr is None else self._lr * (source["lr"] / base if base else 1.0)
            decay = (source.get("weight_decay") or 0.0) * users
            if self._weight_decay is not None and not (callable(self._weight_decay) and decay == 0):
                decay = at_step(self._weight_decay, group.get("steps", 0))
            group["lr"], group["weight_decay"] = rate * own, decay / own
            if "max_momentum" in source:  # OneCycleLR and CyclicLR write it
                group["momentum"] = source["betas"][0] if "betas" in source else source["momentum"]


def _name_of(group: dict[str, Any], kind: str) -> dict[str, Any]:
    """A name for Muon's share of a named group; LearningRateMonitor needs unique names."""
    if "name" not in group:
        return {}
    return {"name": group["name"] if kind == "matrix" else f"{group['name']}-{kind}"}


def _base_rate(group: dict[str, Any]) -> float:
    """The learning rate of a group before its schedule; 0 if it is no number, as for Adafactor with relative steps."""
    rate = group.get("initial_lr", group.get("lr"))
    return float(rate) if isinstance(rate, (int, float, Tensor)) else 0.0


def _check_rates(optimizer: Optimizer, groups: Sequence[dict[str, Any]]) -> None:
    """Checks that the learning rates which Muon is to follow are numbers, and warns where they are hardly AdamW's."""
    name = type(optimizer).__name__
    for group in groups:
        if not isinstance(group.get("lr"), (int, float, Tensor)):
            raise ValueError(
                f"Muon cannot follow the learning rate of {name}, which is {group.get('lr')!r}; give it its own:"
                " MuonClipCallback(lr=...), with adjust_lr_fn='match_rms_adamw' a rate as for AdamW, such as 3e-4"
            )
    rates = sorted({_base_rate(group) for group in groups})
    is_adam = any("adam" in cls.__name__.lower() for cls in type(optimizer).__mro__)
    if groups and (not is_adam or rates[-1] >= 1 or any("d" in group for group in groups)):
        # A group's "d" is the rate that Prodigy and D-Adaptation find; what they call lr is a multiplier of it.
        shown = " and ".join(f"{rate:.4g}" for rate in rates)
        rank_zero_warn(
            f"Muon trains with the learning rate of {name}, {shown}, which may be none for Muon:"
            " with adjust_lr_fn='match_rms_adamw' it wants a rate as for AdamW. MuonClipCallback(lr=...) gives"
            " Muon its own, under the same schedule"
        )
