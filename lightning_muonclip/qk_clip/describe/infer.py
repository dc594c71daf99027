"""Which channels of which weights make the queries and keys of every head, inferred from what an isolated module does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_muonclip.qk_clip.describe.isolate import Isolated, Run
from lightning_muonclip.qk_clip.describe.layout import KEY_KINDS, KINDS, NO_HEAD, QUERY_KINDS, spread
from lightning_muonclip.qk_clip.describe.probe import MIXED, NOTHING, SIDES, Key, Output, Probe
from lightning_muonclip.qk_clip.describe.spec import HeadAxis

_Q, _K, _V, _REST = range(len(SIDES))
_LEFT = KINDS.index("*")
_OTHER_ORDER = "its query heads share key heads in another order than one after the other"


class Unclear(Exception):  # noqa: N818
    """Why the heads of an attention cannot be told.

    Args:
        reason: In words.
        elsewhere: Whether a module around it may tell.
        final: Whether it stays so if all but one of several products are taken for a bias.
    """

    def __init__(self, reason: str, elsewhere: bool = False, final: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.elsewhere, self.final = reason, elsewhere, final


@dataclass(eq=False)
class Table:
    """What the channels of one parameter are.

    Attributes:
        dims: The dimensions of the parameter that the channels lie on.
        kinds: Index of each channel's kind in :data:`~.layout.KINDS`; its shape is the parameter's along ``dims``.
        heads: The head of each channel, or :data:`~.layout.NO_HEAD`.
        offset: What the module adds to the parameter before it multiplies by it: 1 for the gain of Gemma's norm.
    """

    dims: tuple[int, ...]
    kinds: Tensor
    heads: Tensor
    offset: float = 0.0

    @property
    def scaled(self) -> Tensor:
        """Whether each channel makes queries or keys."""
        return self.kinds != _LEFT

    def overlaps(self, other: Table) -> bool:
        """Whether some channel makes queries or keys of both."""
        return self.dims != other.dims or bool((self.scaled & other.scaled).any())

    def equals(self, other: Table) -> bool:
        """Whether both scale the same channels for the same heads."""
        same = self.dims == other.dims and self.offset == other.offset and torch.equal(self.kinds, other.kinds)
        return same and torch.equal(self.heads[self.scaled], other.heads[other.scaled])


@dataclass(eq=False)
class Layout:
    """The heads of one attention, and what scales them.

    Attributes:
        calls: The numbers of the calls in a forward that share these weights.
        num_heads: Number of query heads.
        num_key_value_heads: Number of key heads.
        tables: Parameters and their channels; a parameter twice if it makes queries and keys at once.
        qk_norm: Whether a norm stands behind the projections, so that its gains are what scales.
        query_units: For every pair of queries and keys, the head of each leading index of the queries.
        key_units: The same of the keys.
        unscaled: Behind a norm, the channels that make queries, keys and values of one head; no factor on them matters.
        head_axes: The leading axes of the queries that count heads, unless it is the innermost one alone.
        own_channels: Channels of the keys that are each head's own, where others are shared by all heads (latent attention).
        notes: Why one side is left alone.
        set_by: Parameters that set the logits behind the product of queries and keys.
        error: Of its proof, the largest deviation of an element, relative to the largest.
    """

    calls: list[int]
    num_heads: int
    num_key_value_heads: int
    query_units: list[Tensor]
    key_units: list[Tensor]
    tables: list[tuple[str, Table]] = field(default_factory=list)
    qk_norm: bool = False
    own_channels: Tensor | None = None
    unscaled: list[tuple[str, Table]] = field(default_factory=list)
    head_axes: tuple[HeadAxis, ...] = ()
    notes: list[str] = field(default_factory=list)
    set_by: tuple[str, ...] = ()
    error: float = 0.0

    @property
    def lacks_keys(self) -> bool:
        """Whether no parameter of the module makes the keys."""
        return any("no parameter makes its keys" in note for note in self.notes)

    @property
    def sides(self) -> str:
        """Which sides scale: "qk", "q" or "k"."""
        kinds = {KINDS[kind][0] for _, table in self.tables for kind in table.kinds.unique().tolist()}
        return "".join(side for side in "qk" if side in kinds)

    @property
    def is_tied(self) -> bool:
        """Whether one weight makes queries and keys at once."""
        return any(a[0] == b[0] and a[1].overlaps(b[1]) for a, b in itertools.combinations(self.tables, 2))

    def queries_alone(self, why: str) -> None:
        """Leaves the keys alone; the queries take the whole factor."""
        for _, table in self.tables:
            is_key = torch.isin(table.kinds, torch.tensor([KINDS.index(kind) for kind in KEY_KINDS]))
            is_query = torch.isin(table.kinds, torch.tensor([KINDS.index(kind) for kind in QUERY_KINDS]))
            table.kinds = table.kinds.masked_fill(is_key, _LEFT).masked_fill(is_query, KINDS.index("q"))
        self.own_channels = None
        self.notes.append(why)


@dataclass(eq=False)
class _Side:
    """Queries or keys of one attention: how many heads they have, and which channels feed one head alone."""

    outputs: list[Output]
    units: list[Tensor]
    count: int
    heads: dict[Key, Tensor]
    axes: tuple[HeadAxis, ...] = ()
    shares: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, Key] = field(default_factory=dict)


class Heads:
    """Everything that the gradients of one run tell.

    Args:
        isolated: The module.
        run: Its forward.

    Raises:
        Unclear: If the module makes no attention call.
    """

    def __init__(self, isolated: Isolated, run: Run) -> None:
        if not run.calls:
            raise Unclear("run alone, it makes no attention call", elsewhere=True)
        if any(x.is_complex() for call in run.calls for pair in call.pairs for x in pair):
            raise Unclear("its queries and keys are complex numbers, which are not followed")
        self.isolated, self.run = isolated, run
        self.probe = probe = Probe(isolated, run)
        self.side = probe.coordinates(lambda output: output.side, len(SIDES))
        # Calls with one product, such as attention that is used twice, are one group.
        products = [id(call.pairs[0][0]) for call in run.calls]
        self._group = [products.index(product) for product in products]
        is_one = len(set(products)) == 1
        self.call = None if is_one else probe.coordinates(lambda output: self._group[output.call], len(run.calls))
        self._axes: dict[int, dict[Key, Tensor]] = {}

    @cached_property
    def makes_both(self) -> dict[Key, Tensor]:
        """Channels that feed queries and keys, and nothing else."""
        rest = self.probe.coordinates(lambda output: int(output.side in (_V, _REST)), 2)
        return {key: (own == MIXED) & (rest[key] == 0) for key, own in self.side.items()}

    def sites(self) -> list[list[int]]:
        """The calls, those together that share the weights of their heads."""
        groups: dict[int, list[int]] = {}
        for number, group in enumerate(self._group):
            groups.setdefault(group, []).append(number)
        if self.call is None:
            return list(groups.values())
        private = [own[(self.side[key] == _Q) & (self.axis(1)[key] >= 0)] for key, own in self.call.items()]
        known = torch.cat([own[own != NOTHING] for own in private])
        alone = set(known[known >= 0].tolist())
        if not len(known):  # only a product tells then that calls belong together
            return list(groups.values())
        shared = [number for number, group in enumerate(self._group) if group not in alone]
        return [*([shared] if shared else []), *(groups[group] for group in sorted(alone))]

    def refuse_parts(self, layout: Layout) -> None:
        """Refuses weights of which a part makes queries or keys and another makes nothing: it may take its place later.

        Raises:
            Unclear: If there is such a weight.
        """
        for name, table in layout.tables:
            if bool((self.side[name, table.dims] == NOTHING).any()):
                raise Unclear(
                    f"some channels of {name} make nothing in this forward; in another they may make its heads"
                )

    def axis(self, axis: int) -> dict[Key, Tensor]:
        """What every channel feeds along one leading axis, counted from the innermost."""
        if axis not in self._axes:

            def index(output: Output) -> Tensor | int:
                return _along(output, output.slices[-axis], axis) if len(output.slices) >= axis else 0

            count = max((o.size(axis) for o in self.probe.outputs if len(o.slices) >= axis), default=1)
            one = {key: torch.zeros_like(own) for key, own in self.side.items()}
            self._axes[axis] = self.probe.coordinates(index, count) if count > 1 else one
        return self._axes[axis]

    def layouts(self, calls: list[int]) -> Iterator[list[Layout]]:
        """Layouts that the gradients allow, the likeliest first; only a forward decides between them.

        Each comes with another, where there are parameters whose shares are almost lost in rounding, which takes them too.

        Raises:
            Unclear: If they allow none.
        """
        for call in calls:
            if self.run.calls[call].problem:
                raise Unclear(self.run.calls[call].problem)
        query, key = self._sides(calls)
        if len({self._group[call] for call in calls}) > 1 and not self._are_alike(query):
            raise Unclear("its heads are told apart by several attention calls")
        group = _group(query, key)
        is_in_order = group == [head * key.count // query.count for head in range(query.count)]
        query_sets, key_sets = self._scaling(query), self._scaling(key) if is_in_order else []
        if query_sets and is_in_order and not key_sets:
            yield from self._rotated_apart(calls, query, key, query_sets)
        for chosen in itertools.islice(itertools.product(query_sets or [()], key_sets or [()]), 12):
            tiny = [self._tiny(side, names) if names else () for side, names in zip((query, key), chosen)]
            found = []
            for more in ((), tiny) if any(tiny) else ((),):
                layout = _new(calls, query, key)
                for side, names, kind in zip((query, key), (a + b for a, b in zip(chosen, more or ((), ()))), "qk"):
                    for name in names:
                        self._add(layout, side, name, kind)
                if not all(chosen):
                    layout.notes.append(self._why_not(key if chosen[0] else query) if is_in_order else _OTHER_ORDER)
                layout.qk_norm = self._is_norm(layout, query)
                found.append(layout)
            if any(chosen):
                yield found
        if not query_sets and not key_sets:
            yield from self._tied(calls, query, key)
            yield from self._shared_gains(calls, query, key)
            if all(
                self._is_normalized(side) and self._is_bounded(calls, side.outputs[0].side) for side in (query, key)
            ):
                watched = _new(calls, query, key)
                watched.qk_norm = True
                yield [watched]
            raise Unclear(f"{self._why_not(query)}; {self._why_not(key) if is_in_order else _OTHER_ORDER}")

    # Heads ----------------------------------------------------------------------------------------------------------

    def enter_others(self, layout: Layout) -> None:
        """Enters the head of every other channel that feeds one alone: of values and, behind a norm, of queries and keys."""
        others = replace(layout, tables=[]) if layout.qk_norm else layout
        scaled = {name for name, table in layout.tables if table.scaled.any()}
        for number, kind in ((_V, "*"), *(((_Q, "q"), (_K, "k")) if layout.qk_norm else ())):
            if self.probe.of(number, layout.calls):
                side = self._side_of(number, layout.calls)
                self._find_keys(side)
                for name in side.keys:
                    if kind == "*" or name not in scaled:
                        self._add(others, side, name, kind)
        if layout.qk_norm:
            layout.unscaled = others.tables
            called = [self.run.calls[call] for call in layout.calls]
            layout.set_by = self.probe.reaching([x for call in called for x in (*call.rest, *call.factors)])

    def _sides(self, calls: list[int]) -> tuple[_Side, _Side]:
        query, key = (self._side_of(side, calls) for side in (_Q, _K))
        for side, other in ((query, key), (key, query)):
            if side.count > 1:
                continue
            # Nothing tells its heads, but they lie where those of the other side lie.
            axes, (units, count) = other.axes, (other.units, other.count)
            is_alone = all(axis.heads == other.outputs[0].size(axis.axis) for axis in axes)
            if is_alone and len(side.outputs[0].lead) >= max((axis.axis for axis in axes), default=math.inf):
                axes = tuple(HeadAxis(axis.axis, side.outputs[0].size(axis.axis)) for axis in axes)
                units, count = _units(side.outputs, axes)
            elif [unit.shape for unit in side.units] != [unit.shape for unit in units]:
                continue
            if count > 1:
                mixed = {k: torch.full_like(own, MIXED) for k, own in side.heads.items()}
                side.units, side.count, side.heads, side.axes = units, count, mixed, axes
        for side, what in ((query, "queries"), (key, "keys")):
            sizes = _per_head([(o.tensor.detach() * o.cotangent).sum((-2, -1)).cpu() for o in side.outputs], side)
            if not bool(sizes.isfinite().all()):
                raise Unclear(f"its {what} are not finite on these inputs")
            if bool((sizes == 0).any()):
                raise Unclear(f"the {what} of head {int((sizes == 0).nonzero()[0])} are zero on these inputs")
            self._find_keys(side)
            for name, k in side.keys.items():
                private = self._private(side, k)
                share = torch.zeros_like(sizes).index_add_(
                    0, side.heads[k][private], self.probe.shares[k][private].to(sizes)
                )
                side.shares[name] = share / sizes
        return query, key

    def _find_keys(self, side: _Side) -> None:
        """Where the channels of every parameter lie: along the dimensions on which most of them feed one head."""
        for key in side.heads:
            private = self._private(side, key).float().mean()
            if private > 0 and (
                key[0] not in side.keys or private > self._private(side, side.keys[key[0]]).float().mean()
            ):
                side.keys[key[0]] = key

    def _side_of(self, side: int, calls: list[int]) -> _Side:
        outputs = self.probe.of(side, calls)
        axes = [
            (axis, size)
            for axis in range(len(outputs[0].lead), 0, -1)
            if (size := outputs[0].size(axis)) > 1 and self._is_told(side, calls, self.axis(axis), size)
        ]
        if not axes:
            return self._merged(side, outputs, calls) or _Side(
                outputs,
                [torch.zeros(o.lead, dtype=torch.long) for o in outputs],
                1,
                {k: torch.full_like(own, 0) for k, own in self.side.items()},
            )
        heads = {}
        for key in self.side:
            head = torch.zeros_like(self.side[key])
            for axis, size in axes:
                own = self.axis(axis)[key]
                head = torch.where((head < 0) | (own < 0), torch.minimum(head, own), head * size + own)
            heads[key] = head
        found = tuple(HeadAxis(axis, size) for axis, size in axes)
        return _Side(outputs, *_units(outputs, found), heads, found)

    def _merged(self, side: int, outputs: list[Output], calls: list[int]) -> _Side | None:
        """Heads that share an axis with the batch, as in (batch · heads, length, channels)."""
        for axis in range(len(outputs[0].lead), 0, -1):
            size = outputs[0].size(axis)
            for count, is_inner in itertools.product((h for h in range(size, 1, -1) if size % h == 0), (True, False)):
                shared = HeadAxis(axis, count, is_inner)

                def head(output: Output, size: int = size, shared: HeadAxis = shared) -> Tensor | int:
                    is_alike = output.side != _REST and output.lead == outputs[0].lead
                    return _head(output, shared, size) if is_alike else 0

                heads = self.probe.coordinates(head, count)
                if self._is_told(side, calls, heads, count):
                    return _Side(outputs, *_units(outputs, (shared,)), heads, (shared,))
        return None

    def _is_told(self, side: int, calls: list[int], coordinates: dict[Key, Tensor], count: int) -> bool:
        """Whether channels tell every coordinate apart."""
        for feeds in (lambda key: self.side[key] == side, lambda key: self.makes_both[key]):
            seen: set[int] = set()
            for key, own in coordinates.items():
                found = own[feeds(key) & self._of_calls(key, calls) & (own != NOTHING)]
                if len(found) and bool((found >= 0).all()):
                    seen |= set(found.unique().tolist())
            if len(seen) == count:
                return True
        return False

    def _of_calls(self, key: Key, calls: list[int]) -> Tensor:
        """Channels that feed no other calls."""
        if self.call is None:
            return torch.ones_like(self.side[key], dtype=torch.bool)
        own, groups = self.call[key], {self._group[call] for call in calls}
        return (own == MIXED if len(groups) > 1 else torch.zeros_like(own, dtype=torch.bool)) | torch.isin(
            own, torch.tensor(sorted(groups))
        )

    def _private(self, side: _Side, key: Key) -> Tensor:
        """Channels that feed one head of one side, and nothing else."""
        number = side.outputs[0].side
        calls = sorted({output.call for output in side.outputs})
        return (side.heads[key] >= 0) & (self.side[key] == number) & self._of_calls(key, calls)

    def _are_alike(self, side: _Side) -> bool:
        """Whether every channel of several calls feeds the first of them too."""
        first = self.probe.shares_of([o for o in side.outputs if o.call == side.outputs[0].call])
        return not any(bool((first[k][self._private(side, k)] == 0).any()) for k in side.keys.values() if k in first)

    # What scales ----------------------------------------------------------------------------------------------------

    def _scaling(self, side: _Side) -> list[tuple[str, ...]]:
        """Smallest sets of parameters whose private channels scale every head of a side, the largest parameters first."""
        names = [name for name, share in side.shares.items() if float(share.abs().max()) > 10 * self.probe.tolerance]
        found: list[tuple[str, ...]] = []
        for size in range(1, min(len(names), 8) + 1):
            for chosen in itertools.combinations(names, size):
                is_new = not any(set(other) <= set(chosen) for other in found)
                if is_new and self._is_one(torch.stack([side.shares[name] for name in chosen]).sum(0)):
                    found.append(chosen)
        return sorted(found, key=lambda chosen: -sum(self.probe.params[name].numel() for name in chosen))

    def _tiny(self, side: _Side, chosen: Sequence[str]) -> tuple[str, ...]:
        """Parameters whose share is lost in rounding, such as a bias beside huge inputs; they may scale all the same."""
        shares = {name: float(share.abs().max()) for name, share in side.shares.items() if name not in chosen}
        return tuple(name for name, share in shares.items() if 0 < share <= 10 * self.probe.tolerance)

    def _is_one(self, share: Tensor) -> bool:
        return bool(((share - 1).abs() < 10 * self.probe.tolerance).all())

    def _is_norm(self, layout: Layout, query: _Side) -> bool:
        """Whether no more than one number a channel scales a head, though more makes it: a norm stands in between.

        What normalizes a weight is no such norm: queries and keys still grow with what is projected.
        """
        behind = self.probe.behind(query.outputs) - {name for name, _ in layout.tables}
        if not behind:
            return False  # learned queries
        channels = query.outputs[0].tensor.shape[-1]
        for name, table in layout.tables:
            param = self.probe.params[name]
            heads = table.heads[table.scaled].unique().numel()
            kinds = table.kinds[table.scaled].unique().numel()
            scaled = int(table.scaled.sum()) * param.numel() // max(1, table.kinds.numel())
            if scaled > channels * max(1, heads) * max(1, kinds):
                return False
        return any(self._is_bounded(layout.calls, "qk".index(side)) for side in layout.sides)

    def _is_bounded(self, calls: list[int], side: int) -> bool:
        """Whether queries or keys are as large as before when all that is projected is huge."""
        sizes = [
            sum(float(pair[side].detach().square().sum()) for call in calls for pair in run.calls[call].pairs)
            for run in (self.run, self._grown)
        ]
        return sizes[1] < 4 * sizes[0]

    @cached_property
    def _grown(self) -> Run:
        return self.isolated.run(self.run.products, factor=1024.0)

    def _add(
        self,
        layout: Layout,
        side: _Side,
        name: str,
        kind: str,
        where: Tensor | None = None,
        *,
        heads: Tensor | None = None,
        offset: float = 0.0,
    ) -> None:
        """Enters channels of a parameter into a layout."""
        key = side.keys[name]
        chosen = self._private(side, key) if where is None else where
        table = next((own for other, own in layout.tables if other == name and own.dims == key[1]), None)
        if table is None or (kind != "*" and bool((table.kinds[chosen] != _LEFT).any())):
            kinds = torch.full(chosen.shape, _LEFT)
            table = Table(key[1], kinds, torch.full_like(kinds, NO_HEAD), offset)
            layout.tables.append((name, table))
        chosen = chosen & (table.kinds == _LEFT)
        table.kinds = torch.where(chosen, KINDS.index(kind), table.kinds)
        table.heads = torch.where(chosen, side.heads[key] if heads is None else heads, table.heads)

    def _rotated_apart(
        self, calls: list[int], query: _Side, key: _Side, query_sets: list[tuple[str, ...]]
    ) -> Iterator[list[Layout]]:
        """Latent attention: a part of every key is its head's own, the rest is rotated and shared by all heads."""
        names = [name for name, share in key.shares.items() if float(share.abs().max()) > self.probe.tolerance]
        own = self._own_channels(key, names)
        if own is None:
            return
        part = self.probe.coordinates(lambda o: (~own).long() if o in query.outputs else 0, 2)
        for chosen in query_sets:
            masks = {name: self._private(query, query.keys[name]) for name in chosen}
            if any(bool((part[query.keys[name]][mask] < 0).any()) for name, mask in masks.items()):
                continue
            layout = _new(calls, query, key)
            layout.own_channels = own
            for name, mask in masks.items():
                self._add(layout, query, name, "qn", mask & (part[query.keys[name]] == 0))
                self._add(layout, query, name, "qr", mask & (part[query.keys[name]] == 1))
            for name in names:
                self._add(layout, key, name, "kn")
            yield [layout]

    def _own_channels(self, key: _Side, names: Sequence[str]) -> Tensor | None:
        """Which channels of the keys double if the private channels of these parameters do, where the others stay."""
        if not names:
            return None
        factors = {
            name: 1
            + spread(
                self._private(key, key.keys[name]).to(self.isolated.dtype), key.keys[name][1], self.probe.params[name]
            )
            for name in names
        }
        calls = sorted({output.call for output in key.outputs})
        return channels_that_double(self.isolated, self.run, factors, calls, self.probe.tolerance)

    def _tied(self, calls: list[int], query: _Side, key: _Side) -> Iterator[list[Layout]]:
        """One weight that makes queries and keys of the same head."""
        if query.count != key.count:
            return
        degrees = []
        for side in (query, key):
            sizes = _per_head([(o.tensor.detach() * o.cotangent).sum((-2, -1)).cpu() for o in side.outputs], side)
            shares: dict[Key, Tensor] = {}
            for k, share in self.probe.shares_of(side.outputs).items():
                both = self.makes_both[k] & (side.heads[k] >= 0)
                if both.any():
                    whole = torch.zeros_like(sizes).index_add_(0, side.heads[k][both], share[both].to(sizes))
                    shares[k] = whole / sizes
            degrees.append(shares)
        keys = [k for k in degrees[0] if k in degrees[1] and torch.equal(query.heads[k], key.heads[k])]
        names = {k[0] for k in keys}
        if not keys or len(names) != len(keys) or not self._is_one(torch.stack([degrees[0][k] for k in keys]).sum(0)):
            return
        if self._is_one(torch.stack([degrees[1][k] for k in keys]).sum(0)):
            layout = _new(calls, query, key)
            for k in keys:
                makes_both = self.makes_both[k] & (query.heads[k] >= 0)
                for side, kind in ((query, "q"), (key, "k")):
                    side.keys[k[0]] = k
                    self._add(layout, side, k[0], kind, makes_both)
            yield [layout]

    def _shared_gains(self, calls: list[int], query: _Side, key: _Side) -> Iterator[list[Layout]]:
        """The gains and biases of norms, which scale all heads of a side at once."""
        for offset in (0.0, 1.0):
            layout = _new(calls, query, key)
            layout.qk_norm = True
            for side, kind in ((query, "q"), (key, "k")):
                whole = float(sum((o.tensor.detach() * o.cotangent).sum() for o in side.outputs))
                own: dict[str, Tensor] = {}
                shares: dict[str, Tensor] = {}
                for name, slopes in self.probe.slopes.items():
                    k = (name, (0,))
                    chosen = (self.side[k] == side.outputs[0].side) & self._of_calls(k, calls)
                    share = (self.probe.shares[k][chosen].sum() + offset * slopes[chosen].sum()) / whole
                    if chosen.any() and abs(share) > 10 * self.probe.tolerance:
                        own[name], shares[name] = chosen, share
                for size in range(1, min(len(own), 8) + 1):
                    sets = [c for c in itertools.combinations(own, size) if self._is_one(sum(shares[n] for n in c))]  # type: ignore[arg-type]
                    for name in sets[0] if sets else ():
                        side.keys[name] = (name, (0,))
                        heads = torch.full_like(self.side[name, (0,)], NO_HEAD)
                        self._add(layout, side, name, kind, own[name], heads=heads, offset=offset)
                    if sets:
                        break
            if layout.tables:
                yield [layout]

    def _is_normalized(self, side: _Side) -> bool:
        """Whether a factor on the matrices of a side, and on some biases, does not reach it; gains do not count."""
        whole = float(sum((o.tensor.detach() * o.cotangent).sum() for o in side.outputs))
        shares = {name: float(own.sum()) / whole for (name, _), own in self.probe.shares_of(side.outputs).items()}
        most = side.outputs[0].tensor.shape[-1] * side.count
        vectors = [name for name in shares if self.probe.params[name].numel() <= most]
        matrices = [shares[name] for name in self.probe.behind(side.outputs) & shares.keys() if name not in vectors]
        return bool(matrices) and any(
            abs(sum(matrices) + sum(shares[name] for name in biases)) < 1e-2
            for count in range(min(len(vectors), 4) + 1)
            for biases in itertools.combinations(vectors, count)
        )

    def _why_not(self, side: _Side) -> str:
        what = "queries" if side.outputs[0].side == _Q else "keys"
        if not any((own == side.outputs[0].side).any() or (own == MIXED).any() for own in self.side.values()):
            return f"no parameter makes its {what}"
        if not side.shares:
            return f"what makes its {what} makes something else too, or all heads at once"
        degrees = ", ".join(
            f"{name}: {float(share.mean()):.3g}" for name, share in itertools.islice(side.shares.items(), 4)
        )
        if self._is_normalized(side):
            is_bounded = self._is_bounded(sorted({output.call for output in side.outputs}), side.outputs[0].side)
            normalized = "they are" if is_bounded else "the weights themselves are"
            return f"its {what} stay as they are when their weights are scaled: {normalized} normalized (degrees {degrees})"
        return f"its {what} do not scale with their weights (degrees {degrees})"


