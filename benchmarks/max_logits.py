"""Cost of per-head maximum logits relative to the attention itself: ``python benchmarks/max_logits.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from demo import Demo
from harness import (
    DRY,
    attempt,
    compare,
    compiler,
    device,
    exit_status,
    report,
    save,
    side_by_side,
    size_key,
    those_that_work,
)
from torch import Tensor

from lightning_muonclip.attention.core import attention
from lightning_muonclip.kernels import measure
from lightning_muonclip.kernels.bounded_max_logits import bounded_max_logits, top_rows
from lightning_muonclip.kernels.log_sum_exp import SDPA, attention_with_log_sum_exp
from lightning_muonclip.kernels.max_logits import max_logits

PEER = "SDPA forward + backward"
HEADS, DIM = 8, 64

#: Lengths on a GPU, the most telling first; with the tokens, heads, channels and dtype of all.
LENGTHS = {"cuda": (4096, 1024, 16384, 2048, 8192), "dry": (64,)}
SHAPES = {"cuda": (2**15, 16, 128, torch.bfloat16), "dry": (2**7, 2, 16, torch.float32)}

Qk = tuple[Tensor, Tensor]


def trained_queries_and_keys(steps: int = 400) -> Callable[[int, int], list[Qk]]:
    """Trains the demo; returns what makes the queries and keys of two pairs of its layers for a batch and a length.

    Two layers of four heads stand side by side, and zeros fill their 32 channels to 64, which leaves the logits as they are.
    """
    demo = Demo()
    for _ in range(steps):
        demo.step()

    def made(batch: int, length: int) -> list[Qk]:
        seen: list[Qk] = []

        def spy(query: Tensor, key: Tensor, *_: Any, **__: Any) -> Tensor:
            seen.append((query.detach(), key.detach()))
            return query.new_zeros(query.shape[1])

        tokens = demo.data.text.validation[: batch * length].long().view(batch, length)
        measure.bounded_max_logits, usual = spy, measure.bounded_max_logits
        demo.model(tokens)
        measure.bounded_max_logits = usual
        layers = [tuple(F.pad(x, (0, DIM - x.shape[-1])) for x in own) for own in seen]
        return [tuple(torch.cat(both, 1) for both in zip(*layers[i : i + 2])) for i in (0, 2)]  # type: ignore[misc]

    return made


def laid_out(x: Tensor) -> Tensor:
    """In memory as a projection makes it: heads next to each other."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def one_kind(name: str, query: Tensor, key: Tensor, scale: float) -> dict[str, Any]:
    """All ways to the maximum, for causal attention in float32."""
    query, key = laid_out(query), laid_out(key)
    value, slope = (laid_out(torch.randn_like(query)) for _ in range(2))
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    log_sum_exp = attention_with_log_sum_exp(SDPA, query, key, value, is_causal=True, scale=scale)[1]
    assert log_sum_exp is not None
    options: dict[str, Any] = {"scale": scale, "is_causal": True}
    future = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)

    def attend() -> None:
        torch.autograd.grad(SDPA(*leaves, **options), leaves, slope)

    def watched() -> None:
        output, bounds = attention_with_log_sum_exp(SDPA, *leaves, **options)
        bounded_max_logits(leaves[0], leaves[1], bounds, **options)  # type: ignore[arg-type]
        torch.autograd.grad(output, leaves, slope)

    functions: dict[str, Callable[[], Any]] = {
        PEER: attend,
        "watched": watched,
        "from the log-sum-exp": lambda: bounded_max_logits(query, key, log_sum_exp, **options),
        "8 rows, as on a GPU": lambda: top_rows(query, key, log_sum_exp, scale, True, None, None, None),
        "the whole pass": lambda: max_logits(query, key, **options),
        "whole matrix, causal": lambda: (query @ key.mT).masked_fill_(future, -torch.inf).amax((0, 2, 3)) * scale,
        "whole matrix, as GAD-cell": lambda: (query @ key.mT).amax((0, 2, 3)) * scale,
        "norms, as ms-swift": lambda: (query.norm(dim=-1).amax() * key.norm(dim=-1).amax() * scale).item(),
    }
    with torch.no_grad():
        exact, found = max_logits(query, key, **options), bounded_max_logits(query, key, log_sum_exp, **options)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    print(f"{name}: largest logit {float(exact.max()):.1f}")
    return compare(side_by_side(functions, rounds=15), PEER)


def on_a_cpu() -> None:
    """Logits as trained, as of 2.5 times random queries, and nearly equal ones, which no bound tells apart."""
    made = trained_queries_and_keys()
    cases = {}
    for length, batch in ((256, 8), (512, 8), (2048, 2)):
        kinds = {f"trained {i}": (*own, 32**-0.5) for i, own in enumerate(made(batch, length))}
        query, key = (torch.randn(batch, HEADS, length, DIM) for _ in range(2))
        kinds |= {"random times 2.5": (2.5 * query, key, DIM**-0.5), "random": (query, key, DIM**-0.5)}
        for kind, own in kinds.items():
            cases[f"{length}, {kind}"] = one_kind(f"{length}, {kind}", *own)
    save("max_logits", peer=PEER, results=cases)


