"""Tensor parallelism, alone and with FSDP2, in real processes, against one process on the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import tp_worker
from processes import start


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return start(2, tmp_path_factory.mktemp("ranks") / "two", tp_worker.every_case, 2).results()


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return start(4, tmp_path_factory.mktemp("ranks") / "four", tp_worker.every_case, 4).results()


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_ten_steps_equal_those_of_one_process(ranks: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(ranks)
    for name in tp_worker.RUNS[len(found)][1]:
        lit, callback = tp_worker.train_case(name)
        assert callback.qk_clip is not None and callback.last is not None
        assert int(callback.qk_clip.clips.sum()) > 0, name
        weights = dict(lit.named_parameters())
        for rank in found:
            assert torch.equal(rank[name]["clips"], callback.qk_clip.clips), name
            torch.testing.assert_close(rank[name]["max_logits"], callback.last.max_logits)
            assert rank[name]["weights"].keys() == weights.keys()
            for path, weight in rank[name]["weights"].items():
                assert torch.equal(weight, found[0][name]["weights"][path]), f"{name}: {path}"
                torch.testing.assert_close(weight, weights[path].data, rtol=1e-6, atol=1e-8, msg=f"{name}: {path}")


def test_an_infinity_on_one_rank_skips_the_step_of_both_optimizers_on_all(two: list[dict[str, Any]]) -> None:
    for rank in two:
        for moved in rank["overflow"]:
            assert moved == [{True}, {False}, {True}, {True}, {False}, {True}]


def test_every_rank_knows_the_logits_of_all_heads_also_when_compiled(two: list[dict[str, Any]]) -> None:
    expected = tp_worker.observed(None, compiled=False)
    for rank in two:
        for seen in rank["observed"]:
            torch.testing.assert_close(seen, expected)


def test_heads_that_cannot_be_sharded_are_refused(two: list[dict[str, Any]]) -> None:
    for rank in two:
        query, key, spec = rank["refusals"]
        assert "8 channels for heads of 16" in query
        assert "2 channels for heads of 4" in key
        assert "computed 1 heads, but its spec says 8" in spec


def test_a_clip_of_shards_is_exact_and_local(four: list[dict[str, Any]]) -> None:
    expected, _ = tp_worker.scaled(lambda module: None)
    for rank in four:
        for layout, (weights, collectives) in rank["scaled"].items():
            assert collectives == 2, layout  # one a step
            assert weights.keys() == expected.keys()
            for name, (part, box) in weights.items():
                whole, _ = expected[name]
                assert torch.equal(part, whole[tuple(slice(*side) for side in box)]), f"{layout}: {name}"
