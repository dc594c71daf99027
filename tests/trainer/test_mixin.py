"""MaxLogitsMixin without the callback: under a Trainer, and outside of one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from oracles import Residual, SdpaAttention, enlarge, module_max_logits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_muonclip import Attention, MaxLogitsMixin, MuonClipCallback

TORCHS_OWN = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _torch_is_left_as_it_was() -> Iterator[None]:
    yield
    assert F.scaled_dot_product_attention is TORCHS_OWN


class Lit(MaxLogitsMixin):
    """One layer of attention, trained towards zero; keeps what it and its callbacks see."""

    def __init__(self, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.attention = attention or Attention(16, 4, num_key_value_heads=2)
        enlarge(self.attention)
        self.in_training_step: list[Tensor] = []
        self.at_batch_end: list[Tensor] = []
        self.expected: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.expected.append(self.brute_force(batch))
        loss = self.attention(batch).square().mean()
        self.in_training_step.append(self.max_logits)
        return loss

    def brute_force(self, batch: Tensor) -> Tensor:
        if isinstance(self.attention, SdpaAttention):
            return self.attention.max_logits(batch)
        return module_max_logits(self.attention, batch)

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        self.at_batch_end.append(self.max_logits)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.attention(1000 * batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def fit(module: Lit, batches: int = 3, **options: Any) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    data = torch.randn(2 * batches, 9, 16)
    trainer.fit(module, DataLoader(data, batch_size=2), DataLoader(data[:2], batch_size=2))


def check(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a[0].double(), b, rtol=1e-5, atol=0)


@pytest.mark.parametrize("make", [lambda: None, lambda: SdpaAttention(16, 4, 2)], ids=["ours", "third party"])
def test_every_step_has_its_own_maxima(make: Any) -> None:
    module = Lit(make())
    fit(module)
    assert len(module.expected) == 3
    check(module.in_training_step, module.expected)
    check(module.at_batch_end, module.expected)
    assert module.max_logits_layers == ["attention"]
    module.stop_observing()


def test_a_step_of_two_batches_has_the_maxima_of_both() -> None:
    module = Lit()
    fit(module, batches=6, accumulate_grad_batches=2)
    assert len(module.expected) == 6
    pairs = [torch.maximum(*module.expected[i : i + 2]) for i in (0, 2, 4)]
    seen = [value for first, both in zip(module.expected[::2], pairs) for value in (first, both)]
    check(module.in_training_step, seen)
    check(module.at_batch_end, seen)
    assert any((both > first).any() for first, both in zip(module.expected[::2], pairs))


def test_validation_is_not_seen() -> None:
    module = Lit()
    fit(module, val_check_interval=1)
    check(module.at_batch_end, module.expected)
    check([module.max_logits], module.expected[-1:])


def test_fitting_again_goes_on() -> None:
    module = Lit()
    for _ in range(2):
        fit(module)
    assert len(module.expected) == 6
    check(module.in_training_step, module.expected)
    check(module.at_batch_end, module.expected)


def test_fitting_again_with_another_callback_goes_on() -> None:
    module = Lit()
    for i in range(2):
        callback = MuonClipCallback(threshold=1e-3)
        fit(module, callbacks=[callback])
        assert callback.qk_clip is not None and (callback.qk_clip.clips > 0).all()
        assert len(module.expected) == 3 * (i + 1)
    check(module.in_training_step, module.expected)
    check(module.at_batch_end, module.expected)


def test_values_are_not_those_of_a_later_step() -> None:
    module = Lit()
    fit(module)
    assert not torch.equal(module.in_training_step[0], module.in_training_step[1])
    assert module.in_training_step[0].data_ptr() != module.in_training_step[1].data_ptr()


def test_outside_of_a_trainer_observation_starts_by_hand() -> None:
    module = Lit()
    x, y = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    module.attention(x)
    observer = module.observe()
    assert module.observe() is observer
    assert module.max_logits.isneginf().all()
    module.attention(x)
    check([module.max_logits], [module.brute_force(x)])
    observer.ledger.close_step()
    check([module.max_logits], [module.brute_force(x)])
    module.attention(y)
    check([module.max_logits], [module.brute_force(y)])
    module.stop_observing()
    assert module.attention.max_logits_recorder is None
    module.stop_observing()


def test_attention_that_is_to_be_left_alone_is_told_by_an_attribute() -> None:
    class Unknown(Lit):
        attention_specs = {"strange": None}  # noqa: RUF012

    x = torch.randn(2, 9, 16)
    module = Unknown()
    module.strange = SdpaAttention(16, 4)
    module.observe()
    module.strange(module.attention(x))
    assert module.max_logits_layers == ["attention"]
    module.stop_observing()
    plain = Lit()
    plain.strange = SdpaAttention(16, 4)
    plain.observe()
    plain.strange(plain.attention(x))
    assert plain.max_logits_layers == ["attention", "strange"]
    assert plain.max_logits.isfinite().all()
    plain.stop_observing()


def test_maxima_are_in_no_checkpoint_and_a_copy_stands_alone() -> None:
    module = Lit(Residual(SdpaAttention(16, 4), Attention(16, 4)))
    names = set(module.state_dict())
    module.observe()
    assert set(module.state_dict()) == names
    twin = copy.deepcopy(module)
    twin.observe()
    twin.attention(torch.randn(2, 9, 16))
    assert module.max_logits.isneginf().all()
    assert twin.max_logits.isfinite().all()
    twin.stop_observing()
    module.attention(torch.randn(2, 9, 16))
    assert module.max_logits.isfinite().all()
    module.stop_observing()
