"""Largest logits of Hugging Face models on the device against float64 on a CPU: ``python benchmarks/gpu_families.py``.

Each family with each of its implementations of attention, under autocast to bfloat16, and one step that clips.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
import transformers
from harness import DRY, attempt, device, exit_status, save
from torch import Tensor, nn

from lightning_muonclip import MuonClip, QKClip

IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
WIDTH, VOCABULARY = (32, 64) if DRY else (128, 128)
BATCH, LENGTH = (1, 16) if DRY else (2, 256)
WINDOW = LENGTH // 4

#: bfloat16 keeps 8 bits of a query and a key, and the activations before them have lost as much.
TOLERANCE = 0.1

_PLAIN = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_GROUPED = _PLAIN | {"num_key_value_heads": 2}
_HEADS = _GROUPED | {"head_dim": WIDTH // 4}

#: By name of the config's class: the model's class, and options.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaConfig": ("LlamaForCausalLM", _GROUPED),
    "MistralConfig": ("MistralForCausalLM", _GROUPED | {"sliding_window": WINDOW}),
    "Qwen2Config": ("Qwen2ForCausalLM", _GROUPED),
    "Gemma2Config": ("Gemma2ForCausalLM", _HEADS | {"sliding_window": WINDOW}),
    "GptOssConfig": ("GptOssForCausalLM", _HEADS | {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "GPT2Config": ("GPT2LMHeadModel", {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 4}),
    "BertConfig": ("BertForMaskedLM", _PLAIN),
    "GPTNeoXConfig": ("GPTNeoXForCausalLM", _PLAIN),
    "OPTConfig": ("OPTForCausalLM", _PLAIN | {"ffn_dim": 2 * WIDTH, "word_embed_proj_dim": WIDTH}),
    "PhiConfig": ("PhiForCausalLM", _PLAIN),
    "FalconConfig": ("FalconForCausalLM", _PLAIN),
}


def built(family: str, implementation: str) -> nn.Module:
    """A model whose weights are large enough for logits that stand out, without dropout."""
    model_class, options = FAMILIES[family]
    config = getattr(transformers, family)(**options)
    torch.manual_seed(0)
    model = getattr(transformers, model_class)._from_config(copy.deepcopy(config), attn_implementation=implementation)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(4)
    for module in model.modules():
        for name in ("p", "attention_dropout", "dropout_prob", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.train()


def largest_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Of a forward pass, of shape (layers, heads), on the CPU."""
    with QKClip(model, threshold=None) as watcher:
        model(input_ids=tokens)
        return watcher.max_logits.double().cpu()


def one(family: str, implementation: str) -> dict[str, Any]:
    """The error of one implementation, relative to the largest logit of its head; and a step that clips."""
    model = built(family, implementation).to(device())
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH))
    reference = built(family, "eager").double()
    if hasattr(reference, "set_experts_implementation"):
        reference.set_experts_implementation("eager")  # torch's grouped product refuses float64
    expected = largest_logits(reference, tokens)
    with torch.autocast(device().type, torch.bfloat16):
        found = largest_logits(model, tokens.to(device()))
    seen = expected.isfinite()
    error = float(((found - expected).abs() / expected.abs().clamp_min(1))[seen].max())
    optimizer = MuonClip(model, lr=1e-3, threshold=float(expected[seen].max()) / 2)
    with torch.autocast(device().type, torch.bfloat16):
        loss = model(input_ids=tokens.to(device())).logits.float().square().mean()
    loss.backward()
    optimizer.step()
    assert optimizer.last is not None
    clipped = int(optimizer.last.clipped_heads)
    result = {"error": error, "largest": float(expected[seen].max()), "heads": expected.numel(), "clipped": clipped}
    wrong = not error < TOLERANCE or not clipped or not math.isfinite(loss.item())
    return result | ({"failed": "the device disagrees with float64, or nothing was clipped"} if wrong else {})


def refusal(family: str, implementation: str) -> str | None:
    """Why transformers builds no such model, if so."""
    if not hasattr(transformers, family):
        return f"transformers {transformers.__version__} does not have it"
    if implementation == "flex_attention" and device().type == "cpu":
        return "without CUDA, FlexAttention has no backward"
    try:
        built(family, implementation)
    except (ValueError, ImportError) as error:
        return str(error)[:100]
    return None


def main() -> int:
    """All pairs, each saved as soon as it is there."""
    results: dict[str, dict[str, Any]] = {}
    for implementation in IMPLEMENTATIONS:
        for family in FAMILIES:
            own = results.setdefault(family, {})
            refused = refusal(family, implementation)
            own[implementation] = (
                {"skipped": refused} if refused else attempt(functools.partial(one, family, implementation))
            )
            print(f"{family:16} {implementation:16} {own[implementation]}", flush=True)
            save("gpu_families", tolerance=TOLERANCE, results=results)
    return exit_status(results)


if __name__ == "__main__":
    raise SystemExit(main())
