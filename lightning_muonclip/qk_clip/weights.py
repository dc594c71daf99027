"""The parameters behind a projection: weight and bias, or the base and the adapters of LoRA; refuses what cannot scale."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from lightning_muonclip.qk_clip.layout import ChannelMap, compile_layout, layout_kinds
from lightning_muonclip.qk_clip.spec import AttentionSpec, Projection

LORA_CHOICES = ("monitor", "scale")


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
        ValueError: If a parameter is missing, quantized, parametrized or behind an adapter other than LoRA, or if a
            layout does not fit.
    """
    weights = []
    for projection in projections:
        if layout_kinds(projection.layout) == {"*"}:
            continue
        for path, dim in _paths(module, name, projection):
            param = _scalable(module, name, path)
            dim %= param.ndim
            try:
                channels = compile_layout(projection.layout, param.shape[dim], spec.sizes, shared=shared)
            except ValueError as error:
                raise ValueError(f"attention {name!r}, {path}: {error}") from error
            trained = param.requires_grad or is_adapted(module, projection)
            weights.append(Weight(path, dim, channels, projection.offset, trained))
    return weights


def _child(module: nn.Module, projection: Projection) -> Any:
    try:
        return module.get_submodule(projection.name)
    except AttributeError:
        return None


def _paths(module: nn.Module, name: str, projection: Projection) -> list[tuple[str, int]]:
    """Path and channel dimension of every parameter of a projection; a bias follows its weight."""
    child = _child(module, projection)
    if child is None:
        return [(projection.name, projection.dim)]
    base, adapters = projection.name, {}
    if is_adapted(module, projection):
        base, adapters = f"{projection.name}.base_layer", dict(getattr(child, "lora_B", {}))
        if not adapters or len(getattr(child, "lora_magnitude_vector", ())):
            raise ValueError(
                f"{name}.{projection.name} is adapted by {type(child).__name__}, of which QK-Clip can scale only plain LoRA;"
                f" watch it with lora='monitor', or leave it alone with specs={{{name!r}: None}}"
            )
        child = child.base_layer
    paths = [(f"{base}.weight", projection.dim)]
    if getattr(child, "bias", None) is not None:
        paths.append((f"{base}.bias", 0))
    for adapter, linear in adapters.items():
        paths.append((f"{projection.name}.lora_B.{adapter}.weight", 0))
        if linear.bias is not None:
            paths.append((f"{projection.name}.lora_B.{adapter}.bias", 0))
    return paths


def _scalable(module: nn.Module, name: str, path: str) -> Tensor:
    owner_path, _, leaf = path.rpartition(".")
    owner = module.get_submodule(owner_path)
    reason = ""
    param = dict(owner.named_parameters(recurse=False)).get(leaf)
    if param is None:
        reason = "is no parameter"
        if parametrize.is_parametrized(owner, leaf) or f"{leaf}_g" in dict(owner.named_parameters(recurse=False)):
            reason = f"is parametrized: {type(owner).__name__} computes it from others"
    elif type(param) not in (nn.Parameter, DTensor) or not param.is_floating_point() or param.dtype.itemsize == 1:
        kind = type(param).__name__ if type(param) is not nn.Parameter else param.dtype
        reason = f"is quantized or otherwise special ({kind}): multiplied, it would not be the same weight scaled"
    if reason:
        raise ValueError(
            f"{name}.{path} {reason}, so QK-Clip cannot scale it. Train a plain weight there, pass threshold=None to only"
            f" watch its logits, or leave the module alone with specs={{{name!r}: None}}"
        )
    assert param is not None
    return param
