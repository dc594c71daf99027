"""Tiny models of every model type of transformers, by a generic shrinking of its configuration, and inputs for them."""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

BATCH, LENGTH, WIDTH, HEADS, HEAD_DIM, VOCAB, IMAGE = 2, 12, 64, 4, 16, 96, 64
Inputs = dict[str, Any]

#: Changes that help some models over: every layer that they have, or heads as wide as theirs.
ATTEMPTS: list[dict[str, Any]] = [{}, {"keep": "layers|blocks"}, {"scale": 8, "keep": "section|window|rope"}]

#: New values of integers, by the name of the field: the first pattern that matches decides.
_SIZES: list[tuple[str, int]] = [
    (r"codebook_size|n_codes", 64),
    (r"vocab_size|num_embeddings", VOCAB),
    (r"mamba.*heads", 8),
    (r"(key_value|kv)_heads|num_kv_heads|num_query_groups|n_head_kv", 2),
    (r"heads?$|attention_heads|n_heads?", HEADS),
    (r"qk_rope_head_dim|rotary_dim|rope_dim", 8),
    (r"head_dim|d_head|d_kv|kv_channels|head_size|head_width", HEAD_DIM),
    (r"(kv_)?lora_rank|_rank$", 16),
    (r"experts_per_tok|top_?k|num_selected|n_group|topk_group|shared_experts", 1),
    (r"n_?(um_|_)?(routed_|local_)?experts|num_experts", 4),
    (r"(num|n)_.*(layers?|blocks?)$|^num_layers|^depth$|_depth$|^n_layers?$|_layers$", 2),
    (r"intermediate|ffn_dim|d_ff|n_inner|mlp_(hidden|dim)|ffn_hidden|feedforward|ff_dim|inner_dim", 64),
    (r"position_embeddings|max_.*(len|length|positions?)|n_positions|max_seq|context_length|n_ctx|max_.*window", 256),
    (r"image_size|img_size|input_size$|crop_size", IMAGE),
    (r"window", 8),
    (r"num_queries|num_latents|query_tokens|num_query|num_image_tokens|num_proposals", 10),
    (r"mel_bins|num_mel|n_mels|^feature_size|input_feat", 16),
    (
        r"chunk_size|conv_kernel|d_conv|kernel|stride|patch|pool|type_vocab|groups|num_labels|num_channels|ratio|factor",
        -1,
    ),
    (r"state_size|d_state", 16),
]


