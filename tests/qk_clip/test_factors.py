"""Between a product and its softmax, whatever multiplies the logits in the present forward is part of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import causal
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from lightning_muonclip import QKClip

HEADS, DIM, WIDTH = 2, 4, 8

#: What a module makes of its product of queries and keys: the logits, and the input of its softmax.
Logits = Callable[["Attends", Tensor], tuple[Tensor, Tensor]]


class Attends(nn.Module):
    """Attention with logits of its own."""

    def __init__(self, logits: Logits, tau: Any = 3.0, softmax: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.make, self.weigh = logits, softmax or (lambda x: x.softmax(-1))
        self.tau = tau if isinstance(tau, (float, nn.Parameter)) else nn.Parameter(torch.as_tensor(tau))

    def parts(self, x: Tensor) -> list[Tensor]:
        return [p(x).view(*x.shape[:2], HEADS, DIM).transpose(1, 2) for p in (self.query, self.key, self.value)]

    def core(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.weigh(self.make(self, query @ key.mT)[1]) @ value

    def forward(self, x: Tensor) -> Tensor:
        return self.core(*self.parts(x)).transpose(1, 2).flatten(2)

    @torch.no_grad()
    def expected(self, x: Tensor) -> Tensor:
        query, key, _ = self.parts(x)
        logits, weighed = self.make(self, query @ key.mT)
        return logits.masked_fill(weighed[..., : logits.shape[-1]] == -math.inf, -math.inf).amax((0, 2, 3))


def inputs(length: int = 5, batch: int = 3) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(length))


def plain(module: Attends, product: Tensor) -> tuple[Tensor, Tensor]:
    logits = product * module.tau
    return logits, logits


def exponential(module: Attends, product: Tensor) -> tuple[Tensor, Tensor]:
    logits = product * module.tau.exp()
    return logits, logits.masked_fill(torch.eye(product.shape[-1], dtype=torch.bool), -torch.inf)


def divided(module: Attends, product: Tensor) -> tuple[Tensor, Tensor]:
    logits = torch.div(product, module.tau)
    return logits, logits.masked_fill(~causal(product.shape[-1]), -torch.inf) - logits.detach().amax(-1, keepdim=True)


def capped(module: Attends, product: Tensor) -> tuple[Tensor, Tensor]:
    logits = module.tau * product
    beside = torch.full((*product.shape[:-1], 1), 2.0)
    return logits, torch.cat([3 * torch.tanh(logits / 3) + torch.arange(product.shape[-1]), beside], -1)


def capped_softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)[..., :-1]


def biased_before(module: Attends, product: Tensor) -> tuple[Tensor, Tensor]:
    biased = product.clone() + torch.arange(product.shape[-1])
    biased *= module.tau
    return product * module.tau, biased


def by_length(module: Attends, product: Tensor) -> tuple[Tensor, Tensor]:
    logits = product * math.log(product.shape[-1]) * module.tau
    return logits, logits


FACTORS: dict[str, tuple[Logits, Any, Any]] = {
    "one number": (plain, 3.0, None),
    "a parameter": (plain, torch.tensor(3.0), None),
    "a parameter of one element": (plain, torch.tensor([3.0]), None),
    "an exponential": (exponential, torch.tensor(0.7), None),
    "a divisor": (divided, torch.tensor(0.3), None),
    "before a soft-cap, a bias and a sink": (capped, torch.tensor(3.0), capped_softmax),
    "behind a bias": (biased_before, torch.tensor(3.0), None),
    "one for each head, behind a bias": (biased_before, torch.tensor([2.0, 3.0])[:, None, None], None),
    "the length": (by_length, 1.0, None),
}


@pytest.mark.parametrize("name", FACTORS)
def test_the_factor_is_that_of_the_present_forward(name: str) -> None:
    logits, tau, softmax = FACTORS[name]
    model = Attends(logits, tau, softmax)
    with QKClip(model, 1e9) as qk_clip:
        for length in (5, 5, 9):
            model(inputs(length))
            assert qk_clip.sides == {"": "q and k"}
            torch.testing.assert_close(qk_clip.max_logits[0], model.expected(inputs(length)))
            qk_clip.step()
            with torch.no_grad():
                model.tau = model.tau * 1.5 if isinstance(model.tau, float) else nn.Parameter(model.tau * 1.5)
    x = inputs()
    threshold = float(model.expected(x).mean())
    with QKClip(model, threshold) as qk_clip:
        model(x)
        before = model.expected(x)
        qk_clip.step()
    torch.testing.assert_close(model.expected(x), before.clamp(max=threshold))


def test_a_factor_that_depends_on_the_logits_is_no_factor() -> None:
    def normed(module: Attends, product: Tensor) -> tuple[Tensor, Tensor]:
        return product, product / product.norm(dim=-1, keepdim=True) + torch.arange(product.shape[-1])

    with pytest.raises(ValueError, match="cannot be measured"):
        QKClip(Attends(normed), example=((inputs(),), {}))


def test_the_factor_stays_in_the_compiled_graph() -> None:
    model, eager = (Attends(capped, torch.tensor(3.0), capped_softmax) for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with QKClip(model, 1e9) as qk_clip, QKClip(eager, 1e9) as other:
        for _ in range(3):
            compiled(inputs())
            eager(inputs())
            torch.testing.assert_close(qk_clip.step().max_logits, other.step().max_logits)
            with torch.no_grad():
                for tau in (model.tau, eager.tau):
                    tau.mul_(2)


def test_the_scale_of_a_kernel_is_that_of_every_call() -> None:
    class Fused(Attends):
        def core(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if self.make is plain:
                return F.scaled_dot_product_attention(query, key, value, scale=self.tau)
            return flex_attention(query, key, value, scale=self.tau)

    for logits in (plain, lambda module, product: plain(module, product)):
        model = Fused(logits)
        with QKClip(model, 1e9) as qk_clip:
            for tau in (3.0, 7.0):
                model.tau = tau
                with torch.no_grad():  # FlexAttention has no backward on a CPU
                    model(inputs())
                torch.testing.assert_close(qk_clip.max_logits[0], model.expected(inputs()))
                qk_clip.step()


def shifted(x: Tensor) -> Tensor:
    e = torch.exp(x - x.detach().amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def off_by_one(x: Tensor) -> Tensor:
    most = x.amax(-1, keepdim=True)
    e = (x - most).exp()
    return e / ((-most).exp() + e.sum(-1, keepdim=True))


def by_log_sum(x: Tensor) -> Tensor:
    return (x - x.logsumexp(-1, keepdim=True)).exp()


def in_place(x: Tensor) -> Tensor:
    e = (x - x.amax(-1, keepdim=True)).exp_()
    return e / e.sum(-1, keepdim=True)


def base_two(x: Tensor) -> Tensor:
    e = ((x - x.amax(-1, keepdim=True)) / math.log(2)).exp2()
    return e / e.sum(-1, keepdim=True)


@pytest.mark.parametrize("softmax", [shifted, off_by_one, by_log_sum, in_place, base_two, torch.special.softmax])
@pytest.mark.parametrize("logits", [plain, exponential])
def test_a_softmax_of_exponentials_is_measured(softmax: Any, logits: Logits) -> None:
    softmax = functools.partial(softmax, dim=-1) if softmax is torch.special.softmax else softmax
    model, x = Attends(logits, torch.tensor(0.8), softmax), inputs()
    before = model.expected(x)
    threshold = float(before.mean())
    with QKClip(model, threshold) as qk_clip:
        model(x)
        torch.testing.assert_close(qk_clip.max_logits[0], before)
        qk_clip.step()
    torch.testing.assert_close(model.expected(x), before.clamp(max=threshold))


@pytest.mark.parametrize("unknown", ["error", "monitor"])
def test_a_softmax_that_cannot_be_seen_is_refused_or_left_alone(unknown: str) -> None:
    model = Attends(plain, 1.0, lambda x: F.softmin(-x, -1))
    with QKClip(model, 1e-3, unknown=unknown) as qk_clip:
        if unknown == "error":
            with pytest.raises(ValueError, match="specs="):
                model(inputs())
            return
        before = model.query.weight.clone()
        model(inputs())
        qk_clip.step()
    assert torch.equal(model.query.weight, before)


class Wrapped(Attends):
    """Its core, or all of it, is checkpointed."""

    def __init__(self, reentrant: bool, whole: bool, logits: Logits = plain) -> None:
        super().__init__(logits, torch.tensor(2.0))
        self.run = functools.partial(checkpoint, use_reentrant=reentrant)  # a reference that nobody can replace
        self.whole = whole

    def forward(self, x: Tensor) -> Tensor:
        if self.whole:
            return self.run(super().forward, x)
        return self.run(self.core, *self.parts(x)).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_what_is_checkpointed_inside_of_attention_is_inferred(reentrant: bool, whole: bool) -> None:
    model, x = Wrapped(reentrant, whole), inputs().requires_grad_()
    before = model.expected(x)
    threshold = float(before.mean())
    with QKClip(model, threshold) as qk_clip:
        model(x).square().sum().backward()
        torch.testing.assert_close(qk_clip.max_logits[0], before)
        assert qk_clip.sides == {"": "q and k"} and model.query.weight.grad is not None
        qk_clip.step()
    torch.testing.assert_close(model.expected(x), before.clamp(max=threshold))
