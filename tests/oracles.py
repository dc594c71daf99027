"""Brute-force oracles in float64 for what QK-Clip observes and does, and third-party attention to test it on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_muonclip.kernels.hidden import HIDDEN

INF = float("inf")


def causal(length: int, key_length: int | None = None) -> Tensor:
    """Query i sees keys 0..i."""
    return torch.arange(key_length or length) <= torch.arange(length)[:, None]


def normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def visible_pairs(
    query: Tensor,
    key: Tensor,
    *,
    is_causal: bool = False,
    window: int | None = None,
    documents: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The visible pairs under the options of max_logits, one matrix per head, computed without max_logits."""
    length, key_length = query.shape[-2], key.shape[-2]
    visible = torch.ones(*query.shape[:-1], key_length, dtype=torch.bool, device=query.device)
    i, j = torch.arange(length, device=query.device)[:, None], torch.arange(key_length, device=query.device)
    if is_causal:
        visible = visible & (j <= i)
    if window is not None:
        visible = visible & (j > i - window) & (j < i + window)
    if documents is not None:
        same = documents[..., :, None] == documents[..., None, :]
        visible = visible & (same & (documents[..., None] >= 0)).unsqueeze(-3)
    if mask is not None:
        visible = visible & (mask if mask.dtype is torch.bool else mask > HIDDEN)
    return visible


