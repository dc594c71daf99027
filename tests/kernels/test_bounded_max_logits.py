"""Maxima from bounds, against the whole logit matrix in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import INF, brute_max_logits, normal, visible_pairs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_muonclip.kernels.bounded_max_logits import ROWS, bounded_max_logits, top_rows
from lightning_muonclip.kernels.max_logits import max_logits


class Drawn(NamedTuple):
    """Arguments of bounded_max_logits without bounds, and the visible pairs."""

    query: Tensor
    key: Tensor
    scale: float
    options: dict[str, Any]
    visible: Tensor

    def logits(self) -> Tensor:
        """All of them, float64."""
        key = self.key.repeat_interleave(self.query.shape[-3] // self.key.shape[-3], -3)
        logits = self.scale * (self.query.double() @ key.double().mT)
        return logits.masked_fill(~self.visible.expand(logits.shape), -INF)

    def bounds(self) -> Tensor:
        """The log-sum-exp."""
        return self.logits().logsumexp(-1).float()

    def rounding(self) -> float:
        """Twice the error of a dot product in float32 (Higham 2002, section 3.1), and that of a logarithm."""
        longest = self.query.double().norm(dim=-1).amax() * self.key.double().norm(dim=-1).amax()
        return float(abs(self.scale) * longest) * (2 * self.query.shape[-1] + 8) * 2**-24

    def arguments(self, bounds: Tensor) -> list[Any]:
        """Those of the function for other devices."""
        options = [self.options.get(name) for name in ("window", "documents", "mask")]
        return [self.query, self.key, bounds, self.scale, self.options.get("is_causal", False), *options]


@st.composite
def attention(draw: Any) -> Drawn:
    """Logits from nearly equal, where no few rows prove anything, to a single large one."""
    batch = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    key_heads, group, dim = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8]))
    length = draw(st.sampled_from([1, 2, ROWS, ROWS + 1, 40]))
    keys = length if draw(st.booleans()) else draw(st.sampled_from([1, 7, 70]))
    seed, size = draw(st.integers(0, 2**20)), draw(st.sampled_from([0.0, 0.01, 1.0, 4.0, 30.0]))
    query = size * normal((*batch, key_heads * group, length, dim), seed)
    key = normal((*batch, key_heads, keys, dim), seed + 1)
    if draw(st.booleans()):  # one query of one head stands out, wherever it is
        query[..., draw(st.integers(0, key_heads * group - 1)), draw(st.integers(0, length - 1)), :] *= 20
    options: dict[str, Any] = {"is_causal": draw(st.booleans())}
    if draw(st.booleans()):
        options["window"] = draw(st.integers(1, 50))
    if batch and length == keys and draw(st.booleans()):
        options["documents"] = torch.randint(-1, 3, (batch[-1], length), generator=torch.Generator().manual_seed(seed))
    if draw(st.booleans()):
        shape = (*batch, key_heads * group, length, keys)
        shape = tuple(n if draw(st.booleans()) else 1 for n in shape)[draw(st.integers(0, len(shape) - 2)) :]
        mask = normal(shape, seed + 2) > draw(st.sampled_from([-1.0, 0.5, 2.0]))
        options["mask"] = mask if draw(st.booleans()) else torch.where(mask, 0.0, draw(st.sampled_from([-INF, -1e4])))
    scale = draw(st.sampled_from([dim**-0.5, 1.7, -0.4]))
    return Drawn(query, key, scale, options, visible_pairs(query, key, **options))


@settings(max_examples=150)
@given(attention(), st.booleans())
def test_a_cpu_finds_the_maximum(drawn: Drawn, is_loose: bool) -> None:
    bounds = drawn.bounds()
    if is_loose:
        bounds = bounds + normal(tuple(bounds.shape), 7).abs()
    found = bounded_max_logits(drawn.query, drawn.key, bounds, scale=drawn.scale, **drawn.options)
    expected = brute_max_logits(drawn.query, drawn.key, drawn.scale, drawn.visible)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=drawn.rounding())


@settings(max_examples=150)
@given(attention())
def test_other_devices_prove_a_maximum_or_bound_it(drawn: Drawn) -> None:
    found, upper = top_rows(*drawn.arguments(drawn.bounds())).double()
    expected, rounding = brute_max_logits(drawn.query, drawn.key, drawn.scale, drawn.visible), drawn.rounding()
    assert (found <= expected + rounding).all()
    assert (upper >= expected - rounding).all()
    is_proven = found == upper
    torch.testing.assert_close(found[is_proven], expected[is_proven], rtol=0, atol=rounding)
    if drawn.query.shape[-2] <= ROWS:
        assert is_proven.all()


def test_rows_that_are_nearly_tied_are_not_proven() -> None:
    query, key = normal((1, 2, 64, 4)), normal((1, 2, 64, 4), 1)
    query[:, 0] = 1e-3 * query[:, 0]  # flat: every bound is close to ln(64), every logit to 0
    query[:, 1, 5] *= 100
    drawn = Drawn(query, key, 0.5, {}, torch.ones(64, 64, dtype=torch.bool))
    found, upper = top_rows(*drawn.arguments(drawn.bounds()))
    assert (found < upper).tolist() == [True, False]
    assert found[0] < 0.01 and upper[0] > 4.1


class _Products(TorchDispatchMode):
    """Counts the logits that are computed."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self.count += out.numel()
        return out


