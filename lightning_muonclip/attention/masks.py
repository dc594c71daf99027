"""Which key each query may see."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionMask:
    """Visibility of keys, in the form that attention can use best.

    Args:
        causal: A query sees no later key.
        padding: Boolean, shape ``(batch, length)``; ``True`` is a real token. Padded keys are seen by no query.

    Raises:
        ValueError: If ``padding`` is not a boolean matrix.

    Example:
        >>> keep = torch.tensor([[True, True, False]])
        >>> AttentionMask(causal=False, padding=keep).dense(3)[0, 0, 0]
        tensor([ True,  True, False])
    """

    causal: bool = True
    padding: Tensor | None = None

    def __post_init__(self) -> None:
        if self.padding is not None and (self.padding.dtype is not torch.bool or self.padding.ndim != 2):
            raise ValueError(
                "padding must be boolean of shape (batch, length), True for real tokens; got"
                f" {self.padding.dtype} of shape {tuple(self.padding.shape)}"
            )

    def __and__(self, other: AttentionMask) -> AttentionMask:
        """Visible in both."""
        if self.padding is None or other.padding is None:
            padding = other.padding if self.padding is None else self.padding
        else:
            padding = self.padding & other.padding
        return replace(self, causal=self.causal or other.causal, padding=padding)

    def dense(self, length: int) -> Tensor | None:
        """Boolean mask of shape ``(batch, 1, length or 1, length)``, or ``None`` where causality alone says it all.

        Raises:
            ValueError: If the padding is for another length.
        """
        if self.padding is None:
            return None
        if self.padding.shape[1] != length:
            raise ValueError(f"padding is for {self.padding.shape[1]} tokens, the sequence has {length}")
        visible = self.padding[:, None, None, :]
        if self.causal:
            visible = visible & torch.ones(length, length, dtype=torch.bool, device=visible.device).tril()
        return visible

    def real_pairs(self, visible: Tensor | None) -> Tensor | None:
        """What :meth:`dense` made, without padded queries: the logits that count."""
        if visible is None or self.padding is None:
            return visible
        return visible & self.padding[:, None, :, None]
