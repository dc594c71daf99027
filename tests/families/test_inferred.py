"""What is inferred from example inputs, before any forward in training, equals what is known of every family by name."""

from __future__ import annotations

import pytest
import torch

from families.checks import check_known
from families.zoo import CASES, CLAMPED, Case, parameters
from lightning_muonclip import QKClip


@parameters(CASES)
def test_the_attention_of_an_example_is_what_is_known_by_name(case: Case, implementation: str) -> None:
    model, inputs = case.model(implementation), case.inputs()
    state, generator = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    with QKClip(model, None, example=inputs) as qk_clip:
        check_known(case, qk_clip)
        assert (qk_clip.max_logits == -torch.inf).all()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


@parameters(CLAMPED)
def test_clamped_projections_do_not_scale(case: Case, implementation: str) -> None:
    with pytest.raises(ValueError, match="its queries do not scale with their weights"):
        QKClip(case.model(implementation), example=case.inputs())
