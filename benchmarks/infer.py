"""What it costs to read attention: a layer of Llama-7B, and the survey of a model: ``python benchmarks/infer.py``.

On a CPU, the layers take one thread and process time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import compare, device, save, side_by_side
from torch import Tensor, nn
from train_step import SIZES, Size, Training

from lightning_muonclip import MuonClip, QKClip
from lightning_muonclip.qk_clip.describe.find import find_attention


class PlainAttention(nn.Module):
    """Grouped-query attention by torch's kernel, that nobody describes."""

    def __init__(self, hidden_size: int, num_attention_heads: int, num_key_value_heads: int | None = None) -> None:
        super().__init__()
        self.heads, self.groups = num_attention_heads, num_key_value_heads or num_attention_heads
        dim = hidden_size // self.heads
        self.a = nn.Linear(hidden_size, self.heads * dim, bias=False)
        self.b = nn.Linear(hidden_size, self.groups * dim, bias=False)
        self.c = nn.Linear(hidden_size, self.groups * dim, bias=False)
        self.d = nn.Linear(self.heads * dim, hidden_size, bias=False)

    def forward(self, x: Tensor, mask: object = None) -> Tensor:
        """Causal attention; the mask is not used."""
        counts = self.heads, self.groups, self.groups
        parts = [p(x).unflatten(-1, (n, -1)).transpose(1, 2) for p, n in zip((self.a, self.b, self.c), counts)]
        y = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        return self.d(y.transpose(1, 2).flatten(2))


def layers() -> dict[str, Callable[[], object]]:
    """The inference of one layer of Llama-7B, on 32 tokens."""
    made = {
        f"Llama-7B layer, {heads}/{groups} heads": PlainAttention(4096, heads, groups).to(device())
        for heads, groups in ((32, 8), (32, 32))
    }
    x = torch.randn(1, 32, 4096, device=device())
    return {name: lambda module=module: find_attention(module, ((x,), {})) for name, module in made.items()}  # type: ignore[misc]


def survey(size: Size) -> dict[str, Callable[[], object]]:
    """The whole search in a model, beside one of its training steps."""
    model, tokens = size.gpt("sdpa"), size.tokens()
    example = (tokens[:, :-1],), {}

    def search() -> None:
        QKClip(model, example=example).close()

    plain = size.gpt("sdpa")
    for layer in plain.layers:  # type: ignore[union-attr]
        layer.self_attn = PlainAttention(size.hidden, size.heads).to(device())

    def search_unknown() -> None:
        QKClip(plain, example=example).close()

    return {
        "training step": Training(size.gpt("sdpa"), MuonClip, tokens),
        "survey, attention of this package": search,
        "survey and inference, other attention": search_unknown,
    }


def main() -> None:
    """Layers on one thread, then the search on all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cases = {"layers": compare(side_by_side(layers(), rounds=5, warm_up=1), "")}
    torch.set_num_threads(threads)
    name, size = next(iter(SIZES[device().type].items()))
    cases[name] = compare(side_by_side(survey(size), rounds=5, warm_up=1), "training step")
    save("infer", cases=cases)


if __name__ == "__main__":
    main()
