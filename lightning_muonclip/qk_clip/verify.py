"""Proves that a spec scales the rows that it thinks it scales: half a head's queries, and its logits are halved."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from lightning_muonclip.qk_clip.layout import KEY_KINDS, NO_HEAD, QUERY_KINDS
from lightning_muonclip.qk_clip.observe import Observer
from lightning_muonclip.qk_clip.plan import aligned, clipped_weights
from lightning_muonclip.qk_clip.registry import AttentionModules
from lightning_muonclip.qk_clip.spec import AttentionSpec
from lightning_muonclip.qk_clip.weights import Weight
from lightning_muonclip.tables import table

#: A factor of two is exact in floating point, so a right spec is off by rounding alone.
TOLERANCE = 1e-4

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Check:
    """One experiment on one layer.

    Attributes:
        side: ``"q"``, ``"k"``, or ``"qn against kn"``: what was scaled.
        head: Whose channels; ``NO_HEAD`` for a gain that all heads share.
        expected: Largest logits that a right spec gives, shape (heads,).
        found: Those that were seen.
    """

    layer: str
    side: str
    head: int
    expected: Tensor
    found: Tensor

    @property
    def errors(self) -> Tensor:
        """Deviation of every head, relative to the layer's largest logit; NaN where nothing was seen."""
        return (self.found - self.expected).abs() / self.expected.abs().clamp_min(self.expected.abs().max() * 1e-3)

    @property
    def wrong_heads(self) -> list[int]:
        """Heads whose logits are not as expected."""
        return [head for head, error in enumerate(self.errors.tolist()) if not error <= TOLERANCE]


@dataclass(frozen=True)
class Verification:
    """What :meth:`QKClip.verify` tried and found; printed, it is a table."""

    checks: list[Check]
    watched: dict[str, str]

    def __str__(self) -> str:
        rows = [("layer", "heads", "verified", "worst error")]
        for layer in dict.fromkeys(check.layer for check in self.checks):
            own = [check for check in self.checks if check.layer == layer]
            sides = " and ".join(dict.fromkeys(check.side for check in own))
            each = ", all heads together" if own[0].head == NO_HEAD else ", per head"
            worst = max(float(check.errors.max()) for check in own)
            rows.append((layer or "(model)", str(len(own[0].expected)), sides + each, f"{worst:.1e}"))
        rows += [(layer or "(model)", "", f"nothing: {reason}", "") for layer, reason in self.watched.items()]
        return table(rows)


class Capture:
    """Keeps what every attention module is given in its first forward, from construction to :meth:`close`.

    Nothing that the forward does to a cache or another object among its arguments is seen. Also a context manager.
    """

    def __init__(self, observer: Observer) -> None:
        self.inputs: dict[str, Inputs] = {}
        self._observer = observer
        self._handles = [
            module.register_forward_pre_hook(self._keep(name), with_kwargs=True)
            for name, (module, _) in observer.attention.items()
        ]

    def close(self) -> None:
        """Stops; may be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def run(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """A forward in training mode, unrecorded, after which the model's mode and buffers are as before."""
        modes = {module: module.training for module in model.modules()}
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        active = self._observer.active
        self._observer.pause(False)
        try:
            with torch.random.fork_rng():
                model.train()  # in eval mode torch's TransformerEncoder passes by its attention modules
                model(*args, **kwargs)
        finally:
            self._observer.pause(active)
            for buffer, before in buffers:
                buffer.copy_(before)
            for module, training in modes.items():
                module.training = training

    def _keep(self, name: str) -> Any:
        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            if name not in self.inputs:
                self.inputs[name] = _fresh((args, kwargs))

        return keep


def verify_attention(
    attention: AttentionModules, inputs: Mapping[str, Inputs], qk_norm: str, lora: str
) -> Verification:
    """Runs every experiment on a copy of every attention module.

    Args:
        attention: The modules and their specs.
        inputs: What each was given in a forward.
        qk_norm: As in :class:`~lightning_muonclip.QKClip`.
        lora: As there.

    Raises:
        ValueError: See :meth:`~lightning_muonclip.QKClip.verify`.
    """
    checks: list[Check] = []
    watched: dict[str, str] = {}
    for name, (module, spec) in attention.items():
        weights, reason = clipped_weights(name, module, spec, qk_norm, lora)
        if reason:
            watched[name] = reason
            continue
        if name not in inputs:
            raise ValueError(f"attention {name!r} was not used in this forward, so its spec cannot be verified")
        if any(isinstance(param, DTensor) for param in module.parameters()):
            raise ValueError(
                f"attention {name!r} has weights that are sharded over devices; verify the model before it is sharded, on"
                " one device"
            )
        checks += _Laboratory(name, module, spec, inputs[name]).checks(weights)
    _raise_for(checks)
    return Verification(checks, watched)


