"""Attention of unusual kinds is scaled exactly, refused by name, or listed with a reason; what is none is not refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from helpers import loader, trainer
from oracles import Residual, SdpaAttention
from torch import Tensor, nn

from lightning_muonclip import MuonClipCallback, QKClip

BATCH, LENGTH, WIDTH, HEADS = 4, 6, 16, 4
Attend = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


class Made(nn.Module):
    """Attention by a function of queries, keys and values, which keeps the logits that the function returns too."""

    def __init__(self, attend: Any, **modules: Any) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.attend = attend
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.o(self.attend(self, q, k, v).transpose(1, 2).flatten(2))


def batch() -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


def softmaxed(scores: Callable[[Any, Tensor, Tensor], Tensor]) -> Attend:
    return lambda own, q, k, v: scores(own, q, k).softmax(-1) @ v


def pairs(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q[:, :, :, None], k[:, :, None]


def top(own: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    values, indices = scores.topk(3, -1)
    return torch.zeros_like(scores).scatter(-1, indices, values.softmax(-1)) @ v


def neighbours(own: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    near = torch.arange(LENGTH)[:, None].add(torch.arange(3)) % LENGTH
    scores = (q[:, :, :, None] * k[:, :, near]).sum(-1)
    return (scores.softmax(-1)[..., None] * v[:, :, near]).sum(-2)


class Kernel(torch.autograd.Function):
    """A kernel in which torch sees products and softmaxes of tensors without a graph."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, grad, grad


