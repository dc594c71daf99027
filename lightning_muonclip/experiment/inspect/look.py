"""What a run would do with a model, found out without training it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_muonclip import Muon, QKClip
from lightning_muonclip.experiment.config import ConfigError
from lightning_muonclip.experiment.inspect.abstract import FAILURES, Rehearsal
from lightning_muonclip.experiment.inspect.costs import Multiplied, Ranks, multiplied
from lightning_muonclip.experiment.inspect.target import Target
from lightning_muonclip.optim.routing import RouteRow, route_params, routing_rows, split_params
from lightning_muonclip.qk_clip.describe.describe import Found
from lightning_muonclip.qk_clip.describe.survey import NO_PRODUCT, NO_SOFTMAX
from lightning_muonclip.qk_clip.fused_parts import FusedParts
from lightning_muonclip.qk_clip.owned import has_part_of
from lightning_muonclip.qk_clip.summary import layouts_text
from lightning_muonclip.signatures import share_out
from lightning_muonclip.values import has_values

#: What stops a run whose attention cannot be read, beside a description of the attention.
WAYS_OUT = (
    "muonclip.specs (in Python: specs={{{name!r}: AttentionSpec(...)}}) describes it",
    "specs={{{name!r}: None}} leaves it alone",
    "muonclip.unknown=monitor only watches what cannot be read",
)


@dataclass(frozen=True)
class Attention:
    """Attention layers that are alike.

    Attributes:
        names: Of the modules.
        kind: Their class.
        num_heads: Of queries; 0 if it is not understood.
        num_key_value_heads: Of keys.
        layout: Of every weight.
        clips: ``"q and k"``, ``"q"`` or ``"k"``; ``None`` if nothing is scaled.
        watched: Why nothing is scaled.
        is_refused: Whether ``unknown="error"`` stops a run for them.
        proven_on: The module whose copy with random weights was proven.
        error: The largest relative deviation in the proof.
    """

    names: list[str]
    kind: str
    num_heads: int = 0
    num_key_value_heads: int = 0
    layout: str = ""
    clips: str | None = None
    watched: str | None = None
    is_refused: bool = False
    proven_on: str | None = None
    error: float | None = None


@dataclass
class Look:
    """All that was found out.

    Attributes:
        target: The model.
        has_values: Whether its weights have values.
        rows: Who is stepped by what.
        attention: The attention layers, if example inputs were known.
        others: Modules that weigh activations, but have no logits to clip, by reason.
        passed_over: Modules that could not run without values, by reason.
        ranks: Where the optimizer's state and work are.
        multiplied: The weights that multiply activations.
        refusal: What stops a run, beside refused attention.
        notes: What else is to be said.
    """

    target: Target
    has_values: bool
    rows: list[RouteRow]
    attention: list[Attention] | None
    others: dict[str, list[str]]
    passed_over: dict[str, list[str]]
    ranks: Ranks
    strategy: str
    multiplied: Multiplied
    refusal: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def refused(self) -> list[Attention]:
        """Attention for which ``unknown="error"`` stops a run."""
        return [own for own in self.attention or () if own.is_refused]

    @property
    def stops(self) -> bool:
        """Whether a run would be stopped."""
        is_error = self.target.options.get("unknown", "error") == "error"
        return self.refusal is not None or (bool(self.refused) and is_error)


def look_at(
    target: Target, strategy: str | None = None, ranks: int | None = None, tokens: int | None = None
) -> Look:
    """Routes the parameters of a model, reads its attention, and counts what Muon costs.

    Args:
        target: The model.
        strategy: How it is spread over ranks; ``None`` is as the target says.
        ranks: Over how many.
        tokens: Of all ranks in a step; ``None`` is as the target says.

    Raises:
        ConfigError: If options do not fit the model.
    """
    target = replace(target, tokens=tokens or target.tokens)
    model, options = target.model, target.options
    strategy = strategy or target.strategy or "single"
    count = ranks or target.ranks or 1
    clip_options, muon_options = share_out(options, QKClip, Muon)
    given_parts = muon_options.pop("parts", None) or {}
    how = {name: options[name] for name in ("exclude", "include", "router") if name in options}
    try:
        routes = route_params(model, **how)
        groups = split_params(model, **how)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not groups:
        raise ConfigError(f"{target.title} has no parameters to train")
    reading = _Reading(target, clip_options)
    parts = FusedParts(model, options.get("split", "qkv"), given_parts)
    if reading.qk_clip is not None:
        observer = reading.qk_clip.observer
        parts.update(observer.attention, observer.discovery.fused)
    try:
        optimizer = Muon(groups, parts=parts.parts, **{"lr": 1.0, **_without_schedules(muon_options)})
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Look(
        target,
        reading.has_values,
        routing_rows(routes, optimizer.parts),
        reading.attention(),
        reading.others(),
        _by_reason(reading.passed_over),
        Ranks(optimizer, strategy, count),
        strategy,
        multiplied(model, routes),
        reading.refusal,
        [*target.notes, *reading.notes],
    )


def _without_schedules(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None or name == "momentum_dtype"}


class _Reading:
    """Reads the attention of a target, as far as that is possible."""

    def __init__(self, target: Target, options: Mapping[str, Any]) -> None:
        self._model = target.model
        self.has_values = has_values(list(target.model.parameters()))
        self.qk_clip: QKClip | None = None
        self.refusal: str | None = None
        self.passed_over: dict[str, str] = {}
        self.notes: list[str] = []
        self._threshold = options.get("threshold", 100.0)
        if target.example is None:
            return
        try:
            if not self.has_values:
                rehearsal = Rehearsal(self._model)
                rehearsal.prepare(*target.example)
                self.passed_over = dict(rehearsal.passed_over)
            self._model.train()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.qk_clip = QKClip(self._model, **{**options, "unknown": "monitor"}, example=target.example)
        except FAILURES as error:
            where = "Without values, the" if not self.has_values else "The"
            self.notes.append(
                f"{where} model cannot run on these inputs, so its attention was not looked at:"
                f" {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            )
            self.refusal = str(error) if _is_refusal(error) else None

    def attention(self) -> list[Attention] | None:
        """The attention layers, those that are alike together."""
        if self.qk_clip is None:
            return None
        discovery = self.qk_clip.observer.discovery
        known, sides = self.qk_clip.observer.attention, self.qk_clip.sides
        layers = []
        for name, (module, spec) in known.items():
            found, side = discovery.found.get(name), sides[name]
            is_watched = side.startswith("watched")
            proof = found if found is not None and found.layout is not None else None
            layers.append(
                Attention(
                    [name],
                    type(module).__name__,
                    0 if spec.watched else spec.num_heads,
                    0 if spec.watched else spec.sizes["G"],
                    "" if spec.watched else layouts_text(spec),
                    None if is_watched else side,
                    side[len("watched (") : -1] if is_watched else None,
                    _is_refused(found),
                    None if proof is None else proof.like if proof.like is not None else name,
                    None if proof is None or proof.layout is None else proof.layout.error,
                )
            )
        for name, reason in discovery.unmeasured.items():
            if reason not in (NO_PRODUCT, NO_SOFTMAX):
                found = discovery.found.get(name)
                kind = type(found.module).__name__ if found is not None else ""
                layers.append(Attention([name], kind, watched=reason, is_refused=_is_refused(found)))
        if not layers and not discovery.left_alone and self._threshold is not None:
            self.refusal = (
                f"{type(self._model).__name__} computes no attention that QK-Clip can see, for which a run ends at its first"
                " step; train without QK-Clip: MuonClipCallback(logits='off'), or Muon(split_params(model))"
            )
        return _together(layers)

    def others(self) -> dict[str, list[str]]:
        """Modules without logits, by reason."""
        if self.qk_clip is None:
            return {}
        unmeasured = self.qk_clip.observer.discovery.unmeasured
        return _by_reason({name: why for name, why in unmeasured.items() if why in (NO_PRODUCT, NO_SOFTMAX)})


def _is_refused(found: Found | None) -> bool:
    return found is not None and found.layout is None and has_part_of(found.module, None)


def _is_refusal(error: BaseException) -> bool:
    """Whether QK-Clip itself refuses the model."""
    return isinstance(error, ValueError) and "attention" in str(error)


def _together(layers: Sequence[Attention]) -> list[Attention]:
    """Layers that differ in nothing but their names, together."""
    groups: dict[Any, Attention] = {}
    for own in layers:
        pattern = re.sub(r"\d+", "*", own.names[0])
        reason = re.sub(r"\d+", "*", own.watched or "")
        key = (
            pattern,
            own.kind,
            own.num_heads,
            own.num_key_value_heads,
            own.layout,
            own.clips,
            reason,
            own.is_refused,
            own.proven_on if own.proven_on not in own.names else None,
        )
        first = groups.get(key) or next(
            (g for g in groups.values() if own.proven_on in g.names and own.proven_on is not None and _same(g, own)), None
        )
        if first is None:
            groups[key] = own
        else:
            first.names.extend(own.names)
    return list(groups.values())


def _same(a: Attention, b: Attention) -> bool:
    return (a.kind, a.layout, a.clips, a.is_refused) == (b.kind, b.layout, b.clips, b.is_refused)


def _by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        found.setdefault(reason, []).append(name)
    return found