class _Laboratory:
    """A copy of one attention module whose parameters are all random, so that none is zero or like another."""

    def __init__(self, name: str, module: nn.Module, spec: AttentionSpec, inputs: Inputs) -> None:
        self.name = name
        self.spec = spec
        self.inputs = inputs
        self.module = copy.deepcopy(module)
        self.module.train()
        for child in self.module.children():
            child.eval()  # without dropout before the logits; that of the probabilities comes after them
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            for param in self.module.parameters():
                if param.is_floating_point():
                    param.add_(torch.randn_like(param) * (0.1 if param.ndim < 2 else param.shape[-1] ** -0.5))

    @torch.no_grad()
    def checks(self, weights: list[Weight]) -> Iterator[Check]:
        with torch.random.fork_rng():
            base = self._max_logits()
            heads = torch.arange(self.spec.num_heads)
            group = self.spec.num_heads // self.spec.sizes["G"]
            rotated = any(weight.has_kind(("qr",)) for weight in weights)
            for side, kinds, size in (("q", QUERY_KINDS, 1), ("k", KEY_KINDS, group)):
                own = torch.cat([w.channels.heads[w.channels.of_kind(kinds)] for w in weights])
                for head in sorted(set(own.tolist())):
                    # Beside a rotated key that all heads share, half a key is not half a logit: the query makes up for it.
                    undone = QUERY_KINDS[:2] if rotated and side == "k" else ()
                    found = self._with_factors(
                        weights, head, {**dict.fromkeys(kinds, 0.5), **dict.fromkeys(undone, 2.0)}
                    )
                    touched = (heads // size == head) | (head == NO_HEAD)
                    expected = base if undone else torch.where(touched.to(base.device), base / 2, base)
                    yield Check(self.name, "kn against qn" if undone else side, head, expected.cpu(), found.cpu())

    def _with_factors(self, weights: list[Weight], head: int, factors: Mapping[str, float]) -> Tensor:
        """Largest logits while the channels of one head are scaled."""
        params = [self.module.get_parameter(weight.path) for weight in weights]
        before = [param.clone() for param in params]
        for weight, param in zip(weights, params):
            for kind, factor in factors.items():
                chosen = weight.channels.of_kind((kind,)) & (weight.channels.heads == head)
                scale = aligned(torch.where(chosen, factor, 1.0).to(param.device, param.dtype), param, weight.dim)
                param.copy_((param + weight.offset) * scale - weight.offset)
        found = self._max_logits()
        for param, value in zip(params, before):
            param.copy_(value)
        return found

    def _max_logits(self) -> Tensor:
        observer = Observer({self.name: (self.module, self.spec)})
        try:
            args, kwargs = _fresh(self.inputs)
            self.module(*args, **kwargs)
            return observer.ledger.values[0]
        finally:
            observer.close()


def _fresh(inputs: Inputs) -> Inputs:
    """The same inputs again: tensors without their history, anything else, such as a cache of keys, as a copy."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else copy.deepcopy(leaf), inputs)


def _raise_for(checks: list[Check]) -> None:
    failures = [
        f"{check.layer or '(model)'}: head {check.head}'s {check.side} halved, head {head} should have the largest logit"
        f" {float(check.expected[head]):.6g}, but has {float(check.found[head]):.6g}"
        for check in checks
        for head in check.wrong_heads
    ]
    if failures:
        more = f"\n    ... and {len(failures) - 8} more" if len(failures) > 8 else ""
        raise ValueError(
            "a spec does not describe its attention, so QK-Clip would scale the wrong weights:\n    "
            + "\n    ".join(failures[:8])
            + more
            + "\nCorrect the layout, the sizes or the number of heads; a bias has to be named with its weight."
        )
