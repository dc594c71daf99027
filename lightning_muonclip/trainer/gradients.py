"""The gradients of the user's optimizer and of Muon, which a Trainer clips and a GradScaler checks one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_muonclip.parallel.grad_norm import clip_grad_norm_, total_norm
from lightning_muonclip.parallel.shards import to_local


def params_of(*optimizers: Optimizer) -> Iterator[Tensor]:
    """The parameters in all groups of some optimizers."""
    return (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])


def clip_gradients(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Clips all gradients together, if the Trainer clips; its own clip of the user's optimizer then changes nothing."""
    if not trainer.gradient_clip_val:
        return
    owned = set(params_of(*trainer.optimizers))
    params = [p for p in pl_module.parameters() if p in owned]
    if trainer.gradient_clip_algorithm == "value":
        torch.nn.utils.clip_grad_value_(params, trainer.gradient_clip_val)
    else:
        clip_grad_norm_(params, trainer.gradient_clip_val)


def share_infinities(optimizers: Sequence[Optimizer]) -> None:
    """Makes a GradScaler skip all optimizers if the gradients of one are not finite."""
    grads = [[p.grad for p in params_of(optimizer) if p.grad is not None] for optimizer in optimizers]
    # 0 if all gradients are finite, else NaN; the scaler finds it in one gradient of each optimizer. A sum, since a maximum
    # over ranks may lose a NaN.
    poison = 0 * total_norm((grad for own in grads for grad in own), norm_type=1.0)
    for own in grads:
        for grad in [grad for grad in own if grad.numel()][:1]:
            to_local(grad).add_(poison.to(grad.device))
