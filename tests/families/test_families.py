"""Observing, inferring, verifying, clipping and closing, for every family on the real module of its library."""

from __future__ import annotations

import os

import pytest
import torch
from oracles import enlarge, module_max_logits

from families.brute_force import brute_force
from families.checks import check_family, true_maxima
from families.known import FAMILIES
from families.table import expected_rows, read, short
from families.zoo import BATCH, CASES, CLAMPED, LENGTH, WIDTH, Case, draw, parameters
from lightning_muonclip import Attention, MultiheadLatentAttention, QKClip


@parameters(CASES)
def test_a_family_is_read_observed_verified_clipped_and_restored(case: Case, implementation: str) -> None:
    check_family(case, implementation)


@parameters(CLAMPED)
def test_clamped_projections_are_refused_or_watched(case: Case, implementation: str) -> None:
    model, (args, kwargs) = case.model(implementation), case.inputs()
    with QKClip(model), pytest.raises(ValueError, match="its queries do not scale with their weights"):
        model(*args, **kwargs)
    with QKClip(model, unknown="monitor") as qk_clip:
        model(*args, **kwargs)
        assert qk_clip.layers == case.attention(model)
        assert all(side.startswith("watched (its queries do not scale") for side in qk_clip.sides.values())
        expected = true_maxima(case, case.truth or implementation)[0]
        torch.testing.assert_close(qk_clip.max_logits.amax(1), expected.amax(1).float(), rtol=1e-5, atol=0)


def test_the_oracle_agrees_with_attention_that_is_written_out() -> None:
    latent = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
    for module in (Attention(WIDTH, 4, 2), MultiheadLatentAttention(WIDTH, 4, **latent)):
        enlarge(module)
        x = draw(BATCH, LENGTH, WIDTH)
        found = brute_force(module, [""], 4, ((x,), {}))
        torch.testing.assert_close(found, [module_max_logits(module, x)], rtol=1e-6, atol=0)


def test_every_known_class_is_in_the_zoo() -> None:
    assert {cls for case in CASES for cls in case.classes} == set(FAMILIES)


@pytest.mark.skipif("FAMILIES_TABLE" in os.environ, reason="it is being written")
def test_the_table_in_the_documentation_has_every_family() -> None:
    found, text = read()
    assert found == expected_rows(), "FAMILIES_TABLE=docs/families.md pytest tests/families tests/vision"
    assert [cls for cls in FAMILIES if f"`{short(cls)}`" not in text] == []
