"""What products cost on the CPU at hand, as far as the form of an algorithm depends on it.

Measured on one thread per kind of CPU (``benchmarks/orthogonalize.py``) and written down here, so that nothing is timed at
run time and equal CPUs compute equal results.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class Costs(NamedTuple):
    """The bounds between the faster of two ways.

    Attributes:
        bfloat16_from: Smaller side of a matrix from which bfloat16 is faster than float32; ``None`` is never. A product in
            bfloat16 takes 17 microseconds to start, a whole one of 64 x 64 in float32 half of that. (Up to 128, a single
            matrix is still faster in float32, but four in a stack are 1.4 times as fast in bfloat16 from 96 on.)
        panels_from: Rows from which half of a symmetric product, computed by panels, is faster than all of it, by dtype.
            Small products cost more to start than they save; the faster a dtype multiplies, the larger they must be.
        stack_bytes: Size of a stack up to which one batched product is faster than one product after the other. A larger
            one leaves the cache between two products.
    """

    bfloat16_from: int | None
    panels_from: dict[torch.dtype, int]
    stack_bytes: int


_PANELS = {torch.float32: 512, torch.float64: 512, torch.float16: 512, torch.bfloat16: 2048}

#: By kind of CPU: how it multiplies bfloat16 in hardware, if it does.
COSTS = {
    "none": Costs(None, _PANELS, 2**20),
    "AVX512-BF16": Costs(96, _PANELS | {torch.bfloat16: 512}, 2**20),
    "AMX": Costs(96, _PANELS, 2**20),
    "ARM": Costs(96, _PANELS, 2**20),  # not measured
}

_FLAGS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "ARM"}


def cpu_costs() -> Costs:
    """The costs on this CPU."""
    return COSTS[bfloat16_hardware()]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def bfloat16_hardware() -> str:
    """What this CPU multiplies bfloat16 with, a key of :data:`COSTS`. Without, it takes 10 to 100 times float32's time."""
    return _bfloat16_hardware()


@cache
def _bfloat16_hardware() -> str:
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return "none"  # ATEN_CPU_CAPABILITY may limit torch
    # torch's own probes are private; the kernel's flag list is public and covers x86 and ARM servers.
    try:
        with open("/proc/cpuinfo") as file:
            flags = set(file.read().split())
    except OSError:
        return "none"
    return next((kind for flag, kind in _FLAGS.items() if flag in flags), "none")
