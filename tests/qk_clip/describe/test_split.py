"""Muon updates fused projections like separate matrices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracles import SdpaAttention
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model
from transformers.pytorch_utils import Conv1D

from lightning_muonclip import AttentionSpec, MultiheadLatentAttention, Muon, MuonClip, MuonClipCallback, Projection
from lightning_muonclip.qk_clip.describe.declared import AttentionModules, declared_attention
from lightning_muonclip.qk_clip.describe.split import matrix_parts
from lightning_muonclip.qk_clip.observe.observer import Observer

HEADS, GROUPS, DIM, HIDDEN = 4, 2, 3, 10
QUERIES, KEYS = HEADS * DIM, GROUPS * DIM
SIZES = {"d": DIM}
ADJUSTMENTS = ["original", "match_rms_adamw", "spectral_unclamped"]

#: Layout of a fused weight, and for every channel the row of the concatenated (query, key, value) that it is.
LAYOUTS = {
    "[q(H d) | k(G d) | *(G d)]": torch.arange(QUERIES + 2 * KEYS),
    "[*(G d) | q(H d) | k(G d)]": torch.arange(QUERIES + 2 * KEYS).roll(KEYS),
    "(G [q:r·d, k:d, *:d])": torch.cat(
        [
            torch.cat(
                [
                    torch.arange(g * 2 * DIM, (g + 1) * 2 * DIM),
                    QUERIES + torch.arange(g * DIM, (g + 1) * DIM),
                    QUERIES + KEYS + torch.arange(g * DIM, (g + 1) * DIM),
                ]
            )
            for g in range(GROUPS)
        ]
    ),
}


class Fused(nn.Module):
    """Holds one weight for queries, keys and values."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.qkv = nn.Parameter(weight.clone())


def found(model: nn.Module, *args: Any) -> AttentionModules:
    """The attention that a model computes on these inputs."""
    observer = Observer(model, example=(args, {}))
    observer.close()
    return observer.attention


def step(params: list[nn.Parameter], grads: list[Tensor], **options: Any) -> None:
    optimizer = Muon(params, lr=0.1, dtype=torch.float32, **options)
    for _ in range(2):
        for param, grad in zip(params, grads):
            param.grad = grad.clone()
        optimizer.step()


