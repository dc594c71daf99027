"""AttentionMask: which pairs are visible."""

from __future__ import annotations

import pickle
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import trainer
from lightning.fabric.utilities.apply_func import move_data_to_device
from oracles import causal, module_max_logits
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_muonclip import Attention, AttentionMask, QKClip
from lightning_muonclip.attention.blocks import BLOCK
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


def test_causality_and_padding_combine() -> None:
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
    with pytest.raises(ValueError, match="padding is for 3 tokens, but the sequence has 5"):
        Attention(8, 2)(torch.randn(2, 5, 8), mask=AttentionMask(padding=KEEP))


def test_without_causality_only_positions_order_the_keys() -> None:
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


def test_documents_attend_as_if_alone() -> None:
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
    with pytest.raises(ValueError, match=r"documents must be integers of shape \(batch, length\), one id per token"):
        AttentionMask(documents=documents)


def test_documents_of_another_length_and_an_empty_window_are_refused() -> None:
    with pytest.raises(ValueError, match="documents are for 5 tokens, but the sequence has 3"):
        Attention(8, 2)(torch.randn(2, 3, 8), mask=AttentionMask(documents=IDS))
    with pytest.raises(ValueError, match="window must be an integer of at least 1, got 0; use None for any distance"):
        AttentionMask(window=0)


def test_or_keeps_shared_conditions_outside() -> None:
    keep = torch.ones(2, 5, dtype=torch.bool)
    near, first = AttentionMask(window=2, padding=keep), AttentionMask(padding=keep, mask_mod=lambda b, h, q, k: k < 1)
    both = near | first
    assert both.causal and both.padding is keep and both.window is None
    ((one, other),) = both.either
    assert not one.causal and one.padding is None and one.window == 2 and other.mask_mod is first.mask_mod
    assert (near | AttentionMask(padding=keep)).either == ()  # hides no more than the shared conditions
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
    with pytest.raises(ValueError, match="prefix needs causal=True; without causality every token sees"):
        AttentionMask(causal=False, prefix=torch.tensor([2]))
    with pytest.raises(ValueError, match=r"prefix must be integers of shape \(batch,\)"):
        AttentionMask(prefix=torch.tensor([[2.0]]))


