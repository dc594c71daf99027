"""QK-Clip beside DeepSpeed, by a stand-in of its public functions over float32 masters that lie on several ranks."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import next_token_loss, tiny_gpt, token_batches
from processes import on_ranks
from torch import Tensor, nn

from lightning_muonclip import QKClip
from lightning_muonclip.deepspeed import step_under_zero


class Zero:
    """SGD on float32 masters of bfloat16 weights, of which every rank has a part, as DeepSpeed's stages 1 and 2."""

    def __init__(self, model: nn.Module) -> None:
        self.params = list(model.parameters())
        rank, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.flat = torch.cat([param.detach().float().flatten() for param in self.params])
        self.part = slice(rank * len(self.flat) // count, (rank + 1) * len(self.flat) // count)
        self.flat[: self.part.start], self.flat[self.part.stop :] = 0, 0
        offsets = torch.tensor([0, *(param.numel() for param in self.params)]).cumsum(0).tolist()
        self.places = {param: slice(*ends) for param, ends in zip(self.params, pairwise(offsets))}

    def get(self, param: Tensor) -> Tensor:
        whole = self.flat[self.places[param]].clone()
        if dist.is_initialized():
            dist.all_reduce(whole)
        return whole.view_as(param)

    def set(self, param: Tensor, value: Tensor) -> None:
        new = torch.zeros_like(self.flat)
        new[self.places[param]] = value.flatten()
        own = torch.zeros_like(self.flat, dtype=torch.bool)
        own[self.places[param]] = True
        own[: self.part.start], own[self.part.stop :] = False, False
        self.flat = torch.where(own, new, self.flat)

    @torch.no_grad()
    def step(self) -> None:
        for param in self.params:
            assert param.grad is not None
            self.set(param, self.get(param) - 0.1 * param.grad.float())
        for param in self.params:
            param.copy_(self.get(param))
            param.grad = None


def _train(steps: int = 3) -> list[Tensor]:
    torch.manual_seed(0)
    model = tiny_gpt().bfloat16()
    zero = Zero(model)
    utils: Any = ModuleType("deepspeed.utils")
    utils.safe_get_full_fp32_param, utils.safe_set_full_fp32_param = zero.get, zero.set
    with pytest.MonkeyPatch.context() as patch, QKClip(model, threshold=0.05) as qk_clip:
        for module in (ModuleType("deepspeed"), utils):
            patch.setitem(sys.modules, module.__name__, module)
        clipped = 0
        for tokens in token_batches(steps):
            next_token_loss(model, tokens).backward()
            zero.step()
            before = {param: zero.get(param) for param in zero.params}
            result = step_under_zero(qk_clip)
            clipped += int(result.clipped_heads)
            expected = [before[param] for param in qk_clip.params]
            qk_clip.scale_copies(expected, result)
            for param, master in before.items():
                assert torch.equal(zero.get(param), master)
                assert torch.equal(param, master.bfloat16())  # what the next step of DeepSpeed would write
        assert clipped
    return [zero.get(param).clone() for param in zero.params]


def _on_rank() -> list[Tensor]:
    return _train()


def test_masters_follow_the_clips() -> None:
    alone = _train()
    for rank in on_ranks(2, _on_rank):
        assert all(map(torch.equal, alone, rank))


def test_partitioned_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed.utils", _functions(None))
    model = tiny_gpt()
    with QKClip(model, threshold=0.05) as qk_clip:
        next_token_loss(model, token_batches(1)[0]).backward()
        with pytest.raises(ValueError, match="no float32 masters"):
            step_under_zero(qk_clip)
        for param in model.parameters():
            param.ds_id = 0  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="ZeRO stage 3"):
            step_under_zero(qk_clip)


def test_copies_must_be_those_of_the_weights() -> None:
    model = tiny_gpt()
    with QKClip(model, threshold=0.05) as qk_clip:
        model(token_batches(1)[0])
        result = qk_clip.step()
        with pytest.raises(ValueError, match="give one of every tensor in params"):
            qk_clip.scale_copies([torch.ones(3)], result)


def _functions(value: Any) -> Any:
    utils: Any = ModuleType("deepspeed.utils")
    utils.safe_get_full_fp32_param = lambda param: value
    utils.safe_set_full_fp32_param = lambda param, value: None
    return utils
