"""What is inferred from example inputs, before any forward in training, equals what is known of every family by name."""

from __future__ import annotations

import copy

import pytest
import torch

from families.checks import check_known, deviation, true_maxima
from families.zoo import CASES, CLAMPED, LENGTH, Case
from lightning_muonclip import QKClip


# One implementation of each: test_families infers from all.
@pytest.mark.parametrize("case", CASES, ids=[f"{case.family} {case.variant}".strip() for case in CASES])
def test_the_attention_of_an_example_is_what_is_known_by_name(case: Case) -> None:
    implementation, (args, kwargs) = case.implementations[0], case.inputs()
    model = case.model(implementation)
    state, generator = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    with QKClip(model, None, example=(args, kwargs)) as qk_clip:
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), generator)
        assert (qk_clip.max_logits == -torch.inf).all()
        check_known(case, qk_clip)
        model(*args, **kwargs)
        deviation(qk_clip.max_logits, true_maxima(case, case.truth or implementation)[0])


@pytest.mark.parametrize("case", CLAMPED, ids=[case.family for case in CLAMPED])
def test_clamped_projections_do_not_scale(case: Case) -> None:
    with pytest.raises(ValueError, match="its queries do not scale with their weights"):
        QKClip(case.model(case.implementations[0]), example=case.inputs())


def test_finding_attention_adds_nothing_to_a_cache_of_keys() -> None:
    case = next(case for case in CASES if case.family == "Llama")
    model = case.model("sdpa")
    prefix, rest = case.inputs()[1]["input_ids"].split([4, LENGTH - 4], 1)
    with torch.no_grad():
        cache = model(input_ids=prefix, use_cache=True).past_key_values
    first, second = copy.deepcopy(cache), copy.deepcopy(cache)
    with QKClip(model, None, example=((), {"input_ids": rest, "past_key_values": cache})):
        assert cache.get_seq_length() == 4
    with QKClip(model, None) as qk_clip:
        model(input_ids=rest, past_key_values=first)  # in which its attention is found
        assert first.get_seq_length() == LENGTH
        found = qk_clip.max_logits
        qk_clip.discard()
        model(input_ids=rest, past_key_values=second)
        assert torch.equal(qk_clip.max_logits, found)
