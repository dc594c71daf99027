"""Whole training steps, and the share of Muon and QK-Clip: the project's GPT and, on a GPU, a plain Hugging Face Llama.

python benchmarks/train_step.py
python benchmarks/train_step.py --warm    # only a step or two of each, which fills the compilers' caches
"""

from __future__ import annotations

import argparse
import functools
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from harness import DRY, attempt, compare, compiler, device, exit_status, save, side_by_side, size_key
from muon_step import transient_memory
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_muonclip import Attention, Muon, MuonClip, split_params
from lightning_muonclip.experiment.gpt import GPT

PEER = "AdamW"
MATCH = "match_rms_adamw"
#: Of a GPU: the blocks are compiled, and run in bfloat16.
IS_COMPILED = size_key() != "cpu"


@dataclass(frozen=True)
class Size:
    """A GPT and its batch."""

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    batch: int
    length: int

    def gpt(self, backend: str = "auto") -> nn.Module:
        """The same weights at every call."""
        torch.manual_seed(0)
        attention = functools.partial(Attention, num_attention_heads=self.heads, backend=backend)
        return GPT(attention, self.vocabulary, self.hidden, self.layers).to(device())

    def llama(self) -> nn.Module:
        """Of about the same cost."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=4 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=self.length,
            use_cache=False,
            attn_implementation="sdpa",
        )
        return LlamaForCausalLM(config).to(device())

    def tokens(self) -> Tensor:
        """A batch with one more token, to be predicted."""
        return torch.randint(self.vocabulary, (self.batch, self.length + 1), device=device())


SIZES = {
    "cpu": {"demo": Size(4, 128, 4, 256, 8, 256), "48_layers": Size(48, 256, 8, 256, 4, 256)},
    "cuda": {"124M": Size(12, 768, 12, 50304, 16, 1024), "350M": Size(24, 1024, 16, 50304, 8, 1024)},
    "dry": {"dry": Size(2, 32, 2, 64, 2, 32)},
}


class TorchMuon:
    """``torch.optim.Muon`` for hidden matrices and AdamW for the rest, in the usual way."""

    def __init__(self, model: nn.Module) -> None:
        hidden, rest = ([p for _, p in group["params"]] for group in split_params(model))
        self.optimizers = [torch.optim.Muon(hidden, adjust_lr_fn=MATCH), AdamW(rest, fused=True)]

    def step(self) -> None:
        """One after the other."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Of all parameters."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()


Make = Callable[[nn.Module], "Optimizer | TorchMuon"]

OPTIMIZERS: dict[str, Make] = {
    PEER: lambda model: AdamW(model.parameters(), fused=True),
    "torch.optim.Muon and AdamW": TorchMuon,
    "Muon and AdamW in one": lambda model: Muon(split_params(model), adjust_lr_fn=MATCH),
    "MuonClip, exact": lambda model: MuonClip(model),
    "MuonClip, lse": lambda model: MuonClip(model, logits="lse"),
}


@dataclass
class Training:
    """Forward, backward and step of a separate model; in bfloat16 on a GPU."""

    model: nn.Module
    make: Make
    tokens: Tensor
    optimizer: Optimizer | TorchMuon = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = self.make(self.model)
        if IS_COMPILED:
            # By block: all of them share a graph, so that compiling takes no longer for a deeper model.
            for layer in getattr(self.model, "model", self.model).layers:
                layer.compile(backend=compiler())

    def __call__(self) -> None:
        """A step."""
        self.optimizer.zero_grad()
        with torch.autocast(device().type, torch.bfloat16, enabled=IS_COMPILED):
            output = self.model(self.tokens[:, :-1])
            logits = getattr(output, "logits", output)
            loss = F.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()


def variants(size: Size) -> dict[str, tuple[Callable[[], nn.Module], Make]]:
    """What makes the model and its optimizer, by name."""
    sdpa = functools.partial(size.gpt, "sdpa")
    if size_key() == "cpu":
        return {name: (sdpa, make) for name, make in OPTIMIZERS.items()}
    # On a GPU, "auto" is FlexAttention, whose kernel returns the maxima; on a CPU, as in a dry run, it is SDPA.
    flex = {f"{name}, flex": (size.gpt, OPTIMIZERS[name]) for name in (PEER, "MuonClip, exact")}
    llama = {f"Llama, {name}": (size.llama, make) for name, make in OPTIMIZERS.items() if " in one" not in name}
    return {name: (sdpa, make) for name, make in OPTIMIZERS.items()} | flex | llama


def ready(size: Size, keep: bool = True) -> tuple[dict[str, Training], dict[str, Any]]:
    """All variants after two steps each, and the errors of those that fail."""
    able, failures = {}, {}
    for name, (model, make) in variants(size).items():

        def start(model: Callable[[], nn.Module] = model, make: Make = make) -> Training:
            training = Training(model(), make, size.tokens())
            training()
            training()
            return training

        began = time.perf_counter()
        result = attempt(start)
        print(f"{name}: ready after {time.perf_counter() - began:.1f} s", flush=True)
        if isinstance(result, Mapping):
            failures[name] = result
        elif keep:
            able[name] = result
        del result
        gc.collect()
    return able, failures


def steps_alone(size: Size) -> dict[str, Callable[[], object]]:
    """The shares of Muon and of QK-Clip in a step, with every head clipped."""
    model = size.gpt()
    [muon] = [group for group in split_params(model) if group["name"] == "muon"]
    for _, p in muon["params"]:
        p.grad = torch.randn_like(p)
    optimizer = Muon([muon], adjust_lr_fn=MATCH)
    clip = MuonClip(size.gpt(), threshold=1e-3).qk_clip
    assert clip is not None
    maxima = torch.full((size.layers, size.heads), 2e-3, device=device())
    return {"Muon.step alone": optimizer.step, "QKClip.step alone": lambda: clip.step(maxima)}


def host_ms(function: Callable[[], object]) -> float:
    """Milliseconds until it returns, whether or not the device is done."""
    if device().type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def optimizers_alone(trainings: Mapping[str, Training], rows: dict[str, dict[str, Any]]) -> None:
    """Adds to the rows of whole steps: their temporaries, and the optimizer's time on the device and on the host."""
    for name, training in trainings.items():
        rows[name]["transient_bytes"] = transient_memory(training)
    alone = side_by_side({name: own.optimizer.step for name, own in trainings.items()}, rounds=5, warm_up=1)
    print("\noptimizers alone")
    for name, row in compare(alone, PEER).items():
        rows[name]["optimizer"] = row | {"host_ms": host_ms(trainings[name].optimizer.step)}
        print(f"{name:32} host {rows[name]['optimizer']['host_ms']:.2f} ms", flush=True)


def measure(name: str, size: Size) -> int:
    """Every optimizer on the same model, taking turns; saves the whole steps before what follows."""
    print(f"\n{name}", flush=True)
    trainings, results = ready(size)
    seconds = side_by_side({**trainings, **steps_alone(size)}, rounds=10, warm_up=1)
    results |= compare(seconds, PEER)
    write = functools.partial(save, f"train_step_{name}", peer=PEER, setting=asdict(size) | {"compiled": IS_COMPILED})
    write(results=results)
    optimizers_alone(trainings, results)
    write(results=results)
    return exit_status(results)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm", action="store_true", help="measure nothing")
    given = parser.parse_args()
    # A graph for every optimizer, size and kind of attention.
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 4096
    if DRY:
        print("skipped without CUDA: FlexAttention, and inductor")
    status = 0
    for name, size in SIZES[size_key()].items():
        status |= exit_status(ready(size, keep=False)[1]) if given.warm else measure(name, size)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
