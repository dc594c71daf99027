"""The log-sum-exp of torch's kernels: what it is, what it bounds, and that seeing it changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import INF, causal, normal
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_muonclip.kernels.hidden import HIDDEN
from lightning_muonclip.kernels.log_sum_exp import SDPA, attention_with_log_sum_exp, bounds_of_logits

#: What may be asked of a call: whether the kernel of a CPU tells its log-sum-exp, and further arguments.
CALLS: dict[str, tuple[bool, dict[str, Any]]] = {
    "plain": (True, {}),
    "causal": (True, {"is_causal": True}),
    "scale": (True, {"scale": -0.7}),
    "boolean mask": (True, {"attn_mask": normal((2, 1, 33, 33), 5) > -0.5}),
    "additive mask": (True, {"attn_mask": normal((1, 4, 1, 33), 5)}),
    "additive mask of three dimensions": (False, {"attn_mask": normal((4, 1, 33), 5)}),
    "dropout": (False, {"dropout_p": 0.3}),
}


def tensors(dtype: torch.dtype = torch.float32, key_heads: int = 4, width: int = 16) -> list[Tensor]:
    shapes = (2, 33, 4, 16), (2, 33, key_heads, 16), (2, 33, key_heads, width)
    return [normal(shape, seed).to(dtype).transpose(1, 2).requires_grad_() for seed, shape in enumerate(shapes)]


def results(function: Any, inputs: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Output and gradients; the same random numbers for every function."""
    torch.manual_seed(0)
    output = function(*inputs, **options)
    return [output, *torch.autograd.grad(output.float().square().sum(), inputs)]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_to_be_seen_changes_no_bit(dtype: torch.dtype, call: str) -> None:
    is_told, options = CALLS[call]
    if "attn_mask" in options and options["attn_mask"].dtype is not torch.bool:
        options = {"attn_mask": options["attn_mask"].to(dtype)}
    inputs, seen = tensors(dtype), []

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        output, log_sum_exp = attention_with_log_sum_exp(SDPA, *args, **kwargs)
        seen.append(log_sum_exp)
        return output

    for found, expected in zip(results(watched, inputs, options), results(SDPA, inputs, options)):
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
    assert (seen[0] is not None) == is_told
    if is_told:
        assert seen[0].dtype is torch.float32 and not seen[0].requires_grad
        query, key, _ = (x.detach().double() for x in inputs)
        logits = options.get("scale", 0.25) * query @ key.mT
        mask = options.get("attn_mask")
        if options.get("is_causal"):
            mask = causal(33)
        if mask is not None:
            logits = logits.masked_fill(~mask, -INF) if mask.dtype is torch.bool else logits + mask
        # Half-precision products are accumulated in float32, as all others, but their exponential has 20 bits.
        atol = 1e-5 if dtype.itemsize > 2 else 1e-4
        torch.testing.assert_close(seen[0].double(), logits.logsumexp(-1), rtol=1e-5, atol=atol)


def test_the_call_is_the_users() -> None:
    inputs = tensors()
    with sdpa_kernel(SDPBackend.MATH):
        output, log_sum_exp = attention_with_log_sum_exp(SDPA, *inputs)
        assert torch.equal(output, SDPA(*inputs))
    assert log_sum_exp is None  # the kernel that the user chose tells nothing
    assert attention_with_log_sum_exp(SDPA, *tensors(width=8))[1] is None
    assert attention_with_log_sum_exp(SDPA, *(x[0] for x in inputs))[1] is None
    shared = tensors(key_heads=2)
    output, log_sum_exp = attention_with_log_sum_exp(SDPA, *shared, enable_gqa=True)
    assert torch.equal(output, SDPA(*shared, enable_gqa=True))
    assert log_sum_exp is not None and log_sum_exp.shape == (2, 4, 33)


def test_autocast() -> None:
    inputs = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        output, log_sum_exp = attention_with_log_sum_exp(SDPA, *inputs)
        assert torch.equal(output, SDPA(*inputs))
    query, key, _ = (x.detach().bfloat16().double() for x in inputs)
    assert log_sum_exp is not None
    torch.testing.assert_close(log_sum_exp.double(), (query @ key.mT / 4).logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_another_function_tells_nothing() -> None:
    def of_other_keys(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return SDPA(query, key - key.mean(-2, keepdim=True), value)

    inputs = tensors()
    output, log_sum_exp = attention_with_log_sum_exp(of_other_keys, *inputs)
    assert torch.equal(output, of_other_keys(*inputs))
    assert log_sum_exp is None


@settings(max_examples=80)
@given(
    st.integers(0, 2**20),
    st.booleans(),
    st.sampled_from([0.0, -3.0, 5.0]),
    st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_bounds_are_above_every_logit(seed: int, is_boolean: bool, bias: float, broadcast: list[bool]) -> None:
    query, key, value = (normal((2, 3, length, 8), seed + i) for i, length in enumerate((9, 12, 12)))
    shape = [1 if one else n for one, n in zip(broadcast, (2, 3, 9, 12))]
    mask = normal(tuple(shape), seed + 3) > 0
    if not is_boolean:
        mask = (normal(tuple(shape), seed + 4) + bias).masked_fill(
            ~mask, [-INF, -1e4, torch.finfo(torch.float32).min][seed % 3]
        )
    _, log_sum_exp = attention_with_log_sum_exp(SDPA, query, key, value, mask)
    assert log_sum_exp is not None
    bounds = bounds_of_logits(log_sum_exp, mask)
    assert bounds is not None
    visible = (mask if is_boolean else mask > HIDDEN).expand(2, 3, 9, 12)
    largest = (query.double() @ key.double().mT * 8**-0.5).masked_fill(~visible, -INF).amax(-1)
    assert torch.equal(bounds == -INF, ~visible.any(-1))
    assert (bounds >= largest - 1e-5).all()


def test_an_additive_mask_on_a_device_bounds_nothing() -> None:
    bounds = torch.zeros(2, 3, 4, device="meta")
    assert bounds_of_logits(bounds, torch.zeros(4, 4, device="meta")) is None
    assert bounds_of_logits(bounds, torch.zeros(4, 4, dtype=torch.bool, device="meta")) is not None
    assert bounds_of_logits(bounds, None) is bounds


def test_one_graph() -> None:
    def attend(*args: Any, **kwargs: Any) -> Any:
        output, log_sum_exp = attention_with_log_sum_exp(F.scaled_dot_product_attention, *args, **kwargs)
        return output, None if log_sum_exp is None else bounds_of_logits(log_sum_exp, kwargs.get("attn_mask"))

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for call in ("causal", "boolean mask", "additive mask", "dropout"):
        is_told, options = CALLS[call]
        inputs = tensors()
        torch.manual_seed(0)
        found = compiled(*inputs, **options)
        torch.manual_seed(0)
        expected = attend(*inputs, **options)
        assert torch.equal(found[0], expected[0])
        assert (found[1] is not None) == is_told
        if is_told:
            assert torch.equal(found[1], expected[1])
        gradients = [torch.autograd.grad(out[0].square().sum(), inputs) for out in (found, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients))
