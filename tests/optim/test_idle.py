"""A matrix, an expert or a part of a fused weight whose gradient is all zero moves by weight decay alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_muonclip import Muon

LR, DECAY, MOMENTUM = 0.02, 0.1, 0.95
#: For each kind: the shape of the weight, options of its group, its parts, and the matrices in it.
Cut = Callable[[Tensor], list[Tensor]]
ROWS = [torch.tensor([0, 2, 4]), torch.tensor([1, 3, 5]), torch.arange(6, 10)]
KINDS: dict[str, tuple[tuple[int, ...], dict[str, Any], tuple[int, list[Tensor]] | None, Cut]] = {
    "matrices": ((3, 6, 4), {}, None, list),
    "experts": ((3, 6, 4), {"kind": "experts"}, None, list),
    "layers of experts": ((3, 2, 4, 6), {"kind": "experts"}, None, lambda w: list(w.flatten(0, 1))),
    "convolutions": ((3, 5, 2, 2, 2), {"kind": "convolution"}, None, lambda w: [own.flatten(1) for own in w]),
    "parts": ((10, 7), {}, (0, ROWS), lambda w: [w[rows] for rows in ROWS]),
    "transposed parts": ((7, 10), {}, (1, ROWS), lambda w: [w[:, rows].mT for rows in ROWS]),
}
EACH = ("matrices", "convolutions")  # one parameter per entry of the first dimension


def make(kind: str, start: Tensor, **options: Any) -> tuple[Muon, list[nn.Parameter]]:
    _, group, parts, _ = KINDS[kind]
    params = [nn.Parameter(w.clone()) for w in (start if kind in EACH else [start])]
    own = {} if parts is None else {params[0]: parts}
    groups = [{"params": params, **group}]
    return Muon(groups, LR, DECAY, MOMENTUM, parts=own, ns_coefficients="jordan", eps=0.0, **options), params


def whole(kind: str, params: list[nn.Parameter]) -> Tensor:
    return torch.stack([p.detach() for p in params]) if kind in EACH else params[0].detach()


def gradient(kind: str, step: int, idle: list[int]) -> Tensor:
    """Random, with zeros for the idle matrices from the second step on."""
    grad = torch.randn(KINDS[kind][0], generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    if step:
        if (parts := KINDS[kind][2]) is not None:
            for i in idle:
                grad.index_fill_(parts[0], parts[1][i], 0.0)
        else:
            for i in idle:
                grad[i] = 0
    return grad


def torch_alone(start: Tensor, grads: list[Tensor], nesterov: bool) -> Tensor:
    """One matrix, by torch.optim.Muon where there is a gradient, and by hand where there is none."""
    param = nn.Parameter(start.clone())
    optimizer = torch.optim.Muon([param], LR, DECAY, MOMENTUM, nesterov, eps=0.0)
    for grad in grads:
        if grad.count_nonzero():
            param.grad = grad.clone()
            optimizer.step()
        else:
            optimizer.state[param]["momentum_buffer"].mul_(MOMENTUM)
            param.data.mul_(1 - LR * DECAY)
    return param.detach()


@pytest.mark.parametrize("stack_numel", [None, 30])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("idle", [[1], [0, 2]])
@pytest.mark.parametrize("kind", KINDS)
def test_only_what_has_a_gradient_moves(
    kind: str, idle: list[int], nesterov: bool, stack_numel: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch.optim.Muon then works in float64
    cut = KINDS[kind][3]
    start = torch.randn(KINDS[kind][0], generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    optimizer, params = make(kind, start, nesterov=nesterov, dtype=torch.float64, stack_numel=stack_numel)
    grads = [gradient(kind, step, idle if step < 4 else []) for step in range(6)]  # they come back to life
    for grad in grads:
        for p, own in zip(params, grad if kind in EACH else [grad]):
            p.grad = own.clone()
        optimizer.step()
    for i, (actual, first) in enumerate(zip(cut(whole(kind, params)), cut(start))):
        expected = torch_alone(first, [cut(grad)[i] for grad in grads], nesterov)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_in_any_dtype_weights_without_a_gradient_do_not_drift(kind: str, dtype: torch.dtype) -> None:
    start = torch.randn(KINDS[kind][0], generator=torch.Generator().manual_seed(99)).to(dtype)
    optimizer, params = make(kind, start, dtype=torch.float32)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for step in range(60):
        for p in params:
            p.grad = torch.ones_like(p) if step == 0 else torch.zeros_like(p)
        optimizer.step()
        if step == 0:
            after = whole(kind, params).clone()
    assert not torch.equal(after, start)
    assert torch.equal(whole(kind, params), after)
    for p in params:  # what is left of the first gradient
        expected = torch.full_like(p, 0.05 * 0.95**59)
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], expected, rtol=0.3, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 1e-44), (torch.float32, 1e-30), (torch.bfloat16, 1e-38), (torch.float16, 1e-7)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_gradient_is_one(kind: str, dtype: torch.dtype, size: float) -> None:
    """The step goes on along the momentum, at full length."""
    start = torch.zeros(KINDS[kind][0], dtype=dtype)
    optimizer, params = make(kind, start, dtype=torch.float32)
    moved = []
    for step in range(2):
        before = whole(kind, params).clone()
        for p in params:
            p.grad = torch.ones_like(p) if step == 0 else torch.full_like(p, size)
            assert p.grad.count_nonzero() == p.numel()
        optimizer.step()
        moved.append((whole(kind, params) - before).float().norm())
    torch.testing.assert_close(moved[1], moved[0], rtol=0.02, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_no_idle_one(bad: float) -> None:
    params = [nn.Parameter(torch.zeros(3, 4)) for _ in range(2)]
    for p, value in zip(params, (bad, 0.0)):
        p.grad = torch.full_like(p, value)
    Muon(params, dtype=torch.float32).step()
    assert not params[0].isfinite().any()
    assert torch.equal(params[1], torch.zeros(3, 4))


def test_empty_weights_are_idle() -> None:
    params = [nn.Parameter(torch.zeros(shape)) for shape in ((0, 4), (3, 4), (2, 0))]
    for p in params:
        p.grad = torch.ones_like(p)
    Muon([*params], dtype=torch.float32).step()
    assert params[1].count_nonzero() == 12
