"""MaxLogitsMixin: the largest attention logit of every head as an attribute of a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
from torch import Tensor

from lightning_muonclip.optim.muon import Muon
from lightning_muonclip.qk_clip.describe.spec import AttentionSpec
from lightning_muonclip.qk_clip.observe.observer import Observer
from lightning_muonclip.rehearsal import after_steps


class MaxLogitsMixin(pl.LightningModule):
    """Collects each attention head's largest logit while the module is trained.

    Observation starts with fitting, and is shared with a :class:`~lightning_muonclip.MuonClipCallback` if there is one.
    Outside of a Trainer, call :meth:`observe` once before the first forward.

    Attributes:
        attention_specs: Layouts of attention modules by name, which go before inference.
        attention_unknown: What to do with attention that cannot be read: ``"monitor"`` or ``"error"``.
        attention_logits: ``"exact"`` or ``"lse"`` (see :class:`~lightning_muonclip.QKClip`).

    Example::

        class LitGPT(MaxLogitsMixin):
            def training_step(self, batch, batch_idx):
                loss = self.model(*batch)
                self.log("max_logit", self.max_logits.max())
                return loss
    """

    attention_specs: Mapping[str, AttentionSpec | None] | None = None
    attention_unknown: str = "monitor"
    attention_logits: str = "exact"
    _observer: Observer | None = None

    @property
    def max_logits(self) -> Tensor:
        """Largest logits on this rank, shape (layers, most heads), on the device.

        They are of the current step, or of the previous one before the first forward. ``-inf`` where a layer has no such
        head or nothing was recorded. There are more rows once more attention has been found.
        """
        return (self._observer or self.observe()).ledger.latest

    @property
    def max_logits_layers(self) -> list[str]:
        """Names of the attention modules: the rows of :attr:`max_logits`."""
        return (self._observer or self.observe()).layers

    def observe(self) -> Observer:
        """Starts to observe this module's attention, once, and returns the observer.

        Attention that no spec describes is found in the first forward.
        """
        if self._observer is None or self._observer.closed:
            self._observer = Observer(self, self.attention_specs, self.attention_logits, unknown=self.attention_unknown)
        return self._observer

    def stop_observing(self) -> None:
        """Stops observing; what was recorded stays readable."""
        if self._observer is not None:
            self._observer.close()

    def on_fit_start(self) -> None:
        """Starts to observe; every optimizer step starts new maxima. Call ``super()`` if you override it."""
        super().on_fit_start()
        observer = self.observe()
        for optimizer in self.trainer.optimizers:
            if not isinstance(optimizer, Muon):  # steps first, and QK-Clip may run after the user's optimizer
                after_steps(optimizer, lambda _: observer.close_step())

    def teardown(self, stage: str) -> None:
        """Stops observing. Call ``super()`` if you override it."""
        super().teardown(stage)
        self.stop_observing()
