"""QK-Clip beside DeepSpeed, whose engine owns the optimizer: ZeRO stages 1 and 2, where every rank has all weights."""

from __future__ import annotations

import torch

from lightning_muonclip.qk_clip.clip import QKClip
from lightning_muonclip.qk_clip.result import ClipResult


@torch.no_grad()
def step_under_zero(qk_clip: QKClip) -> ClipResult:
    """A step of QK-Clip that also scales the float32 masters, which DeepSpeed writes over the weights at its next step.

    Call it on all ranks after every step of the engine that updated the weights. If some head is clipped, every weight of
    a query or key is assembled in float32 on every rank, by one all-reduce each. The host waits for the device once.

    Args:
        qk_clip: A QKClip of ``engine.module``.

    Returns:
        What :meth:`QKClip.step <lightning_muonclip.QKClip.step>` returns.

    Raises:
        ValueError: If the weights have no masters, or are partitioned (stage 3).

    Source: deepspeed/utils/tensor_fragment.py and deepspeed/runtime/zero/stage_1_and_2.py of DeepSpeed 0.19.

    Example::

        qk_clip = QKClip(engine.module)
        for batch in data:
            engine.backward(engine(batch))
            engine.step()
            if engine.was_step_applied():
                step_under_zero(qk_clip)
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    qk_clip.settle()
    params = list(dict.fromkeys(qk_clip.params))
    if any(hasattr(param, "ds_id") for param in params):
        raise ValueError(
            "the weights are partitioned (ZeRO stage 3), so no rank can read or clip them; use stage 1 or 2"
        )
    result = qk_clip.step()
    if not bool((result.gamma < 1).any()):  # on all ranks alike
        return result
    masters = {param: safe_get_full_fp32_param(param) for param in params}
    if any(master is None for master in masters.values()):
        raise ValueError(
            "DeepSpeed knows no float32 masters of the weights; use ZeRO stage 1 or 2, or call QKClip.step"
        )
    qk_clip.scale_copies([masters[param] for param in qk_clip.params], result)
    for param, master in masters.items():
        safe_set_full_fp32_param(param, master)
        param.copy_(master)
    return result
