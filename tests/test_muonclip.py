from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import torch
from helpers import next_token_loss, tiny_gpt, token_batches
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_muonclip import Attention, Muon, MuonClip, QKClip
from lightning_muonclip.experiment.gpt import GPT

LR = 0.03
HEAD_DIM = 4


def gpt() -> GPT:
    torch.manual_seed(0)
    attention = functools.partial(Attention, num_attention_heads=2, attention_bias=True)
    return GPT(attention, vocab_size=11, hidden_size=2 * HEAD_DIM, num_hidden_layers=2, intermediate_size=16)


def loss_of(model: nn.Module, step: int) -> Tensor:
    tokens = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(step))
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    expected = dict(b.named_parameters())
    for name, p in a.named_parameters():
        assert torch.equal(p, expected[name]), name


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of matrices this small, a second thread on a busy machine costs seconds
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def muon_clip() -> Iterator[Callable[..., tuple[GPT, MuonClip]]]:
    made: list[MuonClip] = []

    def make(**options: Any) -> tuple[GPT, MuonClip]:
        model = gpt()
        made.append(MuonClip(model, **{"lr": LR} | options))
        return model, made[-1]

    yield make
    for optimizer in made:
        optimizer.close()


Make = Callable[..., tuple[GPT, MuonClip]]


@pytest.mark.parametrize("alpha", [0.5, 0.25])
def test_equals_muon_adamw_and_qk_clip_by_hand(muon_clip: Make, alpha: float) -> None:
    threshold = 0.02
    model, optimizer = muon_clip(weight_decay=0.2, adamw_betas=(0.8, 0.9), threshold=threshold, alpha=alpha)
    train(model, optimizer, range(6))

    reference = gpt()
    hidden = {name: p for name, p in reference.named_parameters() if name.endswith("_proj.weight")}
    rest = [p for name, p in reference.named_parameters() if name not in hidden]
    muon = Muon(hidden.values(), LR, 0.2, adjust_lr_fn="match_rms_adamw")
    vectors = {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0}
    tables = {"params": [p for p in rest if p.ndim > 1]}
    adamw = torch.optim.AdamW([tables, vectors], LR, betas=(0.8, 0.9), weight_decay=0.2)
    with QKClip(reference, threshold, alpha) as qk_clip:
        for step in range(6):
            reference.zero_grad()
            loss_of(reference, step).backward()
            muon.step()
            adamw.step()
            result = qk_clip.step()

    assert_same_weights(model, reference)
    assert torch.equal(optimizer.last.max_logits, result.max_logits)
    assert torch.equal(optimizer.qk_clip.clips, qk_clip.clips)
    assert 0 < qk_clip.clips.sum() < 6 * qk_clip.clips.numel()


def test_without_a_threshold_it_only_watches(muon_clip: Make) -> None:
    watched, watching = muon_clip(threshold=None)
    large, never_clips = muon_clip(threshold=1e9)
    train(watched, watching, range(3))
    train(large, never_clips, range(3))
    assert_same_weights(watched, large)
    assert watching.last.max_logits.isfinite().all()
    assert torch.equal(watching.last.gamma, torch.ones(2, 2))


MAXIMA = [[200.0, 50.0], [100.0, 1600.0]]
GAMMA = [[0.5, 1.0], [1.0, 0.0625]]  # for a threshold of 100