def brute_max_logits(query: Tensor, key: Tensor, scale: float, visible: Tensor | None = None) -> Tensor:
    """The whole logit matrix of shape (..., heads, L, S), then its largest visible entry per head; float64."""
    heads, key_heads = query.shape[-3], key.shape[-3]
    maxima = []
    for head in range(heads):
        q, k = query[..., head, :, :].double(), key[..., head * key_heads // heads, :, :].double()
        logits = scale * torch.einsum("...id,...jd->...ij", q, k)
        if visible is not None:
            allowed = visible.expand(*query.shape[:-1], key.shape[-2])[..., head, :, :]
            logits = logits[allowed]
        maxima.append(logits.max() if logits.numel() else torch.tensor(-INF, dtype=torch.float64))
    return torch.stack(maxima)


def _turned(pairs: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE as a multiplication of complex numbers; pairs (..., length, dim/2) complex, positions (batch, length)."""
    half = pairs.shape[-1]
    frequency = torch.tensor([theta ** (-i / half) for i in range(half)], dtype=torch.float64)
    angle = positions[:, None, :, None].double() * frequency
    return pairs * torch.polar(torch.ones_like(angle), angle)


def _linear(module: nn.Module, name: str, x: Tensor) -> Tensor:
    layer = module.get_submodule(name)
    bias = 0 if layer.bias is None else layer.bias.double()
    return x @ layer.weight.double().T + bias


def _split_heads(x: Tensor, dim: int) -> Tensor:
    return x.unflatten(-1, (-1, dim)).transpose(1, 2)


def _rms_norm(x: Tensor, norm: Any) -> Tensor:
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight.double()


@torch.no_grad()
def queries_and_keys(
    module: nn.Module, x: Tensor, head_dim: int, positions: Tensor | None = None, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Rotated queries and keys of a module with Llama's parameters, in float64, computed from its weights alone."""
    positions = torch.arange(x.shape[1])[None] if positions is None else positions
    both = []
    for name, norm in (("q_proj", "q_norm"), ("k_proj", "k_norm")):
        heads = _split_heads(_linear(module, name, x.double()), head_dim)
        if getattr(module, norm, None) is not None:
            heads = _rms_norm(heads, getattr(module, norm))
        real, imaginary = heads.split(head_dim // 2, dim=-1)
        turned = _turned(torch.complex(real, imaginary), positions, theta)
        both.append(torch.cat([turned.real, turned.imag], dim=-1))
    return both[0], both[1]


@torch.no_grad()
def latent_queries_and_keys(
    module: Any, x: Tensor, positions: Tensor | None = None, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Rotated queries and keys of latent attention, whose rotated pairs are adjacent."""
    x = x.double()
    positions = torch.arange(x.shape[1])[None] if positions is None else positions
    nope, rope, value = module.qk_nope_head_dim, module.qk_rope_head_dim, module.v_head_dim
    if module.q_lora_rank is None:
        query = _linear(module, "q_proj", x)
    else:
        query = _linear(module, "q_b_proj", _rms_norm(_linear(module, "q_a_proj", x), module.q_a_layernorm))
    query = _split_heads(query, nope + rope)
    compressed = _linear(module, "kv_a_proj_with_mqa", x)
    latent, shared = compressed[..., : module.kv_lora_rank], compressed[..., module.kv_lora_rank :]
    key = _split_heads(_linear(module, "kv_b_proj", _rms_norm(latent, module.kv_a_layernorm)), nope + value)

    def turned(part: Tensor) -> Tensor:
        pairs = torch.view_as_complex(part.contiguous().unflatten(-1, (-1, 2)))
        return torch.view_as_real(_turned(pairs, positions, theta)).flatten(-2)

    rotated = turned(shared[:, None]).expand(-1, key.shape[1], -1, -1)
    query = torch.cat([query[..., :nope], turned(query[..., nope:])], dim=-1)
    return query, torch.cat([key[..., :nope], rotated], dim=-1)


def module_max_logits(module: Any, x: Tensor, visible: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
    """Maximum logits of ``Attention`` or ``MultiheadLatentAttention``, float64; causal by default."""
    if hasattr(module, "kv_b_proj"):
        query, key = latent_queries_and_keys(module, x, positions)
    else:
        query, key = queries_and_keys(module, x, module.head_dim, positions)
    visible = causal(x.shape[1]) if visible is None else visible
    return brute_max_logits(query, key, query.shape[-1] ** -0.5, visible)


def policy_factors(
    maxima: Sequence[float], threshold: float, alpha: float, groups: int, shared_keys: str
) -> tuple[list[float], list[float]]:
    """Factors of query heads and key heads, one head at a time, following the K2 report and its variants."""
    gamma = [threshold / s if math.isfinite(s) and s > threshold else 1.0 for s in maxima]
    size = len(gamma) // groups
    if size == 1:
        return [g**alpha for g in gamma], [g ** (1 - alpha) for g in gamma]
    queries, keys = [], []
    for group in range(groups):
        members = gamma[group * size : (group + 1) * size]
        strongest = min(members)
        keys.append(1.0 if shared_keys == "query" else strongest ** (1 - alpha))
        for own in members:
            queries.append(
                {
                    "query": own,
                    "group": strongest**alpha,
                    "min_k": own**alpha,
                    "compensate": own / strongest ** (1 - alpha),
                }[shared_keys]
            )
    return queries, keys


class SdpaAttention(nn.Module):
    """Attention of a library without any reference to QK-Clip: no rotation, causal, grouped keys."""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int | None = None, bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.dim = hidden_size // num_heads
        self.q_proj = nn.Linear(hidden_size, num_heads * self.dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, self.num_kv_heads * self.dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, self.num_kv_heads * self.dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (_split_heads(p(x), self.dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        grouped = self.num_heads != self.num_kv_heads
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        return output.transpose(1, 2).flatten(2)

    def max_logits(self, x: Tensor) -> Tensor:
        """By brute force."""
        with torch.no_grad():
            query = _split_heads(_linear(self, "q_proj", x.double()), self.dim)
            key = _split_heads(_linear(self, "k_proj", x.double()), self.dim)
        return brute_max_logits(query, key, self.dim**-0.5, causal(x.shape[1]))


def true_maxima(module: Any, x: Tensor) -> Tensor:
    """Largest logits of any module of these tests, by brute force."""
    return module.max_logits(x) if isinstance(module, SdpaAttention) else module_max_logits(module, x)


def between(maxima: Tensor) -> float:
    """A threshold that some heads pass and others do not."""
    middle = maxima.numel() // 2
    low, high = maxima.flatten().sort().values[[middle - 1, middle]].tolist()
    assert high > 0
    return (max(low, 0.0) + high) / 2


class Residual(nn.Module):
    """Layers on a residual stream."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@torch.no_grad()
def enlarge(model: nn.Module, factor: float = 4.0) -> None:
    """Makes logits large and all parameters different, including biases and norm gains."""
    for param in model.parameters():
        if param.ndim > 1:
            param.mul_(factor)
        else:
            param.add_(torch.randn_like(param) * 0.3)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
