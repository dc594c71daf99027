"""Schedules of momentum and weight decay, and of any other entry of a parameter group."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

#: Takes the number of steps that were taken, 0 before the first, and returns a value.
Schedule = Callable[[int], Any]

_SCHEDULED = ("momentum", "weight_decay")


def at_step(value: Any, step: int) -> Any:
    """The value of a schedule, or a value that is none."""
    return value(step) if callable(value) else value


class GroupScheduler(LRScheduler):
    """Sets entries of parameter groups by the step, as torch's schedulers set the learning rate.

    The first values are set at once, the others by :meth:`step`. Weight decay that is 0 in a group stays 0, and a group
    that AdamW steps, in :class:`~lightning_muonclip.MuonClip`, has no momentum. A learning rate goes with torch's own
    schedulers, which may act on the same optimizer.

    Args:
        optimizer: The optimizer.
        last_epoch: As in torch's schedulers.
        **schedules: For every entry, a function from the number of steps, 0 at first, to the value.

    Raises:
        ValueError: If no group has such an entry.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1, momentum=0.9)
        >>> scheduler = GroupScheduler(optimizer, momentum=momentum_warmup(10))
        >>> optimizer.param_groups[0]["momentum"]
        0.85
    """

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1, **schedules: Schedule) -> None:
        for key in schedules:
            if not any(key in group for group in optimizer.param_groups):
                raise ValueError(f"no parameter group of {type(optimizer).__name__} has an entry {key!r} to schedule")
        self.schedules = schedules
        for group in optimizer.param_groups if "weight_decay" in schedules else ():
            group.setdefault("initial_weight_decay", group.get("weight_decay"))
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        """Sets the entries; the learning rates stay."""
        for group in self.optimizer.param_groups:
            decays = group.get("initial_weight_decay") != 0
            own = {key: schedule for key, schedule in self.schedules.items() if decays or key != "weight_decay"}
            set_scheduled(group, own, self.last_epoch)
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The state without the functions, which need not be such that they can be saved."""
        return {key: value for key, value in super().state_dict().items() if key != "schedules"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on at the saved step."""
        super().load_state_dict(state_dict)
        self.get_lr()


class GroupSchedules:
    """The functions that groups of one optimizer have given for numbers; a state could not hold them.

    A group that has some has an entry ``"scheduled"``, which tells them from those of others, and counts ``"steps"``.
    """

    def __init__(self) -> None:
        self._functions: list[dict[str, Schedule]] = []

    @property
    def exist(self) -> bool:
        """Whether any group has some."""
        return bool(self._functions)

    def take(self, group: dict[str, Any], defaults: Mapping[str, Any]) -> None:
        """Takes the functions of a new group, which gets their first values."""
        values = {key: group.get(key, defaults[key]) for key in _SCHEDULED}
        own = {key: value for key, value in values.items() if callable(value)}
        if own:
            group.update(scheduled=len(self._functions), steps=0)
            group.update({key: schedule(0) for key, schedule in own.items()})
            self._functions.append(own)

    def set(self, groups: Sequence[dict[str, Any]], steps: int) -> None:
        """Counts steps, and sets what is scheduled for the next one."""
        for group in groups:
            if "scheduled" in group:
                group["steps"] += steps
                set_scheduled(group, self._functions[group["scheduled"]], group["steps"])

    def restore(self, groups: Sequence[dict[str, Any]], scheduled: Sequence[int | None]) -> None:
        """Goes on at the steps of groups that were loaded, perhaps from an optimizer with other functions or none."""
        for group, own in zip(groups, scheduled):
            steps = group.pop("steps", 0)
            group.pop("scheduled", None)
            if own is not None:
                group.update(scheduled=own, steps=steps)
        self.set(groups, 0)


def set_scheduled(group: dict[str, Any], schedules: dict[str, Schedule], step: int) -> None:
    """Sets the entries of one group; what muP has scaled, stays scaled."""
    is_adamw = group.get("algorithm") == "adamw"
    for key, schedule in schedules.items():
        if key not in group or (key == "momentum" and is_adamw):
            continue
        value = schedule(step)
        if key == "weight_decay":
            name = "adamw" if is_adamw or "adjust_lr_fn" not in group else group["adjust_lr_fn"] or "original"
            value /= group.get("mup", {}).get(name, 1.0)
        group[key] = value


def momentum_warmup(
    steps: int = 300, start: float = 0.85, end: float = 0.95, cooldown: int = 0, total_steps: int | None = None
) -> Schedule:
    """Momentum that rises linearly, and falls again where training ends.

    Args:
        steps: Number of steps that it rises for.
        start: Its first value, and its last one after a cool-down.
        end: Its value in between.
        cooldown: Number of steps that it falls for.
        total_steps: Length of the training; only a cool-down needs it.

    Source: modded-nanogpt, which also has a cool-down of 50 steps; nanochat rises to 0.97 and falls to 0.90.

    Example:
        >>> [round(momentum_warmup(2, total_steps=6, cooldown=2)(step), 2) for step in range(7)]
        [0.85, 0.9, 0.95, 0.95, 0.95, 0.9, 0.85]
    """
    if cooldown and total_steps is None:
        raise ValueError(
            f"a cool-down of {cooldown} steps needs the length of the training: momentum_warmup(total_steps=...)"
        )
    return partial(_warm, steps=steps, start=start, end=end, cooldown=cooldown, total=total_steps)


def decay_to_zero(weight_decay: float, total_steps: int) -> Schedule:
    """Weight decay that falls to zero by a half cosine, as in nanochat.

    Example:
        >>> [round(decay_to_zero(0.2, 4)(step), 3) for step in range(6)]
        [0.2, 0.171, 0.1, 0.029, 0.0, 0.0]
    """
    return partial(_fall, weight_decay=weight_decay, total=total_steps)


def _warm(step: int, steps: int, start: float, end: float, cooldown: int, total: int | None) -> float:
    rise = min(1.0, step / steps) if steps else 1.0
    fall = max(0.0, min(1.0, (total - step) / cooldown)) if cooldown and total is not None else 1.0
    return start + (end - start) * min(rise, fall)


def _fall(step: int, weight_decay: float, total: int) -> float:
    return weight_decay * (1 + math.cos(math.pi * min(1.0, step / total))) / 2
