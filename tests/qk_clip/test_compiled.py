"""Intercepted attention stays one graph under torch.compile(fullgraph=True), with the same results."""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from intercepted import HEADS, NO_TOKENS, Flex, Layers, SelfMultihead, bloom, gptj, llama, plain_attention, self_sdpa
from oracles import Residual
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import (
    AttentionInterface,
    BertConfig,
    BertModel,
    CodeGenConfig,
    CodeGenModel,
    FalconConfig,
    FalconModel,
    GPT2Config,
    GPT2Model,
    GPTNeoConfig,
    GPTNeoModel,
    MptConfig,
    MptModel,
)
from transformers.integrations.flex_attention import WrappedFlexAttention
from transformers.models.codegen.modeling_codegen import CodeGenAttention
from transformers.models.gptj.modeling_gptj import GPTJAttention

from lightning_muonclip import Attention, QKClip


def gpt_neo() -> nn.Module:
    sizes = {"hidden_size": 16, "num_heads": HEADS, "num_layers": 1, "intermediate_size": 32, "window_size": 4}
    layers = {"attention_types": [[["local"], 1]], "max_position_embeddings": 256}
    return GPTNeoModel(GPTNeoConfig(**sizes, **layers, vocab_size=11, attn_implementation="eager", **NO_TOKENS))


def mpt() -> nn.Module:
    return MptModel(MptConfig(d_model=16, n_heads=HEADS, n_layers=1, max_seq_len=256, vocab_size=11, **NO_TOKENS))


def falcon(alibi: bool) -> nn.Module:
    sizes = {"hidden_size": 16, "num_attention_heads": HEADS, "num_hidden_layers": 1, "vocab_size": 11}
    return FalconModel(FalconConfig(**sizes, alibi=alibi, attn_implementation="eager", **NO_TOKENS))


def codegen() -> nn.Module:
    sizes = {"n_embd": 32, "n_head": HEADS, "n_layer": 1, "rotary_dim": 2, "n_positions": 256, "n_ctx": 256}
    return CodeGenModel(CodeGenConfig(**sizes, vocab_size=11, **NO_TOKENS))


def gpt2_upcast() -> nn.Module:
    sizes = {"n_embd": 16, "n_head": HEADS, "n_layer": 1, "n_positions": 256, "vocab_size": 11}
    config = GPT2Config(**sizes, reorder_and_upcast_attn=True, attn_implementation="eager", **NO_TOKENS)
    model = GPT2Model(config)
    if not hasattr(model.h[0].attn, "scaling"):
        pytest.skip("GPT-2 of this release of transformers does not tell its scale")
    return model


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "num_attention_heads": HEADS, "num_hidden_layers": 1, "intermediate_size": 32}
    return BertModel(BertConfig(**sizes, vocab_size=11, attn_implementation="eager", **NO_TOKENS))


def ours() -> nn.Module:
    return Layers(Attention(16, HEADS, num_key_value_heads=2), Attention(16, HEADS))


def encoder() -> nn.Module:
    return Layers(nn.TransformerEncoderLayer(16, HEADS, 32, dropout=0.0, batch_first=True))


def method_or_function(cls: type[nn.Module], method: str) -> str:
    """The source of a class that attends by hand, in a method, in older releases, and by torch's function in newer ones."""
    return "softmax" if hasattr(cls, method) else "scaled_dot_product_attention"


OBSERVED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "ours": (ours, "the module"),
    "sdpa": (self_sdpa, "scaled_dot_product_attention"),
    "multihead": (lambda: Layers(SelfMultihead(False, 0.0)), "multi_head_attention_forward"),
    "multihead with weights": (lambda: Layers(SelfMultihead(True, 0.0)), "multi_head_attention_forward"),
    "encoder": (encoder, "multi_head_attention_forward"),
    "hugging face sdpa": (lambda: llama("sdpa", layers=1), "scaled_dot_product_attention"),
    "hugging face eager": (lambda: llama("eager", layers=1), "softmax"),
    "hugging face, a user's": (lambda: llama("mine", layers=1), "softmax"),
    "bert eager": (bert, "softmax"),
    "gpt-j": (lambda: gptj(layers=1), method_or_function(GPTJAttention, "_attn")),
    "codegen": (codegen, method_or_function(CodeGenAttention, "_attn")),
    "gpt-neo": (gpt_neo, "softmax"),
    "gpt-2 upcast": (gpt2_upcast, "softmax"),
    "bloom": (lambda: bloom(layers=1), "softmax"),
    "mpt": (mpt, "softmax"),
    "falcon": (lambda: falcon(alibi=False), "softmax"),
    "falcon alibi": (lambda: falcon(alibi=True), "softmax"),
}
every = pytest.mark.parametrize("name", OBSERVED)
#: One of each way to observe.
a_few = pytest.mark.parametrize(
    "name",
    ["ours", "sdpa", "multihead with weights", "hugging face eager", "hugging face, a user's", "gpt-neo", "bloom"],
)


