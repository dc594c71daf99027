"""Checks that every family must pass."""

from __future__ import annotations

import copy
import inspect
import sys
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from families.brute_force import brute_force
from families.zoo import LENGTH, Case
from lightning_muonclip import QKClip
from lightning_muonclip.qk_clip import intercept

TOLERANCE = 1e-4
CHECKS = ("brute force", "verify", "replay")

#: A row of the table: worst errors by check, and the source of the logits.
Row = dict[str, Any]
rows: dict[tuple[str, str], Row] = defaultdict(dict)

#: Projections behind attention, of all families.
OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "out_lin", "proj", "o")


def note(case: Case, implementation: str, check: str, error: float | str) -> None:
    row = rows[case.family, implementation]
    row[check] = error if isinstance(error, str) else max(row.get(check, 0.0), error)


def clip(case: Case, model: nn.Module, threshold: float | None = None) -> QKClip:
    return QKClip(model, threshold, qk_norm=case.qk_norm)


def check_brute_force(case: Case, implementation: str) -> None:
    """The observed maxima are those of the oracle."""
    model, truth = case.model(implementation), case.model(case.truth or implementation)
    names = case.attention(model)
    row = rows[case.family, implementation]
    with clip(case, model, 100.0) as qk_clip:
        assert qk_clip.layers == names
        for args, kwargs in case.batches():
            qk_clip.discard()
            model(*args, **kwargs)
            expected = torch.stack(brute_force(truth, names, case.heads, (args, kwargs), case.queries))
            note(case, implementation, "brute force", deviation(qk_clip.max_logits, expected))
        sources = [recorder.source for recorder in qk_clip.observer.recorders]
        specs = [spec for _, spec in qk_clip.observer.attention.values()]
    layouts = [p.layout for spec in specs for p in (spec.gains if case.qk_norm == "gain" else spec.projections)]
    row.setdefault("classes", {}).update(dict.fromkeys(case.classes))
    row.setdefault("layouts", {}).update(dict.fromkeys(layout for layout in layouts if not layout.startswith("*")))
    row.setdefault("logits from", {}).update(dict.fromkeys(sources))


def check_cache(case: Case, implementation: str) -> None:
    """Keys of a cache count, as those of a learned prefix."""
    model, truth = case.model(implementation), case.model(case.truth or implementation).double()
    names = case.attention(model)
    prefix, rest = case.inputs()[1]["input_ids"].split([4, LENGTH - 4], 1)
    with torch.no_grad():
        cache, true_cache = (either(input_ids=prefix, use_cache=True).past_key_values for either in (model, truth))
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    expected = brute_force(truth, names, case.heads, ((), {"input_ids": rest, name: true_cache}))
    with clip(case, model) as qk_clip:
        model(input_ids=rest, **{name: cache})
        deviation(qk_clip.max_logits, torch.stack(expected))


def deviation(found: Tensor, expected: Tensor) -> float:
    """Worst error relative to the layer's largest logit, which must be small."""
    assert found.shape == expected.shape
    error = (found - expected).abs() / expected.abs().amax(1, keepdim=True)
    assert error.max() < TOLERANCE, f"{found}\n{expected}"
    return float(error.max())


def check_verify(case: Case, implementation: str) -> None:
    """The spec names the right channels."""
    model = case.model(implementation)
    args, kwargs = case.inputs()
    with clip(case, model, 100.0) as qk_clip:
        verification = qk_clip.verify(*args, **kwargs)
    if case.qk_norm == "monitor":
        assert set(verification.watched) == set(case.attention(model)) and not verification.checks
        return note(case, implementation, "verify", "watched")
    assert {check.layer for check in verification.checks} == set(case.attention(model)) and not verification.watched
    return note(case, implementation, "verify", max(float(check.errors.max()) for check in verification.checks))


def check_replay(case: Case, implementation: str) -> None:
    """After a clip, the same batch has the threshold as its maximum where it was exceeded, and is unchanged elsewhere."""
    model = case.model(implementation)
    cut_off_outputs(model)
    args, kwargs = case.inputs()
    before, state = maxima(case, model, args, kwargs), copy.deepcopy(model.state_dict())
    threshold = between(before)
    with clip(case, model, threshold) as qk_clip:
        model(*args, **kwargs)
        gamma = qk_clip.step().gamma
        model(*args, **kwargs)
        after = qk_clip.max_logits
    if case.qk_norm == "monitor":
        assert torch.equal(after, before)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        return note(case, implementation, "replay", "watched")
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
    return note(case, implementation, "replay", float(error.max()))


def check_undone(case: Case, implementation: str) -> None:
    """After close, nothing in torch or in the library's modules and classes is patched, and no hook is left."""
    model = case.model(implementation)
    args, kwargs = case.inputs()
    places = _places(model)
    before = [dict(place) for place in places]
    hooks = _hooks(model)
    with clip(case, model):
        during = [dict(place) for place in places]
        model(*args, **kwargs)
    ours = all(name.startswith("lightning_muonclip.") for name in case.classes)
    assert ours or any(_differences(a, b) for a, b in zip(before, during))
    for place, original in zip(places, before):
        assert not _differences(dict(place), original)
    assert _hooks(model) == hooks
    assert not intercept.running
    assert not hasattr(F.scaled_dot_product_attention, "__wrapped__")


def maxima(case: Case, model: nn.Module, args: Any, kwargs: Any) -> Tensor:
    with clip(case, model) as qk_clip:
        model(*args, **kwargs)
        return qk_clip.max_logits


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
