from __future__ import annotations

import copy
import io
import math
import pickle
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightning_muonclip.optim.step as step_module
from lightning_muonclip import Muon, orthogonalize
from lightning_muonclip.optim.options import LR_ADJUSTMENTS

# Square, tall and wide; those that are alike are stacked.
SHAPES = [(6, 6), (9, 4), (4, 9), (9, 4), (6, 6), (9, 4), (1, 5)]
LR = 0.02
STEPS = 10
JORDAN_SLOPE = 485  # of five steps at zero: how far a rounding error of the first product can grow


def matrices(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def train(optimizer: Optimizer, params: Iterable[Tensor], steps: Iterable[int] = range(STEPS)) -> None:
    """Steps on gradients that differ in every step and are the same for every optimizer."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def assert_all_equal(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def assert_all_close(actual: Iterable[Tensor], expected: Iterable[Tensor], atol: float) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=atol)


def states(optimizer: Optimizer, params: Iterable[Tensor], key: str = "momentum_buffer") -> list[Tensor]:
    return [optimizer.state[p][key] for p in params]


def twin(params: Iterable[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


class TestAgainstTorch:
    """torch.optim.Muon always works in bfloat16; with ``Tensor.bfloat16`` as a clone it works in the gradient's dtype."""

    @pytest.fixture
    def exact_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)

    @pytest.mark.usefixtures("exact_torch")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("adjust_lr_fn", [None, "original", "match_rms_adamw"])
    @pytest.mark.parametrize("nesterov", [True, False])
    @pytest.mark.parametrize("weight_decay", [0.0, 0.3])
    def test_same_trajectory(
        self, dtype: torch.dtype, adjust_lr_fn: str | None, nesterov: bool, weight_decay: float
    ) -> None:
        ours, theirs = matrices(dtype=dtype), matrices(dtype=dtype)
        # torch clamps the norm by eps where we add it, a difference of 1e-7 that float64 would show.
        options = {
            "lr": LR,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "adjust_lr_fn": adjust_lr_fn,
            "eps": 0.0 if dtype == torch.float64 else 1e-7,
        }
        optimizer = Muon(ours, ns_coefficients="jordan", dtype=dtype, **options)
        oracle = torch.optim.Muon(theirs, **options)
        train(optimizer, ours)
        train(oracle, theirs)
        rounding = 4 * torch.finfo(dtype).eps * JORDAN_SLOPE
        largest_scale = max(LR_ADJUSTMENTS[adjust_lr_fn or "original"](*shape) for shape in SHAPES)
        assert_all_close(ours, theirs, atol=STEPS * LR * largest_scale * rounding)
        assert_all_equal(states(optimizer, ours), states(oracle, theirs))

    @pytest.mark.usefixtures("exact_torch")
    @pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
    @pytest.mark.parametrize("coefficients", [(2.0, -1.5, 0.5), (3.4445, -4.7750, 2.0315)])
    @pytest.mark.parametrize("ns_steps", [1, 4])
    def test_same_trajectory_with_other_settings(
        self, momentum: float, coefficients: tuple[float, float, float], ns_steps: int
    ) -> None:
        ours, theirs = matrices(dtype=torch.float64), matrices(dtype=torch.float64)
        options = {"lr": LR, "momentum": momentum, "ns_coefficients": coefficients, "ns_steps": ns_steps, "eps": 0.0}
        train(Muon(ours, dtype=torch.float64, **options), ours)
        train(torch.optim.Muon(theirs, **options), theirs)
        assert_all_close(ours, theirs, atol=1e-12)

    def test_in_bfloat16_we_are_as_near_to_exact_as_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Both round, differently; so neither may be far from exact, and ours not farther than torch's."""
        shapes = [(24, 24), (32, 12), (12, 32), (32, 12)]
        start, ours, theirs, exact = (matrices(shapes) for _ in range(4))
        options = {"lr": LR, "weight_decay": 0.1}
        optimizer = Muon(ours, ns_coefficients="jordan", dtype=torch.bfloat16, **options)
        oracle = torch.optim.Muon(theirs, **options)
        train(optimizer, ours)
        train(oracle, theirs)
        assert_all_equal(states(optimizer, ours), states(oracle, theirs))
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
        train(torch.optim.Muon(exact, **options), exact)
        for p, a, b, e in zip(start, ours, theirs, exact):
            # Measured: 0.005 to 0.006 of the way moved, one and a half units of bfloat16.
            moved, unit = (e - p).norm(), 2**-8
            assert 0 < (a - e).norm() / moved < 3 * unit
            assert 0 < (b - e).norm() / moved < 3 * unit
            assert (a - e).norm() < 1.25 * (b - e).norm()
            assert (a - b).norm() / moved < 4 * unit

    @pytest.mark.usefixtures("exact_torch")
    def test_state_dict_goes_to_torch(self) -> None:
        ours = matrices()
        optimizer = Muon(ours, LR, nesterov=False, ns_coefficients="jordan", dtype=torch.float32)
        train(optimizer, ours, range(5))
        theirs = twin(ours)
        oracle = torch.optim.Muon(theirs, lr=0.5, momentum=0.1)
        oracle.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(optimizer, ours, range(5, 10))
        train(oracle, theirs, range(5, 10))
        assert_all_close(ours, theirs, atol=1e-4)
        assert_all_equal(states(optimizer, ours), states(oracle, theirs))

    @pytest.mark.usefixtures("exact_torch")
    @pytest.mark.parametrize("named", [True, False])
    def test_state_dict_comes_from_torch(self, named: bool) -> None:
        theirs = matrices()
        oracle = torch.optim.Muon(theirs, LR, nesterov=False, adjust_lr_fn="match_rms_adamw")
        train(oracle, theirs, range(5))
        ours = twin(theirs)
        given = [(f"w{i}", p) for i, p in enumerate(ours)] if named else ours
        optimizer = Muon(given, lr=0.5, momentum=0.1, ns_coefficients="polar_express", dtype=torch.float32)
        optimizer.load_state_dict(copy.deepcopy(oracle.state_dict()))
        train(optimizer, ours, range(5, 10))
        train(oracle, theirs, range(5, 10))
        assert_all_close(ours, theirs, atol=1e-4)
        assert_all_equal(states(optimizer, ours), states(oracle, theirs))


