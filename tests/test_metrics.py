"""MaxLogits against a loop, in several processes, and its plots."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_muonclip import MaxLogits

mpl.use("Agg")

INF = float("inf")


def steps(count: int = 5, layers: int = 2, heads: int = 3) -> Tensor:
    values = 100 * torch.randn(count, layers, heads)
    values[:, 1, 2] = -INF  # a layer with fewer heads
    return values


def largest(values: Tensor) -> list[list[float]]:
    _, layers, heads = values.shape
    return [[max(step[layer][head] for step in values.tolist()) for head in range(heads)] for layer in range(layers)]


def test_keeps_the_maximum_of_every_head() -> None:
    metric, values = MaxLogits(2, 3), steps()
    for value in values:
        metric.update(value)
    assert metric.compute().tolist() == largest(values)
    assert metric.compute().dtype is torch.float32


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_was_seen_at_first_and_after_reset() -> None:
    metric = MaxLogits(2, 3)
    assert metric.compute().tolist() == [[-INF] * 3] * 2
    metric.update(torch.ones(2, 3))
    metric.reset()
    assert metric.compute().tolist() == [[-INF] * 3] * 2


def test_forward_returns_the_value_of_its_own_batch() -> None:
    metric, values = MaxLogits(2, 3), steps()
    for value in values:
        assert torch.equal(metric(value), value)
    assert metric.compute().tolist() == largest(values)


def test_takes_any_dtype_and_keeps_no_graph() -> None:
    metric = MaxLogits(1, 2)
    metric.update(torch.tensor([[1.5, 2.0]], dtype=torch.bfloat16))
    metric.update(torch.tensor([[1.0, 3.0]], dtype=torch.float64, requires_grad=True))
    assert metric.compute().tolist() == [[1.5, 3.0]]
    assert metric.compute().dtype is torch.float32 and not metric.compute().requires_grad


@pytest.mark.parametrize("shape", [(3,), (3, 2), (1, 3), (2, 4), (1, 2, 3), ()])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    metric = MaxLogits(2, 3)
    with pytest.raises(ValueError, match=r"must have shape \(2, 3\) \(layers, heads\), got") as error:
        metric.update(torch.zeros(shape))
    assert str(shape) in str(error.value)
    assert metric.maxima.isneginf().all()


def test_the_state_is_in_no_checkpoint_but_pickles_with_the_metric() -> None:
    metric = MaxLogits(2, 3, threshold=100.0)
    metric.update(torch.ones(2, 3))
    assert metric.state_dict() == {}
    twin = pickle.loads(pickle.dumps(metric))
    assert torch.equal(twin.compute(), torch.ones(2, 3)) and twin.threshold == 100.0


def one_rank(rank: int, directory: Path) -> None:
    store = dist.FileStore(str(directory / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.set_num_threads(1)
    values = torch.load(directory / "values.pt", weights_only=True)
    metric = MaxLogits(2, 3)
    for value in values[rank::2]:
        metric.update(value)
    torch.save((metric.compute(), metric.maxima), directory / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes")
def test_processes_agree_on_the_maximum_over_all(tmp_path: Path) -> None:
    values = steps()
    torch.save(values, tmp_path / "values.pt")
    mp.start_processes(one_rank, (tmp_path,), nprocs=2, start_method="fork")
    for rank in range(2):
        computed, own = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert computed.tolist() == largest(values)
        assert own.tolist() == largest(values[rank::2])
        assert not torch.equal(own, computed)


# Pictures


def texts(axes: Axes) -> list[tuple[Any, ...]]:
    return [(text.get_text(), *text.get_position()) for text in axes.texts]


def test_one_value_is_a_heat_map_that_marks_clipped_heads(tmp_path: Path) -> None:
    values = torch.tensor([[120.0, 99.0, -5.0], [100.0, 101.0, -INF]])
    metric = MaxLogits(2, 3, threshold=100.0)
    metric.update(values)
    figure, axes = metric.plot()
    assert isinstance(figure, Figure) and axes.figure is figure
    (image,) = axes.images
    shown = image.get_array().filled(torch.nan)
    assert torch.equal(torch.tensor(shown).nan_to_num(nan=-1.0), values.where(values.isfinite(), -1.0))
    assert texts(axes) == [("clipped", 0, 0), ("clipped", 1, 1)]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")
    figure.savefig(tmp_path / "heat.png")
    assert (tmp_path / "heat.png").stat().st_size > 1000


def test_a_logit_that_is_not_finite_is_never_clipped() -> None:
    _, axes = MaxLogits(1, 2, threshold=100.0).plot(torch.tensor([[INF, 200.0]]))
    assert texts(axes) == [("clipped", 1, 0)]


def test_without_a_threshold_no_head_is_marked() -> None:
    _, axes = MaxLogits(1, 2).plot(torch.tensor([[50.0, 200.0]]))
    assert texts(axes) == []


@pytest.mark.parametrize("convert", [lambda x: x, list])
def test_several_values_are_a_trajectory_with_the_threshold(convert: Any, tmp_path: Path) -> None:
    values = steps(count=4)
    figure, axes = MaxLogits(2, 3, threshold=70.0).plot(convert(values))
    *curves, line = axes.lines
    assert isinstance(figure, Figure) and axes.figure is figure
    assert len(curves) == 6
    for i, curve in enumerate(curves):
        expected = values[:, i // 3, i % 3]
        shown = torch.as_tensor(curve.get_ydata()).float()
        assert torch.equal(shown.nan_to_num(nan=-INF), expected)
    assert set(line.get_ydata()) == {70.0} and line.get_linestyle() == "--"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["layer 0", "layer 1", "threshold 70"]
    assert len({curve.get_color() for curve in curves[:3]}) == 1
    assert curves[0].get_color() != curves[3].get_color()
    figure.savefig(tmp_path / "trajectory.png")


def test_without_a_threshold_there_is_no_line() -> None:
    _, axes = MaxLogits(2, 3).plot(steps(count=4))
    assert len(axes.lines) == 6


def test_draws_into_axes_that_are_given() -> None:
    figure = Figure()
    axes = figure.subplots()
    assert MaxLogits(2, 3).plot(steps(count=2), ax=axes) == (figure, axes)
    assert axes.lines


def test_plotting_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-muonclip\[plot\]'"):
        MaxLogits(2, 3).plot(steps(count=2))