def whole_steps(steps: int = 400, after: int = 100) -> None:
    """Steps of the demo watched and unwatched, in turn; of each pair the ratio, and the median of the ratios."""
    runs = {name: Demo(logits) for name, logits in (("unwatched", "off"), ("watched", "exact"))}
    seconds = side_by_side({name: run.step for name, run in runs.items()}, steps - after, after, patience=1e9)
    report("watched_steps", seconds, "unwatched", steps=steps, after=after)


def on_a_gpu(length: int, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> int:
    """The pass for causal attention, and for masks that hide more, against SDPA's causal forward and backward."""
    batch = tokens // length
    shape = batch, heads, length, dim
    query, key, value, slope = (torch.randn(shape, dtype=dtype, device=device()) for _ in range(4))
    query *= 2.5  # so that a few keys stand out of each query, as in a trained model
    leaves = [x.requires_grad_() for x in (query, key, value)]
    documents = (torch.arange(length, device=device()) // (length // 8)).expand(batch, length)
    scale = dim**-0.5

    def attend(function: Callable[..., Tensor]) -> Callable[[], None]:
        return lambda: torch.autograd.grad(function(*leaves), leaves, slope) and None

    def largest(**mask: Any) -> Callable[[], Tensor]:
        return lambda: max_logits(query, key, scale=scale, is_causal=True, **mask)

    functions: dict[str, Callable[[], Any]] = {
        PEER: attend(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
        "max_logits, causal": largest(),
        "max_logits, window of 1/8": largest(window=length // 8),
        "max_logits, 8 documents": largest(documents=documents),
    }
    if DRY:
        print("skipped without CUDA: the backward of FlexAttention, and SDPA's kernels other than flash attention")
    else:
        functions |= flex(attend, dim)
    fused = torch.compile(bounded_max_logits, dynamic=False, backend=compiler())
    exact = max_logits(query, key, scale=scale, is_causal=True).detach()
    certified = {}
    for backend in BACKENDS[:1] if DRY else BACKENDS:
        with torch.nn.attention.sdpa_kernel(backend):
            called = attempt(lambda: attention_with_log_sum_exp(SDPA, *leaves, is_causal=True))
        if exit_status(called) or called[1] is None:  # not every kernel takes every shape, and not every one tells
            continue
        bounds = called[1]
        certified[backend.name] = certificates(query, key, bounds, exact, scale)
        for kind, function in (("", bounded_max_logits), (", compiled", fused)):
            functions[f"lse of {backend.name}{kind}"] = lambda f=function, bounds=bounds: f(  # type: ignore[misc]
                query, key, bounds, scale=scale, is_causal=True
            )
    setting = {"batch": batch, "heads": heads, "length": length, "dim": dim, "dtype": str(dtype)}
    able, failures = those_that_work(functions)
    report(f"max_logits_{length}", side_by_side(able), PEER, **setting, certified=certified, failures=failures)
    return exit_status(failures)


BACKENDS = (
    torch.nn.attention.SDPBackend.FLASH_ATTENTION,
    torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION,
    torch.nn.attention.SDPBackend.CUDNN_ATTENTION,
)


def certificates(query: Tensor, key: Tensor, bounds: Tensor, exact: Tensor, scale: float) -> dict[str, float]:
    """By the number of rows: the share of heads whose maximum they prove, and their largest relative error."""
    shares = {}
    for count in (1, 4, 8):
        found, upper = top_rows(query, key, bounds, scale, True, None, None, None, count=count)
        shares[f"{count} rows prove"] = float((found >= upper).float().mean())
        shares[f"{count} rows err by"] = float(((found - exact) / exact).abs().max())
    return shares


def flex(attend: Callable[..., Callable[[], None]], dim: int) -> dict[str, Callable[[], Any]]:
    """FlexAttention, which returns the maximum logits unless a score_mod changes them first."""

    def through(track: str | None, softcap: float | None = None) -> Callable[..., Tensor]:
        options: dict[str, Any] = {"scale": dim**-0.5, "backend": "flex", "track": track, "softcap": softcap}
        return lambda q, k, v: attention(q, k, v, **options)[0]

    return {
        "flex": attend(through(None)),
        "flex, tracked": attend(through("exact")),
        "flex, soft-cap": attend(through(None, 50.0)),
        "flex, soft-cap, tracked": attend(through("exact", 50.0)),
    }


if __name__ == "__main__":
    if size_key() in LENGTHS:
        statuses = [on_a_gpu(length, *SHAPES[size_key()]) for length in LENGTHS[size_key()]]
        raise SystemExit(max(statuses))
    else:
        on_a_cpu()
        whole_steps()
