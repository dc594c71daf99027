"""The Triton kernel of max_logits against the whole logit matrix in float64 and against its torch twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import INF, brute_max_logits, causal, normal, visible_pairs
from torch import Tensor

from lightning_muonclip.kernels.max_logits import max_logits

SMALL = (16, 16, 16, 4, 1)  # queries, keys and channels of a tile: many tiles of short sequences
WIDE = (32, 32, 64, 4, 1)


def test_in_a_separate_process(run_alone: Callable[[str], None]) -> None:
    run_alone(__file__)


def run(
    query: Tensor, key: Tensor, tile: tuple[int, ...] | None = SMALL, into: Tensor | None = None, **options: Any
) -> Tensor:
    """The maxima of the kernel, for tensors on any device."""
    from lightning_muonclip.kernels.max_logits_triton import Tile, launch

    maxima = torch.full((query.shape[1],), -INF, device=query.device) if into is None else into
    launch(query, key, maxima, tile=None if tile is None else Tile(*tile), **options)
    return maxima


@st.composite
def cases(draw: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Queries, keys and options of any kind, together."""
    batch, key_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    dim, length = draw(st.sampled_from([1, 3, 16, 40])), draw(st.sampled_from([1, 15, 16, 17, 33, 40]))
    key_length = draw(st.sampled_from([length, length, 1, 20, 37]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    seed = draw(st.integers(0, 2**20))
    # As a projection gives them: heads within a token, and the keys in reverse within a larger tensor.
    query = normal((batch, length, key_heads * group, dim), seed).transpose(1, 2).to(dtype)
    key = normal((batch, key_heads, dim, 2 * key_length), seed + 1)[..., ::2].mT.to(dtype)
    options: dict[str, Any] = {
        "scale": draw(st.sampled_from([dim**-0.5, 1.7, -0.4, 0.0])),
        "is_causal": draw(st.booleans()),
    }
    options["window"] = draw(st.sampled_from([None, 1, 7, 16, 30]))
    if length == key_length and draw(st.booleans()):
        ids = torch.randint(-1, 3, (batch, length), generator=torch.Generator().manual_seed(seed))
        options["documents"] = ids.sort(1).values if draw(st.booleans()) else ids
    kind = draw(st.sampled_from(["none", "boolean", "additive"]))
    if kind != "none":
        shape = [size if draw(st.booleans()) else 1 for size in (batch, key_heads * group, length, key_length)]
        mask = normal(tuple(shape), seed + 2) > draw(st.sampled_from([-1.0, 0.5, 9.0]))
        if kind == "additive":
            mask = (
                (100 * normal(tuple(shape), seed + 3)).masked_fill(~mask, draw(st.sampled_from([-1e4, -INF]))).to(dtype)
            )
        options["mask"] = mask.expand(batch, key_heads * group, length, key_length)
    return query, key, options


@settings(max_examples=30)
@given(cases(), st.sampled_from([SMALL, WIDE]))
def test_any_shape_dtype_stride_and_combination_of_masks(
    device: torch.device, case: tuple[Tensor, Tensor, dict[str, Any]], tile: tuple[int, ...]
) -> None:
    query, key, options = case
    expected = brute_max_logits(query, key, options["scale"], visible_pairs(query, key, **options))
    on_device = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    found = run(query.to(device), key.to(device), tile, **on_device).cpu()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, max_logits(query, key, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 80, 192])
def test_the_error_is_that_of_the_twin(device: torch.device, dtype: torch.dtype, dim: int) -> None:
    query, key = normal((1, 2, 130, dim)).to(dtype), normal((1, 1, 130, dim), 1).to(dtype)
    exact = brute_max_logits(query, key, 1.0, causal(130))
    twin = (max_logits(query, key, scale=1.0, is_causal=True) - exact).abs()
    found = run(query.to(device), key.to(device), None, scale=1.0, is_causal=True).cpu()
    one_rounding = exact.abs() * torch.finfo(torch.float32).eps
    assert ((found - exact).abs() <= 2 * torch.maximum(twin, one_rounding)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixed", [False, True])
def test_integers_are_exact(device: torch.device, dtype: torch.dtype, mixed: bool) -> None:
    query, key = ((4 * normal((1, 2, 40, 192), seed)).round() for seed in range(2))
    found = run(query.to(device, dtype), key.to(device, torch.float32 if mixed else dtype), WIDE, scale=-2.0)
    assert torch.equal(found.cpu().double(), brute_max_logits(query, key, -2.0))


def test_tiles_of_other_documents_are_skipped(device: torch.device) -> None:
    query = torch.ones(1, 1, 64, 1, device=device)
    documents = torch.arange(64, device=device)[None] // 16  # a tile each
    key = query * documents[0, :, None]
    query[0, 0, 16:] = -INF  # only the first document is affected, since it is multiplied with no other
    assert run(query, key, scale=1.0, documents=documents).tolist() == [0.0]


def test_negative_documents_see_nothing(device: torch.device) -> None:
    query = normal((2, 2, 40, 4)).to(device)
    documents = torch.full((2, 40), -1, device=device)
    assert run(query, query, scale=1.0, documents=documents).tolist() == [-INF, -INF]


@pytest.mark.parametrize("hidden", [False, -INF, -1e4])
def test_a_head_that_sees_nothing_is_minus_infinity(device: torch.device, hidden: Any) -> None:
    query = normal((2, 3, 20, 3)).to(device)
    mask = torch.full((2, 3, 20, 20), True if hidden is False else 0.0, device=device)
    mask[:, 1] = hidden
    for scale in (1.0, 0.0, -1.0):
        maxima = run(query, query, scale=scale, mask=mask)
        assert maxima[1] == -INF and maxima[[0, 2]].isfinite().all()


@pytest.mark.parametrize(("sign", "scale"), [(1.0, 0.5), (-1.0, 0.5), (-1.0, -0.5)])
def test_a_visible_nan_propagates_and_a_hidden_one_does_not(device: torch.device, sign: float, scale: float) -> None:
    query, key = normal((2, 3, 50, 4)).to(device), normal((2, 3, 50, 4), 1).to(device)
    key[1, 1, 49, 0] = torch.tensor(torch.nan, device=device).copysign(torch.tensor(sign, device=device))
    assert run(query, key, WIDE, scale=scale, is_causal=True).isnan().tolist() == [False, True, False]
    assert not run(query[:, :, :49], key, WIDE, scale=scale, is_causal=True).isnan().any()
    assert not run(query[:, :, :30], key, WIDE, scale=scale, window=20).isnan().any()
    documents = torch.zeros(2, 50, dtype=torch.int32, device=device)
    documents[1, 49] = -1
    assert not run(query, key, WIDE, scale=scale, documents=documents).isnan().any()
    mask = torch.ones(50, dtype=torch.bool, device=device)
    mask[49] = False
    assert not run(query, key, WIDE, scale=scale, mask=mask.expand(2, 3, 50, 50)).isnan().any()


def test_infinities(device: torch.device) -> None:
    query = torch.full((1, 1, 2, 1), 3e38, device=device)
    assert run(query, query, scale=1.0).tolist() == [INF]
    assert run(query, -query, scale=1.0).tolist() == [-INF]
    key = torch.tensor([INF, 0.0], device=device).reshape(1, 1, 2, 1)
    # The first query's product with the second key, inf times 0, is hidden.
    assert run(key, -key, scale=1.0, window=1).tolist() == [0.0]


@pytest.mark.parametrize("batches", [((), ()), ((2,), (1,)), ((2, 1), (2,))])
@pytest.mark.parametrize("mask_batch", [None, (), (1, 1), (2, 1)])
def test_max_logits_passes_any_batch_to_the_kernel(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, batches: Any, mask_batch: tuple[int, ...] | None
) -> None:
    from lightning_muonclip.kernels import max_logits as room
    from lightning_muonclip.kernels.max_logits_triton import launch

    query, key = (normal((*batch, heads, 20, 3), heads) for batch, heads in zip(batches, (4, 2)))
    batch = torch.broadcast_shapes(*batches)
    options: dict[str, Any] = {"scale": 0.5, "is_causal": True, "window": 15, "documents": torch.arange(20) // 7}
    if mask_batch is not None:
        options["mask"] = normal((*mask_batch[-len(batch) :], 1, 20, 20) if mask_batch and batch else (20, 1), 5) > -1
    expected = max_logits(query, key, **options)
    monkeypatch.setattr(room, "_launcher", lambda device: launch)
    on_device = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    found = max_logits(query.to(device), key.to(device), **on_device).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_raises_the_maxima_so_far(device: torch.device) -> None:
    before = torch.tensor([-INF, -30.0, -0.0, 0.0, 30.0, INF, torch.nan], device=device)
    own = torch.tensor([-INF, -20.0, -0.0, 0.0, 20.0, 40.0, INF, torch.nan], device=device)
    before, own = (x.flatten() for x in torch.meshgrid(before, own, indexing="ij"))  # a head for every pair
    expected = before.maximum(own)
    found = run(torch.ones(1, len(own), 1, 1, device=device), own.view(1, -1, 1, 1), into=before, scale=1.0)
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128, 192])
def test_a_gpu_runs_the_kernel_without_synchronization_and_in_a_graph(dtype: torch.dtype, dim: int) -> None:
    query, key = (normal((2, 1000, 4, dim), seed).to("cuda", dtype).transpose(1, 2) for seed in range(2))
    documents = torch.arange(1000, device="cuda").expand(2, -1) // 300
    options: dict[str, Any] = {"scale": 0.1, "is_causal": True, "window": 200, "documents": documents}
    max_logits(query, key, **options)  # compiled
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = max_logits(query, key, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = brute_max_logits(query, key, 0.1, visible_pairs(query, key, **options))
    torch.testing.assert_close(eager.double(), expected, rtol=1e-5, atol=1e-5, check_device=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = max_logits(query, key, **options)
    query.mul_(2)
    graph.replay()
    torch.testing.assert_close(captured, 2 * eager)
