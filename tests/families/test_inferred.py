"""What is inferred from behavior alone equals what is known of every family by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning_muonclip.qk_clip.describe.registry import AttentionModules
from torch import nn

from families.zoo import CASES, CLAMPED, Case, parameters
from lightning_muonclip import QKClip
from lightning_muonclip.qk_clip.describe.layout import NO_HEAD
from lightning_muonclip.qk_clip.describe.weights import weights_of

#: Families whose gains are known by no name, but found: StableLM has a norm for every head.
NEW_GAINS = {"StableLM, QK-norm"}


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


def observed(model: nn.Module, inputs: Any, example: Any) -> tuple[AttentionModules, torch.Tensor]:
    with QKClip(model, None, example=example) as qk_clip:
        model(*inputs[0], **inputs[1])
        return qk_clip.observer.attention, qk_clip.max_logits


@parameters(CASES)
def test_the_inferred_channels_are_those_known_by_name(case: Case, implementation: str) -> None:
    model, inputs = case.model(implementation), case.inputs()
    known, expected = observed(model, inputs, None)
    inferred, found = observed(model, inputs, inputs)
    assert list(inferred) == list(known) == case.attention(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if case.family in NEW_GAINS:
        assert all(spec.gains for _, spec in inferred.values())
        return
    assert channels(inferred) == channels(known)
    for name, (_, spec) in known.items():
        own = inferred[name][1]
        assert (own.num_heads, own.num_key_value_heads) == (spec.num_heads, spec.num_key_value_heads)
        assert own.qk_norm == spec.qk_norm


@parameters(CLAMPED)
def test_clamped_projections_do_not_scale(case: Case, implementation: str) -> None:
    with pytest.raises(ValueError, match=r"its queries do not scale with their weights"):
        QKClip(case.model(implementation), example=case.inputs())
