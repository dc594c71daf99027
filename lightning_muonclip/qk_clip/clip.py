"""QK-Clip: after the optimizer's step, scales the query and key rows of every head whose logits passed the threshold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from lightning_muonclip.qk_clip.layout import KINDS, compile_layout
from lightning_muonclip.qk_clip.ledger import reduce_max
from lightning_muonclip.qk_clip.observe import Observer
from lightning_muonclip.qk_clip.rule import SHARED_KEYS, check_alpha, check_threshold, key_factors, qk_clip_gamma
from lightning_muonclip.qk_clip.spec import AttentionSpec


@dataclass(frozen=True)
class ClipResult:
    """What one step of QK-Clip saw and did; all on the device, nothing is read on the host.

    Attributes:
        max_logits: Shape (layers, most heads), reduced over ranks; -inf where there is no such head or nothing was seen,
            +inf where a logit was not finite.
        gamma: Same shape; 1 where nothing was clipped.
    """

    max_logits: Tensor
    gamma: Tensor

    @property
    def max_logit(self) -> Tensor:
        """The largest finite logit of the model, a scalar; -inf if there is none."""
        return self.max_logits.masked_fill(self.max_logits.isposinf(), float("-inf")).max()

    @property
    def min_gamma(self) -> Tensor:
        """The strongest clip, a scalar."""
        return self.gamma.min()

    @property
    def clipped_heads(self) -> Tensor:
        """Number of heads clipped, a scalar."""
        return (self.gamma < 1).sum()

    @property
    def nonfinite(self) -> Tensor:
        """Number of heads whose largest logit was not finite, a scalar."""
        return self.max_logits.isposinf().sum()


class QKClip:
    """Caps the attention logits of every head, by any optimizer, in plain PyTorch.

    Observes from construction until :meth:`close`; also a context manager.

    Args:
        model: The model. Its attention modules are found by class, by names and shapes, or by ``specs``.
        threshold: Largest logit that is left alone; ``None`` only monitors.
        alpha: Share of the clip that the query weight takes, in [0, 1].
        specs: The user's word on attention modules, by module name; ``None`` as a value leaves a module alone.
        shared_keys: What happens to a key that several queries share: ``"query"``, ``"group"``, ``"min_k"`` or
            ``"compensate"`` (see :func:`~lightning_muonclip.qk_clip.rule.key_factors`).
        qk_norm: Normalised queries or keys do not feel a factor on their weights: ``"error"`` refuses them,
            ``"monitor"`` only watches them.
        logits: ``"exact"`` measures the logits in every training forward; ``"off"`` measures nothing, for a caller
            who gives :meth:`step` the maxima.
        observer: Watches the model already and is shared; ``None`` makes one.
        process_group: The ranks that see different data; ``None`` is all ranks.

    Raises:
        ValueError: If an argument is out of range, there is no attention or one that cannot be read, or a query or key
            is normalised after its projection.

    Source: Kimi K2, arXiv 2507.20534, section 2.1 and algorithm 1.

    Example:
        >>> from lightning_muonclip import Attention
        >>> model = Attention(hidden_size=8, num_attention_heads=2)
        >>> with QKClip(model, threshold=1e-3) as qk_clip:
        ...     _ = model(torch.randn(2, 5, 8))
        ...     int(qk_clip.step().clipped_heads)
        2
    """

    def __init__(
        self,
        model: nn.Module,
        threshold: float | None = 100.0,
        alpha: float = 0.5,
        specs: Mapping[str, AttentionSpec | None] | None = None,
        shared_keys: str = "query",
        qk_norm: str = "error",
        logits: str = "exact",
        *,
        observer: Observer | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_clip_options(threshold, alpha, shared_keys, qk_norm, logits)
        self.threshold = threshold
        self.alpha = alpha
        self.shared_keys = shared_keys
        self.process_group = process_group
        self.observer = observer or Observer(model, specs, watch=logits == "exact")
        #: Number of times that each head was clipped, int64, shape (layers, most heads).
        self.clips = torch.zeros_like(self.observer.ledger.values, dtype=torch.int64)
        self._handles: list[Any] = []
        self._owns_observer = observer is None
        try:
            self._plan = None if threshold is None else _ClipPlan(self.observer, qk_norm)
        except ValueError:
            self.close()
            raise

    @property
    def layers(self) -> list[str]:
        """Names of the attention modules, in ``named_modules`` order: the rows of :attr:`max_logits`."""
        return self.observer.layers

    @property
    def params(self) -> list[Tensor]:
        """The weights and biases that a clip scales; none if it only monitors."""
        return [] if self._plan is None else self._plan.params

    @property
    def max_logits(self) -> Tensor:
        """Largest logits since the last step on this rank, shape (layers, most heads); -inf where nothing was seen."""
        return self.observer.ledger.values.clone()

    def attach(self, optimizer: Optimizer) -> None:
        """Runs :meth:`step` after every step that ``optimizer`` makes."""

        def clip(*_: Any) -> None:
            self.step()

        self._handles.append(optimizer.register_step_post_hook(clip))

    @torch.no_grad()
    def step(self, max_logits: Tensor | Sequence[Sequence[float]] | None = None) -> ClipResult:
        """Clips every head whose largest logit since the last step passed the threshold, then starts anew.

        One all-reduce when several ranks train; no host synchronisation.

        Args:
            max_logits: The caller's maxima instead of the observed ones: one list of numbers a layer, or a tensor of
                shape (layers, heads).

        Raises:
            ValueError: If ``max_logits`` does not have one row a layer and one number a head.
        """
        with torch.profiler.record_function("muonclip::qk_clip"):
            ledger = self.observer.ledger
            observed = ledger.values if max_logits is None else self._as_table(max_logits)
            reduced = reduce_max(observed, self.process_group)
            ledger.close_step()
            gamma = qk_clip_gamma(reduced, self.threshold)
            if self._plan is not None:
                gamma = self._plan.apply(gamma, self.alpha, self.shared_keys)
                self.clips = self.clips.to(gamma.device).add_(gamma < 1)
            return ClipResult(reduced, gamma)

    def discard(self) -> None:
        """Forgets what was seen since the last step, for a step that was skipped."""
        self.observer.ledger.values.fill_(float("-inf"))

    def close(self) -> None:
        """Stops observing, unless the observer is shared, and detaches from optimizers. May be called twice."""
        if self._owns_observer:
            self.observer.close()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """How often each head was clipped: the same on every rank."""
        return {"clips": self.clips.cpu()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores the counts of :meth:`state_dict`.

        Raises:
            ValueError: If the counts are of a model with other layers or heads.
        """
        clips = state_dict["clips"]
        if clips.shape != self.clips.shape:
            raise ValueError(
                f"the saved clip counts are for {tuple(clips.shape)} (layers, heads), this model has"
                f" {tuple(self.clips.shape)}; load them into the model that they were saved from"
            )
        self.clips = clips.to(self.clips.device, copy=True)

    def __enter__(self) -> QKClip:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _as_table(self, max_logits: Tensor | Sequence[Sequence[float]]) -> Tensor:
        ledger = self.observer.ledger
        table = torch.full_like(ledger.values, float("-inf"))
        rows = [torch.as_tensor(row, dtype=table.dtype, device=table.device) for row in max_logits]
        given = [tuple(row.shape) for row in rows]
        layers, widest = table.shape
        if given not in ([(heads,) for heads in ledger.heads], [(widest,)] * layers):
            raise ValueError(f"max_logits must have {list(ledger.heads)} heads, one row a layer; got rows of {given}")
        for target, heads, row in zip(table, ledger.heads, rows):
            target[:heads] = row[:heads]
        return table


