"""Layouts against channel maps written out by hand or by reshaping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_muonclip import AttentionSpec
from lightning_muonclip.qk_clip.describe.layout import (
    KINDS,
    NO_HEAD,
    SPLITS,
    Block,
    ChannelMap,
    Piece,
    compile_layout,
    layout_kinds,
    layout_text,
    parse_layout,
    split_channels,
)

H, G, D, N, R, V = 4, 2, 3, 3, 2, 5
SIZES = {"H": H, "G": G, "d": D, "r": 2, "n": N, "rope": R, "v": V}
ALL_KEYS = SIZES | {"G": H}


def rows(layout: str, channels: int, sizes: dict[str, int]) -> list[tuple[str, int]]:
    """(kind, head) of every channel; the head of an unscaled channel is ignored."""
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


def test_the_rest_may_come_anywhere() -> None:
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
def test_whitespace_is_ignored(text: str) -> None:
    assert parse_layout(text) == (Block(("H", "d"), (Piece("q", ()),)),)


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
        ("q(H d))", 6, "unexpected text after the layout"),
        ("q()", 2, "expected the name of a size or a number, found '\\)'"),
        ("q(·H)", 2, "expected the name of a size or a number, found '·'"),
        ("q(H d·)", 6, "expected the name of a size or a number"),
        ("q[H d]", 1, "expected '\\('"),
        ("q(H #d)", 4, "unexpected character"),
        ("[q(H d) & k(H d)]", 8, "unexpected character"),
        ("[q(H d) k(H d)]", 8, "expected '\\|' or '\\]', found 'k'"),
        ("(H [q:d k:d])", 8, "expected ',' or '\\]', found 'k'"),
        ("(H [q d])", 6, "expected ':'"),
        ("(H [q:d])]", 9, "unexpected text after the layout"),
        ("(H d)", 4, "these channels need a kind: q\\(H d\\) or \\(H \\[q:d, ...\\]\\)"),
        ("[q(H d) | (H d)]", 14, "these channels need a kind"),
        ("(H d", 4, "expected the name of a size or a number, found 'the end'"),
        ("([q:d])", 1, "expected the name of a size or a number, found '\\['"),
        ("(H [q:d]", 8, "expected '\\)', found 'the end'"),
        ("(H [q:·d])", 6, "expected the name of a size or a number"),
        ("(H [q:d·])", 8, "expected the name of a size or a number"),
        ("q(H d) | k(G d)", 7, "unexpected text after the layout"),
        ("[q(H d) | *", 11, "expected '\\|' or '\\]', found 'the end'"),
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
        ("[q(H d) | * | *]", 40, r"only one \* may take the rest of the channels; layout .* has more"),
        ("k(H d)", 12, "has a key for each of 4 query heads, but there are 2 key heads"),
        ("(H [kn:n, *:v])", 32, "has a key for each of 4 query heads, but there are 2 key heads"),
        ("q(d)", 3, r"does not determine the heads of q: \(d\) has no axis H, and no product of its leading axes is 4"),
        ("k(d)", 3, r"does not determine the heads of k: \(d\) has no axis G, and no product of its leading axes is 2"),
        ("q(d G r)", 12, r"does not determine the heads of q: \(d G r\) has no axis H"),
        ("q(G d r)", 12, "does not determine the heads of q"),
        ("(G [q:d·r, k:d])", 18, r"does not determine the heads of q: \(G d r\) has no axis H"),
        ("(d [q:H, k:r])", 18, r"does not determine the heads of k: \(d r\) has no axis G"),
        ("(3 [qn:d, qr:n])", 18, "does not determine the heads of qn"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(layout: str, channels: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_layout(layout, channels, SIZES)


def test_a_spec_knows_its_heads() -> None:
    assert AttentionSpec((), 8, 2, {"d": 64}).sizes == {"d": 64, "H": 8, "G": 2, "r": 4}
    assert AttentionSpec((), 8, 2, {"H": 3, "G": 3}).sizes == {"H": 8, "G": 2, "r": 4}
    assert AttentionSpec((), 8, 2, {"r": 16}).sizes["r"] == 16  # to latent attention the size of the rotated part
    alone = AttentionSpec((), 8)
    assert alone.num_key_value_heads == 8 and alone.sizes == {"H": 8, "G": 8, "r": 1}
    with pytest.raises(ValueError, match="num_heads must be a multiple of num_key_value_heads; got 8 and 3"):
        AttentionSpec((), 8, 3)


# Coordinates: the head of every channel, by reshaping numbered channels


def expect(layout: str, numbered: dict[str, Tensor], sizes: dict[str, int], channels: int) -> None:
    """``numbered`` has the channels of every kind, the heads on the first dimension."""
    expected: list[tuple[str, int]] = [("*", 0)] * channels
    for kind, heads in numbered.items():
        for head, own in enumerate(heads):
            for channel in own.flatten().tolist():
                expected[channel] = (kind, head)
    assert rows(layout, channels, sizes) == expected


def test_heads_may_be_on_any_axis() -> None:
    channels = torch.arange(H * D)
    expect("q(H d)", {"q": channels.reshape(H, D)}, SIZES, H * D)
    expect("q(d H)", {"q": channels.reshape(D, H).T}, SIZES, H * D)
    expect("k(d G)", {"k": torch.arange(G * D).reshape(D, G).T}, SIZES, G * D)
    channels = torch.arange(5 * H * D)
    expect("q(v H d)", {"q": channels.reshape(V, H, D).permute(1, 0, 2)}, SIZES, 5 * H * D)
    expect("q(v d H)", {"q": channels.reshape(V, D, H).permute(2, 0, 1)}, SIZES, 5 * H * D)
    expect("k(v·G d)", {"k": torch.arange(30).reshape(V, G, D).permute(1, 0, 2)}, SIZES, 30)


def test_without_their_axis_heads_are_on_the_leading_axes() -> None:
    channels = torch.arange(H * D)
    for layout in ("q(G r d)", "q(G·r d)", "q(2 2 d)", "q(4 d)", "(G [q:r·d])", "(G r [q:d])", "(4 [q:d])"):
        expect(layout, {"q": channels.reshape(G, 2, D).flatten(0, 1)}, SIZES, H * D)
    for layout in ("k(2 d)", "k(r d)"):  # under whatever name
        expect(layout, {"k": torch.arange(G * D).reshape(G, D)}, SIZES, G * D)
    expect("q(r G d)", {"q": channels.reshape(2, G, D).flatten(0, 1)}, SIZES, H * D)
    one = {"H": 1, "G": 1, "d": 3}
    expect("q(d)", {"q": torch.arange(3)[None]}, one, 3)
    expect("k(d)", {"k": torch.arange(3)[None]}, SIZES | {"G": 1}, 3)  # one key for all


def test_slots_inside_of_every_channel() -> None:
    """Queries, keys and values as the fastest axis."""
    numbered = torch.arange(3 * H * D).reshape(H, D, 3)
    expected = {"q": numbered[..., 0], "k": numbered[..., 1]}
    expect("(H d [q:1, k:1, *:1])", expected, ALL_KEYS, 3 * H * D)
    numbered = torch.arange(3 * H * D).reshape(D, H, 3).transpose(0, 1)
    expect("(d H [q:1, k:1, *:1])", {"q": numbered[..., 0], "k": numbered[..., 1]}, ALL_KEYS, 3 * H * D)


@pytest.mark.parametrize(("layout", "slots"), [("(G [q:r·d, k:d, *:d])", (0, 2)), ("(G [*:d, k:d, q:r·d])", (2, 1))])
def test_queries_beside_the_key_that_they_share(layout: str, slots: tuple[int, int]) -> None:
    numbered = torch.arange(G * 4 * D).reshape(G, 4, D)
    queries = numbered[:, slots[0] : slots[0] + 2].flatten(0, 1)
    expect(layout, {"q": queries, "k": numbered[:, slots[1]]}, SIZES, G * 4 * D)


def test_shards_of_codegen() -> None:
    """Four shards, each with the queries, values and keys of a quarter of the heads."""
    heads, dim = 8, 3
    numbered = torch.arange(3 * heads * dim).reshape(4, 3, heads // 4, dim)
    query, _value, key = (numbered[:, slot].flatten(0, 1) for slot in range(3))
    sizes = {"H": heads, "G": heads, "h": heads // 4, "d": dim}
    expect("(4 [q:h·d, *:h·d, k:h·d])", {"q": query, "k": key}, sizes, 3 * heads * dim)


def test_more_than_one_weight_in_one() -> None:
    """Parts in any order, each with its own axis order, between unscaled parts."""
    start, q, k = 7, H * D, G * D
    queries = start + torch.arange(q).reshape(D, H).T
    keys = start + q + 5 + torch.arange(k).reshape(G, D)
    expect("[*(7) | q(d H) | *(v) | k(G d) | *]", {"q": queries, "k": keys}, SIZES, start + q + 5 + k + 11)


def test_shared_channels_belong_to_all_heads() -> None:
    gain = compile_layout("q(d)", D, SIZES, shared=True)
    assert gain.heads.tolist() == [NO_HEAD] * D and {KINDS[kind] for kind in gain.kinds} == {"q"}
    for layout, channels in (("q(H d)", H * D), ("q(d H)", H * D), ("k(G d)", G * D), ("q(H)", H)):
        shared, plain = (compile_layout(layout, channels, SIZES, shared=shared) for shared in (True, False))
        assert torch.equal(shared.heads, plain.heads) and torch.equal(shared.kinds, plain.kinds)


def test_kinds_of_a_layout() -> None:
    assert layout_kinds("[q(H d) | k(G d) | *]") == {"q", "k", "*"}
    assert layout_kinds("(H [qn:n, qr:r])") == {"qn", "qr"}
    assert layout_kinds("*(G d)") == {"*"}


# Matrices of their own

FUSED = {
    "[q(H d) | k(G d) | *(G d)]": (
        [range(12), range(12, 18), range(18, 24)],
        [range(start, start + 3) for start in range(0, 24, 3)],
    ),
    "(G [q:r·d, k:d, *:d])": (
        [[*range(6), *range(12, 18)], [*range(6, 9), *range(18, 21)], [*range(9, 12), *range(21, 24)]],
        [range(s, s + 3) for s in (0, 3, 12, 15, 6, 18, 9, 21)],
    ),
    "[q(d H) | k(d G) | *(G d)]": (
        [range(12), range(12, 18), range(18, 24)],
        [range(h, 12, 4) for h in range(4)] + [range(12, 18, 2), range(13, 18, 2), range(18, 21), range(21, 24)],
    ),
    "[q(H d) | k(G d) | *]": (
        [range(12), range(12, 18), range(18, 24)],
        [range(start, start + 3) for start in range(0, 18, 3)] + [range(18, 24)],  # the heads of values are unknown
    ),
    "[* | k(G d)]": ([range(18, 24), range(18)], [range(18, 21), range(21, 24), range(18)]),
    "*(G 4 d)": ([range(24)], [range(12), range(12, 24)]),
    "q(H 6)": ([range(24)], [range(start, start + 6) for start in range(0, 24, 6)]),
}


@pytest.mark.parametrize("layout", FUSED)
def test_channels_are_split_into_queries_keys_and_values_or_heads(layout: str) -> None:
    channels = compile_layout(layout, 24, SIZES)
    kinds, heads = FUSED[layout]
    assert [part.tolist() for part in split_channels(channels, "qkv")] == [list(part) for part in kinds]
    assert [part.tolist() for part in split_channels(channels, "heads")] == [list(part) for part in heads]
    assert [part.tolist() for part in split_channels(channels, "none")] == [list(range(24))]
    for split in SPLITS:
        parts = split_channels(channels, split)
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(24))
        assert all(part.dtype is torch.int64 and torch.equal(part, part.sort().values) for part in parts)


def test_parts_of_a_latent_query_are_one_matrix() -> None:
    channels = compile_layout("(H [qn:n, qr:rope])", 20, ALL_KEYS)
    assert [part.tolist() for part in split_channels(channels, "qkv")] == [list(range(20))]
    heads = [list(range(start, start + 5)) for start in range(0, 20, 5)]
    assert [part.tolist() for part in split_channels(channels, "heads")] == heads


# What a map is for


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


@pytest.mark.parametrize(
    ("text", "channels"),
    [
        ("q(H 3)", 24),
        ("q(H)", 8),
        ("*(G 3)", 12),
        ("*", 7),
        ("[q(H 2) | k(G 2) | *]", 29),
        ("[q(H 2) | k(G 2) | *(G 2)]", 32),
        ("[* | q(H 2) | *(H 2)]", 37),
        ("(H [qn:8, qr:4])", 96),
        ("(H [q:2, *:3])", 40),
        ("(G [q:r·3, k:3, *:3])", 48),
        ("(2 [q:4·3, *:4·3, k:2·3])", 60),
    ],
)
def test_channels_are_put_into_the_words_that_made_them(text: str, channels: int) -> None:
    sizes = {"H": 8, "G": 4, "r": 2}
    assert layout_text(compile_layout(text, channels, sizes), sizes) == text


def test_channels_without_a_layout_are_told_by_their_runs() -> None:
    sizes = {"H": 4, "G": 4}
    assert layout_text(compile_layout("q(d)", 3, {**sizes, "d": 3}, shared=True), sizes) == "q(3)"
    assert layout_text(ChannelMap(torch.zeros(5, dtype=torch.int64), torch.full((5,), 2)), sizes) == "q(5) of head 2"
    odd = torch.tensor([0, 0, 1, 3, 2])
    assert layout_text(ChannelMap(torch.zeros(5, dtype=torch.int64), odd), sizes) == "4 runs of channels"
