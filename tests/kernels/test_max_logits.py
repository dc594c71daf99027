"""max_logits against the whole logit matrix in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import INF, brute_max_logits, causal, normal, visible_pairs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_muonclip.kernels.hidden import HIDDEN
from lightning_muonclip.kernels.max_logits import max_logits

LENGTHS = st.one_of(st.sampled_from([1, 63, 64, 65, 127, 128, 129]), st.integers(1, 150))


@st.composite
def inputs(draw: Any) -> tuple[Tensor, Tensor, float, bool]:
    batch = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    key_heads, group, dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8]))
    length = draw(LENGTHS)
    key_length = length if draw(st.booleans()) else draw(LENGTHS)
    seed = draw(st.integers(0, 2**20))
    query = normal((*batch, key_heads * group, length, dim), seed)
    key = normal((*batch, key_heads, key_length, dim), seed + 1)
    return query, key, draw(st.sampled_from([dim**-0.5, 1.7, -0.4])), draw(st.booleans())


@st.composite
def broadcast_shape(draw: Any, full: tuple[int, ...]) -> tuple[int, ...]:
    """Any shape that broadcasts to ``full``: dimensions of 1, and leading ones left out."""
    shape = tuple(size if draw(st.booleans()) else 1 for size in full)
    leading = next((i for i, size in enumerate(shape) if size != 1), len(shape))
    return shape[draw(st.integers(0, leading)) :]


def check(query: Tensor, key: Tensor, scale: float, is_causal: bool, mask: Tensor | None, visible: Any) -> None:
    full = (*query.shape[:-1], key.shape[-2])
    allowed = torch.ones(full, dtype=torch.bool) if visible is None else visible.expand(full)
    if is_causal:
        allowed = allowed & causal(*full[-2:])
    expected = brute_max_logits(query, key, scale, allowed)
    found = max_logits(query, key, scale=scale, is_causal=is_causal, mask=mask)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=40)
@given(inputs())
def test_without_a_mask(drawn: tuple[Tensor, Tensor, float, bool]) -> None:
    check(*drawn, mask=None, visible=None)


@settings(max_examples=50)
@given(inputs(), st.data())
def test_with_a_boolean_mask_broadcast_in_any_way(drawn: tuple[Tensor, Tensor, float, bool], data: Any) -> None:
    query, key, _, _ = drawn
    shape = data.draw(broadcast_shape((*query.shape[:-1], key.shape[-2])))
    visible = normal(shape, seed=7) > data.draw(st.sampled_from([-1.0, 0.5, 2.0, 9.0]))
    check(*drawn, mask=visible, visible=visible)


@settings(max_examples=40)
@given(inputs(), st.data())
def test_an_additive_mask_hides_but_does_not_count(drawn: tuple[Tensor, Tensor, float, bool], data: Any) -> None:
    query, key, _, _ = drawn
    shape = data.draw(broadcast_shape((*query.shape[:-1], key.shape[-2])))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    hidden = data.draw(st.sampled_from([-INF, torch.finfo(dtype).min, -1e4]))
    visible = normal(shape, seed=7) > 0.5
    bias = (100 * normal(shape, seed=8)).to(dtype)
    check(*drawn, mask=bias.masked_fill(~visible, hidden), visible=visible)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [-700.0, 0.0, 700.0])
def test_a_bias_does_not_change_visibility(dtype: torch.dtype, bias: float) -> None:
    query, key = torch.ones(1, 1, 1, 1), torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]).reshape(1, 1, 5, 1)
    lowest = torch.finfo(dtype).min
    mask = torch.tensor([0.0, 0.0, -1e4, lowest, -INF], dtype=dtype) + torch.tensor(bias, dtype=dtype)
    assert max_logits(query, key, scale=3.0, mask=mask).tolist() == [6.0]


@pytest.mark.parametrize("slopes", [[0.5, 0.25], [0.004, 1.0]])
def test_alibi_hides_only_pairs_without_weight(slopes: list[float]) -> None:
    length = 8192
    query, key = torch.ones(1, 2, 1, 1), torch.arange(length, 0.0, -1)[:, None].expand(1, 2, length, 1)
    distance = torch.arange(length - 1, -1.0, -1)
    bias = -torch.tensor(slopes)[:, None, None] * distance
    assert bias.min() > HIDDEN
    assert max_logits(query, key, scale=1.0, mask=bias).tolist() == [length, length]
    assert torch.exp(torch.tensor(HIDDEN / 50, dtype=torch.float32)) == 0


@pytest.mark.parametrize("hidden", [False, -INF, torch.finfo(torch.float32).min, -1e4])
def test_a_head_that_sees_nothing_is_minus_infinity(hidden: Any) -> None:
    query = normal((2, 4, 70, 3))
    mask = torch.full((1, 4, 70, 70), True if hidden is False else 0.0)
    mask[:, 2] = hidden
    maxima = max_logits(query, query, scale=1.0, mask=mask)
    assert maxima[2] == -INF
    assert maxima[[0, 1, 3]].isfinite().all()


def test_causality_starts_at_the_first_key_also_where_lengths_differ() -> None:
    key = torch.tensor([1.0, 2.0, 4.0, 8.0]).reshape(1, 1, 4, 1)
    assert max_logits(torch.ones(1, 1, 2, 1), key, scale=1.0, is_causal=True).tolist() == [2.0]
    assert max_logits(torch.ones(1, 1, 9, 1), key, scale=1.0, is_causal=True).tolist() == [8.0]


def test_maxima_are_signed() -> None:
    query = torch.ones(1, 2, 3, 1)
    assert max_logits(query, -query, scale=2.0).tolist() == [-2.0, -2.0]


def test_a_visible_nan_propagates_and_a_hidden_one_does_not() -> None:
    query, key = normal((2, 3, 130, 4)), normal((2, 3, 130, 4), seed=1)
    key[1, 1, 129, 0] = torch.nan
    maxima = max_logits(query, key, scale=1.0, is_causal=True)
    assert maxima.isnan().tolist() == [False, True, False]
    mask = torch.ones(130, dtype=torch.bool)
    mask[129] = False
    assert not max_logits(query, key, scale=1.0, is_causal=True, mask=mask).isnan().any()
    assert not max_logits(query[..., :129, :], key, scale=1.0, is_causal=True).isnan().any()


def test_an_infinite_logit_is_infinite() -> None:
    query = torch.full((1, 1, 2, 1), 3e38)
    assert max_logits(query, query, scale=1.0).tolist() == [INF]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_multiplied_in_float32(dtype: torch.dtype) -> None:
    query, key = normal((2, 4, 65, 16)).to(dtype), normal((2, 2, 65, 16), seed=1).to(dtype)
    maxima = max_logits(query, key, scale=0.25)
    assert torch.equal(maxima, max_logits(query.float(), key.float(), scale=0.25))
    torch.testing.assert_close(maxima.double(), brute_max_logits(query, key, 0.25), rtol=1e-6, atol=0)
    in_half = (0.25 * query @ key.repeat_interleave(2, 1).mT).amax((0, 2, 3)).float()
    assert not torch.equal(maxima, in_half)


def test_autocast_changes_nothing() -> None:
    query, key = normal((2, 4, 65, 16)), normal((2, 2, 65, 16), seed=1)
    outside = max_logits(query, key, scale=0.25)
    with torch.autocast("cpu", torch.bfloat16):
        assert (query @ query.mT).dtype is torch.bfloat16
        assert torch.equal(max_logits(query, key, scale=0.25), outside)


@pytest.mark.parametrize("mask", [None, torch.ones(1, 1, 1, 1, dtype=torch.bool)])
@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 2, 0, 4)], ids=["no batch", "no queries"])
def test_empty_inputs(shape: tuple[int, ...], mask: Tensor | None) -> None:
    key = normal((shape[0], 2, 5, 4))
    assert max_logits(torch.empty(shape), key, scale=1.0, mask=mask).tolist() == [-INF, -INF]


def test_no_keys() -> None:
    assert max_logits(normal((2, 2, 5, 4)), torch.empty(2, 2, 0, 4), scale=1.0).tolist() == [-INF, -INF]


def test_inputs_need_not_be_contiguous() -> None:
    query = normal((2, 70, 6, 4)).transpose(1, 2)
    shared = normal((2, 70, 2, 8), seed=1)[..., ::2].transpose(1, 2)
    expanded = normal((2, 1, 70, 4), seed=2).expand(-1, 6, -1, -1)
    mask = (normal((70, 70), seed=3) > 0).T
    for key in (shared, expanded):
        assert not key.is_contiguous()
        check(query, key, 0.5, True, mask, mask)


@pytest.mark.parametrize("batches", [((1,), (3,)), ((3,), (1,)), ((2, 3), (3,)), ((1, 3), (2, 1)), ((), (2, 2))])
def test_a_batch_may_be_broadcast(batches: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    query, key = (normal((*batch, 4, 70, 3), seed) for seed, batch in enumerate(batches))
    batch = torch.broadcast_shapes(*batches)
    mask = normal((*batch, 1, 70, 70), seed=2) > 0
    query_of_all, key_of_all = (x.expand(*batch, 4, 70, 3) for x in (query, key))
    expected = brute_max_logits(query_of_all, key_of_all, 0.5, mask)
    torch.testing.assert_close(max_logits(query, key, scale=0.5, mask=mask).double(), expected, rtol=1e-5, atol=1e-5)


def test_keeps_no_graph_and_changes_no_input() -> None:
    query, key = normal((1, 2, 5, 4)).requires_grad_(), normal((1, 2, 5, 4), seed=1).requires_grad_()
    before = query.detach().clone(), key.detach().clone()
    maxima = max_logits(query, key, scale=1.0, is_causal=True)
    assert not maxima.requires_grad and maxima.grad_fn is None
    assert torch.equal(query, before[0]) and torch.equal(key, before[1])


class Products(TorchDispatchMode):
    """Sizes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.bmm.out, torch.ops.aten.mm.default):
            self.sizes.append(result.numel())
        return result


