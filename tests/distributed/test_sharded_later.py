"""MuonClip first, then sharded weights take the places of those that it was given, as accelerate does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from processes import on_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from lightning_muonclip import AttentionSpec, Muon, MuonClip, Projection, split_params


def neox() -> nn.Module:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=11,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
    )


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=11, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    )


def shard(model: nn.Module, optimizer: Muon) -> None:
    """Also the linear layers themselves, whose class changes."""
    places = {p: name for name, p in model.named_parameters()}
    for name, module in reversed(list(model.named_modules())):
        if name.endswith(("c_attn", "c_fc", "query_key_value", ".0", ".1")):
            fully_shard(module)
    fully_shard(model)
    now = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [now[places[p]] for p in group["params"]]


def optimizer_of(model: nn.Module, known_by: str, tokens: Tensor) -> Muon:
    settings: dict[str, Any] = {"lr": 0.02, "dtype": torch.float32, "adjust_lr_fn": "original"}
    if known_by != "parts":
        return MuonClip(model, threshold=0.01, **settings, **options(model, known_by, tokens))
    dims = {"c_attn.weight": 1, "query_key_value.weight": 0}
    parts = {
        p: (dims[last], list(torch.arange(48).chunk(3)))
        for name, p in model.named_parameters()
        if (last := ".".join(name.split(".")[-2:])) in dims
    }
    return Muon(split_params(model), parts=parts, **settings)


def options(model: nn.Module, known_by: str, tokens: Tensor) -> dict[str, Any]:
    if known_by == "example":
        return {"example": ((), {"input_ids": tokens})}
    if known_by == "forward":
        return {}
    projection = {
        "c_attn": Projection("c_attn", "[q(H d) | k(H d) | *(H d)]", dim=1),
        "query_key_value": Projection("query_key_value", "(H [q:d, k:d, *:d])"),
    }
    specs = {}
    for name, _ in model.named_modules():
        path, _, last = name.rpartition(".")
        if last in projection:
            specs[path] = AttentionSpec((projection[last],), num_heads=2, sizes={"d": 8})
    return {"specs": specs}


def train(make: Callable[[], nn.Module], known_by: str, is_sharded: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = make().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    tokens = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(1))
    optimizer = optimizer_of(model, known_by, tokens)
    if is_sharded:
        shard(model, optimizer)
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    params = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return {name: p.detach() for name, p in params.items() if p.ndim == 2}


@pytest.mark.parametrize("known_by", ["example", "specs", "forward", "parts"])
@pytest.mark.parametrize("make", [neox, gpt2])
def test_is_what_one_process_computes(make: Callable[[], nn.Module], known_by: str) -> None:
    weights = train(make, known_by, is_sharded=False)
    for rank in on_ranks(2, train, make, known_by, True):
        assert rank.keys() == weights.keys()
        for name, weight in rank.items():
            torch.testing.assert_close(weight, weights[name], rtol=1e-4, atol=2e-5, msg=name)
