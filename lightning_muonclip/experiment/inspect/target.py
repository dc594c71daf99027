"""What is inspected: a model of the application, of a factory, or of a config of Hugging Face."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from lightning_muonclip import MuonClipCallback
from lightning_muonclip.experiment.config import ConfigError, check_choices, check_config
from lightning_muonclip.experiment.inspect.abstract import FAILURES, without_values
from lightning_muonclip.experiment.train import build_model

Example = tuple[Sequence[Any], Mapping[str, Any]]

#: Tokens per step where nothing says how many.
TOKENS = 2**19

#: Where example inputs are from that must work.
GIVEN = "given by the factory"

#: Sequences of example inputs, and their lengths.
_BATCH, _LENGTH = 2, 16


@dataclass(frozen=True)
class Target:
    """A model, and how it is to be trained.

    Attributes:
        title: What it is.
        model: The model.
        example: Its arguments, if they are known.
        inputs: What these are, or why they are unknown.
        options: Of MuonClip, by name.
        strategy: How it is spread over ranks, if the configuration says so.
        ranks: On how many, if it says so.
        tokens: Of all ranks in a step.
        notes: What else is to be said of it.
    """

    title: str
    model: nn.Module
    example: Example | None
    inputs: str
    options: dict[str, Any] = field(default_factory=dict)
    strategy: str | None = None
    ranks: int | None = None
    tokens: int = TOKENS
    notes: tuple[str, ...] = ()


def target_of(name: str | None, overrides: Sequence[str], with_values: bool) -> Target:
    """Builds what the command line names.

    Args:
        name: ``package.module:factory``, the path of a config of Hugging Face, or ``None`` for the application.
        overrides: Of the application's configuration; of other targets, only ``muonclip.*``.
        with_values: Whether weights get values.

    Raises:
        ConfigError: If there is no such thing, or if it cannot be built.
    """
    if name is None:
        return _of_application(overrides, with_values)
    options = _options(overrides)
    if Path(name).exists() or name.endswith(".json"):
        return replace(_of_config(Path(name), with_values), options=options)
    if ":" in name:
        return replace(_of_factory(name, with_values), options=options)
    raise ConfigError(
        f"{name!r} is no file, no folder, no package.module:factory and no override; give a config.json of Hugging Face,"
        " a factory, or overrides such as model=mla"
    )


# The application -----------------------------------------------------------------------------------------------------


def _of_application(overrides: Sequence[str], with_values: bool) -> Target:
    check_choices(overrides)
    with initialize_config_module("lightning_muonclip.conf", version_base="1.3"):
        config = compose("train", list(overrides))
    config.callbacks = config.logger = None  # whose folders only a run has
    check_config(config)
    if config.get("muonclip") is None:
        raise ConfigError("this configuration trains without MuonClip; use optimizer=muonclip, or muon")
    data = instantiate(config.data, _convert_="all")
    try:
        model, note = _built(lambda: build_model(config.model, data), with_values)
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(str(error)) from error
    options: Any = OmegaConf.to_container(config.muonclip, resolve=True)
    trainer = config.trainer
    name, devices = trainer.get("strategy"), trainer.get("devices")
    kinds = {"fsdp2": "fsdp2", "ModelParallel": "fsdp2", "FSDP2": "fsdp2", "ddp": "ddp", "DDP": "ddp"}
    strategy = next((kind for word, kind in kinds.items() if word in str(name)), None)
    has_tensor_parallel = OmegaConf.select(config, "trainer.strategy.tensor_parallel_size", default=1) not in (1, None)
    ranks = devices * (trainer.get("num_nodes") or 1) if strategy and isinstance(devices, int) and devices > 0 else None
    inputs, source, length = _inputs_of(config, data)
    samples = config.data.batch_size * (trainer.get("accumulate_grad_batches") or 1) * (ranks or 1)
    notes = [
        note,
        "How many tokens an image is, is not known here: give those of a step with --tokens." * (length is None),
        "muP, which base_hidden_size asks for, is not part of this look." * bool(config.base_hidden_size),
        "Tensor parallelism is counted as if all ranks were FSDP2's." * has_tensor_parallel,
    ]
    return Target(
        f"muonclip-train {' '.join(overrides)}".rstrip(),
        model,
        ((inputs,), {}),
        source,
        _checked({key: value for key, value in options.items() if key != "_target_"}),
        strategy,
        ranks,
        samples * length if length else TOKENS,
        tuple(filter(None, notes)),
    )


def _inputs_of(config: DictConfig, data: Any) -> tuple[Tensor, str, int | None]:
    """Example inputs of the application's model, what they are, and the tokens of a sample if it has some."""
    if hasattr(data, "img_size"):
        shape = (_BATCH, data.in_chans, data.img_size, data.img_size)
        return torch.randn(shape), f"images of shape {shape}", None
    vocab_size = config.model.get("vocab_size") or data.vocab_size
    return _tokens(vocab_size), f"tokens of shape ({_BATCH}, {_LENGTH})", config.data.block_size


