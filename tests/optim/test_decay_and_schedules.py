"""Cautious weight decay, and schedules of momentum and weight decay."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, LRScheduler, OneCycleLR

from lightning_muonclip import GroupScheduler, Muon, MuonClip, decay_to_zero, momentum_warmup
from lightning_muonclip.optim.routing import split_params

LR, DECAY, STEPS = 0.1, 0.5, 3


def set_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(9)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for shape in [(6, 4), (6, 4), (2, 3, 4)]
    ]


class TestCautiousWeightDecay:
    @pytest.mark.parametrize("as_tensor", [False, True])
    def test_of_muon_is_its_formula(self, as_tensor: bool) -> None:
        def make(params: list[nn.Parameter], **options: Any) -> Muon:
            groups = [{"params": params[:2]}, {"params": params[2:], "kind": "experts"}]
            lr = torch.tensor(LR, dtype=torch.float64) if as_tensor else LR
            return Muon(groups, lr, parts={params[1]: (0, [range(4), range(4, 6)])}, dtype=torch.float64, **options)

        params, plain = weights(), weights()
        optimizer = make(params, weight_decay=DECAY, cautious_weight_decay=True)
        updates = make(plain, weight_decay=0.0)
        for seed in range(STEPS):
            set_gradients(params, seed)
            set_gradients(plain, seed)
            if seed == 1:
                params[0].grad = plain[0].grad = torch.zeros(6, 4, dtype=torch.float64)  # decays, and does not move
            before, without = [p.detach().clone() for p in params], [p.detach().clone() for p in plain]
            optimizer.step()
            updates.step()
            for p, w, twin, start in zip(params, before, plain, without):
                u = (start - twin.detach()) / LR
                expected = w - LR * u - LR * DECAY * w * (u * w >= 0)
                torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)

    def test_of_adamw_is_its_formula(self) -> None:
        (p, *_) = weights()
        optimizer = Muon([{"params": [p], "algorithm": "adamw"}], LR, DECAY, cautious_weight_decay=True)
        mean, square = torch.zeros_like(p), torch.zeros_like(p)
        for step in range(1, STEPS + 1):
            set_gradients([p], step)
            grad, w = p.grad, p.detach().clone()
            assert grad is not None
            mean, square = 0.9 * mean + 0.1 * grad, 0.999 * square + 0.001 * grad**2
            u = mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
            optimizer.step()
            torch.testing.assert_close(p.detach(), w - LR * u - LR * DECAY * w * (u * w >= 0), rtol=1e-10, atol=1e-10)

    def test_a_state_of_torch_does_without(self) -> None:
        p = nn.Parameter(torch.randn(4, 3))
        state = torch.optim.Muon([p]).state_dict()
        optimizer = Muon([p], cautious_weight_decay=True)
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["cautious_weight_decay"] is False


def stepped(optimizer: Optimizer, count: int, *schedulers: LRScheduler) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for seed in range(count):
        set_gradients(params, seed)
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


def momentum_of(step: int) -> float:
    return 0.5 + 0.1 * step


def decay_of(step: int) -> float:
    return 0.3 / (1 + step)


class TestSchedules:
    def test_functions_and_the_scheduler_set_what_a_loop_would(self) -> None:
        params = [weights() for _ in range(3)]
        by_function = Muon(params[0][:2], LR, decay_of, momentum_of)
        by_scheduler = Muon(params[1][:2], LR, 0.1)
        scheduler = GroupScheduler(by_scheduler, momentum=momentum_of, weight_decay=decay_of)
        by_hand = Muon(params[2][:2], LR)
        for step in range(STEPS):
            by_hand.param_groups[0].update(momentum=momentum_of(step), weight_decay=decay_of(step))
            for optimizer in (by_function, by_scheduler, by_hand):
                set_gradients(optimizer.param_groups[0]["params"], step)
                optimizer.step()
            scheduler.step()
        for p, q, r in zip(*params):
            assert torch.equal(p, r)
            assert torch.equal(q, r)
        assert by_function.param_groups[0]["momentum"] == momentum_of(STEPS)

    def test_each_group_by_itself(self) -> None:
        p, q, r = weights()
        groups: list[dict[str, Any]] = [
            {"params": [p], "momentum": momentum_of},
            {"params": [q], "weight_decay": 0.0},
            {"params": [r], "algorithm": "adamw"},
        ]
        optimizer = Muon(groups, LR, weight_decay=decay_of)
        stepped(optimizer, 2)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [decay_of(2), 0.0, decay_of(2)]
        assert [group["momentum"] for group in optimizer.param_groups] == [momentum_of(2), 0.95, 0.95]

    def test_no_decay_stays_none(self) -> None:
        p, q, _ = weights()
        optimizer = SGD([{"params": [p]}, {"params": [q], "weight_decay": 0.0}], 0.1, weight_decay=1.0)
        scheduler = GroupScheduler(optimizer, weight_decay=lambda step: float(step))
        for step in range(3):  # a schedule may pass through 0
            assert [group["weight_decay"] for group in optimizer.param_groups] == [step, 0.0]
            stepped(optimizer, 1, scheduler)

    @pytest.mark.parametrize("through", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
    def test_resumed(self, through: Any) -> None:
        whole, first, second = (weights()[:2] for _ in range(3))

        def make(params: list[nn.Parameter]) -> tuple[Muon, list[LRScheduler]]:
            optimizer = Muon(params, LR, decay_of, 0.9)
            cosine = CosineAnnealingLR(optimizer, 10)
            return optimizer, [cosine, GroupScheduler(optimizer, momentum=lambda step: 0.5 + 0.1 * step)]

        optimizer, schedulers = make(whole)
        stepped(optimizer, 4, *schedulers)
        before, earlier = make(first)
        stepped(before, 2, *earlier)
        after, later = make(second)
        for p, q in zip(second, first):
            p.data.copy_(q)
        after.load_state_dict(through(before.state_dict()))
        for own, saved in zip(later, earlier):
            own.load_state_dict(through(saved.state_dict()))
        assert after.param_groups[0]["momentum"] == momentum_of(2)
        for seed in (2, 3):
            set_gradients(second, seed)
            after.step()
            for scheduler in later:
                scheduler.step()
        assert all(torch.equal(p, q) for p, q in zip(whole, second))

    def test_a_state_goes_between_those_with_and_without(self) -> None:
        p, q, _ = weights()
        scheduled, plain = Muon([p], LR, decay_of), Muon([q], LR)
        stepped(scheduled, 2)
        plain.load_state_dict(scheduled.state_dict())
        stepped(plain, 1)
        assert "steps" not in plain.param_groups[0]
        scheduled.load_state_dict(plain.state_dict())
        assert scheduled.param_groups[0]["weight_decay"] == decay_of(0)

    @pytest.mark.parametrize(
        "schedule",
        [
            lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=10),
            lambda optimizer: CyclicLR(optimizer, 0.01, 0.1, step_size_up=3),
        ],
    )
    def test_cycles_reach_adamw_too(self, schedule: Any) -> None:
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)).double()
        optimizer = Muon(split_params(model), LR)
        betas = [group["betas"][1] for group in optimizer.param_groups if "betas" in group]
        scheduler = schedule(optimizer)
        for _ in range(4):
            momenta = {group["momentum"] for group in optimizer.param_groups}
            stepped(optimizer, 1)
            found = {group["betas"] for group in optimizer.param_groups if group["algorithm"] == "adamw"}
            assert found == {(*momenta, *betas)}
            scheduler.step()
        assert len({*momenta, group_momentum(optimizer)}) == 2

    def test_an_entry_that_no_group_has_is_refused(self) -> None:
        optimizer = SGD(weights(), 0.1)
        with pytest.raises(ValueError, match="no parameter group of SGD has an entry 'momentun' to schedule"):
            GroupScheduler(optimizer, momentun=lambda step: 0.9)
        with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1.5"):
            Muon(weights()[:1], momentum=lambda step: 1.5)

    def test_muonclip(self) -> None:
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))
        optimizer = MuonClip(
            model, LR, decay_to_zero(0.2, 4), momentum=momentum_warmup(2), logits="off", unknown="monitor"
        )
        decays = []
        for _ in range(4):
            decays.append([group["weight_decay"] for group in optimizer.param_groups])
            model(torch.arange(5)).sum().backward()
            optimizer.step(max_logits=[])
        assert [row[0] for row in decays] == [decay_to_zero(0.2, 4)(step) for step in range(4)]
        assert all(row == [row[0], row[0], 0.0] for row in decays)


def group_momentum(optimizer: Optimizer) -> float:
    return float(optimizer.param_groups[0]["momentum"])


@given(st.integers(1, 50), st.integers(0, 50), st.integers(0, 200))
def test_momentum_warms_up_and_cools_down(rise: int, fall: int, flat: int) -> None:
    total = rise + flat + fall
    found = torch.tensor([momentum_warmup(rise, 0.8, 0.9, fall, total)(step) for step in range(total + 1)])
    assert torch.allclose(found[: rise + 1], torch.linspace(0.8, 0.9, rise + 1))
    assert torch.allclose(found[rise : rise + flat + 1], torch.tensor(0.9))
    assert torch.allclose(found[total - fall :], torch.linspace(0.9, 0.8, fall + 1) if fall else Tensor([0.9]))
