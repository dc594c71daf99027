"""Triton kernels run on the GPU if there is one, else in Triton's interpreter.

Triton decides whether to interpret when it is imported, and torch's compiler imports it too. If other tests have imported
it already, the tests of a kernel run in a separate process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
CAN_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run in this process."""
    pytest.importorskip("triton")
    if not (HAS_GPU or CAN_INTERPRET):
        pytest.skip("triton was imported without its interpreter; test_in_a_separate_process covers this file")
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(scope="session")
def run_alone() -> Callable[[str], None]:
    """Runs a test file in a process with Triton's interpreter, unless this process can run it."""

    def run(path: str) -> None:
        pytest.importorskip("triton")
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
