"""Two real processes through Lightning's strategies, against one process on the whole batch."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LitTiny, loader, tiny_gpt, token_batches, trainer

from lightning_muonclip import MuonClipCallback
from lightning_muonclip.optim.sharding import ROUNDS

TOLERANCE = 2e-5

WORKER = Path(__file__).with_name("worker.py")


def run(strategy: str, folder: Path) -> list[dict[str, Any]]:
    subprocess.run([sys.executable, str(WORKER), strategy, str(folder)], check=True, timeout=240, capture_output=True)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run("ddp", tmp_path_factory.mktemp("ddp"))


def single_process(clip: float | None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    model = tiny_gpt()
    callback = MuonClipCallback(threshold=1.0, dtype=torch.float32)
    lit = LitTiny(model, lambda params: torch.optim.AdamW(params, lr=3e-3))
    trainer([callback], gradient_clip_val=clip).fit(lit, loader(token_batches(10, batch_size=4)))
    return dict(lit.named_parameters()), callback.qk_clip.clips


def test_ddp_ranks_are_bitwise_equal_after_ten_steps(ddp: list[dict[str, Any]]) -> None:
    first, second = ddp
    assert int(first["clips"].sum()) > 0
    for key in ("max_logits", "clips"):
        assert torch.equal(first[key], second[key])
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name


def test_ddp_equals_one_process_on_the_whole_batch(ddp: list[dict[str, Any]]) -> None:
    weights, clips = single_process(0.3)
    assert torch.equal(ddp[0]["clips"], clips)
    for name, weight in ddp[0]["weights"].items():
        # The mean of two halves is rounded otherwise than the mean of the whole.
        torch.testing.assert_close(weight, weights[name], atol=TOLERANCE, rtol=TOLERANCE)


def test_ddp_step_has_few_collectives_and_no_host_synchronisation(ddp: list[dict[str, Any]]) -> None:
    for rank in ddp:
        calls = Counter(rank["calls"])
        collectives = {name: count for name, count in calls.items() if name.startswith("c10d")}
        # Muon's directions in so many rounds, and the maxima of all heads.
        assert collectives == {"c10d.alltoall_base_.default": ROUNDS, "c10d.allreduce_.default": 1}
        assert "aten._local_scalar_dense.default" not in calls
        assert "aten.bmm.default" in calls  # the watch did see Muon's step


def test_fsdp2_equals_one_process_on_the_whole_batch(tmp_path: Path) -> None:
    first, second = run("fsdp2", tmp_path)
    weights, clips = single_process(None)
    assert torch.equal(first["clips"], clips)
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
        torch.testing.assert_close(weight, weights[name], atol=TOLERANCE, rtol=TOLERANCE)
