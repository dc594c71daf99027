"""QKClip: scales the query and key weights of every head whose largest logit exceeds the threshold."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_muonclip.parallel.holders import has_others
from lightning_muonclip.qk_clip.counts import Counts
from lightning_muonclip.qk_clip.describe.declared import AttentionModules, unwrapped
from lightning_muonclip.qk_clip.describe.find import Example
from lightning_muonclip.qk_clip.describe.isolate import device_of
from lightning_muonclip.qk_clip.describe.saved import restored_attention, saved_attention
from lightning_muonclip.qk_clip.describe.spec import AttentionSpec
from lightning_muonclip.qk_clip.describe.survey import run_watched
from lightning_muonclip.qk_clip.effect import Effect
from lightning_muonclip.qk_clip.observe.capture import Capture
from lightning_muonclip.qk_clip.observe.deferred_read import DeferredRead
from lightning_muonclip.qk_clip.observe.ledger import reduce_max
from lightning_muonclip.qk_clip.observe.observer import Observer
from lightning_muonclip.qk_clip.observe.watch import watch_of
from lightning_muonclip.qk_clip.options import check_clip_options
from lightning_muonclip.qk_clip.owned import has_part_of
from lightning_muonclip.qk_clip.plan import ClipPlan
from lightning_muonclip.qk_clip.result import ClipResult
from lightning_muonclip.qk_clip.rule import qk_clip_gamma
from lightning_muonclip.qk_clip.summary import summary_table
from lightning_muonclip.qk_clip.verify import Verification, verify_attention
from lightning_muonclip.rehearsal import after_steps


class QKClip:
    """Caps the attention logits of every head, with any optimizer, in plain PyTorch.

    Observes the model from construction until :meth:`close`; also a context manager.

    Before the first forward in training, QKClip runs the model once on the same inputs, finds all attention that it
    computes, and infers from what it does which weights make which head. Every answer is proven, and no name of a class or
    a weight is looked at. A module that runs later for the first time is read then. The first forward is not compiled.

    Args:
        model: The model. Create a new QKClip after freezing or unfreezing weights.
        threshold: Logits above this are clipped; ``None`` only monitors.
        alpha: Share of a clip that the query weight takes, in [0, 1].
        specs: Layouts of attention modules by module name, which go before inference; ``None`` as a value leaves a module
            alone. So do classes of :func:`~lightning_muonclip.register_attention`.
        shared_keys: How a key that several query heads share is treated: ``"query"``, ``"group"``, ``"min_k"`` or
            ``"compensate"`` (see :func:`~lightning_muonclip.qk_clip.rule.key_factors`).
        qk_norm: A norm after the projection cancels a factor on its weight. ``"monitor"`` only watches such attention,
            ``"gain"`` scales the gains of the norms, and ``"error"`` refuses it; a gain that all heads share is scaled by
            the smallest gamma among them.
        logits: ``"exact"`` finds the largest logits of every training forward, from the log-sum-exp that the attention
            kernel returns and a few products that prove it, or from all products. ``"lse"`` takes the log-sum-exp alone, an
            upper bound (at most ln(n) too high for n keys). ``"off"`` measures nothing, for callers that pass the maxima to
            :meth:`step`.
        lora: For layers that LoRA (peft) adapts: ``"monitor"`` only watches them; ``"scale"`` scales the frozen base and
            every ``B`` together, which is exact, but adapters saved alone then no longer fit the original base.
        every_n_steps: Measures and clips at the first of every n steps.
        unknown: What to do with attention that cannot be read and has trainable weights: ``"error"`` stops with the reason;
            ``"monitor"`` only watches it. With ``threshold=None`` it is always watched.
        example: Arguments of the model, ``(args, kwargs)``, on which its attention is found and inferred at once.
        observer: An observer of the model to share; ``None`` creates one.
        process_group: The ranks that see different data or, under tensor parallelism, different heads; ``None`` is the
            default group.

    Raises:
        ValueError: If an argument is out of range or a spec does not fit; in the first forward, or at once with ``example``,
            if attention cannot be read; in the first step, if there is none, or if ``qk_norm`` refuses it; in any step, if
            attention was computed by other weights than those that it was read with.

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
        qk_norm: str = "monitor",
        logits: str = "exact",
        *,
        lora: str = "monitor",
        every_n_steps: int = 1,
        unknown: str = "error",
        example: Example | None = None,
        observer: Observer | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_clip_options(threshold, alpha, shared_keys, qk_norm, logits, lora, every_n_steps, unknown)
        self.model = model
        self.threshold = threshold
        self.every_n_steps = every_n_steps
        self.process_group = process_group
        self.observer = observer or Observer(
            model, specs, logits, unknown="monitor" if threshold is None else unknown, example=example
        )
        self.observer.threshold = threshold
        for recorder in self.observer.recorders:
            recorder.threshold = threshold
        self._alpha = alpha
        self._shared_keys = shared_keys
        self._qk_norm = qk_norm
        self._lora = lora
        self._steps = 0
        self._counts = Counts()
        self._effect: Effect | None = None
        self._plan: ClipPlan | None = None
        self._owned: set[Tensor] | None = None
        self._owned_rows: Tensor | None = None
        self._arranged: AttentionModules = {}
        #: Whether a rank has found attention that others do not know, as of the last step.
        self._is_alone = DeferredRead()
        self._handles: list[Any] = []
        self._owns_observer = observer is None
        try:
            self._arrange()
        except ValueError:
            self.close()
            raise

    def _arrange(self) -> None:
        """Brings the plan and the counts up to date with the attention that is known."""
        attention, owned = self.observer.attention, self.observer.owned.params()
        if self._arranged is attention and self._owned == owned:
            return
        if self.threshold is not None and attention:
            self._plan = ClipPlan(attention, self._alpha, self._shared_keys, self._qk_norm, self._lora, owned)
        self._owned = owned
        of_run = [[has_part_of(module, owned)] for module, _ in attention.values()]
        self._owned_rows = None if all(own for (own,) in of_run) else torch.tensor(of_run)
        self._remember_effect()
        self._counts.arrange(attention)
        self._arranged, self._effect = attention, None
        if self._plan is not None and self._plan.scaled:
            self._effect = Effect(self._plan, list(attention), self._counts.memory)

    def _remember_effect(self) -> None:
        if self._effect is not None:
            self._counts.memory = self._effect.memory

    @property
    def clips(self) -> Tensor:
        """Number of times that each head was clipped, int64, shape (layers, most heads)."""
        self._arrange()
        return self._counts.clips

    @property
    def layers(self) -> list[str]:
        """Names of the attention modules, in ``named_modules`` order: the rows of :attr:`max_logits`.

        Before the first forward, those that are described by specs or by their class.
        """
        return self.observer.layers

    @property
    def params(self) -> list[Tensor]:
        """The weights and biases that a clip scales; empty if it only monitors."""
        self._arrange()
        return [] if self._plan is None else self._plan.params

    @property
    def max_logits(self) -> Tensor:
        """Largest logits on this rank since the last step, shape (layers, most heads); -inf where nothing was recorded."""
        return self.observer.ledger.values

    def attach(self, optimizer: Optimizer) -> None:
        """Runs :meth:`step` after every step of ``optimizer``, and scales only what it, or another attached one, trains."""
        self.observer.owned.add(optimizer)
        self._handles += after_steps(optimizer, lambda _: self.step())

    @torch.no_grad()
    def step(self, max_logits: Tensor | Sequence[Sequence[float]] | None = None) -> ClipResult:
        """Clips every head whose largest logit since the last step exceeds the threshold, then resets the maxima.

        Takes one all-reduce over the ranks, and no host synchronization. With ``every_n_steps``, the steps between do
        nothing.

        Args:
            max_logits: Maxima to use instead of the observed ones: one list of numbers per layer, or a tensor of shape
                (layers, heads).

        Raises:
            ValueError: If ``max_logits`` does not have one row per layer and one number per head.
        """
        with torch.profiler.record_function("muonclip::qk_clip"):
            agreed = self.settle()
            ledger = self.observer.ledger
            observed = ledger.bounded if max_logits is None else ledger.table_of(max_logits).expand(2, -1, -1)
            is_due = self.is_due
            if max_logits is None and self._steps == 0:
                self._check_that_layers_were_seen()
            self._count(self._steps + 1)
            if not is_due:
                return self._result(observed[0], observed[1], torch.ones_like(observed[0]))
            self._doubt_weights_that_took_no_part()
            largest, bounds, *norms = self._reduce(observed, agreed)
            self.observer.close_step()
            gamma = qk_clip_gamma(bounds, self.threshold)
            if self._plan is not None:
                gamma = self._plan.possible(gamma)
                if self._effect is not None and max_logits is None:
                    gamma = self._effect.judge(norms, largest, gamma)  # a bound need not fall with the weights
                self._plan.apply(gamma)
                self._counts.clips = self._counts.clips.to(gamma.device).add_(gamma < 1)
                self._outdate_others(gamma)
            return self._result(largest, bounds, gamma)

    @torch.no_grad()
    def scale_copies(self, copies: Sequence[Tensor], result: ClipResult) -> None:
        """Scales copies of the weights as a step has scaled the weights themselves.

        For an optimizer that keeps copies, such as float32 masters, and would write them over every clip.

        Args:
            copies: Copies of :attr:`params`, in this order, each of the whole weight.
            result: What the step returned.

        Raises:
            ValueError: If they are not as many, or of other shapes.
        """
        shapes, expected = ([tuple(x.shape) for x in own] for own in (copies, self.params))
        if shapes != expected:
            raise ValueError(f"copies have the shapes {shapes}; give one of every tensor in params: {expected}")
        if self._plan is not None:
            self._plan.apply(result.gamma, copies)

    def _result(self, largest: Tensor, bounds: Tensor, gamma: Tensor) -> ClipResult:
        if self._owned_rows is not None:
            self._owned_rows = self._owned_rows.to(gamma.device)
        return ClipResult(largest, gamma, self._owned_rows, bounds)

    def _doubt_weights_that_took_no_part(self) -> None:
        """Other weights than those that a clip scales may have made the queries and keys of this step."""
        attention = list(self.observer.attention.items())
        for row, path in ({} if self._plan is None else self._plan.without_gradient()).items():
            if self.observer.recorders[row].has_attended:
                reason = (
                    f"{path} took no part in a step in which it attended, so other weights may have taken its place"
                )
                name, own = attention[row]
                self.observer.discovery.doubt(name, *own, reason)
        self._arrange()

    def _outdate_others(self, gamma: Tensor) -> None:
        """The maxima that other QKClips have of heads that were clipped now are of the weights as they were."""
        for row, recorder in enumerate(self.observer.recorders):
            for other in watch_of(recorder.module).recorders:
                if other.threshold is not None and other is not recorder:
                    other.ledger.forget(other.row, gamma[row, : other.spec.num_heads] < 1)

    def settle(self) -> AttentionModules:
        """Lets all ranks agree on the attention that is known, if they may not; :meth:`step` does so too.

        Returns:
            The attention modules that all ranks know.
        """
        attention = self.observer.settle(self.process_group, again=bool(self._is_alone.read()))
        self._arrange()
        return attention

    def _reduce(self, observed: Tensor, agreed: AttentionModules) -> tuple[Tensor, ...]:
        """The maxima over all ranks of the logits and their bounds, and of the norms of what makes them, in one exchange.

        Of the layers that all ranks know; whether one knows more is read a step later.
        """
        count = 0 if self.threshold is None else 2  # on all ranks alike, whatever each has found
        norms = observed.new_zeros(count, *observed.shape[1:]) if self._effect is None else self._effect.measure()
        if not has_others(self.process_group):
            return *reduce_max(observed, self.process_group), *norms
        tables = torch.cat([observed, norms.to(observed.device)])
        rows = [row for row, name in enumerate(self.layers) if name in agreed]
        heads = max((spec.num_heads for _, spec in agreed.values()), default=1)
        is_alone = observed.new_full((1, heads), float(len(rows) < len(self.layers)))
        # By numbers: a mask would wait for the device.
        known = [tables[:, row, :heads] for row in rows]
        reduced = reduce_max(torch.cat([*known, is_alone]), self.process_group)
        self._is_alone.write(reduced[-1, 0])
        tables = torch.full_like(tables, float("-inf"))
        for row, own in zip(rows, reduced.split(len(tables))):
            tables[:, row, :heads] = own
        return tuple(tables)

    @property
    def sides(self) -> dict[str, str]:
        """What a clip scales in every layer: ``"q and k"``, ``"q"``, ``"k"``, or ``"watched (reason)"``."""
        self._arrange()
        sides = ["watched (threshold=None)"] * len(self.layers) if self._plan is None else self._plan.sides
        return dict(zip(self.layers, sides))

    def _check_that_layers_were_seen(self) -> None:
        unseen = [recorder.name or "(model)" for recorder in self.observer.recorders if recorder.source is None]
        discovery = self.observer.discovery
        is_left_alone = bool(discovery.left_alone) and not discovery.unseen
        is_missing = not self.layers and not discovery.has_found and discovery.has_surveyed and not discovery.unseen
        if is_missing and not is_left_alone and self.threshold is not None:
            raise ValueError(
                f"{type(self.model).__name__} computes no attention that QK-Clip can see: neither a call of an attention"
                " function nor a softmax over a product of queries and keys. Describe it with specs={name:"
                " AttentionSpec(...)}, or train without QK-Clip: MuonClipCallback(logits='off'), or in plain PyTorch"
                " Muon(split_params(model))"
            )
        if unseen or not (self.layers or is_left_alone):
            warnings.warn(
                f"no logits were recorded in {', '.join(unseen) or 'the model'}, so QK-Clip does not act there. The modules"
                " were not called, had an empty batch, or are in eval mode, as from_pretrained of Hugging Face returns"
                " them; call model.train()",
                stacklevel=4,
            )

    @property
    def is_due(self) -> bool:
        """Whether the current step is measured and clipped."""
        return self._steps % self.every_n_steps == 0

    def _count(self, steps: int) -> None:
        self._steps = steps
        if self.every_n_steps > 1:
            self.observer.pause(self.is_due)

    @torch.no_grad()
    def verify(self, *args: Any, **kwargs: Any) -> Verification:
        """Proves every spec, also those that were inferred.

        Every attention module is run alone, with random weights, on the inputs that it has in a forward of the model. A
        factor of its own for every head must reach the queries and keys of that head, and nothing else may change. Then
        the whole model is run with all queries multiplied by powers of two and all keys divided by them, which must not
        change a bit of its output. Weights may be sharded; nothing is changed or recorded.

        Args:
            *args: Inputs of the model.
            **kwargs: Keyword inputs of the model.

        Returns:
            What was proven of every layer; ``print`` shows a table.

        Raises:
            ValueError: If a spec is wrong, or a layer was not called or cannot be run alone.

        Example:
            >>> from lightning_muonclip import Attention
            >>> with QKClip(Attention(hidden_size=8, num_attention_heads=2)) as qk_clip:
            ...     proofs = qk_clip.verify(torch.randn(1, 5, 8)).proofs
            >>> [(proof.num_heads, proof.scaled, proof.error < 1e-9) for proof in proofs]
            [(2, 'q and k', True)]
        """
        if not self.observer.discovery.has_surveyed:
            self.observer.discovery.survey(unwrapped(self.model), (args, kwargs))
            self._arrange()
        with Capture(self.observer) as capture:
            run_watched(self.model, args, kwargs, capture)
        for name in capture.attention:
            if name not in capture.frames and not self.sides[name].startswith("watched"):
                raise ValueError(
                    f"attention {name!r} was not used in this forward, so its spec cannot be verified; pass inputs that use"
                    f" it, or skip it with specs={{{name!r}: None}}"
                )
        return self.verify_inputs(capture)

    @torch.no_grad()
    def verify_inputs(self, capture: Capture) -> Verification:
        """:meth:`verify` on what was captured in a forward, of the modules that it used.

        Raises:
            ValueError: As :meth:`verify`.
        """
        if capture.root is None:
            raise ValueError("nothing was captured: the model has run no forward since")
        device, dtype = device_of(self.model).type, capture.autocast
        with torch.autocast(device, dtype, enabled=dtype is not None):
            return verify_attention(
                capture.attention,
                capture.frames,
                capture.root,
                self._qk_norm,
                self._lora,
                self.observer.owned.params(),
                scales=self._plan is not None,
            )

    def summary(self) -> str:
        """A table of the layers: class, heads, layout, source of the logits, and what a clip scales."""
        return summary_table(self.observer, list(self.sides.values()))

    def discard(self) -> None:
        """Drops the maxima since the last step, after a step that was skipped."""
        self.observer.discard()

    def close(self) -> None:
        """Stops observing, unless the observer is shared, and detaches from optimizers."""
        if self._owns_observer:
            self.observer.close()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """The clip counts of every head, the number of steps and the specs of the layers, equal on every rank."""
        self._arrange()
        self._remember_effect()
        state = {**self._counts.state_dict(), "steps": self._steps}
        if self.observer.discovery.has_surveyed:
            state |= saved_attention(self.model, self.observer.attention) | self.observer.discovery.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores the counts of :meth:`state_dict`; its specs save the search for attention in the first forward.

        Raises:
            ValueError: If the counts are of layers that the model does not have.
        """
        layers, discovery = state_dict.get("layers", self.layers), self.observer.discovery
        strange = [name for name in layers if name not in discovery.names.values()]
        if strange:
            raise ValueError(
                f"the saved clip counts are of layers that the model does not have: {', '.join(map(repr, strange))};"
                " load them into a model with the same attention layers"
            )
        if state_dict.get("asked") == discovery.asked and not discovery.has_surveyed:
            attention = restored_attention(self.model, state_dict)
            if attention is not None:
                discovery.restore(attention, state_dict)
        self._counts.load_state_dict({**state_dict, "layers": layers})
        self._arranged = {}
        self._count(state_dict.get("steps", 0))

    def __enter__(self) -> QKClip:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
