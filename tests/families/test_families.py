"""Observing, verifying, clipping and closing, for every family on the real module of its library."""

from __future__ import annotations

import os

import pytest
import torch
from lightning_muonclip.qk_clip.describe.families import FAMILIES
from oracles import enlarge, module_max_logits

from families.brute_force import brute_force
from families.checks import check_brute_force, check_cache, check_replay, check_undone, check_verify
from families.table import expected_rows, read, short
from families.zoo import BATCH, CASES, CLAMPED, LENGTH, WIDTH, Case, draw, parameters
from lightning_muonclip import Attention, MultiheadLatentAttention, QKClip

every_family = parameters(CASES)


@every_family
def test_the_largest_logits_are_those_of_the_oracle(case: Case, implementation: str) -> None:
    check_brute_force(case, implementation)


@every_family
def test_the_spec_is_verified(case: Case, implementation: str) -> None:
    check_verify(case, implementation)


@every_family
def test_a_replay_has_the_threshold_as_its_maximum(case: Case, implementation: str) -> None:
    check_replay(case, implementation)


@every_family
def test_close_restores_everything(case: Case, implementation: str) -> None:
    check_undone(case, implementation)


@parameters([case for case in CASES if case.cached])
def test_keys_of_a_cache_count(case: Case, implementation: str) -> None:
    check_cache(case, implementation)


@parameters(CLAMPED)
def test_clamped_projections_are_observed_but_not_verified(case: Case, implementation: str) -> None:
    check_brute_force(case, implementation)
    model = case.model(implementation)
    args, kwargs = case.inputs()
    with QKClip(model) as qk_clip, pytest.raises(ValueError, match="a spec does not describe its attention"):
        qk_clip.verify(*args, **kwargs)


def test_the_oracle_agrees_with_attention_that_is_written_out() -> None:
    latent = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
    for module in (Attention(WIDTH, 4, 2), MultiheadLatentAttention(WIDTH, 4, **latent)):
        enlarge(module)
        x = draw(BATCH, LENGTH, WIDTH)
        found = brute_force(module, [""], 4, ((x,), {}))
        torch.testing.assert_close(found, [module_max_logits(module, x)], rtol=1e-6, atol=0)


def test_every_class_of_the_registry_is_in_the_zoo() -> None:
    classes = {cls for case in CASES for cls in case.classes}
    assert classes == set(FAMILIES)


@pytest.mark.skipif("FAMILIES_TABLE" in os.environ, reason="it is being written")
def test_the_table_in_the_documentation_has_every_family() -> None:
    found, text = read()
    assert found == expected_rows(), "FAMILIES_TABLE=docs/families.md pytest tests/families tests/vision"
    assert [cls for cls in FAMILIES if f"`{short(cls)}`" not in text] == []