def test_invalid_masks_are_refused() -> None:
    x = torch.randn(2, 3, 8)
    for mask in (KEEP, torch.zeros(2, 1, 3, 3)):
        with pytest.raises(
            ValueError, match=r"must be an AttentionMask, got Tensor; use AttentionMask\(padding=keep\)"
        ):
            Attention(8, 2)(x, mask=mask)  # type: ignore[arg-type]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"causal": KEEP}, r"causal must be True or False, got torch.bool of shape \(2, 3\); pass masks by keyword"),
        ({"padding": [[True]]}, r"padding must be boolean .*; got \[\[True\]\]"),
        ({"documents": [[1]]}, r"documents must be integers .*; got \[\[1\]\]"),
        ({"prefix": 3}, "prefix must be integers .*; got 3"),
        ({"window": 2.5}, "window must be an integer of at least 1, got 2.5"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            AttentionMask(**options)


def test_layers_share_built_masks() -> None:
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


def test_masks_built_in_inference_mode_are_not_reused_in_training() -> None:
    module, mask = Attention(8, 2), AttentionMask(padding=KEEP)
    x = torch.randn(2, 3, 8)
    with torch.inference_mode():
        expected = module(x, mask=mask)
    output = module(x, mask=mask)
    output.sum().backward()
    assert torch.equal(output, expected)


def test_a_mask_moves_between_devices_and_pickles() -> None:
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
    with pytest.raises(ValueError, match="documents are for 4 tokens, but the sequence has 3"):
        union.dense(3)


def test_a_block_mask_broadcasts_where_it_can() -> None:
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


def test_a_mask_mod_of_the_user() -> None:
    """StreamingLLM's sinks: a window plus the first tokens."""
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


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 300])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 500, 512])
def test_blocks_by_distance_are_those_of_all_pairs(causal: bool, window: int | None, length: int) -> None:
    mask = AttentionMask(causal, window=window)
    found, visible = mask.block_mask(length), mask.dense(length)
    if found is None:
        assert not causal and window is None and length % BLOCK == 0
        return
    if visible is None:
        visible = torch.ones(length, length, dtype=torch.bool)[None, None]
        visible = visible.tril() if causal else visible
    size = found.shape[-1]
    whole = torch.zeros(size, size, dtype=torch.bool)
    whole[:length, :length] = visible
    blocks = whole.view(size // BLOCK, BLOCK, -1, BLOCK).transpose(1, 2).flatten(2)
    listed = {"kv": found.kv_num_blocks, "full_kv": found.full_kv_num_blocks}
    indices = {"kv": found.kv_indices, "full_kv": found.full_kv_indices}
    named = {
        name: {(i, int(j)) for i in range(len(blocks)) for j in indices[name][0, 0, i, : listed[name][0, 0, i]]}
        for name in listed
    }
    assert named["kv"] | named["full_kv"] == {(int(i), int(j)) for i, j in blocks.any(-1).nonzero()}
    rows = blocks[: length // BLOCK]  # padding queries are undefined
    assert {pair for pair in named["full_kv"] if pair[0] < len(rows)} == {
        (int(i), int(j)) for i, j in rows.all(-1).nonzero()
    }
    q, k = torch.arange(length)[:, None], torch.arange(length)
    zero = torch.tensor(0)
    assert torch.equal(found.mask_mod(zero, zero, q, k) & torch.ones_like(visible), visible)


def test_nested_unions_are_checked() -> None:
    some = AttentionMask(causal=False, padding=torch.ones(2, 7, dtype=torch.bool))
    nested = (some | AttentionMask(window=1)) | AttentionMask(window=2)
    with pytest.raises(ValueError, match="padding is for 7 tokens, but the sequence has 5"):
        nested.dense(5)
    with pytest.raises(ValueError, match="padding is for 2 sequences, but the batch has 3"):
        nested.dense(7, batch=3)
    visible = nested.dense(7)
    assert visible is not None and visible.shape[0] == 2


def test_mismatched_paddings_are_refused() -> None:
    both = AttentionMask(padding=torch.ones(2, 7, dtype=torch.bool)) & AttentionMask(padding=KEEP)
    with pytest.raises(ValueError, match="padding is for 7 tokens, but the sequence has 3"):
        both.dense(3)
    one_for_all = AttentionMask(padding=KEEP) & AttentionMask(padding=KEEP[:1])
    visible, expected = one_for_all.dense(3), AttentionMask(padding=KEEP & KEEP[:1]).dense(3)
    assert visible is not None and expected is not None and torch.equal(visible, expected)


def test_masks_of_fake_tensors_are_not_cached() -> None:
    module = Attention(8, 2, sliding_window=2)
    x = torch.randn(1, 33, 8)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        module(mode.from_tensor(x))
    assert type(module(x)) is torch.Tensor


class LitMasked(pl.LightningModule):
    """A batch with a mask in it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(8, 2)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        assert batch["mask"].padding is not None
        return self.attention(batch["x"], mask=batch["mask"]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_a_mask_in_a_batch_of_lightning(precision: Any) -> None:
    data = [{"x": torch.randn(2, 3, 8), "mask": AttentionMask(padding=KEEP)}]
    trainer([], precision=precision, max_steps=1).fit(LitMasked(), torch.utils.data.DataLoader(data, batch_size=None))


def test_a_compiled_model_uses_a_prebuilt_block_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Attention(32, 2, backend="flex").requires_grad_(False)
    masks = [AttentionMask(documents=torch.randint(3, (2, 20)).sort(1).values) for _ in range(4)]
    for mask in masks:
        mask.block_mask(20, batch=2, heads=2)
    monkeypatch.setattr("torch.nn.attention.flex_attention.create_block_mask", None)
    counter = CompileCounterWithBackend("eager")
    forward = torch.compile(module, fullgraph=True, backend=counter)
    for mask in masks:
        x = torch.randn(2, 20, 32)
        torch.testing.assert_close(forward(x, mask=mask), module(x, mask=mask))
    assert counter.frame_count == 1