def channels_that_double(
    isolated: Isolated, run: Run, factors: Mapping[str, Tensor], calls: Sequence[int], tolerance: float = 1e-3
) -> Tensor | None:
    """Which channels of the keys double when weights are multiplied by factors; ``None`` unless the others stay."""
    with isolated.scaled(factors):
        after = isolated.run(run.products)
    keys = [
        (a, b) for call in calls for (_, a), (_, b) in zip(run.calls[call].pairs, after.calls[call].pairs, strict=True)
    ]
    doubled, same = (
        torch.stack([(b - factor * a).abs().flatten(0, -2).amax(0) / a.abs().max() for a, b in keys]).amax(0).cpu()
        < tolerance
        for factor in (2.0, 1.0)
    )
    return doubled if bool((doubled | same).all() and doubled.any() and same.any()) else None


def _new(calls: list[int], query: _Side, key: _Side) -> Layout:
    axes = query.axes or key.axes or (HeadAxis(1, 1),)
    is_usual = bool(query.outputs[0].lead) and axes == (HeadAxis(1, query.outputs[0].size(1)),)
    return Layout(calls, query.count, key.count, query.units, key.units, head_axes=() if is_usual else axes)


def _along(output: Output, index: Tensor, axis: int) -> Tensor:
    """An index of one leading axis, shaped to broadcast over the output."""
    return index.view([-1 if i == len(output.lead) - axis else 1 for i in range(output.tensor.ndim)])


