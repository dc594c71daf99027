"""Checkpoints move between strategies and numbers of ranks, and a killed run resumes from its last one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_worker import (
    SAVED,
    Run,
    checkpoint_of,
    projections_apart,
    train,
    train_all,
    two_of_projections,
)
from helpers import tiny_gpt
from processes import start
from torch import nn

from lightning_muonclip import Muon, MuonClip, decay_to_zero, momentum_warmup, split_params

#: Runs on different numbers of ranks are not bitwise equal: the means of two halves and of four quarters round differently.
TOLERANCE = 1e-6

MOMENTUM_SHARDED = (("shard_momentum", True),)

#: Which have a state of their own.
VARIED = (
    ("second_moment", "rows"),
    ("cautious_weight_decay", True),
    ("momentum", momentum_warmup(6)),
    ("weight_decay", decay_to_zero(0.5, 20)),
)

STRATEGIES = ("ddp", "fsdp2", "fsdp2 sharded")

#: Uninterrupted, on 4 ranks.
SAVERS = [
    Run("ddp", "ddp"),
    Run("ddp, momentum sharded", "ddp", options=MOMENTUM_SHARDED),
    Run("fsdp2", "fsdp2"),
    Run("fsdp2 sharded", "fsdp2 sharded"),
]
SAVERS_VARIED = [
    Run("varied ddp", "ddp", options=(*VARIED, *MOMENTUM_SHARDED)),
    Run("varied fsdp2", "fsdp2", options=VARIED),
    Run("varied fsdp2 sharded", "fsdp2 sharded", options=VARIED),
]
RESUMED_VARIED = [
    Run("varied ddp after ddp", "ddp", "varied ddp", options=VARIED),
    Run("varied ddp after fsdp2", "ddp", "varied fsdp2", options=VARIED),
    Run("varied shards after shards", "fsdp2 sharded", "varied fsdp2 sharded", options=VARIED),
]

#: By the number of ranks that go on.
RESUMED = {
    2: [
        Run("ddp after ddp", "ddp", "ddp"),
        Run("momentum sharded after whole", "ddp", "ddp", options=MOMENTUM_SHARDED),
        Run("momentum whole after sharded", "ddp", "ddp, momentum sharded"),
        Run("fsdp2 after fsdp2", "fsdp2", "fsdp2"),
        Run("shards after shards", "fsdp2 sharded", "fsdp2 sharded"),
        Run("fsdp2 after ddp", "fsdp2", "ddp"),
        Run("shards after ddp", "fsdp2 sharded", "ddp, momentum sharded"),
        Run("ddp after fsdp2", "ddp", "fsdp2"),
    ],
    1: [
        Run("one of fsdp2 after fsdp2", "fsdp2", "fsdp2"),
        Run("one of shards after shards", "fsdp2 sharded", "fsdp2 sharded"),
        Run("one of fsdp2 after ddp", "fsdp2", "ddp"),
        Run("one of ddp after ddp", "ddp", "ddp"),
        Run("one after ddp", "auto", "ddp"),
        Run("one after ddp, momentum sharded", "auto", "ddp, momentum sharded"),
        Run("one after fsdp2", "auto", "fsdp2"),
    ],
}

#: On one rank: of one group Muon takes every parameter.
EMPTIED = [Run(f"emptied {strategy}", strategy, groups=projections_apart) for strategy in STRATEGIES]
EMPTIED_RESUMED = [
    Run(f"{strategy} after {saver}", strategy, saver, groups=projections_apart)
    for strategy, saver in [
        ("ddp", "emptied ddp"),
        ("ddp", "emptied fsdp2"),
        ("fsdp2", "emptied ddp"),
        ("fsdp2", "emptied fsdp2"),
        ("fsdp2 sharded", "emptied fsdp2 sharded"),
    ]
]
TWO_EMPTIED = Run("two emptied", "fsdp2", groups=two_of_projections, steps=SAVED)

#: Also on 2 ranks: a run to be killed and resumed to the bit, and checkpoints that are to be refused.
KILLED = [Run("killed ddp", "ddp", killed=True), Run("killed fsdp2", "fsdp2 sharded", killed=True)]
STRAIGHT = [Run(f"straight {run.strategy}", run.strategy) for run in KILLED]
RESCUED = [Run(f"rescued {run.strategy}", run.strategy, run.name) for run in KILLED]
PLAIN = [Run(f"plain {strategy}", strategy, plain=True, steps=SAVED) for strategy in STRATEGIES]
REFUSED = [Run(f"refused {strategy}", strategy, f"plain {strategy}") for strategy in STRATEGIES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def saved(folder: Path) -> list[dict[str, Any]]:
    return start(4, folder / "4", train_all, [*SAVERS, *SAVERS_VARIED], 4, folder).results()


@pytest.fixture(scope="module")
def killed(folder: Path) -> dict[str, tuple[list[int | None], str]]:
    """Exit codes, and the error of the remaining rank."""
    runs = {run.name: start(2, folder / run.name, train, run, 2, folder) for run in KILLED}
    return {name: (ranks.exit_codes(), ranks.error(0)) for name, ranks in runs.items()}


@pytest.fixture(scope="module")
def two(folder: Path, saved: Any, killed: Any) -> list[dict[str, Any]]:
    runs = [*RESUMED[2], *RESUMED_VARIED, *STRAIGHT, *RESCUED, *PLAIN, *REFUSED]
    return start(2, folder / "2", train_all, runs, 2, folder).results()


@pytest.fixture(scope="module")
def one(folder: Path, saved: Any) -> list[dict[str, Any]]:
    return start(
        1, folder / "1", train_all, [*RESUMED[1], *EMPTIED, *EMPTIED_RESUMED, TWO_EMPTIED], 1, folder
    ).results()


def assert_equal_weights(run: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    assert "error" not in run, run["error"]
    for name, weight in run["weights"].items():
        torch.testing.assert_close(weight, other["weights"][name], atol=tolerance, rtol=tolerance)


class TestResumed:
    """A run saved on 4 ranks at half time and resumed in any way ends like the uninterrupted run."""

    @pytest.mark.parametrize("name", [run.name for run in SAVERS])
    def test_uninterrupted(self, name: str, saved: list[dict[str, Any]]) -> None:
        assert int(saved[0][name]["clips"].sum()) > 0
        for rank in saved:
            assert_equal_weights(rank[name], saved[0]["ddp"], TOLERANCE)

    def test_uninterrupted_with_options(self, saved: list[dict[str, Any]]) -> None:
        first, *others = (run.name for run in SAVERS_VARIED)
        for rank in saved:
            for name in others:
                assert_equal_weights(rank[name], saved[0][first], TOLERANCE)
        moved = saved[0][first]["weights"]
        assert any(not torch.allclose(weight, moved[name]) for name, weight in saved[0]["ddp"]["weights"].items())

    @pytest.mark.parametrize("name", [run.name for run in RESUMED_VARIED])
    def test_with_options(self, name: str, saved: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
        self.check(name, two, saved[0]["varied ddp"])

    @pytest.mark.parametrize("name", [run.name for run in RESUMED[2]])
    def test_on_two_ranks(self, name: str, saved: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
        self.check(name, two, saved[0]["ddp"])

    @pytest.mark.parametrize("name", [run.name for run in RESUMED[1]])
    def test_on_one_rank(self, name: str, saved: list[dict[str, Any]], one: list[dict[str, Any]]) -> None:
        self.check(name, one, saved[0]["ddp"])

    @pytest.mark.parametrize("name", [run.name for run in EMPTIED_RESUMED])
    def test_with_a_group_that_muon_emptied(self, name: str, one: list[dict[str, Any]]) -> None:
        self.check(name, one, one[0]["emptied ddp"])

    def check(self, name: str, ranks: list[dict[str, Any]], whole: dict[str, Any]) -> None:
        for rank in ranks:
            assert_equal_weights(rank[name], whole, TOLERANCE)
            assert_equal_weights(rank[name], ranks[0][name], 0.0)
            assert torch.equal(rank[name]["clips"], whole["clips"])
            assert rank[name]["rates"] == whole["rates"]
            assert not any("no logits were seen" in w or "of the checkpoint" in w for w in rank[name]["warnings"])


def test_emptied_groups_that_torch_cannot_load_are_warned_of(one: list[dict[str, Any]]) -> None:
    def warned(name: str) -> bool:
        return any("cannot resume" in warning for warning in one[0][name]["warnings"])

    assert warned("two emptied")
    assert not warned("emptied fsdp2")


def test_settings_of_the_checkpoint_take_precedence(folder: Path, saved: list[dict[str, Any]]) -> None:
    other = Run("other", "auto", "ddp", options=(("momentum", 0.5), ("ns_coefficients", "jordan")))
    resumed = train(other, 1, folder)
    assert_equal_weights(resumed, saved[0]["ddp"], TOLERANCE)
    assert any("momentum, ns_coefficients of the checkpoint" in warning for warning in resumed["warnings"])


def test_states_have_the_same_keys_under_every_strategy(folder: Path, saved: Any) -> None:
    states = [
        torch.load(checkpoint_of(name, folder), weights_only=True)["optimizer_states"]
        for name in ("ddp", "ddp, momentum sharded", "fsdp2")
    ]
    for other in states[1:]:
        for own, theirs in zip(states[0], other):
            assert {i: set(state) for i, state in own["state"].items()} == {
                i: set(state) for i, state in theirs["state"].items()
            }
            assert own["param_groups"] == theirs["param_groups"]


class TestKilled:
    @pytest.mark.parametrize("name", [run.name for run in KILLED])
    def test_the_other_rank_stops_with_an_error(self, name: str, killed: dict[str, Any]) -> None:
        codes, error = killed[name]
        assert codes == [1, -9]
        assert "Connection closed by peer" in error or "Connection reset by peer" in error, error

    @pytest.mark.parametrize(("straight", "rescued"), [(a.name, b.name) for a, b in zip(STRAIGHT, RESCUED)])
    def test_a_new_run_resumes_bitwise(self, straight: str, rescued: str, two: list[dict[str, Any]]) -> None:
        for rank in two:
            assert_equal_weights(rank[rescued], rank[straight], 0.0)
            assert torch.equal(rank[rescued]["clips"], rank[straight]["clips"])


@pytest.mark.parametrize("name", [run.name for run in REFUSED])
def test_a_checkpoint_without_the_callback_is_refused(name: str, two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert "saved without MuonClipCallback" in rank[name]["error"]
        assert "load_from_checkpoint" in rank[name]["error"]


class TestStatesOfOthers:
    """What plain PyTorch saved on one process."""

    def test_torch_muon_resumes(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = [(6, 4), (4, 6), (6, 4)]
        params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        theirs = torch.optim.Muon(params, lr=0.02)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        theirs.step()
        copies = [nn.Parameter(p.detach().clone()) for p in params]
        ours = Muon(copies, dtype=torch.bfloat16)
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        for p, own in zip(params, copies):
            p.grad = torch.randn(p.shape, generator=generator)
            own.grad = p.grad.clone()
        theirs.step()
        ours.step()
        for p, own in zip(params, copies):
            assert torch.equal(ours.state[own]["momentum_buffer"], theirs.state[p]["momentum_buffer"])
            torch.testing.assert_close(own, p, atol=1e-3, rtol=0)  # rounding of bfloat16, times the learning rate

    def test_adamw_is_refused_by_muon(self) -> None:
        layers = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("first", "second")})
        with pytest.raises(
            ValueError, match=r"has .*exp_avg.* for first\.weight, which muon steps.*from the weights alone"
        ):
            Muon(layers.named_parameters()).load_state_dict(adamw_state(layers.parameters()))

    @pytest.mark.parametrize("is_split", [False, True])
    def test_adamw_is_refused_by_muonclip(self, is_split: bool) -> None:
        model = tiny_gpt()
        groups = [{"params": [p for _, p in group["params"]]} for group in split_params(model)]
        state = adamw_state(groups if is_split else model.parameters())
        with pytest.raises(
            ValueError, match=r"has .*exp_avg.* for .*q_proj.*, which muon steps.*from the weights alone"
        ):
            MuonClip(model).load_state_dict(state)


def adamw_state(params: Any) -> dict[str, Any]:
    """After one step."""
    optimizer = torch.optim.AdamW(params)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer.state_dict()