class _ClipPlan:
    """Which factor multiplies which channel of which parameter: compiled once, applied by one gather and one multiply.

    The factors of all heads lie in one flat vector, ordered (kind of channel, layer, head), behind a 1 that every channel
    takes which is left alone.
    """

    def __init__(self, observer: Observer, qk_norm: str) -> None:
        layers, heads = observer.ledger.values.shape
        self._weights: list[tuple[nn.Module, str, int]] = []
        indices: list[Tensor] = []
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        owners: dict[Tensor, str] = {}
        #: Layers whose weights are left alone: a clip would do nothing there, or they are not trained.
        self._watched = torch.zeros(layers, 1, dtype=torch.bool)
        for row, (name, (module, spec)) in enumerate(observer.attention.items()):
            alike[spec.num_heads, spec.sizes["G"]].append(row)
            if spec.qk_norm and qk_norm == "error":
                raise ValueError(
                    f"attention {name!r} normalises queries or keys after the projection (QK-norm): a clip"
                    " would shrink its weights and leave its logits as they are; pass qk_norm='monitor' to only watch it"
                )
            if spec.qk_norm or _is_frozen(module, spec):
                self._watched[row] = True
                continue
            for path, dim, layout in _parameters(module, spec):
                param = _require_clippable(module, path, name, owners)
                dim %= param.ndim
                try:
                    channels = compile_layout(layout, param.shape[dim], spec.sizes)
                except ValueError as error:
                    raise ValueError(f"attention {name!r}, {path}: {error}") from error
                index = 1 + (channels.kinds * layers + row) * heads + channels.heads
                indices.append(index.masked_fill(channels.kinds == KINDS.index("*"), 0))
                self._weights.append((module, path, dim))
        self._index = torch.cat(indices) if indices else torch.empty(0, dtype=torch.int64)
        self._lengths = [len(index) for index in indices]
        self._alike = {shape: torch.tensor(rows) for shape, rows in alike.items()}

    @property
    def params(self) -> list[Tensor]:
        # Looked up anew each time: FSDP2 and Module.to may replace a parameter after construction.
        return [module.get_parameter(path) for module, path, _ in self._weights]

    def apply(self, gamma: Tensor, alpha: float, shared_keys: str) -> Tensor:
        """Scales the weights; returns gamma with 1 for the heads that are only watched."""
        if self._index.device != gamma.device:
            self._index, self._watched = self._index.to(gamma.device), self._watched.to(gamma.device)
            self._alike = {shape: rows.to(gamma.device) for shape, rows in self._alike.items()}
        gamma = gamma.masked_fill(self._watched, 1.0)
        if not self._weights:
            return gamma
        flat = torch.cat([gamma.new_ones(1), self._factors(gamma, alpha, shared_keys).flatten()])
        params = self.params
        factors = flat[self._index].split(self._lengths)
        dims = [dim for _, _, dim in self._weights]
        torch._foreach_mul_(params, [_aligned(f, p, dim) for f, p, dim in zip(factors, params, dims)])
        return gamma

    def _factors(self, gamma: Tensor, alpha: float, shared_keys: str) -> Tensor:
        """Factors of every head, shape (kinds, layers, heads), in the order of :data:`KINDS`."""
        query, key = torch.ones_like(gamma), torch.ones_like(gamma)
        for (heads, groups), rows in self._alike.items():
            query[rows, :heads], key[rows, :groups] = key_factors(gamma[rows, :heads], alpha, groups, shared_keys)
        # The rotated part of a latent key is shared by all heads and stays; its queries take all of gamma.
        return torch.stack([query, key, gamma**alpha, gamma ** (1 - alpha), gamma])


