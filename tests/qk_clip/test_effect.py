"""Clips that lower no logit end, clips that are undone are told of, and those that work go on."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import Residual, SdpaAttention, enlarge
from processes import on_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_muonclip import AttentionSpec, MuonClip, Projection, QKClip

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
SPEC = AttentionSpec((Projection("q_proj", "q(H d)"), Projection("k_proj", "k(G d)")), 4, sizes={"d": 4})


class Undone(SdpaAttention):
    """Attention in which something behind the weights of queries undoes their scale."""

    kind = "norm"

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.kind == "norm":
            q, k = 9 * F.normalize(q, dim=-1), 9 * F.normalize(k, dim=-1)
        elif self.kind == "clamp":
            q, k = (1000 * q).clamp(-5, 5), (1000 * k).clamp(-5, 5)
        else:  # rescaled
            q, k = (9 * x / x.detach().norm() for x in (q, k))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def messages(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    texts = [str(warning.message) for warning in caught]
    return [text for text in texts if "clips" in text]


@pytest.mark.parametrize("kind", ["norm", "clamp", "rescaled"])
@pytest.mark.parametrize("every_n_steps", [1, 2])
def test_a_clip_of_no_use_ends(kind: str, every_n_steps: int) -> None:
    torch.manual_seed(0)
    model = Residual(Undone(16, 4, bias=False), SdpaAttention(16, 4))
    enlarge(model.layers[1])
    model.layers[0].kind = kind
    qk_clip = QKClip(model, threshold=1e-2, specs={"layers.0": SPEC}, every_n_steps=every_n_steps)

    def run() -> None:
        for _ in range(40):
            model(X).sum().backward()
            qk_clip.step()

    said = messages(run)
    sizes = model.layers[0].q_proj.weight.norm(dim=-1)
    assert len(said) == 1 and "QK-Clip no longer clips attention 'layers.0', head" in said[0]
    assert qk_clip.clips[0].max() <= 8  # of 40
    run()
    assert torch.equal(model.layers[0].q_proj.weight.norm(dim=-1), sizes)
    qk_clip.close()


@pytest.mark.parametrize("growth", [1.02, 1.3, 1.7])
@pytest.mark.parametrize("groups", [4, 2])
def test_at_the_threshold_clipping_goes_on(growth: float, groups: int) -> None:
    torch.manual_seed(0)
    model = Residual(SdpaAttention(16, 4, groups))
    enlarge(model)
    generator = torch.Generator().manual_seed(0)
    with QKClip(model, threshold=1.0) as qk_clip:
        model(X)
        qk_clip.step()
        for _ in range(300):  # updates let the logits grow by so much, also by chance
            with torch.no_grad():
                for projection in (model.layers[0].q_proj, model.layers[0].k_proj):
                    chance = 1 + 0.05 * torch.randn(len(projection.weight), 1, generator=generator)
                    factor = growth if groups < 4 and projection is model.layers[0].q_proj else math.sqrt(growth)
                    factor = 1.0 if groups < 4 and projection is model.layers[0].k_proj else factor
                    projection.weight *= factor * chance
                    projection.bias *= factor * chance[:, 0]
            model(X)
            qk_clip.step()
        assert (qk_clip.clips >= 80).all() and not qk_clip.state_dict()["effect"][..., 0].any()


@pytest.mark.parametrize("shrinks", [0.99, 0.96, 0.9])
def test_logits_that_grow_although_the_weights_shrink_are_clipped(shrinks: float) -> None:
    """As they explode: updates turn queries and keys towards what is large in the residual stream, or that grows itself."""
    torch.manual_seed(0)
    model = Residual(SdpaAttention(16, 4, bias=False))
    enlarge(model)
    growth, x = 1.6, X
    with QKClip(model, threshold=1.0) as qk_clip:
        model(x)
        qk_clip.step()
        for _ in range(60):
            with torch.no_grad():
                for projection in (model.layers[0].q_proj, model.layers[0].k_proj):
                    projection.weight *= (growth * shrinks) ** 0.5
            x = x / shrinks**0.5  # so that every logit is 1.6 times the threshold again
            model(x)
            qk_clip.step()
        assert (qk_clip.clips >= 58).all()
        assert not qk_clip.state_dict()["effect"][..., 0].any()


def test_falling_logits_are_clipped_as_long_as_they_are_too_large() -> None:
    model = Residual(SdpaAttention(16, 4))
    enlarge(model)
    with QKClip(model, threshold=1.0) as qk_clip:
        for step in range(20):
            qk_clip.step([[1000 * 0.8**step] * 4] if step else None) if qk_clip.layers else model(X)
        assert (qk_clip.clips >= 18).all()


class MasterCopies(torch.optim.Optimizer):
    """SGD on float32 copies of the weights, which are then written over them, as mixed-precision optimizers do."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.copies = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.copies[p] -= group["lr"] * p.grad
                    p.copy_(self.copies[p])


