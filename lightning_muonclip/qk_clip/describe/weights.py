"""The parameters of a projection that a clip scales: weight and bias, or the base and the adapters of LoRA."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from lightning_muonclip.qk_clip.describe.layout import QUERY_KINDS, ChannelMap, compile_layout, layout_kinds
from lightning_muonclip.qk_clip.describe.names import library, qualified_name
from lightning_muonclip.qk_clip.describe.spec import AttentionSpec, Projection

LORA_CHOICES = ("monitor", "scale")


class UnscalableError(ValueError):
    """A weight that QK-Clip cannot scale; ``reason`` says why in a few words."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Weight:
    """One parameter that computes queries or keys.

    Attributes:
        path: Its name inside the attention module.
        dims: Its output dimensions, which ascend.
        channels: The kind and head of each channel, flattened in the order of ``dims``.
        offset: The number that the module adds to the parameter before it multiplies.
        trained: Whether the parameter, or for a LoRA base its adapters, is trained.
    """

    path: str
    dims: tuple[int, ...]
    channels: ChannelMap
    offset: float
    trained: bool

    def has_kind(self, kinds: tuple[str, ...]) -> bool:
        """Whether any channel is of one of these kinds."""
        return bool(self.channels.of_kind(kinds).any())


def is_adapted(module: nn.Module, projection: Projection) -> bool:
    """Whether a projection is wrapped in an adapter, such as peft's LoRA, or part of one."""
    child: Any = module
    for name in projection.name.split("."):
        child = getattr(child, name, None)
        if _is_adapter(child):
            return True
    return False


def weights_of(
    module: nn.Module, name: str, projections: Iterable[Projection], spec: AttentionSpec, *, shared: bool = False
) -> list[Weight]:
    """Every parameter of these projections that computes queries or keys.

    For a weight with LoRA adapters, these are the base and every ``B``. The rows of the product ``B A`` scale with those of
    ``B``, so the sum is scaled exactly.

    Args:
        module: The attention module.
        name: Its name, for messages.
        projections: Its projections, or the gains of its norms.
        spec: Its spec, for the sizes.
        shared: Whether a channel may belong to all heads (gains).

    Raises:
        UnscalableError: If a parameter is quantized, parametrized or behind an adapter other than LoRA.
        ValueError: If a parameter is missing, or if a layout does not match.
    """
    weights = []
    for projection in projections:
        if layout_kinds(projection.layout) == {"*"}:
            continue
        for path, dims, offset in _paths(module, name, projection):
            param = _scalable(module, name, path)
            dims, channels = channel_map(name, path, projection.layout, dims, param, spec, shared=shared)
            trained = param.requires_grad or is_adapted(module, projection)
            weights.append(Weight(path, dims, channels, offset, trained))
    return weights


def query_weight(module: nn.Module, spec: AttentionSpec) -> tuple[Tensor | None, tuple[int, ...]]:
    """The first weight that computes queries, or ``None`` if it is not a parameter; and its output dimensions."""
    for projection in spec.projections:
        if layout_kinds(projection.layout) & set(QUERY_KINDS):
            child = _child(module, projection)
            weight = projection.name if child is None else f"{projection.name}.weight"
            if _is_adapter(child):
                weight = f"{projection.name}.base_layer.weight"
            return dict(module.named_parameters()).get(weight), projection.dims
    return None, ()


def channel_map(
    name: str,
    path: str,
    layout: str | ChannelMap,
    dims: tuple[int, ...],
    param: Tensor,
    spec: AttentionSpec,
    *,
    shared: bool = False,
) -> tuple[tuple[int, ...], ChannelMap]:
    """The channels of a parameter, and the dimensions that they lie on, both in ascending order of the dimensions.

    Args:
        name: Name of the attention, for messages.
        path: Name of the parameter, for messages.
        layout: Its channels, flattened in the order of ``dims``.
        dims: Its output dimensions.
        param: The parameter.
        spec: The spec, for the sizes.
        shared: Whether a channel may belong to all heads (gains).

    Raises:
        ValueError: If there are no such dimensions, or if the layout does not match them.

    Example:
        >>> spec = AttentionSpec((), num_heads=2, sizes={"d": 3})
        >>> dims, channels = channel_map("attn", "wq", "q(H d)", (2, 0), torch.empty(3, 8, 2), spec)
        >>> dims, channels.heads.view(3, 2).tolist()
        ((0, 2), [[0, 1], [0, 1], [0, 1]])
    """
    try:
        for dim in dims:
            if not -param.ndim <= dim < param.ndim:
                raise ValueError(f"dim={dim} is out of range for {param.ndim} dimensions")
        dims = tuple(dim % param.ndim for dim in dims)
        if len(set(dims)) < len(dims):
            raise ValueError(f"dim={dims} names a dimension twice")
        sizes = [param.shape[dim] for dim in dims]
        channels = compile_layout(layout, math.prod(sizes), spec.sizes, shared=shared)
    except ValueError as error:
        raise ValueError(f"attention {name!r}, {path}: {error}") from error
    ascending = sorted(range(len(dims)), key=dims.__getitem__)
    order = torch.arange(math.prod(sizes)).view(sizes).permute(ascending).flatten()
    return tuple(sorted(dims)), ChannelMap(channels.kinds[order], channels.heads[order])