def test_no_whole_logit_matrix_and_no_future_tiles() -> None:
    query = normal((1, 2, 512, 4))
    whole = 2 * 512 * 512
    with Products() as products:
        max_logits(query, query, scale=1.0)
    assert max(products.sizes) <= whole // 8 and sum(products.sizes) == whole
    with Products() as products:
        max_logits(query, query, scale=1.0, is_causal=True)
    assert sum(products.sizes) < 0.6 * whole


def test_heads_that_cannot_share_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="must be a multiple of the number of key heads; got 3, 2"):
        max_logits(normal((1, 3, 5, 4)), normal((1, 2, 5, 4)), scale=1.0)


@settings(max_examples=80)
@given(inputs(), st.data())
def test_windows_documents_and_masks_together(drawn: tuple[Tensor, Tensor, float, bool], data: Any) -> None:
    query, key, scale, is_causal = drawn
    options: dict[str, Any] = {"scale": scale, "is_causal": is_causal}
    options["window"] = data.draw(st.sampled_from([None, 1, 2, 63, 64, 65, 100, 1000]))
    if query.shape[-2] == key.shape[-2] and data.draw(st.booleans()):
        shape = data.draw(broadcast_shape(query.shape[:-3]))
        options["documents"] = (2 * normal((*shape, query.shape[-2]), seed=5)).round().int()
    if data.draw(st.booleans()):
        options["mask"] = normal((query.shape[-2], 1), seed=7) > -1
    expected = brute_max_logits(query, key, scale, visible_pairs(query, key, **options))
    torch.testing.assert_close(max_logits(query, key, **options).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_nan_that_only_the_future_would_see_is_hidden_by_a_window_documents_and_masks() -> None:
    query, key = normal((1, 1, 70, 4)), normal((1, 1, 70, 4), seed=1)
    key[..., 5, :] = torch.nan
    documents = torch.zeros(1, 70, dtype=torch.long)
    documents[:, 5] = -1
    assert not max_logits(query, key, scale=1.0, documents=documents).isnan().any()
    assert not max_logits(query[..., :3, :], key, scale=1.0, window=3).isnan().any()
    mask = (torch.arange(70) != 5) | (torch.arange(70) < 5)[:, None]  # visible only from before
    assert not max_logits(query, key, scale=1.0, is_causal=True, mask=mask).isnan().any()


def test_tiles_outside_the_window_are_skipped() -> None:
    query = normal((1, 2, 2048, 4))
    with Products() as products:
        max_logits(query, query, scale=1.0, is_causal=True, window=64)
    assert sum(products.sizes) <= 2 * 2048 * 3 * 64
    with Products() as products:
        max_logits(query, query, scale=1.0, window=64)
    assert sum(products.sizes) <= 2 * 2048 * 5 * 64


@pytest.mark.parametrize("window", [0, -3])
def test_an_empty_window_is_refused(window: int) -> None:
    with pytest.raises(ValueError, match=f"the window hides every key, got {window}; use at least 1, or None"):
        max_logits(normal((1, 1, 5, 4)), normal((1, 1, 5, 4)), scale=1.0, window=window)


def test_invalid_documents_are_refused() -> None:
    query, key = normal((2, 1, 5, 4)), normal((2, 1, 6, 4))
    with pytest.raises(
        ValueError, match=r"documents must be integer ids, one per token, negative for padding; got torch\.bool"
    ):
        max_logits(query, query, scale=1.0, documents=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="as many queries as keys, got 5 queries and 6 keys; use a mask instead"):
        max_logits(query, key, scale=1.0, documents=torch.ones(2, 5, dtype=torch.long))
    for shape in ((2, 6), (3, 5), (1, 2, 5)):
        with pytest.raises(ValueError, match=r"documents must match a batch of shape \(2,\) and 5 tokens, got shape"):
            max_logits(query, query, scale=1.0, documents=torch.ones(shape, dtype=torch.long))


@pytest.mark.parametrize("documents", [None, torch.arange(70) // 20])
@pytest.mark.parametrize("window", [None, 9])
def test_windows_and_documents_compile(window: int | None, documents: Tensor | None) -> None:
    query, key = normal((2, 4, 70, 8)), normal((2, 2, 70, 8), seed=1)
    torch.library.opcheck(torch.ops.muonclip.max_logits.default, (query, key, 0.5, True, window, documents, None))
    torch._dynamo.reset()  # every case recompiles, and Dynamo limits recompilations
    compiled = torch.compile(max_logits, fullgraph=True, backend="aot_eager")
    options: dict[str, Any] = {"scale": 0.5, "window": window, "documents": documents}
    assert torch.equal(compiled(query, key, **options), max_logits(query, key, **options))


@pytest.mark.parametrize("mask", [None, torch.ones(70, 70, dtype=torch.bool).tril(), torch.zeros(2, 1, 1, 70)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_is_an_operation_that_torch_can_compile(is_causal: bool, mask: Tensor | None) -> None:
    query, key = normal((2, 4, 70, 8)), normal((2, 2, 70, 8), seed=1)
    torch.library.opcheck(torch.ops.muonclip.max_logits.default, (query, key, 0.5, is_causal, None, None, mask))
    torch._dynamo.reset()  # every case recompiles, and Dynamo limits recompilations
    compiled = torch.compile(max_logits, fullgraph=True, backend="aot_eager")
    options = {"scale": 0.5, "is_causal": is_causal, "mask": mask}
    assert torch.equal(compiled(query, key, **options), max_logits(query, key, **options))


@pytest.mark.parametrize("shape", [(2, 3, 4, 7), (4, 5), (1, 1, 3, 6), (5,)])
def test_a_mask_for_other_lengths_is_refused(shape: tuple[int, ...]) -> None:
    query, key = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8)
    with pytest.raises(ValueError, match="the mask must broadcast to 4 queries and 6 keys, got shape"):
        max_logits(query, key, scale=1.0, mask=torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"is_causal": True, "window": 3}])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Lightning changes it while a model runs in bf16-true, 16-true or 64-true."""
    query = normal((2, 3, 70, 8)).to(dtype)
    expected = max_logits(query, query, scale=0.5, **options)
    torch.set_default_dtype(dtype)
    try:
        found = max_logits(query, query, scale=0.5, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype is torch.float32
    assert torch.equal(found, expected)