def make(name: str) -> nn.Module:
    """A model of that name without dropout."""
    model = OBSERVED[name][0]().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping))
    AttentionInterface.register("mine", plain_attention)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def tokens(count: int, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(11, (count, 2, length), generator=torch.Generator().manual_seed(seed))


def output_of(forward: Callable[[Tensor], Any], batch: Tensor) -> Tensor:
    output = forward(batch)
    return output if isinstance(output, Tensor) else output.last_hidden_state


def train(model: nn.Module, forward: Callable[[Tensor], Any], logits: str = "exact") -> tuple[list[Tensor], set[Any]]:
    """Three steps of SGD and QK-Clip: the maxima of each, the gradients of the last, and the source of the maxima."""
    found = []
    with QKClip(model, threshold=1e-3, logits=logits) as qk_clip:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for batch in tokens(3):
            optimizer.zero_grad()
            output_of(forward, batch).square().mean().backward()
            optimizer.step()
            found.append(qk_clip.step().max_logits)
        sources = {recorder.source for recorder in qk_clip.observer.recorders}
        assert int(qk_clip.clips.sum()) > 0
    return [*found, *(p.grad for p in model.parameters() if p.grad is not None)], sources


def check_one_graph(model: nn.Module, backend: str, source: str, logits: str = "exact") -> None:
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend(backend)
    expected, _ = train(model, model, logits)
    found, sources = train(twin, torch.compile(twin, fullgraph=True, backend=counter), logits)
    assert sources == {source}
    assert counter.frame_count == 1 and counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found[0], found[1])


@every
def test_one_graph_compiled_once_with_the_maxima_of_eager(name: str) -> None:
    check_one_graph(make(name), "aot_eager", OBSERVED[name][1])


@pytest.mark.parametrize("name", ["ours", "sdpa", "hugging face sdpa"])
def test_one_graph_with_the_log_sum_exp(name: str) -> None:
    source = "the module" if name == "ours" else "log-sum-exp of scaled_dot_product_attention"
    check_one_graph(make(name), "aot_eager", source, logits="lse")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_inductor_gives_the_same() -> None:
    check_one_graph(make("sdpa"), "inductor", OBSERVED["sdpa"][1])


@a_few
def test_a_model_compiled_before_is_observed_by_every_later_observer(name: str) -> None:
    model = make(name)
    forward = torch.compile(model, fullgraph=True, backend="eager")
    batch = tokens(1)[0]
    with QKClip(copy.deepcopy(model)) as qk_clip:
        qk_clip.model(batch)
        expected = qk_clip.max_logits
    forward(batch)
    for _ in range(2):
        with QKClip(model) as qk_clip:
            forward(batch)
            torch.testing.assert_close(qk_clip.max_logits, expected, rtol=1e-4, atol=1e-4)
            qk_clip.discard()
            model.eval()
            forward(batch)
            assert qk_clip.max_logits.isneginf().all()
            model.train()
        forward(batch)
        assert qk_clip.max_logits.isneginf().all()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("sdpa", "the model in place"),
        *product(
            ["sdpa", "multihead", "multihead with weights", "gpt-neo", "bloom"],
            ["attention in place", "the forward of attention"],
        ),
    ],
)
def test_a_part_of_a_model_may_be_compiled(name: str, what: str) -> None:
    model = make(name)
    eager = copy.deepcopy(model)
    with QKClip(eager) as expected, QKClip(model) as found:
        attention = [module for module, _ in found.observer.attention.values()]
        if what == "the model in place":
            model.compile(backend="aot_eager", fullgraph=True)
        elif what == "attention in place":
            for module in attention:
                module.compile(backend="aot_eager")
        else:
            for module in attention:
                module.forward = torch.compile(module.forward, backend="aot_eager", fullgraph=True)
        for batch in tokens(2):
            output_of(eager, batch).square().mean().backward()
            output_of(model, batch).square().mean().backward()
        torch.testing.assert_close(found.max_logits, expected.max_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["multihead with weights", "hugging face eager", "bloom"])
def test_lengths_that_vary_compile_no_more_often_than_without_an_observer(name: str) -> None:
    def compilations(model: nn.Module) -> int:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        forward = torch.compile(model, fullgraph=True, backend=counter)
        for length in (5, 9, 64, 65, 129):
            forward(tokens(1, length)[0])
        return counter.frame_count

    model = make(name)
    unobserved = compilations(model)
    with QKClip(model) as qk_clip:
        assert compilations(model) <= unobserved
        assert qk_clip.max_logits.isfinite().all()


# flex_attention has no backward on a CPU


def is_near(b: Any, h: Any, i: Tensor, j: Tensor) -> Tensor:
    return (i >= j) & (i - j < 40)


class SelfFlex(Flex):
    def __init__(self, block_mask: BlockMask | None) -> None:
        super().__init__(HEADS, 2)
        self.block_mask = block_mask

    def forward(self, x: Tensor) -> Tensor:
        output = self.attend(*self.parts(x, x), block_mask=self.block_mask, enable_gqa=True)
        return output.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("masked", [False, True])
def test_flex_attention_stays_one_graph(masked: bool) -> None:
    block_mask = create_block_mask(is_near, None, None, 150, 150, device="cpu") if masked else None
    model = Residual(SelfFlex(block_mask), SelfFlex(block_mask))
    counter = CompileCounterWithBackend("eager")
    forward = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad(), QKClip(model) as qk_clip:
        for x in torch.randn(2, 2, 150, 16):
            qk_clip.discard()
            model(x)
            expected = qk_clip.max_logits
            qk_clip.discard()
            forward(x)
            torch.testing.assert_close(qk_clip.max_logits, expected, rtol=1e-5, atol=0)
    assert counter.frame_count == 1 and not counters["graph_break"]


def test_flex_attention_of_hugging_face_breaks_the_graph_no_more_than_without_an_observer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(WrappedFlexAttention, "_instance", None)  # compiled anew, without machine code
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model = llama("flex_attention", layers=1)
    batch = tokens(1)[0]
    with torch.no_grad():
        unobserved = torch._dynamo.explain(model)(batch)
        torch._dynamo.reset()
        with QKClip(model, example=((batch,), {})) as qk_clip:
            observed = torch._dynamo.explain(model)(batch)
            assert qk_clip.max_logits.isfinite().all()
    assert observed.graph_break_count <= unobserved.graph_break_count
