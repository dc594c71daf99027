"""Both Triton kernels at small sizes against float64, for a memory checker or Triton's interpreter.

compute-sanitizer --tool memcheck python benchmarks/gpu_kernels.py
TRITON_INTERPRET=1 python benchmarks/gpu_kernels.py    # without a GPU
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from harness import DRY, attempt, device, exit_status, save
from torch import Tensor

from lightning_muonclip.kernels import max_logits_triton, symmetric_matmul_triton

#: Rows on both sides of the edge of a tile.
ROWS = (1, 17, 33) if DRY else (1, 17, 63, 64, 65, 127, 128, 129, 200)
DTYPES = (torch.float32,) if DRY else (torch.float32, torch.bfloat16)


def verdict(found: Tensor, expected: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """The largest error relative to the largest entry, and whether rounding explains it."""
    error = float((found.double() - expected).abs().max() / expected.abs().max())
    return {"error": error} | ({} if error < 8 * torch.finfo(dtype).eps else {"failed": "more than rounding"})


def product(n: int, dtype: torch.dtype) -> dict[str, Any]:
    """The symmetric product, with all of its terms, of strided operands."""
    a = torch.randn(2, n + 3, n, device=device(), dtype=dtype).mT / n**0.5
    c = torch.randn(2, n, n, device=device(), dtype=dtype)
    c = c + c.mT
    alphas = torch.tensor([0.5, 1.5], device=device())
    found = symmetric_matmul_triton.launch(a, a, c, 1.0, -0.5, 0.25, alphas, None, None)
    wide, identity = a.double(), torch.eye(n, device=device())
    expected = alphas.double()[:, None, None] * (wide @ wide.mT) - 0.5 * c.double() + 0.25 * identity
    return verdict(found, expected, dtype)


def largest(length: int, dtype: torch.dtype) -> dict[str, Any]:
    """The largest logits of grouped queries, causal, in a window and within documents, as a projection lays them out."""
    query, key = (torch.randn(2, length, heads, 24, device=device(), dtype=dtype).transpose(1, 2) for heads in (4, 2))
    documents = (torch.arange(length, device=device()) // 40).expand(2, length)
    maxima = torch.full((4,), -torch.inf, device=device())
    window = max(1, length // 2)
    max_logits_triton.launch(query, key, maxima, scale=0.2, is_causal=True, window=window, documents=documents)
    logits = 0.2 * query.double() @ key.double().repeat_interleave(2, 1).mT
    apart = torch.arange(length, device=device())[:, None] - torch.arange(length, device=device())
    seen = (apart >= 0) & (apart < window) & (documents[:, None, :, None] == documents[:, None, None])
    # Products are accumulated in float32, whatever the dtype.
    return verdict(maxima, logits.masked_fill(~seen, -torch.inf).amax((0, 2, 3)), torch.float32)


def main() -> int:
    """All sizes."""
    results: dict[str, Any] = {}
    for function, n, dtype in itertools.product((product, largest), ROWS, DTYPES):
        name = f"{function.__name__} {n} {dtype}"
        results[name] = attempt(functools.partial(function, n, dtype))
        print(f"{name:32} {results[name]}", flush=True)
    save("gpu_kernels", results=results)
    return exit_status(results)


if __name__ == "__main__":
    raise SystemExit(main())
