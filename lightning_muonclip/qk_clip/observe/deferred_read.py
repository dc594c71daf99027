"""Numbers of the device for the host, without waiting for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class DeferredRead:
    """Numbers on the device that the host reads a step later, when they have long been computed: nothing waits for them."""

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def write(self, value: Tensor) -> None:
        """Starts to copy numbers to the host."""
        if value.device.type != "cuda":
            self._value = value.clone()
            return
        self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(value.device))

    def read(self) -> Any:
        """The numbers, as a NumPy array, once; ``None`` if there are none."""
        if self._value is None:
            return None
        if self._event is not None:
            self._event.synchronize()
        value, self._value = self._value, None
        return value.cpu().numpy()