class Lookahead(torch.optim.SGD):
    """Goes back to slow weights in every step."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.slow = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for p, slow in self.slow.items():
            slow += 0.02 * (p - slow)
            p.copy_(slow)


@pytest.mark.parametrize("make", [MasterCopies, Lookahead])
def test_an_optimizer_that_keeps_copies_is_noticed(make: Any) -> None:
    torch.manual_seed(0)
    model = Residual(SdpaAttention(16, 4))
    enlarge(model)
    optimizer = make(model.parameters(), lr=1e-5)
    qk_clip = QKClip(model, threshold=1.0)
    qk_clip.attach(optimizer)

    def run() -> None:
        for _ in range(8):
            optimizer.zero_grad()
            model(X).sum().backward()
            optimizer.step()

    said = messages(run)
    assert len([text for text in said if "are undone by the next step: either the optimizer keeps a copy" in text]) == 1


@pytest.mark.parametrize("lr", [1e-3, 1e-1])
def test_other_optimizers_are_not_suspected(lr: float) -> None:
    torch.manual_seed(0)
    model = Residual(SdpaAttention(16, 4))
    enlarge(model)
    optimizer = MuonClip(model, lr=lr, threshold=1.0)

    def run() -> None:
        for step in range(60):
            optimizer.zero_grad()
            x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(step))
            (-model(x).square().mean()).backward()  # logits grow
            optimizer.step()

    assert messages(run) == []
    assert optimizer.qk_clip is not None and optimizer.qk_clip.clips.max() > 5


@pytest.mark.parametrize("saved_after", [1, 2, 3, 5])
def test_a_resumed_run_decides_as_one_that_goes_on(saved_after: int) -> None:
    torch.manual_seed(0)
    model = Residual(Undone(16, 4, bias=False))
    qk_clip = QKClip(model, threshold=1e-2, specs={"layers.0": SPEC})
    for step in range(6):
        model(X)
        messages(qk_clip.step)
        if step + 1 == saved_after:
            resumed = copy.deepcopy(model)
            state = copy.deepcopy(qk_clip.state_dict())
    other = QKClip(resumed, threshold=1e-2, specs={"layers.0": SPEC})
    other.load_state_dict(state)
    for _ in range(6 - saved_after):
        resumed(X)
        messages(other.step)
    assert torch.equal(qk_clip.clips, other.clips)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters()))


def test_a_step_of_another_optimizer_in_between_forgets_nothing() -> None:
    torch.manual_seed(0)
    model = Residual(Undone(16, 4, bias=False))
    optimizers = [torch.optim.SGD(own.parameters(), 0.0) for own in (model.layers[0].q_proj, model.layers[0].k_proj)]
    qk_clip = QKClip(model, threshold=1e-2, specs={"layers.0": SPEC})
    for optimizer in optimizers:
        qk_clip.attach(optimizer)

    def run() -> None:
        for _ in range(30):
            model(X).sum().backward()
            for optimizer in optimizers:
                optimizer.step()

    assert any("no longer clips" in text for text in messages(run))
    assert qk_clip.clips.max() <= 3


def sharded(rank_count: int, folder: str) -> list[int]:
    torch.manual_seed(0)
    model = Residual(Undone(16, 4, bias=False))
    mesh = init_device_mesh("cpu", (rank_count,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with QKClip(model, threshold=1e-2, specs={"layers.0": SPEC}) as qk_clip:
        for _ in range(6):
            model(X)
            messages(qk_clip.step)
        return [*qk_clip.clips.flatten().tolist(), *qk_clip.state_dict()["effect"][..., 0].flatten().tolist()]


def test_ranks_with_shards_agree(tmp_path: Path) -> None:
    one, two = on_ranks(2, sharded, 2, str(tmp_path))
    assert one == two and one[4:] == [1, 1, 1, 1]
