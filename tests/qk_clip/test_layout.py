"""Layouts: what each channel of a weight is, written out by hand or by reshaping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_muonclip import AttentionSpec
from lightning_muonclip.qk_clip.layout import KINDS, Block, Piece, compile_layout, parse_layout

H, G, D, N, R, V = 4, 2, 3, 3, 2, 5
SIZES = {"H": H, "G": G, "d": D, "r": 2, "n": N, "rope": R, "v": V}
ALL_KEYS = SIZES | {"G": H}


def rows(layout: str, channels: int, sizes: dict[str, int]) -> list[tuple[str, int]]:
    """(kind, head) of every channel; the head of a channel that is left alone means nothing."""
    found = compile_layout(layout, channels, sizes)
    assert found.kinds.dtype is found.heads.dtype is torch.int64
    assert found.kinds.shape == found.heads.shape == (channels,)
    kinds = [KINDS[kind] for kind in found.kinds]
    return [(kind, 0 if kind == "*" else head) for kind, head in zip(kinds, found.heads.tolist())]


def per_head(kind: str, heads: int, size: int) -> list[tuple[str, int]]:
    return [(kind, head) for head in range(heads) for _ in range(size)]


def alone(size: int) -> list[tuple[str, int]]:
    return [("*", 0)] * size


def test_one_projection_of_queries_or_keys() -> None:
    assert rows("q(H d)", H * D, SIZES) == per_head("q", H, D)
    assert rows("k(G d)", G * D, SIZES) == per_head("k", G, D)


def test_concatenated_queries_keys_and_the_rest() -> None:
    assert rows("[q(H d) | k(H d) | *]", 3 * H * D, ALL_KEYS) == per_head("q", H, D) + per_head("k", H, D) + alone(
        H * D
    )


def test_concatenated_with_fewer_keys() -> None:
    expected = per_head("q", H, D) + per_head("k", G, D) + alone(G * D)
    assert rows("[q(H d) | k(G d) | *(G d)]", (H + 2 * G) * D, SIZES) == expected


def test_the_rest_may_stand_anywhere() -> None:
    assert rows("[q(H d) | * | k(G d)]", 40, SIZES) == per_head("q", H, D) + alone(40 - 18) + per_head("k", G, D)
    assert rows("[* | q(H d)]", H * D, SIZES) == per_head("q", H, D)


def test_interleaved_by_head() -> None:
    """GPT-NeoX: the weight viewed as (heads, 3, d)."""
    kind, head = torch.meshgrid(torch.tensor([0, 1, 2]), torch.arange(H), indexing="xy")
    kinds = kind[..., None].expand(-1, -1, D).reshape(-1)
    heads = head[..., None].expand(-1, -1, D).reshape(-1)
    expected = [("qk*"[k], 0 if k == 2 else h) for k, h in zip(kinds.tolist(), heads.tolist())]
    assert rows("(H [q:d, k:d, *:d])", 3 * H * D, ALL_KEYS) == expected


def test_interleaved_by_group() -> None:
    """Megatron: the weight viewed as (groups, queries of the group + key + value, d)."""
    slots = torch.tensor([[0, 1, -1, -2], [2, 3, -1, -2]])  # query heads, then key and value of each group
    expected = []
    for group, members in enumerate(slots.tolist()):
        for slot in members:
            expected += [("*", 0) if slot == -2 else ("k", group) if slot == -1 else ("q", slot)] * D
    assert rows("(G [q:r·d, k:d, *:d])", G * 4 * D, SIZES) == expected


def test_latent_projections() -> None:
    queries = [row for head in range(H) for row in [("qn", head)] * N + [("qr", head)] * R]
    assert rows("(H [qn:n, qr:rope])", H * (N + R), ALL_KEYS) == queries
    keys = [row for head in range(H) for row in [("kn", head)] * N + alone(V)]
    assert rows("(H [kn:n, *:v])", H * (N + V), ALL_KEYS) == keys


def test_gated_queries() -> None:
    """Qwen3-Next: every head's query beside its gate."""
    expected = [row for head in range(H) for row in [("q", head)] * D + alone(D)]
    assert rows("(H [q:d, *:d])", 2 * H * D, SIZES) == expected


@pytest.mark.parametrize("text", ["q(H d)", " q ( H  d ) ", "q(H\td)\n"])
def test_space_means_nothing(text: str) -> None:
    assert parse_layout(text) == (Block("H", (Piece("q", "H", ("d",)),)),)


