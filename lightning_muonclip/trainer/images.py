"""Sends pictures to the loggers that take some: TensorBoard, Weights & Biases and MLflow."""

from __future__ import annotations

import importlib.util
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

#: Lightning's loggers that take images; others, such as CSVLogger, get numbers alone.
_TAKE_IMAGES = (TensorBoardLogger, WandbLogger, MLFlowLogger)


def check_images(trainer: pl.Trainer) -> None:
    """Refuses to draw pictures without matplotlib.

    Raises:
        ModuleNotFoundError: If a logger takes images and matplotlib is not installed.
    """
    takers = [type(logger).__name__ for logger in trainer.loggers if isinstance(logger, _TAKE_IMAGES)]
    if takers and importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            f"log_heads_every_n_steps draws pictures for {' and '.join(takers)}, which needs matplotlib:"
            " pip install 'lightning-muonclip[plot]', or set log_heads_every_n_steps=None"
        )


def takes_images(trainer: pl.Trainer) -> bool:
    """Whether one of its loggers does."""
    return any(isinstance(logger, _TAKE_IMAGES) for logger in trainer.loggers)


def log_figure(trainer: pl.Trainer, name: str, figure: Any) -> None:
    """Sends a figure of matplotlib to every logger that takes images; rank zero only.

    Args:
        trainer: Its loggers get the figure, at the step that has just ended.
        name: What they call it.
        figure: The figure.
    """
    takers = [logger for logger in trainer.loggers if isinstance(logger, _TAKE_IMAGES)]
    if not takers or not trainer.is_global_zero:
        return
    pixels, step = _pixels(figure), max(0, trainer.global_step - 1)
    for logger in takers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, pixels, step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [pixels], step=step)
        else:
            logger.experiment.log_image(logger.run_id, pixels, key=name, step=step, synchronous=True)


def _pixels(figure: Any) -> Any:
    """A figure as an array of shape (height, width, 3), uint8."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
