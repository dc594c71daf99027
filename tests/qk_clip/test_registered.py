"""Kernels that tell their own maxima: stand-ins for those of other libraries, with their signatures, and any user's own."""

from __future__ import annotations

import copy
import functools
import math
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracles import brute_max_logits, causal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_muonclip import QKClip, register_max_logits
from lightning_muonclip.qk_clip.intercept import readers

HEADS, DIM, LENGTH, BATCH = 4, 3, 5, 2


class Kernel(torch.autograd.Function):
    """Opaque causal attention of queries, keys and values (batch, heads, length, channels); also maxima and log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Any:
        logits = _logits(query, key, scale)
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        largest, log_sum_exp = logits.amax(-1), logits.logsumexp(-1)
        ctx.mark_non_differentiable(largest, log_sum_exp)
        return logits.softmax(-1) @ value, largest, log_sum_exp

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = _logits(leaves[0], leaves[1], ctx.scale).softmax(-1) @ leaves[2]
        return (*torch.autograd.grad(out, leaves, grad), None)


def _logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    return (scale * query @ key.mT).masked_fill(~causal(query.shape[-2]), -math.inf)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Of (batch, length, heads, channels), or (length, heads, channels); the maxima and log-sum-exp of all rows."""
    q, k, v = (x.transpose(-2, -3) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    out, largest, log_sum_exp = Kernel.apply(q, k, v, scale or q.shape[-1] ** -0.5)
    return out.transpose(-2, -3), largest, log_sum_exp


def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, largest, _ = attend(q, k, v)
    return out, largest.amax(-1)


def heads_first(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    out, largest = plain(*(x.transpose(1, 2) for x in (query, key, value)))
    return out.transpose(1, 2), largest.amax(0)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    out, _, log_sum_exp = attend(q, k, v, softmax_scale)
    return (out, log_sum_exp, None) if return_attn_probs else out


def flex_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask_plan: Any,
    softmax_scale: float | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    return_max_logit: bool = False,
) -> Any:
    out, largest, log_sum_exp = attend(q, k, v, softmax_scale)
    more = [log_sum_exp] * return_lse + [largest.amax((0, -1))] * return_max_logit
    return (out, *more) if more else out


@dataclass
class AttnForwardMeta:
    lse: Tensor | None
    max_logits: Tensor | None


def calc_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: Any,
    sink: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    return_max_logits: bool = False,
) -> tuple[Tensor, AttnForwardMeta]:
    out, largest, log_sum_exp = attend(q, k, v, softmax_scale)
    return out, AttnForwardMeta(log_sum_exp, largest.amax(-1) if return_max_logits else None)


class DotProductAttention(nn.Module):
    def __init__(self, return_max_logit: bool = True) -> None:
        super().__init__()
        self.return_max_logit = return_max_logit

    def forward(
        self,
        query_layer: Tensor | None = None,
        key_layer: Tensor | None = None,
        value_layer: Tensor | None = None,
        attention_mask: Tensor | None = None,
        qkv_format: str | None = None,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None,
    ) -> Any:
        assert query_layer is not None and key_layer is not None and value_layer is not None
        out, largest, _ = attend(query_layer, key_layer, value_layer)
        return (out.flatten(2), largest.amax((0, -1))) if self.return_max_logit else out.flatten(2)