def _head(output: Output, axis: HeadAxis, size: int) -> Tensor:
    """The head of every index of an axis of that size, shaped to broadcast over the output."""
    index = output.slices[-axis.axis]
    head = index % axis.heads if axis.is_inner else index // (size // axis.heads)
    return _along(output, head, axis.axis)


def _units(outputs: Sequence[Output], axes: Sequence[HeadAxis]) -> tuple[list[Tensor], int]:
    """The head of each leading index, where heads lie along some axes; and how many heads there are."""
    units = []
    for output in outputs:
        unit = torch.zeros([1] * len(output.lead), dtype=torch.long)
        for axis in axes:
            unit = unit * axis.heads + _head(output, axis, outputs[0].size(axis.axis))[..., 0, 0]
        units.append(unit.expand(output.lead))
    return units, math.prod(axis.heads for axis in axes)


def _per_head(values: Sequence[Tensor], side: _Side) -> Tensor:
    """Sums values of each leading index by head."""
    sums = torch.zeros(side.count, dtype=values[0].dtype)
    for own, unit in zip(values, side.units):
        sums.index_add_(0, unit.flatten(), own.flatten())
    return sums


def _group(query: _Side, key: _Side) -> list[int]:
    """The key head of every query head."""
    q_unit, k_unit = query.units[0], key.units[0]
    if q_unit.ndim == k_unit.ndim:
        for axis, (a, b) in enumerate(zip(q_unit.shape, k_unit.shape)):
            if b not in (1, a) and a % b == 0:
                k_unit = k_unit.repeat_interleave(a // b, axis)
    try:
        q_unit, k_unit = torch.broadcast_tensors(q_unit, k_unit)
    except RuntimeError:
        raise Unclear(f"queries {tuple(q_unit.shape)} and keys {tuple(k_unit.shape)} do not pair") from None
    pairs = [k_unit[q_unit == head].unique().tolist() for head in range(query.count)]
    if any(len(own) != 1 for own in pairs):
        raise Unclear("a query head meets several key heads")
    return [own[0] for own in pairs]