def small(name: str, value: Any, heads: int | None = None, scale: int = 1, keep: str = "") -> Any:
    """The value of a field, shrunk."""
    if value is None and name in _UNSET:
        return _UNSET[name] * (scale if name == "head_dim" else 1)
    if keep and re.search(keep, name):
        return value
    if isinstance(value, bool) or value is None or isinstance(value, (float, str)):
        return value
    if isinstance(value, int):
        if re.search(r"token_(id|index)$|_id$", name):
            return value if value < VOCAB - 8 else VOCAB - 1 - sum(map(ord, name)) % 8
        for pattern, size in _SIZES:
            if re.search(pattern, name):
                if size == 2 and heads is not None and value == heads:
                    return HEADS
                if scale > 1 and size in (HEAD_DIM, WIDTH):
                    size *= scale
                return value if size < 0 else min(value, size) if value > 0 else value
        return min(value, WIDTH * scale)
    if isinstance(value, dict):
        return {
            key: section(key, own) if "section" in str(key) and not keep else small(str(key), own, heads, scale, keep)
            for key, own in value.items()
        }
    if isinstance(value, (list, tuple)) and value and all(isinstance(own, int) for own in value):
        if re.search("depth|layers|blocks", name) and not re.search("channels|indices|index|out", name):
            return type(value)(min(own, 1) for own in value)
        if "head" in name and len(value) > 1:
            least = max(1, min(value))
            return type(value)(max(1, own * 2 // least) if len(set(value)) > 1 else HEADS for own in value)
        if re.search("size|dim|channels|width|filters", name) and max(value) > WIDTH:
            if re.search("image|img|input_size|patch|window", name):
                return type(value)(min(own, IMAGE) for own in value)
            least = min(own for own in value if own > 0)
            return type(value)(max(WIDTH * own // least // 2 if len(set(value)) > 1 else WIDTH, 1) for own in value)
    return value


_UNSET = {"head_dim": HEAD_DIM, "num_key_value_heads": HEADS, "vocab_size": VOCAB}


def section(name: str, value: Any) -> Any:
    """How rotary channels are shared out among time, height and width."""
    if not isinstance(value, (list, tuple)) or not value:
        return value
    rest = HEAD_DIM // 2 // len(value)
    return type(value)([HEAD_DIM // 2 - rest * (len(value) - 1), *[rest] * (len(value) - 1)])


def shrunk(cls: Any, default: Any = None, scale: int = 1, keep: str = "") -> Any:
    """A configuration of this class with every size small, but for the fields to keep."""
    default = default if default is not None else cls()
    values: dict[str, Any] = {}
    names = {name: p.default for name, p in inspect.signature(cls).parameters.items() if p.kind == p.KEYWORD_ONLY}

    def current(name: str) -> Any:
        try:
            return getattr(default, name, names[name])
        except Exception:  # it differs from layer to layer
            return names[name]

    heads = next(
        (
            current(n)
            for n in names
            if re.fullmatch(r"num_attention_heads|n_heads?|num_heads", n) and isinstance(current(n), int)
        ),
        None,
    )
    kinds = {
        name: list(dict.fromkeys(current(name)))
        for name in names
        if ("types" in name or name == "layers_block_type") and isinstance(current(name), (list, tuple)) and current(name)
        and isinstance(current(name)[0], str)
    }  # fmt: skip
    layers = max([2, *map(len, kinds.values())])
    for name, preset in names.items():
        value = current(name)
        if hasattr(value, "to_diff_dict"):
            values[name] = shrunk(type(value), value, scale, keep)
        elif name in kinds and not keep:
            values[name] = (kinds[name] * layers)[:layers]
        elif name in ("num_hidden_layers", "n_layer", "num_layers") and isinstance(value, int) and not keep:
            values[name] = layers
        else:
            own = small(name, value, heads, scale, keep)
            if own != preset and name not in ("id2label", "label2id"):
                values[name] = own
    return cls(**values)


def model_classes(model_type: str) -> Iterator[Any]:
    """Classes that a configuration of this type may build: the plain model first."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    config = CONFIG_MAPPING[model_type]
    if config in MODEL_MAPPING:
        own = MODEL_MAPPING[config]
        yield from own if isinstance(own, (list, tuple)) else [own]
    name = config.__module__.replace(".configuration_", ".modeling_")
    module = importlib.import_module(name)
    found = [
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if c.__module__ == name and getattr(c, "config_class", None) is config and "PreTrained" not in c.__name__
    ]
    yield from sorted(found, key=lambda c: (not c.__name__.endswith("Model"), len(c.__name__)))


def number(config: Any, *names: str, default: int) -> int:
    """The first of several fields that a configuration, or one inside of it, has."""
    for name in names:
        value = getattr(config, name, None)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    for own in vars(config).values():
        if hasattr(own, "to_diff_dict") and (found := number(own, *names, default=-1)) > 0:
            return found
    return default


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def tokens(length: int = LENGTH, high: int = VOCAB - 16) -> Tensor:
    return torch.randint(
        min(5, high - 1), max(high, 1), (BATCH, length), generator=torch.Generator().manual_seed(length)
    )


def inputs_of(model: nn.Module) -> Iterator[Inputs]:
    """Inputs that a model may accept, the likeliest first."""
    config: Any = getattr(model, "config", None)
    parameters = inspect.signature(model.forward).parameters
    width = number(config, "hidden_size", "d_model", "n_embd", "embed_dim", default=WIDTH)
    image = number(config, "image_size", "img_size", "input_size", default=IMAGE)
    channels = number(config, "num_channels", "in_channels", "in_chans", default=3)
    mels = number(config, "num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel", "input_dim", default=16)
    patch = number(config, "patch_size", default=8)
    temporal = number(config, "temporal_patch_size", default=2)
    vocab = min(number(config, "vocab_size", default=VOCAB), VOCAB) - 16
    vocab = max(vocab, 2)
    frames = number(config, "num_frames", default=4)
    length = number(config, "max_length", default=64)
    one = {
        "input_ids": [tokens(high=vocab), tokens(64, high=vocab)],
        "decoder_input_ids": [tokens(7, vocab)],
        "attention_mask": [torch.ones(BATCH, LENGTH, dtype=torch.long), torch.ones(BATCH, 64, dtype=torch.long)],
        "pixel_values": [
            draw(BATCH, frames, channels, image, image),
            draw(BATCH, channels, image, image),
            draw(BATCH, 3, 64, 64),
            draw(BATCH, 4, channels, image, image),
            draw(BATCH, 3, 224, 224),
            draw(16, channels * temporal * patch**2),
            draw(BATCH, 16, channels * patch**2),
        ],
        "pixel_values_videos": [draw(BATCH, 4, channels, image, image), draw(BATCH, 16, channels, image, image)],
        "input_features": [
            draw(BATCH, mels, 64),
            draw(BATCH, 64, mels),
            draw(BATCH, 1, 64, mels),
            draw(BATCH, mels, 512),
            draw(BATCH, mels, 3000),
            draw(mels, 64),
        ],
        "input_values": [
            draw(BATCH, 1600),
            draw(BATCH, length, mels),
            draw(BATCH, 64, mels),
            draw(BATCH, 1, 1600),
            draw(BATCH, mels, 64),
            draw(BATCH, 6400),
        ],
        "hidden_states": [
            draw(BATCH, LENGTH, width),
            draw(16, channels * temporal * patch**2),
            draw(BATCH, width, 8, 8),
        ],
        "inputs_embeds": [draw(BATCH, LENGTH, width)],
        "encoder_hidden_states": [draw(BATCH, 9, width)],
        "inputs": [
            tokens(high=vocab),
            draw(BATCH, 16, number(config, "d_model", default=WIDTH)),
            draw(BATCH, channels, image, image),
        ],
        "grid_thw": [torch.tensor([[1, 4, 4]])],
        "image_grid_thw": [torch.tensor([[1, 4, 4]])],
        "bbox": [torch.randint(0, 50, (BATCH, LENGTH, 4)).sort(-1).values],
        "timestep": [torch.rand(BATCH), torch.tensor([3, 5])],
        "position_ids": [torch.arange(LENGTH).expand(BATCH, -1)],
        "past_values": [draw(BATCH, number(config, "context_length", default=32), channels), draw(BATCH, 64)],
        "context": [draw(BATCH, LENGTH, width)],
        "query_embeds": [draw(BATCH, 8, width)],
        "labels": [tokens(7, vocab)],
    }
    main = getattr(model, "main_input_name", None) or "input_ids"
    firsts = [main] + [
        name
        for name in (
            "input_ids",
            "pixel_values",
            "input_features",
            "input_values",
            "hidden_states",
            "inputs_embeds",
            "inputs",
        )
        if name in parameters and name != main
    ]
    needed = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    needed += [name for name in ("bbox",) if name in parameters]
    both = ["decoder_input_ids"] if "decoder_input_ids" in parameters else []
    for first in firsts:
        if first not in one or first not in parameters:
            continue
        names = list(dict.fromkeys([first, *needed, *both]))
        options = [one.get(name) or [draw(BATCH, LENGTH, width)] for name in names]
        yield from (dict(zip(names, chosen)) for chosen in itertools.islice(itertools.product(*options), 12))
        if both:
            yield from ({first: own} for own in one[first])
    # Images among words.
    if "input_ids" in parameters and "pixel_values" in parameters:
        for pixels in one["pixel_values"][:2]:
            yield {"input_ids": tokens(high=vocab), "pixel_values": pixels}


def tiny(model_type: str, implementation: str = "") -> tuple[nn.Module, Inputs]:
    """A model of a model type that runs on its inputs.

    Raises:
        RuntimeError: If no class builds or none runs, with the first problem.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    problems: list[str] = []
    for attempt in ATTEMPTS:
        try:
            config = shrunk(CONFIG_MAPPING[model_type], **attempt)
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
            continue
        for cls in itertools.islice(model_classes(model_type), 4):
            if not _is_tiny(cls, config):
                problems.append(f"{cls.__name__}: it stays large")
                continue
            try:
                torch.manual_seed(0)
                model = cls._from_config(config, **({"attn_implementation": implementation} if implementation else {}))
                model = model.float().train()
            except Exception as error:
                problems.append(f"{cls.__name__}: {type(error).__name__}: {error}")
                continue
            for inputs in inputs_of(model):
                try:
                    with torch.no_grad():
                        model(**inputs)
                    return model, inputs
                except Exception as error:
                    shapes = ", ".join(f"{name}{list(value.shape)}" for name, value in inputs.items())
                    problems.append(f"{cls.__name__}({shapes}): {type(error).__name__}: {error}")
    raise RuntimeError("; ".join(p[-160:] for p in (problems[:1] + problems[-1:])) or "no class")


def _is_tiny(cls: Any, config: Any) -> bool:
    """Whether a model has few parameters: other releases may call what makes it small by other names. Takes no memory."""
    try:
        with torch.device("meta"):
            return sum(param.numel() for param in cls._from_config(config).parameters()) < 10_000_000
    except Exception:  # it reads numbers
        return True
