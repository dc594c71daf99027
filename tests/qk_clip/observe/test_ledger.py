"""The ledger, and its reduction over ranks."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracles import INF, Residual, SdpaAttention
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_muonclip import Attention, QKClip
from lightning_muonclip.qk_clip.observe.ledger import Ledger, reduce_max


def ledger() -> Ledger:
    return Ledger([2, 3], torch.device("cpu"))


def test_nothing_is_seen_at_first() -> None:
    assert ledger().values.tolist() == [[-INF] * 3] * 2
    assert ledger().latest.tolist() == [[-INF] * 3] * 2


def test_records_are_maxima_of_their_row() -> None:
    book = ledger()
    for maxima in ([1.0, -5.0], [0.5, -4.0]):
        book.record(0, torch.tensor(maxima))
    assert book.values.tolist() == [[1.0, -4.0, -INF], [-INF] * 3]


def test_a_bound_is_kept_beside_the_maximum_until_it_is_reached() -> None:
    book = ledger()
    book.record(0, torch.tensor([[1.0, -5.0], [3.0, -5.0]]))
    assert book.bounded[:, 0].tolist() == [[1.0, -5.0, -INF], [3.0, -5.0, -INF]]
    book.record(0, torch.tensor([3.5, -6.0]))  # of a call that proves its maxima
    assert book.bounded[:, 0].tolist() == 2 * [[3.5, -5.0, -INF]]
    assert book.values.tolist() == book.bounded[0].tolist()


def test_nan_is_not_forgotten_until_the_step_ends() -> None:
    book = ledger()
    for value in (1.0, math.nan, 2.0):
        book.record(0, torch.tensor([value, 0.0]))
    assert book.values[0, 0].isnan()
    book.close_step()
    book.record(0, torch.tensor([1.0, 0.0]))
    assert book.values[0, 0] == 1.0


def test_the_latest_step_is_the_one_under_way_or_else_the_last() -> None:
    book = ledger()
    book.record(0, torch.tensor([1.0, 2.0]))
    first = book.latest.clone()
    assert first.tolist() == [[1.0, 2.0, -INF], [-INF] * 3]
    book.close_step()
    assert torch.equal(book.latest, first)
    book.record(1, torch.tensor([0.0, 0.0, 0.0]))
    assert book.latest.tolist() == [[-INF] * 3, [0.0] * 3]


def test_a_forward_without_gradients_counts_if_there_is_no_other() -> None:
    book = ledger()
    with torch.no_grad():
        book.record(0, torch.tensor([7.0, 8.0]))
    assert book.values[0, :2].tolist() == [7.0, 8.0]
    book.record(0, torch.tensor([1.0, 2.0]))
    assert book.values[0, :2].tolist() == [1.0, 2.0]
    with torch.no_grad():
        book.record(0, torch.tensor([7.0, 8.0]))
    assert book.latest[0, :2].tolist() == [1.0, 2.0]
    book.close_step()
    assert book.values[0, :2].tolist() == [-INF, -INF] and book.last_step[0, :2].tolist() == [1.0, 2.0]


def test_half_precision_maxima_are_kept_in_float32() -> None:
    book = ledger()
    book.record(0, torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    assert book.values.dtype is torch.float32


def test_non_finite_maxima_become_infinity_before_the_reduction() -> None:
    values = torch.tensor([1.0, math.nan, INF, -INF])
    assert reduce_max(values).tolist() == [1.0, INF, INF, -INF]
    assert values[1].isnan()


def two_models() -> list[nn.Module]:
    models = [
        Residual(Attention(16, 4, num_key_value_heads=2, attention_bias=True), Attention(16, 2)),
        Residual(SdpaAttention(16, 4), SdpaAttention(16, 2)),
    ]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        for param in model.parameters():
            nn.init.normal_(param, std=0.3)
    return models


def one_rank(rank: int, directory: Path) -> None:
    """All cases that need two processes, so that these start once."""
    store = dist.FileStore(str(directory / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.set_num_threads(1)
    inf = math.inf
    mine = torch.tensor([[1.0, 5.0, -inf, math.nan], [3.0, 2.0, -inf, 0.0]][rank])
    batch = torch.randn(4, 9, 16, generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {"reduced": reduce_max(mine), "models": []}
    for model in two_models():
        with QKClip(model, threshold=10.0) as qk_clip:
            model(batch[2 * rank : 2 * rank + 2])
            result = qk_clip.step()
        found["models"].append((result.max_logits, model.state_dict()))
    sharded = two_models()[0]
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    with QKClip(sharded, threshold=10.0) as qk_clip:
        sharded(batch[2 * rank : 2 * rank + 2])
        qk_clip.step()
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    found["sharded"] = {name: value.full_tensor() for name, value in sharded.state_dict().items()}
    # The reduction excludes ranks that see the same data.
    own = [dist.new_group([r]) for r in range(2)][rank]
    with QKClip(two_models()[0], process_group=own) as qk_clip:
        found["alone"] = qk_clip.step([[float(rank)] * 4, [0.0] * 2]).max_logits[0, 0]
    torch.save(found, directory / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_clip_alike_by_the_maximum_over_all_data(tmp_path: Path) -> None:
    mp.start_processes(one_rank, (tmp_path,), nprocs=2, start_method="fork")  # avoids two full imports
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    batch = torch.randn(4, 9, 16, generator=torch.Generator().manual_seed(0))
    for found in ranks:
        assert found["reduced"].tolist() == [3.0, 5.0, -INF, INF]
    assert [found["alone"].item() for found in ranks] == [0.0, 1.0]
    for i, model in enumerate(two_models()):
        before = copy.deepcopy(model.state_dict())
        with QKClip(model, threshold=10.0) as qk_clip:
            model(batch)
            expected = qk_clip.step()
        assert 0 < expected.clipped_heads < 6
        for found in ranks:
            maxima, weights = found["models"][i]
            torch.testing.assert_close(maxima, expected.max_logits, rtol=1e-5, atol=0)
            for name, value in model.state_dict().items():
                torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-7)
                if i == 0:
                    torch.testing.assert_close(found["sharded"][name], value, rtol=1e-5, atol=1e-7)
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
        assert any("q_proj" in name for name in changed)


def test_a_step_is_one_collective_of_the_group_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    model, group, calls, exchanges = two_models()[0], object(), [], []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda values, op, group: calls.append((values.shape, op, group)))

    def exchange(found: list[Any], own: Any, group: Any) -> None:
        found[:] = [own, own]
        exchanges.append(group)

    monkeypatch.setattr(dist, "all_gather_object", exchange)
    with QKClip(model, process_group=group) as qk_clip:
        for _ in range(2):
            model(torch.randn(2, 9, 16))
            qk_clip.step()
    assert exchanges == [group]  # what the ranks have found, once
    # Two layers, of each the maxima, their bounds and the norms of queries and keys; another row says whether a rank has
    # found more.
    assert calls == 2 * [((2 * 4 + 1, 4), dist.ReduceOp.MAX, group)]


@pytest.mark.parametrize("model", two_models(), ids=["ours", "third party"])
def test_maxima_are_in_no_checkpoint(model: nn.Module) -> None:
    names = list(model.state_dict())
    with QKClip(model):
        assert list(model.state_dict()) == names
