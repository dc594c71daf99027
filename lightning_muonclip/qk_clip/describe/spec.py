"""AttentionSpec: the description of one attention module's heads and projections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from lightning_muonclip.qk_clip.describe.layout import ChannelMap


@dataclass(frozen=True)
class Projection:
    """One weight that computes queries, keys or values.

    Args:
        name: Path, inside the attention module, of a submodule with ``weight`` (and ``bias``), or of a parameter.
        layout: Its output channels, in the syntax of :mod:`lightning_muonclip.qk_clip.describe.layout`.
        dim: The output dimension of the weight, or several, whose channels are then flattened in this order. A bias
            follows its weight: all its elements are channels.
        offset: The number that the module adds to the weight before it multiplies: 1 for the gain of Gemma's norm.

    Example:
        >>> Projection("qkvgb", "[q(H d) | k(H d) | *]", dim=(1, 2)).dims  # of shape (width, 5, heads * d)
        (1, 2)
    """

    name: str
    layout: str | ChannelMap
    dim: int | tuple[int, ...] = 0
    offset: float = 0.0

    @property
    def dims(self) -> tuple[int, ...]:
        """The output dimensions of the weight."""
        return (self.dim,) if isinstance(self.dim, int) else tuple(self.dim)


@dataclass(frozen=True)
class Softmax:
    """One softmax over matrix products, of a module that attends by hand.

    Attributes:
        products: How many products its input is made of.
        product: Which of them, in the order in which they are made, is that of queries and keys; ``None`` if none is.
        is_whole: Whether the whole input of the softmax is the logits, where they are several products. Else they are the
            product times the factors that follow it.
    """

    products: int
    product: int | None
    is_whole: bool = False


class HeadAxis(NamedTuple):
    """A leading axis of the queries that counts heads.

    Attributes:
        axis: Counted from the innermost leading axis, which is 1.
        heads: How many heads it counts.
        is_inner: Where heads share the axis with something else, such as the batch: whether they change faster.
    """

    axis: int
    heads: int
    is_inner: bool = True


@dataclass(frozen=True)
class AttentionSpec:
    """The heads and projections of one attention module.

    Args:
        projections: The weights that compute queries and keys. Those of values may be listed too (kind ``*``): QK-Clip does
            not scale them, and Muon can then orthogonalize them head by head.
        num_heads: Number of query heads.
        num_key_value_heads: Number of key heads. Defaults to ``num_heads``.
        sizes: Channel counts that the layouts name, such as ``{"d": 64}``. ``H``, ``G`` and ``r = H / G`` are predefined.
        qk_norm: Whether queries or keys are normalized after the projection; no factor on a weight can then lower a logit.
        gains: The gains of those norms, which can be scaled instead; they imply ``qk_norm``. A layout without ``H`` or
            ``G``, such as ``q(d)``, is one gain for all heads.
        softmaxes: Where a module that calls no attention function has its logits (see :mod:`.locate`).
        head_axes: The leading axes of the queries that count heads, outermost first; by default the innermost one.
        watched: Why no factor on a weight could lower its logits; it is then watched and never scaled.
        set_by: With QK-norm, the parameters that set the logits behind the product of queries and keys.

    Raises:
        ValueError: If the number of query heads is not a multiple of the number of key heads.

    Example:
        >>> AttentionSpec((Projection("wq", "q(H d)"), Projection("wk", "k(G d)")), 8, 2, {"d": 64}).sizes["r"]
        4
    """

    projections: tuple[Projection, ...]
    num_heads: int
    num_key_value_heads: int | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    qk_norm: bool = False
    gains: tuple[Projection, ...] = ()
    softmaxes: tuple[Softmax, ...] = ()
    head_axes: tuple[HeadAxis, ...] = ()
    watched: str = ""
    set_by: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        groups = self.num_key_value_heads or self.num_heads
        if self.num_heads % groups:
            raise ValueError(f"num_heads must be a multiple of num_key_value_heads; got {self.num_heads} and {groups}")
        known = {"H": self.num_heads, "G": groups, "r": self.num_heads // groups}
        object.__setattr__(self, "num_key_value_heads", groups)
        object.__setattr__(self, "qk_norm", self.qk_norm or bool(self.gains))
        # The user's r takes precedence: some layouts use it for the size of a rotated part.
        object.__setattr__(self, "sizes", {**known, **self.sizes, "H": self.num_heads, "G": groups})
