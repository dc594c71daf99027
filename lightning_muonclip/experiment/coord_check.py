"""``muonclip-coord-check``: checks whether activations keep their size as the width grows, with and without muP."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_muonclip import mup
from lightning_muonclip.experiment.config import CoordCheckConfig, check_config
from lightning_muonclip.experiment.train import build_model, check_width, output_dir, run_command
from lightning_muonclip.optim.muon import Muon
from lightning_muonclip.optim.routing import split_params
from lightning_muonclip.tables import table

#: Mean absolute value of activations: by name, for every width, at every step.
Sizes = dict[str, list[list[float]]]


@dataclass(frozen=True)
class Method:
    """A way to train: the optimizer, whether the model is in muP, and whether muP scales Muon's learning rate."""

    optimizer: Callable[[nn.Module], Optimizer]
    mup: bool = True
    scale_muon: bool = True


def methods(lr: float, muon_lr: float, base_width: int) -> dict[str, Method]:
    """The methods to compare, by name. At the base width, all Muon methods take the same step.

    Args:
        lr: Learning rate of AdamW.
        muon_lr: Learning rate of Muon with ``"spectral_unclamped"``.
        base_width: The width at which these rates were tuned.
    """

    def adamw(model: nn.Module) -> Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=lr)

    def muon(adjust_lr_fn: str, muon_lr: float) -> Callable[[nn.Module], Optimizer]:
        def make(model: nn.Module) -> Optimizer:
            groups = [g | {"lr": muon_lr if g["algorithm"] == "muon" else lr} for g in split_params(model)]
            return Muon(groups, adjust_lr_fn=adjust_lr_fn)

        return make

    spectral = muon("spectral_unclamped", muon_lr)
    rms = muon("match_rms_adamw", muon_lr / (0.2 * base_width**0.5))
    return {
        "AdamW, standard": Method(adamw, mup=False),
        "AdamW, muP": Method(adamw),
        "Muon, standard": Method(rms, mup=False),
        "Muon, muP, spectral": Method(spectral),
        "Muon, muP, RMS": Method(rms),
        "Muon, muP, RMS unscaled": Method(rms, scale_muon=False),
    }


def activation_sizes(
    make: Callable[[int], nn.Module],
    method: Method,
    widths: Sequence[int],
    base_width: int,
    batch: tuple[Tensor, Tensor],
    activations: Sequence[str],
    steps: int,
    seeds: int,
) -> Sizes:
    """Trains a model of every width on one batch and measures mean absolute activations, averaged over seeds.

    The output head is initialized to zero: a random part would shrink with the width and hide what is learned.

    Args:
        make: Creates a model of a given width, with an ``lm_head``.
        method: How to train.
        widths: The widths.
        base_width: The base width of muP.
        batch: Tokens and targets.
        activations: Patterns of the modules whose outputs are measured.
        steps: Number of steps; one more forward follows the last.
        seeds: Number of seeds.
    """
    sizes: Sizes = defaultdict(lambda: [[0.0] * (steps + 1) for _ in widths])
    for i, width in enumerate(widths):
        for seed in range(seeds):
            for name, own in _train(make, method, width, base_width, batch, activations, steps, seed).items():
                sizes[name][i] = [mean + size / seeds for mean, size in zip(sizes[name][i], own)]
    return dict(sizes)


def _train(
    make: Callable[[int], nn.Module],
    method: Method,
    width: int,
    base_width: int,
    batch: tuple[Tensor, Tensor],
    activations: Sequence[str],
    steps: int,
    seed: int,
) -> dict[str, list[float]]:
    torch.manual_seed(seed)
    model, base = make(width), make(base_width)
    for head in (model.lm_head, base.lm_head):
        nn.init.zeros_(head.weight)  # type: ignore[union-attr, arg-type]
    scaled = mup.parametrize(model, base) if method.mup else None
    optimizer = method.optimizer(model)
    if scaled is not None:
        scaled.apply(optimizer)
    if not method.scale_muon:
        for group in optimizer.param_groups:
            group["lr"] /= group["mup"][group["adjust_lr_fn"]] if group["algorithm"] == "muon" else 1.0
    sizes: dict[str, list[float]] = defaultdict(list)
    for name, module in model.named_modules():
        if any(fnmatchcase(name, pattern) for pattern in activations):
            module.register_forward_hook(_recorder(sizes[name]))
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten()).backward()
        optimizer.step()
    with torch.no_grad():
        model(batch[0])
    return sizes


def _recorder(sizes: list[float]) -> Callable[[nn.Module, Any, Tensor], None]:
    def record(module: nn.Module, args: Any, output: Tensor) -> None:
        sizes.append(float(output.detach().abs().mean()))

    return record


def slope(widths: Sequence[int], sizes: Sequence[float]) -> float:
    """The exponent s of the least-squares fit size ~ width^s.

    Example:
        >>> round(slope([64, 128, 256], [1.0, 2.0, 4.0]), 6)
        1.0
    """
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (widths, sizes))
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def slopes_table(widths: Sequence[int], results: Mapping[str, Sizes]) -> str:
    """A table of the slopes after the last step, with a row per method and a column per activation."""
    names = list(next(iter(results.values())))
    rows = [
        [method, *(f"{slope(widths, [steps[-1] for steps in sizes[name]]):+.2f}" for name in names)]
        for method, sizes in results.items()
    ]
    return table([["slope of", *names], *rows], right=range(1, len(names) + 1))


def draw(widths: Sequence[int], results: Mapping[str, Sizes], path: Path) -> None:
    """Plots size against width: a row per method, a column per activation, a curve per step."""
    from matplotlib.figure import Figure

    names = list(next(iter(results.values())))
    figure = Figure(figsize=(2.2 * len(names), 2.0 * len(results)), layout="constrained")
    grid = figure.subplots(len(results), len(names), sharex=True, sharey="col", squeeze=False)
    for row, (method, sizes) in zip(grid, results.items()):
        for axes, name in zip(row, names):
            steps = len(sizes[name][0])
            for step in range(steps):
                shade = str(0.8 * (1 - step / max(1, steps - 1)))
                axes.plot(widths, [own[step] for own in sizes[name]], color=shade, marker=".", lw=1.0)
            axes.set(xscale="log", yscale="log", xticks=list(widths), xticklabels=list(map(str, widths)))
            axes.minorticks_off()
            axes.tick_params(labelsize=7)
        row[0].set_ylabel(method, fontsize=8)
    for axes, name in zip(grid[0], names):
        axes.set_title(name, fontsize=8)
    figure.suptitle("Mean absolute activation against width; later steps are darker", fontsize=9)
    figure.savefig(path, dpi=150)


@hydra.main(version_base="1.3", config_path="pkg://lightning_muonclip.conf", config_name="coord_check")
def _hydra_main(config: DictConfig) -> None:
    check_config(config, CoordCheckConfig)
    check_width(config.model)
    data = instantiate(config.data, _convert_="all")
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))

    def make(width: int) -> nn.Module:
        return build_model(config.model, data, width)

    results = {}
    for name, method in methods(config.lr, config.muon_lr, config.base_width).items():
        results[name] = activation_sizes(
            make, method, config.widths, config.base_width, batch, config.activations, config.steps, config.seeds
        )
    print(slopes_table(config.widths, results))
    draw(config.widths, results, output_dir() / "coord_check.png")
    print(f"Saved {output_dir() / 'coord_check.png'}")


def main() -> None:
    """Entry point."""
    run_command("muonclip-coord-check", _hydra_main)


if __name__ == "__main__":
    main()
