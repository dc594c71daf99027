"""What a run would do with a model, found out without training it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_muonclip import Muon, QKClip
from lightning_muonclip.experiment.config import ConfigError
from lightning_muonclip.experiment.inspect.abstract import FAILURES, Rehearsal, reason_of
from lightning_muonclip.experiment.inspect.costs import Multiplied, Ranks, multiplied
from lightning_muonclip.experiment.inspect.target import Example, Target
from lightning_muonclip.optim.routing import RouteRow, route_params, routing_rows, split_params
from lightning_muonclip.qk_clip.describe.alike import Likeness
from lightning_muonclip.qk_clip.describe.describe import Found
from lightning_muonclip.qk_clip.describe.survey import NO_PRODUCT, NO_SOFTMAX, run_watched
from lightning_muonclip.qk_clip.fused_parts import FusedParts
from lightning_muonclip.qk_clip.observe.capture import Capture
from lightning_muonclip.qk_clip.owned import has_part_of
from lightning_muonclip.qk_clip.summary import layouts_text
from lightning_muonclip.qk_clip.verify import verify_attention
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
        proven_on: The modules of which copies with random weights were proven; without values, the first of those alike.
        error: The largest relative deviation in the proofs.
    """

    names: list[str]
    kind: str
    num_heads: int = 0
    num_key_value_heads: int = 0
    layout: str = ""
    clips: str | None = None
    watched: str | None = None
    is_refused: bool = False
    proven_on: Sequence[str] = ()
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
    def cannot_run_without_values(self) -> bool:
        """Whether values would help to look at its attention."""
        is_looked_at = self.attention is not None or self.refusal is not None
        return not (self.has_values or is_looked_at or self.target.example is None)

    @property
    def stops(self) -> bool:
        """Whether a run would be stopped."""
        is_error = self.target.options.get("unknown", "error") == "error"
        return self.refusal is not None or (bool(self.refused) and is_error)


def look_at(target: Target, strategy: str | None = None, ranks: int | None = None, tokens: int | None = None) -> Look:
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
        self._proofs: dict[str, tuple[str, float]] = {}
        self._threshold = options.get("threshold", 100.0)
        if target.example is None:
            return
        try:
            if not self.has_values:
                rehearsal = Rehearsal(self._model)
                rehearsal.prepare(*target.example)
                self.passed_over = dict(rehearsal.passed_over)
        except FAILURES as error:
            self.notes.append(f"It cannot run on these inputs without values: {reason_of(error)}.")
            return
        try:
            self._model.train()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                qk_clip = QKClip(self._model, **{**options, "unknown": "monitor"}, example=target.example)
                self._proofs = self._of_declared(qk_clip, target.example, options)
            self.qk_clip = qk_clip
        except FAILURES as error:
            if isinstance(error, ValueError) and "attention" in str(error):  # QK-Clip refuses it
                self.refusal = str(error)
            else:
                self.notes.append(f"It cannot run on these inputs: {reason_of(error)}.")

    def _of_declared(
        self, qk_clip: QKClip, example: Example, options: Mapping[str, Any]
    ) -> dict[str, tuple[str, float]]:
        """Proves layouts that a class declares, which nobody has inferred; without values, one of several layers alike.

        Returns:
            For every layer, the one that was proven, and the error of the proof.
        """
        observer = qk_clip.observer
        with Capture(observer, but=observer.discovery.found) as capture:
            if not capture.attention:
                return {}
            run_watched(self._model, *example, capture)
        firsts: dict[str, Likeness] = {}
        on: dict[str, str] = {}
        for name, frame in capture.frames.items():
            likeness = Likeness(frame)
            alike = (first for first, other in firsts.items() if not self.has_values and likeness.is_of(other))
            on[name] = next(alike, name)
            firsts.setdefault(on[name], likeness)
        assert capture.root is not None
        proofs = verify_attention(
            capture.attention,
            {name: capture.frames[name] for name in firsts},
            capture.root,
            options.get("qk_norm", "monitor"),
            options.get("lora", "monitor"),
            scales=self._threshold is not None,
        ).proofs
        errors = {proof.layer: proof.error for proof in proofs}
        return {name: (first, errors[first]) for name, first in on.items() if first in errors}

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
            proof = self._proofs.get(name)
            if found is not None and found.layout is not None:
                proof = name if found.like is None else found.like, found.layout.error
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
                    () if proof is None else (proof[0],),
                    None if proof is None else proof[1],
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


def _together(layers: Sequence[Attention]) -> list[Attention]:
    """Layers that differ in nothing but their numbers, together."""
    groups: dict[Any, list[Attention]] = {}
    for own in layers:
        told = (own.kind, own.num_heads, own.num_key_value_heads, own.layout, own.clips, own.is_refused)
        groups.setdefault(
            (*(re.sub(r"\d+", "*", text) for text in (own.names[0], own.watched or "")), *told), []
        ).append(own)
    return [
        replace(
            group[0],
            names=[name for own in group for name in own.names],
            proven_on=list(dict.fromkeys(name for own in group for name in own.proven_on)),
            error=max((own.error for own in group if own.error is not None), default=None),
        )
        for group in groups.values()
    ]


def _by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        found.setdefault(reason, []).append(name)
    return found
