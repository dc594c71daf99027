"""Which output channel of a projection belongs to which head: one line in the spirit of einops, compiled to integers.

    q(H d)                      one row of channels a head, d channels each
    [q(H d) | k(G d) | *]       concatenated along the channels; * is whatever is left, and left alone
    (H [kn:n, *:v])             every head's channels side by side: n of kind kn, then v that are left alone
    (G [q:r·d, k:d, *:d])       sizes may be products

``H`` counts query heads, ``G`` key heads. The kinds are ``q`` and ``k``, and for latent attention ``qn`` and ``kn`` (the
parts without rotation), ``qr`` (the rotated part of a query) and ``*`` (left alone).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("q", "k", "qn", "kn", "qr", "*")

_TOKEN = re.compile(r"\s*([A-Za-z_]\w*|\d+|[\[\](),:|*·])")


@dataclass(frozen=True)
class Piece:
    """``size`` channels of one kind, for every head of ``axis`` (``H``, ``G``, or "" for channels of no head)."""

    kind: str
    axis: str
    size: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """Pieces that repeat together for every head of one axis."""

    axis: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class ChannelMap:
    """For every channel, the index of its kind in :data:`KINDS` and of its head; both int64, shape ``(channels,)``."""

    kinds: Tensor
    heads: Tensor


def parse_layout(text: str) -> tuple[Block, ...]:
    """Parses a layout.

    Raises:
        ValueError: With the text and a caret under the character that does not fit.

    Example:
        >>> parse_layout("q(H d)")
        (Block(axis='H', pieces=(Piece(kind='q', axis='H', size=('d',)),)),)
    """
    return _Parser(text).layout()


def compile_layout(text: str, channels: int, sizes: Mapping[str, int]) -> ChannelMap:
    """Lays a layout over the channels of one weight.

    Args:
        text: The layout.
        channels: Number of channels that the weight has along its projection's dimension.
        sizes: Numbers behind the names: ``H`` and ``G``, the number of query and key heads, and channel counts.

    Raises:
        ValueError: If a name has no size, or the layout does not cover exactly the channels that there are.
    """
    blocks = parse_layout(text)
    rest = [block for block in blocks if not block.pieces[0].size]
    if len(rest) > 1:
        raise ValueError(f"layout {text!r} leaves two parts without a size; only one * may take the rest")
    covered = sum(_block_channels(block, text, sizes) for block in blocks)
    if covered > channels or (covered < channels and not rest):
        raise ValueError(
            f"layout {text!r} describes {covered} channels with {dict(sizes)}, but the weight has {channels}"
        )
    kinds: list[int] = []
    heads: list[int] = []
    for block in blocks:
        if not block.pieces[0].size:
            kinds += [KINDS.index("*")] * (channels - covered)
            heads += [0] * (channels - covered)
            continue
        for head in range(_size((block.axis,), text, sizes)):
            for piece in block.pieces:
                kinds += [KINDS.index(piece.kind)] * _size(piece.size, text, sizes)
                heads += _piece_heads(piece, head, text, sizes)
    return ChannelMap(torch.tensor(kinds), torch.tensor(heads))


def _piece_heads(piece: Piece, head: int, text: str, sizes: Mapping[str, int]) -> list[int]:
    """Query channels inside a block over key heads belong to the query heads that share that key, in turn."""
    channels = _size(piece.size, text, sizes)
    if piece.axis == "H" and piece.kind in ("k", "kn") and sizes.get("G", sizes["H"]) != sizes["H"]:
        raise ValueError(f"layout {text!r} has a key for each of {sizes['H']} query heads, but they share {sizes['G']}")
    if piece.axis != "G" or piece.kind not in ("q", "qn", "qr"):
        return [head] * channels
    group = sizes["H"] // sizes["G"]
    return [head * group + i * group // channels for i in range(channels)]


def _block_channels(block: Block, text: str, sizes: Mapping[str, int]) -> int:
    if not block.pieces[0].size:
        return 0
    return _size((block.axis,), text, sizes) * sum(_size(piece.size, text, sizes) for piece in block.pieces)


def _size(names: tuple[str, ...], text: str, sizes: Mapping[str, int]) -> int:
    for name in names:
        if not name.isdigit() and name not in sizes:
            raise ValueError(f"layout {text!r} uses {name!r}, which has no size; known: {', '.join(sizes)}")
    return math.prod(int(name) if name.isdigit() else sizes[name] for name in names)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, int]] = []
        position = 0
        while text[position:].strip():
            match = _TOKEN.match(text, position)
            if match is None:
                raise self.error("no layout has this character", len(text) - len(text[position:].lstrip()))
            self.tokens.append((match[1], match.start(1)))
            position = match.end()
        self.tokens.append(("", len(text)))
        self.next = 0

    def error(self, reason: str, position: int) -> ValueError:
        return ValueError(f"cannot read the layout: {reason}\n    {self.text}\n    {' ' * position}^")

    def peek(self) -> str:
        return self.tokens[self.next][0]

    def take(self, *expected: str) -> str:
        token, position = self.tokens[self.next]
        if expected and token not in expected:
            raise self.error(f"expected {' or '.join(map(repr, expected))}, found {token or 'the end'!r}", position)
        self.next += 1
        return token

    def layout(self) -> tuple[Block, ...]:
        if self.peek() == "[":
            self.take()
            blocks = [self.block()]
            while self.take("|", "]") == "|":
                blocks.append(self.block())
        else:
            blocks = [self.block()]
        if self.peek():
            raise self.error("nothing may follow the layout", self.tokens[self.next][1])
        return tuple(blocks)

    def block(self) -> Block:
        start = self.tokens[self.next][1]
        kind = "" if self.peek() == "(" else self.take(*KINDS)
        if kind == "*" and self.peek() != "(":
            return Block("", (Piece("*", "", ()),))
        self.take("(")
        axis = self.take("H", "G")
        pieces = self.pieces(axis) if self.peek() == "[" and not kind else (Piece(kind, axis, self.size()),)
        if not kind and not pieces[0].kind:
            raise self.error("a head's channels need a kind: write q(H d) or (H [q:d, ...])", start)
        self.take(")")
        return Block(axis, pieces)

    def pieces(self, axis: str) -> tuple[Piece, ...]:
        self.take("[")
        pieces = [self.piece(axis)]
        while self.take(",", "]") == ",":
            pieces.append(self.piece(axis))
        return tuple(pieces)

    def piece(self, axis: str) -> Piece:
        kind = self.take(*KINDS)
        self.take(":")
        return Piece(kind, axis, self.size())

    def size(self) -> tuple[str, ...]:
        factors = [self.factor()]
        while self.peek() in ("·",):
            self.take()
            factors.append(self.factor())
        return tuple(factors)

    def factor(self) -> str:
        token, position = self.tokens[self.next]
        if not re.fullmatch(r"\w+", token):
            raise self.error(f"expected the name of a size or a number, found {token or 'the end'!r}", position)
        return self.take()
