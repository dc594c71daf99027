"""Attention by hand whose logits are elsewhere than in the product, in several pieces, or among other products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_muonclip import QKClip

HEADS, DIM, WIDTH = 4, 4, 16

#: Attention of queries, keys and values of shape (batch, heads, length, DIM).
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attends(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.attend = attend

    def parts(self, x: Tensor) -> list[Tensor]:
        return [p(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for p in (self.query, self.key, self.value)]

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*self.parts(x)).transpose(1, 2).flatten(2)

    @torch.no_grad()
    def expected(self, x: Tensor) -> Tensor:
        query, key, _ = self.parts(x)
        return (query @ key.mT / 2).amax((0, 2, 3))


def batch_inside(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k = (x.transpose(0, 1).flatten(0, 1) for x in (query, key))
    logits = (torch.bmm(q, k.mT) / 2).view(HEADS, len(query), q.shape[1], q.shape[1])
    return (logits.softmax(-1) @ value.transpose(0, 1)).transpose(0, 1)


def heads_last(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    logits = torch.einsum("bhid,bhjd->bijh", query, key) / 2
    return torch.einsum("bijh,bhjd->bhid", logits.softmax(2), value)


def permuted(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    logits = (query @ key.mT / 2).permute(0, 2, 3, 1)
    return logits.softmax(2).permute(0, 3, 1, 2) @ value


def rows_together(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    logits = query @ key.mT / 2
    return logits.flatten(0, 2).softmax(-1).view_as(logits) @ value


def one_key_at_a_time(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    every = key[:, :, None].expand(-1, -1, query.shape[2], -1, -1)
    logits = (query.unsqueeze(-2) @ every.mT).squeeze(-2) / 2
    return logits.softmax(-1) @ value


def sample_by_sample(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.stack([(q @ k.mT / 2).softmax(-1) @ v for q, k, v in zip(query, key, value)])


def chunks_of_queries(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.cat([(q @ key.mT / 2).softmax(-1) @ value for q in query.split(3, 2)], 2)


def chunks_of_logits(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    logits = query @ key.mT / 2
    return torch.cat([part.softmax(-1) @ value for part in logits.split(2, 2)], 2)


def joined_chunks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.cat([q @ key.mT for q in query.split(3, 2)], 2).div(2).softmax(-1) @ value


def put_into_a_buffer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    length = query.shape[2]
    logits = query.new_full((*query.shape[:3], length + 1), 0.5)  # and a sink
    for start in range(0, length, 2):
        logits[:, :, start : start + 2, :-1] = query[:, :, start : start + 2] @ key.mT / 2
    return logits.softmax(-1)[..., :-1] @ value


def padded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    logits = F.pad(query @ key.mT / 2, (1, 0), value=0.5)
    return logits.softmax(-1)[..., 1:] @ value


def in_place(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    logits = query @ key.mT
    logits.mul_(0.5)
    logits += torch.arange(key.shape[2]).to(logits)
    return logits.softmax(-1) @ value


def overwritten(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    logits = query @ key.mT / 2
    logits.subtract_(logits.detach().amax(-1, keepdim=True)).clip_(min=-50)
    return F.dropout(logits.softmax(-1), 0.0, True, True) @ value


def positions(query: Tensor, length: int) -> Tensor:
    """Another summand: queries times a table."""
    return query @ torch.linspace(-1, 1, DIM * length).view(DIM, length)


def put_back(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    logits = query @ key.mT / 2
    logits[:, :, 1:, 1:] = logits[:, :, 1:, 1:] + positions(query[:, :, 1:], key.shape[2] - 1)
    return logits.softmax(-1) @ value


def joined_sums(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    chunks = [q @ key.mT / 2 + positions(q, key.shape[2]) for q in query.split(3, 2)]
    return torch.cat(chunks, 2).softmax(-1) @ value


def added_in_place(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    logits = torch.linspace(0, 9, key.shape[2]).repeat(query.shape[0] * HEADS, query.shape[2], 1)
    logits.baddbmm_(
        query.flatten(0, 1), key.flatten(0, 1).mT, beta=0.5, alpha=0.5
    )  # what it returns is the same tensor
    return logits.view(*query.shape[:3], -1).softmax(-1) @ value


def added_by_keywords(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    logits = torch.add(input=query @ key.mT, other=torch.arange(key.shape[2]), alpha=3)
    return (logits / 2).softmax(-1) @ value


def subtracted(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (torch.arange(key.shape[2]) - (-query @ key.mT) / 2).softmax(-1) @ value


def subtracted_with_a_factor(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    logits = torch.arange(key.shape[2]).expand(*query.shape[:3], -1).to(query)
    return torch.sub(logits, query @ key.mT, alpha=-0.5).softmax(-1) @ value


def grouped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k = (x.unflatten(1, (2, 2)) for x in (query, key))
    return ((q @ k.mT / 2).softmax(-1)).flatten(1, 2) @ value


def beside_others(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Longer inputs have another product, a softmax of their own, and another one by hand."""
    if query.shape[2] > 5:
        other = query @ query.mT
        value = value + 0 * (other.sum() + value.softmax(-1).sum() + value.exp().sum())
    return (query @ key.mT / 2).softmax(-1) @ value


WAYS: list[Attend] = [
    *(batch_inside, heads_last, permuted, rows_together, one_key_at_a_time, sample_by_sample, chunks_of_queries),
    *(chunks_of_logits, joined_chunks, put_into_a_buffer, padded, in_place, overwritten, grouped, beside_others),
    *(put_back, joined_sums, added_in_place, added_by_keywords, subtracted, subtracted_with_a_factor),
]


