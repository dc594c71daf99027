"""Heads that lie on several dimensions of one parameter."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import between, brute_max_logits, causal, enlarge, policy_factors
from torch import Tensor, nn

from lightning_muonclip import AttentionSpec, MuonClip, Projection, QKClip, mup, register_attention
from lightning_muonclip.qk_clip.describe import declared
from lightning_muonclip.qk_clip.describe.split import matrix_parts

HEADS, GROUPS, DIM, WIDTH, LENGTH = 4, 2, 4, 16, 5


# A clip against loops ------------------------------------------------------------------------------------------------

Label = tuple[str, int]


def each(kind: str, heads: int, size: int) -> list[Label]:
    return [(kind, head) for head in range(heads) for _ in range(size)]


def turned(kind: str, heads: int, size: int) -> list[Label]:
    return [(kind, head) for _ in range(size) for head in range(heads)]


#: Kind and head of every channel, from the numbers of key heads, queries of each, and channels.
LAYOUTS: dict[str, Callable[[int, int, int], list[Label]]] = {
    "q(H d)": lambda g, r, d: each("q", g * r, d),
    "k(d G)": lambda g, r, d: turned("k", g, d),
    "[q(H d) | k(G d) | *(3 d)]": lambda g, r, d: each("q", g * r, d) + each("k", g, d) + [("*", 0)] * 3 * d,
    "[* | k(d G) | q(d H)]": lambda g, r, d: [("*", 0)] * 2 + turned("k", g, d) + turned("q", g * r, d),
    "(G [q:r·d, *:2, k:d])": lambda g, r, d: [
        label
        for group in range(g)
        for label in each("q", g * r, d)[group * r * d : (group + 1) * r * d] + [("*", 0)] * 2 + [("k", group)] * d
    ],
}


class Drawn(NamedTuple):
    shape: tuple[int, ...]
    dims: tuple[int, ...]
    layout: str
    groups: int
    share: int
    size: int
    offset: float
    gamma: list[float]


@st.composite
def drawn(draw: Any) -> Drawn:
    """A layout whose channels lie on one to three dimensions, in any order, which heads need not respect."""
    groups, share, size = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 4))
    layout = draw(st.sampled_from(list(LAYOUTS)))
    left = len(LAYOUTS[layout](groups, share, size))
    sizes = []
    for _ in range(draw(st.integers(0, 2))):
        sizes.append(draw(st.sampled_from([n for n in range(1, left + 1) if left % n == 0])))
        left //= sizes[-1]
    sizes.append(left)
    others = draw(st.lists(st.integers(1, 3), max_size=2))
    places = draw(st.permutations(range(len(sizes) + len(others))))
    dims = places[: len(sizes)]
    shape = [0] * len(places)
    for place, n in zip(places, sizes + others):
        shape[place] = n
    signed = [dim - len(shape) * draw(st.booleans()) for dim in dims]
    gamma = draw(st.lists(st.sampled_from([1.0, 0.5, 0.25, 0.1]), min_size=groups * share, max_size=groups * share))
    return Drawn(tuple(shape), tuple(signed), layout, groups, share, size, draw(st.sampled_from([0.0, 1.0])), gamma)


@settings(max_examples=300, deadline=None)
@given(case=drawn(), shared_keys=st.sampled_from(["query", "group", "min_k", "compensate"]))
def test_a_clip_scales_what_a_loop_over_all_elements_scales(case: Drawn, shared_keys: str) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(case.shape))
    module.q, module.k = (nn.Parameter(torch.randn(case.groups * n)) for n in (case.share, 1))
    projections = Projection("q", "q(H)"), Projection("k", "k(G)")  # a clip needs both sides
    dim = case.dims[0] if len(case.dims) == 1 and case.share == 1 else case.dims  # one may be given as a number
    projection = Projection("weight", case.layout, dim=dim, offset=case.offset)
    spec = AttentionSpec((projection, *projections), case.groups * case.share, case.groups, {"d": case.size})
    before = module.weight.detach().clone()
    maxima = [2.0 / own for own in case.gamma]
    with QKClip(module, 2.0, 0.3, {"": spec}, shared_keys, logits="off") as qk_clip:
        qk_clip.step([maxima])

    queries, keys = policy_factors(maxima, 2.0, 0.3, case.groups, shared_keys)
    labels = LAYOUTS[case.layout](case.groups, case.share, case.size)
    expected = before.clone()
    for index in product(*map(range, case.shape)):
        channel = 0
        for dim in case.dims:
            channel = channel * case.shape[dim] + index[dim]
        kind, head = labels[channel]
        factor = {"q": queries, "k": keys, "*": [1.0]}[kind][head]
        expected[index] = (before[index] + case.offset) * factor - case.offset
    torch.testing.assert_close(module.weight.detach(), expected)


# Attention by one einsum ---------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """How a weight, of this shape, makes heads of queries, keys and values; what describes it, and what is inferred."""

    shape: tuple[int, ...]
    parts: Callable[[Tensor, Tensor], Any]
    projection: Projection
    text: str
    groups: int = HEADS


def by_head(x: Tensor, w: Tensor) -> Any:
    return torch.einsum("bld,hdc->bhlc", x, w).chunk(3, -1)


def grouped(x: Tensor, w: Tensor) -> Any:
    parts = torch.einsum("bld,dgc->bglc", x, w).split([HEADS // GROUPS * DIM, DIM, DIM], -1)
    return parts[0].unflatten(-1, (-1, DIM)).transpose(2, 3).flatten(1, 2), parts[1], parts[2]


FORMS: dict[str, Form] = {
    "(D, 5, H d)": Form(
        (WIDTH, 5, HEADS * DIM),
        lambda x, w: torch.einsum("bld,dse->sble", x, w).unflatten(-1, (HEADS, DIM)).transpose(2, 3),
        Projection("weight", "[q(H d) | k(H d) | *]", dim=(1, 2)),
        "weight: [q(H 4) | k(G 4) | *] dim=(1, 2)",
    ),
    "(D, H d, 5)": Form(
        (WIDTH, HEADS * DIM, 5),
        lambda x, w: torch.einsum("bld,des->sble", x, w).unflatten(-1, (HEADS, DIM)).transpose(2, 3),
        Projection("weight", "[q(H d) | k(H d) | *]", dim=(2, 1)),
        f"weight: (H [{', '.join(['q:1, k:1, *:3'] * DIM)}]) dim=(1, 2)",
    ),
    "(3, H, D, d)": Form(
        (3, HEADS, WIDTH, DIM),
        lambda x, w: torch.einsum("bld,shdc->sbhlc", x, w),
        Projection("weight", "[q(H d) | k(H d) | *]", dim=(0, 1, 3)),
        "weight: [q(H) | k(G) | *(G)] dim=(0, 1)",
    ),
    "(D, 3, d, H)": Form(
        (WIDTH, 3, DIM, HEADS),
        lambda x, w: torch.einsum("bld,dsch->sbhlc", x, w),
        Projection("weight", "[q(H) | k(H) | *]", dim=(1, 3)),
        "weight: [q(H) | k(G) | *(G)] dim=(1, 3)",
    ),
    "(H, D, 3d)": Form(
        (HEADS, WIDTH, 3 * DIM),
        by_head,
        Projection("weight", "(H [q:d, k:d, *:d])", dim=(0, 2)),
        "weight: (H [q:4, k:4, *:4]) dim=(0, 2)",
    ),
    "(D, G, r d + 2 d)": Form(
        (WIDTH, GROUPS, (HEADS // GROUPS + 2) * DIM),
        grouped,
        Projection("weight", "(G [q:r·d, k:d, *:d])", dim=(-2, -1)),
        "weight: (G [q:r·4, k:4, *:4]) dim=(1, 2)",
        GROUPS,
    ),
}


class OneEinsum(nn.Module):
    """Attention of one weight, which may also make a gate and a shift."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.weight = nn.Parameter(torch.randn(form.shape) / 2)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value, *more = self.form.parts(x, self.weight)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        for own in more:
            y = y * own.sigmoid()
        return y.transpose(1, 2).flatten(2)

    def spec(self) -> AttentionSpec:
        return AttentionSpec((self.form.projection,), HEADS, self.form.groups, {"d": DIM})

    @torch.no_grad()
    def others(self, x: Tensor) -> list[Tensor]:
        """Everything but queries and keys."""
        return list(self.form.parts(x, self.weight)[2:])

    @torch.no_grad()
    def expected(self, x: Tensor) -> Tensor:
        query, key = self.form.parts(x, self.weight)[:2]
        return brute_max_logits(query, key, DIM**-0.5, causal(LENGTH))


