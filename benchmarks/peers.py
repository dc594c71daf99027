"""Other implementations: a plain loop, torch, and packages that may be installed; absent ones are skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

#: Orthogonalizes a batch of matrices, shape (batch, m, n).
Orthogonalizer: TypeAlias = Callable[[Tensor], Any]
MakeOptimizer: TypeAlias = Callable[[list[Parameter]], Optimizer]

JORDAN = (3.4445, -4.7750, 2.0315)


def newton_schulz(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Jordan's five steps on one matrix, in the usual form."""
    a, b, c = JORDAN
    is_tall = x.shape[0] > x.shape[1]
    y = x.to(dtype)
    y = y.mT if is_tall else y
    y = y / (y.norm() + 1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return (y.mT if is_tall else y).to(x.dtype)


class LoopMuon(Optimizer):
    """Muon as a loop over weights; a subclass defines how to subtract an update."""

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.95, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                self.subtract(p, update, group["lr"])

    def subtract(self, p: Tensor, update: Tensor, lr: float) -> None:
        """Orthogonalizes an update and subtracts it from its weight."""
        raise NotImplementedError


class PlainMuon(LoopMuon):
    """Plain Muon in one working dtype, also looping over experts."""

    def __init__(self, params: Iterable[Parameter], lr: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(params, lr)
        self.dtype = dtype

    def subtract(self, p: Tensor, update: Tensor, lr: float) -> None:
        """Matrix by matrix."""
        m, n = p.shape[-2:]
        scale = max(1.0, m / n) ** 0.5
        for weight, u in zip(p.reshape(-1, m, n), update.reshape(-1, m, n)):
            weight.add_(newton_schulz(u, self.dtype), alpha=-lr * scale)


def each(function: Callable[[Tensor], Any]) -> Orthogonalizer:
    """One matrix of a batch after the other."""
    return lambda x: [function(own) for own in x]


def single_matrices(params: Sequence[Parameter]) -> list[Parameter]:
    """Splits stacks for optimizers without support: one parameter per expert, sharing memory."""
    single = []
    for p in params:
        if p.ndim == 2:
            single.append(p)
            continue
        assert p.grad is not None
        for own, grad in zip(p.detach(), p.grad):
            single.append(Parameter(own))
            single[-1].grad = grad
    return single


def orthogonalizers() -> dict[str, Orthogonalizer]:
    """The peers' functions that are installed."""
    return _installed(
        {
            "torch.optim.Muon": _torch_function,
            "dion": _dion_function,
            "gram-newton-schulz": _gram_function,
            "flash-muon": _flash_function,
            "heavyball": _heavyball_function,
            "emerging-optimizers": _emerging_function,
        }
    )


def optimizers(lr: float) -> dict[str, MakeOptimizer]:
    """The peers' optimizers that are installed."""
    return _installed(
        {
            "torch.optim.Muon": lambda: _torch_optimizer(lr),
            "dion": lambda: _dion_optimizer(lr),
            "gram-newton-schulz": lambda: _gram_optimizer(lr),
            "flash-muon": lambda: _flash_optimizer(lr),
            "heavyball": lambda: _heavyball_optimizer(lr),
            "emerging-optimizers": lambda: _emerging_optimizer(lr),
        }
    )


def _installed(loaders: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    found = {}
    for name, load in loaders.items():
        try:
            found[name] = load()
        except (ImportError, AttributeError) as error:
            print(f"skipped: {name}: {error}")
    return found


def _torch_function() -> Orthogonalizer:
    from torch.optim._muon import _zeropower_via_newtonschulz

    return each(lambda x: _zeropower_via_newtonschulz(x, JORDAN, 5, 1e-7))


def _torch_optimizer(lr: float) -> MakeOptimizer:
    peer = torch.optim.Muon  # since torch 2.9
    return lambda params: peer(single_matrices(params), lr=lr)


def _dion_function() -> Orthogonalizer:
    from dion.newton_schulz_triton import newton_schulz_triton

    return newton_schulz_triton


def _dion_optimizer(lr: float) -> MakeOptimizer:
    from dion import Muon

    return lambda params: Muon(params, lr=lr, nesterov=True, use_triton=params[0].is_cuda)


def _gram_function() -> Orthogonalizer:
    from gram_newton_schulz import GramNewtonSchulz

    return GramNewtonSchulz()


def _gram_optimizer(lr: float) -> MakeOptimizer:
    from gram_newton_schulz import POLAR_EXPRESS_COEFFICIENTS, Muon

    return lambda params: Muon(single_matrices(params), lr=lr, ns_coefficients=POLAR_EXPRESS_COEFFICIENTS)


def _flash_function() -> Orthogonalizer:
    from flash_muon import fast_newtonschulz

    return each(lambda x: fast_newtonschulz(x, 5))


def _flash_optimizer(lr: float) -> MakeOptimizer:
    from flash_muon import Muon

    return lambda params: Muon(single_matrices(params), lr=lr, momentum=0.95, rank=0, world_size=1)


def _heavyball_function() -> Orthogonalizer:
    from heavyball.utils import zeropower_via_newtonschulz5

    return zeropower_via_newtonschulz5


def _heavyball_optimizer(lr: float) -> MakeOptimizer:
    from heavyball import Muon

    return lambda params: Muon(single_matrices(params), lr=lr)


def _emerging_function() -> Orthogonalizer:
    from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz as peer

    return each(lambda x: peer(x.bfloat16() if x.is_cuda else x, steps=5, use_syrk=x.is_cuda))


def _emerging_optimizer(lr: float) -> MakeOptimizer:
    from emerging_optimizers.orthogonalized_optimizers.muon import Muon

    return lambda params: Muon(single_matrices(params), lr=lr, nesterov=True, use_syrk=params[0].is_cuda)
