"""Optimizer states number their parameters as the model does."""

from __future__ import annotations

import torch
from torch import nn

from lightning_muonclip.trainer.checkpoints import number_as_in_model


def test_a_group_in_another_order_than_the_model_keeps_it() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    params = list(model.parameters())[::-1]
    optimizer, resumed = (torch.optim.SGD(params, momentum=0.9) for _ in range(2))
    model(torch.randn(2, 3)).square().sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    number_as_in_model([state], [optimizer], model, already=False)
    assert state["param_groups"][0]["params"] == [3, 2, 1, 0]
    resumed.load_state_dict(state)
    for param in params:
        assert torch.equal(resumed.state[param]["momentum_buffer"], optimizer.state[param]["momentum_buffer"])