@pytest.mark.parametrize("logits", ["exact", "off"])
@pytest.mark.parametrize("alpha", [0.5, 0.25])
@pytest.mark.parametrize("given", [MAXIMA, torch.tensor(MAXIMA)])
def test_the_callers_maxima_are_used(muon_clip: Make, given: Any, alpha: float, logits: str) -> None:
    model, optimizer = muon_clip(threshold=100.0, alpha=alpha, logits=logits)
    unclipped, plain = muon_clip(threshold=None)
    for each, stepped, options in ((model, optimizer, {"max_logits": given}), (unclipped, plain, {})):
        loss_of(each, 0).backward()
        stepped.step(**options)

    with torch.no_grad():
        for layer, gammas in zip(unclipped.layers, GAMMA):
            for head, gamma in enumerate(gammas):
                rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
                for p in layer.self_attn.q_proj.parameters():
                    p[rows] *= gamma**alpha
                for p in layer.self_attn.k_proj.parameters():
                    p[rows] *= gamma ** (1 - alpha)
    for (name, p), expected in zip(model.named_parameters(), unclipped.parameters()):
        if "q_proj" in name or "k_proj" in name:
            torch.testing.assert_close(p, expected, rtol=1e-6, atol=0)
        else:
            assert torch.equal(p, expected), name
    untouched = slice(HEAD_DIM, 2 * HEAD_DIM), slice(0, HEAD_DIM)
    for layer, reference, rows in zip(model.layers, unclipped.layers, untouched):
        for p, expected in zip(layer.self_attn.parameters(), reference.self_attn.parameters()):
            assert torch.equal(p[rows], expected[rows])
    assert torch.equal(optimizer.last.gamma, torch.tensor(GAMMA))
    assert optimizer.qk_clip.clips.tolist() == [[1, 0], [0, 1]]


def test_the_callers_maxima_replace_the_observed_ones(muon_clip: Make) -> None:
    model, optimizer = muon_clip(threshold=1e-6)
    loss_of(model, 0).backward()
    assert (optimizer.qk_clip.max_logits > 1e-6).any()
    optimizer.step(max_logits=[[0.0, 0.0], [0.0, -5.0]])
    assert torch.equal(optimizer.last.gamma, torch.ones(2, 2))
    assert optimizer.qk_clip.max_logits.isneginf().all()


@pytest.mark.parametrize("given", [[[1.0, 2.0]], [[1.0], [2.0]], [[1.0, 2.0], [3.0, 4.0, 5.0]], torch.ones(3, 2)])
def test_maxima_of_the_wrong_shape(muon_clip: Make, given: Any) -> None:
    _, optimizer = muon_clip()
    with pytest.raises(ValueError, match=r"max_logits has rows of .* one row per layer, of \[2, 2\] heads"):
        optimizer.step(max_logits=given)


def test_resume_is_exact(muon_clip: Make) -> None:
    model, optimizer = muon_clip(threshold=0.02)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(3, 6))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, other = muon_clip(threshold=0.02, lr=0.5, weight_decay=0.9, adamw_betas=(0.1, 0.2))
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, range(3, 6))
    assert_same_weights(resumed, model)
    assert torch.equal(other.last.max_logits, optimizer.last.max_logits)


