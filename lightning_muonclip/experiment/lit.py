"""The LightningModules of the example application, written as a user of the library would."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_muonclip.mup import parametrize
from lightning_muonclip.trainer.fsdp2 import repeated_blocks
from lightning_muonclip.trainer.mixin import MaxLogitsMixin

#: Projections that tensor parallelism shards by columns and by rows, so that each rank has some heads and neurons.
_COLUMNS = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj")
_ROWS = ("o_proj", "down_proj")


class LitNetwork(MaxLogitsMixin):
    """A network with its optimizer, learning-rate schedule and sharding; what it is trained for is left to subclasses.

    Args:
        model: The network.
        optimizer: Creates the optimizer from parameter groups. MuonClipCallback takes the hidden matrices out of it.
        warmup_steps: Steps of linear warm-up, followed by cosine decay.
        final_lr: Final learning rate as a fraction of the peak.
        compile: Whether to compile the network.
        base: The network at the width at which the hyperparameters were tuned; puts ``model`` into muP.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Iterable[Any]], Optimizer],
        warmup_steps: int = 0,
        final_lr: float = 0.1,
        compile: bool = False,
        base: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.make_optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.final_lr = final_lr
        self.mup = None if base is None else parametrize(model, base)
        if compile:
            self.model.compile()

    def configure_model(self) -> None:
        """Shards the model block by block under ModelParallelStrategy."""
        mesh = self.device_mesh
        if mesh is None or hasattr(self.model, "unshard"):
            return
        if mesh["tensor_parallel"].size() > 1:
            parallelize_module(self.model, mesh["tensor_parallel"], _tensor_parallel_plan(self.model))
        # Even for a single data-parallel rank: optimizers do not accept plain tensors together with DTensors.
        for block in repeated_blocks(self.model):
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(self.model, mesh=mesh["data_parallel"])

    def forward(self, inputs: Tensor) -> Tensor:
        """What the network makes of its inputs."""
        return self.model(inputs)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer with weight decay on matrices only, linear warm-up and cosine decay."""
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        matrices = [(name, p) for name, p in trained if p.ndim >= 2]
        vectors = [(name, p) for name, p in trained if p.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = self.make_optimizer([group for group in groups if group["params"]])  # LoRA has no vectors
        if self.mup is not None:
            self.mup.apply(optimizer)
        scheduler = LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _lr_factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        total = float(self.trainer.estimated_stepping_batches)
        progress = min(1.0, (step - self.warmup_steps) / max(1.0, total - self.warmup_steps))
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


class LitGPT(LitNetwork):
    """Trains a network to predict the next token, and reports bits per byte.

    The network maps tokens of shape ``(batch, length)`` to logits ``(batch, length, vocab_size)``.
    """

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy in nats per token."""
        loss = self._loss(batch)
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/bits_per_byte", self._bits_per_byte(loss.detach()), prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs loss and bits per byte, averaged over all batches and ranks."""
        loss = self._loss(batch)
        self.log("val/loss", loss, sync_dist=True)
        self.log("val/bits_per_byte", self._bits_per_byte(loss), prog_bar=True, sync_dist=True)

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, targets = batch
        return F.cross_entropy(self(tokens).flatten(0, 1).float(), targets.flatten())

    def _bits_per_byte(self, nats_per_token: Tensor) -> Tensor:
        bytes_per_token = getattr(self.trainer.datamodule, "bytes_per_token", 1.0)  # type: ignore[attr-defined]
        return nats_per_token / (math.log(2) * bytes_per_token)


class LitClassifier(LitNetwork):
    """Trains a network to classify, and reports its accuracy.

    The network maps inputs, such as images of shape ``(batch, channels, height, width)``, to logits ``(batch, classes)``.
    """

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy in nats."""
        loss, _ = self._loss_and_accuracy(batch)
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs loss and accuracy, averaged over all batches and ranks."""
        loss, accuracy = self._loss_and_accuracy(batch)
        self.log("val/loss", loss, sync_dist=True)
        self.log("val/accuracy", accuracy, prog_bar=True, sync_dist=True)

    def _loss_and_accuracy(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        inputs, labels = batch
        logits = self(inputs).float()
        return F.cross_entropy(logits, labels), (logits.argmax(-1) == labels).float().mean()


def _tensor_parallel_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    names = [(name, name.rpartition(".")[2]) for name, _ in model.named_modules()]
    columns: dict[str, ParallelStyle] = {name: ColwiseParallel() for name, last in names if last in _COLUMNS}
    return columns | {name: RowwiseParallel() for name, last in names if last in _ROWS}
