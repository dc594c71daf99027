"""The figures of Muon's matrices are those of their definitions, on one rank and on two."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import LitTiny, loader, tiny_gpt, token_batches, trainer
from lightning.pytorch.loggers import CSVLogger
from processes import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_muonclip import Attention, Muon, MuonClip, MuonClipCallback
from lightning_muonclip.optim.stats import FIGURES, Stats, stable_ranks, summarized

LR = 0.1
SHAPES = [(8, 6), (6, 10), (4, 6, 5)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients() -> list[Tensor]:
    grads = [draw(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    for grad in grads:
        grad[grad.abs() < 0.3] = 0
    return grads


def muon(params: list[Any], **options: Any) -> Muon:
    groups = [
        {"params": [("a", params[0]), ("b", params[1])], "lr": LR},
        {"params": [("c", params[2])], "kind": "experts", "lr": 2 * LR},
    ]
    parts = {"a": (0, [range(5), range(5, 8)])}
    return Muon(groups, weight_decay=0.0, parts=parts, dtype=torch.float32, track_stats=True, **options)


def plain() -> list[nn.Parameter]:
    return [nn.Parameter(draw(*shape, seed=10 + i)) for i, shape in enumerate(SHAPES)]


def test_figures_are_their_definitions() -> None:
    params = plain()
    optimizer = muon(params, nesterov=False)
    optimizer.set_heads(lambda: {params[0]: (0, [[torch.arange(2), torch.arange(2, 8)], [torch.arange(8)]])})
    before = [p.detach().clone() for p in params]
    for p, grad in zip(params, gradients()):
        p.grad = grad
    optimizer.step()
    stats = optimizer.stats()
    assert list(stats) == ["a", "b", "c"]
    for name, p, w, grad, rate in zip("abc", params, before, gradients(), (LR, LR, 2 * LR)):
        update = (w - p.detach()) / rate
        assert stats[name]["update_rms"] == pytest.approx(float(update.square().mean().sqrt()), rel=1e-4)
        assert stats[name]["update_to_weight"] == pytest.approx(rate * float(update.norm() / w.norm()), rel=1e-4)
        assert stats[name]["zero_gradients"] == pytest.approx(float((grad == 0).float().mean()))
        matrices = {"a": [grad[:5], grad[5:]], "b": [grad], "c": list(grad)}[name]  # the momentum is a multiple
        ranks = [float(m.norm() ** 2 / torch.linalg.matrix_norm(m, 2) ** 2) for m in matrices]
        assert stats[name]["stable_rank"] == pytest.approx(sum(ranks) / len(ranks), rel=0.02)
    heads = torch.stack([gradients()[0][:2].norm(), gradients()[0][2:].norm()])
    assert stats["a"]["head_imbalance"] == pytest.approx(float(heads.max() / heads.mean()), rel=1e-5)
    assert math.isnan(stats["b"]["head_imbalance"])
    means = summarized(stats)
    assert means["head_imbalance"] == stats["a"]["head_imbalance"]
    assert means["update_rms"] == pytest.approx(sum(own["update_rms"] for own in stats.values()) / 3)


@pytest.mark.parametrize("spectrum", [[1.0] * 6, [3.0, 1.0, 0.5, 0.1, 0.0, 0.0], [0.0] * 6])
def test_stable_rank(spectrum: list[float]) -> None:
    values = torch.tensor(spectrum)
    u, v = (torch.linalg.qr(draw(6, 6, seed=i)).Q for i in range(2))
    expected = float(values.square().sum() / values.max() ** 2) if values.any() else 0.0
    for scale in (1e-20, 1.0, 1e20):
        found = stable_ranks((u * values @ v * scale)[None])
        assert float(found) == pytest.approx(expected, rel=1e-3)


def test_what_is_off_is_refused_and_costs_nothing() -> None:
    optimizer = Muon(plain()[:1])
    with pytest.raises(RuntimeError, match="track_stats=True"):
        optimizer.stats()
    optimizer.track_stats = True
    assert optimizer.stats() == {}


def on_a_rank() -> dict[str, Stats]:
    mesh = init_device_mesh("cpu", (2,))

    def stepped(make: Any, **options: Any) -> Stats:
        params = [nn.Parameter(make(p.detach())) for p in plain()]
        optimizer = muon(params, **options)
        for p, grad in zip(params, gradients()):
            p.grad = make(grad)
        optimizer.step()
        return optimizer.stats()

    return {
        "ddp": stepped(lambda x: x),
        "ddp, sharded momentum": stepped(lambda x: x, shard_momentum=True),
        "rows": stepped(lambda x: distribute_tensor(x, mesh, [Shard(0)])),
        "columns": stepped(lambda x: distribute_tensor(x, mesh, [Shard(x.ndim - 1)])),
    }


def test_two_ranks_tell_what_one_does() -> None:
    params = plain()
    optimizer = muon(params)
    for p, grad in zip(params, gradients()):
        p.grad = grad
    optimizer.step()
    whole = optimizer.stats()
    assert not isinstance(params[0], DTensor)
    for results in on_ranks(2, on_a_rank):
        for found in results.values():
            assert found.keys() == whole.keys()
            for name, own in found.items():
                assert own == pytest.approx(whole[name], rel=1e-4, nan_ok=True)


def test_muonclip_knows_the_heads() -> None:
    model = Attention(hidden_size=8, num_attention_heads=2)
    optimizer = MuonClip(model, lr=LR, track_stats=True)
    model(draw(2, 5, 8)).square().mean().backward()
    assert model.q_proj.weight.grad is not None
    model.q_proj.weight.grad[:4] = 0
    optimizer.step()
    stats = optimizer.stats()
    assert stats["q_proj.weight"]["head_imbalance"] == pytest.approx(2.0)
    assert math.isnan(stats["o_proj.weight"]["head_imbalance"])


def test_the_callback_logs_them(tmp_path: Any) -> None:
    callback = MuonClipCallback(log_stats_every_n_steps=2)
    lit = LitTiny(tiny_gpt(), lambda params: torch.optim.AdamW(params, lr=0.01))
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    trainer([callback], logger=logger, max_steps=4, log_every_n_steps=1).fit(lit, loader(token_batches(4)))
    assert callback.last_stats
    rows = [row for row in logger.experiment.metrics if any(key.startswith("muon/") for key in row)]
    rows = rows or read(logger)
    assert {row["step"] for row in rows} == {1, 3}
    assert {f"muon/{figure}" for figure in FIGURES} <= rows[-1].keys()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert float(rows[-1][f"muon/update_rms/{name}"]) > 0


def read(logger: CSVLogger) -> list[dict[str, Any]]:
    import csv

    with open(logger.experiment.metrics_file_path, newline="") as file:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    return [{**row, "step": int(row["step"])} for row in rows if any(key.startswith("muon/") for key in row)]
