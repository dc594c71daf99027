"""A causal language model of Hugging Face, called as the application calls its own."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muonclip.experiment.optional import optional


class CausalLM(nn.Module):
    """Any causal language model of Hugging Face, from a config or with its weights; nothing is downloaded.

    Args:
        config: A file ``config.json``, or the folder that contains it; the weights are random.
        type: A model type, such as ``"qwen3"``, whose default config is taken; the weights are random.
        pretrained: A folder with a config and weights.
        overrides: Entries of the config to change.
        lora: Arguments of :class:`peft.LoraConfig`, such as ``{"r": 8, "target_modules": "all-linear"}``: trains only
            low-rank factors beside the weights. ``None`` trains all weights.
        vocab_size: Number of tokens. ``None`` is that of the config. With ``pretrained``, it must not be larger.

    Raises:
        ImportError: If transformers cannot be imported, or with ``lora``, if peft cannot.
        ValueError: If not exactly one of ``config``, ``type`` and ``pretrained`` is given, if there is no such file or type,
            if the config has no such entry, or if the model's vocabulary is too small.
    """

    def __init__(
        self,
        config: str | None = None,
        type: str | None = None,
        pretrained: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        lora: Mapping[str, Any] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        auto = optional("transformers", "a model of Hugging Face").AutoModelForCausalLM
        given = {"config": config, "type": type, "pretrained": pretrained}
        if sum(value is not None for value in given.values()) != 1:
            raise ValueError(f"give one of model.config, model.type and model.pretrained; got {given}")
        own = _config(config or pretrained, type, overrides or {})
        if pretrained is not None:
            if vocab_size is not None and vocab_size > own.vocab_size:
                raise ValueError(
                    f"the data has {vocab_size} tokens, but {pretrained} knows {own.vocab_size}; use its own tokenizer"
                    f" (data.tokenizer={pretrained})"
                )
            self.network: nn.Module = auto.from_pretrained(
                pretrained, config=own, dtype=torch.float32, local_files_only=True
            )
            self.network.train()  # it comes in eval mode, in which nothing is observed
        else:
            own.vocab_size = vocab_size or own.vocab_size
            self.network = auto.from_config(own, dtype=torch.float32)
        if lora is not None:
            self.network = _with_lora(self.network, lora)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token, shape ``(batch, length, vocab_size)``, for tokens of shape ``(batch, length)``."""
        logits: Tensor = self.network(input_ids=tokens, use_cache=False).logits
        return logits


def _with_lora(network: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    peft = optional("peft", "model.lora")
    try:
        config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    except TypeError as error:
        raise ValueError(f"peft.LoraConfig takes no such options, {dict(options)}: {error}") from error
    adapted: nn.Module = peft.get_peft_model(network, config)
    return adapted


def _config(path: str | None, type: Any, overrides: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    if path is not None:
        if not Path(path).exists():
            raise ValueError(
                f"{path} does not exist; give a config.json, or a folder with one, relative to {Path.cwd()}"
            )
        own = AutoConfig.from_pretrained(path, local_files_only=True)
    elif type in CONFIG_MAPPING:
        own = AutoConfig.for_model(type)
    else:
        nearest = ", ".join(difflib.get_close_matches(str(type), list(CONFIG_MAPPING), n=3))
        raise ValueError(
            f"Hugging Face has no model type {type!r}" + (f"; the nearest are {nearest}" if nearest else "")
        )
    known = own.to_dict()
    for name, value in overrides.items():
        if name not in known:
            closest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {closest[0]!r}?" if closest else ""
            raise ValueError(f"a config of {own.model_type} has no entry {name!r}{hint}")
        setattr(own, name, value)
    return own
