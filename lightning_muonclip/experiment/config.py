"""Typed configuration: the keys of a run, and errors that suggest the nearest key for an unknown one."""

from __future__ import annotations

import difflib
import inspect
import operator
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, fields, make_dataclass
from importlib.resources import files
from typing import Any, Optional

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_muonclip import Attention, MultiheadLatentAttention, MuonClipCallback
from lightning_muonclip.experiment.causal_lm import CausalLM
from lightning_muonclip.experiment.gpt import GPT
from lightning_muonclip.experiment.timm_model import TimmModel

# OmegaConf reads these annotations at run time; on Python 3.10 it does not support X | None.
# ruff: noqa: UP045


def schema_of(cls: type, path: str, given: Collection[str] = (), partial: bool = False) -> type:
    """A dataclass of the arguments of a class, which OmegaConf uses to check a node.

    Args:
        cls: The class.
        path: Its import path.
        given: Arguments that the code passes instead of the config.
        partial: Whether the node creates a factory.
    """
    keys: list[tuple[str, Any, Any]] = [("_target_", str, path)]
    if partial:
        keys.append(("_partial_", bool, True))
    for name, parameter in inspect.signature(cls, eval_str=True).parameters.items():
        if name not in given:
            default = MISSING if parameter.default is parameter.empty else parameter.default
            if isinstance(default, tuple):
                keys.append((name, list[str], field(default_factory=list)))
            else:
                keys.append((name, _scalar_type(parameter.annotation), default))
    return make_dataclass(f"{cls.__name__}Config", keys)


def _scalar_type(annotation: Any) -> Any:
    """The type that OmegaConf checks: scalars and optional scalars; anything else is not checked."""
    for scalar in (bool, int, float, str):
        if annotation in (scalar, scalar | None):
            return scalar if annotation is scalar else Optional[scalar]
    return Any


MuonClipConfig = schema_of(MuonClipCallback, "lightning_muonclip.MuonClipCallback")
AttentionConfig = schema_of(Attention, "lightning_muonclip.Attention", ["hidden_size"], partial=True)
LatentAttentionConfig = schema_of(
    MultiheadLatentAttention, "lightning_muonclip.MultiheadLatentAttention", ["hidden_size"], partial=True
)


CausalLMConfig = schema_of(CausalLM, "lightning_muonclip.experiment.causal_lm.CausalLM")
TimmConfig = schema_of(TimmModel, "lightning_muonclip.experiment.timm_model.TimmModel")


@dataclass
class ModelConfig(schema_of(GPT, "lightning_muonclip.experiment.gpt.GPT")):  # type: ignore[misc]
    """Arguments of :class:`~lightning_muonclip.experiment.gpt.GPT`; ``vocab_size`` comes from the data if it is null."""

    vocab_size: Optional[int] = None
    sliding_window: Optional[list[Optional[int]]] = None


@dataclass
class ScheduleConfig:
    """Learning-rate schedule and compilation of :class:`~lightning_muonclip.experiment.lit.LitNetwork`."""

    _target_: str = "lightning_muonclip.experiment.lit.LitGPT"
    warmup_steps: int = 0
    final_lr: float = 0.1
    compile: bool = False


@dataclass
class ClassifierConfig(ScheduleConfig):
    """The same of :class:`~lightning_muonclip.experiment.lit.LitClassifier`."""

    _target_: str = "lightning_muonclip.experiment.lit.LitClassifier"


@dataclass
class TrainConfig:
    """A run of ``muonclip-train``. Its parts are instantiated from ``_target_``."""

    name: str = "run"
    seed: int = 0
    ckpt_path: Optional[str] = None
    optimized_metric: str = "val/loss"
    data: Any = MISSING
    model: Any = MISSING
    base_hidden_size: Optional[int] = None
    lit: Any = MISSING
    optimizer: Any = MISSING
    muonclip: Optional[MuonClipConfig] = None  # type: ignore[valid-type]
    trainer: Any = MISSING
    logger: Any = None
    callbacks: Any = None


