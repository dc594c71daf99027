"""The observer records training forwards and leaves the model unchanged."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import (
    INF,
    Residual,
    SdpaAttention,
    brute_max_logits,
    causal,
    enlarge,
    queries_and_keys,
    true_maxima,
)
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaModel

from lightning_muonclip import Attention, AttentionSpec, MultiheadLatentAttention, Projection, QKClip

TORCHS_OWN = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _torch_is_left_as_it_was() -> Any:
    yield
    assert F.scaled_dot_product_attention is TORCHS_OWN


def ours() -> Any:
    module = Attention(16, 4, num_key_value_heads=2)
    enlarge(module)
    return module


def third_party() -> Any:
    module = SdpaAttention(16, 4, 2)
    enlarge(module)
    return module


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.reshape(found.shape), rtol=1e-5, atol=0)


either = pytest.mark.parametrize("make", [ours, third_party])


@either
def test_training_forwards_record_the_maximum_over_all_of_them(make: Callable[[], Any]) -> None:
    module = make()
    xs = [torch.randn(2, 9, 16) for _ in range(3)]
    with QKClip(module) as qk_clip:
        for x in xs:
            module(x)
        close(qk_clip.max_logits, torch.stack([true_maxima(module, x) for x in xs]).amax(0))
    assert len({int(i) for i in torch.stack([true_maxima(module, x) for x in xs]).argmax(0)}) > 1


@either
def test_evaluation_records_nothing(make: Callable[[], Any]) -> None:
    module = make()
    x = torch.randn(2, 9, 16)
    with QKClip(module) as qk_clip:
        module.eval()(x)
        assert qk_clip.max_logits.isneginf().all()
        module.train()(x)
        seen = qk_clip.max_logits
        module.eval()(100 * x)
        assert torch.equal(qk_clip.max_logits, seen)
        close(seen, true_maxima(module, x))


@either
def test_the_module_that_is_evaluated_decides_and_not_the_model(make: Callable[[], Any]) -> None:
    model = Residual(make(), make())
    model.layers[0].eval()
    with QKClip(model) as qk_clip:
        model(torch.randn(2, 9, 16))
        assert qk_clip.max_logits.isneginf().all(1).tolist() == [True, False]


@either
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("whole", [True, False], ids=["every layer", "attention alone"])
def test_activation_checkpointing_changes_nothing(make: Callable[[], Any], use_reentrant: bool, whole: bool) -> None:
    model = Residual(make(), make()).double()
    x = torch.randn(2, 9, 16, requires_grad=True, dtype=torch.float64)
    with QKClip(model) as qk_clip:
        model(x).square().sum().backward()
        expected = qk_clip.max_logits
        gradients = [p.grad.clone() for p in model.parameters()]
        qk_clip.discard()
        model.zero_grad()
        output = x
        for layer in model.layers:
            block = (lambda y, layer=layer: y + layer(y)) if whole else layer
            made = checkpoint(block, output, use_reentrant=use_reentrant)
            output = made if whole else output + made
        forward_only = qk_clip.max_logits
        output.square().sum().backward()
        assert torch.equal(forward_only, expected)
        assert torch.equal(qk_clip.max_logits, expected)
    for param, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(param.grad, gradient)


class Unobserved(nn.Module):
    """Calls SDPA without being observed."""

    def forward(self, x: Tensor) -> Tensor:
        heads = 1000 * x.unflatten(-1, (4, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


def test_calls_of_others_are_not_recorded() -> None:
    module, unobserved = third_party(), Unobserved()
    x = torch.randn(2, 9, 16)
    with QKClip(Residual(unobserved, module, unobserved)) as qk_clip:
        unobserved(x)
        assert qk_clip.max_logits.isneginf().all()
        module(x)
        unobserved(x)
        close(qk_clip.max_logits, true_maxima(module, x))


@pytest.mark.parametrize("how", ["an error", "a recomputation that stops early"])
def test_a_failed_forward_leaves_no_module_running(how: str) -> None:
    module, unobserved = third_party(), Unobserved()
    x = torch.randn(2, 9, 16)
    with QKClip(module) as qk_clip:
        if how == "an error":
            with pytest.raises(RuntimeError, match="cannot be multiplied"):
                module(torch.randn(2, 9, 15))
        else:
            checkpoint(module, x.requires_grad_(), use_reentrant=False).sum().backward()
        qk_clip.discard()
        unobserved(x)
        assert qk_clip.max_logits.isneginf().all()


def test_an_interrupted_forward_ends_with_the_next() -> None:
    module, unobserved = third_party(), Unobserved()
    x = torch.randn(2, 9, 16)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt  # for which torch calls no hooks

    with QKClip(module) as qk_clip:
        module(x)
        with module.v_proj.register_forward_pre_hook(interrupt), pytest.raises(KeyboardInterrupt):
            module(x)
        module(x)
        unobserved(x)
        close(qk_clip.max_logits, true_maxima(module, x))


@either
def test_a_module_that_is_used_twice_has_one_row(make: Callable[[], Any]) -> None:
    layer = make()
    model = Residual(layer, layer)
    x = torch.randn(2, 9, 16)
    with QKClip(model) as qk_clip:
        model(x)
        assert qk_clip.layers == ["layers.0"]
        second = x + layer.eval()(x)
        close(qk_clip.max_logits, torch.maximum(true_maxima(layer, x), true_maxima(layer, second)))


def test_layers_with_fewer_heads_have_shorter_rows() -> None:
    model = Residual(Attention(16, 2), MultiheadLatentAttention(16, 4, 8, 4, 4, 4), SdpaAttention(16, 1))
    with QKClip(model) as qk_clip:
        model(torch.randn(2, 9, 16))
        assert qk_clip.layers == ["layers.0", "layers.1", "layers.2"]
        assert qk_clip.max_logits.isfinite().sum(1).tolist() == [2, 4, 1]
        assert qk_clip.max_logits[2, 1:].isneginf().all()


@either
def test_outputs_and_gradients_are_those_of_an_unobserved_model(make: Callable[[], Any]) -> None:
    model = Residual(make(), make())
    x = torch.randn(2, 9, 16)
    plain = model(x)
    plain_gradients = torch.autograd.grad(plain.sum(), list(model.parameters()))
    with QKClip(model):
        observed = model(x)
        gradients = torch.autograd.grad(observed.sum(), list(model.parameters()))
    assert torch.equal(observed, plain)
    assert all(torch.equal(a, b) for a, b in zip(gradients, plain_gradients))


def test_every_form_of_the_call_is_understood() -> None:
    class Caller(SdpaAttention):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            parts = [p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)]
            return F.scaled_dot_product_attention(*parts, *args, **kwargs)

    module = Caller(16, 4)
    enlarge(module)
    x = torch.randn(2, 9, 16)
    hidden = torch.randn(9, 9) > 0.3
    with torch.no_grad():
        query, key = (p(x).unflatten(-1, (4, 4)).transpose(1, 2) for p in (module.q_proj, module.k_proj))
    calls: list[tuple[tuple, dict[str, Any], Any]] = [
        ((), {}, (0.5, None)),
        ((None, 0.0, True), {}, (0.5, causal(9))),
        ((), {"is_causal": True, "scale": 0.1}, (0.1, causal(9))),
        ((~hidden,), {}, (0.5, ~hidden)),
        ((), {"attn_mask": torch.zeros(9, 9).masked_fill(hidden, -INF), "scale": 2.0}, (2.0, ~hidden)),
        ((), {"dropout_p": 0.5}, (0.5, None)),
        ((), {"enable_gqa": True}, (0.5, None)),
    ]
    for args, kwargs, (scale, visible) in calls:
        with QKClip(module) as qk_clip:
            torch.manual_seed(1)
            observed = module(x, *args, **kwargs)
            close(qk_clip.max_logits, brute_max_logits(query, key, scale, visible))
        torch.manual_seed(1)
        assert torch.equal(observed, module(x, *args, **kwargs))


def test_attention_that_cannot_be_intercepted_is_refused() -> None:
    class BySoftmin(SdpaAttention):
        def forward(self, x: Tensor) -> Tensor:
            return F.softmin(-self.q_proj(x) @ self.k_proj(x).mT, -1) @ self.v_proj(x)

    model = Residual(SdpaAttention(16, 4), BySoftmin(16, 4))
    x = torch.randn(2, 9, 16)
    spec = AttentionSpec((Projection("q_proj", "q(H d)"), Projection("k_proj", "k(G d)")), 1, sizes={"d": 16})
    refused = pytest.raises(RuntimeError, match=r"'layers.1' \(BySoftmin\) cannot be measured")
    with QKClip(model, specs={"layers.1": spec}), refused as error:
        model(x)
    assert "attn_implementation='sdpa'" in str(error.value)
    assert "specs={'layers.1': None}" in str(error.value)
    with QKClip(model, specs={"layers.1": None}) as qk_clip:
        model(x)
        assert qk_clip.layers == ["layers.0"]
    with QKClip(model):
        model.eval()(x)


def test_another_number_of_heads_than_the_spec_says_is_refused() -> None:
    spec = AttentionSpec((Projection("q_proj", "q(H d)"), Projection("k_proj", "k(G d)")), 2, sizes={"d": 8})
    model = Residual(SdpaAttention(16, 4))
    with (
        QKClip(model, specs={"layers.0": spec}),
        pytest.raises(ValueError, match=r"attention 'layers.0' computed 4 heads, but its spec says 2"),
    ):
        model(torch.randn(2, 9, 16))


def llama(attn_implementation: str) -> LlamaModel:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        vocab_size=11,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        attn_implementation=attn_implementation,
    )
    model = LlamaModel(config)
    enlarge(model)
    return model.train()


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_hugging_face_llama(attn_implementation: str, padded: bool) -> None:
    model = llama(attn_implementation)
    tokens = torch.randint(11, (2, 9))
    keep = torch.ones(2, 9, dtype=torch.long)
    if padded:
        keep[0, 6:] = 0
    inputs: dict[int, Tensor] = {}
    for i, layer in enumerate(model.layers):
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, i=i: inputs.__setitem__(i, kwargs["hidden_states"]), with_kwargs=True
        )
    with QKClip(model) as qk_clip:
        model(tokens, attention_mask=keep)
        found = qk_clip.max_logits
    visible = keep.bool()[:, None, None] & causal(9)
    for i, layer in enumerate(model.layers):
        query, key = queries_and_keys(layer.self_attn, inputs[i], 4)
        close(found[i], brute_max_logits(query, key, 0.5, visible))


@pytest.mark.parametrize("need_weights", [False, True])
def test_torchs_own_multihead_attention_by_a_spec(need_weights: bool) -> None:
    layout = "[q(H d) | k(H d) | *]"
    spec = AttentionSpec((Projection("in_proj_weight", layout), Projection("in_proj_bias", layout)), 2, sizes={"d": 8})
    module = nn.MultiheadAttention(16, 2, batch_first=True)
    enlarge(module)
    x, padding = torch.randn(2, 9, 16), torch.arange(9) >= torch.tensor([[9], [5]])

    def expected() -> Tensor:
        with torch.no_grad():
            projected = x.double() @ module.in_proj_weight.double().T + module.in_proj_bias.double()
        query, key, _ = projected.unflatten(-1, (3, 2, 8)).unbind(2)
        return brute_max_logits(query.transpose(1, 2), key.transpose(1, 2), 8**-0.5, ~padding[:, None, None])

    before = expected()
    threshold = float(before.mean())
    with QKClip(module, threshold, specs={"": spec}) as qk_clip:
        module(x, x, x, key_padding_mask=padding, need_weights=need_weights)
        close(qk_clip.step().max_logits, before)
        close(expected(), before.clamp(max=threshold))


# Coming and going


@either
def test_closing_leaves_nothing_behind(make: Callable[[], Any]) -> None:
    model = Residual(make(), make())
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    qk_clip = QKClip(model, example=((torch.randn(2, 9, 16),), {}))
    assert (F.scaled_dot_product_attention is TORCHS_OWN) == (make is ours)
    qk_clip.close()
    assert F.scaled_dot_product_attention is TORCHS_OWN
    assert {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()} == hooks
    assert all(module.__dict__.keys() == before[name].keys() for name, module in model.named_modules())
    assert all(getattr(module, "recorder", None) is None for module in model.modules())
    qk_clip.close()
    model(torch.randn(2, 9, 16))
    assert qk_clip.max_logits.isneginf().all()


def test_a_later_patch_by_another_library_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def faster(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return TORCHS_OWN(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", faster)
    module, x = third_party(), torch.randn(2, 9, 16)
    for _ in range(2):
        with QKClip(module, example=((x,), {})) as qk_clip, QKClip(third_party(), example=((x,), {})):
            calls.clear()
            module(x)
            close(qk_clip.max_logits, true_maxima(module, x))
        assert F.scaled_dot_product_attention is faster
        assert len(calls) == 1


@either
def test_leaving_by_an_exception_closes_too(make: Callable[[], Any]) -> None:
    model = make()
    with pytest.raises(KeyError), QKClip(model):
        raise KeyError
    assert F.scaled_dot_product_attention is TORCHS_OWN
    QKClip(model).close()


@either
def test_two_models_are_observed_side_by_side(make: Callable[[], Any]) -> None:
    first, second = make(), make()
    x = torch.randn(2, 9, 16)
    one, two = QKClip(first), QKClip(second)
    first(x)
    assert two.max_logits.isneginf().all()
    second(x)
    close(one.max_logits, true_maxima(first, x))
    close(two.max_logits, true_maxima(second, x))
    one.close()
    second(3 * x)
    close(two.max_logits, torch.maximum(true_maxima(second, x), true_maxima(second, 3 * x)))
    two.close()
    assert F.scaled_dot_product_attention is TORCHS_OWN


@either
def test_several_observers_of_a_module_share_what_they_see(make: Callable[[], Any]) -> None:
    model = Residual(third_party(), make())
    x = torch.randn(2, 9, 16)
    with QKClip(model, threshold=None) as second, QKClip(model.layers[1], threshold=None) as inner:
        with QKClip(model, threshold=1e-3) as first:
            model(x)
            seen = first.max_logits
            close(seen[0], true_maxima(model.layers[0], x))
            assert torch.equal(second.max_logits, seen) and torch.equal(inner.max_logits, seen[1:])
            first.step()
            assert first.max_logits.isneginf().all() and torch.equal(second.max_logits, seen)  # each has its own ledger
        model(x / 2)
        assert torch.equal(second.max_logits, seen) and torch.equal(inner.max_logits, seen[1:])
        assert first.max_logits.isneginf().all()
    assert F.scaled_dot_product_attention is TORCHS_OWN
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Sequences(nn.Module):
    """Self-attention, or attention to something else, over dense or jagged sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        parts = self.q_proj(x), self.k_proj(memory), self.v_proj(memory)
        heads = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in parts)
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(-2)