def test_closure(muon_clip: Make) -> None:
    model, optimizer = muon_clip(threshold=0.02)
    reference, plain = muon_clip(threshold=0.02)
    train(reference, plain, range(1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    assert torch.equal(optimizer.step(closure), loss_of(gpt(), 0))
    assert_same_weights(model, reference)
    assert torch.equal(optimizer.last.max_logits, plain.last.max_logits)


def test_groups() -> None:
    model = gpt()
    with closing(MuonClip(model, lr=LR, adamw_eps=1e-5, exclude=["*.up_proj.weight"])) as optimizer:
        muon, adamw, vectors = optimizer.param_groups
    assert muon["algorithm"] == "muon"
    assert muon["adjust_lr_fn"] == "match_rms_adamw"
    assert len(muon["params"]) == 2 * 5
    assert adamw["algorithm"] == "adamw"
    assert adamw["betas"] == (0.9, 0.95)
    assert adamw["eps"] == 1e-5
    assert "layers.0.mlp.up_proj.weight" in adamw["param_names"]
    assert {p.ndim for p in vectors["params"]} == {1}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


class Mixed(nn.Module):
    """Biases of every kind, gains, an embedding, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 4)
        self.norm = nn.LayerNorm(4)
        self.experts = nn.ParameterDict({"up": torch.randn(3, 4, 4), "up_bias": torch.randn(3, 4)})
        self.hidden = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 7)


VECTORS = {"norm.weight", "norm.bias", "experts.up_bias", "hidden.bias", "lm_head.bias"}
TABLES = {"tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize(
    ("options", "tables", "vectors", "lr"),
    [
        ({}, 0.1, 0.0, 0.5),
        ({"weight_decay": 0.3}, 0.3, 0.0, 0.5),
        ({"weight_decay": 0.3, "adamw_weight_decay": 0.0}, 0.0, 0.0, 0.5),
        ({"weight_decay": 0.0, "adamw_weight_decay": 0.2, "adamw_lr": 0.25}, 0.2, 0.0, 0.25),
        ({"decay_vectors": True}, 0.1, 0.1, 0.5),
        ({"adamw_weight_decay": 0.2, "adamw_lr": 0.0, "decay_vectors": True}, 0.2, 0.2, 0.0),
    ],
)
def test_adamw_has_its_own_rate_and_decays_no_vector_unless_asked(
    options: dict[str, Any], tables: float, vectors: float, lr: float
) -> None:
    model = Mixed()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with closing(MuonClip(model, lr=0.5, **options)) as optimizer:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()  # of AdamW without a gradient, only its decay is left
    expected = {name: tables for name in TABLES} | {name: vectors for name in VECTORS}
    after = dict(model.named_parameters())
    for name, decay in expected.items():
        torch.testing.assert_close(after[name], before[name] * (1 - lr * decay), msg=name)


def test_close_may_be_called_twice_and_frees_the_model() -> None:
    model = gpt()
    optimizer = MuonClip(model, lr=LR, threshold=1e-6)
    optimizer.close()
    optimizer.close()
    train(model, optimizer, range(1))  # still an optimizer, that sees nothing
    assert optimizer.last.max_logits.isneginf().all()
    assert torch.equal(optimizer.last.gamma, torch.ones(2, 2))
    MuonClip(model, lr=LR).close()


@pytest.mark.parametrize("name", ["pre", "post"])
def test_hooks_run_once_a_step(muon_clip: Make, name: str) -> None:
    Muon([nn.Parameter(torch.ones(2, 2))])  # torch wraps the step of a class when it is first instantiated
    model, optimizer = muon_clip()
    calls = []
    getattr(optimizer, f"register_step_{name}_hook")(lambda *_: calls.append(name))
    train(model, optimizer, range(3))
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be >= 0"),
        ({"threshold": 0.0}, "threshold must be positive"),
        ({"alpha": 1.5}, "alpha"),
        ({"exclude": ["*.router.weight"]}, "matches no parameter of GPT"),
        ({"shared_keys": "mean"}, "unknown shared_keys 'mean'"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MuonClip(gpt(), **options)


def test_with_every_n_steps_it_resumes_to_the_bit(tmp_path: Any) -> None:
    tokens = token_batches(8)

    def make() -> tuple[nn.Module, MuonClip]:
        torch.manual_seed(0)
        model = tiny_gpt()
        return model, MuonClip(model, lr=3e-3, threshold=1.0, every_n_steps=3)

    def train(model: nn.Module, optimizer: MuonClip, batches: Any) -> None:
        for batch in batches:
            optimizer.zero_grad()
            next_token_loss(model, batch).backward()
            optimizer.step()

    whole, first = make(), make()
    train(*whole, tokens)
    train(*first, tokens[:4])
    torch.save([part.state_dict() for part in first], tmp_path / "state.pt")
    first[1].close()
    resumed = make()
    for part, state in zip(resumed, torch.load(tmp_path / "state.pt", weights_only=True)):
        part.load_state_dict(state)
    train(*resumed, tokens[4:])
    for ours, theirs in zip(resumed[0].parameters(), whole[0].parameters()):
        assert torch.equal(ours, theirs)
    assert torch.equal(resumed[1].qk_clip.clips, whole[1].qk_clip.clips)
    assert int(whole[1].qk_clip.clips.max()) <= 3
    whole[1].close()
    resumed[1].close()


def test_a_copy_observes_nothing_and_says_so() -> None:
    optimizer = MuonClip(tiny_gpt(), lr=3e-3)
    with pytest.raises(RuntimeError, match="this copy of a MuonClip observes no model"):
        copy.deepcopy(optimizer).step()
    optimizer.close()
