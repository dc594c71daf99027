"""AdamW for the parameter groups of an optimizer that are not matrices; identical to ``torch.optim.AdamW``."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lightning_muonclip.optim.decay import decay_cautiously, scalar
from lightning_muonclip.optim.gradients import gradient


def adamw_step(state: MutableMapping[Tensor, Any], group: dict[str, Any], params: list[Tensor]) -> None:
    """Updates the parameters of one group.

    Args:
        state: The state of the optimizer.
        group: Parameter group with ``lr``, ``weight_decay``, ``betas`` and ``eps``.
        params: The parameters with a gradient.
    """
    for p in params:
        if not state[p]:
            zeros = torch.zeros_like(p, memory_format=torch.preserve_format)
            state[p] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": zeros,
                "exp_avg_sq": zeros.clone(),
            }
    states = [state[p] for p in params]
    if "max_momentum" in group:  # OneCycleLR and CyclicLR, where another group of the optimizer has momentum
        group["betas"] = group["momentum"], group["betas"][1]
    beta1, beta2 = group["betas"]
    grads, means = [gradient(p) for p in params], [own["exp_avg"] for own in states]
    weight_decay = group["weight_decay"]
    if group["cautious_weight_decay"]:
        # The sign of the update is that of the mean.
        decay_cautiously(params, torch._foreach_lerp(means, grads, 1 - beta1), scalar(group["lr"]) * weight_decay)
        weight_decay = 0.0
    adamw(
        params,
        grads,
        means,
        [own["exp_avg_sq"] for own in states],
        [],
        [own["step"] for own in states],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=weight_decay,
        eps=group["eps"],
        maximize=False,
    )
