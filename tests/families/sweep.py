"""Runs inference on every attention of many public models, judges it, and writes docs/inferred-attention.md.

    python tests/families/sweep.py                              # resumes where it was stopped
    python tests/families/sweep.py --only transformers llama    # a library, and names that contain a word
    python tests/families/sweep.py --write docs/inferred-attention.md

Results are JSON lines in a file, one a model; ``--fresh`` starts again.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import inspect
import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import pytest
import torch
import vision.torchvision_schemas  # noqa: F401  before transformers
from torch import nn

from families.judge import KINDS, judge, randomize, seeded
from families.shrunk import BATCH, LENGTH, WIDTH, draw, tiny, tokens

RESULTS = Path(tempfile.gettempdir()) / "attention_sweep.jsonl"
SECONDS, CHUNK = 60, 40
WATCHED = "watched"
Made = tuple[nn.Module, dict[str, Any]]
Result = dict[str, Any]


# Models ------------------------------------------------------------------------------------------------------------------


def transformers_models() -> dict[str, Callable[[], Made]]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return {name: lambda name=name: tiny(name) for name in sorted(CONFIG_MAPPING_NAMES)}  # type: ignore[misc]


def zoo_models() -> dict[str, Callable[[], Made]]:
    """Families that the tests know, in all their variants and implementations."""
    from families.zoo import CASES, CLAMPED

    def made(case: Any, implementation: str) -> Made:
        args, kwargs = case.inputs()
        model = case.model(implementation)
        names = list(inspect.signature(model.forward).parameters)
        return model, {**dict(zip(names, args)), **kwargs}

    return {
        " ".join(filter(None, (case.family, case.variant, own))): lambda case=case, own=own: made(case, own)
        for case in (*CASES, *CLAMPED)
        for own in case.implementations
    }


def litgpt_models() -> dict[str, Callable[[], Made]]:
    from litgpt import GPT, Config
    from litgpt.config import configs

    def made(options: dict[str, Any]) -> Made:
        groups = options.get("n_query_groups", options.get("n_head", 32))
        small = {
            "n_layer": 2,
            "n_embd": 64,
            "n_head": 4,
            "head_size": 16,
            "padded_vocab_size": 96,
            "block_size": 64,
            "intermediate_size": 64,
            "n_query_groups": 4 if groups == options.get("n_head") else min(groups, 2),
        }
        small |= {"n_expert": 4, "moe_intermediate_size": 32} if options.get("n_expert") else {}
        small |= {"sliding_window_size": 6} if options.get("sliding_window_size") else {}
        small |= {"sliding_window_indices": [0, 1]} if options.get("sliding_window_indices") else {}
        small |= {"rope_indices": [0, 1]} if options.get("rope_indices") else {}
        model = GPT(Config(**{**options, **small}))
        return model, {"idx": tokens()}

    kinds: dict[str, dict[str, Any]] = {}
    for options in configs:
        kinds.setdefault(options["name"].partition("-")[0].rstrip("0123456789."), options)
    return {name: lambda own=own: made(own) for name, own in kinds.items()}  # type: ignore[misc]


def timm_models() -> dict[str, Callable[[], Made]]:
    import timm

    def made(name: str) -> Made:
        for options in ({"img_size": 64}, {}):
            try:
                model = timm.create_model(name, num_classes=3, **options)
                size = options.get("img_size") or model.default_cfg["input_size"][-1]
                with torch.no_grad():
                    model(draw(1, 3, size, size))
                return model, {next(iter(inspect.signature(model.forward).parameters)): draw(1, 3, size, size)}
            except (TypeError, AssertionError, RuntimeError, ValueError):
                continue
        raise RuntimeError("it takes no image")

    found: dict[str, Callable[[], Made]] = {}
    for module in timm.list_modules():
        source = inspect.getsource(importlib.import_module(f"timm.models.{module}"))
        if "softmax" in source or "ttention" in source:
            sizes = (
                "test",
                "atto",
                "nano",
                "xxt",
                "xxs",
                "femto",
                "pico",
                "tiny",
                "_t0",
                "mini",
                "xs",
                "small",
                "_s",
                "_b0",
                "128",
            )
            names = timm.list_models(module=module)
            ranked = sorted(names, key=lambda n: (next((i for i, size in enumerate(sizes) if size in n), 99), len(n)))
            found |= {name: lambda name=name: made(name) for name in ranked[:1]}  # type: ignore[misc]
    return found


def torchvision_models() -> dict[str, Callable[[], Made]]:
    import torchvision.models as library

    options: dict[str, dict[str, Any]] = {
        "vit_b_16": {"image_size": 64},
        "swin_t": {},
        "swin_v2_t": {},
        "maxvit_t": {"input_size": (224, 224)},
        "swin3d_t": {},
    }
    shapes = {"swin3d_t": (1, 3, 4, 64, 64), "maxvit_t": (1, 3, 224, 224)}

    def made(name: str) -> Made:
        package = library.video if name == "swin3d_t" else library
        model = getattr(package, name)(num_classes=3, **options[name])
        return model, {"x": draw(*shapes.get(name, (1, 3, 64, 64)))}

    return {name: lambda name=name: made(name) for name in options}  # type: ignore[misc]


def x_transformers_models() -> dict[str, Callable[[], Made]]:
    from x_transformers import CrossAttender, Decoder, Encoder, TransformerWrapper, XTransformer

    def words(**options: Any) -> Made:
        layers = Decoder(dim=WIDTH, depth=2, heads=4, attn_dim_head=16, **options)
        return TransformerWrapper(num_tokens=96, max_seq_len=64, attn_layers=layers), {"x": tokens()}

    def crossed() -> Made:
        layers = CrossAttender(dim=WIDTH, depth=2, heads=4, attn_dim_head=16)
        return layers, {"x": draw(BATCH, LENGTH, WIDTH), "context": draw(BATCH, 9, WIDTH)}

    def both() -> Made:
        side = {"num_tokens": 96, "depth": 2, "heads": 4, "max_seq_len": 64}
        model = XTransformer(dim=WIDTH, **{f"{s}_{k}": v for s in ("enc", "dec") for k, v in side.items()})
        return model, {"src": tokens(), "tgt": tokens()}

    flags: list[dict[str, Any]] = [
        {},
        {"attn_flash": True},
        {"rotary_pos_emb": True},
        {"attn_kv_heads": 2},
        {"attn_one_kv_head": True},
        {"attn_qk_norm": True},
        {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True},
        {"attn_pre_talking_heads": True},
        {"attn_post_talking_heads": True},
        {"alibi_pos_bias": True},
        {"rel_pos_bias": True},
        {"dynamic_pos_bias": True},
        {"attn_num_mem_kv": 3},
        {"attn_sparse_topk": 4},
        {"attn_gate_values": True},
        {"attn_softclamp_logits": True},
        {"sandwich_norm": True},
        {"use_rmsnorm": True},
        {"attn_on_attn": True},
        {"attn_value_dim_head": 8},
        {"attn_head_scale": True},
        {"attn_sigmoid": True},
        {"attn_use_cope": True, "attn_cope_max_pos": 16},
        {"attn_l2_distance": True},
        {"attn_selective": True},
        {"attn_cog_signed": True},
        {"attn_head_learned_sink": True},
        {"attn_qk_rmsnorm": True},
        {"attn_k_rmsnorm": True},
        {"attn_use_rel_proj_pos_bias": True},
        {"attn_add_zero_kv": True},
        {"macaron": True},
        {"shift_tokens": 1},
        {"attn_data_dependent_alibi": True},
        {"rotary_xpos": True},
        {"attn_value_rmsnorm": True},
        {"polar_pos_emb": True},
        {"attn_use_latent_kv": True, "attn_dim_latent_kv": 16},
        {"attn_use_latent_q": True, "attn_dim_latent_q": 16},
        {"attn_laser": True},
        {"attn_hybrid_learned_mix": True},
        {"residual_attn": True},
        {"attn_forgetting": True},
    ]
    named = {"Decoder " + ", ".join(f"{k}={v}" for k, v in own.items()): own for own in flags}
    found: dict[str, Callable[[], Made]] = {n.strip(): lambda own=own: words(**own) for n, own in named.items()}  # type: ignore[misc]
    encoder = Encoder(dim=WIDTH, depth=2, heads=4, attn_dim_head=16)
    return {
        **found,
        "Encoder": lambda: (encoder, {"x": draw(BATCH, LENGTH, WIDTH)}),
        "CrossAttender": crossed,
        "XTransformer": both,
    }


def vit_pytorch_models() -> dict[str, Callable[[], Made]]:
    import vit_pytorch as library

    values: dict[str, Any] = {
        "image_size": 32,
        "patch_size": 8,
        "image_patch_size": 8,
        "num_classes": 3,
        "dim": WIDTH,
        "depth": 2,
        "heads": 4,
        "mlp_dim": 64,
        "dim_head": 16,
        "channels": 3,
        "frames": 4,
        "frame_patch_size": 2,
        "seq_len": 32,
        "max_frames": 8,
        "cls_depth": 1,
        "spatial_depth": 1,
        "temporal_depth": 1,
        "num_residual_streams": 2,
        "max_tokens_per_depth": (16, 8),
        "freq_patch_size": 8,
        "sm_dim": 32,
        "lg_dim": 64,
        "sm_patch_size": 8,
        "lg_patch_size": 16,
        "ndim": 2,
        "input_shape": (32, 32),
        "num_hierarchies": 2,
        "block_repeats": (1, 1),
        "mlp_mult": 2,
        "reduction_factor": (4, 2),
        "window_size": 4,
        "num_slots": 2,
        "embedding_dim": WIDTH,
        "img_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "highres_patch_size": 4,
    }
    stages = {
        "crossformer": {"dim": (32, 64, 128, 256), "depth": (1, 1, 1, 1)},
        "regionvit": {"dim": (32, 64, 128, 256), "depth": (1, 1, 1, 1)},
        "levit": {"dim": (32, 64), "depth": (1, 1), "heads": (2, 4), "stages": 2},
        "pit": {"depth": (1, 1)},
        "max_vit": {"depth": (1, 1), "window_size": 2},
        "max_vit_with_registers": {"depth": (1, 1), "window_size": 2},
        "scalable_vit": {"depth": (1, 1), "heads": (2, 4), "window_size": (4, 4)},
        "sep_vit": {"depth": (1, 1), "heads": (2, 4)},
        "na_vit": {"channels": 3},
        "vit_1d": {"patch_size": 4},
        "simple_vit_1d": {"patch_size": 4},
    }

    def made(name: str) -> Made:
        module = importlib.import_module(f"vit_pytorch.{name}")
        cls = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__][-1]
        given = inspect.signature(cls).parameters
        own = {**values, **stages.get(name, {})}
        model = cls(**{key: value for key, value in own.items() if key in given})
        first = next(iter(inspect.signature(model.forward).parameters))
        shapes = [(1, 3, 32, 32), (1, 3, 256, 256), (1, 3, 224, 224), (1, 3, 4, 32, 32), (2, 3, 32), (1, 3, 8, 32, 32)]
        for given_value in [
            *(draw(*shape) for shape in shapes),
            [draw(3, 32, 32), draw(3, 32, 16)],
            [[draw(3, 32, 32)]],
        ]:
            try:
                with torch.no_grad():
                    model(given_value)
                return model, {first: given_value}
            except Exception:
                continue
        raise RuntimeError("it takes none of the inputs")

    # Wrappers that train another model.
    trainers = {
        "dino",
        "es_vit",
        "distill",
        "extractor",
        "recorder",
        "lejepa",
        "levjepa",
        "levjepa_nd",
        "mae",
        "mpp",
        "mp3",
        "simmim",
        "accept_video_wrapper",
        "efficient",
        "vat",
        "vaat",
        "vat_siglip",
        "learnable_memory_vit",
    }
    names = [own.name for own in pkgutil.iter_modules(library.__path__) if own.name not in trainers]
    return {name: lambda name=name: made(name) for name in names}  # type: ignore[misc]


def diffusers_models() -> dict[str, Callable[[], Made]]:
    import diffusers as library

    text, latent = draw(1, 7, 32), draw(1, 4, 8, 8)
    time_step = torch.tensor([3])
    made: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "UNet2DConditionModel": (
            {
                "sample_size": 8,
                "block_out_channels": (32, 64),
                "layers_per_block": 1,
                "cross_attention_dim": 32,
                "attention_head_dim": 8,
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                "norm_num_groups": 8,
            },
            {"sample": latent, "timestep": 3, "encoder_hidden_states": text},
        ),
        "UNet2DModel": (
            {
                "sample_size": 8,
                "in_channels": 4,
                "out_channels": 4,
                "block_out_channels": (32, 64),
                "layers_per_block": 1,
                "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
                "norm_num_groups": 8,
                "attention_head_dim": 8,
            },
            {"sample": latent, "timestep": 3},
        ),
        "DiTTransformer2DModel": (
            {
                "num_attention_heads": 4,
                "attention_head_dim": 16,
                "in_channels": 4,
                "num_layers": 2,
                "sample_size": 8,
                "num_embeds_ada_norm": 10,
                "norm_num_groups": 4,
            },
            {"hidden_states": latent, "timestep": time_step, "class_labels": time_step},
        ),
        "PixArtTransformer2DModel": (
            {
                "num_attention_heads": 4,
                "attention_head_dim": 16,
                "in_channels": 4,
                "out_channels": 8,
                "num_layers": 2,
                "sample_size": 8,
                "cross_attention_dim": 64,
                "caption_channels": 32,
                "norm_num_groups": 4,
            },
            {
                "hidden_states": latent,
                "timestep": time_step,
                "encoder_hidden_states": text,
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            },
        ),
        "SD3Transformer2DModel": (
            {
                "sample_size": 8,
                "in_channels": 4,
                "num_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 4,
                "joint_attention_dim": 32,
                "caption_projection_dim": 64,
                "pooled_projection_dim": 32,
                "out_channels": 4,
                "pos_embed_max_size": 8,
            },
            {
                "hidden_states": latent,
                "encoder_hidden_states": text,
                "pooled_projections": draw(1, 32),
                "timestep": time_step,
            },
        ),
        "FluxTransformer2DModel": (
            {
                "in_channels": 4,
                "num_layers": 1,
                "num_single_layers": 1,
                "attention_head_dim": 16,
                "num_attention_heads": 4,
                "joint_attention_dim": 32,
                "pooled_projection_dim": 32,
                "axes_dims_rope": (4, 4, 8),
            },
            {
                "hidden_states": draw(1, 16, 4),
                "encoder_hidden_states": text,
                "pooled_projections": draw(1, 32),
                "timestep": time_step / 10,
                "img_ids": torch.zeros(16, 3),
                "txt_ids": torch.zeros(7, 3),
            },
        ),
        "AuraFlowTransformer2DModel": (
            {
                "sample_size": 8,
                "in_channels": 4,
                "num_mmdit_layers": 1,
                "num_single_dit_layers": 1,
                "attention_head_dim": 16,
                "num_attention_heads": 4,
                "joint_attention_dim": 32,
                "caption_projection_dim": 64,
                "pos_embed_max_size": 16,
            },
            {"hidden_states": latent, "encoder_hidden_states": text, "timestep": time_step / 10},
        ),
        "CogVideoXTransformer3DModel": (
            {
                "num_attention_heads": 4,
                "attention_head_dim": 16,
                "in_channels": 4,
                "out_channels": 4,
                "time_embed_dim": 32,
                "text_embed_dim": 32,
                "num_layers": 2,
                "sample_width": 8,
                "sample_height": 8,
                "sample_frames": 5,
                "max_text_seq_length": 7,
            },
            {"hidden_states": draw(1, 2, 4, 8, 8), "encoder_hidden_states": text, "timestep": time_step},
        ),
        "SanaTransformer2DModel": (
            {
                "in_channels": 4,
                "out_channels": 4,
                "num_attention_heads": 4,
                "attention_head_dim": 16,
                "num_layers": 2,
                "num_cross_attention_heads": 4,
                "cross_attention_head_dim": 16,
                "cross_attention_dim": 64,
                "caption_channels": 32,
                "sample_size": 8,
            },
            {"hidden_states": latent, "encoder_hidden_states": text, "timestep": time_step},
        ),
        "WanTransformer3DModel": (
            {
                "num_attention_heads": 4,
                "attention_head_dim": 16,
                "in_channels": 4,
                "out_channels": 4,
                "text_dim": 32,
                "freq_dim": 32,
                "ffn_dim": 64,
                "num_layers": 2,
                "rope_max_seq_len": 32,
            },
            {"hidden_states": draw(1, 4, 2, 8, 8), "timestep": time_step, "encoder_hidden_states": text},
        ),
        "LTXVideoTransformer3DModel": (
            {
                "in_channels": 8,
                "out_channels": 8,
                "num_attention_heads": 4,
                "attention_head_dim": 16,
                "cross_attention_dim": 64,
                "num_layers": 2,
                "caption_channels": 32,
            },
            {
                "hidden_states": draw(1, 16, 8),
                "encoder_hidden_states": text,
                "timestep": time_step,
                "encoder_attention_mask": torch.ones(1, 7),
                "num_frames": 1,
                "height": 4,
                "width": 4,
            },
        ),
        "QwenImageTransformer2DModel": (
            {
                "in_channels": 16,
                "out_channels": 4,
                "num_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 4,
                "joint_attention_dim": 32,
                "axes_dims_rope": (4, 4, 8),
            },
            {
                "hidden_states": draw(1, 16, 16),
                "encoder_hidden_states": text,
                "timestep": time_step / 10,
                "encoder_hidden_states_mask": torch.ones(1, 7),
                "img_shapes": [[(1, 4, 4)]],
            },
        ),
        "HunyuanDiT2DModel": (
            {
                "num_attention_heads": 4,
                "attention_head_dim": 16,
                "in_channels": 4,
                "patch_size": 2,
                "sample_size": 8,
                "hidden_size": 64,
                "num_layers": 2,
                "mlp_ratio": 2.0,
                "cross_attention_dim": 32,
                "cross_attention_dim_t5": 32,
                "pooled_projection_dim": 32,
                "text_len": 7,
                "text_len_t5": 7,
            },
            {
                "hidden_states": latent,
                "timestep": time_step.float(),
                "encoder_hidden_states": text,
                "text_embedding_mask": torch.ones(1, 7),
                "encoder_hidden_states_t5": text,
                "text_embedding_mask_t5": torch.ones(1, 7),
                "image_rotary_emb": (draw(16, 16), draw(16, 16)),
                "image_meta_size": torch.ones(1, 6),
                "style": torch.zeros(1, dtype=torch.long),
            },
        ),
        "PriorTransformer": (
            {
                "num_attention_heads": 4,
                "attention_head_dim": 16,
                "num_layers": 2,
                "embedding_dim": 32,
                "num_embeddings": 7,
                "additional_embeddings": 4,
            },
            {"hidden_states": draw(1, 32), "timestep": 3, "proj_embedding": draw(1, 32), "encoder_hidden_states": text},
        ),
        "AutoencoderKL": (
            {
                "block_out_channels": (32, 64),
                "norm_num_groups": 8,
                "down_block_types": ("DownEncoderBlock2D",) * 2,
                "up_block_types": ("UpDecoderBlock2D",) * 2,
                "latent_channels": 4,
            },
            {"sample": draw(1, 3, 16, 16)},
        ),
        "Lumina2Transformer2DModel": (
            {
                "sample_size": 8,
                "in_channels": 4,
                "hidden_size": 64,
                "num_layers": 2,
                "num_refiner_layers": 1,
                "num_attention_heads": 4,
                "num_kv_heads": 2,
                "multiple_of": 16,
                "axes_dim_rope": (4, 4, 8),
                "axes_lens": (30, 16, 16),
                "cap_feat_dim": 32,
            },
            {
                "hidden_states": latent,
                "timestep": time_step / 10,
                "encoder_hidden_states": text,
                "encoder_attention_mask": torch.ones(1, 7).bool(),
            },
        ),
    }
    return {name: lambda name=name, own=own: (getattr(library, name)(**own[0]), own[1]) for name, own in made.items()}  # type: ignore[misc]


LIBRARIES: dict[str, Callable[[], dict[str, Callable[[], Made]]]] = {
    "known families": zoo_models,
    "transformers": transformers_models,
    "timm": timm_models,
    "torchvision": torchvision_models,
    "litgpt": litgpt_models,
    "diffusers": diffusers_models,
    "x-transformers": x_transformers_models,
    "vit-pytorch": vit_pytorch_models,
}


@functools.cache
def models_of(library: str) -> dict[str, Callable[[], Made]]:
    """Makers of models, none if the library is not installed."""
    try:
        return LIBRARIES[library]()
    except ImportError:
        return {}


# One model ---------------------------------------------------------------------------------------------------------------


def run(library: str, name: str, make: Callable[[], Made]) -> Result:
    """Infers and judges one model."""
    from lightning_muonclip.qk_clip.describe.describe import describe
    from lightning_muonclip.qk_clip.describe.gate import gate
    from lightning_muonclip.qk_clip.describe.survey import Survey

    result: Result = {"library": library, "name": name}
    start = time.process_time()
    try:
        torch.manual_seed(0)
        model, inputs = make()
    except (Exception, pytest.skip.Exception) as error:
        return {**result, "not built": f"{type(error).__name__}: {error}"[:400]}
    model.train()
    randomize(model)

    def surveyed() -> Any:
        with torch.no_grad(), Survey(model) as survey:
            model(**inputs)
        return survey

    survey = seeded(surveyed)
    built = time.process_time()
    found = describe(survey.calls)
    if survey.calls:
        seeded(lambda: gate(survey.calls[0][0], found))
    result |= {
        "class": type(model).__name__,
        "calls": len(survey.calls),
        "inferred": [summary(own) for own in found if own.layout is not None],
        "refused": [[own.name, type(own.module).__name__, own.reason] for own in found if own.layout is None],
        "seconds": [round(built - start, 2), round(time.process_time() - built, 2)],
    }
    result["judged"], result["wrong"], result["not judged"] = judge(model, inputs, found, len(survey.calls))
    return result


def summary(own: Any) -> list[Any]:
    """What is kept of a layout."""
    layout = own.layout
    kinds: dict[str, list[int]] = {}
    for name, table in layout.tables:
        kinds[name] = sorted({*kinds.get(name, ()), *table.kinds.unique().tolist()} - {5})
    return [
        own.name,
        type(own.module).__name__,
        layout.num_heads,
        layout.num_key_value_heads,
        kinds,
        layout.qk_norm,
        layout.notes,
    ]


def verdict(inferred: list[Any]) -> str:
    """What a clip scales."""
    _, _, _, _, kinds, qk_norm, _ = inferred
    of = {KINDS[kind][0] for own in kinds.values() for kind in own}
    if not of:
        return WATCHED
    return " and ".join(sorted(of, reverse=True)) + (", by gains" if qk_norm else "")


def verdicts(result: Result) -> dict[str, Counter[str]]:
    """How often the attention of each class was judged how; refusals are reasons, without their numbers."""
    found: dict[str, Counter[str]] = {}
    for own in result["inferred"]:
        found.setdefault(own[1], Counter())[verdict(own)] += 1
    for _, cls, reason in result["refused"]:
        found.setdefault(cls, Counter())[re.sub(r" \(degrees [^)]*\)|: \w*Error: .*", "", reason)] += 1
    return found


class _TookTooLong(BaseException):
    pass


def work(library: str, names: list[str], results: Path) -> None:
    """Runs some models, each within its time."""

    def stop(*_: Any) -> None:
        raise _TookTooLong

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGPROF, stop)
    makers = models_of(library)
    for name in names:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor: other work costs nothing
        try:
            result = run(library, name, makers[name])
        except _TookTooLong:
            result = {"library": library, "name": name, "not built": f"it took more than {SECONDS} s of processor time"}
        except Exception as error:
            import traceback

            where = traceback.extract_tb(error.__traceback__)[-1]
            result = {
                "library": library,
                "name": name,
                "crash": f"{type(error).__name__}: {error}"[:300] + f" {where.filename}:{where.lineno}",
            }
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        with results.open("a") as file:
            file.write(json.dumps(result) + "\n")


def run_apart(library: str, names: list[str], results: Path) -> None:
    """Runs some models in another process; one that ends it is a result too, and the others go on in a new one."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    while names:
        command = [sys.executable, "-W", "ignore", __file__, "--results", str(results), "--work", library, *names]
        code = subprocess.run(command, env=env).returncode
        done = {(own["library"], own["name"]) for own in read(results)}
        names = [name for name in names if (library, name) not in done]
        if names:
            with results.open("a") as file:
                ended = {"library": library, "name": names.pop(0), "crash": f"its process ended with code {code}"}
                file.write(json.dumps(ended) + "\n")


