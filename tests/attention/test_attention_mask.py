"""AttentionMask: which pairs are visible."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import causal, module_max_logits

from lightning_muonclip import Attention, AttentionMask, QKClip

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


IDS = torch.tensor([[0, 0, 1, 1, -1], [7, 7, 7, -1, 3]])
SAME = (IDS[:, :, None] == IDS[:, None]) & (IDS[:, :, None] >= 0)
NEAR = (torch.arange(5)[:, None] - torch.arange(5)).abs() < 2


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("options", [{"window": 2}, {"documents": IDS}, {"window": 2, "documents": IDS}], ids=str)
def test_windows_and_documents(is_causal: bool, padded: bool, options: dict[str, Any]) -> None:
    padding = torch.tensor([[True] * 5, [True, False, True, True, True]]) if padded else None
    mask = AttentionMask(causal=is_causal, padding=padding, **options)
    expected = causal(5) if is_causal else torch.ones(5, 5, dtype=torch.bool)
    expected = expected & NEAR if "window" in options else expected
    expected = expected & SAME if "documents" in options else expected
    expected = expected & padding[:, None] if padding is not None else expected
    visible = mask.dense(5)
    assert visible is not None
    assert torch.equal(visible.expand(2, 1, 5, 5)[:, 0], expected.expand(2, 5, 5))

    counted = expected & padding[:, :, None] if padding is not None else expected
    module, x = Attention(8, 2), torch.randn(2, 5, 8)
    with QKClip(module) as qk_clip:
        module(x, mask=mask)
        found = qk_clip.max_logits[0].clone()
    torch.testing.assert_close(
        found.double(), module_max_logits(module, x, counted.expand(2, 5, 5)[:, None]), rtol=1e-5, atol=1e-6
    )


def test_documents_see_themselves_as_if_they_were_alone() -> None:
    module, x = Attention(8, 2), torch.randn(1, 5, 8)
    ids = torch.tensor([[4, 4, 9, 9, 9]])
    positions = torch.tensor([[0, 1, 0, 1, 2]])
    packed = module(x, mask=AttentionMask(documents=ids), position_ids=positions)
    torch.testing.assert_close(packed, torch.cat([module(x[:, :2]), module(x[:, 2:])], 1))


def test_and_takes_the_smaller_window_and_the_only_documents() -> None:
    both = AttentionMask(window=3) & AttentionMask(window=2, documents=IDS)
    assert both.window == 2 and both.documents is IDS
    assert (both & AttentionMask(causal=False)).window == 2
    assert (both & both).documents is IDS
    with pytest.raises(ValueError, match="both masks have documents, whose ids may mean different ones; give one mask"):
        both & AttentionMask(documents=IDS.clone())


@pytest.mark.parametrize("documents", [IDS.float(), IDS > 0, IDS[0], IDS[:, None]])
def test_documents_that_are_no_matrix_of_integers_are_refused(documents: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"documents must be integers of shape \(batch, length\), one id a token"):
        AttentionMask(documents=documents)


def test_documents_of_another_length_and_an_empty_window_are_refused() -> None:
    with pytest.raises(ValueError, match="documents are for 5 tokens, the sequence has 3"):
        Attention(8, 2)(torch.randn(2, 3, 8), mask=AttentionMask(documents=IDS))
    with pytest.raises(ValueError, match="a window of 0 lets no query see even itself; give at least 1, or None"):
        AttentionMask(window=0)