def inputs(batch: int, length: int) -> Tensor:
    x = torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(batch))
    return x * torch.linspace(0.5, 2, batch)[:, None, None]


@pytest.mark.parametrize("attend", WAYS)
def test_every_head_has_its_own_maximum_in_every_forward(attend: Attend) -> None:
    model = Attends(attend)
    threshold = float(model.expected(inputs(4, 4)).median())
    with QKClip(model, threshold) as qk_clip:
        for batch, length in ((4, 4), (3, 8), (8, 5), (4, 4)):  # sizes that could be mistaken for one another
            x = inputs(batch, length)
            model(x)
            assert qk_clip.sides == {"": "k" if attend in (put_back, joined_sums) else "q and k"}  # q meets a table too
            expected = model.expected(x)
            torch.testing.assert_close(qk_clip.max_logits[0], expected, rtol=1e-5, atol=1e-6)
            qk_clip.step()
            torch.testing.assert_close(model.expected(x), expected.clamp(max=threshold), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attend", [batch_inside, heads_last, chunks_of_queries, in_place])
def test_it_stays_one_graph(attend: Attend) -> None:
    model, x = Attends(attend), inputs(2, 6)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with QKClip(model, 1e9) as qk_clip:
        for _ in range(3):
            compiled(x)
            torch.testing.assert_close(qk_clip.step().max_logits[0], model.expected(x), rtol=1e-5, atol=1e-6)


def test_logits_that_are_the_maximum_of_their_row_are_seen_to_change() -> None:
    """A query has one visible key and a sink; the row's maximum is subtracted, so that the larger of them is always 0."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        logits = (query @ key.mT / 2).masked_fill(~torch.eye(query.shape[2], dtype=torch.bool), -torch.inf)
        logits = torch.cat([logits, logits.new_full((*logits.shape[:-1], 1), 0.1)], -1)
        return (logits - logits.amax(-1, keepdim=True)).softmax(-1)[..., :-1] @ value

    model, x = Attends(attend), inputs(2, 6)
    with QKClip(model, 1e9) as qk_clip:
        model(x)
        query, key, _ = model.parts(x)
        expected = (query * key / 2).sum(-1).amax((0, 2))
        torch.testing.assert_close(qk_clip.max_logits[0], expected, rtol=1e-5, atol=1e-6)
        assert qk_clip.sides == {"": "q and k"}


def test_a_product_that_is_added_to_another_is_a_summand() -> None:
    class Sum(Attends):
        def logits(self, x: Tensor) -> Tensor:
            query, key, value = (part.flatten(0, 1) for part in self.parts(x))
            return torch.baddbmm(query @ value.mT, query, key.mT, beta=0.5)

        def forward(self, x: Tensor) -> Tensor:
            return (self.logits(x).softmax(-1) @ x.repeat_interleave(HEADS, 0)).view(len(x), HEADS, -1).mean(1)

    model, x = Sum(heads_last), inputs(2, 6)
    with QKClip(model, 1e9) as qk_clip:
        model(x)
        expected = model.logits(x).view(2, HEADS, -1).amax((0, 2))
        torch.testing.assert_close(qk_clip.max_logits[0], expected, rtol=1e-5, atol=1e-6)
        assert "value.weight: k(G 4)" in str(qk_clip.summary())


def head_by_head(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    logits = [query[:, h] @ key[:, h].mT / 2 for h in range(HEADS)]
    return torch.stack(logits, 1).softmax(-1) @ value


def halves_of_heads(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    logits = [q @ k.mT / 2 + i for i, (q, k) in enumerate(zip(query.chunk(2, 1), key.chunk(2, 1)))]
    return torch.cat(logits, 1).softmax(-1) @ value


def heads_in_a_buffer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    logits = query.new_zeros(*query.shape[:3], key.shape[2])
    logits[:, ::2] = query[:, :2] @ key[:, :2].mT / 2
    logits[:, 1::2] = query[:, 2:] @ key[:, 2:].mT / 2
    return logits.softmax(-1) @ value


@pytest.mark.parametrize("attend", [head_by_head, halves_of_heads, heads_in_a_buffer])
def test_heads_with_a_product_each_are_not_taken_for_one(attend: Attend) -> None:
    model = Attends(attend)
    with QKClip(model, 1.0), pytest.raises(ValueError, match="several products, whose heads are different channels"):
        model(inputs(3, 6))


def test_a_table_of_the_shape_of_the_logits_does_not_stand_in_for_the_keys() -> None:
    class Table(Attends):
        def __init__(self) -> None:
            super().__init__(heads_last)
            self.table = nn.Parameter(torch.randn(HEADS, 6, DIM))

        def forward(self, x: Tensor) -> Tensor:
            query, key, value = self.parts(x)
            positions = (query @ self.table.mT).flatten(0, 1)
            logits = torch.baddbmm(positions, query.flatten(0, 1), key.flatten(0, 1).mT, alpha=0.5)
            return (logits.unflatten(0, (-1, HEADS)).softmax(-1) @ value).transpose(1, 2).flatten(2)

    model, x = Table(), inputs(2, 6)
    with QKClip(model, 1e9) as qk_clip:
        model(x)
        torch.testing.assert_close(qk_clip.max_logits[0], model.expected(x), rtol=1e-5, atol=1e-6)
        assert qk_clip.sides == {"": "k"}


def test_another_way_than_the_one_that_was_read_is_an_error() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        logits = query @ key.mT / 2
        if query.shape[2] > 5:
            logits = logits + query @ value.mT
        return logits.softmax(-1) @ value

    model = Attends(attend)
    with QKClip(model, 1e9):
        model(inputs(2, 5))
        with pytest.raises(RuntimeError, match="in another way than in the forward in which it was read"):
            model(inputs(2, 6))
