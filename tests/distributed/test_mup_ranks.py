"""A model in muP that is sharded or replicated before its first forward, against the same on one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import token_batches
from processes import on_ranks
from test_mup_forward import LM, NAMES, Divided, Heads, Scale, Uncalled, number
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_muonclip import mup

TOKENS = token_batches(1)[0]


def wrapped(model: Any, how: str) -> nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model)
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def attention(how: str) -> Any:
    found: dict[str, Any] = {}
    for cls, name in ((Scale, "scale"), (Divided, "norm_factor")):
        torch.manual_seed(0)
        model = LM(64, cls)
        mup.parametrize(model, LM(16, cls))
        outputs = wrapped(model, how)(TOKENS)
        outputs.sum().backward()
        found[name] = number(model.layers[1], name), outputs.detach()
    refused = LM(64, Heads)
    mup.parametrize(refused, LM(16, Heads))
    with pytest.raises(ValueError, match="have 32 channels, but 8 in the base"):
        wrapped(refused, how)(TOKENS)
    return found


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_attention_is_scaled_alike_on_all_ranks(how: str) -> None:
    for found in on_ranks(2, attention, how):
        for cls, name, wanted in ((Scale, "scale", 8**-0.5 / 4), (Divided, "norm_factor", 8**0.5 * 4)):
            torch.manual_seed(0)
            model = LM(64, cls)
            mup.parametrize(model, LM(16, cls))
            torch.testing.assert_close(found[name], (wanted, model(TOKENS).detach()))


def heads(how: str) -> list[str]:
    messages = []
    for kind in NAMES:
        model = Uncalled(64, F.linear, kind)
        scaled = mup.parametrize(model, Uncalled(16, F.linear, kind))
        parallel = wrapped(model, how)
        with pytest.raises(ValueError, match="output head") as error:
            parallel(TOKENS)
        messages.append(str(error.value))
        model.factor = scaled.multiplier(NAMES[kind])
        parallel(TOKENS).sum().backward()
    return messages


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_a_head_that_is_not_called_is_refused_on_all_ranks(how: str) -> None:
    for messages in on_ranks(2, heads, how):
        assert all(name in message for name, message in zip(NAMES.values(), messages, strict=True))
