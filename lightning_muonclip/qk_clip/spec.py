"""What QK-Clip must know of one attention module: its projections, its heads, and where its logits can be seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Projection:
    """One weight that makes queries or keys.

    Args:
        name: Path, inside the attention module, of a submodule with ``weight`` (and ``bias``), or of a parameter.
        layout: Its output channels, in the language of :mod:`lightning_muonclip.qk_clip.layout`.
        dim: The dimension of the weight that the channels lie on; a bias follows its weight.
    """

    name: str
    layout: str
    dim: int = 0


@dataclass(frozen=True)
class AttentionSpec:
    """How one attention module is built.

    Args:
        projections: The weights that make queries and keys.
        num_heads: Number of query heads.
        num_key_value_heads: Number of key heads; ``None`` is one for every query head.
        sizes: Channel counts that the layouts name, such as ``{"d": 64}``.
        qk_norm: Whether queries or keys are normalised after the projection: then no factor on a weight can lower a
            logit.

    Raises:
        ValueError: If the query heads cannot share the key heads evenly.

    Example:
        >>> AttentionSpec((Projection("wq", "q(H d)"), Projection("wk", "k(G d)")), 8, 2, {"d": 64}).sizes["G"]
        2
    """

    projections: tuple[Projection, ...]
    num_heads: int
    num_key_value_heads: int | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    qk_norm: bool = False

    def __post_init__(self) -> None:
        groups = self.num_key_value_heads or self.num_heads
        if self.num_heads % groups:
            raise ValueError(f"{self.num_heads} query heads cannot share {groups} key heads evenly")
        object.__setattr__(self, "num_key_value_heads", groups)
        object.__setattr__(self, "sizes", {**self.sizes, "H": self.num_heads, "G": groups})
