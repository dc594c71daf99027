"""QK-Clip scales what the run trains, in steps that are steps, and nothing else."""

from __future__ import annotations

import copy
import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from oracles import Residual, SdpaAttention, enlarge
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.utils.checkpoint import checkpoint

from lightning_muonclip import Attention, MuonClip, QKClip

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def large(*layers: nn.Module) -> nn.Module:
    model = Residual(*layers)
    enlarge(model)
    return model


class Distilled(nn.Module):
    """A student, and a teacher that runs without gradients."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.student = large(attention(16, 4))
        self.teacher = copy.deepcopy(self.student)
        enlarge(self.teacher)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(x)
        return (self.student(x) - target).square().mean()


@pytest.mark.parametrize("attention", [SdpaAttention, Attention])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_teacher_in_no_optimizer_is_watched(attention: Any, frozen: bool) -> None:
    torch.manual_seed(0)
    model = Distilled(attention)
    model.teacher.requires_grad_(not frozen)
    before = copy.deepcopy(model.teacher.state_dict())
    optimizer = torch.optim.SGD(model.student.parameters(), 1e-3)
    qk_clip = QKClip(model, threshold=1.0)
    qk_clip.attach(optimizer)
    results = []
    step = qk_clip.step
    qk_clip.step = lambda *args: results.append(step(*args))  # type: ignore[method-assign, assignment, func-returns-value]
    model(X).backward()
    optimizer.step()
    (result,) = results
    student, teacher = result.max_logits
    reason = "not trained" if frozen else "in no optimizer"
    assert qk_clip.sides == {"student.layers.0": "q and k", "teacher.layers.0": f"watched ({reason})"}
    assert torch.equal(result.max_logit, student.max()) and torch.equal(result.unowned_max_logit, teacher.max())
    assert (result.gamma[0] < 1).any() and (result.gamma[1] == 1).all()
    assert all(torch.equal(value, before[name]) for name, value in model.teacher.state_dict().items())


def test_groups_that_are_added_later_are_owned_from_then_on() -> None:
    model = large(SdpaAttention(16, 4), SdpaAttention(16, 4))
    optimizer = torch.optim.SGD(model.layers[0].parameters(), 1e-3)
    qk_clip = QKClip(model, threshold=1.0)
    qk_clip.attach(optimizer)
    model(X).sum().backward()
    optimizer.step()
    assert list(qk_clip.sides.values()) == ["q and k", "watched (in no optimizer)"]
    optimizer.add_param_group({"params": list(model.layers[1].parameters())})
    model(X)
    assert list(qk_clip.sides.values()) == ["q and k", "q and k"]


def test_of_attention_of_which_one_side_is_owned_that_side_is_scaled() -> None:
    model = large(SdpaAttention(16, 4))
    qk_clip = QKClip(model, threshold=1.0, example=((X,), {}))
    qk_clip.attach(torch.optim.SGD([*model.layers[0].q_proj.parameters()], 1e-3))
    assert list(qk_clip.sides.values()) == ["q"]


def test_unreadable_attention_that_no_optimizer_owns_is_not_refused() -> None:
    class Clamped(SdpaAttention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (p(x).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
            y = nn.functional.scaled_dot_product_attention(q.clamp(-1, 1), k.clamp(-1, 1), v)
            return y.transpose(1, 2).flatten(2)

    model = large(SdpaAttention(16, 4), Clamped(16, 4))
    optimizer = torch.optim.SGD(model.layers[0].parameters(), 1e-3)
    with QKClip(model) as qk_clip:
        qk_clip.attach(optimizer)
        model(X)
        assert "do not scale with their weights" in qk_clip.sides["layers.1"]
    with QKClip(model), pytest.raises(ValueError, match="do not scale with their weights"):
        model(X)


def test_two_optimizers_of_one_trunk_clip_it_once_a_forward() -> None:
    trunk = large(SdpaAttention(16, 4))
    heads = [nn.Linear(16, 2), nn.Linear(16, 3)]
    models = [nn.Sequential(trunk, head) for head in heads]
    twin = copy.deepcopy(models[0])
    one, two = (MuonClip(model, lr=0.0, threshold=1.0) for model in models)
    sum(model(X).square().mean() for model in models).backward()  # type: ignore[union-attr]
    one.step()
    two.step()
    alone = MuonClip(twin, lr=0.0, threshold=1.0)
    twin(X).square().mean().backward()
    alone.step()
    for a, b in zip(trunk.parameters(), twin[0].parameters()):
        assert torch.equal(a, b)
    models[1](X)
    assert (two.qk_clip.max_logits <= 1.0001).all()  # type: ignore[union-attr]


# Forwards without gradients


@pytest.mark.parametrize("attention", [SdpaAttention, Attention])
def test_an_evaluation_of_other_weights_in_a_training_step_does_not_clip(attention: Any) -> None:
    model = large(attention(16, 4))
    with QKClip(model, threshold=1e9) as qk_clip:
        model(X).sum().backward()
        seen = qk_clip.max_logits
        with torch.no_grad():
            weights = [p.clone() for p in model.parameters()]
            for p in model.parameters():
                p.mul_(10)
            model(X)
            for p, before in zip(model.parameters(), weights):
                p.copy_(before)
        assert torch.equal(qk_clip.max_logits, seen)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_once(use_reentrant: bool) -> None:
    model = large(SdpaAttention(16, 4))
    plain = copy.deepcopy(model)
    with QKClip(model) as qk_clip, QKClip(plain) as expected:
        x = X.clone().requires_grad_()
        checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
        plain(X).sum().backward()
        assert torch.equal(qk_clip.step().max_logits, expected.step().max_logits)
        assert torch.equal(qk_clip.clips, expected.clips)


# Steps that are no steps


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [3 * torch.randn(2, 5, 16, generator=generator) for _ in range(count)]


def new() -> tuple[nn.Module, MuonClip]:
    torch.manual_seed(0)
    model = large(SdpaAttention(16, 4), Attention(16, 4))
    return model, MuonClip(model, lr=1e-2, threshold=0.5, every_n_steps=3)


def train(model: nn.Module, optimizer: Any, own: list[Tensor]) -> None:
    for x in own:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_a_template_of_the_state_is_no_step() -> None:
    model, optimizer = new()
    model(X)
    before = copy.deepcopy(model.state_dict())
    seen = optimizer.qk_clip.max_logits  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_optimizer_state_dict(model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert optimizer.last is None and torch.equal(optimizer.qk_clip.max_logits, seen)  # type: ignore[union-attr]


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adagrad, lambda p: torch.optim.SGD(p, 0.1, 0.9)])
def test_nor_is_it_for_an_optimizer_that_qk_clip_is_attached_to(make: Any) -> None:
    model = large(SdpaAttention(16, 4))
    optimizer = make(model.parameters())
    qk_clip = QKClip(model, threshold=0.1)
    qk_clip.attach(optimizer)
    model(X)
    before, seen = copy.deepcopy(model.state_dict()), qk_clip.max_logits
    get_optimizer_state_dict(model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(qk_clip.max_logits, seen) and not qk_clip.clips.any()
    model(X).sum().backward()
    optimizer.step()
    assert qk_clip.clips.any()


def test_the_first_step_of_a_warmup_from_zero_is_one() -> None:
    model = large(SdpaAttention(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    qk_clip = QKClip(model, threshold=0.1)
    qk_clip.attach(optimizer)
    model(X).sum().backward()
    optimizer.step()
    assert qk_clip.clips.any()


def test_a_run_saved_by_torchs_distributed_checkpoint_goes_on_bitwise(tmp_path: Path) -> None:
    model, optimizer = new()
    train(model, optimizer, batches(11))
    part, its = new()
    train(part, its, batches(11)[:5])
    dcp.save({"model": part.state_dict(), "optimizer": get_optimizer_state_dict(part, its)}, checkpoint_id=tmp_path)
    resumed, other = new()
    state = {"model": resumed.state_dict(), "optimizer": get_optimizer_state_dict(resumed, other)}
    dcp.load(state, checkpoint_id=tmp_path)
    resumed.load_state_dict(state["model"])
    set_optimizer_state_dict(resumed, other, state["optimizer"])
    train(resumed, other, batches(11)[5:])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters()))
    assert torch.equal(optimizer.qk_clip.clips, other.qk_clip.clips)  # type: ignore[union-attr]
    assert int(other.qk_clip.clips.sum()) > 0  # type: ignore[union-attr]


# An observer's life


def test_learning_rates_are_tried_on_one_model() -> None:
    model = large(SdpaAttention(16, 4))
    for lr in (1e-3, 1e-2, 1e-1):
        optimizer = MuonClip(model, lr=lr, threshold=1.0)
        train(model, optimizer, batches(2))
        assert optimizer.last is not None and optimizer.last.max_logits.isfinite().all()
    del optimizer
    gc.collect()
    assert not any(module._forward_hooks for module in model.modules())