def inputs() -> Tensor:
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-6)


def clipped(model: Any, x: Tensor, **options: Any) -> str:
    """Clips exactly the heads that should be, on a replay, and returns the summary."""
    before = model.expected(x)
    threshold = between(before)
    with QKClip(model, threshold, **options) as qk_clip:
        model(x)
        close(qk_clip.max_logits[0], before)
        assert torch.equal(qk_clip.step().gamma[0] < 1, before > threshold)
        text = qk_clip.summary()
    close(model.expected(x), before.clamp(max=threshold))
    return text


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("is_inferred", [True, False])
def test_a_weight_that_makes_everything_by_one_einsum_is_clipped_exactly(name: str, is_inferred: bool) -> None:
    model, x = OneEinsum(FORMS[name]), inputs()
    others = model.others(x)
    text = clipped(model, x, **({"example": ((x,), {})} if is_inferred else {"specs": {"": model.spec()}}))
    assert all(map(torch.equal, model.others(x), others))
    projection = FORMS[name].projection
    assert (FORMS[name].text if is_inferred else f"weight: {projection.layout} dim={projection.dim}") in text


@pytest.mark.parametrize("name", FORMS)
def test_a_spec_of_several_dimensions_is_verified(name: str) -> None:
    model, x = OneEinsum(FORMS[name]), inputs()
    with QKClip(model, 1.0, specs={"": model.spec()}) as qk_clip:
        qk_clip.verify(x)
    right = FORMS[name].projection
    wrong = Projection("weight", right.layout, dim=right.dims[::-1])
    with (
        QKClip(model, 1.0, specs={"": AttentionSpec((wrong,), HEADS, FORMS[name].groups, {"d": DIM})}) as qk_clip,
        pytest.raises(ValueError, match="does not describe its attention"),
    ):
        qk_clip.verify(x)


