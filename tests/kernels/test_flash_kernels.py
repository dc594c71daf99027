"""What kernels of FlashAttention tell, by stand-ins of their signatures on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracles import brute_max_logits, normal
from torch import Tensor

from lightning_muonclip.kernels.bounded_max_logits import top_rows
from lightning_muonclip.kernels.flash import FlashCalls, flash_call
from lightning_muonclip.kernels.measure import measure_max_logits

_OPTIONS = (
    "float softmax_scale, bool causal, int window_size_left, int window_size_right, float softcap, Tensor? alibi_slopes"
)
SIGNATURES = {
    "_flash_attn_forward": f"(Tensor q, Tensor k, Tensor v, float dropout_p, {_OPTIONS}, bool return_softmax)",
    "_flash_attn_varlen_forward": (
        "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,"
        f" float dropout_p, {_OPTIONS}, bool return_softmax)"
    ),
}


def logits_of(
    q: Tensor, k: Tensor, scale: float, causal: bool, left: int, right: int, ids: Tensor | None = None
) -> Tensor:
    """Of shape (..., heads, L, S); FlashAttention's layout is (..., length, heads, d)."""
    q, k = q.transpose(-3, -2).double(), k.transpose(-3, -2).double()
    logits = scale * q @ k.repeat_interleave(q.shape[-3] // k.shape[-3], -3).mT
    ahead = torch.arange(k.shape[-2]) - torch.arange(q.shape[-2])[:, None]
    hidden = (ahead > 0) & causal | (ahead > right) & (right >= 0) | (-ahead > left) & (left >= 0)
    if ids is not None:
        hidden = hidden | (ids != ids[:, None])
    return logits.masked_fill(hidden, -torch.inf)


def ids_of(starts: Tensor) -> Tensor:
    """The sequence of every token."""
    return torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())


def _plain(
    q: Tensor, k: Tensor, v: Tensor, p: float, scale: float, causal: bool, left: int, right: int, *_: Any
) -> Any:
    logits = logits_of(q, k, scale, causal, left, right)
    return torch.zeros_like(q), logits.logsumexp(-1).float(), q.new_empty(0), q.new_empty(0)


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    of_keys: Tensor,
    mq: int,
    mk: int,
    p: float,
    scale: float,
    causal: bool,
    left: int,
    right: int,
    *_: Any,
) -> Any:
    logits = logits_of(q, k, scale, causal, left, right, ids_of(starts))
    return torch.zeros_like(q), logits.logsumexp(-1).float(), q.new_empty(0), q.new_empty(0)


@pytest.fixture(scope="module", autouse=True)
def stand_ins() -> Iterator[None]:
    """The operators that the package flash-attn registers."""
    library = torch.library.Library("flash_attn", "DEF")
    for (name, signature), function in zip(SIGNATURES.items(), (_plain, _packed)):
        library.define(f"{name}{signature} -> (Tensor, Tensor, Tensor, Tensor)")
        library.impl(name, function, "CPU")
    yield
    library._destroy()


def attend(
    *args: Any,
    scale: float = 0.3,
    causal: bool = True,
    left: int = -1,
    right: int = -1,
    cap: float = 0.0,
    alibi: Any = None,
) -> FlashCalls:
    function = (
        torch.ops.flash_attn._flash_attn_forward if len(args) == 3 else torch.ops.flash_attn._flash_attn_varlen_forward
    )
    with FlashCalls() as seen:
        function(*args, 0.0, scale, causal, left, right, cap, alibi, False)
    return seen


@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"left": 3, "right": 0}, {"causal": False, "left": 4, "right": 4}]
)
def test_a_call_bounds_its_logits(options: dict[str, Any]) -> None:
    q, k = 3 * normal((2, 12, 4, 8)), normal((2, 12, 2, 8), 1)
    (call,) = attend(q, k, k, **options).calls
    assert call is not None
    causal, left, right = (
        options.get(name, default) for name, default in (("causal", True), ("left", -1), ("right", -1))
    )
    visible = logits_of(q, k, 0.3, causal, left, right).isfinite()
    expected = brute_max_logits(q.transpose(1, 2), k.transpose(1, 2), 0.3, visible)
    torch.testing.assert_close(measure_max_logits(call, "exact").double(), expected, rtol=1e-5, atol=1e-5)


def test_packed_sequences_see_only_themselves() -> None:
    starts = torch.tensor([0, 5, 6, 17], dtype=torch.int32)
    q, k = 3 * normal((17, 4, 8)), normal((17, 2, 8), 1)
    (call,) = attend(q, k, k, starts, starts, 11, 11).calls
    assert call is not None
    visible = logits_of(q, k, 0.3, True, -1, -1, ids_of(starts)).isfinite()
    expected = brute_max_logits(q.transpose(0, 1), k.transpose(0, 1), 0.3, visible)
    torch.testing.assert_close(measure_max_logits(call, "exact").double(), expected, rtol=1e-5, atol=1e-5)


def test_tokens_behind_the_last_sequence_do_not_count() -> None:
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    q, k = 3 * normal((17, 4, 8)), normal((17, 2, 8), 1)
    log_sum_exp = logits_of(q[:12], k[:12], 0.3, True, -1, -1, ids_of(starts)).logsumexp(-1)
    left_over = torch.full((4, 5), 1e30, dtype=torch.float64)  # of memory that was not written
    given = {"q": q, "k": k, "cu_seqlens_q": starts, "cu_seqlens_k": starts, "causal": True, "softmax_scale": 0.3}
    call = flash_call(given, torch.cat([log_sum_exp, left_over], -1).float())
    assert call is not None
    visible = logits_of(q[:12], k[:12], 0.3, True, -1, -1, ids_of(starts)).isfinite()
    expected = brute_max_logits(q[:12].transpose(0, 1), k[:12].transpose(0, 1), 0.3, visible)
    torch.testing.assert_close(measure_max_logits(call, "exact").double(), expected, rtol=1e-5, atol=1e-5)
    bounds = top_rows(*call)[1]
    assert (bounds.double() <= expected + 5).all()


def test_what_bounds_nothing_is_not_told() -> None:
    q, k = normal((2, 12, 4, 8)), normal((2, 12, 2, 8), 1)
    for options in ({"cap": 30.0}, {"alibi": torch.ones(4)}, {"causal": False, "left": 3, "right": 1}):
        assert attend(q, k, k, **options).calls == [None]
    assert attend(q, k[:, :7], k[:, :7]).calls == [None]  # another alignment of causality
    starts = torch.tensor([0, 4, 12], dtype=torch.int32)
    assert attend(q[0], k[0], k[0], starts, torch.tensor([0, 6, 12], dtype=torch.int32), 8, 6).calls == [None]
