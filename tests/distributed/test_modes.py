"""Features combined with DDP and FSDP2, in two real processes, against one process on the whole batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from processes import on_ranks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from tp_worker import ATTENTION, GQA, Overflow, gpt, train, whole

from lightning_muonclip import MuonClipCallback
from lightning_muonclip.parallel.exchange import ROUNDS

RANKS = 2


class Watched(MuonClipCallback):
    """Counts the operators of the last step."""

    calls: Counter[str]

    def on_before_optimizer_step(self, *args: Any) -> None:
        with Calls() as calls:
            super().on_before_optimizer_step(*args)
        self.calls = calls.counter


class Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counter: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counter[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Checkpointed(nn.Module):
    """A layer whose forward runs again in the backward."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.layer, *args, use_reentrant=False, **kwargs)


def ordinary() -> pl.LightningModule:
    return gpt(GQA).double()


def checkpointed() -> pl.LightningModule:
    lit = ordinary()
    lit.model.layers = nn.ModuleList(map(Checkpointed, lit.model.layers))
    return lit


def compiled() -> pl.LightningModule:
    lit = ordinary()
    lit.model.compile(backend="aot_eager")
    return lit


def with_unused_weights() -> pl.LightningModule:
    """One matrix that no forward uses, and one that only every other forward uses."""
    lit = ordinary()
    lit.never, lit.sometimes = nn.Linear(5, 3, bias=False).double(), nn.Linear(3, 7, bias=False).double()
    step, inner = iter(range(1000)), lit.training_step

    def training_step(batch: Any, batch_idx: int) -> Tensor:
        loss = inner(batch, batch_idx)
        return loss + lit.sometimes.weight.square().sum() if next(step) % 2 else loss

    lit.training_step = training_step
    return lit


def ddp(**options: Any) -> dict[str, Any]:
    return {"strategy": DDPStrategy(**options), "devices": RANKS}


def fsdp2() -> dict[str, Any]:
    return {"strategy": ModelParallelStrategy(RANKS, 1), "devices": RANKS}


#: The model, how it is trained on one process and on several, and how on several.
MODES: dict[str, tuple[Callable[[], pl.LightningModule], dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "ddp": (ordinary, {}, ddp),
    "fsdp2": (ordinary, {}, fsdp2),
    "ddp, accumulation": (ordinary, {"accumulate_grad_batches": 3}, ddp),
    "ddp, static graph": (ordinary, {}, partial(ddp, static_graph=True)),
    "ddp, activation checkpointing": (checkpointed, {}, ddp),
    "ddp, compiled": (compiled, {}, ddp),
    "ddp, unused weights": (with_unused_weights, {}, partial(ddp, find_unused_parameters=True)),
    "ddp, sharded momentum": (ordinary, {}, ddp),
    "fsdp2, accumulation": (ordinary, {"accumulate_grad_batches": 3}, fsdp2),
    "fsdp2, activation checkpointing": (checkpointed, {}, fsdp2),
    "fsdp2, compiled": (compiled, {}, fsdp2),
    "fsdp2, unused weights": (with_unused_weights, {}, fsdp2),
}


def train_mode(mode: str, rank: int = 0, ranks: int = 1) -> tuple[dict[str, Tensor], Tensor, Counter[str]]:
    """Weights after ten steps, how often each head was clipped, and the operators of the last step."""
    make, options, strategy = MODES[mode]
    callback = Watched(threshold=1.0, dtype=torch.float64, shard_momentum="sharded momentum" in mode)
    lit = make()
    train(lit, [callback], rank, ranks, gradient_clip_val=0.3, **options, **(strategy() if ranks > 1 else {}))
    assert callback.qk_clip is not None
    return {name: whole(p) for name, p in lit.named_parameters()}, callback.qk_clip.clips, callback.calls


class EarlyOverflow(Overflow):
    """Injects the infinity before DDP averages gradients, as a real one would occur."""

    def on_fit_start(self, fit: pl.Trainer, lit: pl.LightningModule) -> None:
        def spoil(name: str, grad: Tensor) -> Tensor:
            is_due = fit.global_rank == self.rank and self.steps.get(fit.global_step) == name
            return torch.full_like(grad, torch.inf) if is_due else grad

        for name in self.steps.values():
            lit.get_parameter(name).register_hook(partial(spoil, name))

    def on_after_backward(self, fit: pl.Trainer, lit: pl.LightningModule) -> None:
        pass


def overflowing(rank: int) -> list[set[bool]]:
    """Whether weights moved in every step; in the second and the fifth, one rank's gradients are not all finite."""
    watch = EarlyOverflow(rank=1, steps={1: f"{ATTENTION}.q_proj.weight", 4: "model.embed_tokens.weight"})
    scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))
    callbacks = [watch, MuonClipCallback(threshold=1.0)]
    train(gpt(GQA), callbacks, rank, RANKS, limit_train_batches=6, plugins=[scaler], **ddp())
    return watch.moved


def every_mode() -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    results: dict[str, Any] = {mode: train_mode(mode, rank, RANKS) for mode in MODES}
    results["overflow"] = overflowing(rank)
    return results


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return on_ranks(RANKS, every_mode)


@pytest.mark.parametrize("mode", MODES)
def test_ten_steps_equal_those_of_one_process(mode: str, results: list[dict[str, Any]]) -> None:
    weights, clips, _ = train_mode(mode)
    assert int(clips.sum()) > 0
    for rank in results:
        own, own_clips, _ = rank[mode]
        assert torch.equal(own_clips, clips)
        assert own.keys() == weights.keys()
        for name, weight in own.items():
            assert torch.equal(weight, results[0][mode][0][name]), name
            torch.testing.assert_close(weight, weights[name], rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize(("mode", "legs"), [("ddp", 1), ("fsdp2", 2)])
def test_a_step_has_few_collectives_and_no_host_synchronization(
    mode: str, legs: int, results: list[dict[str, Any]]
) -> None:
    for rank in results:
        calls = rank[mode][2]
        collectives = {name: count for name, count in calls.items() if name.startswith("c10d")}
        assert legs <= collectives.pop("c10d.alltoall_base_.default") <= ROUNDS * legs  # Muon's
        assert collectives.pop("c10d.allreduce_.default") == 1  # the maxima of all heads
        assert not collectives
        assert "aten._local_scalar_dense.default" not in calls
        assert "aten.bmm.default" in calls  # Muon's step was counted


def test_an_infinity_on_one_rank_skips_the_step_of_both_optimizers_on_all(results: list[dict[str, Any]]) -> None:
    for rank in results:
        assert rank["overflow"] == [{True}, {False}, {True}, {True}, {False}, {True}]