def _aligned(factor: Tensor, param: Tensor, dim: int) -> Tensor:
    """Shapes the factors of all channels to multiply a parameter, sharded or not, without communication."""
    factor = factor.view([-1 if d == dim else 1 for d in range(param.ndim)])
    if not isinstance(param, DTensor):
        return factor
    mesh = param.device_mesh
    return DTensor.from_local(factor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _require_clippable(module: nn.Module, path: str, name: str, owners: dict[Tensor, str]) -> Tensor:
    try:
        param = module.get_parameter(path)
    except AttributeError as error:
        raise ValueError(
            f"attention {name!r} has no parameter {path!r} that QK-Clip could scale (wrapped, parametrized and quantized"
            f" weights it cannot): {error}"
        ) from error
    if param in owners:
        raise ValueError(f"attention {name!r} and {owners[param]!r} share {path}; a clip of both would scale it twice")
    if not param.requires_grad:
        raise ValueError(
            f"{name}.{path} is frozen, and QK-Clip would change it; train it, or pass threshold=None to watch"
        )
    owners[param] = name
    return param


def _is_frozen(module: nn.Module, spec: AttentionSpec) -> bool:
    weights = dict(module.named_parameters())
    named = [weights[path] for path, _, _ in _parameters(module, spec) if path in weights]
    return bool(named) and not any(param.requires_grad for param in named)


def _parameters(module: nn.Module, spec: AttentionSpec) -> Iterator[tuple[str, int, str]]:
    """Path, channel dimension and layout of every query and key weight; a bias follows its weight."""
    for projection in spec.projections:
        try:
            child = module.get_submodule(projection.name)
        except AttributeError:
            yield projection.name, projection.dim, projection.layout
            continue
        yield f"{projection.name}.weight", projection.dim, projection.layout
        if getattr(child, "bias", None) is not None:
            yield f"{projection.name}.bias", 0, projection.layout


def check_clip_options(threshold: float | None, alpha: float, shared_keys: str, qk_norm: str, logits: str) -> None:
    """Raises ValueError, naming the option, its value and what is possible, unless QK-Clip can run so."""
    check_threshold(threshold)
    check_alpha(alpha)
    _check_choice("shared_keys", shared_keys, SHARED_KEYS)
    _check_choice("qk_norm", qk_norm, ("error", "monitor"))
    _check_choice("logits", logits, ("exact", "off"))


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
