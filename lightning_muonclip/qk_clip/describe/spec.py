"""What QK-Clip must know of one attention module: its projections, its heads, and what stands behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Projection:
    """One weight that makes queries, keys or values.

    Args:
        name: Path, inside the attention module, of a submodule with ``weight`` (and ``bias``), or of a parameter.
        layout: Its output channels, in the language of :mod:`lightning_muonclip.qk_clip.describe.layout`.
        dim: The dimension of the weight that the channels lie on; a bias follows its weight.
        offset: What the module adds to the weight before it multiplies by it: 1 for the gain of Gemma's norm.
    """

    name: str
    layout: str
    dim: int = 0
    offset: float = 0.0


@dataclass(frozen=True)
class AttentionSpec:
    """How one attention module is built.

    Args:
        projections: The weights that make queries and keys. Those that make values may be named too (kind ``*``): QK-Clip
            leaves them alone, and Muon can then take every head for itself.
        num_heads: Number of query heads.
        num_key_value_heads: Number of key heads; ``None`` is one for every query head.
        sizes: Channel counts that the layouts name, such as ``{"d": 64}``. ``H``, ``G`` and ``r = H / G`` are known.
        qk_norm: Whether queries or keys are normalised after the projection: then no factor on a weight can lower a
            logit.
        gains: The gains of those norms, which a factor can scale; they imply ``qk_norm``. A layout without ``H`` or ``G``,
            such as ``q(d)``, is one gain for all heads.

    Raises:
        ValueError: If the query heads cannot share the key heads evenly.

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

    def __post_init__(self) -> None:
        groups = self.num_key_value_heads or self.num_heads
        if self.num_heads % groups:
            raise ValueError(f"{self.num_heads} query heads cannot share {groups} key heads evenly")
        known = {"H": self.num_heads, "G": groups, "r": self.num_heads // groups}
        object.__setattr__(self, "num_key_value_heads", groups)
        object.__setattr__(self, "qk_norm", self.qk_norm or bool(self.gains))
        # The user's r wins: to some layouts it is the size of a rotated part.
        object.__setattr__(self, "sizes", {**known, **self.sizes, "H": self.num_heads, "G": groups})
