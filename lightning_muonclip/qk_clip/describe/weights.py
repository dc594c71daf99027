"""The parameters behind a projection: weight and bias, or the base and the adapters of LoRA; refuses what cannot scale."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from lightning_muonclip.qk_clip.describe.layout import QUERY_KINDS, ChannelMap, compile_layout, layout_kinds
from lightning_muonclip.qk_clip.describe.names import library, qualified_name
from lightning_muonclip.qk_clip.describe.spec import AttentionSpec, Projection

LORA_CHOICES = ("monitor", "scale")


class UnscalableError(ValueError):
    """A factor on a weight would not do what it has to; ``reason`` says why in a few words."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Weight:
    """One parameter that makes queries or keys.

    Attributes:
        path: Its name inside the attention module.
        dim: The dimension that the channels lie on.
        channels: What each of them is.
        offset: What the module adds before it multiplies.
        trained: Whether the optimizer changes it, or for a base of LoRA the adapters beside it.
    """

    path: str
    dim: int
    channels: ChannelMap
    offset: float
    trained: bool

    def has_kind(self, kinds: tuple[str, ...]) -> bool:
        """Whether any channel is of one of these kinds."""
        return bool(self.channels.of_kind(kinds).any())


def is_adapted(module: nn.Module, projection: Projection) -> bool:
    """Whether an adapter such as LoRA of the library peft is wrapped around a projection."""
    return hasattr(_child(module, projection), "base_layer")


def weights_of(
    module: nn.Module, name: str, projections: Iterable[Projection], spec: AttentionSpec, *, shared: bool = False
) -> list[Weight]:
    """Every parameter of these projections that makes queries or keys.

    Of a weight that LoRA adapts, these are the base and every ``B``: the product ``B A`` has the rows of ``B``, so that the
    sum is scaled exactly.

    Args:
        module: The attention module.
        name: Its name, for messages.
        projections: Its projections, or the gains of its norms.
        spec: Tells the sizes.
        shared: Whether a channel may belong to all heads (gains).

    Raises:
        UnscalableError: If a parameter is quantized, parametrized or behind an adapter other than LoRA.
        ValueError: If a parameter is missing, or a layout does not fit.
    """
    weights = []
    for projection in projections:
        if layout_kinds(projection.layout) == {"*"}:
            continue
        for path, dim, offset in _paths(module, name, projection):
            param = _scalable(module, name, path)
            if not -param.ndim <= dim < param.ndim:
                raise ValueError(f"attention {name!r}, {path}: it has {param.ndim} dimensions, so none is dim={dim}")
            dim %= param.ndim
            channels = channel_map(name, path, projection.layout, param.shape[dim], spec, shared=shared)
            trained = param.requires_grad or is_adapted(module, projection)
            weights.append(Weight(path, dim, channels, offset, trained))
    return weights


def query_weight(module: nn.Module, spec: AttentionSpec) -> tuple[Tensor | None, int]:
    """The first weight that makes queries, if it is a parameter, and the dimension that its channels lie on."""
    for projection in spec.projections:
        if layout_kinds(projection.layout) & set(QUERY_KINDS):
            child = _child(module, projection)
            weight = projection.name if child is None else f"{projection.name}.weight"
            if is_adapted(module, projection):
                weight = f"{projection.name}.base_layer.weight"
            return dict(module.named_parameters()).get(weight), projection.dim
    return None, 0


def channel_map(
    name: str, path: str, layout: str, channels: int, spec: AttentionSpec, *, shared: bool = False
) -> ChannelMap:
    """:func:`.layout.compile_layout` with errors that name the attention and the parameter."""
    try:
        return compile_layout(layout, channels, spec.sizes, shared=shared)
    except ValueError as error:
        raise ValueError(f"attention {name!r}, {path}: {error}") from error


def _child(module: nn.Module, projection: Projection) -> Any:
    try:
        return module.get_submodule(projection.name)
    except AttributeError:
        return None


def _paths(module: nn.Module, name: str, projection: Projection) -> list[tuple[str, int, float]]:
    """Path, channel dimension and offset of every parameter of a projection; a bias follows its weight."""
    child = _child(module, projection)
    if child is None:
        return [(projection.name, projection.dim, projection.offset)]
    base, adapters = projection.name, {}
    if is_adapted(module, projection):
        base, adapters = f"{projection.name}.base_layer", dict(getattr(child, "lora_B", {}))
        is_plain = adapters and all(isinstance(adapter, nn.Linear) for adapter in adapters.values())
        if not is_plain or len(getattr(child, "lora_magnitude_vector", ())):
            kind = "DoRA" if is_plain else qualified_name(type(child))  # peft calls many layers Linear
            raise UnscalableError(
                f"adapted by {kind}",
                f"{_under(name, projection.name)} is adapted by {kind}, and QK-Clip can scale only plain LoRA; watch it with"
                f" lora='monitor', or leave it alone with specs={{{name!r}: None}}",
            )
        child = child.base_layer
    paths = [(f"{base}.weight", projection.dim, projection.offset)]
    if isinstance(getattr(child, "bias", None), Tensor):
        paths.append((f"{base}.bias", 0, 0.0))
    for adapter, linear in adapters.items():
        paths.append((f"{projection.name}.lora_B.{adapter}.weight", 0, 0.0))
        if linear.bias is not None:
            paths.append((f"{projection.name}.lora_B.{adapter}.bias", 0, 0.0))
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
            f"attention {name!r} has no parameter {path!r}, which its spec names; it has {known or 'none'}, as"
            f" {type(module).__name__} of {library(type(module))}. Describe it by specs={{{name!r}: AttentionSpec(...)}}, or"
            f" leave it alone with specs={{{name!r}: None}}"
        )
    reason = None
    if param is None:
        reason = f"no parameter of {qualified_name(type(owner))}"
        if parametrize.is_parametrized(owner, leaf) or any(other.startswith(f"{leaf}_") for other in own):
            reason = "parametrized"  # made anew in every forward
    elif type(param) not in (nn.Parameter, DTensor):
        reason = f"a {type(param).__name__}"  # which multiplied need not be the same weight scaled
    elif not param.is_floating_point() or param.itemsize == 1:
        reason = f"quantized ({param.dtype})"
    if reason is not None:
        raise UnscalableError(
            f"{path} is {reason}",
            f"{_under(name, path)} is {reason}, so QK-Clip cannot scale it. Train a plain weight there, pass threshold=None"
            f" to only watch its logits, or leave the module alone with specs={{{name!r}: None}}",
        )
    assert param is not None
    return param


def _under(name: str, path: str) -> str:
    return f"{name}.{path}" if name else path
