"""Attention under names that nobody knows, inferred from a forward on an example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import brute_max_logits, causal, enlarge
from torch import Tensor, nn

from lightning_muonclip import Attention, AttentionSpec, MuonClip, Projection, QKClip

HEADS, DIM, WIDTH, LENGTH = 4, 4, 16, 5

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    logits = query @ key.mT
    logits /= DIM**0.5  # in place
    return logits.masked_fill(~causal(LENGTH), -1e9).softmax(-1) @ value


def by_einsum(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    logits = torch.einsum("bhid,bhjd->bhij", query, key) * DIM**-0.5
    logits = torch.where(causal(LENGTH), 10 * torch.tanh(logits / 10), -torch.inf)  # a soft-cap comes after
    return torch.einsum("bhij,bhjd->bhid", F.softmax(logits, dim=-1), value)


def in_batches(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Heads share an axis with the batch, and a position bias is added by the product itself."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    flat = [x.flatten(0, 1) for x in (query, key, value)]
    bias = torch.arange(LENGTH).expand(len(flat[0]), LENGTH, LENGTH).to(query)
    logits = torch.baddbmm(bias, flat[0], flat[1].mT, beta=0.5, alpha=DIM**-0.5)
    logits = logits + torch.zeros(LENGTH, LENGTH).masked_fill(~causal(LENGTH), -1e9).to(query)
    return torch.bmm(logits.softmax(-1), flat[2]).unflatten(0, query.shape[:2])


def merged_kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    flat = [x.repeat_interleave(HEADS // x.shape[1], 1).flatten(0, 1) for x in (query, key, value)]
    return F.scaled_dot_product_attention(*flat, is_causal=True).unflatten(0, query.shape[:2])


def beside_sinks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Sinks stand on both sides of the logits, and the maximum of each row is subtracted."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    logits = (query @ key.mT / DIM**0.5).masked_fill(~causal(LENGTH), -1e9)
    sink = torch.full((*logits.shape[:3], 1), 3.0).to(logits)
    logits = torch.cat((sink, logits, sink), -1)
    return (logits - logits.amax(-1, keepdim=True)).softmax(-1)[..., 1:-1] @ value


WAYS = [by_kernel, by_hand, by_einsum, in_batches, merged_kernel, beside_sinks]


class Unknown(nn.Module):
    """One fused weight, whose rows of each key head lie together: its queries, its key, its value."""

    def __init__(self, attend: Attend, groups: int = HEADS, normalize: str = "") -> None:
        super().__init__()
        self.attend, self.groups, self.normalize = attend, groups, normalize
        self.alpha = nn.Linear(WIDTH, (HEADS + 2 * groups) * DIM)
        self.omega = nn.Linear(WIDTH, WIDTH)
        self.gains = nn.ParameterList(
            torch.rand(DIM) + 0.5 for _ in range({"gain": 2, "one gain": 1}.get(normalize, 0))
        )
        enlarge(self)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        share = HEADS // self.groups
        mixed = self.alpha(x).unflatten(-1, (self.groups, share + 2, DIM)).transpose(1, 2)
        query, key, value = mixed.split([share, 1, 1], 3)
        query, key, value = query.transpose(2, 3).flatten(1, 2), key[..., 0, :], value[..., 0, :]
        if self.normalize == "clamp":
            query, key = query.clamp(-0.5, 0.5), key.clamp(-0.5, 0.5)
        elif self.normalize:
            query, key = (F.rms_norm(x, (DIM,), gain) for x, gain in zip((query, key), (self.gains[0], self.gains[-1])))
        return query, key, value

    def forward(self, x: Tensor) -> Tensor:
        return self.omega(self.attend(*self.parts(x)).transpose(1, 2).flatten(2))

    @torch.no_grad()
    def expected(self, x: Tensor) -> Tensor:
        query, key, _ = self.parts(x)
        return brute_max_logits(query, key, DIM**-0.5, causal(LENGTH))


def inputs() -> Tensor:
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


def on(x: Any) -> Any:
    return (x,), {}


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("attend", WAYS)
def test_maxima_and_clips_are_exact_whatever_the_names(attend: Attend, groups: int) -> None:
    model, x = Unknown(attend, groups), inputs()
    expected = model.expected(x)
    threshold = float(expected.sort().values[1:3].mean())
    assert threshold > 0
    with QKClip(model, threshold, example=on(x)) as qk_clip:
        model(x)
        torch.testing.assert_close(qk_clip.max_logits[0].double(), expected.double(), rtol=1e-5, atol=1e-6)
        gamma = qk_clip.step().gamma[0]
        assert torch.equal(gamma < 1, expected > threshold)
    clipped = expected.clamp(max=threshold)
    torch.testing.assert_close(model.expected(x), clipped, rtol=1e-5, atol=1e-6)


class Relative(nn.Module):
    """Logits are a sum of products: of queries and keys, and of queries and positions, as in Transformer-XL."""

    def __init__(self, positions: str) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.d = nn.Linear(WIDTH, WIDTH, bias=False)
        self.u, self.v = (nn.Parameter(torch.randn(HEADS, 1, DIM)) for _ in range(2))
        self.register_buffer("places", torch.randn(LENGTH, WIDTH))
        self.register_buffer("table", torch.randn(LENGTH, LENGTH, DIM))
        self.positions = positions
        enlarge(self)

    def products(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        query, key, value, place = (
            y.unflatten(-1, (HEADS, DIM)).transpose(-3, -2)
            for y in (self.a(x), self.b(x), self.c(x), self.d(self.places.expand_as(x)))
        )
        if self.positions == "projected":
            return [(query + self.u) @ key.mT, ((query + self.v) @ place.mT).roll(1, -1)], value
        return [query @ key.mT, torch.einsum("bhid,ijd->bhij", query, self.table)], value

    def forward(self, x: Tensor) -> Tensor:
        products, value = self.products(x)
        if self.positions == "in the mask of a kernel":
            query, key = (p(x).unflatten(-1, (HEADS, DIM)).transpose(-3, -2) for p in (self.a, self.b))
            mask = (products[1] / DIM**0.5).masked_fill(~causal(LENGTH), -1e9)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        logits = sum(products) / DIM**0.5
        return (logits.masked_fill(~causal(LENGTH), -1e9).softmax(-1) @ value).transpose(1, 2).flatten(2)

    @torch.no_grad()
    def expected(self, x: Tensor) -> Tensor:
        """Positions that the module projects are part of the logits; others are a bias."""
        products = self.products(x)[0]
        logits = sum(products) if self.positions == "projected" else products[0]
        return (logits / DIM**0.5).masked_fill(~causal(LENGTH), -torch.inf).amax((0, 2, 3))


@pytest.mark.parametrize("positions", ["projected", "of a table", "in the mask of a kernel"])
def test_maxima_and_clips_are_exact_with_relative_positions(positions: str) -> None:
    model, x = Relative(positions), inputs()
    expected = model.expected(x)
    threshold = float(expected.sort().values[1:3].mean())
    with QKClip(model, threshold, example=on(x)) as qk_clip:
        assert qk_clip.sides == {"": "q and k" if positions == "projected" else "k"}
        model(x)
        torch.testing.assert_close(qk_clip.max_logits[0].double(), expected.double(), rtol=1e-5, atol=1e-6)
        qk_clip.step()
    torch.testing.assert_close(model.expected(x), expected.clamp(max=threshold), rtol=1e-5, atol=1e-6)


def test_a_bias_that_cannot_be_told_from_the_logits_is_refused() -> None:
    class Biased(Relative):
        def products(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
            products, value = super().products(x)
            return [*products, torch.arange(LENGTH).to(x)], value

    with pytest.raises(ValueError, match="what enters its softmax is more than the products of its queries and keys"):
        QKClip(Biased("projected"), example=on(inputs()))


def test_values_and_output_stay_as_they_are() -> None:
    model, x = Unknown(by_kernel, 2), inputs()
    before = model.parts(x)[2].detach().clone(), model.omega.weight.clone()
    with QKClip(model, 1e-3, example=on(x)) as qk_clip:
        model(x)
        assert int(qk_clip.step().clipped_heads) > 0
    assert torch.equal(model.parts(x)[2], before[0])
    assert torch.equal(model.omega.weight, before[1])


def test_the_summary_shows_what_was_inferred() -> None:
    with QKClip(nn.Sequential(Unknown(by_hand, 2)), example=on(inputs())) as qk_clip:
        text = qk_clip.summary()
    assert "4 / 2" in text
    assert "alpha.weight: (G [q:r·4, k:4, *:4]), alpha.bias: (G [q:r·4, k:4, *:4])" in text


def test_the_example_leaves_no_trace() -> None:
    class Counting(Unknown):
        def __init__(self) -> None:
            super().__init__(by_kernel)
            self.register_buffer("calls", torch.zeros(()))
            self.dropout = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(self.dropout(x))

    model = Counting().train()
    weights, random = [p.clone() for p in model.parameters()], torch.get_rng_state()
    QKClip(model, example=on(inputs())).close()
    assert all(map(torch.equal, model.parameters(), weights))
    assert torch.equal(torch.get_rng_state(), random)
    assert model.calls == 0
    assert model.training and model.dropout.training
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert all(p.grad is None for p in model.parameters())


def test_nothing_is_left_out_in_silence() -> None:
    model = nn.Sequential(Attention(WIDTH, HEADS), Unknown(by_kernel, normalize="clamp"))
    with pytest.raises(ValueError, match=r"of attention '1' \(Unknown\): its queries do not scale"):
        QKClip(model, example=on(inputs()))
    with QKClip(model, specs={"1": None}, example=on(inputs())) as qk_clip:
        assert qk_clip.layers == ["0"]
    for param in model[1].parameters():
        param.requires_grad = False
    with QKClip(model, example=on(inputs())) as qk_clip:
        assert qk_clip.layers == ["0", "1"]
        assert qk_clip.sides["1"].startswith("watched (its queries do not scale")


def test_the_users_word_comes_first() -> None:
    spec = AttentionSpec((Projection("alpha", "(H [q:d, k:d, *:d])"),), HEADS, sizes={"d": DIM})
    with QKClip(Unknown(by_kernel), specs={"": spec}, example=on(inputs())) as qk_clip:
        assert qk_clip.observer.attention[""][1] is spec


@pytest.mark.parametrize("qk_norm", ["monitor", "gain"])
def test_a_norm_behind_the_projection_is_a_fact(qk_norm: str) -> None:
    model, x = Unknown(by_kernel, normalize="gain"), inputs()
    before, weight = model.expected(x), model.alpha.weight.clone()
    threshold = float(before.max()) / 2
    with QKClip(model, threshold, qk_norm=qk_norm, example=on(x)) as qk_clip:
        model(x)
        qk_clip.step()
        sides = qk_clip.sides[""]
    assert torch.equal(model.alpha.weight, weight)
    expected = before if qk_norm == "monitor" else before * (threshold / before.max())
    torch.testing.assert_close(model.expected(x), expected, rtol=1e-5, atol=1e-6)
    assert sides == ("watched (QK-norm)" if qk_norm == "monitor" else "q and k")


def test_a_gain_that_queries_and_keys_share_can_only_be_watched() -> None:
    model, x = Unknown(by_kernel, normalize="one gain"), inputs()
    before = [p.clone() for p in model.parameters()]
    with QKClip(model, 1e-3, qk_norm="gain", example=on(x)) as qk_clip:
        model(x)
        torch.testing.assert_close(qk_clip.max_logits[0].double(), model.expected(x).double(), rtol=1e-5, atol=1e-6)
        assert qk_clip.sides == {"": "watched (QK-norm without a gain)"}
        qk_clip.step()
    assert all(map(torch.equal, model.parameters(), before))


def test_muon_takes_the_matrices_of_a_fused_weight_apart() -> None:
    class Twin(nn.Module):
        def __init__(self, of: Unknown) -> None:
            super().__init__()
            rows = of.alpha.weight.detach().unflatten(0, (HEADS, 3, DIM))
            self.q, self.k, self.v = (nn.Parameter(rows[:, i].flatten(0, 1).clone()) for i in range(3))

    model, x = Unknown(by_kernel), inputs()
    twin = Twin(model)
    optimizer = MuonClip(model, lr=0.1, threshold=None, example=on(x))
    reference = MuonClip.__mro__[1]([*twin.parameters()], lr=0.1, adjust_lr_fn="match_rms_adamw")
    model(x).square().sum().backward()
    grads = model.alpha.weight.grad.unflatten(0, (HEADS, 3, DIM))
    for i, param in enumerate((twin.q, twin.k, twin.v)):
        param.grad = grads[:, i].flatten(0, 1).clone()
    optimizer.step()
    reference.step()
    optimizer.close()
    stepped = model.alpha.weight.detach().unflatten(0, (HEADS, 3, DIM))
    for i, param in enumerate((twin.q, twin.k, twin.v)):
        torch.testing.assert_close(stepped[:, i].flatten(0, 1), param.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("example", [inputs(), [(inputs(),), {}], ((inputs(),), (1,)), ((inputs(),),)])
def test_an_example_is_a_pair(example: Any) -> None:
    with pytest.raises(ValueError, match=r"example must be a pair \(args, kwargs\)"):
        QKClip(Unknown(by_kernel), example=example)
