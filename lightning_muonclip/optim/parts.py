"""Fused weights: which output channels form a matrix of their own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_muonclip.optim.options import LR_ADJUSTMENTS


class Parts:
    """The matrices in one fused weight.

    Args:
        dim: The output dimension of the weight.
        channels: Channel indices of each matrix.

    Attributes:
        count: Number of channels of the weight.
    """

    def __init__(self, dim: int, channels: Sequence[Tensor]) -> None:
        self.dim = dim
        sizes: dict[int, list[Tensor]] = defaultdict(list)
        for own in channels:
            sizes[len(own)].append(own)
        self.count = sum(map(len, channels))
        self._channels = {torch.device("cpu"): [torch.stack(own).cpu() for own in sizes.values()]}
        self._factors: dict[tuple[str, int, torch.device], Tensor] = {}

    def channels_on(self, device: torch.device) -> list[Tensor]:
        """Channels of the matrices, one tensor of shape (matrices, channels) per size."""
        if device not in self._channels:
            self._channels[device] = [channels.to(device) for channels in self._channels[torch.device("cpu")]]
        return self._channels[device]

    def sizes(self) -> list[tuple[int, int]]:
        """Number of matrices and of channels per matrix, for every size."""
        return [(len(own), own.shape[1]) for own in self._channels[torch.device("cpu")]]

    def where_any(self, channels: Tensor) -> Tensor:
        """For each matrix, whether something holds for any of its channels, in the order of :meth:`channels_on`."""
        return torch.cat([channels[own].any(-1) for own in self.channels_on(channels.device)])

    def factors(self, adjustment: str, fan_in: int, device: torch.device) -> Tensor:
        """Per-channel scale of the update under the named adjustment, shaped to multiply the weight."""
        key = (adjustment, fan_in, device)
        if key not in self._factors:
            factors = torch.empty(self.count)
            for channels in self.channels_on(torch.device("cpu")):
                factors[channels] = LR_ADJUSTMENTS[adjustment](channels.shape[1], fan_in)
            self._factors[key] = factors.view((1, -1) if self.dim else (-1, 1)).to(device)
        return self._factors[key]


def intern_parts(parts: Mapping[Tensor, tuple[int, Sequence[Tensor]]]) -> dict[Tensor, Parts]:
    """Checks parts and creates one object for all weights with equal parts, so that these can be stacked.

    Raises:
        ValueError: If the parts do not cover every channel of their weight exactly once.
    """
    known: dict[tuple[int, tuple[bytes, ...]], Parts] = {}
    interned = {}
    for param, (dim, channels) in parts.items():
        channels = [own.cpu() for own in channels]
        covered = torch.cat(channels).sort().values
        if not torch.equal(covered, torch.arange(param.shape[dim])):
            raise ValueError(
                f"parts must cover every channel exactly once: {param.shape[dim]} channels on dimension {dim} of a weight of"
                f" shape {tuple(param.shape)}"
            )
        key = (dim, tuple(own.numpy().tobytes() for own in channels))
        interned[param] = known.setdefault(key, Parts(dim, channels))
    return interned
