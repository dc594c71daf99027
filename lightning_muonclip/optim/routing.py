"""Routes parameters to optimizers: hidden matrices to Muon, everything else to AdamW."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_muonclip.tables import table

_HEADS = {"lm_head", "head", "classifier", "score", "embed_out", "unembed", "unembedding", "to_logits", "qa_outputs"}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDING = re.compile(r"(?<!un)embed(?!_out)|(^|\.)w[tp]e(\.|$)")


@dataclass(frozen=True)
class Route:
    """The route of one parameter.

    ``algorithm`` is ``"muon"``, ``"adamw"``, ``"frozen"``, or the caller's name for an optimizer. ``kind`` is how Muon reads
    the parameter as matrices (see :data:`~lightning_muonclip.optim.stacking.KINDS`).
    """

    name: str
    param: Parameter
    algorithm: str
    reason: str
    kind: str = "matrix"


def route_params(module: nn.Module, exclude: Sequence[str] = (), include: Sequence[str] = ()) -> list[Route]:
    """Routes every parameter of a module, in the order of ``named_parameters``; tied parameters once.

    Muon gets matrices that are neither an embedding nor an output head, and expert stacks: parameters of shape
    ``(experts, m, n)`` whose module name contains "experts", every expert a matrix. It gets a convolution only through
    ``include``, flattened to ``(out, in · kernel)``; it cannot take transposed or grouped convolutions. Any other included
    tensor of more than two dimensions is a batch of matrices.

    Args:
        module: The model.
        exclude: Shell-style patterns of parameter names to keep from Muon, such as ``"*.router.weight"``.
        include: Patterns of parameter names to give to Muon that it would not get by default.

    Raises:
        ValueError: If a pattern matches no parameter, or if ``include`` names a parameter that Muon cannot take.
    """
    for option, patterns in (("exclude", exclude), ("include", include)):
        if isinstance(patterns, str):
            raise ValueError(f"{option} must be a list of patterns, got {patterns!r}; use [{patterns!r}]")
    names = [name for name, _ in module.named_parameters()]
    for pattern in (*exclude, *include):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"the pattern {pattern!r} matches no parameter of {type(module).__name__}; check its spelling"
            )
    owners = {param: owner for owner in module.modules() for param in owner.parameters(recurse=False)}
    embeddings = [m.weight for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    routes = []
    for name, param in module.named_parameters():
        kind = _kind(param, owners[param])
        algorithm, reason = _decide(name, param, kind, embeddings, exclude, include)
        routes.append(Route(name, param, algorithm, reason, kind or "matrix"))
    return routes


def split_params(module: nn.Module, exclude: Sequence[str] = (), include: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Splits a model into named parameter groups for :class:`~lightning_muonclip.Muon`.

    Args:
        module: The model. Frozen parameters are omitted.
        exclude: Shell-style patterns of parameter names to keep from Muon.
        include: Patterns of parameter names to give to Muon although they look like an embedding or an output head.

    Returns:
        Groups such as ``{"name": "muon", "algorithm": "muon", "kind": "matrix", "params": [(name, parameter), ...]}``:
        one for each kind of Muon's parameters, and one for ``"adamw"``. ``print(routing_table(route_params(module)))``
        shows every route and its reason.

    Example:
        >>> groups = split_params(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4)))
        >>> [(g["algorithm"], [name for name, _ in g["params"]]) for g in groups]
        [('muon', ['1.weight']), ('adamw', ['0.weight', '1.bias'])]
    """
    routes = route_params(module, exclude, include)
    groups = []
    for name, algorithm, kind in (
        ("muon", "muon", "matrix"),
        ("experts", "muon", "experts"),
        ("convolutions", "muon", "convolution"),
        ("adamw", "adamw", None),
    ):
        params = [(r.name, r.param) for r in routes if r.algorithm == algorithm and kind in (None, r.kind)]
        if params:
            groups.append({"params": params, "algorithm": algorithm, "name": name} | ({"kind": kind} if kind else {}))
    return groups


