"""Base class of the attention modules: everything between the rotated queries and keys and the output."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_muonclip.attention.core import BACKEND_CHOICES, attention
from lightning_muonclip.attention.masks import AttentionMask, checked
from lightning_muonclip.attention.score_mods import ScoreMod, SoftCap, chain, from_head
from lightning_muonclip.attention.tracking import Tracked
from lightning_muonclip.parallel.heads import first_head, for_own_heads
from lightning_muonclip.values import has_values


class AttentionModule(Tracked):
    """Attends with the queries, keys and values of a subclass, and applies its ``o_proj``.

    Args:
        num_attention_heads: Number of query heads on all ranks.
        scaling: Factor on the dot products.
        sliding_window: A query sees only keys less than this many tokens away, whatever the mask. ``None`` means any
            distance.
        softcap: Replaces logits by ``softcap * tanh(logit / softcap)``, as in Gemma 2 (arXiv 2408.00118). ``None`` disables
            it.
        sinks: Whether every head has a learned logit that takes part in the softmax but has no value, as in GPT-OSS
            (arXiv 2508.10925) and StreamingLLM (arXiv 2309.17453).
        score_mod: A modification of the logits, applied before the mask, in FlexAttention's signature (see
            :mod:`~lightning_muonclip.attention.score_mods`).
        backend: The attention kernel (see :func:`~lightning_muonclip.attention.core.attention`).

    Raises:
        ValueError: If the window is empty, the soft-cap is not positive, or the backend is unknown.
    """

    o_proj: nn.Linear

    def __init__(
        self,
        num_attention_heads: int,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: bool,
        score_mod: ScoreMod | None,
        backend: str,
    ) -> None:
        super().__init__()
        if sliding_window is not None and (not isinstance(sliding_window, int) or sliding_window < 1):
            raise ValueError(
                f"sliding_window must be an integer of at least 1, got {sliding_window!r}; use None for no window"
            )
        if backend not in BACKEND_CHOICES:
            raise ValueError(f"unknown attention backend {backend!r}; use one of {', '.join(BACKEND_CHOICES)}")
        known = getattr(score_mod, "num_heads", num_attention_heads)
        if known != num_attention_heads:
            raise ValueError(
                f"the score_mod is for {known} heads, but the attention has {num_attention_heads}; create it with"
                f" num_heads={num_attention_heads}"
            )
        self.num_attention_heads = num_attention_heads
        self.scaling = scaling
        self.sliding_window = sliding_window
        self.softcap = softcap
        self.cap = None if softcap is None else SoftCap(softcap)
        self.sinks = nn.Parameter(torch.zeros(num_attention_heads)) if sinks else None
        self.score_mod = score_mod
        self.backend = backend

    @property
    def head_weight(self) -> Tensor:
        """The weight whose rows are the channels of the heads, which tensor parallelism shards."""
        raise NotImplementedError

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask | None) -> Tensor:
        """Attends with the heads of this rank, reports the maximum logits, and projects.

        Args:
            query: Shape ``(batch, heads, length, d)``, rotated.
            key: Shape ``(batch, key_heads, length, d)``, rotated.
            value: Shape ``(batch, key_heads, length, d_v)``.
            mask: Defaults to a causal mask.

        Returns:
            Tensor of shape ``(batch, length, hidden_size)``.
        """
        mask = checked(mask)
        if self.sliding_window is not None:
            mask = mask.within(self.sliding_window)
        mask, score_mod, sinks = self._for_own_heads(mask, query.shape[1])
        output, maxima = attention(
            query,
            key,
            value,
            scale=self.scaling,
            mask=mask,
            score_mod=score_mod if self.cap is None else chain(self.cap, score_mod),
            sinks=sinks,
            track=self.track if has_values((query, key)) else None,
            backend=self.backend,
        )
        self.report(maxima)
        return self.o_proj(output.transpose(1, 2).flatten(2))

    def _for_own_heads(self, mask: AttentionMask, local: int) -> tuple[AttentionMask, ScoreMod | None, Tensor | None]:
        """Mask, score_mod and sinks for the heads of this rank, which are counted from 0."""
        heads = self.num_attention_heads
        first = None if local == heads else first_head(self.head_weight, (0,), heads, local)
        if first is None:
            return mask, self.score_mod, self.sinks
        score_mod, sinks = self.score_mod, self.sinks
        if isinstance(score_mod, nn.Module):
            shared = {
                name: for_own_heads(param, self.head_weight, heads, local)
                for name, param in score_mod.named_parameters()
            }
            score_mod = partial(_call, score_mod, shared)
        return (
            mask.from_head(first),
            None if score_mod is None else from_head(score_mod, first),
            None if sinks is None else for_own_heads(sinks, self.head_weight, heads, local)[first : first + local],
        )


def _call(module: nn.Module, params: dict[str, Tensor], *args: Tensor) -> Tensor:
    return functional_call(module, params, args)