class ByHead(nn.Module):
    """A weight a head, of shape (heads, width, channels) or (width, heads, channels), and biases (heads, channels)."""

    def __init__(self, width: int = WIDTH, dim: int = DIM, equation: str = "bld,hdc->bhlc", bias: bool = True) -> None:
        super().__init__()
        self.equation, self.head_dim, self.scaling = equation, dim, dim**-0.5
        sizes = {"d": width, "c": dim}
        for name, heads in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
            child = nn.Module()
            letters = equation[len("bld,") :].split("->")[0]
            child.weight = nn.Parameter(torch.randn([heads if n == "h" else sizes[n] for n in letters]) * width**-0.5)
            child.bias = nn.Parameter(torch.randn(heads, dim)) if bias else None
            self.add_module(name, child)

    def parts(self, x: Tensor) -> list[Tensor]:
        found = []
        for own in (self.q, self.k, self.v):
            y = torch.einsum(self.equation, x, own.weight)
            found.append(y if own.bias is None else y + own.bias[:, None])
        return found

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*self.parts(x), is_causal=True, scale=self.scaling, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)

    @torch.no_grad()
    def expected(self, x: Tensor) -> Tensor:
        query, key, _ = self.parts(x)
        return brute_max_logits(query, key, self.scaling, causal(LENGTH))


def by_head_spec(equation: str = "bld,hdc->bhlc", dim: int = DIM) -> AttentionSpec:
    dims = (0, 2) if "hdc" in equation else (1, 2)
    projections = Projection("q", "q(H d)", dims), Projection("k", "k(G d)", dims), Projection("v", "*(G d)", dims)
    return AttentionSpec(projections, HEADS, GROUPS, {"d": dim})


@pytest.mark.parametrize("equation", ["bld,hdc->bhlc", "bld,dhc->bhlc"])
@pytest.mark.parametrize("is_inferred", [True, False])
def test_weights_and_biases_of_every_head_are_clipped_exactly(equation: str, is_inferred: bool) -> None:
    model, x = ByHead(equation=equation), inputs()
    enlarge(model, 3)
    value = model.parts(x)[2].detach().clone()
    clipped(model, x, **({"example": ((x,), {})} if is_inferred else {"specs": {"": by_head_spec(equation)}}))
    assert torch.equal(model.parts(x)[2], value)
    with QKClip(model, 1.0, specs={"": by_head_spec(equation)}) as qk_clip:
        qk_clip.verify(x)


