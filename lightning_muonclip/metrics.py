"""MaxLogits: per-head maximum attention logits as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class MaxLogits(Metric):
    """Per-head maximum attention logits over all updates and ranks.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``max_logits`` (:class:`~torch.Tensor`): shape ``(layers, heads)``, as in ``MaxLogitsMixin.max_logits``,
      ``QKClip.max_logits`` or the result of a step; ``-inf`` where a head was not seen.

    As output of ``forward`` and ``compute`` the metric returns:

    - ``max_logits`` (:class:`~torch.Tensor`): float32, shape ``(layers, heads)``.

    Args:
        num_layers: Number of attention layers.
        num_heads: Largest number of heads in any layer.
        threshold: A dashed line in a trajectory; a heat map marks the heads above it as clipped.
        kwargs: Further arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an update has a different shape.

    Example:
        >>> metric = MaxLogits(num_layers=1, num_heads=2)
        >>> metric.update(torch.tensor([[1.0, 5.0]]))
        >>> metric.update(torch.tensor([[3.0, 2.0]]))
        >>> metric.compute()
        tensor([[3., 5.]])
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    maxima: Tensor

    def __init__(self, num_layers: int, num_heads: int, threshold: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = threshold
        nothing_seen = torch.full((num_layers, num_heads), float("-inf"))
        self.add_state("maxima", default=nothing_seen, dist_reduce_fx="max")

    def update(self, max_logits: Tensor) -> None:
        """Updates the maxima with those of one step, shape ``(layers, heads)``."""
        if max_logits.shape != self.maxima.shape:
            raise ValueError(
                f"max_logits must have shape {tuple(self.maxima.shape)} (layers, heads), got {tuple(max_logits.shape)}"
            )
        self.maxima = torch.maximum(self.maxima, max_logits.detach().to(self.maxima))

    def compute(self) -> Tensor:
        """The maxima over all updates, shape ``(layers, heads)``."""
        return self.maxima

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> tuple[Any, Any]:
        """Draws a heat map of layers and heads, or the trajectory of every head over several values.

        Args:
            val: A value of shape ``(layers, heads)`` for a heat map, or a sequence of values (or a tensor of shape
                ``(steps, layers, heads)``) for a trajectory. Defaults to :meth:`compute`.
            ax: Matplotlib axes to draw into. Defaults to new ones.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        values = self.compute() if val is None else val if isinstance(val, Tensor) else torch.stack(list(val))
        values = values.detach().float().cpu()
        axes = _new_axes() if ax is None else ax
        if values.ndim == 3:
            _draw_trajectory(values, self.threshold, axes)
        else:
            _draw_heat_map(values, self.threshold, axes)
        return axes.figure, axes


def _new_axes() -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("MaxLogits.plot needs matplotlib: pip install 'lightning-muonclip[plot]'") from error
    return Figure(figsize=(8, 4.5), layout="constrained").subplots()


def _draw_trajectory(values: Tensor, threshold: float | None, axes: Any) -> None:
    _, layers, heads = values.shape
    curves = values.where(values.isfinite(), torch.nan)
    for layer in range(layers):
        for head in range(heads):
            color = f"C{layer % 10}"
            label = f"layer {layer}" if head == 0 else None
            axes.plot(curves[:, layer, head], color=color, lw=0.8, alpha=0.7, label=label)
    if threshold is not None:
        axes.axhline(threshold, color="black", ls="--", lw=1, label=f"threshold {threshold:g}")
    axes.set(xlabel="step", ylabel="max logit", title="Largest attention logit of every head")
    axes.legend(fontsize="small", ncols=2)


#: Readable on any color of the map.
_LABEL = {"boxstyle": "round", "color": "black", "alpha": 0.6}


def _draw_heat_map(values: Tensor, threshold: float | None, axes: Any) -> None:
    image = axes.imshow(values.where(values.isfinite(), torch.nan).numpy(), aspect="auto", cmap="viridis")
    axes.figure.colorbar(image, ax=axes, label="max logit")
    axes.set(xlabel="head", ylabel="layer", title="Largest attention logit")
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(values.shape[0]))
    if threshold is not None:
        for layer, head in (values.isfinite() & (values > threshold)).nonzero().tolist():
            axes.text(head, layer, "clipped", ha="center", va="center", color="white", fontsize="small", bbox=_LABEL)
