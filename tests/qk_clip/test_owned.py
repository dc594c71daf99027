"""QK-Clip scales what the run trains, in steps that are steps, and nothing else."""

from __future__ import annotations

import copy
import gc
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.tuner import Tuner
from oracles import Residual, SdpaAttention, enlarge
from processes import on_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from lightning_muonclip import Attention, MuonClip, MuonClipCallback, QKClip

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


@pytest.mark.parametrize("frozen", [False, True])
def test_what_the_run_does_not_train_is_not_refused_for_its_norms_either(frozen: bool) -> None:
    model = nn.ModuleDict({"student": SdpaAttention(16, 4), "teacher": Attention(16, 4, qk_norm=True)})
    model["teacher"].requires_grad_(not frozen)
    optimizer = torch.optim.SGD(model["student"].parameters(), 1e-3)
    with QKClip(model["student"], qk_norm="error") as alone:
        assert alone.layers == []
    if frozen:
        with QKClip(model, qk_norm="error") as qk_clip:
            qk_clip.attach(optimizer)
            assert qk_clip.sides == {"teacher": "watched (not trained)"}


def test_a_qk_clip_that_clips_nothing_hides_nothing_from_another() -> None:
    model = large(SdpaAttention(16, 4))
    with QKClip(model, threshold=1e6) as one, QKClip(model, threshold=1.0) as two:
        model(X)
        assert one.step().clipped_heads == 0
        assert two.step().clipped_heads > 0


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
    optimizer = torch.optim.SGD([*model.layers[0].q_proj.parameters()], 1e-3)
    qk_clip.attach(optimizer)
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
        assert qk_clip.sides["layers.1"].startswith("watched (its queries do not scale")
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


@pytest.mark.parametrize("flat", [False, True])
def test_a_run_saved_by_torchs_distributed_checkpoint_goes_on_bitwise(tmp_path: Path, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = new()
    train(model, optimizer, batches(11))
    part, its = new()
    train(part, its, batches(11)[:5])
    saved = {"model": part.state_dict(), "optimizer": get_optimizer_state_dict(part, its, options=options)}
    dcp.save(saved, checkpoint_id=tmp_path)
    resumed, other = new()
    state = {"model": resumed.state_dict(), "optimizer": get_optimizer_state_dict(resumed, other, options=options)}
    dcp.load(state, checkpoint_id=tmp_path)
    resumed.load_state_dict(state["model"])
    set_optimizer_state_dict(resumed, other, state["optimizer"], options=options)
    train(resumed, other, batches(11)[5:])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters()))
    assert torch.equal(optimizer.qk_clip.clips, other.qk_clip.clips)  # type: ignore[union-attr]
    assert int(other.qk_clip.clips.sum()) > 0  # type: ignore[union-attr]


def sharded_round_trip(rank_count: int, folder: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The weights and counts of a run under FSDP2 that goes on from a checkpoint, and the counts of one run whole."""
    mesh = init_device_mesh("cpu", (rank_count,))

    def made() -> tuple[nn.Module, MuonClip]:
        torch.manual_seed(0)
        model = large(SdpaAttention(16, 4), SdpaAttention(16, 4, 2))
        for layer in model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, MuonClip(model, lr=1e-2, threshold=0.5, every_n_steps=3)

    whole, optimizer = made()
    train(whole, optimizer, batches(8))
    part, its = made()
    train(part, its, batches(8)[:4])
    dcp.save({"model": part.state_dict(), "optimizer": get_optimizer_state_dict(part, its)}, checkpoint_id=folder)
    model, other = made()
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, other)}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, other, state["optimizer"])
    train(model, other, batches(8)[4:])
    for a, b in zip(whole.parameters(), model.parameters()):
        assert torch.equal(a.full_tensor(), b.full_tensor())  # type: ignore[attr-defined]
    weights = {name: p.full_tensor().detach() for name, p in model.named_parameters()}  # type: ignore[attr-defined]
    return weights, other.qk_clip.clips, optimizer.qk_clip.clips  # type: ignore[union-attr]


def test_so_does_one_under_fsdp2(tmp_path: Path) -> None:
    for weights, found, expected in on_ranks(2, sharded_round_trip, 2, str(tmp_path)):
        assert torch.equal(found, expected) and found.sum() > 0
        assert all(value.isfinite().all() for value in weights.values())


class Looking(pl.Callback):
    """Looks at the state of the optimizers when training starts, before they have one, and perhaps after every batch."""

    def __init__(self, always: bool) -> None:
        self.always = always

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        before = copy.deepcopy(pl_module.state_dict())
        for optimizer in trainer.optimizers:
            get_optimizer_state_dict(pl_module, optimizer)
        assert all(torch.equal(value, before[name]) for name, value in pl_module.state_dict().items())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        for optimizer in trainer.optimizers if self.always else ():
            get_optimizer_state_dict(pl_module, optimizer)


class Lit(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = large(SdpaAttention(16, 4))
        self.bias = nn.Parameter(torch.zeros(16))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.model(batch) + self.bias).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("exclude", [(), ("*q_proj*",)])
def test_looking_at_the_states_in_a_fit_changes_nothing(tmp_path: Path, exclude: tuple[str, ...]) -> None:
    runs = []
    for always in (False, True):  # the first look counts as a step of AdamW in both, as torch does it
        callback, module = MuonClipCallback(threshold=0.5, every_n_steps=2, exclude=exclude), Lit()
        trainer = pl.Trainer(
            max_steps=5,
            accelerator="cpu",
            callbacks=[callback, Looking(always)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, torch.utils.data.DataLoader(torch.cat(batches(5)), batch_size=2))
        assert callback.qk_clip is not None and callback.qk_clip.clips.any()
        runs.append((module.state_dict(), callback.qk_clip.clips))
    (expected, clips), (found, others_clips) = runs
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert torch.equal(clips, others_clips)


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


class LitMuonClip(Lit):
    """Makes a new optimizer for every fit."""

    lr = 1e-3

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return MuonClip(self, lr=self.lr, threshold=0.5)


def trainer_of(folder: Path, *callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        max_steps=4,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


@pytest.mark.parametrize("way", ["fit", "lr_find", "rates"])
def test_a_module_that_makes_its_optimizer_anew_is_fitted_again(tmp_path: Path, way: str) -> None:
    module, data = LitMuonClip(), torch.utils.data.DataLoader(torch.cat(batches(4)), batch_size=2)
    trainer = trainer_of(tmp_path)
    if way == "lr_find":
        Tuner(trainer).lr_find(module, data, num_training=5)
    elif way == "fit":
        trainer.fit(module, data)
        trainer = trainer_of(tmp_path)
    for lr in (1e-3, 1e-2) if way == "rates" else (1e-3,):
        module.lr = lr
        trainer = trainer_of(tmp_path) if way == "rates" else trainer
        trainer.fit(module, data)
        (optimizer,) = trainer.optimizers
        assert optimizer.last.max_logits.isfinite().all() and optimizer.qk_clip.clips.any()
