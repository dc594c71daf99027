"""Routes parameters to optimizers: hidden matrices to Muon, everything else to AdamW."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parameter import Parameter, UninitializedParameter
from torch.optim import Optimizer

from lightning_muonclip.optim.names import all_names, bare_name
from lightning_muonclip.optim.parts import MatrixParts, parts_text
from lightning_muonclip.tables import table

#: Where the routers of experts may go.
ROUTERS = ("muon", "adamw")

#: Modules that multiply their input by their weights.
_PROJECTIONS = (nn.Linear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# Names of modules on the path to a parameter.
_EMBEDDING = re.compile(r"(?<!un)embed(?!_out)|(^|\.)w[tp]e(\.|$)")
#: Outside of repeated blocks; in a list, and of several layers, but not the blocks inside of a large head.
_HEAD = re.compile(
    r"([^\W\d]\w*\.)*((\w+_)?(head|classifier|logits|unembed|unembedding)s?(_\w+)?|\w+_predictor|score|embed_out|qa_outputs"
    r"|seq_relationship)(\.\d+)*(\.[^\W\d]\w*)*(\.\d+)?",
    re.IGNORECASE,
)
#: Common names of a last layer, which say little: only at the top of a model, beside its blocks, and of a layer that changes
#: the width.
_LAST = {"fc", "fc_out", "out", "output", "output_layer", "final_layer", "last_layer"}

# Names of classes and of parameters, by which a parameter that torch does not know is guessed to be a matrix.
_NOT_MULTIPLIED = re.compile(r"norm|embed|scale|bias|position", re.IGNORECASE)
_MULTIPLIED = re.compile(r"^weight$|proj")
_LORA = re.compile(r"(^|\.)lora_[AB](\.|$)")


@dataclass(frozen=True)
class Route:
    """The route of one parameter.

    ``algorithm`` is ``"muon"``, ``"adamw"``, ``"frozen"``, or the caller's name for an optimizer. ``kind`` is how Muon reads
    the parameter as matrices (see :data:`~lightning_muonclip.optim.parts.KINDS`). A ``reason`` that begins with "guess"
    rests on the names of a class and a parameter alone.
    """

    name: str
    param: Parameter
    algorithm: str
    reason: str
    kind: str = "matrix"


def route_params(
    module: nn.Module, exclude: Sequence[str] = (), include: Sequence[str] = (), router: str = "muon"
) -> list[Route]:
    """Routes every parameter of a module, in the order of ``named_parameters``; tied parameters once.

    A matrix is what multiplies activations: the weights of ``nn.Linear`` and its like go to Muon, unless they are an
    embedding or an output head, and so do expert stacks, parameters of shape ``(experts, m, n)`` in a module whose name or
    class contains "experts", every expert a matrix. A 2-D parameter of any other module is no matrix for its shape alone
    (tables, latents, states, biases of heads): only if it is called ``weight`` or a projection, a guess of which the reason
    tells. Muon gets a convolution only through ``include``, flattened to ``(out, in · kernel)``; it cannot take transposed
    or grouped convolutions. Any other included tensor of more than two dimensions is a batch of matrices.

    Args:
        module: The model.
        exclude: Shell-style patterns of parameter names to keep from Muon, such as ``"*.dense.weight"``. A parameter is
            known by all of its names: those of tied parameters, and with or without what wrappers add (``module.``,
            ``_orig_mod.``).
        include: Patterns of parameter names to give to Muon that it would not get by default.
        router: The optimizer of the routers of experts: ``"muon"``, as in torchtitan's recipes after Moonlight (arXiv
            2502.16982), or ``"adamw"``, as in Qwen3.8.

    Raises:
        TypeError: If ``module`` is not a module.
        ValueError: If a pattern matches no parameter, if ``include`` names a parameter that Muon cannot take, or if a lazy
            module has no shape yet.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"expected the model, an nn.Module, got {type(module).__name__}; pass the model itself instead of its"
            " parameters, since names and modules decide what is a hidden matrix"
        )
    for option, patterns in (("exclude", exclude), ("include", include)):
        if isinstance(patterns, str):
            raise ValueError(f"{option} must be a list of patterns, got {patterns!r}; use [{patterns!r}]")
    check_router(router)
    places = _places(module)
    for pattern in (*exclude, *include):
        if not any(place.matches([pattern]) for place in places):
            raise ValueError(
                f"the pattern {pattern!r} matches no parameter of {type(module).__name__}; check its spelling"
            )
    embeddings = [m.weight for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    looked_up = {id(weight) for weight in embeddings}
    shapes = {weight.shape for weight in embeddings}
    tops = _tops([place.paths[0] for place in places])
    experts = _numbers_of_experts(module, places)
    routes = []
    for place in places:
        algorithm, reason = _by_request(place, exclude, include) or _by_nature(
            place, id(place.param) in looked_up, shapes, tops, experts, router
        )
        routes.append(Route(place.names[0], place.param, algorithm, reason, place.kind or "matrix"))
    return routes


def check_router(router: str) -> None:
    """Raises ValueError unless routers of experts may go there."""
    if router not in ROUTERS:
        raise ValueError(f"router must be one of {', '.join(map(repr, ROUTERS))}, got {router!r}")


def split_params(
    module: nn.Module, exclude: Sequence[str] = (), include: Sequence[str] = (), router: str = "muon"
) -> list[dict[str, Any]]:
    """Splits a model into named parameter groups for :class:`~lightning_muonclip.Muon`.

    Args:
        module: The model. Frozen parameters are omitted.
        exclude: Shell-style patterns of parameter names to keep from Muon.
        include: Patterns of parameter names to give to Muon that it would not get by default.
        router: The optimizer of the routers of experts, ``"muon"`` or ``"adamw"`` (see :func:`route_params`).

    Returns:
        Groups such as ``{"name": "muon", "algorithm": "muon", "kind": "matrix", "params": [(name, parameter), ...]}``:
        one for each kind of Muon's parameters, and one for ``"adamw"``. ``print(routing_table(route_params(module)))``
        shows every route and its reason.

    Example:
        >>> groups = split_params(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4)))
        >>> [(g["algorithm"], [name for name, _ in g["params"]]) for g in groups]
        [('muon', ['1.weight']), ('adamw', ['0.weight', '1.bias'])]
    """
    routes = route_params(module, exclude, include, router)
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


@dataclass(frozen=True)
class RouteRow:
    """The routes of one parameter in repeated blocks, which is called ``name``, with ``*`` for the index."""

    algorithm: str
    name: str
    shape: tuple[int, ...]
    reason: str
    routes: list[Route]

    @property
    def elements(self) -> int:
        """Of all of them."""
        return sum(route.param.numel() for route in self.routes)


def routing_rows(routes: Iterable[Route], parts: MatrixParts | None = None) -> list[RouteRow]:
    """Routes that are alike in repeated blocks together: those of Muon first, frozen ones last.

    Args:
        routes: The routes.
        parts: The matrices inside of fused weights.
    """
    rows: dict[tuple[str, str, tuple[int, ...], str], list[Route]] = {}
    for route in routes:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", route.name)
        is_split = parts is not None and route.param in parts and route.algorithm == "muon"
        text = parts_text(parts[route.param]) if parts is not None and is_split else ""
        reason = ", ".join(filter(None, (route.reason, text)))
        rows.setdefault((route.algorithm, pattern, tuple(route.param.shape), reason), []).append(route)
    order = {"muon": 0, "frozen": 2}  # all others in between
    found = [RouteRow(*row, members) for row, members in rows.items()]
    return sorted(found, key=lambda row: order.get(row.algorithm, 1))


def routing_table(routes: Iterable[Route], parts: MatrixParts | None = None) -> str:
    """A printable table of routes; see :func:`routing_rows`."""
    cells = [("goes to", "parameter", "shape", "count", "elements", "why")]
    for row in routing_rows(routes, parts):
        shape = "x".join(map(str, row.shape)) or "scalar"
        cells.append((row.algorithm, row.name, shape, str(len(row.routes)), f"{row.elements:,}", row.reason))
    return table(cells, right=(3, 4))


@dataclass(frozen=True, eq=False)
class _Place:
    """A parameter, its names, and the modules that own it."""

    param: Parameter
    names: list[str]
    owners: list[nn.Module]

    @property
    def paths(self) -> list[list[str]]:
        """The bare names, split: the modules on the way to the parameter, and its own name."""
        return [path.split(".") for path in dict.fromkeys(map(bare_name, self.names))]

    @property
    def kind(self) -> str | None:
        """How Muon reads the parameter as matrices; ``None`` if it cannot."""
        owner = self.owners[0]
        if self.param.ndim < 2 or self.param.is_complex() or isinstance(owner, _TRANSPOSED_CONVOLUTIONS):
            return None
        if isinstance(owner, _CONVOLUTIONS):
            return "convolution" if owner.groups == 1 else None
        return "matrix" if self.param.ndim == 2 else "experts"

    def matches(self, patterns: Sequence[str]) -> bool:
        """Whether one of the names matches one of the patterns."""
        return any(fnmatchcase(name, pattern) for name in self.names for pattern in patterns)


def _places(module: nn.Module) -> list[_Place]:
    modules = dict(module.named_modules())
    owners: dict[Parameter, list[nn.Module]] = defaultdict(list)
    for path, owner in modules.items():
        user = modules[re.sub(r"\.?parametrizations\.\w+$", "", path)] if "parametrizations" in path else owner
        for param in owner.parameters(recurse=False):
            owners[param].append(user)  # a parametrized weight belongs to the module that uses it
    places = []
    for param, names in all_names(module).items():
        if isinstance(param, UninitializedParameter):
            raise ValueError(
                f"{names[0]} is an UninitializedParameter of a lazy module and has no shape yet, which decides where it"
                " goes; run a forward first"
            )
        places.append(_Place(param, names, owners[param]))
    return places


def _by_request(place: _Place, exclude: Sequence[str], include: Sequence[str]) -> tuple[str, str] | None:
    param, kind = place.param, place.kind
    if not param.requires_grad:
        return "frozen", "requires no gradient"
    if place.matches(exclude):
        return "adamw", "excluded by name"
    if not place.matches(include):
        return None
    if kind is None:
        raise ValueError(
            f"include matches {place.names[0]} of shape {tuple(param.shape)}, which is not a matrix or a stack of matrices"
            f" of real numbers ({param.dtype}), or belongs to a grouped or transposed convolution; remove it from include"
        )
    return "muon", f"included by name{'' if kind == 'matrix' else f', as {kind}'}"


def _by_nature(
    place: _Place,
    is_looked_up: bool,
    embeddings: set[Any],
    tops: set[tuple[str, ...]],
    experts: dict[tuple[str, ...], int],
    router: str,
) -> tuple[str, str]:
    param, kind, paths = place.param, place.kind, place.paths
    classes = [type(owner).__name__ for owner in place.owners]
    own_name = paths[0][-1]
    if is_looked_up or any(_EMBEDDING.search(".".join(path)) and not _in_block(path[:-2]) for path in paths):
        return "adamw", "embedding"
    if param.is_complex():
        return "adamw", "complex numbers"
    if any("experts" in part.lower() for part in (*paths[0][:-1], *classes)):
        if "bias" in own_name:
            return "adamw", "biases of experts"
        if kind == "experts" and min(param.shape[-2:]) > 1:
            return "muon", "expert stack"
    if kind != "matrix" or min(param.shape) == 1:
        return "adamw", "vector" if sum(size > 1 for size in param.shape) < 2 else f"{param.ndim}-D tensor"
    if any(_is_head(path, tops, param, embeddings) for path in paths):
        return "adamw", "output head"
    if any(_is_router(path, classes, param, experts) for path in paths):
        return router, "router of experts"
    if any(_LORA.search(name) for name in place.names):
        return "muon", "LoRA factor"
    if any(isinstance(owner, _PROJECTIONS) for owner in place.owners) and "weight" in own_name:
        return "muon", "hidden matrix"
    guess = f"guess: {own_name} of {classes[0]} is"
    if _MULTIPLIED.search(own_name) and not _NOT_MULTIPLIED.search(classes[0]):
        return "muon", f"{guess} a matrix"
    return "adamw", f"{guess} no matrix"


def _in_block(path: Sequence[str]) -> bool:
    """Whether a path leads into a repeated block, such as ``layers.3``."""
    return any(part.isdigit() for part in path)


def _tops(paths: Sequence[list[str]]) -> set[tuple[str, ...]]:
    """The paths of whole models: of the module that holds all parameters, and of those that hold repeated blocks."""
    depths = enumerate(zip(*paths))
    whole = next((depth for depth, parts in depths if len(set(parts)) > 1), 0)
    blocks = (next((i for i, part in enumerate(path) if part.isdigit()), 0) for path in paths)
    return {tuple(paths[0][:whole])} | {tuple(path[: i - 1]) for path, i in zip(paths, blocks) if i} if paths else set()


def _is_head(path: list[str], tops: set[tuple[str, ...]], param: Parameter, embeddings: set[Any]) -> bool:
    modules = path[:-1]
    if _HEAD.fullmatch(".".join(modules)):
        return True
    if _in_block(modules[:-1]):
        return False
    *outer, last = [part for part in modules if not part.isdigit()] or [""]
    is_last = last in _LAST and tuple(outer) in tops and param.shape[0] != param.shape[1]
    return param.shape in embeddings or modules[-1:] == ["output"] or is_last


def _numbers_of_experts(module: nn.Module, places: Sequence[_Place]) -> dict[tuple[str, ...], int]:
    """The number of experts in each module that has some, by its path."""
    found: dict[tuple[str, ...], int] = {}
    lists = {
        bare_name(f"{name}.").rstrip("."): len(m) for name, m in module.named_modules() if isinstance(m, nn.ModuleList)
    }
    for place in places:
        path = place.paths[0]
        for i, part in enumerate(path):
            if "experts" in part:
                number = lists.get(".".join(path[: i + 1])) or (place.param.shape[0] if place.param.ndim > 2 else 0)
                found[tuple(path[:i])] = max(number, found.get(tuple(path[:i]), 0))
                break
    return found


def _is_router(path: list[str], classes: list[str], param: Parameter, experts: dict[tuple[str, ...], int]) -> bool:
    """Whether a matrix scores experts: it is called so, or gives one number for each of the experts beside it."""
    if any("router" in part.lower() for part in (*path, *classes)):
        return True
    return any(experts.get(tuple(path[:depth])) == param.shape[0] for depth in (len(path) - 2, len(path) - 1))
