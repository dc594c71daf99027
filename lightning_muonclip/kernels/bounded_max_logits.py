"""Per-head maximum attention logits from an upper bound on those of every query: exact, for a few rows of the product.

Attention kernels return the log-sum-exp of every query for their backward, and
``max_j(s_ij) <= log(sum_j(exp(s_ij))) <= max_j(s_ij) + log(n)`` for n visible keys. So a query whose bound is not above a
logit that is known already cannot hold a larger one: the few queries of largest bound hold the maximum, and the next bound
proves it.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import profiler

from lightning_muonclip.kernels.max_logits import (
    as_batch,
    check_arguments,
    check_mask,
    of_all_pairs,
    sequence_ids,
    visible_pairs,
)

#: Queries of a sequence and head that are computed exactly where the host must not wait for the device, or a part of all of
#: them: over the demo, after its first 100 steps, 8 of 256 prove 97 % of the maxima (docs/tracking.md).
ROWS, _PART = 8, 256

#: What a pair of a sequence and a head costs a CPU beside its logits, in logits of a whole pass.
_OVERHEAD = 4096

#: Bounds that are no further above ln(keys) are those of logits that are nearly equal, which no bound tells apart.
_FLAT = 2.0

#: Logits that a CPU computes at once.
_AT_ONCE = 2**20


class _Rows(NamedTuple):
    """Some queries, by their sequence, head and position, each of shape (rows,): tensors, or NumPy arrays."""

    batch: Any
    head: Any
    position: Any


class _Pairs(NamedTuple):
    """Which pairs are visible, as in :func:`~lightning_muonclip.kernels.max_logits.max_logits`.

    Documents have shape (batch or 1, L), the boolean mask (batch or 1, heads or 1, L or 1, S or 1): tensors, or NumPy
    arrays.
    """

    is_causal: bool
    window: int | None
    documents: Any
    mask: Any

    def numpy(self) -> _Pairs:
        """The same, of NumPy arrays."""
        documents, mask = (None if x is None else x.numpy() for x in (self.documents, self.mask))
        return self._replace(documents=documents, mask=mask)

    def hidden(self, rows: _Rows, columns: Any) -> Any:
        """Which keys some queries do not see, broadcastable to (rows, keys); ``None`` if they see all."""
        here = rows.position[:, None]
        hidden = []
        if self.is_causal:
            hidden.append(columns > here)
        if self.window is not None:
            hidden.append(abs(columns - here) >= self.window)
        if self.documents is not None:
            batch = rows.batch % len(self.documents)
            documents, own = self.documents[batch], self.documents[batch, rows.position][:, None]
            hidden.append((documents != own) | (own < 0))
        if self.mask is not None:
            hidden.append(~self.mask[tuple(index % size for index, size in zip(rows, self.mask.shape))])
        return functools.reduce(operator.or_, hidden) if hidden else None


@torch.no_grad()
def bounded_max_logits(
    query: Tensor,
    key: Tensor,
    bounds: Tensor,
    *,
    scale: float,
    is_causal: bool = False,
    window: int | None = None,
    documents: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """As :func:`~lightning_muonclip.kernels.max_logits.max_logits`, with an upper bound on the logits of every query.

    On a CPU the result is always exact: all queries are computed whose bound is above the largest logit found so far. Other
    devices, which the host must not wait for, compute the :data:`ROWS` queries of largest bound of every sequence and head,
    and the maximum is proven where no other bound is above it.

    Args:
        query: Shape ``(..., heads, L, d)``.
        key: Shape ``(..., key_heads, S, d)``.
        bounds: Shape ``(..., heads, L)``, float32: at least the largest logit of every query over its visible keys, such as
            the log-sum-exp; ``-inf`` for a query that sees nothing.
        scale: Factor on the dot products.
        is_causal: Query i sees only keys 0..i.
        window: Query i sees only keys ``i - window < j < i + window``.
        documents: Integer document ids of shape ``(batch, L)``.
        mask: Boolean or additive, broadcastable to ``(..., heads, L, S)``.

    Returns:
        float32 tensor: on a CPU the maxima, of shape ``(heads,)``. Elsewhere of shape ``(2, heads)``: the largest logits
        that were computed, and upper bounds on the largest logits of all, which are equal to the former where that is proven
        to be the maximum. Products are accumulated in float32, as in the kernels, so all agree with the kernel's own logits
        up to the rounding of a dot product.

    Raises:
        ValueError: As :func:`~lightning_muonclip.kernels.max_logits.max_logits`.

    Example:
        >>> q = k = 2 * torch.eye(2).reshape(1, 1, 2, 2)
        >>> log_sum_exp = (q @ k.mT / 2).logsumexp(-1)
        >>> bounded_max_logits(q, k, log_sum_exp, scale=0.5)
        tensor([2.])
    """
    check_arguments(query, key, window)
    arguments = query, key, bounds, scale, is_causal, window, documents, mask
    if query.device.type == "cpu":
        if torch.compiler.is_compiling():
            return torch.ops.muonclip.bounded_max_logits(*arguments)
        # Not without a profiler, since a span takes a fifth of the time of what it times.
        with (
            torch.profiler.record_function("muonclip::bounded_max_logits")
            if profiler._is_profiler_enabled
            else nullcontext()
        ):
            return _exact(*arguments)
    return top_rows(*arguments)


def _prepared(
    query: Tensor,
    key: Tensor,
    bounds: Tensor,
    scale: float,
    is_causal: bool,
    window: int | None,
    documents: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, float, _Pairs]:
    """Everything with exactly one batch dimension."""
    batch = query.shape[:-3]
    if batch != key.shape[:-3]:
        batch = torch.broadcast_shapes(batch, key.shape[:-3])
    heads, length, keys = query.shape[-3], query.shape[-2], key.shape[-2]
    if documents is not None:
        documents = sequence_ids(documents, batch, length, keys)
    if mask is not None:
        check_mask(mask, length, keys)
        mask = visible_pairs(mask, batch)
    pairs = _Pairs(is_causal, window, documents, mask)
    if query.ndim == 4 and query.shape[0] == key.shape[0]:  # as nearly always, without the cost of doing nothing
        return query, key, bounds, scale, pairs
    bounds = bounds.expand(*batch, heads, length).reshape(-1, heads, length)
    return as_batch(query, batch), as_batch(key, batch), bounds, scale, pairs


@torch.no_grad()
def top_rows(query: Tensor, key: Tensor, *others: Any, count: int | None = None) -> Tensor:
    """Without a branch on values: the maximum of the queries of largest bound, and at least the bound of all others.

    Args:
        query: As in :func:`bounded_max_logits`.
        key: As there.
        *others: All other arguments, in the order there.
        count: Number of queries; ``None`` is that of :data:`ROWS` and the length.
    """
    if query.numel() == 0 or key.numel() == 0:
        return torch.full((2, query.shape[-3]), float("-inf"), dtype=torch.float32, device=query.device)
    query, key, bounds, scale, pairs = _prepared(query, key, *others)
    batch, heads, length = bounds.shape
    count = min(count or max(ROWS, length // _PART), length)
    largest, positions = bounds.topk(min(count + 1, length), -1)
    positions = positions[..., :count]
    chosen = query.gather(2, positions[..., None].expand(-1, -1, -1, query.shape[3]))
    # The queries of all heads that share a key are next to each other.
    logits = _product(chosen.flatten(1, 2).unflatten(1, (key.shape[1], -1)).flatten(0, 1), key.flatten(0, 1))
    every = torch.arange(batch * heads * count, device=query.device)
    rows = _Rows(every // (heads * count), every // count % heads, positions.flatten())
    logits = logits.flatten(0, 1).mul_(scale)
    hidden = pairs.hidden(rows, torch.arange(key.shape[2], device=key.device))
    if hidden is not None:
        logits.masked_fill_(hidden, float("-inf"))
    maxima = logits.amax(-1).view(batch, heads, count).amax((0, 2))
    upper = torch.maximum(maxima, largest[..., count:].amax((0, 2))) if count < length else maxima
    return torch.stack([maxima, upper])


def _product(chosen: Tensor, key: Tensor) -> Tensor:
    """Products accumulated and returned in float32 (TF32 if torch's products may be); autocast would undo that."""
    with torch.autocast(chosen.device.type, enabled=False):
        if chosen.device.type == "cuda" and chosen.dtype in (torch.bfloat16, torch.float16):
            return torch.bmm(chosen, key.mT, out_dtype=torch.float32)
        return torch.bmm(chosen.float(), key.float().mT)


def _exact(query: Tensor, key: Tensor, *others: Any) -> Tensor:
    """By branch and bound: first one query of each head, then those whose bound is above its largest logit."""
    if query.numel() == 0 or key.numel() == 0:
        return torch.full((query.shape[-3],), float("-inf"), dtype=torch.float32)
    query, key, bounds, scale, pairs = _prepared(query, key, *others)
    # Bookkeeping in NumPy: on arrays this small, the overhead of a torch operation is most of its time.
    limits = bounds.numpy()
    batch, heads, length = limits.shape
    keys = key.shape[2]
    if limits.max() <= math.log(keys) + _FLAT:
        return of_all_pairs(query, key, scale, *pairs)
    first = limits.swapaxes(0, 1).reshape(heads, -1).argmax(-1)  # NaN is larger than any number
    visible = pairs.numpy()
    maxima = _of_rows(query, key, _Rows(first // length, np.arange(heads), first % length), scale, visible)
    is_open = limits > maxima[:, None]
    rows = is_open.nonzero()
    if not len(rows[0]):
        return torch.from_numpy(maxima)
    cost = len(rows[0]) * keys + np.count_nonzero(is_open.any(-1)) * _OVERHEAD
    if cost > batch * heads * length * keys / (2 if pairs.is_causal else 1):
        return of_all_pairs(query, key, scale, *pairs)
    at_once = max(1, _AT_ONCE // keys)
    for start in range(0, len(rows[0]), at_once):
        part = _Rows(*(index[start : start + at_once] for index in rows))
        np.maximum.at(maxima, part.head, _of_rows(query, key, part, scale, visible))
    return torch.from_numpy(maxima)


def _of_rows(query: Tensor, key: Tensor, rows: _Rows, scale: float, pairs: _Pairs) -> Any:
    """The largest logit of each of some queries, in order of sequences and heads; all but queries and keys are arrays."""
    chosen = query[tuple(map(torch.from_numpy, rows))].float()
    products = chosen.new_empty(len(chosen), key.shape[2])
    group = query.shape[1] // key.shape[1]
    start = 0
    # One at a time: gathering their keys would cost more than the products.
    for (batch, head), own in itertools.groupby(zip(rows.batch.tolist(), (rows.head // group).tolist())):
        end = start + sum(1 for _ in own)
        torch.mm(chosen[start:end], key[batch, head].float().mT, out=products[start:end])
        start = end
    logits = np.float32(scale) * products.numpy()
    hidden = pairs.hidden(rows, np.arange(key.shape[2]))
    if hidden is not None:
        logits[np.broadcast_to(hidden, logits.shape)] = -np.inf
    return logits.max(-1)


# Opaque to torch.compile, since it branches on values.
_operation = torch.library.custom_op(
    "muonclip::bounded_max_logits",
    _exact,
    mutates_args=(),
    schema=(
        "(Tensor query, Tensor key, Tensor bounds, float scale, bool is_causal, SymInt? window, Tensor? documents,"
        " Tensor? mask) -> Tensor"
    ),
)


@_operation.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape[-3], dtype=torch.float32)
