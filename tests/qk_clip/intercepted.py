"""Small attention modules of every kind that is intercepted."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from oracles import brute_max_logits, causal, enlarge
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import BloomConfig, BloomModel, GPTJConfig, GPTJModel, LlamaConfig, LlamaModel

LENGTH, KEYS, DIM, HEADS = 9, 13, 4, 4
#: Hugging Face config options for a vocabulary without special tokens.
NO_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
TOKENS = torch.arange(2 * LENGTH).reshape(2, LENGTH) % 11


class Cross(nn.Module):
    """Cross-attention; a subclass defines how it attends."""

    def __init__(self, heads: int = HEADS, key_heads: int = HEADS, dim: int = DIM, value_dim: int = DIM) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim, self.value_dim = heads, key_heads, dim, value_dim
        self.q_proj = nn.Linear(16, heads * dim)
        self.k_proj = nn.Linear(16, key_heads * dim)
        self.v_proj = nn.Linear(16, key_heads * value_dim)
        enlarge(self)

    def parts(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key = (p(z).unflatten(-1, (-1, self.head_dim)) for p, z in ((self.q_proj, x), (self.k_proj, y)))
        value = self.v_proj(y).unflatten(-1, (-1, self.value_dim))
        return query.transpose(-2, -3), key.transpose(-2, -3), value.transpose(-2, -3)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)

    def forward(self, x: Tensor, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.attend(*self.parts(x, y), *args, **kwargs)

    @torch.no_grad()
    def expected(self, x: Tensor, y: Tensor, scale: float | None = None, visible: Tensor | None = None) -> Tensor:
        query, key, _ = self.parts(x, y)
        return brute_max_logits(query, key, self.head_dim**-0.5 if scale is None else scale, visible)


def additive(visible: Tensor, hidden: float) -> Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, hidden)


class Flex(Cross):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return flex_attention(query, key, value, *args, **kwargs)


def plain_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """A user's attention function that calls no attention function of torch."""
    key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value))
    logits = query @ key.mT * scaling
    if attention_mask is None and module.is_causal:
        attention_mask = causal(query.shape[2])[None, None]
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4:
        if attention_mask.dtype is torch.bool:
            attention_mask = additive(attention_mask, torch.finfo(logits.dtype).min)
        logits = logits + attention_mask
    return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def through_torch(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """A user's attention function that calls SDPA."""
    causality = mask is None and query.shape[2] > 1
    output = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=causality, scale=kwargs["scaling"], enable_gqa=True
    )
    return output.transpose(1, 2), None


def llama(attn_implementation: str, dropout: float = 0.0, layers: int = 2) -> LlamaModel:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        vocab_size=11,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        attn_implementation=attn_implementation,
        attention_dropout=dropout,
        **NO_TOKENS,
    )
    model = LlamaModel(config)
    enlarge(model)
    return model.train()


def gptj(dropout: float = 0.0, layers: int = 2) -> GPTJModel:
    sizes = {"n_embd": 16, "n_head": HEADS, "n_layer": layers, "rotary_dim": 2, "vocab_size": 11, "n_positions": 256}
    config = GPTJConfig(**sizes, **NO_TOKENS)
    config.attn_pdrop, config.resid_pdrop, config.embd_pdrop = dropout, 0.0, 0.0
    return GPTJModel(config).train()


def bloom(layers: int = 2) -> BloomModel:
    config = BloomConfig(hidden_size=16, n_head=HEADS, n_layer=layers, vocab_size=11, **NO_TOKENS)
    return BloomModel(config).train()


class Layers(nn.Module):
    """An embedding, layers of attention on a residual stream, and a head."""

    def __init__(self, *attention: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.attention = nn.ModuleList(attention)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(16, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for attention in self.attention:
            output = attention(x)
            x = x + self.dropout(output[0] if isinstance(output, tuple) else output)
        return self.head(x)


class SelfMultihead(nn.MultiheadAttention):
    def __init__(self, need_weights: bool, dropout: float) -> None:
        super().__init__(16, HEADS, dropout=dropout, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Any:
        hidden = ~causal(x.shape[1])
        return super().forward(x, x, x, need_weights=self.need_weights, attn_mask=hidden)


class SelfSdpa(Cross):
    def __init__(self, dropout: float) -> None:
        super().__init__(HEADS, 2)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        output = F.scaled_dot_product_attention(
            *self.parts(x, x), is_causal=True, dropout_p=self.dropout, enable_gqa=True
        )
        return output.transpose(1, 2).flatten(2)


def self_sdpa(dropout: float = 0.0) -> Layers:
    return Layers(SelfSdpa(dropout), SelfSdpa(dropout))


class Unobserved(nn.Module):
    """Calls SDPA without being observed."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads)


class LM(nn.Module):
    """A Hugging Face model with a head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(16, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.model(tokens).last_hidden_state)
