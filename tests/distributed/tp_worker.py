"""Trains tiny models under tensor parallelism and FSDP2 in several CPU processes; every rank returns its results."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from helpers import VOCAB, LitTiny, loader, token_batches, trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from lightning_muonclip import (
    Attention,
    AttentionSpec,
    MultiheadLatentAttention,
    MuonClipCallback,
    Projection,
    QKClip,
)
from lightning_muonclip.attention.score_mods import Alibi, RelativeBias
from lightning_muonclip.experiment.gpt import GPT
from lightning_muonclip.experiment.lit import LitGPT, _tensor_parallel_plan
from lightning_muonclip.parallel.shards import local_box, to_local

BATCHES, BATCH = 10, 4
ATTENTION = "model.layers.0.self_attn"


class Case(NamedTuple):
    """One training run."""

    make: Callable[[], pl.LightningModule]
    options: dict[str, Any]
    clip: float | None = 0.3


class LitLlama(LitTiny):
    """Hugging Face's model, parallelized as a user would."""

    def configure_model(self) -> None:
        if self.device_mesh is None:
            return
        data, tensor = self.device_mesh["data_parallel"], self.device_mesh["tensor_parallel"]
        columns = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
        for layer in self.model.model.layers:
            if tensor.size() > 1:
                parallelize_module(layer.self_attn, tensor, {**columns, "o_proj": RowwiseParallel()})
            fully_shard(layer, mesh=data)
        fully_shard(self.model, mesh=data)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[0]).loss


def llama() -> LitLlama:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    enlarge(model)
    return LitLlama(model, partial(torch.optim.AdamW, lr=3e-3))


def gpt(attention: Callable[..., nn.Module], tied: bool = False, base: int | None = None) -> LitGPT:
    torch.manual_seed(0)
    make = partial(GPT, attention, vocab_size=VOCAB, num_hidden_layers=1, intermediate_size=32, mlp="swiglu")
    model = make(hidden_size=16)
    if tied:
        model.lm_head.weight = model.embed_tokens.weight
    lit = LitGPT(model, partial(torch.optim.AdamW, lr=3e-3), base=None if base is None else make(hidden_size=base))
    enlarge(model)
    return lit


