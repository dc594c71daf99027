"""A small GPT: pre-norm, squared ReLU or SwiGLU, and any attention module."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_muonclip.attention.masks import AttentionMask


class GPT(nn.Module):
    """Decoder-only transformer over tokens.

    Args:
        attention: Creates the attention module of a layer from ``hidden_size``, such as
            ``functools.partial(Attention, num_attention_heads=4)``; the module is called with ``mask=``.
        vocab_size: Number of tokens; 256 for bytes.
        hidden_size: Width of the residual stream.
        num_hidden_layers: Number of layers.
        intermediate_size: Width of the MLP. Defaults to four times ``hidden_size``.
        mlp: ``"relu2"`` (squared ReLU), ``"swiglu"``, or what creates the MLP of a layer from ``hidden_size`` and
            ``intermediate_size``, such as :class:`~lightning_muonclip.experiment.moe.MixtureOfExperts`.
        sliding_window: Passed to ``attention``, one entry per layer, repeated as needed: ``[64, None]`` alternates local and
            global attention, as in Gemma 2. ``None`` leaves it to ``attention``.

    Raises:
        ValueError: If ``mlp`` is unknown, or if ``sliding_window`` is empty.
    """

    def __init__(
        self,
        attention: Callable[..., nn.Module],
        vocab_size: int = 256,
        hidden_size: int = 128,
        num_hidden_layers: int = 4,
        intermediate_size: int | None = None,
        mlp: str | Callable[[int, int], nn.Module] = "relu2",
        sliding_window: Sequence[int | None] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(mlp, str) and mlp not in _MLPS:
            raise ValueError(f"unknown mlp {mlp!r}; use one of {', '.join(_MLPS)}")
        make_mlp = _MLPS[mlp] if isinstance(mlp, str) else mlp
        if sliding_window is not None and not sliding_window:
            raise ValueError(f"sliding_window needs at least one entry, got {sliding_window!r}; use None for no window")
        width = intermediate_size or 4 * hidden_size
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        windows = [{}] if sliding_window is None else [{"sliding_window": window} for window in sliding_window]
        self.layers = nn.ModuleList(
            Block(attention(hidden_size=hidden_size, **window), make_mlp(hidden_size, width), hidden_size)
            for window in itertools.islice(itertools.cycle(windows), num_hidden_layers)
        )
        self.norm = nn.RMSNorm(hidden_size)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor, mask: AttentionMask | None = None) -> Tensor:
        """Logits of the next token, shape ``(batch, length, vocab_size)``, for tokens of shape ``(batch, length)``.

        The mask defaults to a causal one.
        """
        hidden_states = self.embed_tokens(tokens)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask)
        return self.lm_head(self.norm(hidden_states))


class Block(nn.Module):
    """Attention and MLP, each preceded by an RMSNorm and added to the residual stream."""

    def __init__(self, attention: nn.Module, mlp: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(hidden_size)
        self.self_attn = attention
        self.post_attention_layernorm = nn.RMSNorm(hidden_size)
        self.mlp = mlp

    def forward(self, hidden_states: Tensor, mask: AttentionMask | None = None) -> Tensor:
        """Maps ``(batch, length, hidden_size)`` to the same."""
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), mask=mask)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class SquaredReLU(nn.Module):
    """MLP with a squared ReLU, So et al., arXiv 2109.08668."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(..., hidden_size)`` to the same."""
        return self.down_proj(F.relu(self.up_proj(x)).square())


class SwiGLU(nn.Module):
    """Gated MLP, Shazeer, arXiv 2002.05202."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(..., hidden_size)`` to the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


_MLPS: dict[str, Callable[[int, int], nn.Module]] = {"relu2": SquaredReLU, "swiglu": SwiGLU}
