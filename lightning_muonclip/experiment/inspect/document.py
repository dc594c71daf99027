"""A look as a document for machines; docs/inspect.md describes every field."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

from lightning_muonclip.experiment.inspect.look import WAYS_OUT, Attention, Look
from lightning_muonclip.optim.orthogonalize import working_dtype

#: The version of the schema: another number whenever a field changes its meaning or is dropped.
SCHEMA = 1


def document(look: Look) -> dict[str, Any]:
    """Everything that is printed, in plain containers."""
    model, target = look.target.model, look.target
    params = list(model.parameters())
    return {
        "schema": SCHEMA,
        "target": target.title,
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in params),
        "trainable_parameters": sum(p.numel() for p in params if p.requires_grad),
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in params}),
        "has_values": look.has_values,
        "inputs": {"source": target.inputs, "tensors": _tensors(target.example)},
        "options": {name: _plain(value) for name, value in target.options.items()},
        "routes": [
            {
                "algorithm": row.algorithm,
                "parameter": row.name,
                "shape": list(row.shape),
                "count": len(row.routes),
                "elements": row.elements,
                "reason": row.reason,
            }
            for row in look.rows
        ],
        "attention": None if look.attention is None else [_attention(own) for own in look.attention],
        "checked_on_whole_model": look.attention is not None and look.has_values,
        "no_logits": [{"layers": names, "reason": reason} for reason, names in look.others.items()],
        "passed_over": [{"modules": names, "reason": reason} for reason, names in look.passed_over.items()],
        "optimizer_state": _state(look),
        "flops": flops(look),
        "refusals": [{"layers": own.names, "reason": own.watched, "ways_out": ways_out(own)} for own in look.refused],
        "refusal": look.refusal,
        "notes": list(look.notes),
        "exit_code": int(look.stops),
    }


def ways_out(own: Attention) -> list[str]:
    """What can be done about attention that cannot be read."""
    return [way.format(name=own.names[0]) for way in WAYS_OUT]


def _attention(own: Attention) -> dict[str, Any]:
    return {
        "layers": own.names,
        "class": own.kind,
        "num_heads": own.num_heads,
        "num_key_value_heads": own.num_key_value_heads,
        "layout": own.layout,
        "clips": own.clips,
        "watched": own.watched,
        "refused": own.is_refused,
        "proof": {"on": list(own.proven_on), "error": own.error} if own.proven_on else None,
    }


def _state(look: Look) -> dict[str, Any]:
    ranks = look.ranks.state_bytes()
    return {
        "strategy": look.strategy,
        "ranks": look.ranks.count,
        "bytes": [asdict(own) | {"total": own.total} for own in ranks],
        "adamw_alone_bytes": adamw_alone(look),
    }


def adamw_alone(look: Look) -> int:
    """Bytes of AdamW's moments on the first rank, which is the fullest, if it stepped everything."""
    params = [route.param for row in look.rows if row.algorithm != "frozen" for route in row.routes]
    return sum(2 * p.itemsize * round(p.numel() * look.ranks.share(p, 0)) for p in params)


def flops(look: Look) -> dict[str, Any]:
    """Of one step: Muon's against the forward and backward of the model."""
    tokens, ranks = look.target.tokens, look.ranks
    model = 6 * look.multiplied.active * tokens
    muon, busiest = sum(ranks.flops), max(ranks.flops)
    device = next(look.target.model.parameters()).device
    return {
        "tokens": tokens,
        "model": model,
        "muon": muon,
        "muon_busiest_rank": busiest,
        "muon_share": busiest / (model / ranks.count) if model else 0.0,
        "dtype": str(look.target.options.get("dtype") or working_dtype(device)).removeprefix("torch."),
        "multiplied_parameters": look.multiplied.total,
        "active_parameters": look.multiplied.active,
        "assumed": look.multiplied.remark,
    }


def _tensors(example: Any) -> list[dict[str, Any]]:
    if example is None:
        return []
    leaves, _ = tree_flatten_with_path(example)
    return [
        {
            "name": ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path[1:]),
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype).removeprefix("torch."),
        }
        for path, leaf in leaves
        if isinstance(leaf, Tensor)
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(own) for own in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