class TestUpdate:
    @pytest.mark.parametrize(
        ("adjust_lr_fn", "square", "tall", "wide"),
        [
            (None, 1.0, 2.0, 1.0),
            ("original", 1.0, 2.0, 1.0),
            ("match_rms_adamw", 0.2 * 3, 0.2 * 4, 0.2 * 4),
            ("spectral_unclamped", 1.0, 2.0, 0.5),
        ],
    )
    def test_scale_by_shape(self, adjust_lr_fn: str | None, square: float, tall: float, wide: float) -> None:
        params = matrices([(9, 9), (16, 4), (4, 16)], torch.float64)
        before = twin(params)
        train(Muon(params, LR, 0.0, adjust_lr_fn=adjust_lr_fn, dtype=torch.float64), params, [0])
        for p, old, scale in zip(params, before, (square, tall, wide)):
            # The first update has the direction of the gradient, whatever the momentum.
            direction = orthogonalize(p.grad, dtype=torch.float64)
            torch.testing.assert_close(p, old - LR * scale * direction, rtol=0, atol=1e-6)

    def test_weight_decay_is_decoupled(self) -> None:
        params, undecayed = matrices(dtype=torch.float64), matrices(dtype=torch.float64)
        before = twin(params)
        train(Muon(params, LR, weight_decay=0.5, dtype=torch.float64), params, [0])
        train(Muon(undecayed, LR, weight_decay=0.0, dtype=torch.float64), undecayed, [0])
        assert_all_close(params, [q - LR * 0.5 * old for q, old in zip(undecayed, before)], atol=1e-14)

    @pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10])
    def test_the_step_does_not_depend_on_the_scale_of_gradients(self, scale: float) -> None:
        params, scaled = matrices(), matrices()
        optimizer, rescaled = (Muon(p, LR, dtype=torch.float32) for p in (params, scaled))
        for _ in range(3):
            for p, q in zip(params, scaled):
                p.grad = torch.randn_like(p)
                q.grad = p.grad * scale
            optimizer.step()
            rescaled.step()
        assert_all_close(scaled, params, atol=1e-4)

    @pytest.mark.parametrize("nesterov", [True, False])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_the_momentum_buffer_is_the_running_mean_of_gradients(self, nesterov: bool, dtype: torch.dtype) -> None:
        params = matrices(dtype=dtype)
        optimizer = Muon(params, LR, nesterov=nesterov, dtype=dtype)
        expected = [torch.zeros_like(p) for p in params]
        for step in range(3):
            train(optimizer, params, [step])
            expected = [mean.lerp(p.grad, 1 - 0.95) for mean, p in zip(expected, params)]
        assert_all_equal(states(optimizer, params), expected)

    def test_gradients_are_not_modified(self) -> None:
        params = matrices()
        optimizer = Muon(params, LR)
        train(optimizer, params, [0])
        before = [p.grad.clone() for p in params]
        optimizer.step()
        assert_all_equal([p.grad for p in params], before)

    @pytest.mark.parametrize("algorithm", ["muon", "adamw"])
    def test_a_parameter_without_gradient_is_left_alone(self, algorithm: str) -> None:
        params = matrices()
        before = twin(params)
        optimizer = Muon([{"params": params, "algorithm": algorithm}], LR, weight_decay=0.5)
        train(optimizer, params[::2])
        assert_all_equal(params[1::2], before[1::2])
        assert all(p not in optimizer.state for p in params[1::2])
        assert not any(torch.equal(p, old) for p, old in zip(params[::2], before[::2]))

    def test_no_gradient_at_all_is_no_step(self) -> None:
        params = matrices()
        Muon(params, LR).step()
        assert_all_equal(params, matrices())

    def test_a_non_finite_gradient_spoils_its_own_matrix_only(self) -> None:
        params, clean = matrices(), matrices()
        optimizer, reference = Muon(params, LR), Muon(clean, LR)
        train(optimizer, params, [0])
        train(reference, clean, [0])
        params[1].grad[0, 0] = math.nan
        optimizer.step()
        reference.step()
        assert not params[1].isfinite().any()
        assert_all_equal(params[:1] + params[2:], clean[:1] + clean[2:])

    @pytest.mark.parametrize("shape", [(), (1,)])
    @pytest.mark.parametrize("algorithm", ["muon", "adamw"])
    def test_tensor_learning_rate(self, shape: tuple[int, ...], algorithm: str) -> None:
        params, reference = matrices(), matrices()
        lr = torch.full(shape, LR)
        optimizer = Muon([{"params": params, "algorithm": algorithm}], lr, dtype=torch.float32)
        twin_optimizer = Muon([{"params": reference, "algorithm": algorithm}], LR, dtype=torch.float32)
        train(optimizer, params)
        train(twin_optimizer, reference)
        assert_all_close(params, reference, atol=1e-6)
        lr.zero_()  # the optimizer reads the tensor, not a copy of its number
        before = twin(params)
        train(optimizer, params)
        assert_all_equal(params, before)

    def test_closure(self) -> None:
        params = matrices([(4, 4)])
        reference = matrices([(4, 4)])
        optimizer, twin_optimizer = Muon(params, LR), Muon(reference, LR)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = params[0].square().sum()
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        reference[0].square().sum().backward()
        twin_optimizer.step()
        assert loss.item() == matrices([(4, 4)])[0].square().sum().item()
        assert_all_equal(params, reference)


