from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from lightning_muonclip.kernels.costs import COSTS, _bfloat16_hardware, bfloat16_hardware


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch) -> Any:
    def found(capability: str, flags: str | None) -> str:
        def read(*_: Any) -> io.StringIO:
            if flags is None:
                raise FileNotFoundError
            return io.StringIO(flags)

        with monkeypatch.context() as patched:
            patched.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
            patched.setattr("builtins.open", read)
            _bfloat16_hardware.cache_clear()
            kind = bfloat16_hardware()
        _bfloat16_hardware.cache_clear()
        return kind

    return found


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        ("flags\t: fpu sse2 avx2 avx512f", "none"),
        ("flags\t: fpu avx512f avx512_bf16", "AVX512-BF16"),
        ("flags\t: fpu avx512f avx512_bf16 amx_bf16 amx_tile", "AMX"),
        ("Features\t: fp asimd bf16", "ARM"),
        ("Features\t: fp asimd", "none"),
        ("", "none"),
        (None, "none"),
    ],
)
def test_the_flags_of_the_cpu_tell_its_kind(hardware: Any, flags: str | None, kind: str) -> None:
    assert hardware("AVX512", flags) == kind
    assert kind in COSTS


def test_where_torch_may_use_avx2_only_there_is_no_bfloat16(hardware: Any) -> None:
    assert hardware("AVX2", "flags\t: fpu avx512f avx512_bf16") == "none"
