"""Proves that specs scale the weights of their heads: by one trial of every attention alone, and one of the whole model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muonclip.kernels.context_parallel import without_context_parallel
from lightning_muonclip.qk_clip.describe.count import Frame
from lightning_muonclip.qk_clip.describe.declared import AttentionModules
from lightning_muonclip.qk_clip.describe.describe import FAILURES, Found, run_alone
from lightning_muonclip.qk_clip.describe.gate import gate, refuse_ties
from lightning_muonclip.qk_clip.describe.infer import Layout, Table, channels_that_double
from lightning_muonclip.qk_clip.describe.isolate import Isolated, Run
from lightning_muonclip.qk_clip.describe.layout import KINDS, spread
from lightning_muonclip.qk_clip.describe.prove import CLAMPED, LARGE, Outcome, deviation, holds, outcomes
from lightning_muonclip.qk_clip.describe.spec import AttentionSpec, HeadAxis
from lightning_muonclip.qk_clip.describe.trace import flex_attention_traced
from lightning_muonclip.qk_clip.describe.weights import UnscalableError, Weight
from lightning_muonclip.qk_clip.plan import clipped_weights
from lightning_muonclip.tables import table
from lightning_muonclip.values import has_values


@dataclass(frozen=True)
class Proof:
    """What was proven of one layer.

    Attributes:
        layer: Its name.
        num_heads: Its number of query heads.
        scaled: What follows the factors of the heads: ``"q and k"``, ``"q"`` or ``"k"``.
        error: The largest deviation of an element of queries, keys, values or outputs, relative to the largest.
    """

    layer: str
    num_heads: int
    scaled: str
    error: float


@dataclass(frozen=True)
class Verification:
    """The result of :meth:`QKClip.verify`; prints as a table.

    Attributes:
        proofs: One for every layer that a clip can scale.
        watched: Why the other layers are only watched.
    """

    proofs: list[Proof]
    watched: dict[str, str]

    def __str__(self) -> str:
        rows = [("layer", "heads", "proven", "worst error")]
        rows += [(own.layer or "(model)", str(own.num_heads), own.scaled, f"{own.error:.1e}") for own in self.proofs]
        rows += [(layer or "(model)", "", f"nothing: {reason}", "") for layer, reason in self.watched.items()]
        return table(rows)


@without_context_parallel()
@flex_attention_traced()
def verify_attention(
    attention: AttentionModules,
    frames: Mapping[str, Frame],
    root: Frame,
    qk_norm: str,
    lora: str,
    owned: Collection[Tensor] | None = None,
    *,
    scales: bool = True,
) -> Verification:
    """Proves the specs of the modules that have run.

    Args:
        attention: The modules and their specs.
        frames: The inputs of each module that has run.
        root: The model and its inputs.
        qk_norm: As in :class:`~lightning_muonclip.QKClip`.
        lora: As in :class:`~lightning_muonclip.QKClip`.
        owned: What the run trains.
        scales: Whether anything will be scaled; if not, weights that cannot be scaled are not an error.

    Raises:
        ValueError: See :meth:`~lightning_muonclip.QKClip.verify`.
    """
    proofs: list[Proof] = []
    watched: dict[str, str] = {}
    failures: list[str] = []
    proven: list[Found] = []
    for name, frame in frames.items():
        module, spec = attention[name]
        try:
            weights, reason = clipped_weights(name, module, spec, qk_norm, lora, owned)
        except UnscalableError as error:
            if scales:
                raise
            reason = error.reason
        if reason or not weights:
            watched[name] = reason or "its spec names no weight"
            continue
        layout, worst, wrong = _prove(name, frame, spec, weights)
        proofs.append(Proof(name, spec.num_heads, " and ".join(layout.sides), worst))
        failures += [f"{name or '(model)'}: {line}" for line in wrong]
        if not wrong:
            proven.append(Found(name, module, layout=layout))
    if has_values(list(root.module.parameters())):
        gate(root, proven)
    else:
        refuse_ties(root.module, proven)
    for own in proven:
        notes = [own.reason] if own.layout is None else own.layout.notes
        failures += [f"{own.name or '(model)'}: {note}" for note in notes]
    if failures:
        raise ValueError(_message(failures))
    return Verification(proofs, watched)


def _message(failures: Sequence[str]) -> str:
    more = f"\n    ... and {len(failures) - 8} more" if len(failures) > 8 else ""
    return (
        "a spec does not describe its attention, so QK-Clip would scale the wrong weights:\n    "
        + "\n    ".join(failures[:8])
        + more
        + "\nCorrect the layout, the sizes or the number of heads. The spec must also cover every bias."
        "\nIf queries or keys are normalized after the projection, set qk_norm=True or list the gains."
    )


def _prove(name: str, frame: Frame, spec: AttentionSpec, weights: Sequence[Weight]) -> tuple[Layout, float, list[str]]:
    """The layout that a spec describes, the largest error of its proof, and what fails in it."""
    for sums in (True, False):  # logits may be a sum of products that all scale, or one product and biases
        try:
            isolated, run = run_alone(frame, sums)
        except FAILURES as error:
            raise ValueError(f"attention {name!r} cannot be verified, since it cannot be run alone: {error}") from error
        _refuse_unseen(name, run)
        layout = _layout(name, spec, weights, isolated, run)
        trial = list(outcomes(isolated, run, layout))
        wrong = list(_failures(trial))
        if not wrong and not holds(outcomes(isolated, run, layout, LARGE)):
            wrong = [CLAMPED]
        if not wrong or all(len(call.pairs) < 2 for call in run.calls):
            break
    return layout, max(outcome.error for outcome in trial), wrong


def _refuse_unseen(name: str, run: Run) -> None:
    reasons = ["run alone, it makes no attention call that can be seen"] * (not run.calls)
    reasons += [call.problem for call in run.calls if call.problem]
    if reasons:
        raise ValueError(f"attention {name!r} cannot be verified: {reasons[0]}")


def _layout(name: str, spec: AttentionSpec, weights: Sequence[Weight], isolated: Isolated, run: Run) -> Layout:
    """What a spec says of an attention that has run alone.

    Raises:
        ValueError: If it has another number of heads.
    """
    layout = Layout(list(range(len(run.calls))), spec.num_heads, spec.sizes["G"], [], [])
    names = {param: path for path, param in isolated.params.items()}  # a tied parameter has one
    for weight in weights:
        param = isolated.module.get_parameter(weight.path)
        shape = [param.shape[dim] for dim in weight.dims]
        own = Table(weight.dims, weight.channels.kinds.view(shape), weight.channels.heads.view(shape), weight.offset)
        layout.tables.append((names[param], own))
    group = layout.num_heads // layout.num_key_value_heads
    for call in run.calls:
        for query, key in call.pairs:
            of_query, of_key = (_heads(name, spec, x.shape[:-2], query.shape[:-2]) for x in (query, key))
            _refuse_zeros(name, "queries", query, of_query)
            _refuse_zeros(name, "keys", key, of_key)
            if layout.sides == "qk":
                _refuse_other_groups(name, spec, key, of_key)
            layout.query_units.append(of_query)
            layout.key_units.append(of_key // group)
    if any(weight.has_kind(("qr",)) for weight in weights):
        doubled = {
            path: 1 + spread((own.kinds == KINDS.index("kn")).to(isolated.dtype), own.dims, isolated.params[path])
            for path, own in layout.tables
        }
        layout.own_channels = channels_that_double(isolated, run, doubled, layout.calls)
        if layout.own_channels is None:
            raise ValueError(_message([f"{name or '(model)'}: no channels of the keys follow those of kind kn alone"]))
    return layout


def _heads(name: str, spec: AttentionSpec, lead: torch.Size, of_query: torch.Size) -> Tensor:
    """The first query head that each leading index of queries or keys belongs to."""
    axes = spec.head_axes or (HeadAxis(1, of_query[-1] if of_query else 1),)
    found = axes[0].heads if not spec.head_axes else spec.num_heads
    if found != spec.num_heads or any(axis > len(of_query) or of_query[-axis] % count for axis, count, _ in axes):
        raise ValueError(
            f"attention {name!r} computed {found} heads, but its spec says {spec.num_heads}; correct num_heads in the spec"
        )
    padded = (1,) * (len(of_query) - len(lead)) + tuple(lead)
    head = torch.zeros([1] * len(padded), dtype=torch.long)
    for axis, count, is_inner in axes:
        size = padded[-axis]
        told = max(1, count * size // of_query[-axis])  # fewer, if query heads share keys
        index = torch.arange(size)
        own = index % told if is_inner else index // (size // told)
        head = head * count + (own * (count // told)).view(-1, *[1] * (axis - 1))
    return head.expand(padded).reshape(lead)


def _refuse_zeros(name: str, what: str, x: Tensor, heads: Tensor) -> None:
    zero = [head for head in heads.unique().tolist() if not x[heads == head].any()]
    if zero:
        raise ValueError(
            f"attention {name!r}: the {what} of head {zero[0]} are all zero on these inputs, so its spec cannot be verified;"
            " pass other inputs"
        )


def _refuse_other_groups(name: str, spec: AttentionSpec, key: Tensor, heads: Tensor) -> None:
    """Raises ValueError unless keys are equal within a group and differ between groups."""
    rows = {head: key[heads == head] for head in heads.unique().tolist()}
    starts = [head for before, head in zip(rows, list(rows)[1:]) if deviation(rows[before], rows[head]) > 1e-4]
    group = spec.num_heads // spec.sizes["G"]
    if starts != list(range(group, spec.num_heads, group)):
        raise ValueError(
            f"attention {name!r}: {spec.num_heads} query heads share {len(starts) + 1} key heads, but its spec says"
            f" {spec.sizes['G']}; correct num_key_value_heads"
        )


def _failures(trial: Sequence[Outcome]) -> Iterator[str]:
    """What did not follow, head by head where it has heads."""
    for outcome in trial:
        if outcome.error < outcome.limit:
            continue
        if outcome.heads is None or outcome.before.shape != outcome.after.shape:
            yield (
                f"{outcome.what} should not change when queries and keys are scaled, but do: the layout of queries or keys"
                " includes other channels"
            )
            continue
        size = outcome.before.abs().max()
        for head in outcome.heads.unique().tolist():
            own = (outcome.heads == head).to(outcome.before.device)
            before, after = outcome.before[own], outcome.after[own]
            expected = (outcome.factor * outcome.before)[own]
            error = float((after - expected).abs().max() / size)
            if not error < outcome.limit:
                wanted, found = (float((x * before).sum() / (before * before).sum()) for x in (expected, after))
                yield (
                    f"the {outcome.what} of head {head} should be multiplied by {wanted:.4g}, but are by {found:.4g}"
                    f" (off by {error:.1e})"
                )
