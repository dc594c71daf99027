"""ClipPlan: the factor of every channel of every parameter, compiled once and applied by one gather and one multiply."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_muonclip.parallel.shards import local_part, to_local
from lightning_muonclip.qk_clip.describe.declared import AttentionModules
from lightning_muonclip.qk_clip.describe.layout import KEY_KINDS, KINDS, NO_HEAD, QUERY_KINDS, layout_kinds, spread
from lightning_muonclip.qk_clip.describe.spec import AttentionSpec
from lightning_muonclip.qk_clip.describe.weights import UnscalableError, Weight, is_adapted, weights_of
from lightning_muonclip.qk_clip.owned import why_not_owned
from lightning_muonclip.qk_clip.rule import key_factors

QK_NORM_CHOICES = ("error", "monitor", "gain")

#: Rows of the table of factors: queries, keys, rotated queries whose key is shared, and gains shared by all heads.
_QUERY, _KEY, _WHOLE, _SHARED_QUERY, _SHARED_KEY = range(5)
_SIDES = {"q": QUERY_KINDS, "k": KEY_KINDS}
_FACTOR = {"q": _QUERY, "qn": _QUERY, "k": _KEY, "kn": _KEY, "qr": _WHOLE, "*": 0}


class Scaled(NamedTuple):
    """A weight that a clip scales, and its layer."""

    module: nn.Module
    weight: Weight
    row: int


class ClipPlan:
    """Maps the gammas of all heads to factors on the weights of their layers.

    A layer is only watched (:attr:`sides` says ``"watched"`` and why) if a clip would have no effect or none of its weights
    is trained. If only queries or only keys are trained, those take all of gamma.

    Args:
        attention: The attention modules.
        alpha: Exponent of gamma on the queries.
        shared_keys: Rule for keys that several queries share.
        qk_norm: Policy for attention with QK-norm.
        lora: Policy for weights with LoRA adapters.
        owned: What the run trains.

    Raises:
        ValueError: If a weight cannot be scaled, or if no single factor fits all uses of a tied weight.
    """

    def __init__(
        self,
        attention: AttentionModules,
        alpha: float,
        shared_keys: str,
        qk_norm: str,
        lora: str,
        owned: Collection[Tensor] | None = None,
    ) -> None:
        layers = len(attention)
        heads = max((spec.num_heads for _, spec in attention.values()), default=0)
        #: What a clip scales in each layer: "q and k", "q", "k", or "watched (...)".
        self.sides: list[str] = []
        #: The weights that a clip scales, each once.
        self.scaled: list[Scaled] = []
        #: For each layer, the first that it shares weights with.
        self.tied = torch.arange(layers)
        #: For each layer and query head, the key head that it attends to.
        self.key_heads = torch.zeros(layers, heads, dtype=torch.int64)
        indices: list[Tensor] = []
        rules: dict[_Rule, list[int]] = defaultdict(list)
        ties = _Ties(layers)
        for row, (name, (module, spec)) in enumerate(attention.items()):
            weights, watched = clipped_weights(name, module, spec, qk_norm, lora, owned)
            own, is_tied = _own_params(module, name, weights)
            ours = [weight for weight in weights if weight.trained and _is_owned(module, weight, owned)]
            trained = _trained_sides(weights, ours)
            # A weight that computes both is scaled as both. The shared key of a rotated query cannot be scaled.
            is_rotated = any(weight.has_kind(("qr",)) for weight in weights)
            needed = {"q", "k"} if is_tied else {"q"} if is_rotated else set()
            if not watched and (not trained or not needed <= set(trained)):
                watched = "in no optimizer" if any(weight.trained for weight in weights) and not ours else "not trained"
            self.sides.append(f"watched ({watched})" if watched else " and ".join(trained))
            if watched:
                continue
            rule = _Rule(spec.num_heads, spec.sizes["G"], *_share(weights, trained, is_tied, alpha, shared_keys))
            rules[rule].append(row)
            self.key_heads[row, : rule.heads] = torch.arange(rule.heads) * rule.groups // rule.heads
            for param, weight in own.items():
                if not any(weight.has_kind(_SIDES[side]) for side in trained):
                    continue
                if ties.is_first(param, _Use(row, name, weight, rule)):
                    self.scaled.append(Scaled(module, weight, row))
                    indices.append(_factor_index(weight, layers, row, heads))
        self._index = torch.cat(indices) if indices else torch.empty(0, dtype=torch.int64)
        self._lengths = [len(index) for index in indices]
        self._rules = {rule: torch.tensor(rows) for rule, rows in rules.items()}
        self._watched = torch.tensor([side.startswith("watched") for side in self.sides], dtype=torch.bool)[:, None]
        self._has_ties = bool(ties.joined)
        self.tied = ties.rows()

    @property
    def params(self) -> list[Tensor]:
        """The parameters that a clip scales."""
        # Looked up each time: FSDP2 and Module.to may replace a parameter after construction.
        return [own.module.get_parameter(own.weight.path) for own in self.scaled]

    def without_gradient(self) -> dict[int, str]:
        """By layer, a trained weight that a clip scales and that has no gradient, though something of its module has one."""
        found: dict[int, str] = {}
        for (module, weight, row), param in zip(self.scaled, self.params):
            if param.requires_grad and param.grad is None and any(p.grad is not None for p in module.parameters()):
                found.setdefault(row, weight.path)
        return found

    def possible(self, gamma: Tensor) -> Tensor:
        """What can be applied of some gammas: 1 for watched heads, and the smallest of tied heads for each of them."""
        self._follow(gamma.device)
        gamma = gamma.masked_fill(self._watched, 1.0)
        if self._has_ties:
            rows = self.tied[:, None].expand_as(gamma)
            gamma = torch.ones_like(gamma).scatter_reduce(0, rows, gamma, "amin").gather(0, rows)
        return gamma

    def apply(self, gamma: Tensor, copies: Sequence[Tensor] | None = None) -> None:
        """Scales the weights, or copies of them in the order of :attr:`params`, by gammas that are :meth:`possible`."""
        self._follow(gamma.device)
        if not self.scaled:
            return
        # All factors in one flat vector, ordered (kind of factor, layer, head), after a 1 for unscaled channels.
        flat = torch.cat([gamma.new_ones(1), self._factors(gamma).flatten()])
        params = self.params if copies is None else copies
        factors = [
            local_part(spread(factor, weight.dims, param), param)
            for factor, param, (_, weight, _) in zip(flat[self._index].split(self._lengths), params, self.scaled)
        ]
        local = [to_local(param) for param in params]
        torch._foreach_mul_(local, factors)
        for param, factor, (_, weight, _) in zip(local, factors, self.scaled):
            if weight.offset:  # scale (w + offset)
                param.add_(factor - 1, alpha=weight.offset)

    def _follow(self, device: torch.device) -> None:
        if self._index.device != device:
            self._index, self._watched = self._index.to(device), self._watched.to(device)
            self._rules = {rule: rows.to(device) for rule, rows in self._rules.items()}
            self.tied = self.tied.to(device)

    def _factors(self, gamma: Tensor) -> Tensor:
        """All factors, shape (kinds of factor, layers, heads)."""
        table = torch.ones(5, *gamma.shape, dtype=gamma.dtype, device=gamma.device)
        table[_WHOLE] = gamma
        smallest = gamma.amin(-1, keepdim=True)
        for rule, rows in self._rules.items():
            query, key = key_factors(gamma[rows, : rule.heads], rule.alpha, rule.groups, rule.shared_keys)
            table[_QUERY, rows, : rule.heads], table[_KEY, rows, : rule.groups] = query, key
            table[_SHARED_QUERY, rows] = smallest[rows] ** rule.alpha
            table[_SHARED_KEY, rows] = smallest[rows] ** (1 - rule.alpha)
        return table


def clipped_weights(
    name: str, module: nn.Module, spec: AttentionSpec, qk_norm: str, lora: str, owned: Collection[Tensor] | None
) -> tuple[list[Weight], str]:
    """The weights that a clip of one layer scales, or the reason why the layer is only watched.

    Raises:
        UnscalableError: If the layer has QK-norm and ``qk_norm`` does not cover it, or if a weight cannot be scaled.
        ValueError: If the spec does not match the weights.
    """
    reason = spec.watched or why_not_owned(module, owned)
    if reason:
        return [], reason
    if spec.qk_norm and qk_norm == "error":
        raise UnscalableError(
            "QK-norm",
            f"attention {name!r} normalizes queries or keys after the projection (QK-norm), so a clip would shrink its"
            " weights without lowering its logits; pass qk_norm='monitor' to only watch it, or qk_norm='gain' to scale the"
            " gains of the norms",
        )
    if spec.qk_norm and (qk_norm == "monitor" or not spec.gains):
        set_by = dict.fromkeys([*(gain.name for gain in spec.gains), *spec.set_by])
        reason = f"QK-norm; its logits are set by {', '.join(set_by)}" if spec.set_by else "QK-norm"
        why_not = ", no factor of a single head" if spec.set_by else " without a gain"
        return [], reason + (why_not if qk_norm == "gain" else "")
    if spec.qk_norm:
        return weights_of(module, name, spec.gains, spec, shared=True), ""
    makes_logits = [projection for projection in spec.projections if layout_kinds(projection.layout) != {"*"}]
    if lora == "monitor" and any(is_adapted(module, projection) for projection in makes_logits):
        return [], "adapted by LoRA"
    return weights_of(module, name, spec.projections, spec), ""


def _is_owned(module: nn.Module, weight: Weight, owned: Collection[Tensor] | None) -> bool:
    """Whether the run trains a weight; of a LoRA layer, only the adapters are in an optimizer, and the base follows them."""
    param = module.get_parameter(weight.path)
    return owned is None or param in owned or not param.requires_grad


def _trained_sides(weights: list[Weight], ours: list[Weight]) -> list[str]:
    """The sides whose weights exist and are all trained by this run."""
    own = {side: [weight for weight in weights if weight.has_kind(kinds)] for side, kinds in _SIDES.items()}
    is_ours = {id(weight) for weight in ours}
    return [side for side, members in own.items() if members and all(id(weight) in is_ours for weight in members)]


def _factor_index(weight: Weight, layers: int, row: int, heads: int) -> Tensor:
    channels = weight.channels
    factor = torch.tensor([_FACTOR[kind] for kind in KINDS])[channels.kinds]
    shared = torch.where(channels.of_kind(KEY_KINDS), _SHARED_KEY, _SHARED_QUERY)
    factor = torch.where(channels.heads == NO_HEAD, shared, factor)
    index = 1 + (factor * layers + row) * heads + channels.heads.clamp_min(0)
    return index.masked_fill(channels.of_kind(("*",)), 0)


def _own_params(module: nn.Module, name: str, weights: list[Weight]) -> tuple[dict[Tensor, Weight], bool]:
    """Every parameter once, and whether one of them computes both queries and keys.

    Raises:
        ValueError: If one does, but with different heads.
    """
    own: dict[Tensor, Weight] = {}
    is_tied = False
    for weight in weights:
        first = own.setdefault(module.get_parameter(weight.path), weight)
        if not _same_heads(first, weight):
            raise ValueError(
                f"attention {name!r} uses one weight as {first.path} and {weight.path}, but with different heads, so no"
                f" single factor fits both; skip it with specs={{{name!r}: None}}"
            )
        is_tied |= not torch.equal(first.channels.kinds, weight.channels.kinds)
    return own, is_tied


def _same_heads(a: Weight, b: Weight) -> bool:
    return a.dims == b.dims and torch.equal(a.channels.heads, b.channels.heads)


def _share(
    weights: list[Weight], trained: list[str], is_tied: bool, alpha: float, shared_keys: str
) -> tuple[float, str]:
    """The exponent of gamma on the queries of one layer, and its rule for shared keys."""
    if trained == ["q"]:
        return 1.0, "query"
    if trained == ["k"]:
        return 0.0, "group"
    if is_tied:
        return 0.5, shared_keys  # the weight enters a logit twice
    has_own_heads = {bool((w.channels.heads[~w.channels.of_kind(("*",))] != NO_HEAD).any()) for w in weights}
    if len(has_own_heads) > 1:
        return alpha, "group"  # per-head gains on one side, shared gains on the other: both need the smallest gamma
    return alpha, shared_keys


class _Rule(NamedTuple):
    """Arguments of :func:`~lightning_muonclip.qk_clip.rule.key_factors`, by which layers are grouped."""

    heads: int
    groups: int
    alpha: float
    shared_keys: str


class _Use(NamedTuple):
    """One layer's use of a weight."""

    row: int
    name: str
    weight: Weight
    rule: _Rule


class _Ties:
    """Weights shared by several layers: scaled once, by the largest logit of all uses."""

    def __init__(self, layers: int) -> None:
        self.joined: list[tuple[int, int]] = []
        self._first: dict[Tensor, _Use] = {}
        self._layers = layers

    def is_first(self, param: Tensor, use: _Use) -> bool:
        """Registers a use of a weight and returns whether it is the first.

        Raises:
            ValueError: If no single factor fits this use and the first.
        """
        first = self._first.setdefault(param, use)
        if first is use:
            return True
        same_kinds = torch.equal(first.weight.channels.kinds, use.weight.channels.kinds)
        if not _same_heads(first.weight, use.weight) or not same_kinds or first.rule != use.rule:
            raise ValueError(
                f"attention {use.name!r} and {first.name!r} share {use.weight.path}, but use it as different heads or train"
                " different sides, so no single factor fits both; skip one with"
                f" specs={{{use.name!r}: None}}"
            )
        self.joined.append((first.row, use.row))
        return False

    def rows(self) -> Tensor:
        """For each layer, the first layer that it shares weights with."""
        first = list(range(self._layers))
        for a, b in self.joined:
            low, high = sorted((first[a], first[b]))
            first = [low if row == high else row for row in first]
        return torch.tensor(first)
