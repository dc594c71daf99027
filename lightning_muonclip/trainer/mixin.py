"""MaxLogitsMixin: per-head maxima of the attention logits as an attribute of a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
from torch import Tensor

from lightning_muonclip.optim.muon import Muon
from lightning_muonclip.qk_clip.describe.registry import find_attention
from lightning_muonclip.qk_clip.describe.spec import AttentionSpec
from lightning_muonclip.qk_clip.observe.observer import Observer


class MaxLogitsMixin(pl.LightningModule):
    """Collects each attention head's largest logit while the module is trained.

    Under a Trainer it attaches itself when fitting starts, shared with a
    :class:`~lightning_muonclip.MuonClipCallback` if there is one. Outside of a Trainer, call :meth:`observe` once before
    the first forward.

    Attributes:
        attention_specs: The user's word on attention modules, by name; ``None`` relies on recognition alone.
        attention_logits: ``"exact"`` or ``"lse"`` (see :class:`~lightning_muonclip.QKClip`).

    Example::

        class LitGPT(MaxLogitsMixin):
            def training_step(self, batch, batch_idx):
                loss = self.model(*batch)
                self.log("max_logit", self.max_logits.max())
                return loss
    """

    attention_specs: Mapping[str, AttentionSpec | None] | None = None
    attention_logits: str = "exact"
    _observer: Observer | None = None

    @property
    def max_logits(self) -> Tensor:
        """Largest logits on this rank, shape (layers, most heads), on the device.

        Of the step under way; before its first forward, of the step before. ``-inf`` where there is no such head or
        nothing was seen.
        """
        return (self._observer or self.observe()).ledger.latest

    @property
    def max_logits_layers(self) -> list[str]:
        """Names of the attention modules: the rows of :attr:`max_logits`."""
        return self.observe().layers

    def observe(self) -> Observer:
        """The observer of this module's attention; attached by the first call.

        Raises:
            ValueError: If there is no attention, or one that cannot be read.
        """
        if self._observer is None or self._observer.closed:
            self._observer = Observer(find_attention(self, self.attention_specs), self.attention_logits)
        return self._observer

    def stop_observing(self) -> None:
        """Detaches from the attention modules; what was seen stays readable."""
        if self._observer is not None:
            self._observer.close()

    def on_fit_start(self) -> None:
        """Attaches, and ends a window of maxima with every optimizer step. Overriding it? Call ``super()``."""
        super().on_fit_start()
        ledger = self.observe().ledger
        for optimizer in self.trainer.optimizers:
            if not isinstance(optimizer, Muon):  # the callback's steps first, and QK-Clip may still wait for the user's
                optimizer.register_step_post_hook(lambda *_: ledger.close_step())

    def teardown(self, stage: str) -> None:
        """Detaches when a stage ends. Overriding it? Call ``super()``."""
        super().teardown(stage)
        self.stop_observing()
