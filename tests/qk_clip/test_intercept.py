"""Every attention function is intercepted, whatever its mask, and restored afterwards."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from intercepted import (
    DIM,
    HEADS,
    KEYS,
    LENGTH,
    LM,
    TOKENS,
    Cross,
    Flex,
    Layers,
    SelfMultihead,
    SelfSdpa,
    Unobserved,
    additive,
    bloom,
    gptj,
    llama,
    plain_attention,
    self_sdpa,
    through_torch,
)
from oracles import INF, Residual, brute_max_logits, causal, enlarge
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, LlamaModel
from transformers.integrations.flex_attention import WrappedFlexAttention
from transformers.masking_utils import eager_mask, flash_attention_mask, flex_attention_mask, sdpa_mask
from transformers.models.bloom import modeling_bloom
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama

from lightning_muonclip import AttentionSpec, Projection, QKClip
from lightning_muonclip.kernels.max_logits import max_logits
from lightning_muonclip.qk_clip.intercept import hugging_face

PLACES: list[tuple[Any, str]] = [
    (F, "scaled_dot_product_attention"),
    (F, "multi_head_attention_forward"),
    (torch.nn.attention.flex_attention, "flex_attention"),
    (modeling_llama, "eager_attention_forward"),
    (modeling_llama, "ALL_ATTENTION_FUNCTIONS"),
    (modeling_gptj.GPTJAttention, "forward"),
    (modeling_bloom.BloomAttention, "forward"),
]


def current_functions() -> list[Any]:
    return [getattr(holder, name) for holder, name in PLACES]


ORIGINALS = current_functions()
SDPA = ORIGINALS[0]


@pytest.fixture(autouse=True)
def _functions_are_restored() -> Iterator[None]:
    yield
    assert all(a is b for a, b in zip(current_functions(), ORIGINALS))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.reshape(found.shape), rtol=1e-5, atol=1e-6)


def sequences(batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, LENGTH, 16), torch.randn(batch, KEYS, 16)


# scaled_dot_product_attention


CALLS = {
    "an attribute of F": ("import torch.nn.functional as F", "F.scaled_dot_product_attention"),
    "an attribute of torch": ("import torch", "torch.nn.functional.scaled_dot_product_attention"),
    "imported by value": (
        "from torch.nn.functional import scaled_dot_product_attention",
        "scaled_dot_product_attention",
    ),
    "under another name": ("import torch\nsdpa = torch.nn.functional.scaled_dot_product_attention", "sdpa"),
}


@pytest.mark.parametrize("inherited", [False, True], ids=["a class of its own", "a class of another file"])
@pytest.mark.parametrize("how", CALLS)
def test_sdpa_is_intercepted_however_a_file_calls_it(how: str, inherited: bool) -> None:
    imports, call = CALLS[how]
    source = f"""
{imports}

class Attention(Cross):
    def attend(self, query, key, value, **kwargs):
        return {call}(query, key, value, **kwargs)
"""
    file: dict[str, Any] = {"Cross": Cross, "__name__": "a_file"}
    exec(source, file)
    before = dict(file)

    class Derived(file["Attention"]):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(*args, **kwargs)

    module = (Derived if inherited else file["Attention"])()
    x, y = sequences()
    unobserved = module(x, y, scale=0.7)
    with QKClip(module) as qk_clip:
        assert torch.equal(module(x, y, scale=0.7), unobserved)
        close(qk_clip.max_logits, module.expected(x, y, 0.7))
        assert qk_clip.observer.recorders[0].source == "scaled_dot_product_attention"
    assert file.keys() == before.keys() and all(file[name] is before[name] for name in before)


ARE_SEEN = torch.rand(LENGTH, KEYS, generator=torch.Generator().manual_seed(3)) > 0.4
ARE_SEEN[:, 0] = True
PADDING = torch.arange(KEYS) < torch.tensor([[13], [6]])
SLOPES = torch.tensor([0.5, 0.25, 2.0, 8.0])
ALIBI = -SLOPES[:, None, None] * (torch.arange(LENGTH)[:, None] - torch.arange(KEYS)).abs()


LOWEST = torch.finfo(torch.float32).min
MASKS: dict[str, tuple[Tensor | None, Tensor | None]] = {
    "none": (None, None),
    "boolean": (ARE_SEEN, ARE_SEEN),
    "padding": (PADDING[:, None, None], PADDING[:, None, None]),
    "padding and boolean": (PADDING[:, None, None] & ARE_SEEN, PADDING[:, None, None] & ARE_SEEN),
    "another for every head": (ARE_SEEN & (ALIBI > -9), ARE_SEEN & (ALIBI > -9)),
    "additive -inf": (additive(ARE_SEEN, -INF), ARE_SEEN),
    "additive lowest": (additive(ARE_SEEN, LOWEST), ARE_SEEN),
    "additive -1e4": (additive(ARE_SEEN, -1e4), ARE_SEEN),
    "additive twice": (
        additive(ARE_SEEN, LOWEST) + additive(PADDING[:, None, None], LOWEST),
        PADDING[:, None, None] & ARE_SEEN,
    ),
    "a bias alone": (ALIBI, None),
    "a bias with -inf": (ALIBI + additive(ARE_SEEN, -INF), ARE_SEEN),
    "a bias with lowest": (ALIBI + additive(PADDING[:, None, None], LOWEST), PADDING[:, None, None]),
    "a bias with -1e4": (-ALIBI + additive(PADDING[:, None, None], -1e4), PADDING[:, None, None]),
}


@pytest.mark.parametrize("case", MASKS)
def test_sdpa_is_intercepted_with_every_mask(case: str) -> None:
    mask, visible = MASKS[case]
    module = Cross()
    x, y = sequences()
    with QKClip(module) as qk_clip:
        module(x, y, attn_mask=mask)
        close(qk_clip.max_logits, module.expected(x, y, visible=visible))
        qk_clip.discard()
        module(x, y, mask, 0.3, False, scale=0.01)
        close(qk_clip.max_logits, module.expected(x, y, 0.01, visible))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [-INF, None, -1e4])
def test_an_additive_mask_hides_in_half_precision(dtype: torch.dtype, hidden: float | None) -> None:
    module = Cross()
    x, y = sequences()
    expected = module.expected(x, y, visible=ARE_SEEN)
    mask = additive(ARE_SEEN, torch.finfo(dtype).min if hidden is None else hidden).to(dtype)
    with QKClip(module) as qk_clip, torch.autocast("cpu", dtype):
        module(x, y, attn_mask=mask)
        torch.testing.assert_close(qk_clip.max_logits[0].double(), expected, rtol=0.03, atol=0)
        assert not torch.allclose(expected, module.expected(x, y), rtol=0.1)


class Repeated(Cross):
    """Shares keys without enable_gqa, as was done before SDPA had it."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        key, value = (part.repeat_interleave(self.num_heads // self.num_kv_heads, 1) for part in (key, value))
        return super().attend(query, key, value, *args, **kwargs)


