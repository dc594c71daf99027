"""Maximal update parametrization (muP): hyperparameters tuned on a narrow model transfer to a wide one.

A model is compared with the same model at its base width. The dimensions that have grown determine the class of every
parameter, and the class determines how its init, learning rate and output scale. At the base width nothing changes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_muonclip.mup_classes import FINITE, INPUT, OUTPUT, Scale, classify
from lightning_muonclip.mup_forward import Forwards, Multiplier
from lightning_muonclip.optim.options import LR_ADJUSTMENTS
from lightning_muonclip.qk_clip.describe.declared import AttentionModules
from lightning_muonclip.qk_clip.describe.find import Example
from lightning_muonclip.qk_clip.describe.layout import QUERY_KINDS, spread
from lightning_muonclip.qk_clip.describe.weights import weights_of
from lightning_muonclip.qk_clip.observe.observer import Observer
from lightning_muonclip.tables import table

OptimizerT = TypeVar("OptimizerT", bound=Optimizer)


class Parametrization:
    """A model in muP, created by :func:`parametrize`.

    Attributes:
        model: The model.
        scales: The scale of every parameter, by name.
    """

    def __init__(self, model: nn.Module, scales: dict[str, Scale]) -> None:
        self.model = model
        self.scales = scales
        self._heads: dict[str, Multiplier] = {}
        self._residual: dict[str, float] = {}
        self._scaling: dict[str, tuple[float, float]] = {}
        self._forwards: Forwards | None = None

    def apply(self, optimizer: OptimizerT) -> OptimizerT:
        """Splits the groups of an optimizer by class and scales their learning rate, weight decay and epsilon, in place.

        Supports optimizers with AdamW's hyperparameters, Muon, and both in one optimizer. Each group stores the factors on
        its learning rate, for AdamW and for Muon, under ``"mup"``, where :class:`~lightning_muonclip.MuonClipCallback` reads
        them.

        Args:
            optimizer: A fresh optimizer: before its first step, and before any scheduler is attached.

        Returns:
            The optimizer.

        Raises:
            ValueError: If the optimizer is not fresh, owns parameters of another model, or is neither Muon nor like AdamW.
        """
        names = {param: name for name, param in self.model.named_parameters()}
        groups: list[dict[str, Any]] = []
        taken: set[str] = set()
        for group in optimizer.param_groups:
            if optimizer.state or "initial_lr" in group or "mup" in group:
                raise ValueError(
                    f"muP needs a fresh optimizer, but this {type(optimizer).__name__} has a state, a scheduler or muP"
                    " already; call apply() once, before the first step and before any scheduler"
                )
            members: dict[Scale, list[int]] = defaultdict(list)
            for i, param in enumerate(group["params"]):
                if param not in names:
                    raise ValueError(
                        f"{type(optimizer).__name__} owns a parameter of shape {tuple(param.shape)} that is not part of the"
                        " model in muP; call parametrize with the module that holds all parameters"
                    )
                members[self.scales[names[param]]].append(i)
            for scale, indices in members.items():
                own = {**group, **_scaled(group, scale, type(optimizer).__name__)}
                for key in ("params", "param_names"):
                    if key in group:
                        own[key] = [group[key][i] for i in indices]
                own_name = group.get("name", "").removesuffix(f"-{scale.kind.name}")
                name = "-".join(filter(None, (own_name, scale.kind.name)))
                own["name"] = name if name not in taken else f"{name}-{len(groups)}"
                taken.add(own["name"])
                groups.append(own)
        optimizer.param_groups[:] = groups
        return optimizer

    def multiplier(self, name: str) -> float:
        """The factor on the input of an output head, for code that applies the head's weight without calling it.

        A fused cross-entropy is given ``hidden * scaled.multiplier("lm_head")``. Without it, the first forward that applies
        the weight so is refused.

        Args:
            name: Name of the head or, if no module applies it, of the weight.
        """
        return 1.0 if self._forwards is None else self._forwards.multiplier(name)

    @torch.no_grad()
    def export(self, example: Example | None = None) -> dict[str, Tensor]:
        """A state dict with which the plain model, without muP, gives the same outputs. The model does not change.

        A head that is tied to an embedding gets its own weights: load them into a model that does not tie them.

        Args:
            example: Arguments of the model, ``(args, kwargs)``, by which attention whose heads have grown is read. The
                modules of this package need none.

        Raises:
            ValueError: If the query weights of an attention whose heads have grown cannot be found or scaled.
        """
        state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        heads = {name: multiplier.factor for name, multiplier in self._heads.items()}
        for name, factor in (heads | self._residual).items():
            state[f"{name}.weight"] *= factor
            if name in self._residual and f"{name}.bias" in state:
                state[f"{name}.bias"] *= factor
        specs: AttentionModules = {}
        if self._forwards is not None and example is not None:
            self._forwards.prepare(self.model, *example)
        if self._scaling:
            observer = Observer(self.model, logits="off", unknown="monitor", example=example)
            observer.close()
            specs = observer.attention
        for inner, (scaling, plain) in self._scaling.items():
            # The number may be that of a part of the attention.
            name = next((own for own in specs if f"{inner}.".startswith(f"{own}.") or not own), inner)
            if name not in specs or (specs[name][1].qk_norm and not specs[name][1].gains):
                raise ValueError(
                    f"cannot export {name!r}: muP scales its logits by {scaling:.4g} instead of {plain:.4g}, and the query"
                    " weights that should absorb this are unknown; pass export(example=(args, kwargs)), or describe the"
                    " module with register_attention"
                )
            module, spec = specs[name]
            factor = scaling / plain
            for weight in weights_of(module, name, spec.gains or spec.projections, spec, shared=bool(spec.gains)):
                param = state[f"{name}.{weight.path}".lstrip(".")]
                queries = spread(weight.channels.of_kind(QUERY_KINDS), weight.dims, param).to(param.device)
                param.copy_(torch.where(queries, (param + weight.offset) * factor - weight.offset, param))
        return state

    def _scale_attention(self, name: str, module: nn.Module, base: nn.Module) -> None:
        if isinstance(module, nn.MultiheadAttention) and module.head_dim != base.head_dim:
            raise ValueError(
                f"{name} is an nn.MultiheadAttention with a head_dim of {module.head_dim}, but {base.head_dim} in the base,"
                " and its logit scale cannot be set; increase the number of its heads instead"
            )
        plain, at_base = getattr(module, "scaling", None), getattr(base, "scaling", None)
        if not isinstance(plain, float) or not isinstance(at_base, float):
            return
        head_dim, base_head_dim = getattr(module, "head_dim", None), getattr(base, "head_dim", None)
        growth = (at_base / plain) ** 2
        if isinstance(head_dim, int) and isinstance(base_head_dim, int):  # the scale may not follow head_dim (Gemma 2)
            growth = head_dim / base_head_dim
        if plain != at_base / growth:
            module.scaling = at_base / growth  # type: ignore[assignment]
            self._scaling[name] = at_base / growth, plain

    def _scale_head(self, name: str, module: nn.Linear, base: nn.Module, scale: Scale) -> None:
        is_tied = scale.kind is INPUT and module.weight.shape[0] == base.weight.shape[0]  # type: ignore[index]
        if scale.kind is OUTPUT or is_tied:
            self._heads[name] = Multiplier(scale.growth**OUTPUT.multiplier)
            module.register_forward_pre_hook(self._heads[name])

    def __str__(self) -> str:
        rows: dict[tuple[str, ...], int] = defaultdict(int)
        for name, scale in self.scales.items():
            factors = [f"{factor:.4g}" for factor in (scale.growth, *scale.rates.values())]
            rows[tuple([_pattern(name), scale.kind.name, *factors])] += 1
        head = ("parameter", "class", "growth", "lr AdamW", *(f"lr {name}" for name in LR_ADJUSTMENTS), "count")
        cells = [head] + [(*row, str(count)) for row, count in rows.items()]
        return table(cells, right=range(2, len(head)))


_in_mup: WeakSet[nn.Module] = WeakSet()


@torch.no_grad()
def parametrize(
    model: nn.Module, base: nn.Module, residual: Sequence[str] = (), example: Example | None = None
) -> Parametrization:
    """Puts a freshly initialized model into muP, in place.

    Weights get the standard deviation of the base's weights, times the factor of their class. Attention whose heads have
    grown scales its logits by sqrt(d_base) / d instead of 1 / sqrt(d): through the attribute ``scaling`` of our modules and
    of Hugging Face's at once, through any other number that scales them before the first forward, which also refuses what
    cannot be scaled. The input of an output head is divided by the growth of the width, if the head is called. Pass the
    optimizer to :meth:`Parametrization.apply` afterwards. To resume from a checkpoint, do the same and load the weights.

    Args:
        model: The model.
        base: The same model, freshly initialized, at the width at which the hyperparameters were tuned.
        residual: Patterns of modules that write into the residual stream, such as ``("*.o_proj", "*.down_proj")``. Their
            outputs are divided by the growth of the depth (CompleteP), and the base may have fewer layers.
        example: Arguments of the model, ``(args, kwargs)``, by which attention and heads are checked now, instead of in the
            first forward.

    Raises:
        ValueError: If the models do not correspond, if one is in muP already, or if the logits of attention whose heads have
            grown cannot be scaled.

    Source: Yang et al., Tensor Programs V, arXiv 2203.03466; CompleteP, arXiv 2505.01618, with its alpha = 1.

    Example:
        >>> def make(width: int) -> nn.Module:
        ...     return nn.Sequential(nn.Embedding(10, width), nn.Linear(width, width), nn.Linear(width, 10))
        >>> model = make(256)
        >>> mup = parametrize(model, make(64))
        >>> [scale.kind.name for scale in mup.scales.values()]
        ['input', 'hidden', 'vector', 'output', 'finite']
        >>> optimizer = mup.apply(torch.optim.AdamW(model.parameters(), lr=1e-3))
        >>> [(group["name"], group["lr"]) for group in optimizer.param_groups[:2]]
        [('input', 0.001), ('hidden', 0.00025)]
    """
    hooks = [hook for m in model.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    if base in _in_mup:
        raise ValueError(
            "the base is in muP itself; create a fresh one, at the width at which the hyperparameters were tuned"
        )
    if model in _in_mup or any(isinstance(hook, Multiplier) for hook in hooks):  # copies of a model keep its hooks
        raise ValueError("the model is in muP already; parametrize a fresh one")
    depth, blocks = _depth(model, base, residual)
    owners = dict(model.named_modules())
    base_modules, base_params = _Counterparts(dict(base.named_modules())), _Counterparts(dict(base.named_parameters()))
    scales = {}
    sizes: dict[int, int] = {}
    tables: dict[str, float] = {}
    for name, param in model.named_parameters():
        counterpart = base_params.find(name, residual)
        if counterpart.ndim != param.ndim or counterpart.is_meta:
            raise ValueError(
                f"the base does not correspond to the model: {name} has shape {tuple(param.shape)}, in the base"
                f" {tuple(counterpart.shape)} on {counterpart.device}; use the same model, initialized, at a smaller width"
            )
        owner, _, leaf = name.rpartition(".")
        kind, growth = classify(name, param.shape, counterpart.shape, owners[owner], leaf)
        scales[name] = Scale(kind, growth, depth if name.startswith(blocks) else 1.0)
        sizes.update((new, old) for new, old in zip(param.shape, counterpart.shape) if new != old)
        if kind is INPUT and param.ndim == 2 and param.shape[0] == counterpart.shape[0]:
            tables[name] = growth**OUTPUT.multiplier
        rms = _rms(param)
        if rms > 0 and kind is not FINITE:
            param.mul_(_rms(counterpart) / rms * growth**kind.init)
    _in_mup.add(model)
    mup = Parametrization(model, scales)
    by_weight: dict[Tensor, Scale] = {param: scales[name] for name, param in model.named_parameters()}
    for name, module in model.named_modules():
        counterpart = base_modules.find(name, residual)
        mup._scale_attention(name, module, counterpart)
        if isinstance(module, nn.Linear) and module.weight in by_weight:
            mup._scale_head(name, module, counterpart, by_weight[module.weight])
        if _matches(name, residual) and depth != 1:
            module.register_forward_hook(Multiplier(1 / depth))
            mup._residual[name] = 1 / depth
    if sizes:
        find = partial(base_modules.find, residual=residual)
        mup._forwards = Forwards(model, base, find, sizes, mup._scaling, mup._heads, tables)
        if example is not None:
            mup._forwards.run(example)
    return mup


def _scaled(group: dict[str, Any], scale: Scale, optimizer: str) -> dict[str, Any]:
    is_muon = group.get("algorithm", "muon" if "adjust_lr_fn" in group else "adamw") == "muon"
    if not is_muon and "betas" not in group:
        raise ValueError(
            f"muP supports Muon and optimizers with AdamW's hyperparameters, not {optimizer}; use one of them"
        )
    rates = scale.rates
    rate = rates[(group["adjust_lr_fn"] or "original") if is_muon else "adamw"]
    own = {"lr": group["lr"] * rate, "weight_decay": group["weight_decay"] / rate, "mup": rates}
    return own | {"eps": group["eps"] * scale.eps} if not is_muon and "eps" in group else own


class _Counterparts:
    """Finds the counterpart of a name in the base: the same name or, in a shallower base, that of another layer."""

    def __init__(self, own: Mapping[str, Any]) -> None:
        self._own = own
        self._by_pattern = {_pattern(name): value for name, value in reversed(list(own.items()))}

    def find(self, name: str, residual: Sequence[str]) -> Any:
        if name in self._own:
            return self._own[name]
        if residual and _pattern(name) in self._by_pattern:
            return self._by_pattern[_pattern(name)]
        raise ValueError(
            f"the base has no {name!r}; use the same model at a smaller width or, to scale the depth too, list the modules"
            " that write into the residual stream, such as residual=('*.o_proj', '*.down_proj')"
        )


def _depth(model: nn.Module, base: nn.Module, residual: Sequence[str]) -> tuple[float, tuple[str, ...]]:
    """The growth of the depth, and the name prefixes of parameters in residual blocks."""
    writers = [name for name, _ in model.named_modules() if _matches(name, residual)]
    for pattern in residual:
        if not any(fnmatchcase(name, pattern) for name in writers):
            raise ValueError(f"the pattern {pattern!r} matches no module of {type(model).__name__}; check its spelling")
    at_base = sum(_matches(name, residual) for name, _ in base.named_modules())
    blocks = {match[0] for name in writers if (match := re.match(r"(.*\.)?\d+\.", name))}
    return (len(writers) / at_base if at_base else 1.0), tuple(blocks)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt())
