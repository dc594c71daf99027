"""A model of timm, as the application configures it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_muonclip.experiment.optional import optional


class TimmModel(nn.Module):
    """Any classifier of timm, with random weights; nothing is downloaded.

    Args:
        name: Its name, as :func:`timm.create_model` takes it.
        num_classes: Number of classes. ``None``, here and below, is the model's own.
        img_size: Height and width of the images, in pixels. A model for images of any size does not take it.
        in_chans: Number of their channels.
        overrides: Further arguments of the model, such as ``{"depth": 4}``.

    Raises:
        ImportError: If timm cannot be imported.
        ValueError: If timm has no such model, or if the model does not take one of the arguments.
    """

    def __init__(
        self,
        name: str,
        num_classes: int | None = None,
        img_size: int | None = None,
        in_chans: int | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        timm = optional("timm", f"the model {name!r}", extra="vision")
        own = {"num_classes": num_classes, "img_size": img_size, "in_chans": in_chans}
        given = {key: value for key, value in own.items() if value is not None} | dict(overrides or {})
        try:
            try:
                self.network: nn.Module = timm.create_model(name, **given)
            except TypeError as error:
                if "'img_size'" not in str(error):
                    raise
                del given["img_size"]
                self.network = timm.create_model(name, **given)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"timm cannot create {name!r} with {given}: {error}; set model.name to one of timm.list_models(), and "
                "model.overrides to what that model takes (null: nothing)"
            ) from error

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the classes, shape ``(batch, num_classes)``, for images ``(batch, in_chans, img_size, img_size)``."""
        logits: Tensor = self.network(images)
        return logits