def enlarge(model: nn.Module) -> None:
    """Lets logits pass a threshold of 1."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "q_b_proj", "kv_b_proj")):
                param.mul_(40)


LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 6}
MHA = partial(Attention, num_attention_heads=2)
GQA = partial(Attention, num_attention_heads=4, num_key_value_heads=2)
MLA = partial(MultiheadLatentAttention, num_attention_heads=2, **LATENT)


def biased(hidden_size: int) -> Attention:
    """Parts other than the projections that differ between heads."""
    score_mod = RelativeBias(4, num_buckets=4, max_distance=6)
    nn.init.normal_(score_mod.relative_attention_bias.weight)
    return Attention(hidden_size, 4, 2, sinks=True, sliding_window=5, score_mod=score_mod)


CASES: dict[str, Case] = {
    # Lightning cannot clip the gradient norm of biases together with norms, which are on different meshes.
    "mha, biases, tied embeddings": Case(partial(gpt, partial(MHA, attention_bias=True), tied=True), {}, clip=None),
    "gqa": Case(partial(gpt, GQA), {"shared_keys": "query"}),
    "gqa in muP": Case(partial(gpt, GQA, base=8), {"shared_keys": "query"}),
    "gains": Case(partial(gpt, partial(GQA, qk_norm=True)), {"qk_norm": "gain"}),
    "mla, low-rank queries": Case(partial(gpt, partial(MLA, q_lora_rank=8)), {}),
    "mla, soft-cap, sinks, ALiBi": Case(partial(gpt, partial(MLA, softcap=9.0, sinks=True, score_mod=Alibi(2))), {}),
    "window, sinks, learned bias": Case(partial(gpt, biased), {}),
    "llama": Case(llama, {"shared_keys": "group"}),
}
#: By number of ranks, the data-parallel and tensor-parallel sizes and the cases to run.
RUNS = {
    2: ((1, 2), ("mha, biases, tied embeddings", "gqa", "gains", "mla, soft-cap, sinks, ALiBi", "llama")),
    4: ((2, 2), ("window, sinks, learned bias", "gqa in muP", "mla, low-rank queries", "llama")),
}


def train_case(name: str, **kwargs: Any) -> tuple[pl.LightningModule, MuonClipCallback]:
    case = CASES[name]
    lit = case.make().double()  # Newton-Schulz magnifies rounding
    callback = MuonClipCallback(threshold=1.0, dtype=torch.float64, **case.options)
    train(lit, [callback], gradient_clip_val=case.clip, **kwargs)
    return lit, callback


def train(
    lit: pl.LightningModule, callbacks: list[pl.Callback], shard: int = 0, shards: int = 1, **kwargs: Any
) -> None:
    """Ten steps on one shard of the data."""
    tokens = token_batches(BATCHES, batch_size=BATCH).chunk(shards, 1)[shard]
    data = loader(tokens)
    if isinstance(lit, LitGPT):
        tokens = tokens.flatten(0, 1)
        data = DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=BATCH // shards)
    trainer(callbacks, use_distributed_sampler=False, **kwargs).fit(lit, data)


def whole(param: Tensor) -> Tensor:
    return (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()


def parallel(data: int, tensor: int) -> dict[str, Any]:
    return {"strategy": ModelParallelStrategy(data, tensor), "devices": data * tensor}


def trained(name: str, rank: int, data: int, tensor: int) -> dict[str, Any]:
    lit, callback = train_case(name, shard=rank // tensor, shards=data, **parallel(data, tensor))
    assert callback.qk_clip is not None and callback.last is not None
    return {
        "weights": {n: whole(p) for n, p in lit.named_parameters()},
        "max_logits": callback.last.max_logits,
        "clips": callback.qk_clip.clips,
    }


class Overflow(pl.Callback):
    """Puts an infinity into one rank's part of a gradient in some steps, and notes whether weights move in each."""

    def __init__(self, rank: int, steps: dict[int, str], value: float = torch.inf) -> None:
        self.rank, self.steps, self.value = rank, steps, value
        self.moved: list[set[bool]] = []

    def on_after_backward(self, fit: pl.Trainer, lit: pl.LightningModule) -> None:
        name = self.steps.get(fit.global_step)
        if name is not None and fit.global_rank == self.rank:
            to_local(lit.get_parameter(name).grad).view(-1)[0] = self.value

    def on_train_batch_start(self, fit: pl.Trainer, lit: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.before = [to_local(p).detach().clone() for p in lit.parameters()]

    def on_train_batch_end(self, fit: pl.Trainer, lit: pl.LightningModule, *_: Any) -> None:
        self.moved.append({not torch.equal(to_local(p), before) for p, before in zip(lit.parameters(), self.before)})


def overflowing(data: int, tensor: int, rank: int, value: float) -> list[set[bool]]:
    """Whether weights moved in every step; of the second and the fifth the gradients are not all finite."""
    watch = Overflow(1, {1: f"{ATTENTION}.q_proj.weight", 4: f"{ATTENTION}.k_proj.bias"}, value)
    scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))
    lit = gpt(partial(MHA, attention_bias=True))
    callbacks = [watch, MuonClipCallback(threshold=1.0)]
    train(lit, callbacks, rank // tensor, data, limit_train_batches=6, plugins=[scaler], **parallel(data, tensor))
    return watch.moved


def observed(mesh: DeviceMesh | None, compiled: bool) -> dict[str, Tensor]:
    """What QK-Clip sees in modules that are used without Lightning."""
    found = {}
    for name, make in {"gqa": GQA, "mla": MLA}.items():
        torch.manual_seed(0)
        module = make(hidden_size=16)
        if mesh is not None:
            parallelize_module(module, mesh, _tensor_parallel_plan(module))
        torch._dynamo.reset()
        forward = torch.compile(module, backend="eager", fullgraph=True) if compiled else module
        with QKClip(module, threshold=0.01) as qk_clip:
            for step in range(2):
                with torch._dynamo.config.patch(error_on_recompile=step > 0):
                    forward(torch.randn(2, 9, 16)).sum().backward()
                found[name] = qk_clip.step().max_logits
    return found


def refusals(mesh: DeviceMesh) -> list[str]:
    """The errors for heads that cannot be sharded and for a spec with too many heads."""
    too_many = AttentionSpec((Projection("q_proj", "q(H d)"), Projection("k_proj", "k(H d)")), 8, sizes={"d": 2})
    attentions = [Attention(16, 1), Attention(16, 4, num_key_value_heads=1), Attention(16, 2)]
    messages = []
    for module, specs in zip(attentions, [None, None, {"": too_many}]):
        parallelize_module(module, mesh, _tensor_parallel_plan(module))
        try:
            with QKClip(module, specs=specs):
                module(torch.randn(2, 9, 16))
        except ValueError as error:
            messages.append(str(error))
    return messages


def scaled(shard: Callable[[nn.Module], None]) -> tuple[dict[str, tuple[Tensor, list[list[int]]]], int]:
    """This rank's shards of three heads of six channels after a clip, where they lie, and the number of collectives."""
    torch.manual_seed(0)
    module = Attention(12, 3, head_dim=6, attention_bias=True, qk_norm=True)
    d = {"d": 6}
    queries, keys = Projection("q_proj", "q(H d)"), Projection("k_proj", "k(H d)")
    gains = (Projection("q_norm", "q(d)", offset=1.0), Projection("k_norm", "k(d)"))
    shard(module)
    talk, weights = 0, {}
    for spec in (AttentionSpec((queries, keys), 3, sizes=d), AttentionSpec((queries, keys), 3, sizes=d, gains=gains)):
        with QKClip(module, 1.0, 0.3, specs={"": spec}, qk_norm="gain", logits="off") as qk_clip:
            with CommDebugMode() as comm:
                qk_clip.step([[2.0, 0.5, 7.0]])
            talk += comm.get_total_counts()
    # Not full_tensor(): that of torch 2.9 puts parts of different sizes in the wrong places.
    for name, param in module.named_parameters():
        weights[name] = to_local(param).detach().clone(), [[side.start, side.stop] for side in local_box(param)]
    return weights, talk


def by_tensor_and_data(module: nn.Module, mesh: DeviceMesh) -> None:
    """Of two dimensions, both over the rows, and heads that straddle ranks."""
    parallelize_module(module, mesh["tensor"], {"q_proj": ColwiseParallel(), "k_proj": RowwiseParallel()})
    fully_shard(module, mesh=mesh["data"])


def by_column(module: nn.Module, mesh: DeviceMesh) -> None:
    parallelize_module(module, mesh["tensor"], {"q_proj": RowwiseParallel(), "k_proj": RowwiseParallel()})


def every_case(ranks: int) -> dict[str, Any]:
    rank = int(os.environ["RANK"])
    mesh, names = RUNS[ranks]
    found: dict[str, Any] = {name: trained(name, rank, *mesh) for name in names}
    if ranks == 2:
        mesh = init_device_mesh("cpu", (2,))
        found["overflow"] = [overflowing(1, 2, rank, torch.inf), overflowing(2, 1, rank, torch.nan)]
        found["observed"] = [observed(mesh, compiled=False), observed(mesh, compiled=True)]
        found["refusals"] = refusals(mesh)
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        flat = init_device_mesh("cpu", (4,))
        found["scaled"] = {
            "fully_shard": scaled(lambda module: fully_shard(module, mesh=flat)),
            "both": scaled(partial(by_tensor_and_data, mesh=mesh)),
            "by column": scaled(partial(by_column, mesh=mesh)),
        }
    return found
