"""Matrices with many spectra, each from a seed, and metrics of their orthogonalization; shared by benchmarks and tests."""

from __future__ import annotations

from functools import cache, partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_muonclip import Attention, Muon, split_params
from lightning_muonclip.experiment.corpora import StandardLibrary
from lightning_muonclip.experiment.data import TextDataModule
from lightning_muonclip.experiment.gpt import GPT

#: Singular values below this, relative to the largest, are rounding errors of float32 and have no polar factor.
NOISE = 1e-7

#: Singular values above this, relative to the largest, must end up close to 1.
MATTERS = 0.01

#: Names of the spectra; the last two are from training.
SPECTRA = (
    "Gaussian",
    "Marchenko-Pastur 1:4",
    "integer",
    "orthogonal",
    "clustered",
    "log-spaced 1..1e-3",
    "log-spaced 1..1e-5",
    "power law 0.7",
    "power law 1.5",
    "one dominant",
    "low rank",
    "rank one",
    "momentum, attention",
    "momentum, MLP",
)

METRICS = ("cosine", "gap", "largest", "smallest", "drift")


@cache
def zoo(n: int = 192, ratio: int = 1) -> dict[str, Tensor]:
    """Float32 matrices of shape (n, ratio · n), n a multiple of 24, by :data:`SPECTRA`; momenta have shapes of their own."""
    generator = torch.Generator().manual_seed(n + ratio)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    m = ratio * n

    def matrix(singular: Tensor) -> Tensor:
        """Singular vectors are those of a Gaussian matrix."""
        u, _, vh = torch.linalg.svd(normal(n, m), full_matrices=False)
        return u @ (singular[:, None] * vh)

    rank = torch.arange(1, n + 1, dtype=torch.float64)
    log = partial(torch.logspace, 0, steps=n, dtype=torch.float64)
    synthetic = {
        "Gaussian": normal(n, m),
        "Marchenko-Pastur 1:4": matrix(torch.linalg.svdvals(normal(n, 4 * n))),
        "integer": torch.randint(-3, 4, (n, m), generator=generator).double(),
        "orthogonal": matrix(torch.ones_like(rank)),
        "clustered": matrix(torch.tensor([1.0, 0.1, 0.02], dtype=torch.float64).repeat_interleave(n // 3)),
        "log-spaced 1..1e-3": matrix(log(-3)),
        "log-spaced 1..1e-5": matrix(log(-5)),
        "power law 0.7": matrix(rank**-0.7),
        "power law 1.5": matrix(rank**-1.5),
        "one dominant": normal(n, m) + 20 * n**0.5 * matrix((rank == 1).double()),
        "low rank": normal(n, n // 8) @ normal(n // 8, m),
        "rank one": normal(n, 1) @ normal(1, m),
    }
    return {name: x.float() for name, x in synthetic.items()} | momenta()


@cache
def momenta(steps: int = 24, seed: int = 0) -> dict[str, Tensor]:
    """The matrices that Muon orthogonalizes in an attention and an MLP of the demo's GPT, after some steps of training."""
    data = TextDataModule(StandardLibrary(max_bytes=2**20), batch_size=4, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT(partial(Attention, num_attention_heads=4))
    # A fixed schedule: the spectra must not follow the library's default.
    optimizer = Muon(
        split_params(model), lr=0.02, ns_coefficients="jordan", adjust_lr_fn="match_rms_adamw", dtype=torch.float32
    )
    for tokens, targets in islice(data.train_dataloader(), steps):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
    layer = model.layers[1]
    weights = {"momentum, attention": layer.self_attn.q_proj.weight, "momentum, MLP": layer.mlp.up_proj.weight}
    return {name: w.grad.lerp(optimizer.state[w]["momentum_buffer"], 0.95) for name, w in weights.items()}


class Reference:
    """The singular value decomposition of a matrix in float64, and the metrics of its orthogonalization."""

    def __init__(self, x: Tensor) -> None:
        self.u, self.s, self.vh = torch.linalg.svd(x.double(), full_matrices=False)
        self.rank = int((self.s > NOISE * self.s[0]).sum())
        self.matters = int((self.s > MATTERS * self.s[0]).sum())

    def metrics(self, y: Tensor) -> dict[str, float]:
        """Five of them, by the names in :data:`METRICS`.

        - cosine: of the angle to the polar factor.
        - gap: by how much less ``y``, scaled to a spectral norm of 1, descends than the polar factor would, relative to it.
          The most that is possible is the nuclear norm.
        - largest: singular value of ``y``.
        - smallest: singular value of ``y`` among directions whose singular value in ``x`` matters.
        - drift: share of the Frobenius norm of ``y`` that is off the diagonal in the singular basis of ``x``.
        """
        y = y.double()
        inner = self.u.mT @ y @ self.vh.mT
        kept, norm = inner.diagonal(), torch.linalg.matrix_norm(y)
        largest = torch.linalg.matrix_norm(y, 2)
        values = {
            "cosine": kept[: self.rank].sum() / (self.rank**0.5 * norm),
            "gap": 1 - (self.s * kept).sum() / (self.s.sum() * largest),
            "largest": largest,
            "smallest": torch.linalg.svdvals(inner[: self.matters, : self.matters])[-1],
            "drift": (norm.square() - kept.square().sum()).clamp(min=0).sqrt() / norm,
        }
        return {name: float(value) for name, value in values.items()}
