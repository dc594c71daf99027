"""MuonClipCallback: adds Muon and QK-Clip to a Trainer, applies both at every step, and removes them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lightning_muonclip.optim.muon import Muon
from lightning_muonclip.optim.options import check_muon_options
from lightning_muonclip.optim.routing import Route, check_router, route_params, routes_under
from lightning_muonclip.optim.schedules import Schedule
from lightning_muonclip.optim.stats import Stats
from lightning_muonclip.qk_clip.clip import QKClip
from lightning_muonclip.qk_clip.describe.spec import AttentionSpec
from lightning_muonclip.qk_clip.describe.split import check_split
from lightning_muonclip.qk_clip.fused_parts import FusedParts
from lightning_muonclip.qk_clip.observe.capture import Capture
from lightning_muonclip.qk_clip.observe.observer import Observer
from lightning_muonclip.qk_clip.options import check_clip_options
from lightning_muonclip.qk_clip.result import ClipResult
from lightning_muonclip.rehearsal import after_steps
from lightning_muonclip.signatures import share_out, takes_keywords_of
from lightning_muonclip.trainer.announcements import announce_parts, announce_routes, sides_of
from lightning_muonclip.trainer.checkpoints import (
    WITHOUT_CALLBACK,
    emptied_groups,
    explain,
    number_as_in_model,
    warn_of_emptied_groups,
    warn_of_other_settings,
)
from lightning_muonclip.trainer.checks import check_fit, scaler_of, users_optimizer
from lightning_muonclip.trainer.gradients import clip_gradients, params_of, share_infinities
from lightning_muonclip.trainer.groups import FollowingGroups
from lightning_muonclip.trainer.images import check_images
from lightning_muonclip.trainer.logs import ClipLog, log_heads, log_stats
from lightning_muonclip.trainer.mixin import MaxLogitsMixin
from lightning_muonclip.trainer.strategies import check_strategy, restores_optimizers


@takes_keywords_of(QKClip, Muon, but=("model", "example", "observer", "process_group", "params", "track_stats"))
class MuonClipCallback(Callback):
    """Trains any transformer with MuonClip: Muon for hidden matrices, the user's optimizer for the rest, QK-Clip.

    When fitting starts, hidden matrices move from the user's optimizer to a :class:`~lightning_muonclip.Muon` in
    ``trainer.optimizers``. Its groups follow the learning rate and weight decay of the groups that the matrices came from,
    so schedulers, LearningRateMonitor and checkpoints work as before. At every step the gradients of both optimizers are
    clipped together if the Trainer clips, Muon steps, and QK-Clip runs once all query and key weights are updated.
    Attention is found and read before the first forward in training (see :class:`~lightning_muonclip.QKClip`).

    Logs ``muonclip/max_logit``, ``muonclip/min_gamma``, ``muonclip/clipped_heads`` and ``muonclip/nonfinite``;
    ``muonclip/uncertified_heads``, the number of heads whose largest logit is not proven to be the largest (0 on a CPU); and
    ``muonclip/unowned_max_logit``, the largest logit of attention that no optimizer trains, such as a teacher's.

    Args:
        threshold: Attention logits above this are clipped; ``None`` only monitors.
        alpha: Share of a clip that the query weight takes, in [0, 1].
        lr: Base learning rate of Muon, under the schedule of the user's groups, relative to their initial rate
            (``max_lr / div_factor`` for OneCycleLR). ``None`` follows the user's groups, whose rate should be one for
            AdamW: there is a warning with the rate if no class of the optimizer has Adam in its name, or if it is 1 or more.
        weight_decay: Muon's own weight decay, or a function from the number of steps to it; ``None`` follows the user's
            groups. A group that has no decay then has none.
        adjust_lr_fn: Scale of Muon's update; with ``"match_rms_adamw"`` AdamW's learning rate and weight decay carry over.
        specs: Layouts of attention modules by name, as :class:`~lightning_muonclip.QKClip` takes them.
        verify: Whether to prove on the first batch that every spec scales the weights of its heads (see
            :meth:`QKClip.verify <lightning_muonclip.QKClip.verify>`).
        split: What Muon orthogonalizes of a fused projection: queries, keys and values apart (``"qkv"``), every head
            (``"heads"``), every two neighbouring heads (``"pairs"``), or all of it together (``"none"``).
        exclude: Shell-style patterns of parameter names that stay with the user's optimizer.
        include: Patterns of parameter names to give to Muon that it would not get by default.
        router: The optimizer of the routers of experts: ``"muon"``, or ``"adamw"`` for the user's (see
            :func:`~lightning_muonclip.optim.routing.route_params`, which also tells where every parameter goes and why).
        log_heads_every_n_steps: Logs every head's maximum at this interval: as numbers ``max_logits/<layer>/<head>`` to all
            loggers and, to those that take images (TensorBoard, W&B, MLflow), as a heat map ``muonclip/heads``, which
            needs matplotlib. ``None`` never does.
        log_stats_every_n_steps: Logs what Muon's matrices do at this interval, as :meth:`Muon.stats
            <lightning_muonclip.Muon.stats>` has it: the mean of each figure as ``muon/<figure>``, that of each matrix as
            ``muon/<figure>/<name>``; ``None`` never does.
        **options: Any other keyword of :class:`~lightning_muonclip.QKClip` (``shared_keys``, ``qk_norm``, ``logits``,
            ``lora``, ``every_n_steps``, ``unknown``) and of :class:`~lightning_muonclip.Muon` (``momentum``, ``nesterov``,
            ``ns_coefficients``, ``ns_steps``, ``eps``, ``dtype``, ``stack_numel``, ``parts``, ``shard_momentum``).

    Raises:
        ValueError: If an argument is out of range; when fitting starts, if the Trainer, the optimizer or the model cannot
            work with it.
        ModuleNotFoundError: When fitting starts, if pictures are to be drawn without matplotlib.

    Source: Kimi K2, arXiv 2507.20534, section 2.1 and algorithm 1.

    Example::

        trainer = Trainer(callbacks=[MuonClipCallback()])
        trainer.fit(model, data)
    """

    def __init__(
        self,
        threshold: float | None = 100.0,
        alpha: float = 0.5,
        lr: float | None = None,
        weight_decay: float | Schedule | None = None,
        *,
        adjust_lr_fn: str | None = "match_rms_adamw",
        specs: Mapping[str, AttentionSpec | None] | None = None,
        verify: bool = False,
        split: str = "qkv",
        exclude: Sequence[str] = (),
        include: Sequence[str] = (),
        router: str = "muon",
        log_heads_every_n_steps: int | None = None,
        log_stats_every_n_steps: int | None = None,
        **options: Any,
    ) -> None:
        clip_options, muon_options = share_out(options, QKClip, Muon)
        self._clip_options = {"threshold": threshold, "alpha": alpha, **clip_options}
        self._given_parts = muon_options.pop("parts") or {}
        self._muon_options = {"adjust_lr_fn": adjust_lr_fn, **muon_options}
        if callable(weight_decay):
            self._muon_options["weight_decay"] = weight_decay
        check_clip_options(**self._clip_options)
        check_muon_options(**{"lr": lr or 0.0, "weight_decay": weight_decay or 0.0, **self._muon_options})
        check_split(split)
        check_router(router)
        if verify and self._clip_options["logits"] == "off":
            raise ValueError("verify=True needs QK-Clip, which logits='off' turns off; drop one of them")
        self.lr = lr
        self.weight_decay = weight_decay
        self.specs = specs
        self.verify = verify
        self.split = split
        self.exclude = tuple(exclude)
        self.include = tuple(include)
        self.router = router
        self.log_heads_every_n_steps = log_heads_every_n_steps
        self.log_stats_every_n_steps = log_stats_every_n_steps
        #: What Muon's matrices did in the last step that was logged.
        self.last_stats: Stats = {}
        self.last_stats_step = 0
        self.muon: Muon | None = None
        self.qk_clip: QKClip | None = None
        #: Maxima and clips of the last step; ``None`` before the first, and after one that was skipped or not due.
        self.last: ClipResult | None = None
        self._groups: FollowingGroups | None = None
        self._observer: Observer | None = None
        self._fused_parts: FusedParts | None = None
        self._routes: list[Route] = []
        self._restored_clips: dict[str, Any] | None = None
        self._handles: list[Any] = []
        self._capture: Capture | None = None
        self._verified: set[str] = set()
        #: What was last printed of what QK-Clip scales.
        self._told_sides: list[str] = []
        self._log = ClipLog()
        #: Whether Muon steps all weights that QK-Clip scales; otherwise the user's optimizer, which steps later, does too.
        self._muon_is_last = True
        self._last_step = 0
        self._has_started = False

    # Arm ------------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks that Trainer, module and strategy fit, before anything runs."""
        if stage != "fit":
            return
        self.muon, self.qk_clip, self.last, self._restored_clips = None, None, None, None
        self._has_started, self._log, self._told_sides = False, ClipLog(), []
        self.last_stats, self.last_stats_step = {}, 0
        check_strategy(trainer.strategy)
        check_fit(trainer, pl_module, MuonClipCallback)
        if self.log_heads_every_n_steps:
            check_images(trainer)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restores the clip counts; refuses a checkpoint that was saved without the callback."""
        if trainer.state.fn != "fit":
            return
        if len(checkpoint.get("optimizer_states", ())) == 1:
            raise ValueError(WITHOUT_CALLBACK)
        self._restored_clips = checkpoint.get("muonclip")
        self._restore_clips()
        if restores_optimizers(trainer.strategy):
            for i, settings in checkpoint.get("muonclip_groups", {}).items():
                trainer.optimizers[0].param_groups[i].update(settings)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the clip counts, which are equal on every rank; all other state is in the optimizers."""
        if self.muon is None:
            return  # saved before fitting
        if self.qk_clip is not None:
            checkpoint["muonclip"] = self.qk_clip.state_dict()
        checkpoint["muonclip_groups"] = emptied_groups(trainer.optimizers[0])
        number_as_in_model(
            checkpoint.get("optimizer_states", ()),
            trainer.optimizers,
            pl_module,
            already=restores_optimizers(trainer.strategy),
        )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Moves the hidden matrices to Muon and starts observing, before any optimizer is restored."""
        optimizer = users_optimizer(trainer)
        self._routes = routes_under(optimizer, route_params(pl_module, self.exclude, self.include, self.router))
        self._groups = FollowingGroups(optimizer, self._routes, self.lr, self.weight_decay)
        self._observer = self._observe(pl_module)
        self._fused_parts = FusedParts(pl_module, self.split, self._given_parts)
        self._fused_parts.update(self._observer.attention, self._observer.fused)
        self.muon = Muon(self._groups.groups, parts=self._fused_parts.parts, **self._muon_options)
        self._groups.follow(self.muon)
        if scaler_of(trainer) is not None and not any(group["params"] for group in optimizer.param_groups):
            raise ValueError(
                f"Muon takes every parameter of {type(optimizer).__name__}, and a GradScaler cannot step an empty optimizer;"
                " exclude some parameters (exclude=[...]), or train in bf16-mixed"
            )
        trainer.optimizers = [*trainer.optimizers, self.muon]
        self._observer.owned.add(*trainer.optimizers)
        if restores_optimizers(trainer.strategy):
            warn_of_emptied_groups(optimizer)
        if self._clip_options["logits"] != "off":
            self.qk_clip = QKClip(pl_module, specs=self.specs, observer=self._observer, **self._clip_options)
            self._restore_clips()
            for own in (self.muon, optimizer):
                self._handles += after_steps(own, self._apply_qk_clip)
        announce_routes(self._routes, self.muon.parts)
        self._follow_attention()

    def _observe(self, pl_module: pl.LightningModule) -> Observer:
        """The observer of the module, shared with the mixin."""
        logits = self._clip_options["logits"]
        is_only_watched = self._clip_options["threshold"] is None or logits == "off"
        unknown = "monitor" if is_only_watched else self._clip_options["unknown"]
        if not isinstance(pl_module, MaxLogitsMixin) or logits == "off":
            return Observer(pl_module, self.specs, logits, unknown=unknown)
        pl_module.stop_observing()
        pl_module.attention_specs = pl_module.attention_specs if self.specs is None else self.specs
        pl_module.attention_logits, pl_module.attention_unknown = logits, unknown
        return pl_module.observe()

    def _restore_clips(self) -> None:
        """Takes effect once there is a QKClip and a checkpoint: FSDP2 restores after on_fit_start, others before."""
        if self.qk_clip is not None and self._restored_clips is not None:
            self.qk_clip.load_state_dict(self._restored_clips)
            self._restored_clips = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the step that training starts from."""
        self._last_step, self._has_started = trainer.global_step, True
        if self.muon is not None:
            cycled = any("max_momentum" in group for group in trainer.optimizers[0].param_groups)
            warn_of_other_settings(self.muon, but=("momentum",) if cycled else ())
        if self.verify and self.qk_clip is not None:
            self._verified.clear()
            self._capture = Capture(self.qk_clip.observer)
        if trainer.gradient_clip_val and is_overridden("configure_gradient_clipping", pl_module):
            rank_zero_warn(
                f"{type(pl_module).__name__} overrides configure_gradient_clipping, which sees only the gradients of"
                f" {type(trainer.optimizers[0]).__name__}; MuonClipCallback clips all gradients by gradient_clip_val before"
                " it is called"
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Clears the result of the previous step."""
        self.last = None

    # Apply ----------------------------------------------------------------------------------------------------------

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Clears the gradients of Muon's matrices when Lightning clears the user's."""
        if self.muon is not None:
            self.muon.zero_grad()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes a GradScaler skip both optimizers if the gradients of either are not finite."""
        if scaler_of(trainer) is not None:
            share_infinities(trainer.optimizers)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Clips the gradients of both optimizers together and steps Muon; QK-Clip runs in a hook after the last step."""
        assert self.muon is not None
        assert self._groups is not None
        if all(p.grad is None for p in params_of(self.muon)):
            return  # training_step returned None
        self._verify()
        self._groups.follow(self.muon)
        self._take_up_attention()
        if self.log_stats_every_n_steps:
            self.muon.track_stats = (trainer.global_step + 1) % self.log_stats_every_n_steps == 0
        scaler = scaler_of(trainer)
        if scaler is not None:
            scaler.unscale_(self.muon)
        clip_gradients(trainer, pl_module)
        if scaler is not None:
            scaler.step(self.muon)
        else:
            self.muon.step()

    def _verify(self) -> None:
        """Proves the specs before anything is updated, each on the inputs of the first forward that used its module."""
        capture, self._capture = self._capture, None
        if capture is None or self.qk_clip is None:
            return
        capture.close()
        if capture.frames:
            self._verified |= capture.frames.keys()
            rank_zero_info(f"QK-Clip verified\n{self.qk_clip.verify_inputs(capture)}")
        if not self._verified.issuperset(capture.attention):
            self._capture = Capture(self.qk_clip.observer, but=self._verified)

    def _take_up_attention(self) -> None:
        """Splits fused weights of attention that was found since the last step, and says what QK-Clip will scale."""
        assert self.muon is not None
        assert self._observer is not None
        assert self._fused_parts is not None
        attention = self._observer.settle() if self.qk_clip is None else self.qk_clip.settle()
        if self._fused_parts.update(attention, self._observer.fused):
            self.muon.set_parts(self._fused_parts.parts)
            self.muon.set_heads(self._fused_parts.heads)
            self._follow_attention()
            announce_parts(self._routes, self.muon.parts)

    def _follow_attention(self) -> None:
        """Decides after whose step QK-Clip runs, and says what it will scale."""
        assert self.muon is not None
        if self.qk_clip is not None:
            of_muon = set(params_of(self.muon))
            self._muon_is_last = all(p in of_muon for p in self.qk_clip.params)
            told, self._told_sides = self._told_sides, sides_of(self.qk_clip)
            if self._told_sides != told:
                rank_zero_info("\n".join(self._told_sides))

    def _apply_qk_clip(self, optimizer: Optimizer) -> None:
        """Clips after the last update of a query or key weight; the user's optimizer steps after Muon."""
        assert self.qk_clip is not None
        if (optimizer is self.muon) != self._muon_is_last:
            return
        is_due = self.qk_clip.is_due
        result = self.qk_clip.step()
        self.last = result if is_due else None

    # Clear ----------------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the result of a step, or discards the maxima of a skipped one."""
        assert self.muon is not None
        assert self._groups is not None
        # Schedulers have stepped; monitors and checkpoints see the learning rate of the next step.
        self._groups.follow(self.muon)
        if trainer.global_step == self._last_step:
            return  # accumulating gradients
        self._last_step = trainer.global_step
        if self.log_stats_every_n_steps and self.muon.track_stats:
            self.last_stats, self.last_stats_step = self.muon.stats(), trainer.global_step
            log_stats(trainer, self.last_stats)
        if self.qk_clip is None:
            return
        if self.last is None:
            self.qk_clip.discard()
            return
        self._log.log(pl_module, self.last)
        if self.log_heads_every_n_steps and trainer.global_step % self.log_heads_every_n_steps == 0:
            log_heads(trainer, self.qk_clip, self.last)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stops observing; the optimizers stay in the Trainer so that checkpoints can still be saved."""
        self._disarm()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stops observing; explains a checkpoint that could not be loaded."""
        self._disarm()
        if not self._has_started:
            explain(trainer, exception)

    def _disarm(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._capture is not None:
            self._capture.close()
            self._capture = None
        if self._observer is not None:
            self._observer.close()
