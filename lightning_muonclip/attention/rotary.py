"""Rotary position embedding (RoPE), Su et al., arXiv 2104.09864, and its scalings for longer sequences."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """The angles of every position, for :func:`rotate`.

    Args:
        dim: Number of rotated channels; even.
        theta: Base of the wavelengths.
        scaling: How wavelengths are scaled for longer sequences, with Hugging Face's keys: a ``rope_type`` of ``"linear"``,
            ``"dynamic"``, ``"yarn"`` or ``"llama3"``, ``factor``, ``original_max_position_embeddings`` (if the config lacks
            it, use its ``max_position_embeddings``), and the other options of the type. ``None`` or ``"default"`` does not
            scale. The dynamic type depends on the largest position of the current forward only.

    Raises:
        ValueError: If ``dim`` is odd, or if ``scaling`` has an unknown type, lacks a key, or has a key that is unknown or
            out of range.
    """

    def __init__(self, dim: int, theta: float = 10000.0, scaling: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"the number of rotated channels must be even; got {dim}")
        self.dim = dim
        self.theta = theta
        self.rope_type, self.options = _read(scaling or {"rope_type": "default"}, theta)

    @property
    def logit_factor(self) -> float:
        """DeepSeek's extra factor on the logits: the square of YaRN's scale for ``mscale_all_dim``, else 1."""
        return _mscale(self.options.get("factor", 1.0), self.options.get("mscale_all_dim") or 0.0) ** 2

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 of shape ``(batch, 1, length, dim)``, of positions of shape ``(batch, length)``."""
        # Computed in every forward: a buffer of frequencies would lose precision in ``module.bfloat16()``.
        frequencies, factor = _TYPES[self.rope_type](self.dim, self.theta, position_ids, **self.options)
        angles = position_ids.unsqueeze(-1).float() * frequencies
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def positions(hidden_states: Tensor, position_ids: Tensor | None) -> Tensor:
    """The given positions, or 0, 1, 2, ... for all sequences, shape ``(1, length)``."""
    if position_ids is not None:
        return position_ids
    return torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates channels i and ``i + dim/2`` of a tensor of shape ``(batch, heads, length, dim)`` (Llama's pairing)."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates adjacent channels (DeepSeek's pairing). The result has all first channels, then all second ones."""
    return rotate(x.unflatten(-1, (-1, 2)).mT.flatten(-2), cos, sin)


# Each type returns the frequencies, shape (dim / 2,), and a factor on cosines and sines. Its keywords are the keys of the
# scaling. Operations keep Hugging Face's order: at position 100000 the last digit of a frequency matters.


def _periods(dim: int, theta: float | Tensor, like: Tensor) -> Tensor:
    return theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=like.device) / dim)


def _default(dim: int, theta: float | Tensor, position_ids: Tensor) -> tuple[Tensor, float]:
    return 1.0 / _periods(dim, theta, position_ids), 1.0


def _linear(dim: int, theta: float, position_ids: Tensor, *, factor: float) -> tuple[Tensor, float]:
    """Position interpolation: Chen et al., arXiv 2306.15595."""
    return _default(dim, theta, position_ids)[0] / factor, 1.0


def _dynamic(
    dim: int, theta: float, position_ids: Tensor, *, factor: float, original_max_position_embeddings: int
) -> tuple[Tensor, float]:
    """A base that grows with the length (NTK-aware): bloc97 and emozilla, in YaRN, arXiv 2309.00071, appendix B.1."""
    length = position_ids.max() + 1
    growth = factor * length / original_max_position_embeddings - (factor - 1)
    growth = torch.where(length > original_max_position_embeddings, growth, 1.0)
    return _default(dim, theta * growth ** (dim / (dim - 2)), position_ids)


def _yarn(
    dim: int,
    theta: float,
    position_ids: Tensor,
    *,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
) -> tuple[Tensor, float]:
    """Scales wavelengths beyond the original length and keeps short ones: Peng et al., arXiv 2309.00071."""

    def channel(turns: float) -> float:
        """The pair of channels that makes this many turns within the original length."""
        return dim * math.log(original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(beta_fast), channel(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device=position_ids.device) - low) / ((high - low) or 0.001)
    kept = 1 - ramp.clamp(0, 1)
    periods = _periods(dim, theta, position_ids)
    if attention_factor is None:
        attention_factor = _mscale(factor, 1.0)
        if mscale and mscale_all_dim:
            attention_factor = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
    return 1.0 / (factor * periods) * (1 - kept) + 1.0 / periods * kept, attention_factor


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0


def _llama3(
    dim: int,
    theta: float,
    position_ids: Tensor,
    *,
    factor: float,
    original_max_position_embeddings: int,
    low_freq_factor: float,
    high_freq_factor: float,
) -> tuple[Tensor, float]:
    """YaRN with a ramp over frequencies: Llama 3.1, arXiv 2407.21783, and ``apply_scaling`` of its reference code."""
    frequencies, _ = _default(dim, theta, position_ids)
    turns = original_max_position_embeddings / (2 * math.pi / frequencies)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies, 1.0


_TYPES: dict[str, Callable[..., tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
}
_ORDERED = (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast"))


def _read(scaling: Mapping[str, Any], theta: float) -> tuple[str, dict[str, Any]]:
    """The type and all its options."""
    given = {key: value for key, value in scaling.items() if value is not None}
    rope_type = given.pop("rope_type", given.pop("type", None))  # older configs call it "type"
    if rope_type not in _TYPES:
        raise ValueError(f"unknown rope_type {rope_type!r} in rope_scaling; use one of {', '.join(_TYPES)}")
    for key, own in (("rope_theta", theta), ("partial_rotary_factor", 1.0)):
        if given.pop(key, own) != own:
            raise ValueError(
                f"{key} in rope_scaling is {scaling[key]}, but here it is {own}; leave it out of rope_scaling"
            )
    known = inspect.signature(_TYPES[rope_type]).parameters.values()
    keys = {key.name: key.default for key in known if key.kind is key.KEYWORD_ONLY}
    for key in given:
        if key not in keys:
            takes = ", ".join(keys) or "none"
            raise ValueError(f"unknown key {key!r} in rope_scaling of rope_type {rope_type!r}; known: {takes}")
    options = keys | given
    for key, value in options.items():
        if value is inspect.Parameter.empty:
            raise ValueError(
                f"rope_type {rope_type!r} needs {key!r} in rope_scaling, got: {', '.join(given) or 'none'}"
            )
        least = int(key in ("factor", "original_max_position_embeddings"))
        if value is not None and (not isinstance(value, (int, float)) or not value >= least):
            raise ValueError(f"{key} in rope_scaling must be a number of at least {least}; got {value!r}")
    for low, high in _ORDERED:
        if low in options and options[low] >= options[high]:
            raise ValueError(f"{low} in rope_scaling must be below {high}; got {options[low]} and {options[high]}")
    return rope_type, options