def _options(overrides: Sequence[str]) -> dict[str, Any]:
    """Options of MuonClip from ``muonclip.name=value``."""
    for override in overrides:
        if not override.lstrip("+").startswith("muonclip."):
            raise ConfigError(
                f"{override} overrides the application, which a factory or a config does not use; only muonclip.*=..."
            )
    try:
        given = OmegaConf.from_dotlist([override.lstrip("+") for override in overrides])
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{' '.join(overrides)}: {error}") from error
    own = OmegaConf.create({"muonclip": {"_target_": "lightning_muonclip.MuonClipCallback"}})
    merged = OmegaConf.merge(own, given)
    check_config(merged, _Options)  # type: ignore[arg-type]
    options: Any = OmegaConf.to_container(given, resolve=True)
    return _checked(options.get("muonclip", {}))


@dataclass
class _Options:
    muonclip: Any = None


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    try:
        MuonClipCallback(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    return options


# Hugging Face --------------------------------------------------------------------------------------------------------


def _of_config(path: Path, with_values: bool) -> Target:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"{path} needs transformers; pip install 'lightning-muonclip[hf]'") from error
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{file} does not exist; give a config.json of Hugging Face, or the folder that contains it")
    try:
        plain = json.loads(file.read_text())
        kind = plain["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is no config of Hugging Face, which is JSON with a model_type") from error
    if kind not in transformers.CONFIG_MAPPING:
        nearest = difflib.get_close_matches(str(kind), list(transformers.CONFIG_MAPPING), n=1)
        raise ConfigError(
            f"{file}: transformers {transformers.__version__} has no model type {kind!r}"
            + (f"; the nearest is {nearest[0]!r}" if nearest else "")
            + " (code from the Hub is not run)"
        )
    with _quiet(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(str(file), local_files_only=True)
            model, note = _built(lambda: _model_of(transformers, config), with_values)
        except (*FAILURES, OSError, ImportError) as error:
            raise ConfigError(f"{file}: {type(error).__name__}: {_line(error)}") from error
    example, inputs = _example_of_pretrained(model)
    return Target(f"{path} ({kind})", model, example, inputs, notes=tuple(filter(None, [note])))


@contextmanager
def _quiet(transformers: Any) -> Any:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _model_of(transformers: Any, config: Any) -> nn.Module:
    """The architecture that a config names, else the language model of its type, else the model without a head."""
    config.dtype = torch.float32
    for name in config.architectures or ():
        cls = getattr(transformers, name, None)
        if cls is not None:
            return cls(config)
    is_two = getattr(config, "is_encoder_decoder", False)
    kinds = ["AutoModelForSeq2SeqLM"] if is_two else ["AutoModelForMaskedLM", "AutoModelForCausalLM"]
    for kind in [*kinds, "AutoModelForImageClassification"]:
        with suppress(ValueError):  # which has no such head
            return getattr(transformers, kind).from_config(config)
    return transformers.AutoModel.from_config(config)


def _example_of_pretrained(model: Any) -> tuple[Example | None, str]:
    """The arguments of a model of Hugging Face, by its main input."""
    config, main = model.config, model.main_input_name
    own = config.get_text_config() if hasattr(config, "get_text_config") else config
    kwargs: dict[str, Any] = {}
    if main == "input_ids":
        kwargs[main] = _tokens(own.vocab_size)
    elif main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 224)
        sides = size if isinstance(size, (list, tuple)) else (size, size)
        kwargs[main] = torch.zeros(_BATCH, getattr(vision, "num_channels", 3), *sides)
    elif main == "input_features" and hasattr(config, "num_mel_bins"):
        kwargs[main] = torch.zeros(_BATCH, config.num_mel_bins, 2 * getattr(config, "max_source_positions", 1500))
    elif main == "input_values":
        kwargs[main] = torch.zeros(_BATCH, 16000)
    else:
        return None, f"unknown: what a {type(model).__name__} takes as {main} cannot be told from its config"
    parameters = inspect.signature(model.forward).parameters
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        kwargs["decoder_input_ids"] = _tokens(getattr(config, "vocab_size", None) or own.vocab_size)
    if "use_cache" in parameters:
        kwargs["use_cache"] = False
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in kwargs.items() if isinstance(x, Tensor))
    return ((), kwargs), shapes


