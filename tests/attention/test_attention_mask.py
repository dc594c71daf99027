"""AttentionMask: which pairs are visible."""

from __future__ import annotations

import pytest
import torch
from oracles import causal

from lightning_muonclip import Attention, AttentionMask

KEEP = torch.tensor([[True, True, False], [True, True, True]])


def test_causality_alone_needs_no_matrix() -> None:
    assert AttentionMask().causal
    assert AttentionMask().dense(7) is None
    assert AttentionMask(causal=False).dense(7) is None


def test_padding_hides_keys_from_every_query() -> None:
    visible = AttentionMask(causal=False, padding=KEEP).dense(3)
    assert visible is not None
    assert visible.expand(2, 1, 3, 3).tolist() == [[[row.tolist()] * 3] for row in KEEP]


def test_causality_and_padding_are_both_obeyed() -> None:
    visible = AttentionMask(padding=KEEP).dense(3)
    assert visible is not None
    assert visible.tolist() == [
        [[[True, False, False], [True, True, False], [True, True, False]]],
        [causal(3).tolist()],
    ]


def test_and_is_visible_in_both() -> None:
    other = torch.tensor([[False, True, True], [True, True, True]])
    both = AttentionMask(causal=False, padding=KEEP) & AttentionMask(causal=False, padding=other)
    assert not both.causal
    assert both.padding is not None
    assert both.padding.tolist() == [[False, True, False], [True, True, True]]
    for mask in (
        AttentionMask() & AttentionMask(causal=False, padding=KEEP),
        AttentionMask(padding=KEEP) & AttentionMask(),
    ):
        assert mask.causal and mask.padding is KEEP


@pytest.mark.parametrize("padding", [KEEP.float(), KEEP.long(), KEEP[0], KEEP[:, None]])
def test_padding_that_is_no_boolean_matrix_is_refused(padding: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"padding must be boolean of shape \(batch, length\), True for real tokens"):
        AttentionMask(padding=padding)


def test_padding_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="padding is for 3 tokens, the sequence has 5"):
        Attention(8, 2)(torch.randn(2, 5, 8), mask=AttentionMask(padding=KEEP))


def test_without_causality_the_order_of_keys_is_nothing_but_their_position() -> None:
    module, x = Attention(8, 2), torch.randn(1, 5, 8)
    order = torch.tensor([3, 1, 4, 0, 2])
    positions = torch.arange(5)[None]
    mask = AttentionMask(causal=False)
    shuffled = module(x[:, order], mask=mask, position_ids=positions[:, order])
    torch.testing.assert_close(shuffled, module(x, mask=mask)[:, order])
