"""Modifications of the logits before the softmax, in the signature of FlexAttention's ``score_mod``."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

#: ``score_mod(score, b, h, q_idx, kv_idx) -> score``, with the indices of batch, query head, query and key. FlexAttention
#: calls it with scalars, this library with tensors that broadcast.
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


# Modules with integer attributes: torch.compile treats these as constants. Other numbers become symbols once there are two
# values of them, and a score_mod of FlexAttention cannot hold symbols.


class SoftCap(nn.Module):
    """``cap * tanh(score / cap)``, which keeps logits below the cap, as in Gemma 2 (arXiv 2408.00118, section 2).

    Raises:
        ValueError: If the cap is not positive.
    """

    def __init__(self, cap: float) -> None:
        super().__init__()
        check_cap(cap)
        self.numerator, self.denominator = float(cap).as_integer_ratio()

    def forward(self, score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """A :data:`ScoreMod`."""
        return capped(self.numerator / self.denominator, score)


def check_cap(cap: float) -> None:
    """Checks a soft-cap.

    Raises:
        ValueError: If it is not positive.
    """
    if not cap > 0:
        raise ValueError(f"softcap must be positive, got {cap}; use None for no cap")


def capped(cap: float, score: Tensor, *_: Tensor) -> Tensor:
    """The function of :class:`SoftCap`."""
    return cap * torch.tanh(score / cap)


class Alibi(nn.Module):
    """Attention with linear biases (ALiBi): every head subtracts its slope times the distance from the logits.

    The first n heads, n the largest power of two, have slopes ``2 ** (-8 (h + 1) / n)``; those of further heads lie between.

    Args:
        num_heads: Number of query heads on all ranks.

    Raises:
        ValueError: If ``num_heads`` is less than 1.

    Source: Press et al., arXiv 2108.12409, section 3.

    Example:
        >>> score_mod = Alibi(8)
        >>> h, q, k = torch.tensor([0, 7]), torch.tensor(9), torch.tensor(5)
        >>> score_mod(torch.zeros(2), torch.tensor(0), h, q, k)
        tensor([-2.0000, -0.0156])
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1; got {num_heads}")
        self.num_heads = num_heads
        # The slopes are not a buffer, which would lose precision in ``module.bfloat16()``.
        self.main = 2 ** math.floor(math.log2(num_heads))

    def forward(self, score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """A :data:`ScoreMod`."""
        exponent = torch.where(h < self.main, 2 * (h + 1), 2 * (h - self.main) + 1)
        return score - torch.exp2(-4 / self.main * exponent) * (q - k).abs()


class RelativeBias(nn.Module):
    """A learned bias per head and bucket of distances, as in T5. Each near distance has its own bucket.

    Args:
        num_heads: Number of query heads on all ranks.
        num_buckets: Number of biases per head.
        max_distance: Distances from here on share a bucket.
        bidirectional: Whether later keys have their own buckets; otherwise they share that of distance 0.

    Raises:
        ValueError: If there are too few buckets, or ``max_distance`` is not beyond the near distances.

    Source: Raffel et al., arXiv 1910.10683, section 2.1.
    """

    def __init__(
        self, num_heads: int, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = False
    ) -> None:
        super().__init__()
        near = num_buckets // (4 if bidirectional else 2)
        if near < 1:
            raise ValueError(f"num_buckets must be at least {4 if bidirectional else 2}; got {num_buckets}")
        if max_distance <= near:
            raise ValueError(
                f"max_distance must be above {near}, the number of near distances of {num_buckets} buckets; got"
                f" {max_distance}"
            )
        self.num_heads = num_heads
        # An embedding, named as in Hugging Face, so that Muon and muP do not treat it as a hidden weight.
        self.relative_attention_bias = nn.Embedding(num_buckets, num_heads)
        nn.init.zeros_(self.relative_attention_bias.weight)
        self.max_distance = max_distance
        self.bidirectional = bidirectional

    def forward(self, score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """A :data:`ScoreMod`."""
        return score + self.relative_attention_bias.weight[self._bucket(q - k), h]

    def _bucket(self, behind: Tensor) -> Tensor:
        buckets = self.relative_attention_bias.num_embeddings
        first: Tensor | int = 0
        if self.bidirectional:
            buckets //= 2
            first = torch.where(behind < 0, buckets, 0)
            distance = behind.abs()
        else:
            distance = behind.clamp(min=0)
        near = buckets // 2
        grown = torch.log(distance.clamp(min=1).float() / near) / math.log(self.max_distance / near)
        far = (near + (grown * (buckets - near)).long()).clamp(max=buckets - 1)
        return first + torch.where(distance < near, distance, far)


def chain(first: ScoreMod, second: ScoreMod | None) -> ScoreMod:
    """Applies ``first``, then ``second``."""
    if second is None:
        return first
    return lambda score, b, h, q, k: second(first(score, b, h, q, k), b, h, q, k)


def from_head(score_mod: ScoreMod, first: int) -> ScoreMod:
    """A score_mod for heads counted from ``first``, as on a rank of tensor parallelism."""
    return lambda score, b, h, q, k: score_mod(score, b, h + first, q, k)
