"""Settings for all tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

# Before torch is imported: several threads per process only compete for the cores of a small machine.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
import vision.torchvision_schemas  # noqa: F401  (before anything imports torchvision)
from hypothesis import settings

# The same examples on every machine, however slow it is.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests need a GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _compiler_is_on() -> Iterator[None]:
    """A QKClip that a test leaves before its first step keeps torch.compile off, for the next test too."""
    yield
    from lightning_muonclip.qk_clip.intercept import patches
    from lightning_muonclip.qk_clip.observe.eager import eager  # late: Lightning logs to the stderr of its import

    for user in list(eager.users):
        eager._release(user)
    if patches._patched:  # by what a circle, such as a Trainer's, still keeps
        gc.collect()
