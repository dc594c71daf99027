"""Checks that every family must pass."""

from __future__ import annotations

import functools
import inspect
import sys
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from families.brute_force import brute_force
from families.known import known_attention
from families.zoo import LENGTH, Case
from lightning_muonclip import AttentionSpec, QKClip
from lightning_muonclip.qk_clip.describe.declared import AttentionModules
from lightning_muonclip.qk_clip.describe.layout import NO_HEAD, layout_kinds, layout_text
from lightning_muonclip.qk_clip.describe.split import matrix_parts
from lightning_muonclip.qk_clip.describe.weights import weights_of
from lightning_muonclip.qk_clip.intercept.listener import running

TOLERANCE = 1e-4
CHECKS = ("brute force", "verify", "replay")

#: A row of the table: worst errors by check, and the source of the logits.
Row = dict[str, Any]
rows: dict[tuple[str, str], Row] = defaultdict(dict)

#: Projections behind attention, of all families.
OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "out_lin", "proj", "o")


def note(case: Case, implementation: str, check: str, error: float) -> None:
    row = rows[case.family, implementation]
    row[check] = max(row.get(check, 0.0), error)


def check_family(case: Case, implementation: str) -> None:
    """Everything that QK-Clip does with a model, through the attention that it finds in the first forward in training."""
    model = case.model(implementation)
    state = State(model)
    with QKClip(model, 100.0, qk_norm=case.qk_norm) as qk_clip:
        check_brute_force(case, implementation, qk_clip)
        check_known(case, qk_clip)
        if case.cached:
            check_cache(case, implementation, qk_clip)
        check_verify(case, implementation, qk_clip)
        check_replay(case, implementation, qk_clip)
        assert all(name.startswith("lightning_muonclip.") for name in case.classes) or state.is_patched()
    state.check()


def check_brute_force(case: Case, implementation: str, qk_clip: QKClip) -> None:
    """The observed maxima are those of the oracle, and those of the first forward are among them."""
    for (args, kwargs), expected in zip(case.batches(), true_maxima(case, case.truth or implementation)):
        qk_clip.discard()
        qk_clip.model(*args, **kwargs)
        note(case, implementation, "brute force", deviation(qk_clip.max_logits, expected))
    row = rows[case.family, implementation]
    specs = [spec for _, spec in qk_clip.observer.attention.values()]
    row.setdefault("classes", {}).update(dict.fromkeys(case.classes))
    row.setdefault("layouts", {}).update(dict.fromkeys(layout for spec in specs for layout in layouts(spec)))
    row.setdefault("logits from", {}).update(dict.fromkeys(own.source for own in qk_clip.observer.recorders))


@functools.cache
def true_maxima(case: Case, implementation: str) -> list[Tensor]:
    """The largest logits of the oracle for every batch, each of shape (layers, heads)."""
    model = case.model(implementation)
    names = case.attention(model)
    return [torch.stack(brute_force(model, names, case.heads, own, case.queries)) for own in case.batches()]


def layouts(spec: AttentionSpec) -> list[str]:
    """The layouts of the weights that a clip scales, in words."""
    scaled = [own for own in spec.gains or spec.projections if layout_kinds(own.layout) != {"*"}]
    return [own.layout if isinstance(own.layout, str) else layout_text(own.layout, spec.sizes) for own in scaled]


def check_known(case: Case, qk_clip: QKClip) -> None:
    """The layers, and the channels and heads of their weights, are those that are known by name."""
    known, found = known_attention(qk_clip.model), qk_clip.observer.attention
    assert qk_clip.layers == list(known) == case.attention(qk_clip.model)
    assert channels(found) == channels(known)
    for name, (_, spec) in known.items():
        own = found[name][1]
        assert (own.num_heads, own.num_key_value_heads) == (spec.num_heads, spec.num_key_value_heads)
        assert own.qk_norm == spec.qk_norm
    if not any(spec.qk_norm for _, spec in known.values()):  # so are those of the values, which Muon splits
        ours, theirs = (matrix_parts(qk_clip.model, own, "heads") for own in (found, known))
        assert {id(w): (dim, sorted(map(Tensor.tolist, own))) for w, (dim, own, *_) in ours.items()} == {
            id(w): (dim, sorted(map(Tensor.tolist, own))) for w, (dim, own, *_) in theirs.items()
        }


def channels(attention: AttentionModules) -> dict[str, list[tuple[tuple[int, ...], list[int], list[int]]]]:
    """For every parameter that computes queries or keys: its dimensions, and the kind and head of each channel."""
    found: dict[str, list[Any]] = {}
    for name, (module, spec) in attention.items():
        for weight in weights_of(module, name, spec.gains or spec.projections, spec, shared=bool(spec.gains)):
            is_left = weight.channels.of_kind(("*",))
            if not is_left.all():
                heads = weight.channels.heads.masked_fill(is_left, NO_HEAD)
                path = f"{name}.{weight.path}".lstrip(".")
                found.setdefault(path, []).append((weight.dims, weight.channels.kinds.tolist(), heads.tolist()))
    return found


