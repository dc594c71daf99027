"""Makes torchvision importable with a torch that its compiled operators were not built for.

torchvision then registers fake versions of two undefined operators and fails, and torchmetrics and lightning fail with it.
Import this before anything that imports torchvision. It does nothing if torchvision is absent or its operators load.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _loads(package: Path) -> bool:
    try:
        for extension in package.glob("_C*"):
            torch.ops.load_library(str(extension))
    except OSError:
        return False
    return True


_spec = find_spec("torchvision")
if _spec is not None and _spec.origin is not None and not _loads(Path(_spec.origin).parent):
    library = torch.library.Library("torchvision", "DEF")
    for _schema in _SCHEMAS:
        library.define(_schema)