@pytest.mark.parametrize("case", ["self", "cross"])
def test_of_jagged_sequences_each_counts_for_itself(case: str) -> None:
    model = Sequences()
    own, other = ([4 * torch.randn(n, 16) for n in lengths] for lengths in ((3, 7, 1), (2, 4, 5)))
    nested = [torch.nested.nested_tensor(x, layout=torch.jagged) for x in (own, other)]
    with QKClip(model) as qk_clip, QKClip(copy.deepcopy(model)) as expected:
        model(*nested[: 2 if case == "cross" else 1])
        for x, memory in zip(own, other):
            expected.model(x[None], *([memory[None]] if case == "cross" else []))
        assert qk_clip.layers == [""]
        torch.testing.assert_close(qk_clip.max_logits, expected.max_logits, rtol=1e-6, atol=0)


def valueless(model: nn.Module, x: Tensor) -> dict[str, Callable[[], Any]]:
    """Forwards in training whose tensors have no values, or are inside a transform."""
    params = dict(model.named_parameters())

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (x,)).square().mean()

    def fake() -> None:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model(x)

    def each(x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x[:, None])["layers.0.q_proj.weight"]

    def forward_mode() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            torch.func.jvp(model, (x,), (x,))

    return {
        "fake": fake,
        "export": lambda: torch.export.export(model, (x,)),
        "strict export": lambda: torch.export.export(model, (x,), strict=True),
        "meta": lambda: copy.deepcopy(model).to("meta")(x.to("meta")),
        "grad": lambda: torch.func.grad(loss)(params, x),
        "vmap": lambda: each(x),
        "jvp": forward_mode,
    }