def check_cache(case: Case, implementation: str, qk_clip: QKClip) -> None:
    """Keys of a cache count, as those of a learned prefix."""
    model, truth = qk_clip.model, case.model(case.truth or implementation).double()
    prefix, rest = case.inputs()[1]["input_ids"].split([4, LENGTH - 4], 1)
    with torch.no_grad():
        cache, true_cache = (either(input_ids=prefix, use_cache=True).past_key_values for either in (model, truth))
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    expected = brute_force(truth, qk_clip.layers, case.heads, ((), {"input_ids": rest, name: true_cache}))
    qk_clip.discard()
    model(input_ids=rest, **{name: cache})
    deviation(qk_clip.max_logits, torch.stack(expected))


def deviation(found: Tensor, expected: Tensor) -> float:
    """Worst error relative to the layer's largest logit, which must be small."""
    assert found.shape == expected.shape
    error = (found - expected).abs() / expected.abs().amax(1, keepdim=True)
    assert error.max() < TOLERANCE, f"{found}\n{expected}"
    return float(error.max())


def check_verify(case: Case, implementation: str, qk_clip: QKClip) -> None:
    """The experiments find every layer as it was inferred."""
    args, kwargs = case.inputs()
    verification = qk_clip.verify(*args, **kwargs)
    assert {proof.layer for proof in verification.proofs} == set(qk_clip.layers) and not verification.watched
    note(case, implementation, "verify", max(proof.error for proof in verification.proofs))


def check_replay(case: Case, implementation: str, qk_clip: QKClip) -> None:
    """After a clip, the same batch has the threshold as its maximum where it was exceeded, and is unchanged elsewhere."""
    model = qk_clip.model
    cut_off_outputs(model)
    args, kwargs = case.inputs()
    qk_clip.discard()
    model(*args, **kwargs)
    before = qk_clip.max_logits
    qk_clip.threshold = threshold = between(before)
    gamma = qk_clip.step().gamma
    model(*args, **kwargs)
    after = qk_clip.max_logits
    if case.shared_gain:
        expected = before * (threshold / before.amax(1, keepdim=True)).clamp(max=1.0)
    else:
        expected = before.clamp(max=threshold)
        assert torch.equal(gamma < 1, before > threshold)
    untouched = expected == before
    assert 0 < int((before > threshold).sum()) < before.numel()
    error = (after - expected).abs() / threshold
    assert error.max() < TOLERANCE, f"{after}\n{expected}"
    assert torch.equal(after[untouched], before[untouched])
    assert (after <= threshold * (1 + TOLERANCE)).all()
    note(case, implementation, "replay", float(error.max()))


class State:
    """Where patches and hooks may be, in torch and in a model's modules and classes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.places = _places(model)
        self.before = [dict(place) for place in self.places]
        self.hooks = _hooks(model)

    def is_patched(self) -> bool:
        return any(_differences(dict(place), original) for place, original in zip(self.places, self.before))

    def check(self) -> None:
        """Nothing is patched, and no hook is left."""
        for place, original in zip(self.places, self.before):
            assert not _differences(dict(place), original)
        assert _hooks(self.model) == self.hooks
        assert not running
        assert not hasattr(F.scaled_dot_product_attention, "__wrapped__")


def between(maxima: Tensor) -> float:
    """A threshold that half of the heads pass, or half of the positive ones."""
    ordered = maxima[maxima > 0].sort().values
    assert len(ordered) > 1
    return float(ordered[(len(ordered) - 1) // 2 : (len(ordered) + 3) // 2].mean())


@torch.no_grad()
def cut_off_outputs(model: nn.Module) -> None:
    """Attention adds nothing to the residual stream, so that no layer's clip changes another layer's logits."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in OUTPUTS and isinstance(getattr(module, "weight", None), Tensor):
            module.weight.zero_()


def _places(model: nn.Module) -> list[Any]:
    """Namespaces that may contain patches."""
    places: dict[int, Any] = {id(vars(F)): vars(F)}
    for module in model.modules():
        for cls in type(module).__mro__[:-1]:
            places.setdefault(id(cls), vars(cls))
            scope = vars(sys.modules[cls.__module__])
            places.setdefault(id(scope), scope)
            forward = inspect.unwrap(cls.forward) if hasattr(cls, "forward") else None
            if forward is not None:
                places.setdefault(id(forward.__globals__), forward.__globals__)
    flex = sys.modules.get("torch.nn.attention.flex_attention")
    return [*places.values(), *([vars(flex)] if flex is not None else [])]


def _differences(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    return {name for name in a.keys() | b.keys() if a.get(name) is not b.get(name)}


def _hooks(model: nn.Module) -> list[Any]:
    return [(dict(m._forward_hooks), dict(m._forward_pre_hooks), m.training) for m in model.modules()]
