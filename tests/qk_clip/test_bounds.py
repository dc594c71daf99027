"""What is clipped and shown where a maximum is only bounded, as on a device that the host must not wait for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import SdpaAttention, snapshot, true_maxima
from torch import Tensor

from lightning_muonclip import Attention, QKClip
from lightning_muonclip.kernels import measure
from lightning_muonclip.kernels.bounded_max_logits import top_rows
from lightning_muonclip.qk_clip.observe import watch

LENGTH = 30  # of which 8 rows of a sequence and head are computed


def on_a_device(query: Tensor, key: Tensor, bounds: Tensor, *, scale: float, **pairs: Any) -> Tensor:
    names = ("is_causal", "window", "documents", "mask")
    return top_rows(query, key, bounds, scale, *(pairs.get(name) for name in names))


@pytest.fixture(params=[lambda: Attention(16, 4, 2), lambda: SdpaAttention(16, 4, 2)], ids=["ours", "third party"])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(measure, "bounded_max_logits", on_a_device)
    torch.manual_seed(0)
    return request.param()


def test_flat_heads_are_clipped_by_the_bound_and_shown_as_computed(module: Any) -> None:
    x = torch.randn(2, LENGTH, 16)
    before = snapshot(module)
    truth = true_maxima(module, x)
    with QKClip(module, threshold=1.0) as qk_clip:
        module(x)
        result = qk_clip.step()
    shown, bounds = result.max_logits[0].double(), result.bounds[0].double()
    assert (shown <= truth + 1e-5).all() and (bounds >= truth - 1e-5).all()
    assert int(result.uncertified_heads) == int((bounds > shown).sum()) > 0
    torch.testing.assert_close(result.gamma[0].double(), (1 / bounds).clamp(max=1.0), check_dtype=False)
    assert not torch.equal(snapshot(module)["q_proj.weight"], before["q_proj.weight"])
    assert (true_maxima(module, x) <= 1.0 + 1e-5).all()


def test_peaked_heads_are_proven(module: Any) -> None:
    with torch.no_grad():
        module.q_proj.weight.mul_(60)
    x = torch.randn(2, LENGTH, 16)
    with QKClip(module, threshold=None) as qk_clip:
        module(x)
        result = qk_clip.step()
    assert int(result.uncertified_heads) == 0
    torch.testing.assert_close(result.max_logits[0].double(), true_maxima(module, x), rtol=1e-5, atol=1e-5)


def test_another_batch_may_prove_a_maximum(module: Any) -> None:
    flat = torch.randn(2, LENGTH, 16)
    with QKClip(module, threshold=None) as qk_clip:
        for x in (flat, 12 * flat):  # the bounds of the first are below the maxima of the second
            module(x)
        result = qk_clip.step()
    assert int(result.uncertified_heads) == 0
    torch.testing.assert_close(result.max_logits[0].double(), true_maxima(module, 12 * flat), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("thresholds", "logits"), [((30.0,), "exact"), ((None,), "exact"), ((5.0,), "whole"), ((30.0, 5.0), "whole")]
)
def test_a_bound_is_not_taken_where_it_alone_could_be_above_the_threshold(thresholds: Any, logits: str) -> None:
    module = SdpaAttention(16, 4, 2)
    clips = [QKClip(module, threshold, specs=None, example=((torch.randn(2, 5, 16),), {})) for threshold in thresholds]
    assert watch.watch_of(module).logits == logits
    for clip in clips:
        clip.close()


def test_a_head_that_is_only_bounded_is_not_taken_for_one_whose_clips_have_no_effect(module: Any) -> None:
    x = torch.randn(2, LENGTH, 16)
    with QKClip(module, threshold=1.0) as qk_clip:  # below the logarithm of the keys
        for _ in range(20):
            module(x)
            qk_clip.step()
        assert not qk_clip.state_dict()["effect"][..., 0].any()


def test_a_cpu_proves_every_maximum() -> None:
    module, x = Attention(16, 4, 2), torch.randn(2, LENGTH, 16)
    with QKClip(module, threshold=1.0) as qk_clip:
        module(x)
        result = qk_clip.step()
    assert int(result.uncertified_heads) == 0
    assert torch.equal(result.bounds, result.max_logits)
    with QKClip(module, threshold=1.0) as qk_clip:
        assert int(qk_clip.step([[5.0, 0.1, 0.1, 0.1]]).uncertified_heads) == 0