class TestStacking:
    @pytest.fixture
    def stacks(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []

        def spy(x: Tensor, **options: Any) -> Tensor:
            shapes.append(tuple(x.shape))
            return orthogonalize(x, **options)

        monkeypatch.setattr(step_module, "orthogonalize", spy)
        return shapes

    def test_same_shapes_go_together(self, stacks: list[tuple[int, ...]]) -> None:
        params = matrices()
        train(Muon(params), params, [0])
        assert sorted(stacks) == [(1, 1, 5), (2, 6, 6), (4, 4, 9)]  # one is (4, 9), three are transposed

    def test_dtypes_do_not_mix(self, stacks: list[tuple[int, ...]]) -> None:
        params = [*matrices([(3, 3)]), *matrices([(3, 3)], torch.float64), *matrices([(3, 3)])]
        train(Muon(params), params, [0])
        assert sorted(stacks) == [(1, 3, 3), (2, 3, 3)]

    def test_stacks_are_bounded(self, stacks: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(step_module, "most_stacked", lambda *_: 2 * 12 + 5)
        params = matrices([(3, 4)] * 5)
        train(Muon(params), params, [0])
        assert stacks == [(2, 3, 4), (2, 3, 4), (1, 3, 4)]

    def test_the_bound_is_a_setting(self, stacks: list[tuple[int, ...]]) -> None:
        params = matrices([(3, 4)] * 5)
        train(Muon(params, stack_numel=24), params, [0])
        assert stacks == [(2, 3, 4), (2, 3, 4), (1, 3, 4)]
        stacks.clear()
        experts = matrices([(5, 3, 4)])
        train(Muon([{"params": experts, "kind": "experts"}], stack_numel=24), experts, [0])
        assert stacks == [(2, 3, 4), (2, 3, 4), (1, 3, 4)]

    def test_stacked_equals_unstacked(self, stacks: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
        stacked, single = matrices(dtype=torch.float64), matrices(dtype=torch.float64)
        train(Muon(stacked, LR, dtype=torch.float64), stacked)
        assert max(shape[0] for shape in stacks) == 4
        stacks.clear()
        monkeypatch.setattr(step_module, "most_stacked", lambda *_: 0)
        train(Muon(single, LR, dtype=torch.float64), single)
        assert {shape[0] for shape in stacks} == {1}
        assert_all_close(stacked, single, atol=1e-12)


class TestAdamW:
    def test_groups_equal_torch_to_the_bit_beside_muon(self) -> None:
        settings: list[dict[str, Any]] = [
            {},
            {"lr": 0.1, "weight_decay": 0.0},
            {"betas": (0.5, 0.9), "eps": 1e-4},
            {"betas": (0.0, 0.99), "eps": 0.0, "weight_decay": 1.0},
        ]
        shapes = [(5,), (3, 4), (2, 3, 4), ()]
        hidden, ours, theirs = matrices(), matrices(shapes * 4), matrices(shapes * 4)
        alone = matrices()
        groups = [
            {"params": ours[4 * i : 4 * i + 4], "algorithm": "adamw", **options} for i, options in enumerate(settings)
        ]
        optimizer = Muon([*groups, {"params": hidden}], lr=0.01, weight_decay=0.1)
        oracle = torch.optim.AdamW(
            [{"params": theirs[4 * i : 4 * i + 4], **options} for i, options in enumerate(settings)],
            lr=0.01,
            weight_decay=0.1,
        )
        muon = Muon(alone, lr=0.01, weight_decay=0.1)
        for step in range(STEPS):
            train(oracle, theirs, [step])
            train(muon, alone, [step])
            for p, reference in zip(ours + hidden, theirs + alone):
                p.grad = reference.grad
            optimizer.step()
        assert_all_equal(ours, theirs)
        assert_all_equal(hidden, alone)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert_all_equal(states(optimizer, ours, key), states(oracle, theirs, key))

    def test_a_group_added_later(self) -> None:
        params, late, reference = matrices(), matrices([(4,)]), matrices([(4,)])
        optimizer = Muon(params, LR)
        optimizer.add_param_group({"params": late, "algorithm": "adamw"})
        train(optimizer, late)
        train(torch.optim.AdamW(reference, LR, weight_decay=0.1), reference)
        assert_all_equal(late, reference)


class Reads(TorchDispatchMode):
    """Counts how often a number is read from a tensor on the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class TestHostSynchronisation:
    @staticmethod
    def reads(lr: float | Tensor = LR, **options: Any) -> int:
        params = matrices()
        optimizer = Muon(params, lr, adjust_lr_fn="match_rms_adamw", **options)
        train(optimizer, params, [0])
        with Reads() as reads:
            optimizer.step()
        return reads.count

    @pytest.mark.parametrize("lr", [LR, torch.tensor(LR)])
    def test_a_step_reads_nothing(self, lr: float | Tensor) -> None:
        assert self.reads(lr) == 0

    @pytest.mark.parametrize("lr", [LR, torch.tensor(LR)])
    def test_nor_does_it_with_every_option(self, lr: float | Tensor) -> None:
        options = {"second_moment": "rows", "cautious_weight_decay": True, "momentum_dtype": "bfloat16"}
        assert self.reads(lr, **options, track_stats=True, weight_decay=lambda step: 0.1) == 0

    @pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: bool(x.isfinite().all())])
    def test_a_read_would_be_seen(self, read: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
        def reading(x: Tensor, **options: Any) -> Tensor:
            read(x)
            return orthogonalize(x, **options)

        monkeypatch.setattr(step_module, "orthogonalize", reading)
        assert self.reads() == 3  # one a stack

    def test_a_step_needs_no_data(self) -> None:
        param = nn.Parameter(torch.empty(4, 3, device="meta"))
        param.grad = torch.empty_like(param)
        Muon([param], LR).step()
        with pytest.raises(RuntimeError, match="meta"):
            param.sum().item()


class TestCheckpoints:
    @staticmethod
    def setting(**options: Any) -> tuple[list[nn.Parameter], list[nn.Parameter], Muon]:
        hidden, rest = matrices(), matrices([(5,), (3, 4)])
        groups = [{"params": hidden}, {"params": rest, "algorithm": "adamw", "betas": (0.9, 0.95)}]
        return hidden, rest, Muon(groups, **{"lr": LR, "momentum": 0.9, "dtype": torch.float32} | options)

    @pytest.mark.parametrize("lr", [LR, torch.tensor(LR)])
    @pytest.mark.parametrize("ns_coefficients", [None, "jordan", ((4.0, -6.0, 2.9), (1.875, -1.25, 0.375))])
    def test_resume_is_exact(self, lr: float | Tensor, ns_coefficients: Any) -> None:
        hidden, rest, optimizer = self.setting(lr=lr, ns_coefficients=ns_coefficients)
        train(optimizer, hidden + rest, range(4))
        file = io.BytesIO()
        torch.save({"params": hidden + rest, "optimizer": optimizer.state_dict()}, file)
        train(optimizer, hidden + rest, range(4, 10))

        file.seek(0)
        saved = torch.load(file, weights_only=True)
        hidden_2, rest_2, resumed = self.setting(lr=0.5, momentum=0.1, weight_decay=0.9, ns_coefficients="you")
        with torch.no_grad():
            torch._foreach_copy_(hidden_2 + rest_2, saved["params"])
        resumed.load_state_dict(saved["optimizer"])
        train(resumed, hidden_2 + rest_2, range(4, 10))
        assert_all_equal(hidden_2 + rest_2, hidden + rest)
        assert_all_equal(states(resumed, hidden_2), states(optimizer, hidden))
        assert_all_equal(states(resumed, rest_2, "exp_avg_sq"), states(optimizer, rest, "exp_avg_sq"))

    @pytest.mark.parametrize("ns_coefficients", [None, "polar_express", "cubic5", "jordan", (3.0, -3.2, 1.2)])
    def test_torch_goes_on_with_what_it_can_load(self, ns_coefficients: Any) -> None:
        ours = matrices()
        optimizer = Muon(ours, LR, momentum=0.9, ns_coefficients=ns_coefficients)
        train(optimizer, ours, range(3))
        theirs = [nn.Parameter(p.detach().clone()) for p in ours]
        loaded = torch.optim.Muon(theirs, 0.5)
        loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))

        twins = [nn.Parameter(p.detach().clone()) for p in ours]
        own = {"ns_coefficients": ns_coefficients} if isinstance(ns_coefficients, tuple) else {}
        oracle = torch.optim.Muon(twins, LR, momentum=0.9, **own)
        for p, twin in zip(ours, twins):
            oracle.state[twin]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"].clone()
        train(loaded, theirs, range(3, 6))
        train(oracle, twins, range(3, 6))
        assert_all_equal(theirs, twins)

        back = Muon([nn.Parameter(p.detach().clone()) for p in ours], 0.5)
        back.load_state_dict(loaded.state_dict())  # torch has kept what it does not know
        for key in ("ns_coefficients", "ns_steps", "lr"):
            assert back.param_groups[0][key] == optimizer.param_groups[0][key]

    @pytest.mark.parametrize("flat", [False, True])
    @pytest.mark.parametrize("ns_coefficients", [None, "cubic5", "jordan"])
    def test_a_schedule_survives_a_distributed_checkpoint(self, ns_coefficients: Any, flat: bool) -> None:
        layer = nn.Linear(4, 3, bias=False)
        optimizers = [Muon(layer.parameters(), LR, ns_coefficients=own) for own in (ns_coefficients, "you")]
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        set_optimizer_state_dict(
            layer, optimizers[1], get_optimizer_state_dict(layer, optimizers[0], options=options), options=options
        )
        first, second = (optimizer.param_groups[0] for optimizer in optimizers)
        assert {key: second[key] for key in first if key != "params"} == {
            key: first[key] for key in first if key != "params"
        }

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_a_copy_goes_on_equally(self, copied: Callable[[Any], Any]) -> None:
        # A dtype that no CPU takes by default: its loss would show in the result.
        hidden, rest, optimizer = self.setting(dtype=torch.float64)
        train(optimizer, hidden + rest, range(4))
        hidden_2, rest_2, optimizer_2 = copied((hidden, rest, optimizer))
        assert_all_equal(hidden_2, hidden)
        train(optimizer, hidden + rest, range(4, 10))
        train(optimizer_2, hidden_2 + rest_2, range(4, 10))
        assert_all_equal(hidden_2 + rest_2, hidden + rest)

    def test_a_copy_with_parts_goes_on_equally(self) -> None:
        fused = matrices([(6, 4)])
        optimizer = Muon(fused, LR, parts={fused[0]: (0, [torch.arange(2), torch.arange(2, 6)])}, dtype=torch.float64)
        train(optimizer, fused, range(2))
        fused_2, optimizer_2 = pickle.loads(pickle.dumps((fused, optimizer)))
        train(optimizer, fused, range(2, 4))
        train(optimizer_2, fused_2, range(2, 4))
        assert_all_equal(fused_2, fused)

    def test_state_is_what_torch_keeps(self) -> None:
        hidden, rest, optimizer = self.setting()
        train(optimizer, hidden + rest, [0])
        assert all(set(optimizer.state[p]) == {"momentum_buffer"} for p in hidden)
        assert all(set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"} for p in rest)


def one_cycle(optimizer: Optimizer) -> LRScheduler:
    return OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS + 1)


def cosine(optimizer: Optimizer) -> LRScheduler:
    return CosineAnnealingLR(optimizer, T_max=STEPS)


@pytest.mark.parametrize("schedule", [one_cycle, cosine])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers_drive_the_learning_rate(schedule: Callable[[Optimizer], LRScheduler], tensor_lr: bool) -> None:
    scheduled, by_hand, other = matrices(), matrices(), matrices()
    optimizer, manual = (Muon(p, torch.tensor(LR) if tensor_lr else LR) for p in (scheduled, by_hand))
    reference = torch.optim.SGD(other, LR, momentum=0.95)
    schedulers = schedule(optimizer), schedule(reference)
    rates = []
    for step in range(STEPS):
        group = reference.param_groups[0]
        manual.param_groups[0]["lr"] = torch.tensor(group["lr"]) if tensor_lr else group["lr"]
        manual.param_groups[0]["momentum"] = group["momentum"]
        rates.append(group["lr"])
        train(optimizer, scheduled, [step])
        train(manual, by_hand, [step])
        reference.step()
        for scheduler in schedulers:
            scheduler.step()
    assert len(set(rates)) == STEPS
    assert_all_close(scheduled, by_hand, atol=1e-6 if tensor_lr else 0.0)


class TestKinds:
    """Parameters of more dimensions step as the matrices that they are made of."""

    @pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
    @pytest.mark.parametrize("shape", [(3, 9, 4), (3, 4, 9), (2, 3, 5, 5)])
    def test_experts(self, shape: tuple[int, ...], adjust_lr_fn: str) -> None:
        stack = matrices([shape])
        one_by_one = [nn.Parameter(m.clone()) for m in stack[0].detach().reshape(-1, *shape[-2:])]
        options = {"lr": LR, "adjust_lr_fn": adjust_lr_fn, "dtype": torch.float32}
        together, apart = Muon([{"params": stack, "kind": "experts"}], **options), Muon(one_by_one, **options)
        for step in range(3):
            stack[0].grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
            for p, grad in zip(one_by_one, stack[0].grad.reshape(-1, *shape[-2:])):
                p.grad = grad
            together.step()
            apart.step()
        found = stack[0].detach().reshape(-1, *shape[-2:])
        assert_all_close(found, one_by_one, atol=JORDAN_SLOPE * 2 * 2.0**-23)

    @pytest.mark.parametrize("shape", [(6, 3, 5), (4, 3, 2, 2), (4, 2, 2, 3, 2)])
    def test_a_convolution_is_one_matrix(self, shape: tuple[int, ...]) -> None:
        kernel = matrices([shape])
        flat = [nn.Parameter(kernel[0].detach().flatten(1).clone())]
        for params, options in ((kernel, {"kind": "convolution"}), (flat, {})):
            params[0].grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).view_as(params[0])
            Muon([{"params": params, **options}], LR).step()
        assert torch.equal(kernel[0].flatten(1), flat[0])

    @pytest.mark.parametrize("nesterov", [True, False])
    def test_a_convolution_in_channels_last_is_the_same(self, nesterov: bool) -> None:
        first = matrices([(4, 3, 2, 2)])
        second = [nn.Parameter(first[0].detach().clone(memory_format=torch.channels_last))]
        for params in (first, second):
            train(Muon([{"params": params, "kind": "convolution"}], LR, nesterov=nesterov), params, range(3))
        assert_all_close(second, first, atol=1e-6)

    def test_kinds_survive_a_checkpoint(self) -> None:
        experts = matrices([(3, 4, 5)])
        optimizer = Muon([{"params": experts, "kind": "experts"}], LR)
        train(optimizer, experts, [0])
        resumed = Muon([{"params": twin(experts), "kind": "experts"}], LR)
        resumed.load_state_dict(optimizer.state_dict())
        assert resumed.param_groups[0]["kind"] == "experts"

    def test_unknown(self) -> None:
        with pytest.raises(
            ValueError, match="unknown kind 'moe' of a parameter group; use one of matrix, experts, convolution"
        ):
            Muon([{"params": matrices(), "kind": "moe"}])


class TestParts:
    """A weight that holds several matrices steps as they would apart."""

    #: The channels of the matrices in weights of one shape; the last is one matrix as it is.
    PARTS = ([slice(0, 2), slice(2, 6)], [slice(0, 2), slice(2, 6)], [slice(0, 3), slice(3, 6)], [slice(0, 6)])

    @pytest.mark.parametrize("dim", [0, 1])
    def test_beside_others_of_the_same_shape(self, dim: int) -> None:
        apart, groups, parts, fused = [], [], {}, []
        for adjust_lr_fn in LR_ADJUSTMENTS:
            weights = matrices([(6, 4)] * len(self.PARTS))
            pieces = [nn.Parameter(w.detach()[own].clone()) for w, cut in zip(weights, self.PARTS) for own in cut]
            apart.append({"params": pieces, "adjust_lr_fn": adjust_lr_fn})
            if dim:
                weights[:-1] = [nn.Parameter(w.detach().mT.clone()) for w in weights[:-1]]
            groups.append({"params": weights, "adjust_lr_fn": adjust_lr_fn})
            parts |= {w: (dim, [torch.arange(6)[own] for own in cut]) for w, cut in zip(weights[:-1], self.PARTS)}
            fused.append([w.detach().mT if dim and w is not weights[-1] else w.detach() for w in weights])
        optimizer, oracle = Muon(groups, LR, parts=parts, dtype=torch.float32), Muon(apart, LR, dtype=torch.float32)
        for step in range(2):
            for group, views, alone in zip(optimizer.param_groups, fused, oracle.param_groups):
                generator, pieces = torch.Generator().manual_seed(step), iter(alone["params"])
                for w, view, cut in zip(group["params"], views, self.PARTS):
                    grad = torch.randn(6, 4, generator=generator)
                    w.grad = grad if view.shape == w.shape else grad.mT.contiguous()
                    for own in cut:
                        next(pieces).grad = grad[own].clone()
            optimizer.step()
            oracle.step()
        for views, alone in zip(fused, oracle.param_groups):
            found = [view[own] for view, cut in zip(views, self.PARTS) for own in cut]
            assert_all_close(found, alone["params"], atol=1e-5)

    def test_on_either_dimension(self) -> None:
        down, cut = matrices([(6, 6)])[0], [torch.arange(3), torch.arange(3, 6)]
        across = nn.Parameter(down.detach().mT.clone())
        down.grad = torch.randn(6, 6)
        across.grad = down.grad.mT.contiguous()
        Muon([down, across], LR, parts={down: (0, cut), across: (1, cut)}, dtype=torch.float32).step()
        torch.testing.assert_close(across, down.mT, atol=1e-5, rtol=0)


class TestGroupSchedules:
    def test_a_group_has_its_own_schedule_with_its_own_steps(self) -> None:
        groups = [
            {"params": matrices([(4, 4)]), "ns_coefficients": "deepseek_v4"},
            {"params": matrices([(4, 4)]), "ns_coefficients": "schatten4", "ns_steps": 3},
            {"params": matrices([(4, 4)])},
        ]
        optimizer = Muon(groups, ns_coefficients="jordan")
        assert [group["ns_steps"] for group in optimizer.param_groups] == [10, 3, 5]
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        optimizer.load_state_dict(torch.load(file, weights_only=True))
        with pytest.raises(ValueError, match="unknown schedule 'jordann'"):
            optimizer.add_param_group({"params": matrices(), "ns_coefficients": "jordann"})

    @pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
    def test_an_empty_matrix_is_no_trouble(self, shape: tuple[int, int]) -> None:
        params = matrices([shape, (3, 3)])
        train(Muon(params), params, [0])


class Allocations(TorchDispatchMode):
    """The most bytes that were alive at once of what operations have made."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if (
                isinstance(tensor, Tensor)
                and (storage := tensor.untyped_storage())._cdata not in known | self.alive.keys()
            ):
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


class TestMemory:
    @pytest.mark.parametrize("ns_coefficients", ["jordan", "schatten4"])
    def test_a_step_needs_less_than_half_of_the_matrices(self, ns_coefficients: str) -> None:
        shapes = [(128, 128)] * 4 + [(512, 128), (128, 512)]
        params = matrices(shapes * 24)  # many times what is orthogonalised together
        optimizer = Muon(params, LR, ns_coefficients=ns_coefficients, dtype=torch.float32)
        train(optimizer, params, [0])
        with Allocations() as allocations:
            optimizer.step()
        hidden = sum(p.nbytes for p in params)
        assert 0 < allocations.peak < 0.5 * hidden


class TestCompile:
    @pytest.mark.parametrize("ns_coefficients", ["jordan", "schatten4"])
    def test_a_step_is_one_graph(self, ns_coefficients: str) -> None:
        compiled, eager = matrices(), matrices()
        optimizers = [Muon(p, torch.tensor(LR), ns_coefficients=ns_coefficients) for p in (compiled, eager)]
        train(optimizers[0], compiled, [0])
        train(optimizers[1], eager, [0])
        step = torch.compile(optimizers[0].step, fullgraph=True, backend="aot_eager")
        step()
        optimizers[1].step()
        assert_all_equal(compiled, eager)


@pytest.mark.gpu
class TestOnTheDevice:
    @staticmethod
    def on_device(ns_coefficients: str) -> tuple[list[nn.Parameter], Muon]:
        shapes = [*SHAPES, (128, 128), (512, 128), (128, 512), (512, 128)]
        params = [nn.Parameter(p.detach().cuda()) for p in matrices(shapes)]
        for p in params:
            p.grad = torch.randn_like(p)
        return params, Muon(params, torch.tensor(LR, device="cuda"), ns_coefficients=ns_coefficients)

    @pytest.mark.parametrize("ns_coefficients", ["jordan", "polar_express", "schatten4"])
    def test_a_step_waits_for_nothing(self, ns_coefficients: str) -> None:
        _, optimizer = self.on_device(ns_coefficients)
        optimizer.step()  # makes the state
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("ns_coefficients", ["jordan", "schatten4"])
    def test_a_captured_step_is_a_step(self, ns_coefficients: str) -> None:
        torch.manual_seed(0)
        captured, optimizer = self.on_device(ns_coefficients)
        torch.manual_seed(0)
        eager, twin_optimizer = self.on_device(ns_coefficients)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            optimizer.step()  # makes the state, and compiles the kernels
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        for _ in range(3):
            graph.replay()
        for _ in range(4):
            twin_optimizer.step()
        assert_all_close(captured, eager, atol=1e-3 * LR)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("shape", [(4, 256, 256), (2, 300, 1200), (1, 1024, 384)])
    def test_the_device_agrees_with_the_cpu(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        found = orthogonalize(x.cuda(), dtype=dtype).cpu()
        expected = orthogonalize(x.double(), method="direct", dtype=torch.float64).float()
        difference = torch.linalg.matrix_norm(found - expected).max() / min(shape[-2:]) ** 0.5
        assert difference < {torch.float16: 0.02, torch.bfloat16: 0.1, torch.float32: 1e-3}[dtype]


class TestErrors:
    @pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (2, 3, 4, 4)])
    def test_what_is_no_matrix_is_named(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(
            ValueError,
            match=rf"blocks.0.w is not.*shape \({str(shape)[1:-1]}\).*algorithm='adamw'",
        ):
            Muon([("ok", nn.Parameter(torch.ones(2, 2))), ("blocks.0.w", nn.Parameter(torch.ones(shape)))])
        with pytest.raises(ValueError, match="parameter 1 is not a real matrix"):
            Muon([nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(shape))])

    @pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.ModuleDict()])
    def test_a_model_is_not_its_parameters(self, model: nn.Module) -> None:
        with pytest.raises(TypeError, match=rf"got the model {type(model).__name__}; use Muon\(split_params\(model\)"):
            Muon(model)

    @pytest.mark.parametrize("kind", ["matrix", "experts", "convolution"])
    def test_a_lazy_parameter_has_no_shape_yet(self, kind: str) -> None:
        lazy = nn.LazyLinear(3)
        for given, name in ((lazy.weight, "parameter 0"), (("head.weight", lazy.weight), "head.weight")):
            with pytest.raises(ValueError, match=rf"^{name} is an UninitializedParameter .* run a forward first"):
                Muon([{"params": [given], "kind": kind}])

    def test_complex_matrices(self) -> None:
        with pytest.raises(
            ValueError, match=r"w is not a real matrix: it has shape \(2, 2\) and dtype torch.complex64"
        ):
            Muon([("w", nn.Parameter(torch.ones(2, 2, dtype=torch.complex64)))])

    def test_a_refused_group_is_not_added(self) -> None:
        optimizer = Muon(matrices())
        with pytest.raises(ValueError, match="parameter 0"):
            optimizer.add_param_group({"params": matrices([(3,)])})
        with pytest.raises(ValueError, match="sgd"):
            optimizer.add_param_group({"params": matrices([(3, 3)]), "algorithm": "sgd"})
        assert len(optimizer.param_groups) == 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"lr": -1e-3}, r"lr must be >= 0, got -0.001"),
            ({"lr": math.nan}, "lr must be >= 0, got nan"),
            ({"lr": torch.tensor(-1.0)}, "lr must be >= 0"),
            ({"lr": torch.ones(2)}, r"one element, got shape \(2,\)"),
            ({"weight_decay": -0.1}, "weight_decay must be >= 0"),
            ({"eps": -1e-7}, "eps must be >= 0"),
            ({"momentum": -0.1}, r"momentum must be in \[0, 1\), got -0.1"),
            ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
            ({"adjust_lr_fn": "rms"}, "unknown adjust_lr_fn 'rms'; use one of original, match_rms_adamw"),
            ({"ns_coefficients": "newton"}, "unknown schedule 'newton'"),
            ({"ns_steps": 0}, "ns_steps must be an integer"),
        ],
    )
    def test_hyperparameters(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Muon(matrices(), **options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"dtype": "bf16"}, "floating-point torch.dtype.* got 'bf16'"),
            ({"dtype": torch.int8}, "got torch.int8"),
            ({"stack_numel": 0}, "stack_numel must be a positive integer.* got 0"),
            ({"stack_numel": 1e9}, "got 1000000000.0"),
        ],
    )
    def test_how_it_works(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Muon(matrices(), **options)

    def test_unknown_algorithm(self) -> None:
        with pytest.raises(ValueError, match=r"unknown algorithm 'sgd'.*use 'muon' or 'adamw'"):
            Muon([{"params": matrices(), "algorithm": "sgd"}])

    @pytest.mark.parametrize("algorithm", ["muon", "adamw"])
    def test_sparse_gradients(self, algorithm: str) -> None:
        embedding = nn.Embedding(5, 3, sparse=True)
        before = embedding.weight.detach().clone()
        embedding(torch.tensor([1, 2])).sum().backward()
        optimizer = Muon([{"params": embedding.weight, "algorithm": algorithm}])
        with pytest.raises(ValueError, match=r"shape \(5, 3\) has a sparse gradient"):
            optimizer.step()
        assert torch.equal(embedding.weight, before)


@pytest.mark.parametrize("name", ["pre", "post"])
def test_hooks_run_once_a_step(name: str) -> None:
    params = matrices()
    optimizer = Muon(params)
    calls = []
    getattr(optimizer, f"register_step_{name}_hook")(lambda *_: calls.append(name))
    train(optimizer, params, range(3))
    assert len(calls) == 3