def read(results: Path) -> list[Result]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


# The table ---------------------------------------------------------------------------------------------------------------


def report(results: list[Result]) -> str:
    """The counts of every library."""
    lines = [
        "| library | models | with attention | attentions | inferred | watched | refused | wrong | judged head by head |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for library in [*LIBRARIES, "all"]:
        own = [r for r in results if library in (r["library"], "all") and "calls" in r]
        if not own:
            continue
        told = sum((counts for result in own for counts in verdicts(result).values()), Counter())
        refused = sum(len(r["refused"]) for r in own)
        cells = [
            library,
            len(own),
            sum(r["calls"] > 0 for r in own),
            told.total(),
            f"{told.total() - refused - told[WATCHED]} ({1 - (refused + told[WATCHED]) / max(1, told.total()):.1%})",
            told[WATCHED],
            f"{refused} ({refused / max(1, told.total()):.1%})",
            sum(len(r["wrong"]) for r in own),
            sum(r["judged"] for r in own),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


TEXT = """# What is inferred of public models

Written by a script, with torch {torch}, and {versions}:

    python tests/families/sweep.py --write docs/inferred-attention.md

Every model is tiny, of random weights, and known to the library by nothing but its forward. The library reads which channels
of which weights make which head, or refuses with a reason. Each answer is judged on the model by an oracle that shares no
code with the library (`tests/families/judge.py`), head by head for at most six attentions of a model:

- with a random factor for every head, the products of its queries and keys, read from elementary operations in float64, must
  be the factor times what they were, and earlier attention must be the same;
- with queries times powers of two and keys over them, the model's outputs must be the same to the bit;
- where queries and keys are said to be normalized, the products must be the same however large the matrices are.

**Wrong** counts whatever fails, and attention that the library does not see. **Inferred** is what a clip can scale.
**Watched** is attention whose queries and keys are both normalized without a gain of their own: its logits are bounded, and
there is nothing to scale. Whatever of a library is not in the lists does not shrink to a tiny model in a generic way.

{table}

## What is refused, and why

{refusals}

## Model by model

How many attentions of which class, and what a clip scales: queries (q), keys (k), or both.

{models}
"""


def document(results: list[Result]) -> str:
    """The page of the documentation."""
    packages = ("transformers", "timm", "torchvision", "litgpt", "diffusers", "x-transformers", "vit-pytorch")
    versions = [f"{package} {importlib.metadata.version(package).partition('+')[0]}" for package in packages]
    reasons: dict[str, list[str]] = {}
    count: Counter[str] = Counter()
    for result in results:
        for own in verdicts(result).values() if "calls" in result else ():
            for reason, number in own.items():
                if reason.startswith(("q", "k", WATCHED)):
                    continue
                count[reason] += number
                if result["name"] not in reasons.setdefault(reason, []):
                    reasons[reason].append(result["name"])
    short = {reason: f"[{number}]" for number, (reason, _) in enumerate(count.most_common(), 1)}
    refusals = [
        f"- {short[reason]} {reason}: {total} in {', '.join(reasons[reason])}" for reason, total in count.most_common()
    ]
    models = []
    for library in LIBRARIES:
        lines = []
        for result in results:
            if result["library"] == library and result.get("calls"):
                told = [
                    f"{cls} " + ", ".join(f"{n} x {short.get(what, what)}" for what, n in own.items())
                    for cls, own in verdicts(result).items()
                ]
                lines.append(f"{result['name']}: {'; '.join(told)}")
        if lines:
            models.append("\n".join([f"### {library}", "", "```text", *sorted(lines), "```"]))
    return TEXT.format(
        torch=torch.__version__.partition("+")[0],
        versions=", ".join(versions),
        table=report(results),
        refusals="\n".join(refusals),
        models="\n\n".join(models),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--work", nargs="*")
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    if args.work:
        return work(args.work[0], args.work[1:], args.results)
    if args.fresh:
        args.results.unlink(missing_ok=True)
    done = {(own["library"], own["name"]) for own in read(args.results)}
    chunks: list[list[str]] = []
    for library in LIBRARIES:
        if (args.only and args.only[0] != library) or args.write:
            continue
        names = [n for n in models_of(library) if (library, n) not in done and all(word in n for word in args.only[1:])]
        chunks += [[library, *names[i : i + CHUNK]] for i in range(0, len(names), CHUNK)]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda chunk: run_apart(chunk[0], chunk[1:], args.results), chunks))
    results = read(args.results)
    print(report(results))
    if args.write:
        args.write.write_text(document(results))
    return None


if __name__ == "__main__":
    main()
