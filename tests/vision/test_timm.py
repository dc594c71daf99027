"""timm's attention, as every other family."""

from __future__ import annotations

import pytest
from families.checks import check_brute_force, check_replay, check_undone, check_verify
from families.zoo import TIMM, Case, parameters

pytest.importorskip("timm")

every_family = parameters(TIMM)


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
def test_nothing_is_left_behind(case: Case, implementation: str) -> None:
    check_undone(case, implementation)
