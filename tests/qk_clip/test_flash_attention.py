"""Attention by kernels of FlashAttention, by stand-ins on a CPU: packed sequences are seen as the kernel sees them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels.test_flash_kernels import ids_of, logits_of, stand_ins  # noqa: F401  a fixture
from oracles import brute_max_logits
from torch import Tensor, nn

from lightning_muonclip import AttentionSpec, Projection, QKClip

HEADS, DIM = 4, 4
STARTS = torch.tensor([0, 5, 6, 17], dtype=torch.int32)
ALL_ATTENTION_FUNCTIONS: Any = None  # Hugging Face's; files of its models have this name
SPEC = AttentionSpec([Projection("q_proj", "q(H d)"), Projection("k_proj", "k(H d)")], HEADS, sizes={"d": DIM})


class Packed(nn.Module):
    """Sequences behind each other, with queries large enough for a few rows to matter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj = (nn.Linear(16, HEADS * DIM, bias=False) for _ in range(2))
        with torch.no_grad():
            self.q_proj.weight.mul_(8)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_proj(x).view(-1, HEADS, DIM), self.k_proj(x).view(-1, HEADS, DIM)

    def expected(self, x: Tensor, causal: bool) -> Tensor:
        query, key = (own.detach() for own in self.heads(x))
        visible = logits_of(query, key, 1.0, causal, -1, -1, ids_of(STARTS)).isfinite()
        return brute_max_logits(query.transpose(0, 1), key.transpose(0, 1), DIM**-0.5, visible)


class Varlen(Packed):
    def forward(self, x: Tensor, window: tuple[int, int] = (-1, 0)) -> Tensor:
        from torch.nn.attention import varlen

        query, key = self.heads(x)
        return varlen.varlen_attn(query, key, key, STARTS, STARTS, 11, 11, window_size=window)


@pytest.fixture(scope="module")
def varlen_kernel() -> None:
    """Torch's operator has no kernel for a CPU."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def forward(
        q: Tensor, k: Tensor, v: Tensor, starts: Tensor, of_keys: Any, mq: int, mk: int, causal: bool, *_: Any
    ) -> Any:
        lse = logits_of(q, k, DIM**-0.5, causal, -1, -1, ids_of(starts)).logsumexp(-1).float()
        return torch.zeros_like(q), lse, torch.zeros(2, dtype=torch.uint64)

    varlen._varlen_attn.register_kernel("cpu", forward)


@pytest.mark.parametrize("window", [(-1, 0), (-1, -1)], ids=["causal", "whole"])
def test_torchs_attention_of_packed_sequences(varlen_kernel: None, window: tuple[int, int]) -> None:
    module, x = Varlen(), torch.randn(17, 16)
    with QKClip(module, threshold=1.0, specs={"": SPEC}) as qk_clip:
        module(x, window)
        expected = module.expected(x, causal=window == (-1, 0))
        torch.testing.assert_close(qk_clip.max_logits[0].double(), expected, rtol=1e-5, atol=1e-5)
        assert qk_clip.observer.recorders[0].source == "varlen_attn"
        assert int(qk_clip.step().clipped_heads) == HEADS
        assert (module.expected(x, causal=window == (-1, 0)) <= 1 + 1e-5).all()


class Interface(Packed):
    """As models of Hugging Face call FlashAttention, whose kernel is told the sequences by their positions."""

    is_causal = True

    def forward(self, x: Tensor) -> Tensor:
        query, key = (own.transpose(0, 1)[None] for own in self.heads(x))
        return ALL_ATTENTION_FUNCTIONS["stand_in_for_flash"](self, query, key, key, None, scaling=DIM**-0.5)[0]


def test_the_kernel_knows_what_the_interface_does_not(stand_ins: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    functions = pytest.importorskip("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float
    ) -> tuple[Tensor, None]:
        query, key = (own[0].transpose(0, 1) for own in (query, key))
        kernel = torch.ops.flash_attn._flash_attn_varlen_forward
        return kernel(query, key, key, STARTS, STARTS, 11, 11, 0.0, scaling, True, -1, -1, 0.0, None, False)[0], None

    monkeypatch.setitem(globals(), "ALL_ATTENTION_FUNCTIONS", functions)  # where the file of the class has it
    functions.register("stand_in_for_flash", attend)
    module, x = Interface(), torch.randn(17, 16)
    with QKClip(module, threshold=None, specs={"": SPEC}) as qk_clip:
        module(x)
        torch.testing.assert_close(
            qk_clip.max_logits[0].double(), module.expected(x, causal=True), rtol=1e-5, atol=1e-5
        )
        assert qk_clip.observer.recorders[0].source == "FlashAttention"