@pytest.mark.parametrize("adjust_lr_fn", ADJUSTMENTS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", ["qkv", "heads", "pairs", "none"])
def test_a_fused_weight_is_stepped_as_its_unfused_twin(
    split: str, layout: str, transposed: bool, adjust_lr_fn: str
) -> None:
    order = LAYOUTS[layout]
    rows = torch.randn(len(order), HIDDEN)  # queries, keys, values, each head after the other
    slopes = torch.randn(len(order), HIDDEN)
    pairs = [2 * DIM] * ((HEADS + 2 * GROUPS) // 2)
    heads = [DIM] * (HEADS + 2 * GROUPS)
    lengths = {"none": [len(order)], "qkv": [QUERIES, KEYS, KEYS], "heads": heads, "pairs": pairs}[split]
    apart = [nn.Parameter(part.clone()) for part in (rows[order] if split == "none" else rows).split(lengths)]
    step(apart, list((slopes[order] if split == "none" else slopes).split(lengths)), adjust_lr_fn=adjust_lr_fn)
    expected = torch.cat([p.detach() for p in apart])
    expected = expected if split == "none" else expected[order]

    model = Fused(rows[order].T.contiguous() if transposed else rows[order])
    spec = AttentionSpec((Projection("qkv", layout, dim=int(transposed)),), HEADS, GROUPS, SIZES)
    parts = matrix_parts(model, {"": (model, spec)}, split)
    grad = slopes[order].T.contiguous() if transposed else slopes[order]
    step([model.qkv], [grad], adjust_lr_fn=adjust_lr_fn, parts=parts)
    stepped = model.qkv.detach().T if transposed else model.qkv.detach()
    torch.testing.assert_close(stepped, expected, rtol=1e-5, atol=1e-6)


def test_separate_projections_are_left_whole_unless_every_head_is_asked_for() -> None:
    module = SdpaAttention(HEADS * DIM, HEADS, GROUPS)
    attention = found(module, torch.randn(2, 5, HEADS * DIM))
    assert matrix_parts(module, attention, "qkv") == {}
    parts = matrix_parts(module, attention, "heads")
    counts = {name: len(parts[p][1]) for name, p in module.named_parameters() if p in parts}
    assert counts == {"q_proj.weight": HEADS, "k_proj.weight": GROUPS, "v_proj.weight": GROUPS}


def test_latent_attention_is_split_into_keys_and_values_but_not_by_rotation() -> None:
    module = MultiheadLatentAttention(16, 2, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=6)
    attention = declared_attention(module)
    sizes = {
        split: {name: [len(part) for part in parts[p][1]] for name, p in module.named_parameters() if p in parts}
        for split in ("none", "qkv", "heads", "pairs")
        for parts in [matrix_parts(module, attention, split)]
    }
    assert sizes == {
        "none": {},
        "qkv": {"kv_b_proj.weight": [8, 12]},
        "heads": {"q_proj.weight": [6, 6], "kv_b_proj.weight": [4, 4, 6, 6]},
        "pairs": {"kv_b_proj.weight": [8, 12]},
    }


def test_a_transposed_weight_is_scaled_by_its_own_fan_out() -> None:
    model = GPT2Model(GPT2Config(vocab_size=8, n_embd=8, n_layer=2, n_head=2, n_positions=8))
    attention = found(model, torch.arange(8)[None])
    parts = matrix_parts(model, attention, "qkv")
    for module in model.modules():
        if isinstance(module, Conv1D):
            dim, channels, _ = parts[module.weight]
            assert dim == 1
            assert sum(map(len, channels)) == module.weight.shape[1]
    up = model.h[0].mlp.c_fc.weight  # (8, 32): fan-out 32
    grad = torch.randn_like(up)
    before = up.detach().clone()
    linear = nn.Parameter(before.T.clone())
    step([up], [grad], adjust_lr_fn="original", parts=parts)
    step([linear], [grad.T], adjust_lr_fn="original")
    torch.testing.assert_close(up.detach().T, linear.detach(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(up, before)


def test_weights_with_the_same_parts_are_stacked_and_a_copy_of_the_optimizer_goes_on() -> None:
    model = GPT2Model(GPT2Config(vocab_size=8, n_embd=8, n_layer=3, n_head=2, n_positions=8))
    attention = found(model, torch.arange(8)[None])
    weights = [block.attn.c_attn.weight for block in model.h]
    optimizer = Muon(weights, lr=0.1, parts=matrix_parts(model, attention, "qkv"))
    assert len({id(parts) for _, parts in optimizer._placed_parts.of(optimizer.param_groups, 0)}) == 1
    twin = copy.deepcopy(optimizer)
    grads = [torch.randn_like(w) for w in weights]
    for stepped in (optimizer, twin):
        params = stepped.param_groups[0]["params"]
        for param, grad in zip(params, grads):
            param.grad = grad.clone()
        stepped.step()
    for ours, theirs in zip(weights, twin.param_groups[0]["params"]):
        assert torch.equal(ours, theirs)


def test_parts_that_do_not_cover_their_weight_are_refused() -> None:
    weight = nn.Parameter(torch.randn(4, 3))
    for channels in ([torch.arange(3)], [torch.arange(4), torch.tensor([0])]):
        with pytest.raises(ValueError, match="must cover every channel exactly once: 4 channels on dimension 0"):
            Muon([weight], parts={weight: (0, channels)})


@pytest.mark.parametrize(
    "make", [lambda: MuonClip(SdpaAttention(8, 2), split="q"), lambda: MuonClipCallback(split="q")]
)
def test_an_unknown_split_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="unknown split 'q'; use one of qkv, heads, pairs, none"):
        make()


def test_callback_and_optimizer_pass_the_split_on() -> None:
    def update(**options: Any) -> Tensor:
        torch.manual_seed(0)
        module = nn.MultiheadAttention(8, 2, bias=False)
        before = module.in_proj_weight.detach().clone()
        optimizer = MuonClip(module, lr=0.1, weight_decay=0.0, dtype=torch.float32, **options)
        x = torch.randn(5, 2, 8)
        module(x, x, x, need_weights=False)[0].sum().backward()
        module.in_proj_weight.grad = torch.randn_like(module.in_proj_weight)
        optimizer.step()
        optimizer.close()
        return module.in_proj_weight.detach() - before

    def is_orthogonal(matrix: Tensor) -> bool:
        """Whether its singular values are those of an orthogonal matrix times Muon's scale, as far as 5 steps bring it."""
        values = torch.linalg.svdvals(matrix) / (0.1 * 0.2 * max(matrix.shape) ** 0.5)
        return bool(((values > 0.6) & (values < 1.3)).all())

    apart, whole, heads = update(), update(split="none"), update(split="heads")
    assert all(map(is_orthogonal, apart.split(8)))
    assert all(map(is_orthogonal, heads.split(4)))
    assert is_orthogonal(whole)
    assert not all(map(is_orthogonal, whole.split(8)))
    assert not torch.allclose(heads, apart, atol=1e-3)  # the whole is orthogonal, but its halves are not
