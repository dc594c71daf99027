import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from torch import nn

from lightning_muonclip.experiment.config import ConfigError
from lightning_muonclip.experiment.moe import MixtureOfExperts
from lightning_muonclip.experiment.study import runs
from lightning_muonclip.experiment.study.command import conduct, study_of
from lightning_muonclip.experiment.study.report import interval, p_value, report, write_section
from lightning_muonclip.experiment.study.runs import Results, Run, train
from lightning_muonclip.experiment.study.study import merged

DOCS = Path(__file__).parents[2] / "docs"
EVIDENCE = Path(__file__).parents[2] / "benchmarks" / "results" / "evidence.csv"


def config(*overrides: str):
    with initialize_config_module("lightning_muonclip.conf", version_base="1.3"):
        own = compose("study", list(overrides))
    own._set_flag("struct", False)
    return own


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What was trained, in place of training: the loss is least at .01, and less for heads."""
    done: list[tuple[str, ...]] = []

    def fake(overrides: Sequence[str]) -> Run:
        values = dict(override.split("=", 1) for override in overrides)
        if values.get("muonclip.split") == "broken":
            raise RuntimeError("split=broken failed: unknown split")
        done.append(tuple(overrides))
        rate, seed = float(values["muonclip.lr"]), int(values["seed"])
        loss = 2 + abs(math.log10(rate / 0.01)) + 0.1 * seed - (0.5 + 0.01 * seed) * ("muonclip.split" in values)
        return Run(tuple(sorted(overrides)), loss, 30.0, ((100, loss + 1), (200, loss)), 1.0, "test")

    monkeypatch.setattr(runs, "train", fake)
    return done


@pytest.fixture
def own(tmp_path: Path):
    """The config of a study with two configurations."""
    own = config("experiment=study/split", f"results={tmp_path / 'evidence.csv'}", f"report={tmp_path / 'evidence.md'}")
    own.configurations = {"qkv": None, "heads": {"overrides": ["muonclip.split=heads"]}}
    own.rates = {"muonclip.lr": [0.001, 0.01, 0.1]}
    return own


def test_each_configuration_sweeps_with_one_seed_and_repeats_its_best_rate(trained, own, tmp_path):
    text = conduct(own)
    assert len(trained) == 2 * 3 + 2 * 3
    assert {rate for run in trained for rate in run if "seed=0" not in run and rate.startswith("muonclip.lr")} == {
        "muonclip.lr=0.01"
    }
    differences = [-0.51, -0.52, -0.53]
    low, high = interval(differences)
    assert f"| heads | muonclip.lr=0.01 | 3 | 1.6800 | -0.5200 | {low:+.4f} to {high:+.4f} |" in text
    assert f"heads ends 0.5200 nats below qkv (p = {p_value(differences):.2g})" in text
    assert " 148 |" in text  # between the validations at steps 100 and 200, seed by seed

    earlier = (tmp_path / "evidence.csv").read_text()
    assert conduct(own) == text
    assert len(trained) == 12
    assert (tmp_path / "evidence.csv").read_text() == earlier
    assert text in (tmp_path / "evidence.md").read_text()


def test_a_failed_run_loses_no_other(trained, own, tmp_path):
    own.configurations = {"qkv": None, "broken": {"overrides": ["muonclip.split=broken"]}}
    with pytest.raises(ConfigError, match=r"split=broken failed: unknown split"):
        conduct(own)
    assert len(Results(tmp_path / "evidence.csv")) == 3


def test_a_later_override_of_a_key_replaces_an_earlier_one():
    assert merged("optimizer.lr=0.01", "+a.b=1", "seed=3", "optimizer.lr=0.003", "a.b=2") == [
        "optimizer.lr=0.003",
        "a.b=2",
        "seed=3",
    ]


def test_the_numbers_are_those_of_a_hand_calculation():
    differences = [0.1, 0.25, 0.2, 0.4]
    mean = sum(differences) / 4
    error = math.sqrt(sum((x - mean) ** 2 for x in differences) / 3 / 4)
    low, high = interval(differences)
    assert (low + high) / 2 == pytest.approx(mean)
    assert (high - low) / 2 == pytest.approx(3.182446 * error, rel=1e-6)  # Student's t of 3 degrees of freedom at .975
    # The t distribution of 3 degrees of freedom in closed form.
    t = mean / error
    u = t / math.sqrt(3)
    tail = 0.5 - (u / (1 + u * u) + math.atan(u)) / math.pi
    assert p_value(differences) == pytest.approx(2 * tail, rel=1e-9)
    assert all(map(math.isnan, (p_value([0.1]), p_value([math.inf, 0.1]), p_value([0.1, 0.1]), *interval([0.1]))))


def test_a_diverged_run_and_equal_runs_are_named(trained, own, tmp_path):
    own.configurations = {"qkv": None, "same": {"overrides": ["seed_of=qkv"]}}
    study, results = study_of(own), Results(tmp_path / "x.csv")
    study.run(results)
    assert "- same trains exactly as qkv." in report(study, results, "x.png")
    diverged = results.get([*study.configurations["same"].overrides, "muonclip.lr=0.01", "seed=1"])
    assert diverged is not None
    results.add(Run(diverged.overrides, math.inf, math.nan, (), 1.0, "test"))
    assert "cannot be compared: a run has diverged" in report(study, Results(tmp_path / "x.csv"), "x.png")


def test_the_best_rate_at_the_end_of_its_sweep_is_told(trained, own):
    own.rates = {"muonclip.lr": [0.01, 0.1]}
    assert "The best muonclip.lr of heads is at the end of its sweep" in conduct(own)


def test_a_section_replaces_its_predecessor_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Evidence\n\nBefore.\n")
    for text in (r"one \1", "other"):
        write_section(page, "a", text)
        write_section(page, "b", "beside")
    assert page.read_text() == (
        "# Evidence\n\nBefore.\n\n<!-- study a -->\nother\n<!-- end of study a -->\n\n"
        "<!-- study b -->\nbeside\n<!-- end of study b -->\n"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"configurations": {"a": {"override": []}}}, r"configurations.a: unknown key 'override'"),
        ({"configurations": {"a": 3}}, r"configurations.a: got 3"),
        ({"seeds": "three"}, r"seeds"),
        ({"seeds": [0, 1, 1]}, r"seeds must be different"),
        ({"job": 3}, r"unknown key 'job'; did you mean 'jobs'\?"),
    ],
)
def test_a_wrong_config_is_refused(own, change, message):
    for key, value in change.items():
        own[key] = value
    with pytest.raises(ConfigError, match=message):
        study_of(own)


def test_a_run_trains_in_a_process_of_its_own(tmp_path):
    tiny = (
        "trainer.max_steps=2",
        "data.val_batches=1",
        "data.batch_size=2",
        "data.block_size=16",
        "model.num_hidden_layers=1",
    )
    sizes = ("model.hidden_size=32", "data.max_bytes=100000", "trainer.val_check_interval=1", "model=moe")
    results = Results(tmp_path / "evidence.csv")
    results.add(train((*tiny, *sizes)))
    run = Results(tmp_path / "evidence.csv").get((*sizes, *tiny))
    assert run is not None
    assert [step for step, _ in run.curve] == [1, 2]
    assert run.curve[-1][1] == pytest.approx(run.loss, abs=1e-5)
    assert 0 < run.max_logit < 30
    with pytest.raises(RuntimeError, match=r"seed=x failed: muonclip-train: seed: "):
        train(("seed=x",))


def test_every_study_that_ships_composes():
    names = [
        f.name.removesuffix(".yaml") for f in (files("lightning_muonclip.conf") / "experiment" / "study").iterdir()
    ]
    for name in names:
        if not name.startswith("_"):
            study = study_of(config(f"experiment=study/{name}"))
            assert study.name == name
            assert len(study.configurations) > 1


@pytest.mark.skipif(not EVIDENCE.exists(), reason="no study has run")
def test_the_page_of_evidence_is_what_the_runs_say():
    page, results = (DOCS / "evidence.md").read_text(), Results(EVIDENCE)
    sections = page.count("<!-- study ")
    assert sections
    for name in (line.split()[2] for line in page.splitlines() if line.startswith("<!-- study ")):
        text = report(study_of(config(f"experiment=study/{name}")), results, f"evidence_{name}.png")
        assert text in page


class TestMixtureOfExperts:
    def test_a_token_gets_its_experts_weighted_by_the_router(self):
        torch.manual_seed(0)
        moe = MixtureOfExperts(8, 6, num_experts=5, num_experts_per_token=2).double().eval()
        for param in moe.parameters():
            nn.init.normal_(param)
        x = torch.randn(3, 4, 8, dtype=torch.float64)
        expected = torch.empty_like(x)
        for i, j in ((i, j) for i in range(3) for j in range(4)):
            scores = torch.sigmoid(moe.router.weight @ x[i, j])
            chosen = scores.argsort(descending=True)[:2]
            outs = []
            for e in chosen:
                gate, up = (moe.gate_up_proj[e] @ x[i, j]).split(6)
                outs.append(moe.down_proj[e] @ (gate * torch.sigmoid(gate) * up))
            expected[i, j] = sum(scores[e] / scores[chosen].sum() * out for e, out in zip(chosen, outs))
        torch.testing.assert_close(moe(x), expected, rtol=1e-12, atol=1e-12)

    def test_busy_experts_are_chosen_less(self):
        torch.manual_seed(0)
        moe = MixtureOfExperts(8, 4, num_experts=4, num_experts_per_token=1, balancing_rate=0.01)
        moe.router.weight.data[0] += 1.0
        x = torch.randn(256, 8) + 0.5

        def share() -> float:
            chosen = (moe.router(x).sigmoid() + moe.choice_bias).argmax(-1)
            return float((chosen == 0).float().mean())

        before = share()
        moe.eval()(x)
        assert not moe.choice_bias.any()
        moe.train()
        for _ in range(200):
            moe(x)
        assert before > 0.5
        assert share() < 0.35

    @pytest.mark.parametrize("count", [0, 5])
    def test_impossible_choices_are_refused(self, count):
        with pytest.raises(ValueError, match=f"between 1 and num_experts=4, got {count}"):
            MixtureOfExperts(8, 4, num_experts=4, num_experts_per_token=count)
