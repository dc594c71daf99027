"""Fused weights: which output channels form a matrix of their own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from lightning_muonclip.optim.options import LR_ADJUSTMENTS

#: How Muon reads a parameter: as a matrix; as a batch of matrices of shape (experts, m, n); or, for a convolution of shape
#: (out, in, kernel...), as one matrix (out, in · kernel).
KINDS = ("matrix", "experts", "convolution")

#: For weights: the dimension of their output channels, and the channels of each matrix. More may follow, such as names.
MatrixParts = Mapping[Tensor, tuple[Any, ...]]


class Parts:
    """The matrices in one fused weight, or in each matrix of a batch.

    Args:
        dim: The dimension of the output channels.
        channels: Channel indices of each matrix.
        is_transposed: Whether each matrix is stored as (in, out).

    Attributes:
        count: Number of channels of the weight.
    """

    def __init__(self, dim: int, channels: Sequence[Tensor], is_transposed: bool) -> None:
        self.dim = dim
        self.is_transposed = is_transposed
        sizes: dict[int, list[Tensor]] = defaultdict(list)
        for own in channels:
            sizes[len(own)].append(own)
        self.count = sum(map(len, channels))
        self._channels = {torch.device("cpu"): [torch.stack(own).cpu() for own in sizes.values()]}
        self._factors: dict[tuple[str, int, int, torch.device, torch.dtype], Tensor] = {}

    def channels_on(self, device: torch.device) -> list[Tensor]:
        """Channels of the matrices, one tensor of shape (matrices, channels) per size."""
        if device not in self._channels:
            self._channels[device] = [channels.to(device) for channels in self._channels[torch.device("cpu")]]
        return self._channels[device]

    def sizes(self) -> list[tuple[int, int]]:
        """Number of matrices and of channels per matrix, for every size."""
        return [(len(own), own.shape[1]) for own in self._channels[torch.device("cpu")]]

    def where_any(self, channels: Tensor) -> Tensor:
        """For each matrix, whether something holds for any of its channels.

        Args:
            channels: Shape (batch, channels).

        Returns:
            A vector, in the order of :meth:`channels_on`; of each size, those of one matrix of the batch together.
        """
        return torch.cat([channels[:, own].any(-1).flatten() for own in self.channels_on(channels.device)])

    def factors(self, adjustment: str, fan_in: int, weight: Tensor) -> Tensor:
        """Per-channel scale of the update under the named adjustment, shaped to multiply the weight or a shard of it."""
        ndim, device, dtype = weight.ndim, weight.device, torch.promote_types(weight.dtype, torch.float32)
        key = (adjustment, fan_in, ndim, device, dtype)
        if key not in self._factors:
            factors = torch.empty(self.count, dtype=dtype)
            for channels in self.channels_on(torch.device("cpu")):
                factors[channels] = LR_ADJUSTMENTS[adjustment](channels.shape[1], fan_in)
            shape = [-1 if dim == self.dim else 1 for dim in range(ndim)]
            self._factors[key] = factors.view(shape).to(device)
        return self._factors[key]


class PlacedParts:
    """The parts of weights, by their places in parameter groups.

    Another tensor may take the place of a weight, as with ``fully_shard`` and ``to_empty``.

    Args:
        parts: The parts of some weights.
        groups: The parameter groups.
    """

    def __init__(self, parts: Mapping[Tensor, Parts] | None = None, groups: Sequence[Mapping[str, Any]] = ()) -> None:
        self._groups = [[parts.get(p) for p in group["params"]] for group in groups] if parts else []

    def of(self, groups: Sequence[Mapping[str, Any]], number: int) -> list[tuple[Tensor, Parts | None]]:
        """The weights of one group, each with its parts.

        Raises:
            RuntimeError: If groups have other weights than before.
        """
        params = groups[number]["params"]
        parts = self._groups[number] if number < len(self._groups) else [None] * len(params)
        is_same = list(map(len, self._groups)) == [len(group["params"]) for group in groups[: len(self._groups)]]
        if not is_same or any(own and own.count != p.shape[own.dim] for p, own in zip(params, parts)):
            raise RuntimeError(
                f"parameter group {number} has other weights than when the parts of its fused weights were set; call"
                " set_parts() after changing param_groups, or replace each weight by one of the same shape"
            )
        return list(zip(params, parts))


def intern_parts(parts: MatrixParts, kinds: Mapping[Tensor, str]) -> dict[Tensor, Parts]:
    """Checks parts and creates one object for all weights with equal parts, so that these can be stacked.

    Args:
        parts: The parts of weights.
        kinds: How Muon reads the weights that it has; those of others do not matter.

    Raises:
        ValueError: If the parts do not cover every channel of their weight exactly once.
    """
    known: dict[Any, Parts] = {}
    interned = {}
    for param, (dim, channels, *_) in parts.items():
        if param not in kinds:
            continue
        dim, channels = dim % param.ndim, [torch.as_tensor(own).cpu() for own in channels]
        check_cover(f"a weight of shape {tuple(param.shape)}", param, dim, channels, kinds[param])
        is_transposed = kinds[param] != "convolution" and dim == param.ndim - 1
        key = (dim, is_transposed, tuple(own.numpy().tobytes() for own in channels))
        interned[param] = known.setdefault(key, Parts(dim, channels, is_transposed))
    return interned


def check_cover(name: str, param: Tensor, dim: int, channels: Sequence[Tensor], kind: str) -> None:
    """Raises ValueError unless the parts cover every channel of a weight exactly once."""
    possible = {"matrix": (0, 1), "experts": (param.ndim - 2, param.ndim - 1), "convolution": (0,)}[kind]
    if dim not in possible:
        raise ValueError(
            f"the output channels of {name} cannot be on its dimension {dim}; give parts on dimension"
            f" {' or '.join(map(str, possible))}"
        )
    covered = torch.cat([own.flatten() for own in channels]).sort().values if len(channels) else torch.empty(0)
    if not torch.equal(covered, torch.arange(param.shape[dim])):
        shown = f": parts {[own.tolist() for own in channels]}" if param.shape[dim] <= 64 else ""
        raise ValueError(
            f"parts must cover every channel exactly once: {param.shape[dim]} channels on dimension {dim} of {name}{shown}"
        )


def named_parts(given: Mapping[Any, tuple[Any, ...]], names: Mapping[Any, Sequence[str]]) -> MatrixParts:
    """The user's parts, by weight.

    Args:
        given: By weight, by name, or by a shell-style pattern of names.
        names: The names of every weight.

    Raises:
        ValueError: If a pattern matches no weight, or if its parts do not cover one that it matches.
    """
    found: dict[Tensor, tuple[Any, ...]] = {}
    for key, parts in given.items():
        if isinstance(key, Tensor):
            found[key] = parts
            continue
        dim, channels = parts
        matched = {p: own for p, own in names.items() if any(fnmatchcase(name, key) for name in own)}
        if not matched:
            raise ValueError(f"parts names {key!r}, which matches no weight; check its spelling")
        own_channels = [torch.as_tensor(own) for own in channels]
        for param, own in matched.items():
            if not -param.ndim <= dim < param.ndim:
                raise ValueError(f"parts[{key!r}] names dimension {dim} of {own[0]}, of shape {tuple(param.shape)}")
            kind = "matrix" if param.ndim == 2 else "experts" if dim % param.ndim >= param.ndim - 2 else "convolution"
            check_cover(f"{own[0]} (parts[{key!r}])", param, dim % param.ndim, own_channels, kind)
            found[param] = dim, own_channels
    return found


def parts_text(parts: tuple[Any, ...]) -> str:
    """Parts in words, such as ``"2 parts: gate, up"``; nothing for a single one.

    Example:
        >>> parts_text((0, [torch.arange(4), torch.arange(4, 6)]))
        '2 parts of 4, 2 channels'
    """
    _, channels, *names = parts
    if len(channels) < 2:
        return ""
    if names and names[0]:
        return f"{len(channels)} parts: {', '.join(names[0])}"
    sizes = list(map(len, channels))
    return f"{len(sizes)} parts of {', '.join(map(str, sizes if len(set(sizes)) > 1 else sizes[:1]))} channels"