@dataclass
class CoordCheckConfig:
    """A run of ``muonclip-coord-check``; see :func:`~lightning_muonclip.experiment.coord_check.activation_sizes`."""

    seed: int = 0
    widths: list[int] = MISSING
    base_width: int = MISSING
    steps: int = MISSING
    seeds: int = MISSING
    lr: float = MISSING
    muon_lr: float = MISSING
    activations: list[str] = MISSING
    data: Any = MISSING
    model: Any = MISSING


# Arithmetic for configs: ${muonclip.floordiv:${trainer.devices},2}
OmegaConf.register_new_resolver("muonclip.floordiv", operator.floordiv, replace=True)

#: The schemas by config path, innermost first. A node with another ``_target_`` is not checked.
_SCHEMAS: tuple[tuple[str, type], ...] = (
    ("muonclip", MuonClipConfig),
    ("lit", ScheduleConfig),
    ("lit", ClassifierConfig),
    ("model.attention", AttentionConfig),
    ("model.attention", LatentAttentionConfig),
    ("model", ModelConfig),
    ("model", CausalLMConfig),
    ("model", TimmConfig),
)

#: Config groups that only override others and have no key of their own.
_GROUPS = ("experiment", "hparams_search")
#: Config groups without which a run works.
_OPTIONAL = ("logger", "callbacks", *_GROUPS)


class ConfigError(ValueError):
    """A mistake in the configuration, reported in one line."""


def check_config(config: DictConfig, schema: type = TrainConfig) -> None:
    """Checks the names and types of all keys that have a schema.

    Args:
        config: A composed config.
        schema: The schema of the whole config.

    Raises:
        ConfigError: With the full key, and the nearest known key or what is wrong with the value.
    """
    for path, own in _SCHEMAS:
        node = OmegaConf.select(config, path)
        if OmegaConf.is_dict(node) and node.get("_target_") == own._target_:  # type: ignore[attr-defined]
            _check_node(node, own, path)
    _check_node(config, schema, "")
    callbacks = config.get("callbacks")
    if callbacks and "muonclip" in callbacks and callbacks.muonclip is None:
        raise ConfigError(
            "muonclip=null leaves AdamW with MuonClip's learning rate; use optimizer=adamw,"
            " or muonclip.threshold=null to clip nothing"
        )


def _check_node(node: DictConfig, schema: type, path: str) -> None:
    known = [f.name for f in fields(schema)]
    for key in map(str, node):
        if key not in known:
            raise ConfigError(unknown_key(f"{path}.{key}".lstrip("."), known))
    try:
        values = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
        OmegaConf.merge(OmegaConf.structured(schema), values)
    except OmegaConfBaseException as error:
        full_key = f"{path}.{error.full_key or ''!s}".strip(".")
        raise ConfigError(f"{full_key}: {str(error).splitlines()[0]}") from error


def unknown_key(path: str, known: Iterable[str]) -> str:
    """An error message for the unknown key at ``path`` that suggests the nearest known one."""
    parent, _, key = path.rpartition(".")
    known = sorted(name for name in known if not name.startswith("_"))
    if not parent:
        known += _GROUPS
    if not known:
        return f"{path!r} cannot be set: {parent!r} is null in this configuration"
    nearest = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known)}"
    return f"unknown key {path!r}; {hint}"


def check_choices(arguments: Iterable[str]) -> None:
    """Checks that each config group on the command line is given a choice; Hydra only says that null is no string.

    Raises:
        ConfigError: With the choices.
    """
    groups = {each.name: each for each in files("lightning_muonclip.conf").iterdir() if each.is_dir()}
    for argument in arguments:
        match = re.fullmatch(r"\+{0,2}(\w+)=(null|true|false|[-+\d.]*)", argument, re.IGNORECASE)
        if match and match[1] in groups:
            known = sorted(f.name.removesuffix(".yaml") for f in groups[match[1]].iterdir() if f.name.endswith(".yaml"))
            without = f"; ~{match[1]} is a run without" if match[1] in _OPTIONAL else ""
            raise ConfigError(f"{argument} is no choice; known: {', '.join(known)}{without}")
