"""Layouts: an einops-like line that maps each output channel of a projection to a head, compiled to integers.

    q(H d)                      head by head, d channels each
    [q(H d) | k(G d) | *]       concatenated along the channels; * takes the rest, which is not scaled
    (H [kn:n, *:v])             head by head: n channels of kind kn, then v that are not scaled
    (G [q:r·d, k:d, *:d])       sizes may be products; r queries share a key

``H`` is the number of query heads, ``G`` that of key heads, and ``r`` is ``H / G``. The kinds are ``q`` and ``k``; for
latent attention ``qn`` and ``kn`` (the parts without rotation) and ``qr`` (the rotated part of a query); and ``*`` (not
scaled).

The head of a channel is its coordinate on the axis ``H`` (queries) or ``G`` (keys). If that axis is absent, it is the
coordinate on the leading axes whose product is the number of heads: ``G`` and ``r`` for a query in the last line.

The output channels of a weight may lie on several of its dimensions. A layout describes them flattened, the last dimension
fastest: ``q(H d)`` on dimensions 0 and 2 of a weight of shape ``(H, width, d)``.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("q", "k", "qn", "kn", "qr", "*")
QUERY_KINDS = ("q", "qn", "qr")
KEY_KINDS = ("k", "kn")
SPLITS = ("qkv", "heads", "pairs", "none")

#: In place of a head index: the channel belongs to all heads, or its head is unknown.
NO_HEAD = -1

_TOKEN = re.compile(r"\s*([A-Za-z_]\w*|\d+|[\[\](),:|*·])")


@dataclass(frozen=True)
class Piece:
    """Channels of one kind; ``size`` names the factors of their count."""

    kind: str
    size: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """Pieces that repeat together along ``axes``; ``None`` takes the channels that no other block covers."""

    axes: tuple[str, ...] | None
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class ChannelMap:
    """The index in :data:`KINDS` and the head of every channel; both int64, shape ``(channels,)``.

    A channel that is shared by all heads, or that has no known head, has :data:`NO_HEAD`.
    """

    kinds: Tensor
    heads: Tensor

    def of_kind(self, kinds: tuple[str, ...]) -> Tensor:
        """A boolean mask of the channels of these kinds."""
        return torch.isin(self.kinds, torch.tensor([KINDS.index(kind) for kind in kinds]))


def spread(values: Tensor, dims: tuple[int, ...], param: Tensor) -> Tensor:
    """Values of the channels on some dimensions of a parameter, which ascend, shaped to broadcast over it.

    Example:
        >>> spread(torch.arange(6), (0, 2), torch.empty(2, 5, 3)).shape
        torch.Size([2, 1, 3])
    """
    return values.reshape([size if dim in dims else 1 for dim, size in enumerate(param.shape)])


def parse_layout(text: str) -> tuple[Block, ...]:
    """Parses a layout.

    Raises:
        ValueError: With the text and a caret under the unexpected character.

    Example:
        >>> parse_layout("q(H d)")
        (Block(axes=('H', 'd'), pieces=(Piece(kind='q', size=()),)),)
    """
    return _Parser(text).layout()


def layout_kinds(layout: str | ChannelMap) -> set[str]:
    """The kinds of channels in a layout."""
    if isinstance(layout, ChannelMap):
        return {KINDS[kind] for kind in layout.kinds.unique().tolist()}
    return {piece.kind for block in parse_layout(layout) for piece in block.pieces}


def compile_layout(
    layout: str | ChannelMap, channels: int, sizes: Mapping[str, int], *, shared: bool = False
) -> ChannelMap:
    """Compiles a layout for the channels of one weight.

    Args:
        layout: The layout, or its channels already.
        channels: Number of output channels of the weight.
        sizes: Values of the names: ``H`` and ``G``, the numbers of query and key heads, and channel counts.
        shared: Whether channels without the axis ``H`` or ``G`` belong to all heads, as in the gain of a norm.

    Raises:
        ValueError: If a name has no size, if the layout does not cover the channels exactly, or if it does not determine
            the head of a query or key channel.
    """
    if isinstance(layout, ChannelMap):
        if len(layout.kinds) != channels:
            raise ValueError(f"the layout is of {len(layout.kinds)} channels, but the weight has {channels}")
        return layout
    text, blocks = layout, parse_layout(layout)
    if sum(block.axes is None for block in blocks) > 1:
        raise ValueError(f"only one * may take the rest of the channels; layout {text!r} has more")
    compiled = [None if block.axes is None else _compile_block(block, text, sizes, shared) for block in blocks]
    covered = sum(len(part.kinds) for part in compiled if part is not None)
    if covered > channels or (covered < channels and None not in compiled):
        raise ValueError(
            f"layout {text!r} describes {covered} channels with sizes {dict(sizes)}, but the weight has {channels}"
        )
    left = torch.full((channels - covered,), KINDS.index("*"))
    rest = ChannelMap(left, torch.full_like(left, NO_HEAD))
    parts = [rest if part is None else part for part in compiled]
    return ChannelMap(torch.cat([part.kinds for part in parts]), torch.cat([part.heads for part in parts]))


def layout_text(channels: ChannelMap, sizes: Mapping[str, int]) -> str:
    """A layout in words, if there is a short one that compiles to these channels.

    Args:
        channels: The channels of one weight.
        sizes: The numbers of query heads ``H`` and key heads ``G``.

    Example:
        >>> sizes = {"H": 4, "G": 2}
        >>> layout_text(compile_layout("[q(H 2) | k(G 2) | *]", 14, sizes), sizes)
        '[q(H 2) | k(G 2) | *]'
    """
    is_left = channels.of_kind(("*",))
    is_shared = bool((channels.heads[~is_left] == NO_HEAD).all())
    # Better without the heads of what is not scaled than with no text.
    for own in (channels, ChannelMap(channels.kinds, channels.heads.masked_fill(is_left, NO_HEAD))):
        has_head = ~is_left | (own.heads != NO_HEAD)
        for text in _texts(own, sizes):
            with contextlib.suppress(ValueError):
                compiled = compile_layout(text, len(own.kinds), sizes, shared=is_shared)
                is_same = (compiled.kinds == own.kinds) & ((compiled.heads == own.heads) | ~has_head)
                if bool(is_same.all()):
                    return text
    runs = _runs(channels)
    kind, head, size = runs[0]
    return f"{kind}({size}) of head {head}" if len(runs) == 1 else f"{len(runs)} runs of channels"


def _runs(channels: ChannelMap) -> list[tuple[str, int, int]]:
    """The kind, the head and the number of channels that follow one another."""
    pairs = itertools.groupby(zip(channels.kinds.tolist(), channels.heads.tolist()))
    return [(KINDS[kind], head, len(list(run))) for (kind, head), run in pairs]


def _texts(channels: ChannelMap, sizes: Mapping[str, int]) -> Iterator[str]:
    """Layouts that may compile to these channels."""
    segments = [(kind, list(own)) for kind, own in itertools.groupby(_runs(channels), key=lambda run: run[0])]
    blocks = []
    for kind, own in segments:
        _, head, size = own[0]
        letters = "H" if kind in QUERY_KINDS else "G" if kind in KEY_KINDS else "GH"
        by_head = [letter for letter in letters if head != NO_HEAD and len(own) == sizes[letter]]
        axes = [letter if size == 1 else f"{letter} {size}" for letter in by_head]
        blocks.append(f"{kind}({axes[0]})" if axes else "*" if kind == "*" else f"{kind}({size})")
    yield blocks[0] if len(blocks) == 1 else f"[{' | '.join(blocks)}]"
    for times in (sizes["H"], sizes["G"], *range(2, len(segments))):
        if len(segments) % times == 0:
            axis = next((letter for letter in ("H", "G") if sizes[letter] == times), str(times))
            pieces = []
            for kind, own in segments[: len(segments) // times]:
                share = "r" if axis == "G" and len(own) * times == sizes["H"] else str(len(own))
                pieces.append(f"{kind}:{own[0][2]}" if len(own) == 1 else f"{kind}:{share}·{own[0][2]}")
            yield f"({axis} [{', '.join(pieces)}])"


def split_channels(channels: ChannelMap, split: str) -> list[Tensor]:
    """Splits channels into matrices.

    ``"qkv"``: queries, keys and the rest. ``"heads"``: every head of each. ``"pairs"``: two neighbouring heads of each, an
    odd last one alone. ``"none"``: all are one matrix.

    Returns:
        Ascending channel indices, one int64 tensor per part, which together cover all channels.
    """
    if split == "none":
        return [torch.arange(len(channels.kinds))]
    parts = []
    for kinds in (QUERY_KINDS, KEY_KINDS, ("*",)):
        own = channels.of_kind(kinds).nonzero()[:, 0]
        heads = torch.zeros_like(own) if split == "qkv" else channels.heads[own]
        if split == "pairs":
            heads = heads.unique(return_inverse=True)[1] // 2
        parts += [own[heads == head] for head in heads.unique()]
    return parts


def _compile_block(block: Block, text: str, sizes: Mapping[str, int], shared: bool) -> ChannelMap:
    assert block.axes is not None
    repeats = math.prod(_sizes(block.axes, text, sizes))
    kinds, heads = [], []
    for piece in block.pieces:
        index = _heads((*block.axes, *piece.size), piece.kind, text, sizes, shared).reshape(repeats, -1)
        heads.append(index)
        kinds.append(torch.full_like(index, KINDS.index(piece.kind)))
    return ChannelMap(torch.cat(kinds, 1).flatten(), torch.cat(heads, 1).flatten())


def _heads(axes: tuple[str, ...], kind: str, text: str, sizes: Mapping[str, int], shared: bool) -> Tensor:
    """The head of every channel of one piece, in the shape of its axes."""
    shape = _sizes(axes, text, sizes)
    queries, keys = sizes["H"], sizes.get("G", sizes["H"])
    if kind in KEY_KINDS and "H" in axes and queries != keys:
        raise ValueError(f"layout {text!r} has a key for each of {queries} query heads, but there are {keys} key heads")
    letters = {"*": ("H", "G")}.get(kind, ("H",) if kind in QUERY_KINDS else ("G", "H"))
    for letter in letters:
        if letter in axes:
            return _coordinate(shape, axes.index(letter), axes.index(letter) + 1)
    if shared:
        return torch.full(shape, NO_HEAD)
    for count in {"*": (queries, keys)}.get(kind, (queries,) if kind in QUERY_KINDS else (keys,)):
        for stop in range(len(shape) + 1):
            if math.prod(shape[:stop]) == count:
                return _coordinate(shape, 0, stop)
    if kind == "*":
        return torch.full(shape, NO_HEAD)
    count = queries if kind in QUERY_KINDS else keys
    raise ValueError(
        f"layout {text!r} does not determine the heads of {kind}: ({' '.join(axes)}) has no axis"
        f" {'H' if kind in QUERY_KINDS else 'G'}, and no product of its leading axes is {count}"
    )


def _coordinate(shape: tuple[int, ...], start: int, stop: int) -> Tensor:
    """The flattened coordinate on the axes from ``start`` to ``stop``, for every element of ``shape``."""
    along = torch.arange(math.prod(shape[start:stop]))
    return along.reshape(*shape[start:stop], *[1] * len(shape[stop:])).expand(shape)


def _sizes(names: tuple[str, ...], text: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    for name in names:
        if not name.isdigit() and name not in sizes:
            raise ValueError(f"layout {text!r} uses {name!r}, which has no size; known: {', '.join(sizes)}")
    return tuple(int(name) if name.isdigit() else sizes[name] for name in names)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, int]] = []
        position = 0
        while text[position:].strip():
            match = _TOKEN.match(text, position)
            if match is None:
                raise self.error("unexpected character", len(text) - len(text[position:].lstrip()))
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
            raise self.error("unexpected text after the layout", self.tokens[self.next][1])
        return tuple(blocks)

    def block(self) -> Block:
        if self.peek() == "(":
            self.take()
            axes = self.axes(until="[")
            if self.peek() != "[":
                raise self.error("these channels need a kind: q(H d) or (H [q:d, ...])", self.tokens[self.next][1])
            pieces = self.pieces()
            self.take(")")
            return Block(axes, pieces)
        kind = self.take(*KINDS)
        if kind == "*" and self.peek() != "(":
            return Block(None, (Piece("*", ()),))
        self.take("(")
        axes = self.axes(until=")")
        self.take(")")
        return Block(axes, (Piece(kind, ()),))

    def axes(self, until: str) -> tuple[str, ...]:
        axes = [self.factor()]
        while self.peek() not in (until, ")"):
            if self.peek() == "·":
                self.take()
            axes.append(self.factor())
        return tuple(axes)

    def pieces(self) -> tuple[Piece, ...]:
        self.take("[")
        pieces = [self.piece()]
        while self.take(",", "]") == ",":
            pieces.append(self.piece())
        return tuple(pieces)

    def piece(self) -> Piece:
        kind = self.take(*KINDS)
        self.take(":")
        size = [self.factor()]
        while self.peek() == "·":
            self.take()
            size.append(self.factor())
        return Piece(kind, tuple(size))

    def factor(self) -> str:
        token, position = self.tokens[self.next]
        if not re.fullmatch(r"\w+", token):
            raise self.error(f"expected the name of a size or a number, found {token or 'the end'!r}", position)
        return self.take()
