"""Layouts are inferred from behaviour, and right: judged by loops over heads in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attentions import BATCH, LENGTH, WIDTH, Drawn, Options
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_muonclip.qk_clip.describe.describe import Found, describe
from lightning_muonclip.qk_clip.describe.isolate import Isolated
from lightning_muonclip.qk_clip.describe.layout import KINDS
from lightning_muonclip.qk_clip.describe.probe import MIXED, SIDES, Probe
from lightning_muonclip.qk_clip.describe.prove import deviation
from lightning_muonclip.qk_clip.describe.survey import Survey
from lightning_muonclip.qk_clip.describe.trace import flex_attention_traced

options = st.builds(
    Options,
    heads=st.sampled_from([1, 2, 4, 6]),
    groups=st.sampled_from([1, 2, 3, 4]),
    channels=st.sampled_from([4, 8]),
    fused=st.sampled_from(["no", "no", "blocks", "heads", "tensor"]),
    bias=st.booleans(),
    call=st.sampled_from(["sdpa", "matmul", "einsum", "merged"]),
    rotary=st.booleans(),
    norm=st.sampled_from(["", "", "", "gain", "heads", "no gain"]),
    offset=st.sampled_from([0.0, 1.0]),
    tied=st.sampled_from([False, False, False, True]),
    relative=st.sampled_from([False, False, True]),
    every=st.booleans(),
    clamp=st.sampled_from([False, False, False, True]),
    returns_keys=st.sampled_from([False, False, True]),
)


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


def described(model: nn.Module, *args: Any) -> list[Found]:
    with torch.no_grad(), Survey(model) as survey:
        model(*args)
    with flex_attention_traced(survey.calls_flex_attention):
        return describe(survey.calls)


def made(own: Options) -> Drawn:
    torch.manual_seed(0)
    return Drawn(own)


def logits(module: Drawn, x: Tensor) -> tuple[list[Tensor], Any]:
    """One matrix of products for every batch entry and query head, in loops."""
    module = copy.deepcopy(module).double()
    module.seen.clear()
    with torch.no_grad():
        output = module(x.double())
    query, key = module.seen[0]
    key = module.repeated(key)
    return [torch.stack([query[b, h] @ key[b, h].T for b in range(len(query))]) for h in range(query.shape[1])], output


def scaled(module: Drawn, found: Found, of_query: Tensor, of_key: Tensor) -> Drawn:
    """A copy whose channels are multiplied as the tables say."""
    assert found.layout is not None
    module = copy.deepcopy(module).double()
    done: set[tuple[str, str]] = set()
    for name, table in found.layout.tables:
        param = module.get_parameter(name)
        for index in torch.cartesian_prod(*(torch.arange(n) for n in table.kinds.shape)).view(-1, table.kinds.ndim):
            kind, head = KINDS[int(table.kinds[tuple(index)])], int(table.heads[tuple(index)])
            if kind == "*":
                continue
            place: list[Any] = [slice(None)] * param.ndim
            for dim, own in zip(table.dims, index.tolist()):
                place[dim] = own
            factor = (of_query if kind == "q" else of_key)[max(head, 0)]
            with torch.no_grad():
                param[tuple(place)] = (param[tuple(place)] + table.offset) * factor - table.offset
        done.add((name, str(table.kinds.tolist())))
    return module


def check(module: Drawn, found: Found) -> None:
    """Every head's logits become factor times what they were, and a power of two goes unnoticed."""
    layout, x = found.layout, inputs()
    assert layout is not None
    heads, groups = layout.num_heads, layout.num_key_value_heads
    # Where queries tell nothing of their heads, those of the keys, or one head, are all that can be told.
    assert heads == module.options.heads or heads == 1 or (layout.sides == "k" and heads == groups)
    of_query, of_key = torch.linspace(0.5, 2, heads).double() ** 1.1, torch.linspace(3, 0.7, groups).double()
    if any((table.heads[table.kinds != KINDS.index("*")] < 0).any() for _, table in layout.tables):
        of_query, of_key = of_query[:1].expand(heads), of_key[:1].expand(groups)
    is_tied = layout.is_tied
    before, output = logits(module, x)
    after, _ = logits(scaled(module, found, of_query, of_key), x)
    of_queries, of_keys = (units[0].reshape(BATCH, -1)[0] for units in (layout.query_units, layout.key_units))
    for head, (a, b) in enumerate(zip(before, after)):
        factor = torch.ones((), dtype=torch.float64)
        if "q" in layout.sides:
            factor = factor * of_query[of_queries[head * len(of_queries) // len(before)]]
        if "k" in layout.sides:
            factor = factor * of_key[of_keys[head * len(of_keys) // len(before)]]
        factor = factor**2 if is_tied else factor
        torch.testing.assert_close(b, a * factor, rtol=1e-9, atol=1e-9)
    if layout.sides == "qk" and not is_tied:
        of_key = torch.exp2(torch.arange(groups).double() % 3 - 1)
        if any((table.heads[table.kinds != KINDS.index("*")] < 0).any() for _, table in layout.tables):
            of_key = of_key[:1].expand(groups)
        _, same = logits(scaled(module, found, 1 / of_key.repeat_interleave(heads // groups), of_key), x)
        torch.testing.assert_close(same, output, rtol=1e-9, atol=1e-9)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(options)
def test_drawn_attention_is_read_right_or_refused(own: Options) -> None:
    assume(own.heads % own.groups == 0)
    assume(not (own.tied and own.fused != "no"))
    module = made(own)
    (found,) = described(module, inputs())
    if own.clamp and not own.norm:
        assert found.layout is None and found.reason
    elif own.norm == "no gain":
        assert found.layout is None or (found.layout.qk_norm and not found.layout.sides)  # watched
    elif not (own.tied or own.relative or own.returns_keys or own.clamp or own.norm == "heads"):
        assert found.layout is not None, found.reason
    if found.layout is not None:
        check(module, found)


@pytest.mark.parametrize("heads", [16, 17, 40])
def test_more_heads_than_one_digit_tells(heads: int) -> None:
    module = made(Options(heads=heads, groups=heads, fused="blocks"))
    (found,) = described(module, inputs())
    check(module, found)
    (table,) = (own for name, own in found.layout.tables if name == "projection.weight")  # type: ignore[union-attr]
    expected = torch.arange(heads).repeat_interleave(4).repeat(3)
    assert torch.equal(table.heads, expected)  # values too
    assert table.kinds.unique_consecutive().tolist() == [0, 1, 5]


def test_of_thousands_of_channels_none_seems_to_feed_one_side_by_chance() -> None:
    module = made(Options(heads=2, channels=1024, tied=True))
    isolated = Isolated(module, (inputs(),), {}, torch.float32)  # less exact, so that chance has more room
    sides = Probe(isolated, isolated.run()).coordinates(lambda output: output.side, len(SIDES))
    assert (sides["projections.0.weight", (0,)] == MIXED).all()


def test_queries_alone_where_key_heads_are_shared_in_another_order() -> None:
    module = made(Options(heads=4, groups=2, every=True))
    (found,) = described(module, inputs())
    assert found.layout is not None and found.layout.sides == "q"
    assert "in another order" in found.layout.notes[0]
    check(module, found)


def test_keys_that_are_returned_are_left_alone() -> None:
    module = made(Options(returns_keys=True))
    (found,) = described(module, inputs())
    assert found.layout is not None and found.layout.sides == "q"


def test_a_norm_is_a_fact() -> None:
    gain, every = made(Options(norm="gain", offset=1.0)), made(Options(norm="heads"))
    (of_gain,), (of_every,) = described(gain, inputs()), described(every, inputs())
    assert of_gain.layout is not None and of_every.layout is not None
    assert of_gain.layout.qk_norm and of_every.layout.qk_norm
    entries = {name: table for name, table in of_gain.layout.tables if table.scaled.any()}
    assert set(entries) == {"gains.0", "gains.1"}
    assert all(table.offset == 1 and (table.heads == -1).all() for table in entries.values())
    (plain,) = described(made(Options()), inputs())
    assert plain.layout is not None and not plain.layout.qk_norm


@pytest.mark.parametrize("own", [Options(norm="no gain"), Options(clamp=True, bias=False)])
def test_what_does_not_scale_is_refused_or_watched(own: Options) -> None:
    module = made(own)
    (found,) = described(module, inputs())
    if own.clamp:
        assert "do not scale with their weights" in found.reason
    else:
        assert found.layout is not None and found.layout.qk_norm and not found.layout.sides
    before, _ = logits(module, inputs())
    with torch.no_grad():
        for projection in module.projections[:2]:
            for param in projection.parameters():
                param.mul_(2)
    after, _ = logits(module, inputs())
    for a, b in zip(before, after):
        assert not torch.allclose(b, 4 * a, rtol=1e-3)


def test_masks_deviate_by_nothing_and_lost_numbers_by_all() -> None:
    masked, lost = torch.tensor([1.0, -torch.inf]), torch.tensor([1.0, torch.nan])
    assert deviation(masked, masked.clone()) == 0
    assert deviation(masked, lost) == deviation(lost, lost.clone()) == torch.inf


class Twice(nn.Module):
    """One module that attends twice in a forward, and another between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = made(Options()), made(Options(fused="blocks"))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.b(self.a(x)))


def test_a_module_that_runs_twice_is_one_attention() -> None:
    found = described(Twice(), inputs())
    assert [(own.name, own.calls) for own in found] == [("a", [0, 2]), ("b", [1])]


class Several(nn.Module):
    """One module that attends twice, with other weights each time."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for projection in self.projections:
            heads = projection(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            x = x + F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return x


def test_several_attentions_in_one_module_are_refused() -> None:
    found = described(Several(), inputs())
    assert [own.reason for own in found] == ["it makes several attentions, whose heads are different channels"] * 2


def test_the_forward_of_the_model_is_left_as_it_was() -> None:
    model = Twice()
    state, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    described(model, inputs())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
