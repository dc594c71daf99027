"""Tracking under torch.compile(fullgraph=True): one graph, compiled once, with the results of eager mode."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracles import Residual, SdpaAttention, enlarge
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask

from lightning_muonclip import Attention, AttentionMask, MultiheadLatentAttention, QKClip
from lightning_muonclip.attention.core import attention
from lightning_muonclip.attention.score_mods import Alibi, ScoreMod

KEEP = torch.arange(70) < torch.tensor([[70], [50]])


class Padded(nn.Module):
    """Passes a mask to its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(16, 4, num_key_value_heads=2, attention_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, mask=AttentionMask(padding=KEEP))


MODELS: dict[str, Any] = {
    "ours": lambda: Residual(
        Padded(),
        MultiheadLatentAttention(16, 2, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4),
    ),
    "third party": lambda: Residual(SdpaAttention(16, 4, 2), SdpaAttention(16, 2)),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def train(model: nn.Module, forward: Any, xs: Tensor) -> list[Tensor]:
    """A step of SGD and QK-Clip for every batch; the maxima of each."""
    maxima = []
    with QKClip(model, threshold=0.5) as qk_clip:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for x in xs:
            optimizer.zero_grad()
            forward(x).square().mean().backward()
            optimizer.step()
            maxima.append(qk_clip.step().max_logits)
        assert (qk_clip.clips > 0).any(1).all()
    return maxima


def check_one_graph(eager: nn.Module, xs: Tensor, backend: str) -> None:
    enlarge(eager)
    compiled = copy.deepcopy(eager)
    counter = CompileCounterWithBackend(backend)
    expected = train(eager, eager, xs)
    found = train(compiled, torch.compile(compiled, fullgraph=True, backend=counter), xs)
    assert counter.frame_count == 1
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_compiled_once_with_the_maxima_of_eager(name: str) -> None:
    check_one_graph(MODELS[name](), torch.randn(5, 2, 70, 16), "aot_eager")


@pytest.mark.parametrize("score_mod", [None, Alibi(4)], ids=["", "alibi"])
def test_flex_is_part_of_the_graph_of_its_model(score_mod: ScoreMod | None) -> None:
    query, key, value = (torch.randn(2, heads, 200, 16) for heads in (4, 2, 2))
    documents = torch.arange(200).expand(2, -1) // 70

    def block_mask() -> Any:
        return create_block_mask(lambda b, h, q, k: documents[b, q] == documents[b, k], 2, None, 200, 200, "cpu")

    try:
        torch.compile(block_mask, fullgraph=True, backend="eager")()
    except torch._dynamo.exc.Unsupported:  # up to torch 2.9
        pytest.skip("this release of torch compiles no mask's own blocks")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Any:  # its mask is made in the graph, too
        mask = AttentionMask(window=50) | AttentionMask(documents=documents)
        return attention(query, key, value, scale=0.5, mask=mask, score_mod=score_mod, track="exact", backend="flex")

    with torch.no_grad():
        found = torch.compile(attend, fullgraph=True, backend="aot_eager")(query, key, value)
        expected = attend(query, key, value)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", MODELS)
def test_qk_clip_observes_a_model_that_is_compiled_already(name: str) -> None:
    eager = MODELS[name]()
    enlarge(eager)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 70, 16)
    with QKClip(compiled, threshold=0.5) as found, QKClip(eager, threshold=0.5) as expected:
        eager(x), compiled(x)
        assert found.layers == expected.layers
        torch.testing.assert_close(found.max_logits, expected.max_logits, rtol=1e-5, atol=0)


def test_a_compiled_attention_is_found_once() -> None:
    attention = torch.compile(Attention(16, 2), backend="eager")
    with QKClip(Residual(attention, Attention(16, 2))) as qk_clip:
        assert qk_clip.layers == ["layers.0", "layers.1"]


@pytest.mark.parametrize("name", MODELS)
def test_compiled_evaluation_records_nothing(name: str) -> None:
    model = MODELS[name]()
    forward = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.randn(2, 70, 16)
    with QKClip(model) as qk_clip:
        model.eval()
        forward(x)
        assert qk_clip.max_logits.isneginf().all()
        model.train()
        forward(x)
        assert not qk_clip.max_logits.isneginf().all(1).any()


@pytest.mark.parametrize("name", ["latent", "third party"])
def test_varying_lengths_do_not_recompile(name: str) -> None:
    model = SdpaAttention(16, 2) if name == "third party" else MODELS["ours"]().layers[1]
    counter = CompileCounterWithBackend("eager")
    forward = torch.compile(model, fullgraph=True, backend=counter)
    with QKClip(model) as qk_clip:
        for length in (5, 9, 33, 64, 65, 90, 128, 129, 150, 200):
            forward(torch.randn(2, length, 16))
        assert qk_clip.max_logits.isfinite().all()
    assert counter.frame_count <= 2  # once for the first length, once for all others


def test_separately_compiled_layers_keep_their_own_caps_and_slopes() -> None:
    """The numbers of a score_mod stay constants, however many there are."""
    x = torch.randn(1, 20, 32)
    for heads, options in (
        (2, {"softcap": 2.0}),
        (2, {"softcap": 3.5}),
        (2, {"score_mod": Alibi(2)}),
        (4, {"score_mod": Alibi(4)}),
    ):
        module = Attention(32, heads, backend="flex", **options).requires_grad_(False)
        expected = module(x)
        module.compile(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(module(x), expected)
