"""The classes of parameters in muP: which dimensions grow, and how init, learning rate and output scale with them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from lightning_muonclip.optim.options import LR_ADJUSTMENTS
from lightning_muonclip.qk_clip.describe.names import stores_inputs_first

#: Layers whose weight is (in, out).
_TRANSPOSED = (nn.Embedding, nn.EmbeddingBag, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, eq=False)
class ParamClass:
    """How the parameters of one class scale with the growth m of the width; all numbers are exponents of m.

    Args:
        name: Name of the class.
        init: Exponent of the initial standard deviation.
        multiplier: Exponent of the factor on the module's output.
        adamw: Exponent of AdamW's learning rate.
        muon: Exponents of Muon's learning rate, one per ``adjust_lr_fn``. They give updates the spectral norm of the
            spectral condition, sqrt(fan_out / fan_in).
        eps: Exponent of AdamW's epsilon, which keeps its ratio to the gradients.

    Source: AdamW: Yang et al., Tensor Programs V, arXiv 2203.03466, table 8, and for epsilon CompleteP, arXiv 2505.01618.
        Muon: the spectral condition, Yang, Simon and Bernstein, arXiv 2310.17813. Weight decay is divided by the factor on
        the learning rate, so that their product, which torch's decoupled decay uses, stays the same.
    """

    name: str
    init: float = 0.0
    multiplier: float = 0.0
    adamw: float = 0.0
    muon: tuple[float, float, float] = (0.0, 0.0, 0.0)
    eps: float = -1.0

    def rates(self, growth: float) -> dict[str, float]:
        """Factors on the learning rates of AdamW and of Muon, the latter by ``adjust_lr_fn``."""
        exponents = (self.adamw, *self.muon)
        return dict(zip(("adamw", *LR_ADJUSTMENTS), (growth**exponent for exponent in exponents)))


#: No dimension grows.
FINITE = ParamClass("finite", eps=0.0)
#: Biases and gains.
VECTOR = ParamClass("vector")
#: Only fan-out grows: embeddings.
INPUT = ParamClass("input")
#: Both grow.
HIDDEN = ParamClass("hidden", init=-0.5, adamw=-1.0, muon=(0.0, -0.5, 0.0))
#: Only fan-in grows, at the end of the model: output heads. The multiplier replaces a smaller init and learning rate.
OUTPUT = ParamClass("output", multiplier=-1.0, muon=(0.5, 0.0, 1.0))
#: Only fan-in grows, within the model: latents, routers, the single key of MQA. Like OUTPUT, without the multiplier.
BOTTLENECK = ParamClass("bottleneck", init=-1.0, adamw=-1.0, muon=(-0.5, -1.0, 0.0))


@dataclass(frozen=True)
class Scale:
    """How one parameter scales: its class, the growth of the width and, for CompleteP, the growth of the depth."""

    kind: ParamClass
    growth: float
    depth: float = 1.0

    @property
    def rates(self) -> dict[str, float]:
        """Factors on the learning rates of AdamW and of Muon, the latter by ``adjust_lr_fn``."""
        return self.kind.rates(self.growth)

    @property
    def eps(self) -> float:
        """Factor on AdamW's epsilon."""
        return self.growth**self.kind.eps / self.depth


def classify(name: str, shape: torch.Size, base: torch.Size, owner: nn.Module, leaf: str) -> tuple[ParamClass, float]:
    """The class of a parameter, and the growth of its width.

    Args:
        name: Its name.
        shape: Its shape.
        base: Its shape at the base width.
        owner: The module that has it.
        leaf: Its name there.
    """
    growths = [new / old for new, old in zip(shape, base)]
    if len(shape) < 2:
        growth = math.prod(growths)
        return (FINITE if growth == 1 else VECTOR), growth
    if isinstance(owner, _TRANSPOSED) or (len(shape) == 2 and stores_inputs_first(owner)):
        fan_in, fan_out = growths[0], math.prod(growths[1:])
    elif isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        fan_in, fan_out = math.prod(growths[1:]), growths[0]
    elif stores_inputs_first(owner):
        fan_in, fan_out = growths[-2], math.prod(growths) / growths[-2]
    else:  # (out, in), or a stack of such matrices
        fan_in, fan_out = growths[-1], math.prod(growths[:-1])
    if fan_in == fan_out == 1:
        return FINITE, 1.0
    if fan_in == 1 or (fan_out == 1 and leaf != "weight"):  # position embeddings, class tokens
        return INPUT, fan_in * fan_out
    if fan_out == 1:
        in_block = any(part.isdigit() for part in name.split(".")[:-2])
        return (OUTPUT if isinstance(owner, nn.Linear) and not in_block else BOTTLENECK), fan_in
    return HIDDEN, fan_in