def test_peaked_heads_need_few_rows_and_flat_ones_one_pass() -> None:
    query, key = normal((4, 2, 256, 16)), normal((4, 2, 256, 16), 1)
    counts = []
    for size in (8.0, 0.1):
        drawn = Drawn(size * query, key, 0.25, {"is_causal": True}, visible_pairs(query, key, is_causal=True))
        bounds = drawn.bounds()
        with _Products() as products:
            found = bounded_max_logits(drawn.query, key, bounds, scale=0.25, is_causal=True)
        counts.append(products.count)
        torch.testing.assert_close(found, max_logits(drawn.query, key, scale=0.25, is_causal=True))
    with _Products() as whole:
        max_logits(query, key, scale=0.25, is_causal=True)
    assert counts[0] < 0.02 * whole.count
    assert counts[1] < 1.02 * whole.count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    query, key = (3 * normal((2, 4, 40, 16), seed).to(dtype) for seed in (0, 1))
    drawn = Drawn(query, key, 0.25, {"is_causal": True}, visible_pairs(query, key, is_causal=True))
    found = bounded_max_logits(query, key, drawn.bounds(), scale=0.25, is_causal=True)
    expected = brute_max_logits(query, key, 0.25, drawn.visible)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=drawn.rounding())


@pytest.mark.parametrize("fill", [INF, -INF, torch.nan])
def test_non_finite_logits_propagate(fill: float) -> None:
    query, key = normal((2, 3, 33, 8)), normal((2, 3, 33, 8), 1)
    query[1, 2, 4, 3] = fill
    logits = query @ key.mT
    for found in (
        bounded_max_logits(query, key, logits.logsumexp(-1), scale=1.0),
        *top_rows(query, key, logits.logsumexp(-1), 1.0, False, None, None, None),
    ):
        assert found.isfinite().tolist() == [True, True, False]


def test_nothing_to_see() -> None:
    query, key = normal((2, 3, 5, 8)), normal((2, 3, 5, 8), 1)
    hidden = {"mask": torch.zeros(5, 5, dtype=torch.bool)}
    for q, k, options in (
        (query[:, :, :0], key, {}),
        (query, key[:, :, :0], {}),
        (query[:0], key[:0], {}),
        (query, key, hidden),
    ):
        bounds = torch.full(q.shape[:-1], -INF)
        assert bounded_max_logits(q, k, bounds, scale=1.0, **options).tolist() == [-INF] * 3
        assert top_rows(q, k, bounds, 1.0, False, None, None, options.get("mask")).tolist() == [[-INF] * 3] * 2


def test_wrong_arguments() -> None:
    query, key = normal((2, 3, 5, 8)), normal((2, 3, 5, 8), 1)
    bounds = torch.zeros(2, 3, 5)
    with pytest.raises(ValueError, match="multiple of the number of key heads; got 3, 2"):
        bounded_max_logits(query, key[:, :2], bounds, scale=1.0)
    with pytest.raises(ValueError, match="hides every key, got 0"):
        bounded_max_logits(query, key, bounds, scale=1.0, window=0)
    with pytest.raises(ValueError, match=r"must broadcast to 5 queries and 5 keys, got shape \(4, 5\)"):
        bounded_max_logits(query, key, bounds, scale=1.0, mask=torch.ones(4, 5))


def test_one_graph() -> None:
    query, key = 4 * normal((2, 4, 40, 8)), normal((2, 2, 40, 8), 1)
    drawn = Drawn(query, key, 0.3, {"is_causal": True}, visible_pairs(query, key, is_causal=True))
    bounds = drawn.bounds()
    compiled = torch.compile(bounded_max_logits, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(query, key, bounds, scale=0.3, is_causal=True),
        bounded_max_logits(query, key, bounds, scale=0.3, is_causal=True),
    )
    elsewhere = torch.compile(top_rows, fullgraph=True, backend="aot_eager")
    assert torch.equal(elsewhere(*drawn.arguments(bounds)), top_rows(*drawn.arguments(bounds)))