@either
@pytest.mark.parametrize("is_found", [False, True])
@pytest.mark.parametrize("kind", ["fake", "export", "strict export", "meta", "grad", "vmap", "jvp"])
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:While compiling")
def test_of_tensors_without_values_nothing_is_recorded(make: Callable[[], Any], is_found: bool, kind: str) -> None:
    if kind == "strict export" and not is_found and torch.__version__ < "2.11":
        pytest.skip("torch 2.9 does not export in the stance force_eager, which a QKClip takes until its first step")
    model, x = Residual(make()), torch.randn(2, 9, 16)
    with QKClip(model, example=((x,), {}) if is_found else None) as qk_clip:
        if is_found:
            qk_clip.step([[1.0] * 4])  # torch.compile acts from then on
        layers = qk_clip.layers
        valueless(model, x)[kind]()
        assert qk_clip.layers == layers and qk_clip.max_logits.isneginf().all()
        model(x)
        close(qk_clip.max_logits[0], true_maxima(model.layers[0], x))


@either
def test_what_nobody_holds_does_not_observe(make: Callable[[], Any]) -> None:
    model = Residual(third_party(), make())
    before = {module: set(vars(module)) for module in model.modules()}
    qk_clip = QKClip(model)
    model(torch.randn(2, 9, 16))
    assert F.scaled_dot_product_attention is not TORCHS_OWN
    gc.disable()
    try:
        del qk_clip  # at once: nothing refers to it in a circle
        assert F.scaled_dot_product_attention is TORCHS_OWN
    finally:
        gc.enable()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert {module: set(vars(module)) for module in model.modules()} == before


