"""Checks of the options of QK-Clip."""

from __future__ import annotations

from typing import Any

from lightning_muonclip.qk_clip.describe.weights import LORA_CHOICES
from lightning_muonclip.qk_clip.observe.discovery import UNKNOWN_CHOICES
from lightning_muonclip.qk_clip.observe.observer import LOGITS_CHOICES
from lightning_muonclip.qk_clip.plan import QK_NORM_CHOICES
from lightning_muonclip.qk_clip.rule import SHARED_KEYS, check_alpha, check_threshold


def check_clip_options(
    threshold: float | None,
    alpha: float,
    shared_keys: str,
    qk_norm: str,
    logits: str,
    lora: str,
    every_n_steps: int,
    unknown: str,
    **_: Any,
) -> None:
    """Raises ValueError if an option is out of range, with its value and what is possible."""
    check_threshold(threshold)
    check_alpha(alpha)
    _check_choice("shared_keys", shared_keys, SHARED_KEYS)
    _check_choice("qk_norm", qk_norm, QK_NORM_CHOICES)
    _check_choice("logits", logits, LOGITS_CHOICES)
    _check_choice("lora", lora, LORA_CHOICES)
    _check_choice("unknown", unknown, UNKNOWN_CHOICES)
    if every_n_steps < 1:
        raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; use one of {', '.join(known)}")