def _child(module: nn.Module, projection: Projection) -> Any:
    try:
        return module.get_submodule(projection.name)
    except AttributeError:
        return None


def _is_adapter(child: Any) -> bool:
    return hasattr(child, "base_layer")


def _paths(module: nn.Module, name: str, projection: Projection) -> list[tuple[str, tuple[int, ...], float]]:
    """Path, output dimensions and offset of every parameter of a projection; a bias follows its weight."""
    child = _child(module, projection)
    if child is None:
        return [(projection.name, projection.dims, projection.offset)]
    base, adapters = projection.name, {}
    if _is_adapter(child):
        base, adapters = f"{projection.name}.base_layer", dict(getattr(child, "lora_B", {}))
        is_plain = adapters and all(isinstance(adapter, nn.Linear) for adapter in adapters.values())
        if not is_plain or len(getattr(child, "lora_magnitude_vector", ())):
            kind = "DoRA" if is_plain else qualified_name(type(child))  # peft calls many layers Linear
            raise UnscalableError(
                f"adapted by {kind}",
                f"{_under(name, projection.name)} is adapted by {kind}, but QK-Clip can scale only plain LoRA; watch it with"
                f" lora='monitor', or skip it with specs={{{name!r}: None}}",
            )
        child = child.base_layer
    paths = [(f"{base}.weight", projection.dims, projection.offset)]
    bias = getattr(child, "bias", None)
    if isinstance(bias, Tensor):
        paths.append((f"{base}.bias", tuple(range(bias.ndim)), 0.0))
    for adapter, linear in adapters.items():
        paths.append((f"{projection.name}.lora_B.{adapter}.weight", (0,), 0.0))
        if linear.bias is not None:
            paths.append((f"{projection.name}.lora_B.{adapter}.bias", (0,), 0.0))
    return paths


def _scalable(module: nn.Module, name: str, path: str) -> Tensor:
    owner_path, _, leaf = path.rpartition(".")
    try:
        owner = module.get_submodule(owner_path)
    except AttributeError:
        owner = nn.Module()
    own = dict(owner.named_parameters(recurse=False))
    param = own.get(leaf)
    if param is None and not hasattr(owner, leaf):
        known = ", ".join(known for known, _ in module.named_parameters())
        raise ValueError(
            f"attention {name!r} has no parameter {path!r}, which its spec names; the parameters of"
            f" {type(module).__name__} of {library(type(module))} are: {known or 'none'}. Describe it with"
            f" specs={{{name!r}: AttentionSpec(...)}}, or skip it with specs={{{name!r}: None}}"
        )
    reason = None
    if param is None:
        reason = f"not a parameter of {qualified_name(type(owner))}"
        if parametrize.is_parametrized(owner, leaf) or any(other.startswith(f"{leaf}_") for other in own):
            reason = "parametrized"  # recomputed in every forward
    elif type(param) not in (nn.Parameter, DTensor):
        reason = f"a {type(param).__name__}"  # multiplying it need not scale the weight that it stands for
    elif not param.is_floating_point() or param.itemsize == 1:
        reason = f"quantized ({param.dtype})"
    if reason is not None:
        raise UnscalableError(
            f"{path} is {reason}",
            f"QK-Clip cannot scale {_under(name, path)}: it is {reason}. Use a plain weight there, pass threshold=None to"
            f" only watch its logits, or skip the module with specs={{{name!r}: None}}",
        )
    assert param is not None
    return param


def _under(name: str, path: str) -> str:
    return f"{name}.{path}" if name else path
