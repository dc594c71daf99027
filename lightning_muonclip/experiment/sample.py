"""Writes a sample of generated text at the end of a run."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_muonclip.experiment.data import TextDataModule
from lightning_muonclip.experiment.lit import LitGPT


class SampleText(Callback):
    """Generates a continuation of a prompt when training ends; deterministic for given weights.

    Does nothing where no :class:`~lightning_muonclip.experiment.lit.LitGPT` is trained on text.

    Args:
        path: The file to write.
        prompt: The beginning of the text.
        length: Number of tokens to generate.
    """

    def __init__(self, path: str, prompt: str = "def ", length: int = 200) -> None:
        self.path = Path(path)
        self.prompt = prompt
        self.length = length

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Generates on every rank, since a sharded model gathers its weights in each forward; writes on rank 0."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(pl_module, LitGPT) or not isinstance(data, TextDataModule):
            return
        pl_module.eval()
        tokens = torch.tensor([data.encode(self.prompt)], device=pl_module.device)
        generator = torch.Generator().manual_seed(0)
        tokens = generate(pl_module.model, tokens, self.length, data.block_size, generator)
        text = data.decode(tokens[0].tolist())
        pl_module.train()
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(text)
            rank_zero_info(f"\nA sample of what the model writes after {self.prompt!r}:\n{text}\n")


@torch.no_grad()
def generate(model: nn.Module, tokens: Tensor, length: int, context: int, generator: torch.Generator) -> Tensor:
    """Continues a sequence by sampling.

    Args:
        model: Maps tokens to logits of the next token.
        tokens: The prompt, shape ``(1, prompt)``, not empty.
        length: Number of tokens to add.
        context: Maximum number of tokens that the model sees.
        generator: Random number generator on the CPU.

    Returns:
        Prompt and continuation, shape ``(1, prompt + length)``.
    """
    for _ in range(length):
        probabilities = model(tokens[:, -context:])[:, -1].float().softmax(-1).cpu()
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        tokens = torch.cat([tokens, drawn.to(tokens.device)], dim=1)
    return tokens
