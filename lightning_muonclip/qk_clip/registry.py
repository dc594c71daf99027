"""Recognises attention modules: by the user's spec, then by class, then by names and shapes; or refuses and says why.

A new kind of attention is a row here, never a branch elsewhere. Classes are matched by name, so that no library has to be
imported to be supported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_muonclip.qk_clip.spec import AttentionSpec, Projection

SpecFn = Callable[[Any], AttentionSpec]

#: Names that query and key projections go by where they are separate modules.
SEPARATE_PROJECTIONS = (
    ("q_proj", "k_proj"),
    ("query", "key"),
    ("q_lin", "k_lin"),
    ("to_q", "to_k"),
    ("wq", "wk"),
    ("Wq", "Wk"),
    ("q", "k"),
)
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads", "num_q_heads", "nhead")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "num_query_groups", "kv_heads")
_HEAD_DIM = ("head_dim", "head_size", "attention_head_size", "d_head", "dim_head", "d_kv")
_NORMS = ("qk_norm", "q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_norm", "key_norm", "norm_q", "norm_k")


def _attention(module: Any) -> AttentionSpec:
    return AttentionSpec(
        (Projection("q_proj", "q(H d)"), Projection("k_proj", "k(G d)")),
        module.num_attention_heads,
        module.num_key_value_heads,
        {"d": module.head_dim},
        qk_norm=module.q_norm is not None,
    )


def _latent_attention(module: Any) -> AttentionSpec:
    query = "q_proj" if module.q_lora_rank is None else "q_b_proj"
    return AttentionSpec(
        (Projection(query, "(H [qn:n, qr:r])"), Projection("kv_b_proj", "(H [kn:n, *:v])")),
        module.num_attention_heads,
        sizes={"n": module.qk_nope_head_dim, "r": module.qk_rope_head_dim, "v": module.v_head_dim},
    )


_BY_CLASS: dict[str, SpecFn] = {
    "lightning_muonclip.attention.attention.Attention": _attention,
    "lightning_muonclip.attention.latent.MultiheadLatentAttention": _latent_attention,
}


def register_attention(cls: type[nn.Module] | str, spec_fn: SpecFn) -> None:
    """Teaches the library a class of attention modules, its subclasses included.

    Args:
        cls: The class, or its qualified name (``"package.module.Class"``).
        spec_fn: Takes a module of that class and returns its :class:`AttentionSpec`.
    """
    _BY_CLASS[cls if isinstance(cls, str) else _qualified_name(cls)] = spec_fn


def find_attention(
    model: nn.Module, specs: Mapping[str, AttentionSpec | None] | None = None
) -> dict[str, tuple[nn.Module, AttentionSpec]]:
    """All attention modules of a model by display name, in ``named_modules`` order; a shared module once.

    Args:
        model: The model.
        specs: The user's word, by module name; ``None`` as a value leaves that module alone.

    Raises:
        ValueError: If a name in ``specs`` is no module, a module looks like attention but cannot be read, or there is
            no attention at all.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    specs = {display_name(name): spec for name, spec in (specs or {}).items()}
    modules = {display_name(name): module for name, module in model.named_modules()}
    for name in specs:
        if name not in modules:
            raise ValueError(f"specs names {name!r}, but the model has no such module; named_modules() lists them")
    found: dict[str, tuple[nn.Module, AttentionSpec]] = {}
    refused: dict[str, str] = {}
    for name, module in modules.items():
        if name in specs:
            spec = specs[name]
        else:
            try:
                spec = _spec_of(module)
            except ValueError as error:
                refused[name] = str(error)
                continue
        if spec is not None:
            found[name] = (module, spec)
    for name, reason in refused.items():
        # A wrapper named "...Attention" around a module that was understood is no mystery of its own.
        if not any(other.startswith(f"{name}." if name else "") for other in found):
            raise ValueError(_refusal(name, modules[name], reason))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention that QK-Clip knows; describe it by specs={{name: AttentionSpec(...)}}"
            " or register_attention(cls, spec_fn), or switch QK-Clip off with logits='off'"
        )
    return found


def display_name(name: str) -> str:
    """A module's name without what torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _spec_of(module: nn.Module) -> AttentionSpec | None:
    for cls in type(module).__mro__:
        if spec_fn := _BY_CLASS.get(_qualified_name(cls)):
            return spec_fn(module)
    for query, key in SEPARATE_PROJECTIONS:
        if _weight_rows(module, query) and _weight_rows(module, key):
            return _separate_spec(module, query, key)
    if "attention" in type(module).__name__.lower() and any(p.ndim == 2 for p in module.parameters()):
        raise ValueError("its query and key projections are not separate modules with a known name")
    return None


def _separate_spec(module: nn.Module, query: str, key: str) -> AttentionSpec:
    query_rows, key_rows = _weight_rows(module, query), _weight_rows(module, key)
    heads, key_heads, dim = (_first_int(module, names) for names in (_HEADS, _KEY_HEADS, _HEAD_DIM))
    if heads is None and dim is not None:
        heads = query_rows // dim
    if heads is None or query_rows % heads:
        raise ValueError(f"{query} has {query_rows} rows, and no attribute ({', '.join(_HEADS)}) says how many heads")
    dim = query_rows // heads
    if key_rows % dim or (key_heads is not None and key_heads * dim != key_rows):
        raise ValueError(f"{key} has {key_rows} rows, which are not whole heads of {dim} channels")
    return AttentionSpec(
        (Projection(query, "q(H d)"), Projection(key, "k(G d)")),
        heads,
        key_rows // dim,
        {"d": dim},
        qk_norm=any(
            isinstance(getattr(module, n, None), nn.Module) and _has_effect(getattr(module, n)) for n in _NORMS
        ),
    )


def _weight_rows(module: nn.Module, name: str) -> int:
    """Output channels of a plain linear submodule of that name; 0 if there is none."""
    child = dict(module.named_children()).get(
        name
    )  # not getattr: a compiled module passes on its original's attributes
    return child.weight.shape[0] if isinstance(child, nn.Linear) else 0


def _first_int(module: nn.Module, names: tuple[str, ...]) -> int | None:
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _has_effect(norm: nn.Module) -> bool:
    return not isinstance(norm, nn.Identity)


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _refusal(name: str, module: nn.Module, reason: str) -> str:
    weights = ", ".join(f"{n} {tuple(p.shape)}" for n, p in module.named_parameters() if p.ndim == 2)
    return (
        f"cannot read the attention {name!r} ({type(module).__name__}): {reason}. It has {weights or 'no matrices'}.\n"
        "Describe it by its weights, separate as here or fused as Projection('wqkv', '[q(H d) | k(G d) | *]'):\n"
        f"    specs={{{name!r}: AttentionSpec((Projection('wq', 'q(H d)'), Projection('wk', 'k(G d)')), num_heads, "
        "num_key_value_heads, {'d': head_dim})}\n"
        f"or for the class by register_attention, or leave it alone with specs={{{name!r}: None}}."
    )