@either
def test_a_refused_model_is_restored(make: Callable[[], Any]) -> None:
    model = Residual(third_party(), make())
    spec = AttentionSpec((Projection("q_proj", "q(H d)"), Projection("k_proj", "k(G d)")), 4, 2, {"d": 4}, qk_norm=True)
    with pytest.raises(ValueError, match=r"attention 'layers.1' normalizes queries or keys"):
        QKClip(model, specs={"layers.1": spec}, qk_norm="error")
    assert F.scaled_dot_product_attention is TORCHS_OWN
    with QKClip(model, specs={"layers.1": spec}, qk_norm="monitor") as qk_clip:
        model(torch.randn(2, 9, 16))
        assert qk_clip.max_logits.isfinite().all()


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@either
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_an_observed_model_is_not_observed(make: Callable[[], Any], copied: Any) -> None:
    model = make()
    x = torch.randn(2, 9, 16)
    with QKClip(model) as qk_clip:
        twin = copied(model)
        twin(100 * x)
        assert qk_clip.max_logits.isneginf().all()
        with QKClip(twin, threshold=1.0) as other:
            twin(x)
            other.step()
            assert qk_clip.max_logits.isneginf().all()
        model(x)
        close(qk_clip.max_logits, true_maxima(model, x))
    twin(x)
    QKClip(twin).close()


def test_logits_off_measures_nothing() -> None:
    model = Residual(ours(), third_party())
    with QKClip(model, logits="off") as qk_clip:
        assert F.scaled_dot_product_attention is TORCHS_OWN
        model(torch.randn(2, 9, 16))
        assert qk_clip.max_logits.isneginf().all()
        assert (qk_clip.step([[200.0] * 4] * 2).clipped_heads) == 8


def test_names_are_those_of_the_model_below_wrappers() -> None:
    model = Residual(ours(), third_party())
    example = (torch.randn(2, 9, 16),), {}
    with QKClip(torch.compile(model, backend="eager"), example=example) as qk_clip:
        assert qk_clip.layers == ["layers.0", "layers.1"]
    model.layers[1] = torch.compile(model.layers[1], backend="eager")
    with QKClip(model, example=example) as qk_clip:
        assert qk_clip.layers == ["layers.0", "layers.1"]
