"""MuonClip: Muon, AdamW and QK-Clip as one optimizer, for plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_muonclip.optim.muon import Muon, evaluated
from lightning_muonclip.optim.routing import split_params
from lightning_muonclip.optim.schedules import Schedule
from lightning_muonclip.qk_clip.clip import QKClip
from lightning_muonclip.qk_clip.describe.spec import AttentionSpec
from lightning_muonclip.qk_clip.fused_parts import FusedParts
from lightning_muonclip.qk_clip.result import ClipResult
from lightning_muonclip.rehearsal import is_rehearsal
from lightning_muonclip.signatures import share_out, takes_keywords_of

#: The entry of the first group that has the counts of QK-Clip in a saved state.
_COUNTS = "qk_clip_counts"


@takes_keywords_of(QKClip, Muon, but=("observer", "params"))
class MuonClip(Muon):
    """The optimizer of Kimi K2 for a whole model: Muon for hidden matrices, AdamW for the rest, then QK-Clip.

    Observes the model's attention logits from construction until :meth:`close`.

    Args:
        model: The model; frozen parameters are left out.
        lr: Learning rate.
        weight_decay: Decoupled weight decay, or a function from the number of steps to it.
        adjust_lr_fn: Scale of Muon's update; with ``"match_rms_adamw"`` AdamW's learning rate and weight decay carry over.
        adamw_lr: AdamW's own learning rate; ``None`` is ``lr``.
        adamw_weight_decay: AdamW's own weight decay, of embeddings, output heads and other tensors; ``None`` is
            ``weight_decay``.
        adamw_betas: Betas of AdamW.
        adamw_eps: Epsilon of AdamW.
        decay_vectors: Whether AdamW also decays biases and parameters of one dimension, such as the gains of norms.
        specs: Layouts of attention modules by name, as :class:`~lightning_muonclip.QKClip` takes them.
        split: What Muon orthogonalizes of a fused projection: queries, keys and values apart (``"qkv"``), every head
            (``"heads"``), every two neighbouring heads (``"pairs"``), or all of it together (``"none"``).
        exclude: Shell-style patterns of parameter names to give to AdamW.
        include: Patterns of parameter names to give to Muon that it would not get by default.
        router: The optimizer of the routers of experts: ``"muon"`` or ``"adamw"`` (see
            :func:`~lightning_muonclip.optim.routing.route_params`, which also tells where every parameter goes and why).
        process_group: The ranks that train this model, if they are not all (see :class:`~lightning_muonclip.Muon`).
        **options: Any other keyword of :class:`~lightning_muonclip.QKClip` (``threshold``, ``alpha``, ``shared_keys``,
            ``qk_norm``, ``logits``, ``lora``, ``every_n_steps``, ``unknown``, ``example``) and of
            :class:`~lightning_muonclip.Muon` (``momentum``, ``nesterov``, ``ns_coefficients``, ``ns_steps``, ``eps``,
            ``dtype``, ``stack_numel``, ``parts``, ``shard_momentum``). With ``logits="off"`` the maxima are given to
            :meth:`step`.

    Raises:
        ValueError: If an argument is out of range, or the attention cannot be read.

    Source: Kimi K2, arXiv 2507.20534, algorithm 1.

    Example:
        >>> from lightning_muonclip import Attention
        >>> model = Attention(hidden_size=8, num_attention_heads=2)
        >>> optimizer = MuonClip(model, lr=3e-4)
        >>> model(torch.randn(2, 5, 8)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.last.max_logits.shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        weight_decay: float | Schedule = 0.1,
        *,
        adjust_lr_fn: str | None = "match_rms_adamw",
        adamw_lr: float | Tensor | None = None,
        adamw_weight_decay: float | Schedule | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        decay_vectors: bool = False,
        specs: Mapping[str, AttentionSpec | None] | None = None,
        split: str = "qkv",
        exclude: Sequence[str] = (),
        include: Sequence[str] = (),
        router: str = "muon",
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        clip_options, muon_options = share_out(options, QKClip, Muon)
        adamw = {
            "lr": lr if adamw_lr is None else adamw_lr,
            "weight_decay": weight_decay if adamw_weight_decay is None else adamw_weight_decay,
            "betas": tuple(adamw_betas),
            "eps": adamw_eps,
        }
        groups = []
        for group in split_params(model, exclude, include, router):
            if group["algorithm"] == "muon":
                groups.append(group)
            elif decay_vectors:
                groups.append(group | adamw)
            else:
                groups += _without_decay_of_vectors(group | adamw)
        qk_clip = QKClip(model, specs=specs, process_group=process_group, **clip_options)
        try:
            self._fused_parts = FusedParts(model, split, muon_options.pop("parts") or {})
            self._fused_parts.update(qk_clip.observer.attention, qk_clip.observer.fused)
            super().__init__(
                groups,
                lr,
                weight_decay,
                adjust_lr_fn=adjust_lr_fn,
                parts=self._fused_parts.parts,
                process_group=process_group,
                **muon_options,
            )
        except BaseException:
            qk_clip.close()  # it observes from construction
            raise
        self.param_groups[0][_COUNTS] = None  # a flattened state is read by the keys that are there
        qk_clip.observer.owned.add(self)
        self.qk_clip: QKClip | None = qk_clip
        self.set_heads(self._fused_parts.heads)
        #: Maxima and clips of the last step.
        self.last: ClipResult | None = None

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        max_logits: Tensor | Sequence[Sequence[float]] | None = None,
    ) -> Any:
        """Steps Muon and AdamW, then clips by the observed maxima or by ``max_logits``.

        Args:
            closure: Reevaluates the model and returns the loss.
            max_logits: One list of numbers per layer, or a tensor of shape (layers, heads).
        """
        if self.qk_clip is None:
            raise RuntimeError(
                "this copy of a MuonClip observes no model, so it cannot clip; create MuonClip(model, ...) and load the"
                " state_dict() of the original"
            )
        loss = evaluated(closure)
        if is_rehearsal(self):
            self._update()
            return loss
        attention = self.qk_clip.settle()
        if self._shared is None:
            self._check_that_params_are_the_models()
        if self._fused_parts.update(attention, self.qk_clip.observer.fused):
            self.set_parts(self._fused_parts.parts)
            self.set_heads(self._fused_parts.heads)
        self._update()
        self.last = self.qk_clip.step(max_logits)
        return loss

    def _check_that_params_are_the_models(self) -> None:
        assert self.qk_clip is not None
        current = dict(self.qk_clip.model.named_parameters())
        named = [pair for group in self.param_groups for pair in zip(group.get("param_names", ()), group["params"])]
        replaced = [name for name, p in named if current.get(name, p) is not p]
        if replaced:
            listed = ", ".join(replaced[:3]) + (", ..." if len(replaced) > 3 else "")
            raise RuntimeError(
                f"{len(replaced)} parameters of the model were replaced after this MuonClip was created, so that it does not"
                f" train them: {listed}. Create MuonClip after to_empty, fully_shard or resize_token_embeddings, or put the"
                " new parameters into the places of the old ones in param_groups"
            )

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer, with that of QK-Clip under ``"qk_clip"``."""
        state = super().state_dict()
        if self.qk_clip is not None:
            own = state["qk_clip"] = self.qk_clip.state_dict()
            # In a group too, since torch.distributed.checkpoint knows states and groups alone; a list is one entry to it.
            state["param_groups"][0][_COUNTS] = [
                own["layers"],
                own["clips"].tolist(),
                own["effect"].tolist(),
                own["steps"],
            ]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads the state of a MuonClip, or of a :class:`~lightning_muonclip.Muon` with the same groups."""
        state = dict(state_dict)
        clips = state.pop("qk_clip", None)
        super().load_state_dict(state)
        counts = self.param_groups[0].get(_COUNTS)
        self.param_groups[0][_COUNTS] = None
        if clips is None and counts is not None:
            clips = dict(zip(("layers", "clips", "effect", "steps"), counts))
        if clips is not None and self.qk_clip is not None:
            self.qk_clip.load_state_dict(clips)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"qk_clip": None, "last": None}

    def close(self) -> None:
        """Stops observing."""
        if self.qk_clip is not None:
            self.qk_clip.close()


def _without_decay_of_vectors(group: dict[str, Any]) -> list[dict[str, Any]]:
    """AdamW's group, split into what weight decay is for, and vectors: biases, and whatever has one dimension."""
    vectors = [(name, p) for name, p in group["params"] if p.ndim < 2 or "bias" in name.rpartition(".")[2]]
    names = {name for name, _ in vectors}
    others = [(name, p) for name, p in group["params"] if name not in names]
    own = (group | {"params": others}, group | {"params": vectors, "name": "adamw-vector", "weight_decay": 0.0})
    return [each for each in own if each["params"]]
