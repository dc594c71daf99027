"""Checks of the Trainer, the module and the optimizer before fitting."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from lightning_muonclip.optim.muon import Muon

_INCOMPATIBLE_CALLBACKS = {
    "StochasticWeightAveraging": "it replaces the scheduler of one optimizer; use WeightAveraging",
    "LearningRateFinder": "it replaces the learning rate of one optimizer; sweep the learning rate instead",
    "BatchSizeFinder": "it saves and restores the Trainer before Muon is in it; find the batch size without the callback",
    "BaseFinetuning": "it adds parameter groups to every optimizer; freeze parameters before fitting instead",
}


def check_fit(trainer: pl.Trainer, pl_module: pl.LightningModule, own: type[Callback]) -> None:
    """Raises ValueError for what does not work beside the callback ``own``, which adds an optimizer."""
    if not pl_module.automatic_optimization:
        raise ValueError(
            f"{type(pl_module).__name__} uses manual optimization, where Lightning calls no hook around a step; return the"
            " optimizer MuonClip from configure_optimizers instead of using MuonClipCallback"
        )
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if sum(isinstance(callback, own) for callback in callbacks) > 1:
        raise ValueError(f"the Trainer has more than one {own.__name__}; keep one of them")
    for callback in callbacks:
        for cls in type(callback).__mro__:
            if reason := _INCOMPATIBLE_CALLBACKS.get(cls.__name__):
                if getattr(callback, "_early_exit", False):  # a Tuner has added it, and leaves it behind
                    callbacks.remove(callback)
                raise ValueError(f"{cls.__name__} does not work with MuonClipCallback: {reason}, or remove one of them")


def users_optimizer(trainer: pl.Trainer) -> Optimizer:
    """The optimizer that ``configure_optimizers`` returned; raises ValueError if it does not fit."""
    optimizers = trainer.optimizers
    if len(optimizers) != 1 or not optimizers[0].param_groups:
        raise ValueError(
            f"MuonClipCallback needs one optimizer for the parameters that Muon does not take, but configure_optimizers"
            f" returns {len(optimizers)}; return one, such as torch.optim.AdamW(self.parameters(), ...)"
        )
    if isinstance(optimizers[0], Muon):
        raise ValueError(
            f"configure_optimizers returns {type(optimizers[0]).__name__}, which orthogonalizes already; use either"
            " MuonClipCallback or this optimizer"
        )
    if "LBFGS" in (cls.__name__ for cls in type(optimizers[0]).__mro__):
        raise ValueError(
            "LBFGS evaluates the model several times per step, and Muon would step each time; use AdamW or SGD"
        )
    groups = optimizers[0].param_groups
    if any(group.get("maximize") for group in groups):
        raise ValueError("the optimizer has maximize=True, but Muon minimizes; negate the loss instead")
    if scaler_of(trainer) is not None and any(group.get("fused") for group in groups):
        raise ValueError(
            "fused=True unscales gradients inside its own step, after Muon's; pass fused=False in 16-mixed"
        )
    return optimizers[0]


def scaler_of(trainer: pl.Trainer) -> torch.amp.GradScaler | None:
    """The GradScaler of 16-mixed precision, if there is one."""
    return getattr(trainer.precision_plugin, "scaler", None)
