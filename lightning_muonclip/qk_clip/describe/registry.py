"""Recognizes attention modules: by the user's spec, then by class, then by names and shapes; or refuses and says why."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_muonclip.qk_clip.describe.example import Example, attention_on, spec_of
from lightning_muonclip.qk_clip.describe.families import FAMILIES, SpecFn, is_active, separate
from lightning_muonclip.qk_clip.describe.names import ChangedClassError, qualified_name, qualified_names
from lightning_muonclip.qk_clip.describe.spec import AttentionSpec

#: The attention modules of a model by display name, in ``named_modules`` order, each with its spec.
AttentionModules = dict[str, tuple[nn.Module, AttentionSpec]]

#: Spec functions of the user's, by the qualified names of classes.
_REGISTERED: dict[str, SpecFn] = {}

#: Common names of separate query, key and value projections.
SEPARATE_PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("Wq", "Wk", "Wv"),
    ("q", "k", "v"),
)
#: Further projections with such names, as in joint attention over two streams, cannot be read from names alone.
_MAKES_QUERIES_OR_KEYS = re.compile(r"(^|_)(q|k|qk|kv|qkv|query|key)(_|$)")
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads", "num_q_heads", "nhead")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "num_query_groups", "kv_heads")
_HEAD_DIM = ("head_dim", "head_size", "attention_head_size", "d_head", "dim_head", "d_kv")
_NORMS = ("qk_norm", "q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_norm", "key_norm", "norm_q", "norm_k")


def register_attention(cls: type[nn.Module] | str, spec_fn: SpecFn) -> None:
    """Registers a class of attention modules and its subclasses.

    Args:
        cls: The class, or its qualified name (``"package.module.Class"``).
        spec_fn: Takes a module of that class and returns its :class:`AttentionSpec`.
    """
    _REGISTERED[cls if isinstance(cls, str) else qualified_name(cls)] = spec_fn


def find_attention(
    model: nn.Module,
    specs: Mapping[str, AttentionSpec | None] | None = None,
    example: Example | None = None,
) -> AttentionModules:
    """All attention modules of a model by display name, in ``named_modules`` order; a shared module once.

    Args:
        model: The model.
        specs: The user's specs by module name. ``None`` as a value skips that module and its submodules.
        example: Arguments of the model, ``(args, kwargs)``. All attention that the model computes on them is found and
            inferred from what it does, except where the user describes it; no name is looked at.

    Raises:
        ValueError: If a name in ``specs`` is not a module, if a module looks like attention but cannot be read, or if there
            is no attention.
    """
    found, refused = recognise(model, specs, example)
    if refused:  # report the innermost: those around it may be mere wrappers
        innermost = max(refused, key=lambda name: name.count("."))
        others = f"\nAnd {len(refused) - 1} more: {', '.join(name for name in refused if name != innermost)}"
        raise ValueError(refused[innermost] + others * (len(refused) > 1))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention that QK-Clip knows; let QKClip infer it from example=(args, kwargs),"
            " describe it with specs={name: AttentionSpec(...)} or register_attention(cls, spec_fn), or train without"
            " QK-Clip: MuonClipCallback(logits='off'), or in plain PyTorch Muon(split_params(model))"
        )
    return found


def recognise(
    model: nn.Module,
    specs: Mapping[str, AttentionSpec | None] | None = None,
    example: Example | None = None,
) -> tuple[AttentionModules, dict[str, str]]:
    """The attention modules that can be read, and error messages for those that cannot.

    Raises:
        ValueError: If a name in ``specs`` is not a module.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    specs = {display_name(name): spec for name, spec in (specs or {}).items()}
    modules = {display_name(name): module for name, module in model.named_modules()}
    for name in specs:
        if name not in modules:
            raise ValueError(f"specs names {name!r}, but the model has no such module; see model.named_modules()")
    found: AttentionModules = {}
    refused: dict[str, str] = {}
    alone = tuple(f"{name}." for name, spec in specs.items() if spec is None and name)
    for name, module in modules.items():
        if name.startswith(alone) and name not in specs:
            continue
        try:
            spec = specs[name] if name in specs else _spec_of(module, by_name=example is None)
        except ValueError as error:
            refused[name] = _refusal(name, module, str(error))
            continue
        if spec is not None:
            found[name] = (module, spec)
    if example is not None:
        for own in attention_on(model, example):
            name = display_name(own.name)
            if any(_is_around(name, other) or _is_around(other, name) for other in (*found, *specs)):
                continue
            if own.layout is not None:
                found[name] = (own.module, spec_of(own))
            elif any(param.requires_grad for param in own.module.parameters()):
                refused[name] = _refusal(name, own.module, own.reason)
        found = {name: found[name] for name in modules if name in found}
        refused = {
            name: reason for name, reason in refused.items() if not any(_is_around(other, name) for other in found)
        }
    # A module named "...Attention" around one that was recognized or skipped is a wrapper, not an error.
    known = [*found, *specs]
    wrappers = [name for name in refused if any(other.startswith(f"{name}." if name else "") for other in known)]
    for name in wrappers:
        del refused[name]
    return found, refused