def routes_under(optimizer: Optimizer, routes: Iterable[Route]) -> list[Route]:
    """Routes with ``"adamw"`` replaced by the name of the user's optimizer, for the parameters that it owns."""
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    name = type(optimizer).__name__
    named = []
    for route in routes:
        if route.algorithm != "frozen" and route.param not in owned:
            route = replace(route, algorithm="no optimizer", reason=f"in no group of {name}")
        elif route.algorithm == "adamw":
            route = replace(route, algorithm=name)
        named.append(route)
    return named


def routing_table(routes: Iterable[Route]) -> str:
    """A printable table of routes. The same parameter of repeated blocks is one row, with ``*`` for the index."""
    rows: dict[tuple[str, ...], list[Route]] = {}
    for route in routes:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", route.name)
        shape = "x".join(map(str, route.param.shape)) or "scalar"
        rows.setdefault((route.algorithm, pattern, shape, route.reason), []).append(route)
    order = {"muon": 0, "frozen": 2}  # all others in between
    cells = [("goes to", "parameter", "shape", "count", "elements", "why")]
    for (algorithm, pattern, shape, reason), members in sorted(rows.items(), key=lambda row: order.get(row[0][0], 1)):
        elements = sum(route.param.numel() for route in members)
        cells.append((algorithm, pattern, shape, str(len(members)), f"{elements:,}", reason))
    return table(cells, right=(3, 4))


def _decide(
    name: str,
    param: Parameter,
    kind: str | None,
    embeddings: list[Tensor],
    exclude: Sequence[str],
    include: Sequence[str],
) -> tuple[str, str]:
    if not param.requires_grad:
        return "frozen", "requires no gradient"
    if any(fnmatchcase(name, pattern) for pattern in exclude):
        return "adamw", "excluded by name"
    if any(fnmatchcase(name, pattern) for pattern in include):
        if kind is None:
            raise ValueError(
                f"include matches {name} of shape {tuple(param.shape)}, which is not a matrix or a stack of matrices, or"
                " belongs to a grouped or transposed convolution; remove it from include"
            )
        return "muon", f"included by name{'' if kind == 'matrix' else f', as {kind}'}"
    if any(param is weight for weight in embeddings) or (_EMBEDDING.search(name) and not _in_block(name)):
        return "adamw", "embedding"
    if any("experts" in part for part in name.split(".")[:-1]):
        if "bias" in name.split(".")[-1]:
            return "adamw", "biases of experts"
        if kind == "experts" and min(param.shape[-2:]) > 1:
            return "muon", "expert stack"
    if kind != "matrix" or min(param.shape) == 1:
        return "adamw", "vector" if sum(size > 1 for size in param.shape) < 2 else f"{param.ndim}-D tensor"
    if _is_head(name, param, embeddings):
        return "adamw", "output head"
    return "muon", "hidden matrix"


def _kind(param: Parameter, owner: nn.Module) -> str | None:
    """How Muon reads a parameter as matrices; ``None`` if it cannot."""
    if param.ndim < 2:
        return None
    if isinstance(owner, _CONVOLUTIONS):
        return "convolution" if owner.groups == 1 else None
    if isinstance(owner, _TRANSPOSED_CONVOLUTIONS):
        return None
    return "matrix" if param.ndim == 2 else "experts"


def _in_block(name: str) -> bool:
    """Whether the parameter lies inside a repeated block: ``layers.3.mlp.up_proj.weight``, but not ``2.weight``."""
    return any(part.isdigit() for part in name.split(".")[:-2])


def _is_head(name: str, param: Parameter, embeddings: list[Tensor]) -> bool:
    if _in_block(name):
        return False
    path = name.split(".")[:-1]
    named_so = not _HEADS.isdisjoint(path) or path[-1:] == ["output"]
    return named_so or any(param.shape == weight.shape for weight in embeddings)