class Attends(nn.Module):
    """Attention by a kernel that it gets queries, keys and values from."""

    def __init__(self, call: Callable[..., Any], key_heads: int = HEADS, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(width, (HEADS + 2 * key_heads) * DIM)
        self.out = nn.Linear(HEADS * DIM, width)
        self.core = DotProductAttention()
        self.call = call
        self.key_heads = key_heads

    def parts(self, x: Tensor) -> list[Tensor]:
        sizes = [heads * DIM for heads in (HEADS, self.key_heads, self.key_heads)]
        return [part.unflatten(-1, (-1, DIM)) for part in self.qkv(x).split(sizes, -1)]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.call(self, *self.parts(x))
        return self.out(out.reshape(*x.shape[:-1], -1))

    @torch.no_grad()
    def expected(self, x: Tensor) -> Tensor:
        query, key, _ = (part.transpose(-2, -3) for part in self.parts(x))
        return brute_max_logits(query, key, DIM**-0.5, causal(query.shape[-2]))


class Tokens(nn.Module):
    """Calls a kernel of packed tokens."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x[0])


def example(length: int = LENGTH, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(1))


CALLS: dict[str, tuple[Any, Any, Any]] = {
    "plain": (plain, lambda out, *_, **__: out[1], lambda self, q, k, v: plain(q, k, v)[0]),
    "heads first": (
        heads_first,
        lambda out, *_, **__: out[1],
        lambda self, q, k, v: heads_first(*(x.transpose(1, 2) for x in (q, k, v)))[0].transpose(1, 2),
    ),
    "cudnn": (
        flex_attn_func,
        readers.cudnn_flex_attention,
        lambda self, q, k, v: flex_attn_func(q, k, v, mask_plan=None, return_lse=True, return_max_logit=True)[0],
    ),
    "transformer engine": (
        DotProductAttention.forward,
        readers.transformer_engine,
        lambda self, q, k, v: self.core(q, k, v)[0],
    ),
}


@pytest.fixture
def registered() -> Iterator[Callable[..., Any]]:
    """Registers for one test."""
    handles: list[Any] = []

    def register(*args: Any, **kwargs: Any) -> Any:
        handles.append(register_max_logits(*args, **kwargs))
        return handles[-1]

    yield register
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("length", [LENGTH, HEADS])  # as many positions, samples and heads
def test_kernel_is_inferred_watched_and_clipped(name: str, key_heads: int, length: int, registered: Any) -> None:
    function, reader, call = CALLS[name]
    registered(function, reader)
    x = example(length, length)
    model = Attends(call, key_heads)
    twin = copy.deepcopy(model)
    with QKClip(model, threshold=1e-2) as qk_clip:
        outputs = [own(x) for own in (model, twin)]
        for out in outputs:
            out.square().sum().backward()
        assert torch.equal(*outputs)  # nothing changes but what is observed
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters()))
        assert qk_clip.sides == {"": "q and k" if key_heads == HEADS else "q"} or key_heads != HEADS
        torch.testing.assert_close(qk_clip.max_logits[0], twin.expected(x).float())
        assert int(qk_clip.step().clipped_heads) == HEADS
        model(x)
        torch.testing.assert_close(qk_clip.max_logits[0], torch.full((HEADS,), 1e-2))
        model.eval()(x)
        assert "proven" in str(qk_clip.verify(x))


def test_packed_tokens_of_magi_attention(registered: Any) -> None:
    registered(calc_attn, readers.magi_attention)
    model = Tokens(Attends(lambda self, q, k, v: calc_attn(q, k, v, object(), return_max_logits=True)[0]))
    with QKClip(model) as qk_clip:
        model(example())
        torch.testing.assert_close(qk_clip.max_logits[0], model.inner.expected(example()[0]).float())


def test_log_sum_exp_is_a_bound(registered: Any) -> None:
    registered(flash_attn_func, readers.flash_attention, bound=True)
    model = Attends(lambda self, q, k, v: flash_attn_func(q, k, v, causal=True, return_attn_probs=True)[0])
    with QKClip(model, threshold=1e-2) as qk_clip:
        model(example())
        exact = model.expected(example()).float()
        assert ((exact <= qk_clip.max_logits[0]) & (qk_clip.max_logits[0] <= exact + math.log(LENGTH))).all()
        assert "upper bounds of" in qk_clip.observer.recorders[0].source
        qk_clip.step()
        assert (model.expected(example()) <= 1e-2).all()


def outer(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return plain(q, k, v)


def test_a_registered_function_in_another(registered: Any) -> None:
    for function in (plain, outer):
        registered(function, lambda out, *_: out[1])
    model = Attends(lambda self, q, k, v: outer(q, k, v)[0])
    with QKClip(model) as qk_clip:
        model(example())
        torch.testing.assert_close(qk_clip.max_logits[0], model.expected(example()).float())
        assert qk_clip.observer.recorders[0].source == f"{__name__}.outer"


def test_what_cannot_be_inferred_is_watched(registered: Any) -> None:
    registered(plain, lambda out, *_: out[1])
    model = Attends(lambda self, q, k, v: plain(q.clamp(-1, 1), k.clamp(-1, 1), v)[0])
    with pytest.raises(ValueError, match="do not scale with their weights"), QKClip(model):
        model(example())
    with QKClip(model, unknown="monitor") as qk_clip:
        model(example())
        query, key, _ = (part.transpose(-2, -3).detach() for part in model.parts(example()))
        expected = brute_max_logits(query.clamp(-1, 1), key.clamp(-1, 1), DIM**-0.5, causal(LENGTH)).float()
        torch.testing.assert_close(qk_clip.max_logits, expected.max().view(1, 1))


def half_precision(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if q.dtype is not torch.bfloat16:
        raise RuntimeError("only support fp16 and bf16 data type")
    out, largest = plain(*(x.float() for x in (q, k, v)))
    return out.bfloat16(), largest


def test_kernel_of_half_precision(registered: Any) -> None:
    registered(half_precision, lambda out, *_: out[1])
    model = Attends(lambda self, q, k, v: half_precision(q, k, v)[0]).bfloat16()
    with QKClip(model, threshold=1e-2) as qk_clip:
        model(example().bfloat16())
        torch.testing.assert_close(qk_clip.max_logits[0], model.expected(example().bfloat16()).float())
        assert qk_clip.sides == {"": "q and k"}


@pytest.mark.parametrize("given", [7, 11])
def test_options_that_lower_the_bound_of_flash_attention_come_by_keyword(given: int) -> None:
    tensors = [torch.ones(1)] * (3 if given == 7 else 5)
    args = [*tensors, *(0.0 for _ in range(given - len(tensors)))]
    out = None, torch.ones(1, 2, 3), None
    readers.flash_attention(out, *args)
    with pytest.raises(ValueError, match="softcap or alibi_slopes; pass these by keyword"):
        readers.flash_attention(out, *args, 30.0)


def test_empty_rows_of_flash_attention() -> None:
    log_sum_exp = torch.tensor([[[1.0, math.inf, 2.0]]])
    assert readers.flash_attention((None, log_sum_exp, None)).tolist() == [[2.0]]


@torch.library.custom_op("registered::opaque", mutates_args=())
def opaque(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    out, largest = plain(query, key, value)
    return out.contiguous(), largest.amax(0)


opaque.register_fake(lambda q, k, v: (torch.empty_like(q), q.new_empty(q.shape[2])))


def _opaque_backward(ctx: Any, grad: Tensor, _: Any) -> Any:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        return torch.autograd.grad(plain(*leaves)[0], leaves, grad)


opaque.register_autograd(_opaque_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def by_operator(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return opaque(q.contiguous(), k.contiguous(), v.contiguous())


def traceable(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    logits = _logits(*(x.transpose(1, 2) for x in (q, k)), DIM**-0.5)
    return (logits.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2), logits.amax((-1, -2))


@pytest.mark.parametrize("function", [by_operator, traceable])
def test_compiled_and_checkpointed(function: Any, registered: Any) -> None:
    registered(function, lambda out, *_, **__: out[1])
    model = Attends(lambda self, q, k, v: self.kernel(q, k, v)[0])
    model.kernel = function
    with QKClip(model) as qk_clip:
        for run in (
            model,
            torch.compile(model, fullgraph=True, backend="eager"),
            lambda x: checkpoint(model, x, use_reentrant=False),
        ):
            run(example()).sum().backward()
            torch.testing.assert_close(qk_clip.max_logits[0], model.expected(example()).float())
            qk_clip.step()
        model.eval()(example())
        assert qk_clip.max_logits.isneginf().all()


# Where a function is held -------------------------------------------------------------------------------------------


def _reads(model: Attends) -> bool:
    with QKClip(model) as qk_clip:
        model(example())
        return torch.allclose(qk_clip.max_logits[0], model.expected(example()).float())


class WithStatic(Attends):
    function = staticmethod(plain)

    def __init__(self) -> None:
        super().__init__(lambda self, q, k, v: self.function(q, k, v)[0])


class WithMethod(Attends):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return plain(query, key, value)

    def __init__(self) -> None:
        super().__init__(lambda self, q, k, v: self.attend(q, k, v)[0])


def _in_closure(function: Any) -> Attends:
    class Holds(Attends):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(function(*self.parts(x))[0].flatten(2))

    return Holds(function)


def _as_attribute() -> Attends:
    model = Attends(lambda self, q, k, v: self.kernel(q, k, v)[0])
    model.kernel = plain
    return model


@pytest.mark.parametrize("make", [_as_attribute, WithStatic, lambda: _in_closure(plain)])
def test_wherever_a_module_holds_it(make: Callable[[], Attends], registered: Any) -> None:
    model = make()
    held = vars(model).get("kernel"), vars(WithStatic)["function"]
    handle = registered(plain, lambda out, *_: out[1])
    assert _reads(model)
    handle.remove()
    assert held == (vars(model).get("kernel"), vars(WithStatic)["function"])
    with pytest.raises(ValueError, match="register_max_logits"):
        _reads(model)


def test_dotted_paths(registered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library, user = types.ModuleType("some_kernels"), types.ModuleType("some_model")
    library.attend = user.attend = functools.wraps(plain)(lambda *args: plain(*args))  # type: ignore[attr-defined]
    original = library.attend
    for file in (library, user):
        monkeypatch.setitem(sys.modules, file.__name__, file)
    for path in ("some_kernels.attend", f"{__name__}.WithMethod.attend"):
        handle = registered(path, lambda out, *_, **__: out[1])
        assert _reads(Attends(lambda self, q, k, v: user.attend(q, k, v)[0]) if "some" in path else WithMethod())
        later = library.attend  # as a file that is imported now has it
        monkeypatch.setattr(user, "other", later, raising=False)
        handle.remove()
        assert library.attend is user.attend is user.other is original
        handle.remove()


def test_hugging_faces_table(registered: Any) -> None:
    from intercepted import NO_TOKENS, TOKENS
    from transformers import AttentionInterface, LlamaConfig, LlamaModel

    def own(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **_: Any
    ) -> Any:
        out, largest, _ = Kernel.apply(query, key, value, scaling)
        return out.transpose(1, 2), largest

    AttentionInterface.register("own", own)
    registered(own, lambda out, *_, **__: out[1].amax(-1))
    sizes = {"hidden_size": 16, "num_attention_heads": HEADS, "num_hidden_layers": 1, "intermediate_size": 8}
    model = LlamaModel(LlamaConfig(**sizes, vocab_size=32, attn_implementation="own", **NO_TOKENS))
    with QKClip(model) as qk_clip:
        model(TOKENS)
        assert qk_clip.observer.recorders[0].source.endswith("own")
        exact = qk_clip.max_logits.clone()
        qk_clip.observer.discard()
        model.config._attn_implementation = "sdpa"
        model(TOKENS)
        torch.testing.assert_close(qk_clip.max_logits, exact)


def test_operands_of_a_packed_call(registered: Any) -> None:
    def unpacked(qkv: Tensor) -> list[Tensor]:
        return [x.transpose(1, 2) for x in qkv.unbind(2)]

    def packed(qkv: Tensor) -> tuple[Tensor, Tensor]:
        return plain(*qkv.unbind(2))

    def call(self: Attends, *parts: Tensor) -> Tensor:
        return self.kernel(torch.stack(parts, 2))[0]

    model = Attends(call)
    model.kernel = packed
    handle = registered(packed, lambda out, *_: out[1])
    with pytest.raises(ValueError, match="operands="):
        _reads(model)
    handle.remove()
    registered(packed, lambda out, *_: out[1], operands=unpacked)
    assert _reads(model)


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "reader", "message"),
    [
        (f"{__name__}.plane", print, "did you mean 'plain'"),
        ("no_such_package.attend", print, "no module 'no_such_package'"),
        (plain, None, "reader must be a function"),
        (3, print, "got int"),
        (DotProductAttention, print, "DotProductAttention.forward"),
        (f"{__name__}.HEADS", print, "is no function, but int"),
    ],
)
def test_registrations_that_cannot_be(fn: Any, reader: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        register_max_logits(fn, reader)


def test_registered_twice(registered: Any) -> None:
    registered(plain, print)
    with pytest.raises(ValueError, match="registered already"):
        register_max_logits(plain, print)


@pytest.mark.parametrize(
    ("reader", "message"),
    [
        (lambda out, *_: out[0], r"plain returned shape \(2, 5, 4, 3\) in attention 'inner'; it must return"),
        (lambda out, *_: None, "returned NoneType in attention 'inner'"),
        (lambda out, *_: out[1][:, :3], r"'inner': its reader tells of 3 heads, but its queries are \(2, 5, 4, 3\)"),
        (lambda out, *_: out[7], "failed in attention 'inner': IndexError"),
    ],
)  # fmt: skip
def test_readers_that_tell_something_else(reader: Any, message: str, registered: Any) -> None:
    registered(plain, reader)
    model = nn.ModuleDict({"inner": Attends(lambda self, q, k, v: plain(q, k, v)[0])})  # never called itself
    with QKClip(model), pytest.raises(ValueError, match=message):
        model["inner"](example())


@pytest.mark.parametrize(
    ("reader", "out", "kwargs", "message"),
    [
        (readers.flash_attention, torch.ones(2), {}, "return_attn_probs=True"),
        (readers.flash_attention, (None, torch.ones(2)), {"softcap": 30.0}, "softcap was given"),
        (readers.cudnn_flex_attention, (None, torch.ones(2)), {"return_lse": True}, "return_max_logit=True"),
        (readers.magi_attention, (None, AttnForwardMeta(None, None)), {}, "return_max_logits=True"),
        (readers.transformer_engine, torch.ones(2), {}, "return_max_logit=True"),
        (readers.transformer_engine, (None, torch.ones(2)), {"core_attention_bias": torch.ones(1)}, "bias was given"),
    ],
)
def test_readers_refuse_what_tells_nothing(reader: Any, out: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reader(out, **kwargs)