def test_sizes_are_names_numbers_or_products() -> None:
    assert rows("q(H 3)", 12, SIZES) == rows("q(H d)", 12, SIZES)
    assert rows("(G [q:2·d])", 12, SIZES) == rows("(G [q:r·d])", 12, SIZES) == per_head("q", H, D)
    assert rows("q(H head_dim)", 8, {"H": 4, "head_dim": 2}) == per_head("q", 4, 2)


@pytest.mark.parametrize(
    ("layout", "position", "reason"),
    [
        ("", 0, "expected .* found 'the end'"),
        ("x(H d)", 0, "expected 'q' or 'k' or 'qn' or 'kn' or 'qr' or '\\*', found 'x'"),
        ("q(H d", 5, "found 'the end'"),
        ("q(H d))", 6, "nothing may follow"),
        ("q(H)", 3, "expected the name of a size or a number, found '\\)'"),
        ("q(X d)", 2, "expected 'H' or 'G', found 'X'"),
        ("q(H d·)", 6, "expected the name of a size or a number"),
        ("q[H d]", 1, "expected '\\('"),
        ("q(H #d)", 4, "no layout has this character"),
        ("[q(H d) & k(H d)]", 8, "no layout has this character"),
        ("[q(H d) k(H d)]", 8, "expected '\\|' or '\\]', found 'k'"),
        ("(H [q:d k:d])", 8, "expected ',' or '\\]', found 'k'"),
        ("(H [q d])", 6, "expected ':'"),
        ("(H [q:d])]", 9, "nothing may follow"),
        ("(H d)", 0, "a head's channels need a kind"),
        ("[q(H d) | (H d)]", 10, "a head's channels need a kind"),
        ("q(H [q:d])", 4, "expected the name of a size or a number, found '\\['"),
    ],
)
def test_an_error_points_at_the_character(layout: str, position: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        parse_layout(layout)
    _, text, caret = str(error.value).split("\n")
    assert text == f"    {layout}"
    assert caret == " " * (4 + position) + "^"


@pytest.mark.parametrize(
    ("layout", "channels", "message"),
    [
        ("q(H d)", 11, r"layout 'q\(H d\)' describes 12 channels with .*, but the weight has 11"),
        ("q(H d)", 13, "describes 12 channels .* but the weight has 13"),
        ("[q(H d) | *]", 11, "describes 12 channels .* but the weight has 11"),
        ("q(H e)", 12, "uses 'e', which has no size; known: H, G, d"),
        ("[q(H d) | * | *]", 40, r"leaves two parts without a size; only one \* may take the rest"),
        ("k(H d)", 12, "has a key for each of 4 query heads, but they share 2"),
        ("(H [kn:n, *:v])", 32, "has a key for each of 4 query heads, but they share 2"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(layout: str, channels: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_layout(layout, channels, SIZES)


def test_a_spec_knows_its_heads() -> None:
    assert AttentionSpec((), 8, 2, {"d": 64}).sizes == {"d": 64, "H": 8, "G": 2}
    assert AttentionSpec((), 8, 2).sizes["G"] == 2
    alone = AttentionSpec((), 8)
    assert alone.num_key_value_heads == 8
    with pytest.raises(ValueError, match="8 query heads cannot share 3 key heads evenly"):
        AttentionSpec((), 8, 3)


def scaled_by(layout: str, weight: Tensor, sizes: dict[str, int], factor: dict[tuple[str, int], float]) -> Tensor:
    labels = rows(layout, weight.shape[0], sizes)
    return weight * torch.tensor([factor.get(label, 1.0) for label in labels])[:, None]


@pytest.mark.parametrize("order", [("q", "k", "v"), ("v", "q", "k")])
def test_a_fused_weight_is_scaled_as_its_parts_are(order: tuple[Any, ...]) -> None:
    parts = {name: torch.randn(H * D, 2) for name in "qkv"}
    text = " | ".join("*" if name == "v" else f"{name}(H d)" for name in order)
    factor = {("q", 1): 0.5, ("k", 3): 0.25}
    fused = scaled_by(f"[{text}]", torch.cat([parts[name] for name in order]), ALL_KEYS, factor)
    parts["q"][D : 2 * D] *= 0.5
    parts["k"][3 * D :] *= 0.25
    assert torch.equal(fused, torch.cat([parts[name] for name in order]))