class Temperature(nn.Module):
    """One head, whose normalized queries and keys are multiplied by scalars: parameters without any dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * DIM)
        self.of_query, self.of_key = nn.Parameter(torch.tensor(5.0)), nn.Parameter(torch.tensor(4.0))

    def parts(self, x: Tensor) -> list[Tensor]:
        query, key, value = self.project(x)[:, None].chunk(3, -1)
        return [F.normalize(query, dim=-1) * self.of_query, F.normalize(key, dim=-1) * self.of_key, value]

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.parts(x), is_causal=True)

    @torch.no_grad()
    def expected(self, x: Tensor) -> Tensor:
        query, key, _ = self.parts(x)
        return brute_max_logits(query, key, DIM**-0.5, causal(LENGTH))


def test_a_scalar_is_a_channel_on_no_dimension() -> None:
    model, x = Temperature(), inputs()
    weight, before = model.project.weight.detach().clone(), model.expected(x)
    with QKClip(model, 0.5, qk_norm="gain", example=((x,), {})) as qk_clip:
        model(x)
        close(qk_clip.max_logits[0], before)
        qk_clip.step()
    close(model.expected(x), torch.tensor([0.5]))
    assert torch.equal(model.project.weight, weight)


def test_a_weight_tied_in_another_order_is_the_same_weight() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(3, 7, HEADS))
    before = module.weight.detach().clone()
    ways = Projection("weight", "q(d H)", dim=(0, 2)), Projection("weight", "k(H d)", dim=(2, 0))
    with QKClip(module, 1.0, specs={"": AttentionSpec(ways, HEADS, sizes={"d": 3})}, logits="off") as qk_clip:
        qk_clip.step([[4.0, 0.5, 4.0, 16.0]])
    assert torch.equal(module.weight, before * torch.tensor([0.5, 1.0, 0.5, 0.25]))
    other = ways[0], Projection("weight", "k(H e)", dim=(2, 1))
    with pytest.raises(ValueError, match="uses one weight as weight and weight, but with different heads"):
        QKClip(module, 1.0, specs={"": AttentionSpec(other, HEADS, sizes={"d": 3, "e": 7})})


@pytest.mark.parametrize(
    ("layout", "dim", "message"),
    [
        ("q(H d)", (0, 3), "dim=3 is out of range for 3 dimensions"),
        ("q(H d)", (0, -4), "dim=-4 is out of range for 3 dimensions"),
        ("q(H d)", (2, -1), r"dim=\(2, 2\) names a dimension twice"),
        ("q(H d)", (0, 1), r"layout 'q\(H d\)' describes 16 channels with sizes .*, but the weight has 64"),
    ],
)
def test_dimensions_that_do_not_fit_are_refused(layout: str, dim: tuple[int, ...], message: str) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(HEADS, WIDTH, DIM))
    spec = AttentionSpec((Projection("weight", layout, dim=dim),), HEADS, sizes={"d": DIM})
    with pytest.raises(ValueError, match=rf"attention '', weight: {message}"):
        QKClip(module, 1.0, specs={"": spec})


# Elsewhere -----------------------------------------------------------------------------------------------------------


def test_muon_leaves_alone_what_is_no_matrix() -> None:
    model, x = nn.Sequential(ByHead(), nn.Linear(WIDTH, WIDTH)), inputs()
    attention = {"0": (model[0], by_head_spec())}
    assert matrix_parts(model, attention, "heads") == {}
    # A bias of shape (heads, channels) is no matrix either, though it has two dimensions.
    bias = AttentionSpec((Projection("q.bias", "q(H d)", dim=(0, 1)),), HEADS, sizes={"d": DIM})
    assert matrix_parts(model, {"0": (model[0], bias)}, "heads") == {}
    before = model[0].q.weight.detach().clone()
    optimizer = MuonClip(model, lr=0.1, threshold=1e-3, split="heads", example=((x,), {}))
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.close()
    assert not torch.equal(model[0].q.weight, before)


def test_mup_exports_weights_of_every_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(declared, "_REGISTERED", {})
    register_attention(ByHead, lambda module: by_head_spec(dim=module.head_dim))
    model, base, plain = ByHead(64, 16), ByHead(WIDTH, 4), ByHead(64, 16)
    scaled = mup.parametrize(model, base)
    assert model.scaling == math.sqrt(4) / 16 != plain.scaling
    plain.load_state_dict(scaled.export())
    x = torch.randn(2, LENGTH, 64)
    torch.testing.assert_close(plain(x), model(x))
    assert torch.equal(plain.k.weight, model.k.weight) and not torch.equal(plain.q.weight, model.q.weight)