# Factories -----------------------------------------------------------------------------------------------------------


def _of_factory(name: str, with_values: bool) -> Target:
    factory = _imported(name)
    if isinstance(factory, nn.Module):
        made, note = factory, ""
    else:
        _refuse_arguments(name, factory)
        try:
            made, note = _built(factory, with_values)
        except (Exception, SystemExit) as error:  # of code that is not ours
            raise ConfigError(f"{name}() raised {type(error).__name__}: {_line(error)}") from error
    example: Example | None = None
    inputs = ""
    model = made
    if isinstance(made, (tuple, list)) and made:
        model = made[0]
        if len(made) != 3 or not isinstance(made[1], (tuple, list)) or not isinstance(made[2], Mapping):
            raise ConfigError(
                f"{name}() returned {len(made)} values; return the module, or (module, args, kwargs) with a tuple and a dict"
            )
        example, inputs = (tuple(made[1]), made[2]), GIVEN
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} gives a {type(model).__name__}; it must return an nn.Module")
    if example is None:
        example, inputs = _guessed(model)
    return Target(name, model, example, inputs, notes=tuple(filter(None, [note])))


def _imported(name: str) -> Any:
    path, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(path)
    except (Exception, SystemExit) as error:  # of code that is not ours
        raise ConfigError(f"cannot import {path!r}: {type(error).__name__}: {_line(error)}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    for part in attribute.split("."):
        if not hasattr(found, part):
            nearest = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ConfigError(f"{path!r} has no {part!r}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{name} is of type {type(found).__name__}; give a function or a class that returns a module")
    return found


def _refuse_arguments(name: str, factory: Callable[..., Any]) -> None:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # of C
        return
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed:
        raise ConfigError(
            f"{name} needs arguments ({', '.join(needed)}); name a function of none that returns the module"
        )


def _guessed(model: Any) -> tuple[Example | None, str]:
    """The arguments of a module that came alone."""
    hint = "let the factory return (module, args, kwargs) to look at attention too"
    given = getattr(model, "example_input_array", None)  # of Lightning
    if given is not None:
        args = (given,) if isinstance(given, Tensor) else () if isinstance(given, Mapping) else tuple(given)
        return (args, given if isinstance(given, Mapping) else {}), "its example_input_array"
    if hasattr(model, "main_input_name") and hasattr(model, "config"):
        return _example_of_pretrained(model)
    needed = [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    leaf = next((m for m in model.modules() if next(m.parameters(recurse=False), None) is not None), None)
    if len(needed) == 1 and isinstance(leaf, nn.Embedding):
        return ((_tokens(leaf.num_embeddings),), {}), f"guessed: tokens of shape ({_BATCH}, {_LENGTH})"
    if len(needed) == 1 and isinstance(leaf, nn.Linear):
        shape = _BATCH, _LENGTH, leaf.in_features
        return ((torch.zeros(shape),), {}), f"guessed: numbers of shape {shape}"
    images = getattr(model, "default_cfg", None) or {}  # of timm
    if len(needed) == 1 and (isinstance(leaf, nn.Conv2d) or "input_size" in images):
        size = images.get("input_size", (getattr(leaf, "in_channels", 3), 224, 224))
        return ((torch.zeros(_BATCH, *size),), {}), f"guessed: images of shape {(_BATCH, *size)}"
    return None, f"unknown; {hint}"


# All of them ---------------------------------------------------------------------------------------------------------


def _built(build: Callable[[], Any], with_values: bool) -> tuple[Any, str]:
    """Builds without values if that is possible, and says if it is not."""
    if with_values:
        return build(), ""
    try:
        with without_values():
            return build(), ""
    except FAILURES as error:
        built = build()  # raises what is wrong with it
        return built, f"It was built with values, since without them it raises {type(error).__name__}: {_line(error)}"


def _tokens(vocab_size: int) -> Tensor:
    return (torch.arange(_BATCH * _LENGTH) % vocab_size).view(_BATCH, _LENGTH)


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