@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("value_dim", [4, 7])
def test_shared_keys_and_values_of_another_size(key_heads: int, value_dim: int) -> None:
    x, y = sequences()
    for cls, options in ((Cross, {"enable_gqa": True}), (Repeated, {})):
        module = cls(HEADS, key_heads, DIM, value_dim)
        with QKClip(module) as qk_clip:
            module(x, y, attn_mask=ARE_SEEN, **options)
            close(qk_clip.max_logits, module.expected(x, y, visible=ARE_SEEN))
            qk_clip.discard()
            module(x, x, is_causal=True, **options)
            close(qk_clip.max_logits, module.expected(x, x, visible=causal(LENGTH)))


def test_batches_of_any_number_of_dimensions() -> None:
    module = Cross()
    for batch in ((), (3,), (2, 3)):
        x, y = torch.randn(*batch, LENGTH, 16), torch.randn(*batch, KEYS, 16)
        with QKClip(module) as qk_clip:
            module(x, y, ARE_SEEN)
            close(qk_clip.max_logits, module.expected(x, y, visible=ARE_SEEN))


def test_keys_that_a_whole_batch_shares() -> None:
    module = Cross()
    (x, _), (_, y) = sequences(3), sequences(1)
    for first, second in ((x, y), (y, x)):
        with QKClip(module) as qk_clip:
            module(first, second)
            close(qk_clip.max_logits, module.expected(first, second))


