"""``muonclip-train``: a run or a sweep, configured by Hydra."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from torch import nn

from lightning_muonclip.experiment.config import ConfigError, check_choices, check_config, unknown_key
from lightning_muonclip.experiment.finish import ValidateAtEnd
from lightning_muonclip.experiment.interrupt import StopOnInterrupt

#: What a model's config leaves to the data if it is null: an attribute of the data module of that name.
_SIZES_OF_DATA = ("vocab_size", "num_classes", "img_size", "in_chans")


def train(config: DictConfig) -> float:
    """Trains as configured and writes the outputs of the run.

    Args:
        config: A composed ``train`` config.

    Returns:
        The metric named by ``optimized_metric``, for a sweeper; NaN if the run did not log it.

    Raises:
        ConfigError: If the config has an unknown key or a wrong type, or if its corpus or checkpoint cannot be read.
    """
    check_config(config)
    _check_checkpoint(config.ckpt_path)
    pl.seed_everything(config.seed, workers=True)
    data = _build(config.data)
    try:
        lit = _build_module(config, data)
    except (ValueError, OSError, ImportError) as error:  # the corpus is read here
        raise ConfigError(str(error)) from error
    loggers, callbacks = _build_all(config.get("logger")), _build_all(config.get("callbacks"))
    if not loggers:  # without which Lightning refuses it
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    root = config.trainer.get("default_root_dir") or str(output_dir())  # of checkpoints, where nothing else says so
    trainer: pl.Trainer = _build(
        config.trainer, logger=loggers, callbacks=[*callbacks, ValidateAtEnd()], default_root_dir=root
    )
    for logger in trainer.loggers:
        logger.log_hyperparams(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
    trainer.fit(lit, datamodule=data, ckpt_path=config.ckpt_path)
    rank_zero_info(f"Outputs are in {output_dir()}")
    if _is_interrupted(trainer) and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise KeyboardInterrupt  # ends the sweep
    if config.optimized_metric not in trainer.callback_metrics:
        logged = ", ".join(sorted(trainer.callback_metrics))
        rank_zero_warn(
            f"optimized_metric={config.optimized_metric} was not logged, so the run returns NaN; logged: {logged}"
        )
        return float("nan")
    return float(trainer.callback_metrics[config.optimized_metric])


def _build(node: DictConfig, **kwargs: Any) -> Any:
    # Plain lists and dicts: a ListConfig in an optimizer's state cannot be loaded with weights_only.
    return instantiate(node, _convert_="all", **kwargs)


def _check_checkpoint(path: str | None) -> None:
    by_name = path in (None, "best", "last", "hpc") or "://" in str(path)
    if not by_name and not Path(str(path)).exists():
        raise ConfigError(f"ckpt_path={path} does not exist; use the path of a .ckpt file, relative to {Path.cwd()}")


def _is_interrupted(trainer: pl.Trainer) -> bool:
    return any(isinstance(callback, StopOnInterrupt) and callback.interrupted for callback in trainer.callbacks)  # type: ignore[attr-defined]


def _build_all(nodes: DictConfig | None) -> list[Any]:
    return [_build(node) for node in (nodes or {}).values() if node is not None]


def _build_module(config: DictConfig, data: Any) -> pl.LightningModule:
    width = config.get("base_hidden_size")
    if width is not None:
        check_width(config.model)
    parts = {"model": build_model(config.model, data)}
    if width is not None:
        parts["base"] = build_model(config.model, data, width)
    optimizer = _build(config.optimizer)
    try:
        optimizer([torch.nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError) as error:
        options = {name: value for name, value in config.optimizer.items() if not name.startswith("_")}
        raise ConfigError(f"{config.optimizer._target_} takes no such options, {options}: {error}") from error
    lit: pl.LightningModule = _build(config.lit, optimizer=optimizer, **parts)
    return lit


def build_model(node: DictConfig, data: Any, hidden_size: int | None = None) -> nn.Module:
    """The configured model, optionally at another width; sizes that are null are those of the data.

    Raises:
        ConfigError: If the data has no such size.
    """
    sizes = {}
    for size in _SIZES_OF_DATA:
        if size in node and node[size] is None:
            if not hasattr(data, size):
                raise ConfigError(
                    f"{node._target_} needs {size}, which {type(data).__name__} does not have; choose a model for these data"
                    f" (data=digits goes with model=timm, the others with the others), or set model.{size}"
                )
            sizes[size] = getattr(data, size)
    if hidden_size is not None:
        sizes["hidden_size"] = hidden_size
        if node.intermediate_size is not None:
            sizes["intermediate_size"] = node.intermediate_size * hidden_size // node.hidden_size
    model: nn.Module = _build(node, **sizes)
    return model


def check_width(node: DictConfig) -> None:
    """Raises ConfigError if a model cannot be built at another width."""
    if "hidden_size" not in node:
        raise ConfigError(f"{node._target_} has no hidden_size to compare widths by; use model=mha, gqa, mla or moe")


def output_dir() -> Path:
    """The folder of this run."""
    return Path(HydraConfig.get().runtime.output_dir)


@hydra.main(version_base="1.3", config_path="pkg://lightning_muonclip.conf", config_name="train")
def _hydra_main(config: DictConfig) -> float:
    # Lightning starts the other ranks with this same command, so only the first process checks.
    if "LOCAL_RANK" not in os.environ and (output_dir() / "metrics.csv").exists():
        raise ConfigError(
            f"{output_dir()} already contains a run, which would be overwritten; set another hydra.run.dir"
        )
    OmegaConf.save(config, output_dir() / "config.yaml", resolve=True)
    return train(config)


def main() -> None:
    """Entry point."""
    run_command("muonclip-train", _hydra_main)


def run_command(name: str, command: Callable[[], Any]) -> None:
    """Runs a Hydra command; reports a mistake in the configuration in one line, with the nearest known key."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # raise errors instead of printing them
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silence the start and stop messages of the profiler
    for message in ("Experiment logs directory", r".*treespec, LeafSpec"):  # raised in every run
        warnings.filterwarnings("ignore", message)
    try:
        check_choices(sys.argv[1:])
        command()
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted")
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        sys.exit(f"{name}: {explain(error)}")


def explain(error: Exception) -> str:
    """What is wrong with a configuration, with the nearest known key."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        is_absent = isinstance(error.__cause__, ImportError) and "pip install" not in str(error.__cause__)
        return str(error.__cause__) + ("; pip install 'lightning-muonclip[train]'" if is_absent else "")
    if isinstance(error, MissingConfigException) and error.options:
        is_plugin = str(error.missing_cfg_file).startswith("hydra/")
        hint = (
            "; for a plugin, such as hydra/sweeper=optuna: pip install 'lightning-muonclip[sweep]'" if is_plugin else ""
        )
        return f"could not find {error.missing_cfg_file!r}; known: {', '.join(error.options)}{hint}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and cause.parent_node is not None:
            hint = f" (+{cause.full_key}=... adds a new key)"
            return unknown_key(str(cause.full_key), map(str, cause.parent_node)) + hint
        cause = cause.__cause__ or cause.__context__
    return str(error)


if __name__ == "__main__":
    main()
