"""Triton kernels run on the GPU if there is one, else in Triton's interpreter.

Triton decides whether to interpret when it is imported, and torch's compiler imports it too. If other tests have imported
it already, the tests of a kernel run in a separate process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.version import Version

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
CAN_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def triton_runs() -> None:
    """Triton, and where there is no GPU an interpreter that can run it."""
    pytest.importorskip("triton")
    triton, numpy = (Version(metadata.version(name)) for name in ("triton", "numpy"))
    if not HAS_GPU and triton < Version("3.7") and numpy >= Version("2.4"):
        pytest.skip(f"the interpreter of triton {triton} fails on numpy {numpy}; install numpy<2.4")


@pytest.fixture(scope="session")
def device(triton_runs: None) -> torch.device:
    """Where kernels run in this process."""
    if not (HAS_GPU or CAN_INTERPRET):
        pytest.skip("triton was imported without its interpreter; test_in_a_separate_process covers this file")
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(scope="session")
def run_alone(triton_runs: None) -> Callable[[str], None]:
    """Runs a test file in a process with Triton's interpreter, unless this process can run it."""

    def run(path: str) -> None:
        if HAS_GPU or CAN_INTERPRET:
            pytest.skip("runs here")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path]
        done = subprocess.run(
            command,
            env=os.environ | {"TRITON_INTERPRET": "1"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]

    return run