def test_another_function_in_its_place_gets_the_arguments_as_they_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    received = []

    def narrow(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
        received.append(is_causal)
        return SDPA(q, k, v, is_causal=is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", narrow)
    module, (x, _) = Cross(), sequences()
    for logits in ("exact", "lse"):
        with QKClip(module, logits=logits) as qk_clip:
            module(x, x, is_causal=True)
            close(qk_clip.max_logits, module.expected(x, x, visible=causal(LENGTH)))
    assert set(received) == {True}


def test_of_a_function_that_attends_with_other_keys_nothing_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As SageAttention, which subtracts the mean of the keys: its log-sum-exp is that of other logits."""

    def smoothed(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return SDPA(q, k - k.mean(-2, keepdim=True), v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", smoothed)
    module, (x, _) = Cross(), sequences()
    with torch.no_grad():
        module.k_proj.bias.mul_(20)
    with QKClip(module) as qk_clip:
        module(x, x, is_causal=True)
        close(qk_clip.max_logits, module.expected(x, x, visible=causal(LENGTH)))


# nn.MultiheadAttention


def multihead_maxima(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None
) -> Tensor:
    """Largest logits by weights alone, inputs with the batch first; hidden broadcasts to (batch, heads, L, S)."""
    width = module.embed_dim
    if module.in_proj_weight is not None:
        q_weight, k_weight, _ = module.in_proj_weight.double().chunk(3)
    else:
        q_weight, k_weight = module.q_proj_weight.double(), module.k_proj_weight.double()
    bias = torch.zeros(3 * width) if module.in_proj_bias is None else module.in_proj_bias
    q_bias, k_bias, _ = bias.double().chunk(3)
    queries, keys = query.double() @ q_weight.T + q_bias, key.double() @ k_weight.T + k_bias
    extra = [module.bias_k.double().expand(len(keys), 1, width)] if module.bias_k is not None else []
    extra += [torch.zeros(len(keys), 1, width)] if module.add_zero_attn else []
    queries, keys = (
        x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in (queries, torch.cat([keys, *extra], 1))
    )
    full = (len(queries), module.num_heads, query.shape[1], key.shape[1])
    visible = torch.ones(full, dtype=torch.bool) if hidden is None else ~hidden.expand(full)
    visible = F.pad(visible, (0, len(extra)), value=True)
    return brute_max_logits(queries, keys, (width // module.num_heads) ** -0.5, visible)


HIDDEN_PAIRS = ~causal(LENGTH)
HIDDEN_KEYS = torch.arange(LENGTH) >= torch.tensor([[9], [5]])
A_HEAD = torch.rand(2 * HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(5)) > 0.6
A_HEAD[:, :, 0] = False

MULTIHEAD: dict[str, tuple[dict[str, Any], dict[str, Any], Tensor | None]] = {
    "plain": ({}, {}, None),
    "without bias": ({"bias": False}, {}, None),
    "keys of another width": ({"kdim": 10, "vdim": 12}, {}, None),
    "a bias for keys": ({"add_bias_kv": True, "add_zero_attn": True}, {}, None),
    "padding": ({}, {"key_padding_mask": HIDDEN_KEYS}, HIDDEN_KEYS[:, None, None]),
    "additive padding": ({}, {"key_padding_mask": additive(~HIDDEN_KEYS, -INF)}, HIDDEN_KEYS[:, None, None]),
    "causal": ({}, {"attn_mask": HIDDEN_PAIRS, "is_causal": True}, HIDDEN_PAIRS),
    "causal and padding": (
        {"add_bias_kv": True},
        {"attn_mask": HIDDEN_PAIRS, "is_causal": True, "key_padding_mask": HIDDEN_KEYS},
        HIDDEN_PAIRS | HIDDEN_KEYS[:, None, None],
    ),
    "another for every head": ({}, {"attn_mask": A_HEAD}, A_HEAD.unflatten(0, (2, HEADS))),
    "a bias": ({}, {"attn_mask": ALIBI[0, :, :LENGTH] + additive(~HIDDEN_PAIRS, -INF)}, HIDDEN_PAIRS),
}


@pytest.mark.parametrize("need_weights", [True, False, "each head"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("case", MULTIHEAD)
def test_torchs_multihead_attention(case: str, need_weights: bool | str, batch_first: bool) -> None:
    options, masks, hidden = MULTIHEAD[case]
    module = nn.MultiheadAttention(16, HEADS, dropout=0.2, batch_first=batch_first, **options)
    enlarge(module)
    query, key, value = (torch.randn(2, LENGTH, width) for width in (16, module.kdim, module.vdim))
    inputs = [x if batch_first else x.transpose(0, 1) for x in (query, key, value)]
    asked = {"need_weights": bool(need_weights), "average_attn_weights": need_weights is True, **masks}
    with torch.random.fork_rng():
        expected_output, expected_weights = module(*inputs, **asked)
    with QKClip(module) as qk_clip:
        output, weights = module(*inputs, **asked)
        close(qk_clip.max_logits, multihead_maxima(module, query, key, value, hidden))
    assert torch.equal(output, expected_output)
    assert torch.equal(weights, expected_weights) if need_weights else weights is None


def test_torchs_multihead_attention_without_a_batch() -> None:
    module = nn.MultiheadAttention(16, HEADS)
    enlarge(module)
    x = torch.randn(LENGTH, 16)
    for need_weights in (True, False):
        with QKClip(module) as qk_clip:
            module(x, x, x, attn_mask=HIDDEN_PAIRS, need_weights=need_weights)
            close(qk_clip.max_logits, multihead_maxima(module, x[None], x[None], x[None], HIDDEN_PAIRS))


@pytest.mark.parametrize("need_weights", [True, False])
def test_keys_added_by_torchs_multihead_attention_are_always_visible(need_weights: bool) -> None:
    module = nn.MultiheadAttention(16, HEADS, add_bias_kv=True, batch_first=True)
    x = torch.randn(2, LENGTH, 16)
    masks = {"attn_mask": HIDDEN_PAIRS, "key_padding_mask": HIDDEN_KEYS}
    with torch.no_grad():
        module.bias_k.mul_(1000)
    with QKClip(module) as qk_clip:
        module(x, x, x, need_weights=need_weights, **masks)
        expected = multihead_maxima(module, x, x, x, HIDDEN_PAIRS | HIDDEN_KEYS[:, None, None])
        close(qk_clip.max_logits, expected)
    assert (expected > 50).all()

    module = nn.MultiheadAttention(16, HEADS, bias=False, add_zero_attn=True, batch_first=True)
    with torch.no_grad():
        module.in_proj_weight[16:32] = -module.in_proj_weight[:16]
    x = torch.randn(2, 1, 16)  # one token with a negative logit, so that the added zero is the largest
    with QKClip(module) as qk_clip:
        module(x, x, x, need_weights=need_weights)
        assert qk_clip.max_logits.tolist() == [[0.0] * HEADS]


def test_a_subclass_that_calls_torchs_function_by_position() -> None:
    class ByPosition(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:
            weights = self.in_proj_weight, self.in_proj_bias, None, None, False, 0.0
            output = self.out_proj.weight, self.out_proj.bias
            return F.multi_head_attention_forward(x, x, x, 16, HEADS, *weights, *output, True, None, True)[0]

    module = ByPosition(16, HEADS)
    enlarge(module)
    x = torch.randn(LENGTH, 2, 16)
    with QKClip(module) as qk_clip:
        module(x)
        close(qk_clip.max_logits, multihead_maxima(module, *(x.transpose(0, 1),) * 3, None))


def test_torchs_encoder_is_intercepted_in_training_and_not_in_its_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(16, HEADS, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, LENGTH, 16)
    with QKClip(model) as qk_clip:
        model.eval()(x)
        assert qk_clip.max_logits.isneginf().all()
        model.train()(x)
        assert qk_clip.max_logits.isfinite().all()


# flex_attention: it has no backward on a CPU, so these run under no_grad


FLEX_CALLS = {
    "an attribute of its module": ("import torch.nn.attention.flex_attention as flex", "flex.flex_attention"),
    "imported by value": ("from torch.nn.attention.flex_attention import flex_attention", "flex_attention"),
    "compiled by the file": (
        "import torch\nfrom torch.nn.attention.flex_attention import flex_attention\n"
        "fast = torch.compile(flex_attention, backend='eager')",
        "fast",
    ),
}


@pytest.fixture
def _no_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.usefixtures("_no_gradient")
@pytest.mark.parametrize("how", FLEX_CALLS)
def test_flex_attention_is_intercepted_however_a_file_calls_it(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    imports, call = FLEX_CALLS[how]
    monkeypatch.setitem(sys.modules, "a_file", types.ModuleType("a_file"))
    file = vars(sys.modules["a_file"])
    body = (
        f"class Attention(Cross):\n    def forward(self, x, y):\n        return {call}(*self.parts(x, y), scale=0.7)\n"
    )
    exec(f"{imports}\nfrom intercepted import Cross\n{body}", file)
    before = dict(file)
    module = file["Attention"]()
    x, y = sequences()
    with QKClip(module) as qk_clip:
        module(x, y)
        close(qk_clip.max_logits, module.expected(x, y, 0.7))
        assert qk_clip.observer.recorders[0].source == "flex_attention"
    assert file.keys() == before.keys() and all(file[name] is before[name] for name in before)


def is_causal(b: Any, h: Any, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def is_near(b: Any, h: Any, i: Tensor, j: Tensor) -> Tensor:
    return (i >= j) & (i - j < 40)


def is_near_and_real(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return is_near(b, h, i, j) & (j < 150 - 70 * b) & ((h > 0) | (i > j))


def softened(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return 5 * torch.tanh(score / 5) - 0.3 * (i - j).abs()


BLOCK_MASKS: dict[str, tuple[Any, Any]] = {
    "causal": (is_causal, (None, None)),
    "sliding": (is_near, (None, None)),
    "another for every sequence and head": (is_near_and_real, (2, HEADS)),
}


@pytest.mark.usefixtures("_no_gradient")
@pytest.mark.parametrize("score_mod", [None, softened])
@pytest.mark.parametrize("case", BLOCK_MASKS)
@pytest.mark.parametrize("key_heads", [4, 2])
def test_flex_attention_is_intercepted_with_its_block_mask(case: str, score_mod: Any, key_heads: int) -> None:
    mod, (batch, heads) = BLOCK_MASKS[case]
    length = 150  # a block and a part of one
    block_mask = create_block_mask(mod, batch, heads, length, length, device="cpu")
    visible = mod(*torch.meshgrid(*map(torch.arange, (2, HEADS, length, length)), indexing="ij"))
    module, x = Flex(HEADS, key_heads), torch.randn(2, length, 16)
    with QKClip(module) as qk_clip:
        module(x, x, score_mod, block_mask, enable_gqa=key_heads < HEADS)
        close(qk_clip.max_logits, module.expected(x, x, visible=visible))
        qk_clip.discard()
        module(x, x, score_mod=score_mod, block_mask=block_mask, scale=0.2, enable_gqa=key_heads < HEADS)
        close(qk_clip.max_logits, module.expected(x, x, 0.2, visible))


@pytest.mark.usefixtures("_no_gradient")
def test_flex_attention_sees_no_block_that_its_mask_does_not_list() -> None:
    # Blocks of 32 queries and 32 keys: the first row sees blocks 0 and 2, the second only 1.
    numbers, columns = (
        torch.tensor([[[2, 1]]], dtype=torch.int32),
        torch.tensor([[[[0, 2, 1], [1, 0, 2]]]], dtype=torch.int32),
    )
    block_mask = BlockMask.from_kv_blocks(numbers, columns, BLOCK_SIZE=32)
    visible = torch.zeros(64, 96, dtype=torch.bool)
    visible[:32, :32] = visible[:32, 64:] = visible[32:, 32:64] = True
    module, x, y = Flex(), torch.randn(2, 64, 16), torch.randn(2, 96, 16)
    with QKClip(module) as qk_clip:
        module(x, y, block_mask=block_mask)
        close(qk_clip.max_logits, module.expected(x, y, visible=visible))
        assert not torch.allclose(module.expected(x, y, visible=visible), module.expected(x, y))


# Hugging Face's attention interface


@pytest.fixture
def _mine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping))
    monkeypatch.setattr(AttentionMaskInterface, "_global_mapping", dict(AttentionMaskInterface._global_mapping))


Inputs = list[tuple[Tensor, Tensor, float]]


def eager_inputs(model: LlamaModel, monkeypatch: pytest.MonkeyPatch, *inputs: Any, **kwargs: Any) -> Inputs:
    """Queries and keys of every layer as the eager function gets them, from an unobserved model."""
    received: Inputs = []
    eager = modeling_llama.eager_attention_forward

    def spy(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **kwargs: Any) -> Any:
        received.append((query.detach(), key.detach(), scaling))
        return eager(module, query, key, value, mask, scaling, **kwargs)

    implementation = model.config._attn_implementation
    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama, "eager_attention_forward", spy)
        model.set_attn_implementation("eager")
        model(*inputs, **kwargs)
        model.set_attn_implementation(implementation)
    return received


IMPLEMENTATIONS: dict[str, tuple[Any, Any]] = {
    "eager": (None, None),
    "sdpa": (None, None),
    "flex_attention": (None, None),
    "boolean of four dimensions": (plain_attention, sdpa_mask),
    "additive of four dimensions": (plain_attention, eager_mask),
    "of two dimensions": (plain_attention, flash_attention_mask),
    "a BlockMask": (plain_attention, flex_attention_mask),
    "through torch": (through_torch, sdpa_mask),
}
#: Masks that ``plain_attention`` ignores.
IGNORED = ("of two dimensions", "a BlockMask")


SEPARATE = Projection("q_proj", "q(H d)"), Projection("k_proj", "k(G d)")
#: Of described attention, what the functions of the interface compute is not looked at, as if they were opaque kernels.
DESCRIBED = {f"layers.{i}.self_attn": AttentionSpec(SEPARATE, HEADS, 2, {"d": DIM}) for i in range(2)}


@pytest.mark.usefixtures("_mine", "_no_gradient")
@pytest.mark.parametrize("case", IMPLEMENTATIONS)
@pytest.mark.parametrize("padded", [False, "right", "left"])
@pytest.mark.parametrize("specs", [None, DESCRIBED], ids=["inferred", "described"])
def test_the_attention_interface(
    case: str, padded: bool | str, specs: dict[str, AttentionSpec] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case in ("flex_attention", "a BlockMask"):  # Hugging Face compiles it, which takes longer than all other cases
        monkeypatch.setattr(WrappedFlexAttention, "_instance", None)
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    function, mask_function = IMPLEMENTATIONS[case]
    name = case
    if function is not None:
        name = "mine"
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, mask_function)
    model = llama(name)
    tokens = torch.randint(11, (2, LENGTH))
    keep = torch.ones(2, LENGTH, dtype=torch.long)
    if padded:
        keep[0, 5:] = 0
        keep = keep.flip(1) if padded == "left" else keep
    with QKClip(model, specs=specs) as qk_clip:
        model(tokens, attention_mask=keep)
        found = qk_clip.max_logits
    visible = keep.bool()[:, None, None] & causal(LENGTH)
    if case in IGNORED and (padded or case == "a BlockMask"):
        found = found[:1]  # since the function ignores such a mask, later layers see other inputs
        visible = visible if specs else torch.ones_like(visible)  # of what is inferred, what the function does counts
    received = eager_inputs(model, monkeypatch, tokens, attention_mask=keep)
    for row, (query, key, scale) in zip(found, received):
        close(row, brute_max_logits(query, key, scale, visible))


@pytest.mark.usefixtures("_mine")
@pytest.mark.parametrize("function", [plain_attention, through_torch])
def test_without_a_mask_the_module_says_whether_it_is_causal(function: Any) -> None:
    AttentionInterface.register("mine", function)
    model = llama("mine")  # no function for masks is registered, so that there is none
    attention = model.layers[0].self_attn
    x = torch.randn(2, LENGTH, 16)
    cos, sin = torch.ones(1, LENGTH, DIM), torch.zeros(1, LENGTH, DIM)  # nothing is rotated
    with torch.no_grad():
        query, key = (p(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
    cases: list[tuple[bool, dict[str, Any], Tensor]] = [
        (True, {}, causal(LENGTH)),
        (False, {}, torch.ones(LENGTH, LENGTH, dtype=torch.bool)),
        (True, {"is_causal": False}, torch.ones(LENGTH, LENGTH, dtype=torch.bool)),
        (False, {"is_causal": True}, causal(LENGTH)),
        (True, {"sliding_window": 3}, causal(LENGTH) & ~causal(LENGTH).tril(-3)),
        (
            False,
            {"sliding_window": 3},
            causal(LENGTH).tril(2).triu(-2) | causal(LENGTH).mT.triu(0).tril(2) | causal(LENGTH).triu(-2),
        ),
    ]
    for module_is, kwargs, visible in cases:
        attention.is_causal = module_is
        with QKClip(model, specs=DESCRIBED) as qk_clip:
            attention(x, position_embeddings=(cos, sin), attention_mask=None, **kwargs)
            close(qk_clip.max_logits[0], brute_max_logits(query, key, DIM**-0.5, visible))


@pytest.mark.usefixtures("_mine")
def test_a_two_dimensional_mask_marks_padding_beside_the_window() -> None:
    AttentionInterface.register("mine", plain_attention)
    model = llama("mine")
    attention = model.layers[0].self_attn
    x = torch.randn(2, LENGTH, 16)
    cos, sin = torch.ones(1, LENGTH, DIM), torch.zeros(1, LENGTH, DIM)
    keep = torch.arange(LENGTH) < torch.tensor([[9], [6]])
    with torch.no_grad():
        query, key = (p(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
    for window, near in ((None, causal(LENGTH)), (2, causal(LENGTH) & ~causal(LENGTH).tril(-2))):
        with QKClip(model, specs=DESCRIBED) as qk_clip:
            attention(x, position_embeddings=(cos, sin), attention_mask=keep.long(), sliding_window=window)
            close(qk_clip.max_logits[0], brute_max_logits(query, key, DIM**-0.5, keep[:, None, None] & near))


@pytest.mark.usefixtures("_mine")
def test_calls_inside_an_interface_function_are_not_measured_again() -> None:
    def folded(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Passes SDPA all heads as one long sequence, and has more key slots than keys."""
        groups, keys = query.shape[1] // key.shape[1], key.shape[2]
        key, value = (part.repeat_interleave(groups, 1).flatten(0, 1) for part in (key, value))
        visible = mask[..., :keys].expand(*query.shape[:-1], keys).flatten(0, 1)
        output = F.scaled_dot_product_attention(query.flatten(0, 1), key, value, visible)
        return output.unflatten(0, query.shape[:2]).transpose(1, 2), None

    AttentionInterface.register("mine", folded)
    model = llama("mine")
    attention = model.layers[0].self_attn
    x = torch.randn(2, LENGTH, 16)
    not_rotated = torch.ones(1, LENGTH, DIM), torch.zeros(1, LENGTH, DIM)
    with torch.no_grad():
        query, key = (p(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
    room = ARE_SEEN[None, None]  # for 13 keys
    with QKClip(model) as qk_clip:
        attention(x, position_embeddings=not_rotated, attention_mask=room)
        close(qk_clip.max_logits[0], brute_max_logits(query, key, DIM**-0.5, ARE_SEEN[:, :LENGTH]))


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_a_single_token_is_measured(attn_implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Hugging Face then passes SDPA the queries of a group as if they were a sequence.
    model = llama(attn_implementation)
    tokens, keep = torch.randint(11, (3, 1)), torch.tensor([[1], [1], [0]])
    with QKClip(model, example=((TOKENS,), {})) as qk_clip:
        model(tokens, attention_mask=keep)
        found = qk_clip.max_logits
    for row, (query, key, scale) in zip(found, eager_inputs(model, monkeypatch, tokens, attention_mask=keep)):
        close(row, brute_max_logits(query, key, scale, keep.bool()[:, None, None]))


@pytest.mark.usefixtures("_mine")
def test_the_table_of_functions_can_be_used_as_before_while_it_is_observed() -> None:
    table = modeling_llama.ALL_ATTENTION_FUNCTIONS
    names = list(table)
    model = llama("sdpa")
    with QKClip(model, specs=DESCRIBED):
        observed = modeling_llama.ALL_ATTENTION_FUNCTIONS
        assert observed is not table
        assert list(observed) == names and len(observed) == len(names) and "sdpa" in observed and "none" not in observed
        assert observed.valid_keys() == names
        assert observed.get("none") is None
        observed["local"] = plain_attention
        observed.register("for all", plain_attention)
        assert table["local"] is table["for all"] is plain_attention
        model.set_attn_implementation("for all")
        model(torch.randint(11, (2, LENGTH)))
        del observed["local"]
    assert "local" not in table
    with QKClip(model, specs=DESCRIBED) as qk_clip:
        model(torch.randint(11, (2, LENGTH)))
        assert {recorder.source for recorder in qk_clip.observer.recorders} == {"the attention interface"}


# Training is not disturbed


TRAINED: dict[str, Callable[[], nn.Module]] = {
    "sdpa": lambda: Layers(SelfSdpa(0.0), SelfSdpa(0.3), dropout=0.2),
    "multihead": lambda: Layers(SelfMultihead(False, 0.3), SelfMultihead(False, 0.0), dropout=0.2),
    "multihead with weights": lambda: Layers(SelfMultihead(True, 0.3), SelfMultihead(True, 0.0), dropout=0.2),
    "encoder": lambda: Layers(nn.TransformerEncoderLayer(16, HEADS, 32, dropout=0.3, batch_first=True)),
    "hugging face sdpa": lambda: LM(llama("sdpa", 0.3)),
    "hugging face eager": lambda: LM(llama("eager", 0.3)),
    "hugging face, a user's": lambda: LM(llama("mine")),
    "by hand": lambda: LM(gptj(0.3)),
    "baddbmm": lambda: LM(bloom()),
}


def trained(model: nn.Module, steps: int = 4) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Losses, gradients of the last step, and the state of the random numbers in the end."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    torch.manual_seed(7)
    for _ in range(steps):
        tokens = torch.randint(11, (2, LENGTH), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, [p.grad.clone() for p in model.parameters()], torch.get_rng_state()


@pytest.mark.usefixtures("_mine")
@pytest.mark.parametrize("name", TRAINED)
def test_losses_gradients_and_random_numbers_are_those_of_an_unobserved_model(name: str) -> None:
    AttentionInterface.register("mine", plain_attention)
    model = TRAINED[name]().train()
    twin = copy.deepcopy(model)
    expected = trained(model)
    with QKClip(twin, threshold=None) as qk_clip:
        losses, gradients, random_numbers = trained(twin)
        assert qk_clip.max_logits.isfinite().all()
    assert all(map(torch.equal, losses, expected[0])) and len({float(loss) for loss in losses}) == 4
    assert all(map(torch.equal, gradients, expected[1]))
    assert torch.equal(random_numbers, expected[2])


# Log-sum-exp


def test_the_log_sum_exp_bounds_the_maxima_and_trains_alike() -> None:
    model = self_sdpa()
    tokens = torch.randint(11, (2, LENGTH))
    found = {}
    for logits in ("exact", "lse"):
        with QKClip(model, logits=logits) as qk_clip:
            model.zero_grad()
            output = model(tokens)
            output.square().sum().backward()
            found[logits] = qk_clip.max_logits, output, [p.grad.clone() for p in model.parameters()]
            sources = {recorder.source for recorder in qk_clip.observer.recorders}
            assert sources == {
                {"exact": "scaled_dot_product_attention", "lse": "log-sum-exp of scaled_dot_product_attention"}[logits]
            }
    exact, bound = found["exact"][0], found["lse"][0]
    assert (bound >= exact - 1e-5).all() and (bound <= exact + torch.tensor(float(LENGTH)).log() + 1e-5).all()
    assert (bound > exact + 1e-4).any()
    model.zero_grad()
    output = model(tokens)
    output.square().sum().backward()
    for _, watched, gradients in found.values():  # the same kernel, whether watched or not
        assert torch.equal(watched, output)
        assert all(torch.equal(own, p.grad) for own, p in zip(gradients, model.parameters()))


@pytest.mark.parametrize("case", ["dropout", "additive", "values of another width"])
def test_where_there_is_no_log_sum_exp_the_logits_are_measured(case: str) -> None:
    module = Cross(value_dim=7 if case == "values of another width" else DIM)
    x, y = sequences()
    options = {"dropout": {"dropout_p": 0.1}, "additive": {"attn_mask": ALIBI}}.get(case, {})
    with QKClip(module, logits="lse") as qk_clip:
        module(x, y, **options)
        close(qk_clip.max_logits, module.expected(x, y))
        assert qk_clip.observer.recorders[0].source == "scaled_dot_product_attention"


@pytest.mark.parametrize("logits", ["exact", "lse"])
def test_a_mask_combines_with_causality(logits: str) -> None:
    module, (x, _) = Cross(), sequences()
    mask = ARE_SEEN[:, :LENGTH].clone()
    mask[0, 0] = False  # the first query sees nothing
    expected_output = module(x, x, attn_mask=mask & causal(LENGTH))
    try:
        module(x, x, attn_mask=mask, is_causal=True)
    except RuntimeError:
        pytest.skip("torch takes both up to 2.13, on a CPU")
    with QKClip(module, logits=logits) as qk_clip:
        output = module(x, x, attn_mask=mask, is_causal=True)
        torch.testing.assert_close(output, expected_output)
        close(qk_clip.max_logits, module.expected(x, x, visible=mask & causal(LENGTH)))


# Opening and closing


INTERCEPTED: dict[str, Callable[[], nn.Module]] = {
    "sdpa": self_sdpa,
    "multihead": lambda: Layers(SelfMultihead(True, 0.0)),
    "hugging face": lambda: llama("eager"),
    "by hand": gptj,
    "baddbmm": bloom,
}
every_kind = pytest.mark.parametrize("name", INTERCEPTED)


EXAMPLE: Any = ((TOKENS,), {})


def is_patched() -> bool:
    return any(a is not b for a, b in zip(current_functions(), ORIGINALS))


@every_kind
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_observers_overlap_and_close_in_any_order(name: str, order: tuple[int, ...]) -> None:
    models = [INTERCEPTED[name]() for _ in range(3)]
    observers = [QKClip(model) for model in models]
    for last, leaving in enumerate(order):
        for model, qk_clip in zip(models, observers):
            qk_clip.discard()
            model(TOKENS)
        for still, qk_clip in enumerate(observers):
            assert qk_clip.max_logits.isneginf().all() == (still in order[:last])
        observers[leaving].close()
        assert is_patched() == (last < 2)


@every_kind
def test_a_failed_forward_is_discarded(name: str) -> None:
    model = INTERCEPTED[name]()

    def interrupt(*_: Any) -> None:
        raise KeyError

    with QKClip(model, example=EXAMPLE) as qk_clip:
        attention = [module for module, _ in qk_clip.observer.attention.values()][-1]
        for register in (attention.register_forward_pre_hook, attention.register_forward_hook):
            for prepend in (True, False):
                handle = register(interrupt, prepend=prepend)
                with pytest.raises(KeyError):
                    model(TOKENS)
                handle.remove()
                qk_clip.discard()
                Unobserved()(torch.randn(2, LENGTH, 16))
                assert qk_clip.max_logits.isneginf().all()
        model(TOKENS)
        assert qk_clip.max_logits.isfinite().all()


def test_an_interrupted_forward_is_discarded_by_the_next() -> None:
    class Interrupted(Unobserved):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    model = Residual(SelfSdpa(0.0))
    query_of = model.layers[0].q_proj
    x = torch.randn(2, LENGTH, 16)
    with QKClip(model) as qk_clip:
        model.layers[0].q_proj = Interrupted()
        with pytest.raises(KeyboardInterrupt):
            model(x)
        model.layers[0].q_proj = query_of
        model(x)
        seen = qk_clip.max_logits
        Unobserved()(100 * x)
        assert torch.equal(qk_clip.max_logits, seen)


@every_kind
def test_a_failed_observer_restores_everything(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = INTERCEPTED[name]()
    spec = AttentionSpec((Projection("nothing", "q(H d)"), Projection("of this", "k(G d)")), 4, sizes={"d": 4})
    with QKClip(model, logits="off", example=EXAMPLE) as qk_clip:
        last = qk_clip.layers[-1]
    with pytest.raises(ValueError, match="has no parameter 'nothing'"):
        QKClip(model, specs={last: spec}, example=EXAMPLE)
    assert not is_patched()

    def fails(*_: Any) -> Any:
        raise RuntimeError("no room")

    for place in ("forwards.attention_calls", "discovery.find_attention", "observer.Recorder"):
        monkeypatch.setattr(f"lightning_muonclip.qk_clip.observe.{place}", fails)
        with pytest.raises(RuntimeError, match="no room"):
            QKClip(model, example=EXAMPLE)
        monkeypatch.undo()
        assert not is_patched()
    QKClip(model, example=EXAMPLE).close()


def test_a_patch_by_another_library_in_between_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", SDPA)  # puts it back in the end
    calls = []
    model = self_sdpa()
    with QKClip(model, example=EXAMPLE) as qk_clip:
        ours = F.scaled_dot_product_attention

        def theirs(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(1)
            return ours(*args, **kwargs)

        F.scaled_dot_product_attention = theirs
        model(TOKENS)
        assert qk_clip.max_logits.isfinite().all()
    assert F.scaled_dot_product_attention is theirs
    seen = qk_clip.max_logits
    model(TOKENS)
    assert torch.equal(qk_clip.max_logits, seen)
    assert len(calls) == 4
    with QKClip(model, example=EXAMPLE) as again:
        calls.clear()
        model(TOKENS)
        torch.testing.assert_close(again.max_logits, seen, rtol=1e-5, atol=1e-5)  # another way, another rounding
    assert F.scaled_dot_product_attention is theirs
    assert len(calls) == 2


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("name", ["multihead", "hugging face", "by hand", "baddbmm"])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_an_observed_model_is_not_observed(name: str, copied: Any) -> None:
    model = INTERCEPTED[name]()
    with QKClip(model) as qk_clip:
        twin = copied(model)
        twin(TOKENS)
        assert qk_clip.max_logits.isneginf().all()
        with QKClip(twin) as other:
            twin(TOKENS)
            assert qk_clip.max_logits.isneginf().all() and other.max_logits.isfinite().all()
        model(TOKENS)
        assert torch.equal(qk_clip.max_logits, other.max_logits)
    assert not is_patched()
    twin(TOKENS)


@pytest.mark.parametrize("window", [None, 2])
def test_without_a_mask_the_last_query_is_aligned_with_the_last_key(window: int | None) -> None:
    """As flash-attention aligns them: keys before the first query come from a cache."""
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 8, 4)
    visible = causal(8)[-3:] & (~causal(8).tril(-2)[-3:] if window else True)
    seen = hugging_face._visible(nn.Module(), query, key, None, {"sliding_window": window})
    close(max_logits(query, key, scale=1.0, **seen), brute_max_logits(query, key, 1.0, visible))
