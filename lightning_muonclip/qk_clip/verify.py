"""Verifies that a spec scales the right rows: halving the queries of a head must halve its logits."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_iter

from lightning_muonclip.qk_clip.describe.declared import AttentionModules
from lightning_muonclip.qk_clip.describe.isolate import DetachedCopies, apart, device_of
from lightning_muonclip.qk_clip.describe.layout import KEY_KINDS, NO_HEAD, QUERY_KINDS, spread
from lightning_muonclip.qk_clip.describe.spec import AttentionSpec
from lightning_muonclip.qk_clip.describe.weights import UnscalableError, Weight
from lightning_muonclip.qk_clip.observe.capture import Inputs
from lightning_muonclip.qk_clip.observe.observer import Observer
from lightning_muonclip.qk_clip.plan import clipped_weights
from lightning_muonclip.tables import table

#: A factor of two is exact in floating point, so a correct spec deviates by rounding only.
TOLERANCE = 1e-4


#: Factors that leave every logit unchanged.
_AGAINST = {**dict.fromkeys(("q", "qn"), 2.0), **dict.fromkeys(KEY_KINDS, 0.5)}


@dataclass(frozen=True)
class Check:
    """The expected and the actual effect of one experiment on every head of a layer.

    Attributes:
        side: What was scaled: ``"q"``, ``"k"``, ``"q and k"`` if one weight computes both, ``"kn against qn"`` if a rotated
            key is shared by all heads, or ``"q against k"``.
        head: The head whose channels were scaled; ``NO_HEAD`` for channels that all heads share, and for all heads.
        what: What was compared: ``"largest logit"``, or the norm of the ``"queries"``, ``"keys"`` or ``"output"``.
        expected: The values under a correct spec, shape (heads,); (1,) for the output.
        found: The observed values.
        errors: Largest deviation of an element, relative to the largest element; NaN where nothing was seen.
    """

    layer: str
    side: str
    head: int
    what: str
    expected: Tensor
    found: Tensor
    errors: Tensor

    @property
    def wrong_heads(self) -> list[int]:
        """Heads that deviate from the expectation."""
        return [head for head, error in enumerate(self.errors.tolist()) if not error <= TOLERANCE]


@dataclass(frozen=True)
class Verification:
    """The result of :meth:`QKClip.verify`; prints as a table."""

    checks: list[Check]
    watched: dict[str, str]

    def __str__(self) -> str:
        rows = [("layer", "heads", "verified", "worst error")]
        for layer in dict.fromkeys(check.layer for check in self.checks):
            own = [check for check in self.checks if check.layer == layer]
            experiments = [check for check in own if check.what != "output"]
            sides = " and ".join(dict.fromkeys(check.side for check in experiments))
            each = ", all heads together" if all(check.head == NO_HEAD for check in experiments) else ", per head"
            worst = max(float(check.errors.max()) for check in own)
            rows.append((layer or "(model)", str(len(own[0].expected)), sides + each, f"{worst:.1e}"))
        rows += [(layer or "(model)", "", f"nothing: {reason}", "") for layer, reason in self.watched.items()]
        return table(rows)


def verify_attention(
    attention: AttentionModules, inputs: Mapping[str, Inputs], qk_norm: str, lora: str, *, scales: bool = True
) -> Verification:
    """Runs every experiment on a copy of every attention module.

    Args:
        attention: The modules and their specs.
        inputs: The captured inputs of each module.
        qk_norm: As in :class:`~lightning_muonclip.QKClip`.
        lora: As in :class:`~lightning_muonclip.QKClip`.
        scales: Whether anything will be scaled; if not, weights that cannot be scaled are not an error.

    Raises:
        ValueError: See :meth:`~lightning_muonclip.QKClip.verify`.
    """
    checks: list[Check] = []
    watched: dict[str, str] = {}
    for name, (module, spec) in attention.items():
        try:
            weights, reason = clipped_weights(name, module, spec, qk_norm, lora)
        except UnscalableError as error:
            if scales:
                raise
            reason = error.reason
        if reason or not weights:
            watched[name] = reason or "its spec names no weight"
            continue
        if name not in inputs:
            raise ValueError(
                f"attention {name!r} was not used in this forward, so its spec cannot be verified; pass inputs that use it,"
                f" or skip it with specs={{{name!r}: None}}"
            )
        if _is_sharded(module):
            raise ValueError(
                f"attention {name!r} has weights that are sharded over devices; verify the model on one device, before it is"
                " sharded"
            )
        checks += _Laboratory(name, module, spec, inputs[name]).checks(weights)
    _raise_for(checks)
    return Verification(checks, watched)


@dataclass(frozen=True)
class _Seen:
    """The observations of one forward: per-head maximum logits, all queries and keys, and the output."""

    logits: Tensor
    queries: Tensor
    keys: Tensor
    output: Tensor


class _Laboratory:
    """Runs experiments on a copy of an attention module with random parameters, so that none is zero or equals another."""

    def __init__(self, name: str, module: nn.Module, spec: AttentionSpec, inputs: Inputs) -> None:
        self.name = name
        self.spec = spec
        self.inputs = inputs
        # Hooks on the module itself are dropped: the captured inputs already include their effect.
        no_hooks = {id(hooks): type(hooks)() for key, hooks in vars(module).items() if key.endswith("_hooks")}
        with DetachedCopies():
            self.module = copy.deepcopy(module, no_hooks)
        for child in self.module.modules():
            child.training = child is self.module  # without dropout before the logits
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for param in self.module.parameters():
                if param.is_floating_point() and param.itemsize > 1:
                    noise = torch.randn(param.shape, generator=generator)
                    param.copy_(1 + noise / 2 if param.ndim < 2 else noise * param[0].numel() ** -0.5)

    @torch.no_grad()
    def checks(self, weights: list[Weight]) -> list[Check]:
        """Every experiment."""
        for param in (self._param(weight) for weight in weights if weight.offset):
            param.copy_((16 * param).round() / 16)  # half of (w + offset) is exact in every dtype
        self.observer = Observer(self.module, {"": self.spec})
        self.observer.recorders[0].name = self.name  # for messages
        try:
            return list(self._experiments(weights))
        finally:
            self.observer.close()

    def _experiments(self, weights: list[Weight]) -> Iterator[Check]:
        base = self._forward()
        self._refuse_zeros(base)
        self._refuse_other_groups(base)
        if self._is_tied(weights):
            yield from self._halved(weights, base, "q and k", (*QUERY_KINDS, *KEY_KINDS))
            return
        yield from self._halved(weights, base, "q", QUERY_KINDS)
        if any(weight.has_kind(("qr",)) for weight in weights):
            yield from self._halved_against(weights, base)
        else:
            yield from self._halved(weights, base, "k", KEY_KINDS)
        if all(any(weight.has_kind(kinds) for weight in weights) for kinds in (QUERY_KINDS, KEY_KINDS)):
            output = self._with_factors(weights, None, _AGAINST).output
            yield from self._compared("q against k", NO_HEAD, "output", base.output, output)

    def _is_tied(self, weights: list[Weight]) -> bool:
        """Whether one weight makes queries and keys."""
        makes: dict[Tensor, Tensor] = {}
        kinds = [makes.setdefault(self._param(weight), weight.channels.kinds) for weight in weights]
        return any(not torch.equal(first, weight.channels.kinds) for first, weight in zip(kinds, weights))

    def _halved(self, weights: list[Weight], base: _Seen, side: str, kinds: tuple[str, ...]) -> Iterator[Check]:
        """Halving the queries or keys of a head must halve its logits and change no other head."""
        heads = torch.arange(self.spec.num_heads, device=base.logits.device)
        group = self.spec.num_heads // self.spec.sizes["G"]
        for head in _heads(weights, kinds):
            seen = self._with_factors(weights, head, dict.fromkeys(kinds, 0.5))
            query, key = torch.ones_like(base.logits), torch.ones_like(base.logits)
            if side != "k":
                query[(heads == head) | (head == NO_HEAD)] = 0.5
            if side != "q":
                key[(heads // group == head) | (head == NO_HEAD)] = 0.5
            yield from self._compared(side, head, "largest logit", base.logits * query * key, seen.logits)
            yield from self._compared(side, head, "queries", base.queries * query[:, None], seen.queries)
            yield from self._compared(side, head, "keys", base.keys * key[:, None], seen.keys)

    def _halved_against(self, weights: list[Weight], base: _Seen) -> Iterator[Check]:
        """Halves keys and doubles queries: with a rotated key that all heads share, half a key alone is not half a logit."""
        is_shared = (base.keys == base.keys[:1]).all(0)
        for head in _heads(weights, KEY_KINDS):
            seen = self._with_factors(weights, head, _AGAINST)
            keys, own = base.keys.clone(), base.keys[head]
            keys[head] = torch.where(is_shared & (seen.keys[head] == own), own, own / 2)
            yield from self._compared("kn against qn", head, "largest logit", base.logits, seen.logits)
            yield from self._compared("kn against qn", head, "keys", keys, seen.keys)

    def _compared(self, side: str, head: int, what: str, expected: Tensor, found: Tensor) -> Iterator[Check]:
        if not expected.numel():  # the module reports only its maxima
            return
        size, deviation = expected.abs(), (found - expected).abs()
        if what != "largest logit":
            size, deviation = size.amax(-1), deviation.amax(-1)
            expected, found = expected.norm(dim=-1), found.norm(dim=-1)
        errors = deviation / size.clamp_min(size.max() * 1e-3)
        yield Check(self.name, side, head, what, expected.cpu(), found.cpu(), errors.cpu())

    def _refuse_zeros(self, base: _Seen) -> None:
        for what, seen in (("queries", base.queries), ("keys", base.keys)):
            zero = (seen == 0).all(-1)
            if seen.numel() and zero.any():
                raise ValueError(
                    f"attention {self.name!r}: the {what} of head {int(zero.nonzero()[0])} are all zero on these inputs, so"
                    " its spec cannot be verified; pass other inputs"
                )

    def _refuse_other_groups(self, base: _Seen) -> None:
        """Raises ValueError unless keys are equal within a group and differ between groups."""
        size = base.keys.abs().max() if base.keys.numel() else 0
        starts = ((base.keys[1:] - base.keys[:-1]).abs() > TOLERANCE * size).any(-1).nonzero()[:, 0] + 1
        groups = self.spec.sizes["G"]
        expected = torch.arange(1, groups) * (self.spec.num_heads // groups)
        if base.keys.numel() and not torch.equal(starts.cpu(), expected):
            raise ValueError(
                f"attention {self.name!r}: {self.spec.num_heads} query heads share {len(starts) + 1} key heads, but its spec"
                f" says {groups}; correct num_key_value_heads"
            )

    def _with_factors(self, weights: list[Weight], head: int | None, factors: Mapping[str, float]) -> _Seen:
        """Runs a forward with the channels of these kinds scaled, for one head or for all (``None``)."""
        before: dict[Tensor, Tensor] = {}
        for weight in weights:
            param = self._param(weight)
            if param in before:
                continue
            before[param] = param.clone()
            for kind, factor in factors.items():
                chosen = weight.channels.of_kind((kind,))
                if head is not None:
                    chosen &= weight.channels.heads == head
                scale = spread(torch.where(chosen, factor, 1.0).to(param), weight.dims, param)
                param.copy_((param + weight.offset) * scale - weight.offset)
        seen = self._forward()
        for param, value in before.items():
            param.copy_(value)
        return seen

    def _param(self, weight: Weight) -> Tensor:
        return self.module.get_parameter(weight.path)

    def _forward(self) -> _Seen:
        ledger, inputs = self.observer.ledger, self.inputs
        ledger.close_step()
        args, kwargs = inputs.copied()
        pairs = self.observer.recorders[0].pairs = []
        # Autocast's cache would return weights cast before they were scaled.
        autocast = torch.autocast(
            device_of(self.module).type, inputs.autocast, enabled=inputs.autocast is not None, cache_enabled=False
        )
        with apart(self.module), autocast:
            output = self.module(*args, **kwargs)
        floats = (leaf for leaf in tree_iter(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())
        nothing = ledger.values.new_empty(self.spec.num_heads, 0)
        return _Seen(
            ledger.values[0].clone(),
            torch.cat([_by_head(query) for query, _ in pairs], 1) if pairs else nothing,
            torch.cat([_by_head(key, query.shape[-3]) for query, key in pairs], 1) if pairs else nothing,
            next(floats, nothing).reshape(1, -1).float(),
        )


def _is_sharded(module: nn.Module) -> bool:
    return any(isinstance(child, FSDPModule) for child in module.modules()) or any(
        isinstance(param, DTensor) for param in module.parameters()
    )


def _by_head(x: Tensor, heads: int | None = None) -> Tensor:
    """A float32 tensor of shape (heads, everything else); shared keys are repeated."""
    return x.repeat_interleave((heads or x.shape[-3]) // x.shape[-3], -3).movedim(-3, 0).flatten(1).float()


def _heads(weights: list[Weight], kinds: tuple[str, ...]) -> list[int]:
    """Heads that have channels of these kinds; :data:`NO_HEAD` is among them if any are shared."""
    own = [weight.channels.heads[weight.channels.of_kind(kinds)] for weight in weights]
    return sorted(set(torch.cat(own).tolist()))


def _raise_for(checks: list[Check]) -> None:
    failures = [_failure(check, head) for check in checks for head in check.wrong_heads]
    if failures:
        more = f"\n    ... and {len(failures) - 8} more" if len(failures) > 8 else ""
        raise ValueError(
            "a spec does not describe its attention, so QK-Clip would scale the wrong weights:\n    "
            + "\n    ".join(failures[:8])
            + more
            + "\nCorrect the layout, the sizes or the number of heads. The spec must also cover every bias."
            "\nIf queries or keys are normalized after the projection, set qk_norm=True or list the gains."
        )


def _failure(check: Check, head: int) -> str:
    layer, expected, found = check.layer or "(model)", float(check.expected[head]), float(check.found[head])
    if check.what == "output":
        return (
            f"{layer}: with all queries doubled and all keys halved, the output should not change (norm {expected:.6g}), but"
            f" it does (norm {found:.6g}): the layout of queries or keys includes other channels, such as values"
        )
    whose = "all heads'" if check.head == NO_HEAD else f"head {check.head}'s"
    done = {"kn against qn": "keys halved and queries doubled"}.get(check.side, f"{check.side} halved")
    what = "the largest logit" if check.what == "largest logit" else f"{check.what} of norm"
    return f"{layer}: {whose} {done}, head {head} should have {what} {expected:.6g}, but has {found:.6g}"
