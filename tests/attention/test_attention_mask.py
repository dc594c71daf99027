"""AttentionMask: which pairs are visible."""

from __future__ import annotations

import pickle
from functools import partial
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from oracles import causal, module_max_logits

from lightning_muonclip import Attention, AttentionMask, QKClip
from lightning_muonclip.attention.masks import BLOCK
from lightning_muonclip.experiment.gpt import GPT

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
    two = AttentionMask(causal=False, documents=IDS) & AttentionMask(causal=False, documents=IDS.flip(1))
    visible = two.dense(5)
    assert visible is not None and torch.equal(visible[:, 0], SAME & SAME.flip(1, 2))


@pytest.mark.parametrize("documents", [IDS.float(), IDS > 0, IDS[0], IDS[:, None]])
def test_documents_that_are_no_matrix_of_integers_are_refused(documents: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"documents must be integers of shape \(batch, length\), one id a token"):
        AttentionMask(documents=documents)


def test_documents_of_another_length_and_an_empty_window_are_refused() -> None:
    with pytest.raises(ValueError, match="documents are for 5 tokens, the sequence has 3"):
        Attention(8, 2)(torch.randn(2, 3, 8), mask=AttentionMask(documents=IDS))
    with pytest.raises(ValueError, match="a window of 0 lets no query see even itself; give at least 1, or None"):
        AttentionMask(window=0)


def test_or_keeps_outside_what_both_say() -> None:
    keep = torch.ones(2, 5, dtype=torch.bool)
    near, first = AttentionMask(window=2, padding=keep), AttentionMask(padding=keep, mask_mod=lambda b, h, q, k: k < 1)
    both = near | first
    assert both.causal and both.padding is keep and both.window is None
    ((one, other),) = both.either
    assert not one.causal and one.padding is None and one.window == 2 and other.mask_mod is first.mask_mod
    assert (near | AttentionMask(padding=keep)).either == ()  # which hides no more than what both say
    lengths = torch.tensor([1, 2])
    prefixed = AttentionMask(prefix=lengths) | AttentionMask(window=2, prefix=lengths)
    assert prefixed.prefix is lengths and prefixed.either == ()


def test_a_prefix_is_seen_by_all() -> None:
    visible = AttentionMask(prefix=torch.tensor([2, 0])).dense(3)
    assert visible is not None
    assert visible[:, 0].int().tolist() == [[[1, 1, 0], [1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 0], [1, 1, 1]]]
    shorter = AttentionMask(prefix=torch.tensor([2, 0])) & AttentionMask(prefix=torch.tensor([3, 1]))
    assert shorter.prefix is not None and shorter.prefix.tolist() == [2, 0]
    assert (AttentionMask(prefix=torch.tensor([2])) & AttentionMask()).prefix is None
    with pytest.raises(ValueError, match="in spite of causality, but causal=False hides nothing"):
        AttentionMask(causal=False, prefix=torch.tensor([2]))
    with pytest.raises(ValueError, match=r"prefix must be integers of shape \(batch,\)"):
        AttentionMask(prefix=torch.tensor([[2.0]]))


def test_layers_share_what_is_built() -> None:
    calls = []
    mask = AttentionMask(mask_mod=lambda b, h, q, k: calls.append(1) or k < 4)
    model = GPT(partial(Attention, num_attention_heads=2), 8, 8, num_hidden_layers=3)
    x = torch.randn(2, 5, 8)
    for layer in model.layers:
        layer.self_attn(x, mask=mask)
    assert len(calls) == 1
    with QKClip(model):
        for layer in model.layers:
            layer.self_attn(x, mask=mask)
    assert len(calls) == 2  # once more for the maxima, without causality
    model.layers[0].self_attn(x[:, :4], mask=mask)
    assert len(calls) == 3  # another length
    near = AttentionMask().within(2)
    assert near.window == 2 and AttentionMask().within(2) is not near
    assert mask.within(2) is mask.within(2) and mask.within(2).mask_mod is mask.mask_mod


def test_what_inference_has_built_does_not_spoil_training() -> None:
    module, mask = Attention(8, 2), AttentionMask(padding=KEEP)
    x = torch.randn(2, 3, 8)
    with torch.inference_mode():
        expected = module(x, mask=mask)
    output = module(x, mask=mask)
    output.sum().backward()
    assert torch.equal(output, expected)


def test_a_mask_moves_and_travels() -> None:
    union = AttentionMask(padding=KEEP) | AttentionMask(documents=torch.ones(2, 3, dtype=torch.long))
    union.dense(3)
    assert {x.device.type for mask in union.to("meta").either[0] for x in mask._tensors().values()} == {"meta"}
    copied = pickle.loads(pickle.dumps(union))
    found, expected = copied.dense(3), union.dense(3)
    assert expected is not None and torch.equal(found, expected)
    moved = move_data_to_device({"mask": AttentionMask(padding=KEEP)}, torch.device("meta"))
    assert moved["mask"].padding.device.type == "meta"


def test_a_union_with_a_part_for_another_length_is_refused() -> None:
    union = AttentionMask(padding=KEEP) | AttentionMask(documents=torch.ones(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="documents are for 4 tokens, the sequence has 3"):
        union.dense(3)


def test_a_block_mask_is_no_larger_than_it_must_be() -> None:
    assert AttentionMask(causal=False).block_mask(2 * BLOCK) is None
    table = torch.tensor([True, False])
    masks = {
        (1, 1): AttentionMask(),
        (3, 1): AttentionMask(padding=torch.ones(3, 500, dtype=torch.bool)),
        (1, 2): AttentionMask(mask_mod=lambda b, h, q, k: table[h] | (k < 3)),
    }
    for (batch, heads), mask in masks.items():
        block_mask = mask.block_mask(500, batch=3, heads=2)
        assert block_mask is not None and block_mask.shape == (batch, heads, 512, 512)
        assert mask.block_mask(500, batch=3, heads=2) is block_mask
    near = AttentionMask(window=100).block_mask(1024)
    assert near is not None and torch.equal(near.to_dense()[0, 0].bool(), torch.ones(8, 8).tril().triu(-1).bool())
    full = near.full_kv_num_blocks
    assert full is not None and full.sum() == 0


def test_tokens_that_only_the_user_knows_how_to_hide() -> None:
    """StreamingLLM's sinks: a window, and the first tokens beside it."""
    mask = AttentionMask(window=2) | AttentionMask(mask_mod=lambda b, h, q, k: k < 1)
    module, x = Attention(8, 2), torch.randn(1, 6, 8)
    visible = causal(6) & ((torch.arange(6)[:, None] - torch.arange(6) < 2) | (torch.arange(6) < 1))
    with QKClip(module) as qk_clip:
        module(x, mask=mask)
        found = qk_clip.max_logits[0].clone()
    torch.testing.assert_close(found.double(), module_max_logits(module, x, visible), rtol=1e-5, atol=1e-6)


def test_padding_of_one_part_counts_through_the_other() -> None:
    padding = torch.tensor([[True, True, True, False]])
    part = AttentionMask(padding=padding) | AttentionMask(causal=False, window=1)
    assert part.pads_in_part and not (AttentionMask(padding=padding) | AttentionMask(padding=padding)).pads_in_part
    visible, counted = part.dense(4), part.dense(4, counted=True)
    assert visible is not None and counted is not None
    assert visible[0, 0, 3].tolist() == [True] * 4 and counted[0, 0, 3].tolist() == [False] * 3 + [True]
    assert torch.equal(visible[0, 0, :3], counted[0, 0, :3])
