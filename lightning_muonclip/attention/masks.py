"""Which key each query may see."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionMask:
    """Visibility of keys, in the form that attention can use best.

    Args:
        causal: A query sees no later key.
        padding: Boolean, shape ``(batch, length)``; ``True`` is a real token. Padded keys are seen by no query.
        window: A query sees only what is less than so many tokens away, itself included; ``None`` is any distance.
        documents: Integers, shape ``(batch, length)``: the document of every token, which sees no other document. A negative
            one is padding, which sees nothing and is seen by no query.

    Raises:
        ValueError: If ``padding`` is not a boolean matrix, ``documents`` not one of integers, or the window is empty.

    Example:
        >>> keep = torch.tensor([[True, True, False]])
        >>> AttentionMask(causal=False, padding=keep).dense(3)[0, 0, 0]
        tensor([ True,  True, False])
    """

    causal: bool = True
    padding: Tensor | None = None
    window: int | None = None
    documents: Tensor | None = None

    def __post_init__(self) -> None:
        if self.padding is not None and (self.padding.dtype is not torch.bool or self.padding.ndim != 2):
            raise ValueError(
                "padding must be boolean of shape (batch, length), True for real tokens; got"
                f" {self.padding.dtype} of shape {tuple(self.padding.shape)}"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window of {self.window} lets no query see even itself; give at least 1, or None")
        if self.documents is not None and (
            self.documents.dtype.is_floating_point or self.documents.dtype is torch.bool or self.documents.ndim != 2
        ):
            raise ValueError(
                "documents must be integers of shape (batch, length), one id a token; got"
                f" {self.documents.dtype} of shape {tuple(self.documents.shape)}"
            )

    def __and__(self, other: AttentionMask) -> AttentionMask:
        """Visible in both.

        Raises:
            ValueError: If both have documents, and not the same tensor.
        """
        if self.padding is None or other.padding is None:
            padding = other.padding if self.padding is None else self.padding
        else:
            padding = self.padding & other.padding
        if not (self.documents is None or other.documents is None or self.documents is other.documents):
            raise ValueError("both masks have documents, whose ids may mean different ones; give one mask without them")
        return replace(
            self,
            causal=self.causal or other.causal,
            padding=padding,
            window=min((mask.window for mask in (self, other) if mask.window is not None), default=None),
            documents=other.documents if self.documents is None else self.documents,
        )

    def dense(self, length: int, device: torch.device | None = None) -> Tensor | None:
        """Boolean mask of shape ``(batch or 1, 1, length or 1, length)``, or ``None`` where causality alone says it all.

        Args:
            length: Tokens of a sequence.
            device: Where the mask is to be, as padding and documents are.

        Raises:
            ValueError: If the padding or the documents are for another length.
        """
        for name, tokens in (("padding is", self.padding), ("documents are", self.documents)):
            if tokens is not None and tokens.shape[1] != length:
                raise ValueError(f"{name} for {tokens.shape[1]} tokens, the sequence has {length}")
        parts = []
        if self.padding is not None:
            parts.append(self.padding[:, None, None, :])
        if self.documents is not None:
            rows, columns = self.documents[:, None, :, None], self.documents[:, None, None, :]
            parts.append((rows == columns) & (rows >= 0))
        if self.window is not None and self.window < length:
            position = torch.arange(length, device=device)
            parts.append(((position[:, None] - position).abs() < self.window)[None, None])
        if parts and self.causal:
            parts.append(torch.ones(length, length, dtype=torch.bool, device=parts[0].device).tril())
        return functools.reduce(torch.logical_and, parts) if parts else None

    def real_documents(self) -> Tensor | None:
        """The document of every token, negative for padding; ``None`` where all are of one."""
        if self.padding is None:
            return self.documents
        one = torch.zeros_like(self.padding, dtype=torch.long) if self.documents is None else self.documents.long()
        return one.masked_fill(~self.padding, -1)

    def real_pairs(self, visible: Tensor | None) -> Tensor | None:
        """What :meth:`dense` made, without padded queries: the logits that count."""
        if visible is None or self.padding is None:
            return visible
        return visible & self.padding[:, None, :, None]
