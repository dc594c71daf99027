"""Typed configuration: the keys of a run, and errors that suggest the nearest key for an unknown one."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Optional

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

# OmegaConf reads these annotations at run time; on Python 3.10 it does not support X | None.
# ruff: noqa: UP045


@dataclass
class MuonClipConfig:
    """Arguments of :class:`~lightning_muonclip.MuonClipCallback`."""

    _target_: str = "lightning_muonclip.MuonClipCallback"
    threshold: Optional[float] = 100.0
    alpha: float = 0.5
    lr: Optional[float] = None
    weight_decay: Optional[float] = None
    momentum: float = 0.95
    nesterov: bool = True
    ns_coefficients: Any = None
    adjust_lr_fn: Optional[str] = "match_rms_adamw"
    shared_keys: str = "query"
    qk_norm: str = "error"
    logits: str = "exact"
    specs: Any = None
    verify: bool = False
    lora: str = "monitor"
    every_n_steps: int = 1
    split: str = "qkv"
    exclude: list[str] = field(default_factory=list)
    include: list[str] = field(default_factory=list)
    log_heads_every_n_steps: Optional[int] = None
    ns_steps: Optional[int] = None
    dtype: Optional[str] = None
    shard_momentum: bool = False


@dataclass
class AttentionConfig:
    """Arguments of :class:`~lightning_muonclip.Attention`; ``hidden_size`` comes from the model."""

    _target_: str = "lightning_muonclip.Attention"
    _partial_: bool = True
    num_attention_heads: int = MISSING
    num_key_value_heads: Optional[int] = None
    head_dim: Optional[int] = None
    attention_bias: bool = False
    qk_norm: bool = False
    rope_theta: Optional[float] = 10000.0
    rms_norm_eps: float = 1e-6
    output_bias: Optional[bool] = None
    rope_scaling: Any = None
    sliding_window: Optional[int] = None
    softcap: Optional[float] = None
    sinks: bool = False
    scaling: Optional[float] = None
    score_mod: Any = None
    backend: str = "auto"


@dataclass
class LatentAttentionConfig:
    """Arguments of :class:`~lightning_muonclip.MultiheadLatentAttention`; ``hidden_size`` comes from the model."""

    _target_: str = "lightning_muonclip.MultiheadLatentAttention"
    _partial_: bool = True
    num_attention_heads: int = MISSING
    kv_lora_rank: int = MISSING
    qk_nope_head_dim: int = MISSING
    qk_rope_head_dim: int = MISSING
    v_head_dim: int = MISSING
    q_lora_rank: Optional[int] = None
    attention_bias: bool = False
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    rope_scaling: Any = None
    sliding_window: Optional[int] = None
    softcap: Optional[float] = None
    sinks: bool = False
    score_mod: Any = None
    backend: str = "auto"


@dataclass
class ModelConfig:
    """Arguments of :class:`~lightning_muonclip.experiment.gpt.GPT`; ``vocab_size`` comes from the data if it is null."""

    _target_: str = "lightning_muonclip.experiment.gpt.GPT"
    attention: Any = MISSING
    vocab_size: Optional[int] = None
    hidden_size: int = 128
    num_hidden_layers: int = 4
    intermediate_size: Optional[int] = None
    mlp: str = "relu2"
    sliding_window: Optional[list[Optional[int]]] = None


@dataclass
class ScheduleConfig:
    """Learning-rate schedule and compilation of :class:`~lightning_muonclip.experiment.lit.LitGPT`."""

    _target_: str = "lightning_muonclip.experiment.lit.LitGPT"
    warmup_steps: int = 0
    final_lr: float = 0.1
    compile: bool = False


@dataclass
class TrainConfig:
    """A run of ``muonclip-train``. Data, optimizer, trainer, loggers and callbacks are instantiated from ``_target_``."""

    name: str = "run"
    seed: int = 0
    ckpt_path: Optional[str] = None
    optimized_metric: str = "val/loss"
    data: Any = MISSING
    model: Any = MISSING
    base_hidden_size: Optional[int] = None
    lit: ScheduleConfig = field(default_factory=ScheduleConfig)
    optimizer: Any = MISSING
    muonclip: Optional[MuonClipConfig] = None
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
    ("model.attention", AttentionConfig),
    ("model.attention", LatentAttentionConfig),
    ("model", ModelConfig),
)

#: Config groups that only override others and have no key of their own.
_GROUPS = ("experiment", "hparams_search")


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
