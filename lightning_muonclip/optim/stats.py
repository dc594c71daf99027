"""What people look at while Muon trains: figures of every matrix, read when somebody asks for them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_muonclip.optim.parts import Parts
from lightning_muonclip.optim.stacking import matrix_shape

#: The figures of a matrix.
FIGURES = ("update_rms", "update_to_weight", "stable_rank", "head_imbalance", "zero_gradients")

#: By name of the matrix.
Stats = dict[str, dict[str, float]]

#: For weights of attention: the dimension of their output channels, and the channels of every head; queries, keys and the
#: rest by themselves.
Heads = Mapping[Tensor, tuple[int, Sequence[Sequence[Tensor]]]]

#: What ranks add up: squares of the update and of the weight, zeros, elements, ranks and matrices with their number,
#: imbalances with their number.
_SUMS = 8
_ITERATIONS = 16


class Tracker:
    """Sums over this rank's parts of the matrices, on their device, of the last step that was tracked.

    Attributes:
        is_on: Whether the next step is tracked.
        heads: The heads of attention, or a function that finds them when they are needed.
    """

    def __init__(self, is_on: bool = False) -> None:
        self.is_on = is_on
        self.heads: Heads | Callable[[], Heads] = {}
        self._sums: dict[Tensor, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"is_on": self.is_on, "heads": {}, "_sums": {}}

    def forget(self) -> None:
        """Drops what was tracked."""
        self._sums = {}

    def begin(self, param: Tensor, weight: Tensor, grad: Tensor) -> None:
        """Notes a weight before it is stepped."""
        sums = self._sums[param] = torch.zeros(_SUMS, dtype=torch.float32, device=weight.device)
        sums[1] = torch.linalg.vector_norm(weight, dtype=torch.float32) ** 2
        sums[2] = (grad == 0).sum()
        sums[3] = grad.numel()

    def note_momentum(self, param: Tensor, whole: Tensor, kind: str, parts: Parts | None) -> None:
        """Notes what is orthogonalized, where it is whole."""
        found = torch.cat([stable_ranks(matrices) for matrices in _matrices(whole, kind, parts)])
        self._sums[param][4] += found.sum()
        self._sums[param][5] += len(found)
        if callable(self.heads):
            self.heads = self.heads()
        if param in self.heads and whole.ndim == 2:
            dim, groups = self.heads[param]
            imbalances = [_imbalance(whole.mT if dim else whole, group) for group in groups if len(group) > 1]
            if imbalances:
                self._sums[param][6] += torch.stack(imbalances).max()
                self._sums[param][7] += 1

    def note_update(self, param: Tensor, direction: Tensor, scale: float | Tensor) -> None:
        """Notes this rank's part of an update without the learning rate."""
        self._sums[param][0] = torch.linalg.vector_norm(direction * scale, dtype=torch.float32) ** 2

    def read(self, param_groups: Sequence[Mapping[str, Any]], ranks_of: Callable[[Tensor], Any]) -> Stats:
        """The figures by name. Waits for the device, and for the ranks that have a part of the weights.

        Args:
            param_groups: Those of the optimizer, with the same weights in the same order on all ranks.
            ranks_of: The process group that holds parts of a weight; ``None`` for this rank alone.
        """
        names: dict[Tensor, str] = {}
        rates: dict[Tensor, Any] = {}
        together: dict[Any, list[Tensor]] = defaultdict(list)
        for group in param_groups:
            if group["algorithm"] == "muon":
                params = group["params"]
                names |= dict(zip(params, group.get("param_names") or _numbered(len(names), len(params))))
                rates |= dict.fromkeys(params, group["lr"])
                for param in params:
                    together[ranks_of(param)].append(param)
        stats: Stats = {}
        for ranks, params in together.items():
            empty = torch.zeros(_SUMS, dtype=torch.float32, device=params[0].device)
            table = torch.stack([self._sums.get(param, empty) for param in params])
            if ranks is not None:
                dist.all_reduce(table, group=ranks)
            for param, row in zip(params, table.tolist()):
                if row[3]:
                    stats[names[param]] = _figures(row, float(rates[param]))
        return {name: stats[name] for name in names.values() if name in stats}


def _numbered(start: int, count: int) -> list[str]:
    return [f"parameter {start + i}" for i in range(count)]


def summarized(stats: Stats) -> dict[str, float]:
    """The mean over the matrices of each figure; only of those that some matrix has."""
    found = {figure: [own[figure] for own in stats.values() if not math.isnan(own[figure])] for figure in FIGURES}
    return {figure: sum(values) / len(values) for figure, values in found.items() if values}


def stable_ranks(matrices: Tensor) -> Tensor:
    """The squared Frobenius norm over the squared spectral norm of each matrix of a batch, by power iteration.

    Example:
        >>> stable_ranks(torch.diag(torch.tensor([2.0, 1.0, 1.0]))[None]).round(decimals=3)
        tensor([1.5000])
    """
    largest = matrices.abs().amax((-2, -1), keepdim=True)
    x = (matrices / torch.where(largest == 0, 1.0, largest)).float()
    vector = torch.cos(torch.arange(1, x.shape[-1] + 1, device=x.device)).expand(len(x), -1)[..., None]
    for _ in range(_ITERATIONS):
        vector = torch.nn.functional.normalize(x.mT @ (x @ vector), dim=-2, eps=1e-30)
    spectral = (x @ vector).float().square().sum((-2, -1))
    frobenius = x.float().square().sum((-2, -1))
    return torch.where(spectral > 0, frobenius / spectral, 0.0)


def _matrices(whole: Tensor, kind: str, parts: Parts | None) -> Iterator[Tensor]:
    """The matrices of a weight, those of one shape together."""
    batch = whole.reshape(matrix_shape(whole.shape, kind))
    if parts is None:
        yield batch
        return
    oriented = batch.mT if parts.is_transposed else batch
    for channels in parts.channels_on(whole.device):
        yield oriented[:, channels].flatten(0, 1)


def _imbalance(rows: Tensor, heads: Sequence[Tensor]) -> Tensor:
    """The largest over the mean norm of the heads."""
    norms = torch.stack([torch.linalg.vector_norm(rows[own.to(rows.device)], dtype=torch.float32) for own in heads])
    return torch.where(norms.mean() > 0, norms.max() / norms.mean(), 1.0).float()


def _figures(row: Sequence[float], rate: float) -> dict[str, float]:
    update, weight, zeros, elements, ranks, matrices, imbalance, has_heads = row
    return {
        "update_rms": math.sqrt(update / elements),
        "update_to_weight": rate * math.sqrt(update / weight) if weight else math.inf,
        "stable_rank": ranks / matrices if matrices else math.nan,
        "head_imbalance": imbalance / has_heads if has_heads else math.nan,
        "zero_gradients": zeros / elements,
    }
