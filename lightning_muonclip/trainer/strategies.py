"""The Lightning strategies that MuonClip works under; no other file knows their names.

Classes are compared by name, so that none of them has to be imported.
"""

from __future__ import annotations

_SUPPORTED = ("SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy")

_REFUSED = {
    "FSDPStrategy": (
        "FSDP1 flattens matrices into shards that cannot be orthogonalized",
        'strategy="fsdp2"',
    ),
    "DeepSpeedStrategy": ("DeepSpeed owns the optimizer and its gradients", 'DDP, or strategy="fsdp2"'),
    "XLAStrategy": ("XLA runs neither the kernels nor the hooks", "a CPU or CUDA accelerator"),
    "SingleDeviceXLAStrategy": ("XLA runs neither the kernels nor the hooks", "a CPU or CUDA accelerator"),
    "XLAFSDPStrategy": ("XLA runs neither the kernels nor the hooks", "a CPU or CUDA accelerator"),
    "DataParallelStrategy": ("replicas are rebuilt at every forward", "DDP"),
}


def restores_optimizers(strategy: object) -> bool:
    """Whether a strategy restores optimizers itself, by parameter names, as ModelParallelStrategy does."""
    return not getattr(strategy, "lightning_restore_optimizer", True)


def check_strategy(strategy: object) -> None:
    """Raises ValueError for a strategy that does not work, with the reason and what to use instead."""
    names = [cls.__name__ for cls in type(strategy).__mro__]
    for name in names:
        if name in _REFUSED:
            reason, instead = _REFUSED[name]
            raise ValueError(f"MuonClipCallback does not work under {names[0]}: {reason}. Use {instead} instead")
    if not any(name in _SUPPORTED for name in names):
        raise ValueError(f"MuonClipCallback does not support {names[0]}; use one of {', '.join(_SUPPORTED)}")