class Packed(torch.autograd.Function):
    """A kernel that torch sees nothing of, and whose result is as large as queries."""

    @staticmethod
    def forward(ctx: Any, *packed: Tensor) -> Tensor:
        ctx.shapes = [x.shape for x in packed]
        return torch.from_numpy(packed[0].detach().numpy().copy()).view(-1, HEADS, WIDTH // HEADS)[: BATCH * LENGTH]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return tuple(torch.zeros(shape) for shape in ctx.shapes)


class Image(torch.autograd.Function):
    """A filter of images with three colours."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad


def of_tokens(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)


def packed(own: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = Packed.apply(torch.stack([of_tokens(x) for x in (q, k, v)], 1))
    return y.unflatten(0, (-1, LENGTH)).transpose(1, 2)


def packed_keys(own: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = Packed.apply(of_tokens(q), torch.stack([of_tokens(x) for x in (k, v)], 1))
    return y.unflatten(0, (-1, LENGTH)).transpose(1, 2)


@torch.jit.script
def scripted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)), -1), v)


class Scores(nn.Module):
    """Scores by one more projection, which another module goes on with."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(WIDTH // HEADS, WIDTH // HEADS)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return self.more(q) @ k.mT


def talking(own: Any, q: Tensor, k: Tensor) -> Tensor:
    return own.mix((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "talking heads": (lambda: Made(softmaxed(talking), mix=nn.Linear(HEADS, HEADS, bias=False)), "Mm stands between"),
    "convolution": (
        lambda: Made(softmaxed(lambda own, q, k: own.mix(q @ k.mT)), mix=nn.Conv2d(HEADS, HEADS, 1)),
        "Convolution stands between",
    ),
    "of single heads": (
        lambda: Made(
            softmaxed(lambda own, q, k: own.mix(q @ k.mT)), mix=nn.Conv2d(HEADS, HEADS, 3, padding=1, groups=HEADS)
        ),
        "Convolution stands between",
    ),
    "norm": (
        lambda: Made(softmaxed(lambda own, q, k: F.layer_norm(q @ k.mT, (LENGTH,)))),
        "NativeLayerNorm stands between",
    ),
    "network": (
        lambda: Made(
            softmaxed(lambda own, q, k: own.mix(q @ k.mT)),
            mix=nn.Sequential(nn.Conv2d(HEADS, 8, 1), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, HEADS, 1)),
        ),
        "none can be followed",
    ),
    "pooling": (
        lambda: Made(softmaxed(lambda own, q, k: F.avg_pool2d(q @ k.mT, (1, 3), 1, (0, 1)))),
        "AvgPool2D stands between",
    ),
    "spectrum": (
        lambda: Made(softmaxed(lambda own, q, k: torch.fft.ifft(torch.fft.fft(q @ k.mT)).real)),
        "none can be followed",
    ),
    "handed": (
        lambda: Made(
            softmaxed(lambda own, q, k: own.mix(own.scores(q, k))), scores=Scores(), mix=nn.Linear(LENGTH, LENGTH)
        ),
        "Addmm stands between",
    ),
    "top k": (lambda: Made(top), "Topk stands between"),
    "multiplied": (
        lambda: Made(softmaxed(lambda own, q, k: torch.mul(*pairs(q, k)).sum(-1))),
        "their logits are no matrix product",
    ),
    "cosine": (lambda: Made(softmaxed(lambda own, q, k: F.cosine_similarity(*pairs(q, k), -1))), "no matrix product"),
    "neighbours": (lambda: Made(neighbours), "no matrix product"),
    "distance": (lambda: Made(softmaxed(lambda own, q, k: -torch.cdist(q, k))), "no matrix product"),
    "difference": (
        lambda: Made(softmaxed(lambda own, q, k: -torch.sub(*pairs(q, k)).square().sum(-1))),
        "no matrix product",
    ),
    "tensordot": (
        lambda: Made(
            softmaxed(
                lambda own, q, k: (
                    torch.tensordot(q, k, ([3], [3])).diagonal(0, 0, 3).diagonal(0, 0, 2).permute(2, 3, 0, 1)
                )
            )
        ),
        "in torch.tensordot,",
    ),
    "complex": (
        lambda: Made(softmaxed(lambda own, q, k: (torch.complex(q, k) @ torch.complex(k, q).mT).real)),
        "complex numbers",
    ),
    "vmap": (
        lambda: Made(lambda own, q, k, v: torch.vmap(lambda q, k, v: (q @ k.mT).softmax(-1) @ v)(q, k, v)),
        "inside of torch.vmap",
    ),
    "three operands": (
        lambda: Made(softmaxed(lambda own, q, k: torch.einsum("bhnd,bhmd,h->bhnm", q, k, torch.rand(HEADS).to(q)))),
        "in torch.einsum,",
    ),
    "operator": (
        lambda: Made(lambda own, q, k, v: torch.ops.aten._softmax(q @ k.mT, -1, False) @ v),
        "in torch.ops.aten",
    ),
    "function": (lambda: Made(lambda own, q, k, v: Kernel.apply(q, k, v)), "none can be followed"),
    "scripted": (lambda: Made(lambda own, q, k, v: scripted(q, k, v)), "none can be followed"),
    "noise": (lambda: Made(lambda own, q, k, v: F.gumbel_softmax(q @ k.mT, dim=-1) @ v), "none can be followed"),
    "packed": (lambda: Made(packed), "no queries and keys can be seen"),
    "packed keys": (lambda: Made(packed_keys), "no queries and keys can be seen"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_was_a_product_and_is_softmaxed_is_refused_by_name_and_the_way_out_is_of_it_alone(kind: str) -> None:
    make, reason = REFUSED[kind]
    model, x = Residual(SdpaAttention(WIDTH, HEADS), make()), batch()
    with pytest.raises(ValueError, match=rf"'layers.1' \(Made\): .*{reason}"):
        QKClip(model, example=((x,), {}))
    with QKClip(model, specs={"layers.1": None}, example=((x,), {})) as qk_clip:
        assert qk_clip.sides == {"layers.0": "q and k"}


UNSOFTMAXED: dict[str, Attend] = {
    "sigmoid": lambda own, q, k, v: (q @ k.mT).sigmoid() @ v,
    "square": lambda own, q, k, v: (q @ k.mT).relu().square() @ v,
    "linear": lambda own, q, k, v: F.elu(q).add(1) @ (F.elu(k).add(1).mT @ v),
    "multiplied": lambda own, q, k, v: (torch.mul(*pairs(q, k)).sum(-1).sigmoid()[..., None] * v[:, :, None]).sum(-2),
}


class Lit(pl.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def test_what_is_not_softmaxed_is_listed_and_told_also_after_a_resume(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    model = Residual(SdpaAttention(WIDTH, HEADS), *(Made(attend) for attend in UNSOFTMAXED.values()))
    caplog.set_level("INFO")
    callback = MuonClipCallback()
    fit = trainer([callback])
    fit.fit(Lit(model), loader(batch()[None]))
    fit.save_checkpoint(tmp_path / "one.ckpt")
    others = [f"model.layers.{i + 1}" for i in range(len(UNSOFTMAXED))]
    reason = "no softmax follows its product of two activations"
    assert f"QK-Clip scales nothing of {', '.join(others)}: {reason}" in caplog.text
    assert callback.qk_clip is not None
    rows = callback.qk_clip.summary().splitlines()[2:]
    assert [(row.split()[0], row.endswith(f"nothing: {reason}")) for row in rows] == [(name, True) for name in others]
    caplog.clear()
    trainer([MuonClipCallback()], max_epochs=2).fit(
        Lit(model), loader(batch()[None]), ckpt_path=str(tmp_path / "one.ckpt")
    )
    assert f"QK-Clip scales nothing of {', '.join(others)}: {reason}" in caplog.text


class Experts(nn.Module):
    """Gates, another attention and a router in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.up, self.router = (
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.Linear(WIDTH, 3),
        )
        self.experts = nn.Parameter(torch.randn(3, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attention(x).chunk(3, -1)
        x = x + (q @ k.mT).sigmoid() @ v
        a, b = self.up(x).chunk(2, -1)
        x = x + a * b.sigmoid()
        weights = self.router(F.layer_norm(x, (WIDTH,))).softmax(-1)
        return (weights[..., None] * torch.einsum("bnd,edf->bnef", x, self.experts)).sum(-2)


class Pooling(nn.Module):
    """Gated attention pooling of one score a token (Ilse et al., arXiv 1802.04712)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.score = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.score(self.a(x).tanh() * self.b(x).sigmoid()).softmax(1).mT @ x


class Squeezed(nn.Module):
    """Channels that are weighed by their means, a filter, and a head with a contrastive loss."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head, self.cell = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5), nn.LSTM(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cell(x * self.gate(x.mean(1, keepdim=True)).sigmoid())[0]
        pooled = x.mean(1)
        loss = F.cross_entropy(pooled @ self.gate(pooled).T, torch.arange(len(x)))
        colours = Image.apply(x[..., :3].mT[..., None].expand(-1, -1, -1, 4).contiguous())
        return x + loss + self.head(pooled).softmax(-1).sum() + colours.sum()


@pytest.mark.parametrize("make", [Experts, Pooling, Squeezed])
def test_routers_pooling_gates_heads_and_losses_are_not_refused(make: type[nn.Module]) -> None:
    with QKClip(Residual(SdpaAttention(WIDTH, HEADS), make()), example=((batch(),), {})) as qk_clip:
        assert qk_clip.layers == ["layers.0"]


def clipped(model: nn.Module, attention: Any, **options: Any) -> QKClip:
    """The model after one step, of which all heads must be what they were or at the threshold."""
    x = batch()
    model(x)
    before = attention.maxima
    threshold = float(before.median())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with QKClip(model, threshold, **options) as qk_clip:
            model(x)
            torch.testing.assert_close(qk_clip.max_logits[-1], before, rtol=1e-4, atol=1e-4)
            qk_clip.step()
            model(x)
    torch.testing.assert_close(attention.maxima, before.clamp(max=threshold), rtol=1e-4, atol=1e-4)
    return qk_clip


def kept(own: Any, logits: Tensor) -> Tensor:
    own.maxima = logits.detach().movedim(-3, 0).flatten(1).amax(1)
    return logits


@pytest.mark.parametrize("heads", [1, HEADS])
def test_a_product_of_matrices_for_every_sample(heads: int) -> None:
    class Unbatched(Made):
        def forward(self, x: Tensor) -> Tensor:
            logits, outputs = [], []
            for sample in x:
                q, k, v = (p(sample).unflatten(-1, (heads, -1)).transpose(0, 1) for p in (self.q, self.k, self.v))
                q, k, v = (q[0], k[0], v[0]) if heads == 1 else (q, k, v)
                logits.append(3 * q @ k.mT)
                y = logits[-1].softmax(-1) @ v
                outputs.append(y if heads == 1 else y.transpose(0, 1).flatten(1))
            kept(self, torch.stack(logits).unflatten(0, (BATCH, 1)) if heads == 1 else torch.stack(logits))
            return self.o(torch.stack(outputs))

    attention = Unbatched(None)
    model = nn.Sequential(attention)
    assert set(clipped(model, attention).sides.values()) == {"q and k"}


def plain(own: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return kept(own, 5 * q @ k.mT).softmax(-1) @ v


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("kind", ["new", "old", "behind a norm"])
def test_a_normalized_weight_is_scaled_by_its_magnitude(kind: str) -> None:
    attention = Made(plain)
    norm = nn.utils.weight_norm if kind == "old" else nn.utils.parametrizations.weight_norm
    attention.q, attention.k = norm(attention.q), norm(attention.k)
    if kind == "behind a norm":
        attention.q, attention.k = (nn.Sequential(nn.LayerNorm(WIDTH), p) for p in (attention.q, attention.k))
    assert set(clipped(nn.Sequential(attention), attention).sides.values()) == {"q and k"}


def test_a_norm_of_what_a_normalized_weight_makes_is_watched() -> None:
    attention = Made(lambda own, q, k, v: plain(own, F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:]), v))
    attention.q, attention.k = (nn.utils.parametrizations.weight_norm(p) for p in (attention.q, attention.k))
    with QKClip(attention, example=((batch(),), {})) as qk_clip:
        assert set(qk_clip.sides.values()) == {"watched (QK-norm)"}


@pytest.mark.parametrize("shape", [(HEADS, 3, WIDTH // HEADS), (1, HEADS, 1, WIDTH // HEADS)])
def test_learned_queries_of_all_samples(shape: tuple[int, ...]) -> None:
    attention = Made(lambda own, q, k, v: kept(own, torch.linalg.matmul(own.learned, k.mT)).softmax(-1) @ v)
    attention.learned = nn.Parameter(torch.randn(shape))
    assert set(clipped(nn.Sequential(attention), attention).sides.values()) == {"q and k"}


class Directions(nn.Module):
    """A projection by weights of unit norm."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight, dim=1))


class Batched(nn.Module):
    """A projection, and a norm of its channels by the batch."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.project, self.norm = nn.Linear(WIDTH, WIDTH, bias=False), norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.project(x).mT).mT


@pytest.mark.parametrize(
    "make", [nn.BatchNorm1d, lambda n: nn.InstanceNorm1d(n, affine=True, track_running_stats=True)]
)
def test_only_the_gain_of_a_norm_by_the_batch_scales(make: Any) -> None:
    attention = Made(plain)
    attention.q, attention.k = Batched(make(WIDTH)), Batched(make(WIDTH))
    with QKClip(attention, example=((batch(),), {})) as qk_clip:
        assert set(qk_clip.sides.values()) == {"watched (QK-norm)"}
    before = attention.q.project.weight.clone()
    clipped(nn.Sequential(attention), attention, qk_norm="gain")
    assert torch.equal(attention.q.project.weight, before)


@pytest.mark.parametrize("make", [nn.utils.parametrizations.spectral_norm, Directions])
def test_a_normalized_weight_is_no_norm_of_queries(make: Any) -> None:
    attention = Made(plain)
    attention.q, attention.k = make(attention.q), make(attention.k)
    with pytest.raises(ValueError, match="the weights themselves are normalized"):
        QKClip(attention, example=((batch(),), {}))
    attention.k = nn.Linear(WIDTH, WIDTH)
    with QKClip(attention, example=((batch(),), {})) as qk_clip:
        assert set(qk_clip.sides.values()) == {"k"}


def test_a_frozen_norm_by_the_batch_is_a_factor() -> None:
    attention = Made(plain)
    attention.q, attention.k = Batched(nn.BatchNorm1d(WIDTH)), nn.Linear(WIDTH, WIDTH)
    attention(batch())
    attention.q.norm.eval()
    model = nn.Sequential(attention)
    assert set(clipped(model, attention).sides.values()) == {"q and k"}


@pytest.mark.parametrize("kind", ["plain", "causal", "exponential", "biased"])
def test_a_temperature_of_normalized_queries_and_keys(kind: str) -> None:
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) if kind == "causal" else torch.tensor(False)

    def attend(own: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        x = x * (own.t.clamp(max=4).exp() if kind == "exponential" else own.t)  # Swin V2
        x = x.masked_fill(hidden, -torch.inf) + (0 if own.bias is None else own.bias)
        return kept(own, x).softmax(-1) @ v

    attention = Made(attend)
    attention.t = nn.Parameter(torch.linspace(2, 5, HEADS)[:, None, None])
    attention.bias = nn.Parameter(torch.randn(HEADS, LENGTH, LENGTH)) if kind == "biased" else None
    names = "t, bias" if kind == "biased" else "t"
    with QKClip(attention, example=((batch(),), {})) as qk_clip:
        assert set(qk_clip.sides.values()) == {f"watched (QK-norm; its logits are set by {names})"}
    if kind in ("plain", "causal"):
        before = attention.q.weight.clone()
        assert set(clipped(nn.Sequential(attention), attention, qk_norm="gain").sides.values()) == {"q"}
        assert torch.equal(attention.q.weight, before)
    else:
        with QKClip(attention, qk_norm="gain", example=((batch(),), {})) as qk_clip:
            assert "no factor of a single head" in qk_clip.summary()
