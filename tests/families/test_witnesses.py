"""Every kind of refusal is true: a witness of it is seen on one model, by elementary operations alone."""

from __future__ import annotations

import copy
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from families.brute_force import products
from families.judge import randomize, seeded
from families.sweep import models_of
from lightning_muonclip.qk_clip.describe.describe import describe
from lightning_muonclip.qk_clip.describe.survey import Survey


@dataclass
class Refused:
    """A model with refused attention, in float64 if it can."""

    model: nn.Module
    inputs: dict[str, Any]
    name: str
    calls: list[int]
    softmaxes: list[Tensor] = field(default_factory=list)
    operands: list[Tensor] = field(default_factory=list)

    def logits(self) -> list[Tensor]:
        """The first product of every attention of the model."""
        return [own[0] for own in seeded(lambda: products(self.model, self.inputs))]

    def run(self) -> Refused:
        """Keeps the inputs of all softmaxes and the operands of all batched products in one forward."""
        self.softmaxes, self.operands = [], []
        with torch.no_grad(), _Operations(self):
            seeded(lambda: self.model(**self.inputs))
        return self

    @contextmanager
    def scaled(self, factor: float, *names: str, rows: slice = slice(None)) -> Any:
        """Multiplies parameters of the refused module."""
        params = [self.model.get_submodule(self.name).get_parameter(name) for name in names]
        saved = [param.detach().clone() for param in params]
        with torch.no_grad():
            for param in params:
                param[rows] *= factor
            yield
            for param, value in zip(params, saved):
                param.copy_(value)


class _Operations(TorchDispatchMode):
    def __init__(self, kept: Refused) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in ("aten::_softmax", "aten::_safe_softmax"):
            self.kept.softmaxes.append(args[0].clone())
        if name in ("aten::bmm", "aten::baddbmm"):
            self.kept.operands += [x.clone() for x in args[-2:]]
        return func(*args, **(kwargs or {}))


def refused(library: str, name: str, module: str, reason: str) -> Refused:
    makers = models_of(library)
    if name not in makers:
        pytest.skip(f"{library} has no {name}")
    torch.manual_seed(0)
    try:
        model, inputs = makers[name]()
    except RuntimeError as error:
        pytest.skip(f"{name} is not built: {error}")
    model.train()
    randomize(model)
    with torch.no_grad(), Survey(model) as survey:
        seeded(lambda: model(**inputs))
    calls = [number for number, stack in enumerate(survey.calls) if module in {frame.name for frame in stack}]
    if not calls:
        pytest.skip(f"{name} is built otherwise")
    found = describe([survey.calls[call] for call in calls])[0]
    assert re.search(reason, found.reason)
    true = {key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in inputs.items()}
    own = Refused(copy.deepcopy(model).double(), true, found.name, calls)
    try:
        return own.run()
    except RuntimeError:  # it insists on single precision
        return Refused(model, inputs, found.name, calls).run()


def is_multiple(a: Tensor, b: Tensor, factor: float) -> bool:
    return a.shape == b.shape and bool(((a * factor - b).abs() < 1e-4 * b.abs().max()).all())


def follows(own: Refused, factor: float, *names: str) -> bool:
    """Whether the logits are multiplied like the weights; they move in any case."""
    call = own.calls[0]
    before = own.logits()[call]
    with own.scaled(factor, *names):
        after = own.logits()[call]
    assert not torch.equal(before, after)
    return is_multiple(before, after, factor)


@pytest.mark.parametrize(
    ("library", "name", "module", "weights"),
    [
        ("known families", "OLMo eager", "layers.0.self_attn", ["q_proj.weight"]),
        ("known families", "OLMo eager", "layers.0.self_attn", ["k_proj.weight"]),
        ("x-transformers", "Decoder polar_pos_emb=True", "attn_layers.layers.0.1", ["to_q.weight"]),
        ("x-transformers", "Decoder polar_pos_emb=True", "attn_layers.layers.0.1", ["to_k.weight"]),
    ],
)
def test_logits_do_not_scale_with_the_weights(library: str, name: str, module: str, weights: list[str]) -> None:
    own = refused(library, name, module, "its queries do not scale with their weights.*; its keys do not scale")
    assert not follows(own, 2, *weights)


def test_logits_do_not_follow_when_weights_grow() -> None:
    own = refused("transformers", "inkling2_text", "layers.0.self_attn", "clamped")
    assert not follows(own, 256, "q_proj.linear.weight")
    assert not follows(own, 256, "k_proj.linear.weight")


def test_heads_mix_before_the_softmax() -> None:
    own = refused("vit-pytorch", "cait", "patch_transformer.layers.0.0.fn", "Bmm stands between")
    before = own.softmaxes[own.calls[0]]
    with own.scaled(2, "to_q.weight", rows=slice(0, 16)):  # the first head
        after = own.run().softmaxes[own.calls[0]]
    moved = (before != after).flatten(2).any(-1).any(0)
    assert len(moved) == 4 and bool(moved.all())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("attn_use_cope=True, attn_cope_max_pos=16", "what enters its softmax is more than the products"),
        ("attn_cog_signed=True", "Abs stands between"),
    ],
)
def test_what_enters_the_softmax_is_no_multiple_of_the_product(options: str, reason: str) -> None:
    own = refused("x-transformers", f"Decoder {options}", "attn_layers.layers.0.1", reason)
    query, key = next((a, b) for a, b in zip(own.operands[::2], own.operands[1::2]) if a.shape[-1] == b.shape[-2] == 16)
    (logits, product) = own.softmaxes[0].flatten(), (query @ key).flatten()
    ratio = (logits / product)[logits > -1e9]
    assert float(ratio.max() - ratio.min()) > 1e-3 * float(ratio.abs().max())


def test_weights_have_a_second_consumer() -> None:
    own = refused("transformers", "deepseek_v4", "layers.1.self_attn", "what makes its keys makes something else too")
    before = own.operands
    with own.scaled(2, "kv_norm.weight"):
        after = own.run().operands
    moved = [number for number, (a, b) in enumerate(zip(before, after)) if not torch.equal(a, b)]
    logits = moved[0] // 2
    assert 2 * logits + 1 in moved  # keys
    assert 2 * (logits + 1) + 1 in moved  # values


def test_attention_is_hidden_from_functions() -> None:
    own = refused(
        "transformers", "sew-d", "encoder.encoder.layer.0.attention.self", "attention calls, none can be followed"
    )
    assert len(own.logits()) == 2
    seen: list[Tensor] = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (F.softmax, torch.softmax, Tensor.softmax):
                seen.append(args[0])
            return func(*args, **(kwargs or {}))

    with Functions():
        seeded(lambda: own.model(**own.inputs))
    assert not any(logits.grad_fn is not None for logits in seen)  # no graph leads from them to a product


def test_one_module_attends_twice() -> None:
    own = refused("vit-pytorch", "sep_vit", "layers.0.2.layers.0.0", "several attentions")
    first = own.calls[0]
    before = own.logits()
    with own.scaled(2, "window_tokens_to_qk.3.weight"):
        after = own.logits()
    assert torch.equal(before[first], after[first])
    assert not torch.equal(before[first + 1], after[first + 1])
    with own.scaled(2, "to_qkv.weight"):
        assert not torch.equal(before[first], own.logits()[first])
