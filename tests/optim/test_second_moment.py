"""NorMuon, against its formula in float64; and momentum in another dtype."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_muonclip import Muon, orthogonalize
from lightning_muonclip.optim.momentum import rounded_by_chance

LR, BETA, STEPS = 0.1, 0.8, 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Oracle:
    """One matrix (out, in): a running mean of the mean squares of each row divides it; its norm stays.

    This is the formula of NorMuon (arXiv 2510.05491) as Dion has it; a wide matrix has it for its columns.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.weight = matrix.detach().clone()
        self.momentum = torch.zeros_like(matrix)
        self.is_wide = matrix.shape[1] > matrix.shape[0]
        self.mean = torch.zeros(max(matrix.shape), 1, dtype=torch.float64)

    def step(self, grad: Tensor) -> None:
        self.momentum = 0.95 * self.momentum + 0.05 * grad
        u = orthogonalize(0.05 * grad + 0.95 * self.momentum, dtype=torch.float64)
        rows = u.T if self.is_wide else u
        self.mean = BETA * self.mean + (1 - BETA) * rows.square().mean(1, keepdim=True)
        rows = rows / (self.mean.sqrt() + 1e-8)
        rows = rows * u.norm() / rows.norm()
        scale = max(1, u.shape[0] / u.shape[1]) ** 0.5
        self.weight -= LR * scale * (rows.T if self.is_wide else rows)


def both(param: Tensor, kind: str, parts: Any, cut: Any) -> tuple[Tensor, Tensor]:
    """A weight after some steps, and its matrices by the oracle, in one vector each."""
    p = nn.Parameter(param.clone())
    group = {"params": [p], "kind": kind}
    options: dict[str, Any] = {"second_moment": "rows", "second_moment_beta": BETA, "dtype": torch.float64}
    optimizer = Muon([group], LR, 0.0, parts={p: parts} if parts else None, **options)
    oracles = [Oracle(part) for part in cut(param)]
    for seed in range(STEPS):
        p.grad = draw(*param.shape, seed=1 + seed)
        for oracle, grad in zip(oracles, cut(p.grad)):
            oracle.step(grad)
        optimizer.step()
    found = torch.cat([part.detach().flatten() for part in cut(p)])
    return found, torch.cat([oracle.weight.flatten() for oracle in oracles])


IN_TURNS = (2, [range(0, 6, 2), range(1, 6, 2)])
CASES: dict[str, tuple[tuple[int, ...], str, Any, Any]] = {
    "tall": ((6, 4), "matrix", None, lambda w: [w]),
    "square": ((5, 5), "matrix", None, lambda w: [w]),
    "wide": ((4, 6), "matrix", None, lambda w: [w]),
    "tall and wide parts": ((9, 4), "matrix", (0, [range(6), range(6, 9)]), lambda w: [w[:6], w[6:]]),
    "transposed parts": ((4, 9), "matrix", (1, [range(6), range(6, 9)]), lambda w: [w.T[:6], w.T[6:]]),
    "experts": ((3, 4, 6), "experts", None, list),
    "experts in turns": (
        (2, 4, 6),
        "experts",
        IN_TURNS,
        lambda w: [part for own in w.mT for part in (own[::2], own[1::2])],
    ),
    "convolution": ((4, 2, 3, 3), "convolution", None, lambda w: [w.flatten(1)]),
    "tall convolution": ((9, 2, 2), "convolution", None, lambda w: [w.flatten(1)]),
}


@pytest.mark.parametrize("case", CASES)
def test_normuon_is_its_formula(case: str) -> None:
    shape, kind, parts, cut = CASES[case]
    found, expected = both(draw(*shape, seed=9), kind, parts, cut)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_what_does_not_move_is_not_normalized() -> None:
    p = nn.Parameter(torch.randn(3, 4, 6))
    optimizer = Muon([{"params": [p], "kind": "experts"}], LR, 0.0, second_moment="rows")
    p.grad = torch.randn(3, 4, 6)
    p.grad[1] = 0
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p[1], before[1])
    assert optimizer.state[p]["second_moment"].shape == (3, 6)
    assert (p[[0, 2]] != before[[0, 2]]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"second_moment": "row"}, "unknown second_moment 'row'; use 'rows', or None"),
        ({"second_moment_beta": 1.0}, r"second_moment_beta must be in \[0, 1\), got 1.0"),
        ({"momentum_dtype": "int8"}, "momentum_dtype must be a floating-point torch.dtype, .* got 'int8'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon([nn.Parameter(torch.randn(2, 2))], **options)


class TestMomentumDtype:
    def test_rounding_is_to_a_neighbour_and_right_in_the_mean(self) -> None:
        x = torch.tensor([1.0, -1.0, 1e-20, 1e38, 0.0]).repeat_interleave(20_000) * (
            1 + draw(100_000).float().abs() / 4
        )
        rounded = rounded_by_chance(x, draw(100_000, seed=1).float()).float()
        step = torch.finfo(torch.bfloat16).eps * 2 ** x.abs().log2().floor()
        error = torch.where(x == 0, 0.0, (rounded - x) / step).nan_to_num(0.0)
        assert error.abs().max() < 1
        # The mean of n errors, each uniform within a step at most, deviates by sqrt(1/6/n); six of these do not happen.
        assert error.view(5, -1).mean(1).abs().max() < 6 * (1 / 6 / 20_000) ** 0.5
        same = x.to(torch.bfloat16).float()
        assert torch.equal(rounded_by_chance(same, x).float(), same)
        special = torch.tensor([float("inf"), float("-inf"), float("nan")])
        assert torch.equal(rounded_by_chance(special, special).float().nan_to_num(7), special.nan_to_num(7))

    def test_small_gradients_are_not_lost(self) -> None:
        p = nn.Parameter(torch.zeros(64, 64))
        optimizer = Muon([p], 0.0, 0.0, momentum=0.999, momentum_dtype="bfloat16")
        generator = torch.Generator().manual_seed(0)
        for _ in range(400):  # a change of 0.001 of what it is would be rounded away each time
            p.grad = 1 + 0.1 * torch.randn(64, 64, generator=generator)
            optimizer.step()
        buffer = optimizer.state[p]["momentum_buffer"]
        assert buffer.dtype == torch.bfloat16
        assert float(buffer.float().mean()) == pytest.approx(1 - 0.999**400, rel=0.01)

    @pytest.mark.parametrize(("weights", "momentum"), [("float32", "bfloat16"), ("bfloat16", "float32")])
    def test_a_resumed_run_is_the_same(self, weights: str, momentum: str) -> None:
        dtype = getattr(torch, weights)
        whole, part = (nn.Parameter(draw(6, 4).to(dtype)) for _ in range(2))
        options: dict[str, Any] = {"momentum_dtype": momentum, "second_moment": "rows"}
        optimizer, first = Muon([whole], **options), Muon([part], **options)

        def stepped(optimizer: Muon, p: nn.Parameter, seeds: range) -> None:
            for seed in seeds:
                p.grad = draw(6, 4, seed=seed).to(dtype)
                optimizer.step()

        stepped(optimizer, whole, range(4))
        stepped(first, part, range(2))
        second = Muon([part], **options)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        assert second.state[part]["momentum_buffer"].dtype == getattr(torch, momentum)
        assert second.state[part]["second_moment"].dtype == torch.float32
        stepped(second, part, range(2, 4))
        assert torch.equal(whole, part)
