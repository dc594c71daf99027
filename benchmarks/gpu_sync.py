"""Does a step let the host run ahead of the GPU, and can a CUDA graph hold it? ``python benchmarks/gpu_sync.py``.

A plain loop must wait for nothing. Lightning waits now and then; every place that waits is named, and none may be ours.
"""

from __future__ import annotations

import contextlib
import functools
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from harness import attempt, device, exit_status, save
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_muonclip
from lightning_muonclip import Attention, Muon, MuonClip, MuonClipCallback, QKClip, split_params
from lightning_muonclip.experiment.gpt import GPT

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
#: Every head is clipped.
THRESHOLD = 1e-3
LAYERS, HEADS, WIDTH, VOCABULARY = 3, 4, 128, 256
#: Steps that make states and compile kernels, and those that are watched.
WARM_UP, WATCHED = 4, 4

ON_CUDA = device().type == "cuda"
PACKAGE = Path(lightning_muonclip.__file__).parent


def gpt() -> GPT:
    """The same weights at every call."""
    torch.manual_seed(0)
    return GPT(functools.partial(Attention, num_attention_heads=HEADS), VOCABULARY, WIDTH, LAYERS)


def loss_of(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Of the next token."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@contextlib.contextmanager
def on_waiting(mode: str) -> Iterator[None]:
    """Torch's mode for operations that make the host wait: ``"error"`` or ``"warn"``. Nothing waits for a CPU."""
    if ON_CUDA:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        if ON_CUDA:
            torch.cuda.set_sync_debug_mode("default")


def plain_loop() -> dict[str, Any]:
    """Whole steps of MuonClip; the first that waits raises an error."""
    model = gpt().to(device())
    optimizer = MuonClip(model, threshold=THRESHOLD)
    tokens = torch.randint(VOCABULARY, (4, 129), device=device())

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device().type, torch.bfloat16):
            loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()

    for _ in range(WARM_UP):
        step()
    with on_waiting("error"):
        for _ in range(WATCHED):
            step()
    return {"waits": 0}


class Lit(pl.LightningModule):
    """As a user writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = gpt()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss."""
        return loss_of(self.model, batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, whose hidden matrices the callback gives to Muon."""
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Watch(pl.Callback):
    """Watches all steps after the warm-up."""

    def __init__(self) -> None:
        self.watching = contextlib.ExitStack()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts to watch."""
        if batch_idx == WARM_UP:
            self.watching.enter_context(on_waiting("warn"))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning may wait afterwards."""
        self.watching.close()


def under_the_callback(precision: str) -> dict[str, Any]:
    """How often each line made the host wait, by whose it is: the innermost one outside of torch."""
    waits: dict[str, Counter[str]] = {"ours": Counter(), "others": Counter()}

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchroniz" not in str(message):
            return
        frames = [
            f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename and "warnings" not in f.filename
        ]
        path = Path(frames[-1].filename)
        waits["ours" if PACKAGE in path.parents else "others"][
            f"{path.parent.name}/{path.name}:{frames[-1].lineno}"
        ] += 1

    data = DataLoader(TensorDataset(torch.randint(VOCABULARY, (4 * (WARM_UP + WATCHED), 129))), batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        trainer = pl.Trainer(
            max_steps=WARM_UP + WATCHED,
            accelerator="gpu" if ON_CUDA else "cpu",
            devices=1,
            precision=precision,  # type: ignore[arg-type]
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[MuonClipCallback(threshold=THRESHOLD), Watch()],
        )
        trainer.fit(Lit(), data)
    return {"steps": WATCHED} | waits | ({"failed": "a step of ours waits"} if waits["ours"] else {})


def replayed(step: Callable[[], Any], times: int) -> None:
    """Runs a step as often: once by itself, and the others from a graph. A CPU has no graphs."""
    if not ON_CUDA:
        for _ in range(times):
            step()
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(times - 1):
        graph.replay()


def compare_replayed(make: Callable[[], tuple[list[Tensor], Callable[[], Any]]]) -> dict[str, Any]:
    """The same weights after three steps, with and without a graph, up to the order of sums in bfloat16.

    Args:
        make: Returns weights, the same at every call, and a step that changes them.
    """
    (weights, step), (expected, twin) = make(), make()
    before = [w.detach().clone() for w in weights]
    replayed(step, 3)
    for _ in range(3):
        twin()
    changes = torch.stack([(e - b).norm() for e, b in zip(expected, before)])
    errors = torch.stack([(w - e).norm() for w, e in zip(weights, expected)])
    worst = float((errors / changes.clamp_min(1e-12)).max())
    return {"error over change": worst} | ({} if worst < 1e-2 and changes.any() else {"failed": "a replay is no step"})


def clips() -> tuple[list[Tensor], Callable[[], Any]]:
    """QK-Clip with every head at twice the threshold."""
    model = gpt().to(device())
    clip = QKClip(model, threshold=THRESHOLD)
    maxima = torch.full((LAYERS, HEADS), 2 * THRESHOLD, device=device())
    weights = [w.data for layer in model.layers for w in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight)]
    return weights, lambda: clip.step(maxima)


def muon_steps() -> tuple[list[Tensor], Callable[[], Any]]:
    """Muon on the hidden matrices of the model."""
    [group] = [group for group in split_params(gpt().to(device())) if group["name"] == "muon"]
    weights = [p for _, p in group["params"]]
    for p in weights:
        p.grad = torch.randn_like(p)
    optimizer = Muon([group], lr=torch.tensor(1e-2, device=device()))
    return [p.data for p in weights], optimizer.step


def main() -> int:
    """All cases, each saved as soon as it is there."""
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "plain loop": plain_loop,
        "graph of QK-Clip": lambda: compare_replayed(clips),
        "graph of Muon": lambda: compare_replayed(muon_steps),
    } | {f"callback, {own}": functools.partial(under_the_callback, own) for own in PRECISIONS}
    if not ON_CUDA:
        print("skipped without CUDA: waits are not counted, and nothing is captured")
    results = {}
    for name, case in cases.items():
        results[name] = attempt(case)
        print(f"{name:24} {results[name]}", flush=True)
        save("gpu_sync", results=results)
    return exit_status(results)


if __name__ == "__main__":
    raise SystemExit(main())
