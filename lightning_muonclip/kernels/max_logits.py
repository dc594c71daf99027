"""The largest attention logit of every head: ``max(scale · q_i · k_j)`` over the batch and the visible pairs.

No softmax, no values, no gradient, and never the whole logit matrix: a block of queries at a time, against the keys that
it can see.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Queries a block: small enough for the block's logits to stay in cache (measured on CPUs: 32 to 64 is fastest).
QUERY_BLOCK = 64

#: An additive mask at or below this hides a pair. Libraries hide by -inf, by the lowest number of a dtype, or by -1e4; a
#: position bias is no mask, and a pair that has been given so much of it has no weight either.
HIDDEN = -1e4


@torch.no_grad()
def max_logits(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    is_causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Signed per-head maximum of the scaled dot products, before any soft-cap, additive bias or sink.

    Args:
        query: Shape ``(..., heads, L, d)``.
        key: Shape ``(..., key_heads, S, d)``; ``heads`` is a multiple of ``key_heads``, and every run of
            ``heads / key_heads`` query heads shares a key head.
        scale: Factor on the dot products, as attention applies it.
        is_causal: Query i sees keys 0..i only, as :func:`~torch.nn.functional.scaled_dot_product_attention` has it.
        mask: Shape broadcastable to ``(..., heads, L, S)``. Boolean: ``True`` is visible. Floating: an additive mask; a
            pair is hidden where it is at most :data:`HIDDEN`, and its value is not part of the maximum elsewhere.

    Returns:
        float32 tensor of shape ``(heads,)``; ``-inf`` for a head that sees nothing, NaN where a logit is NaN.

    Raises:
        ValueError: If the number of query heads is no multiple of the number of key heads.

    Source: Kimi K2, arXiv 2507.20534, section 2.1 (the :math:`S_{max}^h` of QK-Clip).

    Example:
        >>> q = k = 2 * torch.eye(2).reshape(1, 1, 2, 2)
        >>> max_logits(q, k, scale=0.5)
        tensor([2.])
    """
    heads, key_heads = query.shape[-3], key.shape[-3]
    if heads % key_heads:
        raise ValueError(f"{heads} query heads cannot share {key_heads} key heads evenly")
    if torch.compiler.is_compiling():
        return torch.ops.muonclip.max_logits(query, key, scale, is_causal, mask)
    return _max_logits(query, key, scale, is_causal, mask)


def _max_logits(query: Tensor, key: Tensor, scale: float, is_causal: bool, mask: Tensor | None) -> Tensor:
    heads, length = query.shape[-3:-1]
    key_heads, key_length = key.shape[-3:-1]
    maximum = torch.full((heads,), float("-inf"), dtype=torch.float32, device=query.device)
    if query.numel() == 0 or key.numel() == 0:
        return maximum
    visible = None if mask is None else _visible(mask, query.shape[:-3], heads, key_heads)
    query = _as_batch(query).unflatten(1, (key_heads, heads // key_heads))
    key = _as_batch(key)
    # Half-precision inputs are multiplied in float32, as attention itself accumulates; autocast would undo that.
    with torch.autocast(query.device.type, enabled=False):
        for start in range(0, length, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, length)
            reach = min(stop, key_length) if is_causal else key_length
            block = query[..., start:stop, :].float() * scale
            logits = block.flatten(2, 3) @ key[..., :reach, :].float().mT
            logits = logits.unflatten(2, (heads // key_heads, stop - start))
            if is_causal:
                future = torch.ones(stop - start, reach, dtype=torch.bool, device=query.device).triu(start + 1)
                logits = logits.masked_fill(future, float("-inf"))
            if visible is not None:
                rows = visible if visible.shape[-2] == 1 else visible[..., start:stop, :]
                keys = rows if rows.shape[-1] == 1 else rows[..., :reach]
                logits = logits.masked_fill(~keys, float("-inf"))
            maximum = torch.maximum(maximum, logits.amax((0, 3, 4)).flatten())
    return maximum


# To torch.compile one opaque operation: traced, the loop would be unrolled, and compiled anew for every length.
_operation = torch.library.custom_op(
    "muonclip::max_logits",
    _max_logits,
    mutates_args=(),
    schema="(Tensor query, Tensor key, float scale, bool is_causal, Tensor? mask) -> Tensor",
)


@_operation.register_fake
def _(query: Tensor, key: Tensor, scale: float, is_causal: bool, mask: Tensor | None) -> Tensor:
    return query.new_empty(query.shape[-3], dtype=torch.float32)


def _as_batch(x: Tensor) -> Tensor:
    """Exactly one batch dimension: (batch, heads, length, d)."""
    return x.detach().reshape(-1, *x.shape[-3:])


def _visible(mask: Tensor, batch: torch.Size, heads: int, key_heads: int) -> Tensor:
    """The mask as booleans of shape (batch or 1, key heads or 1, group or 1, L or 1, S or 1)."""
    if mask.dtype is not torch.bool:
        mask = mask > HIDDEN
    if len(batch) > 1 and mask.ndim > 3:
        mask = mask.expand(*batch, *mask.shape[-3:]).flatten(0, -4)
    mask = mask[(None,) * (4 - mask.ndim)]
    if mask.shape[1] == 1:
        return mask.unsqueeze(2)
    return mask.unflatten(1, (key_heads, heads // key_heads))