def _is_around(outer: str, inner: str) -> bool:
    return outer in ("", inner) or inner.startswith(f"{outer}.")


def display_name(name: str) -> str:
    """A module's name without the prefixes of torch.compile."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _spec_of(module: nn.Module, *, by_name: bool) -> AttentionSpec | None:
    for name in qualified_names(type(module)):
        if name in _REGISTERED:
            return _REGISTERED[name](module)
        if by_name and name in FAMILIES:
            try:
                return FAMILIES[name](module)
            except (AttributeError, LookupError, TypeError) as error:
                if _holds_known_attention(module):  # ViTAttention of transformers < 5.9 is a wrapper
                    return None
                raise ChangedClassError(type(module), "the attributes that give its heads", error) from error
    if not by_name:
        return None
    for names in SEPARATE_PROJECTIONS:
        if _weight_rows(module, names[0]) and _weight_rows(module, names[1]):
            return _separate_spec(module, *names)
    if "attention" in type(module).__name__.lower() and any(p.ndim == 2 for p in module.parameters()):
        raise ValueError("its query and key projections are not separate modules with known names")
    return None


def _holds_known_attention(module: nn.Module) -> bool:
    return any(name in FAMILIES for child in module.children() for name in qualified_names(type(child)))


def _separate_spec(module: nn.Module, query: str, key: str, value: str) -> AttentionSpec:
    query_rows, key_rows = _weight_rows(module, query), _weight_rows(module, key)
    heads, key_heads, dim = (_first_int(module, names) for names in (_HEADS, _KEY_HEADS, _HEAD_DIM))
    if heads is None and dim is not None:
        heads = query_rows // dim
    if heads is None or query_rows % heads:
        raise ValueError(
            f"the number of heads is unknown: {query} has {query_rows} rows, and no attribute ({', '.join(_HEADS)}) divides"
            " them"
        )
    dim = query_rows // heads
    if key_rows % dim or (key_heads is not None and key_heads * dim != key_rows):
        raise ValueError(f"{key} has {key_rows} rows, which are not whole heads of {dim} channels")
    chosen = (query, key, value)
    others = [name for name, child in module.named_children() if name not in chosen and _weight_rows(module, name)]
    if more := [name for name in others if _MAKES_QUERIES_OR_KEYS.search(name)]:
        raise ValueError(
            f"besides {query} and {key} it has {' and '.join(more)}, which may compute queries or keys too"
        )
    projections = separate(*chosen)
    return AttentionSpec(
        projections if _weight_rows(module, value) == key_rows else projections[:2],
        heads,
        key_rows // dim,
        {"d": dim},
        qk_norm=any(is_active(getattr(module, name, None)) for name in _NORMS),
    )


def _weight_rows(module: nn.Module, name: str) -> int:
    """Output channels of the linear submodule of that name, possibly inside an adapter; 0 if there is none."""
    # Not getattr: a compiled module forwards the attributes of its original. Not named_children: it skips duplicates.
    child = module._modules.get(name)
    child = getattr(child, "base_layer", child)
    return child.out_features if isinstance(child, nn.Linear) else 0


def _first_int(module: nn.Module, names: tuple[str, ...]) -> int | None:
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _refusal(name: str, module: nn.Module, reason: str) -> str:
    weights = ", ".join(f"{n} {tuple(p.shape)}" for n, p in module.named_parameters() if p.ndim == 2)
    return (
        f"cannot read the attention {name!r} ({type(module).__name__}): {reason}. Its matrices: {weights or 'none'}.\n"
        "Let QKClip infer it from example=(args, kwargs), or describe it with a spec, here of separate projections (fused:"
        " Projection('wqkv', '[q(H d) | k(G d) | *]')):\n"
        f"    specs={{{name!r}: AttentionSpec((Projection('wq', 'q(H d)'), Projection('wk', 'k(G d)')), num_heads, "
        "num_key_value_heads, {'d': head_dim})}\n"
        f"or register its class with register_attention, or skip it with specs={{{name!r}: None}}."
    )
