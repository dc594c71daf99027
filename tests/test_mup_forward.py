"""What muP tells in the first forward: the scale of attention of any kind, and heads that are not called."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from helpers import VOCAB, next_token_loss, token_batches, trainer
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.data import DataLoader

from lightning_muonclip import MuonClip, MuonClipCallback, QKClip, mup

TOKENS = token_batches(1)[0]
HEADS = 2


class Heads(nn.Module):
    """Attention whose heads grow with its width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.head_dim = width // HEADS

    def heads_of(self, x: Tensor) -> list[Tensor]:
        return [p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)]

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.attend(*self.heads_of(x)).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def causal(logits: Tensor) -> Tensor:
    return logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))


class ByDimension(Heads):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(q @ k.mT / math.sqrt(self.head_dim)).softmax(-1) @ v


class UnusedScale(Heads):
    """As timm's with its fused kernel."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.scale = self.head_dim**-0.5


class UnusedScaling(Heads):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.scaling = self.head_dim**-0.5


class Scale(UnusedScale):
    """As timm's without its fused kernel."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal((q * self.scale) @ k.mT).softmax(-1) @ v


class Fused(Heads):
    """Its factor is a tensor."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.softmax_scale = torch.tensor(self.head_dim**-0.5)
        self.epsilon = 1e-6

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=float(self.softmax_scale))


class Divided(Heads):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.norm_factor = math.sqrt(self.head_dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(torch.einsum("bhid,bhjd->bhij", q, k) / self.norm_factor).softmax(-1) @ v


class Unscaled(Heads):
    """As T5's: the factor is 1 at every width, and a bias is added to the logits."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.scaling = 1.0
        self.bias = nn.Parameter(torch.randn(HEADS, 1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(q @ k.mT * self.scaling + self.bias * torch.arange(k.shape[-2])).softmax(-1) @ v


class Capped(Heads):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.cap, self.factor = 2.0, self.head_dim**-0.5

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(self.cap * torch.tanh(q @ k.mT * self.factor / self.cap)).softmax(-1) @ v


class Biased(UnusedScale):
    """As Bloom's: another number is that of a bias, beside which the product is small."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.beta = 1.0

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q.flatten(0, 1), k.flatten(0, 1)
        bias = 100.0 * torch.arange(k.shape[-2]).expand(*q.shape[:2], -1)
        return (
            causal(torch.baddbmm(bias, q, k.mT, beta=self.beta, alpha=self.scale).view(*v.shape[:2], 9, 9)).softmax(-1)
            @ v
        )


class WithSinks(UnusedScale):
    """As GPT-OSS's: a column beside the logits, from which the maximum of each row is subtracted."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = torch.cat([causal(q @ k.mT * self.scale), torch.full((*q.shape[:-1], 1), 0.3)], -1)
        return (logits - logits.amax(-1, keepdim=True)).softmax(-1)[..., :-1] @ v


class Core(Heads):
    """Attends in a module of its own, which has the factor and no weights."""

    class Inner(nn.Module):
        def __init__(self, head_dim: int) -> None:
            super().__init__()
            self.scale = head_dim**-0.5

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.core = self.Inner(self.head_dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.core(q, k, v)


#: Where each has its number, and the power of it by which logits are multiplied.
SCALED: dict[type[Heads], tuple[str, int]] = {
    Scale: ("scale", 1),
    Fused: ("softmax_scale", 1),
    Divided: ("norm_factor", -1),
    Unscaled: ("scaling", 1),
    Capped: ("factor", 1),
    Core: ("core.scale", 1),
    Biased: ("scale", 1),
    WithSinks: ("scale", 1),
}


class LM(nn.Module):
    def __init__(self, width: int, attention: Callable[[int], nn.Module], layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.layers = nn.ModuleList([attention(width) for _ in range(layers)])
        self.lm_head = nn.Linear(width, VOCAB, bias=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.hidden(tokens))


def number(module: nn.Module, name: str) -> float:
    owner, _, leaf = name.rpartition(".")
    return float(getattr(module.get_submodule(owner), leaf))


# Attention ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval", "example", "alone", "no_grad"])
@pytest.mark.parametrize("attention", SCALED)
def test_the_number_that_scales_logits_is_found_and_set(attention: type[Heads], mode: str) -> None:
    name, power = SCALED[attention]
    base, model = (LM(width, attention) for width in (16, 64))
    wanted = number(base.layers[0], name) * 4**-power
    example = ((TOKENS,), {}) if mode == "example" else None
    weights = copy.deepcopy(model.state_dict())
    if mode == "alone":
        mup.parametrize(model.layers[0], base.layers[0])
        model.layers[0](torch.randn(2, 9, 64))
        assert number(model.layers[0], name) == wanted
        return
    mup.parametrize(model, base, example=example)
    if mode != "example":
        before = torch.get_rng_state()
        with torch.set_grad_enabled(mode != "no_grad"):
            out = model.train(mode == "train")(TOKENS)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(out, model(TOKENS))  # the first forward has it already
    assert [number(layer, name) for layer in model.layers] == [wanted] * 2
    assert weights.keys() == model.state_dict().keys()


@pytest.mark.parametrize("attention", SCALED)
def test_exported_weights_give_the_same_outputs(attention: type[Heads]) -> None:
    model = LM(64, attention)
    scaled = mup.parametrize(model, LM(16, attention))
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.mul_(3 if "q_proj" in name or "k_proj" in name else 1)
    plain = LM(64, attention)
    plain.load_state_dict(scaled.export(((TOKENS,), {})))
    torch.testing.assert_close(plain(TOKENS), model(TOKENS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", [Heads, ByDimension, UnusedScale, UnusedScaling])
def test_what_has_no_such_number_is_refused_by_name(attention: type[Heads]) -> None:
    message = rf"attention 'layers.0' \({attention.__name__}\) have 32 channels, but 8 in the base.*number of heads"
    with pytest.raises(ValueError, match=message):
        mup.parametrize(LM(64, attention), LM(16, attention), example=((TOKENS,), {}))
    model = LM(64, attention)
    optimizer = mup.parametrize(model, LM(16, attention)).apply(torch.optim.AdamW(model.parameters()))
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            next_token_loss(model, TOKENS).backward()
    assert not optimizer.state
    alone = attention(64)
    mup.parametrize(alone, attention(16))
    with pytest.raises(ValueError, match="have 32 channels"):
        alone(torch.randn(2, 9, 64))


class Flex(UnusedScale):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, scale=self.scale)


class PlainFlex(Heads):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v)


class Unseen(torch.autograd.Function):
    """A kernel that torch does not see."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return torch.from_numpy((q @ k.mT).numpy() * scale).sigmoid() @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, grad, grad, None


class UnseenScaling(UnusedScaling):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return Unseen.apply(q, k, v, self.scaling)


class UnseenScale(UnusedScale):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return Unseen.apply(q, k, v, self.scale)


@pytest.mark.parametrize(
    ("attention", "name"), [(Flex, "scale"), (PlainFlex, None), (UnseenScaling, "scaling"), (UnseenScale, None)]
)
def test_other_kernels(attention: type[Heads], name: str | None) -> None:
    model = LM(64, attention)
    mup.parametrize(model, LM(16, attention))
    with torch.no_grad():
        if name is None:
            with pytest.raises(ValueError, match="have 32 channels, but 8 in the base"):
                model(TOKENS)
        else:
            model(TOKENS)
            assert [number(layer, name) for layer in model.layers] == [8**-0.5 / 4] * 2


class MoreHeads(Heads):
    def heads_of(self, x: Tensor) -> list[Tensor]:
        return [p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)]


class MoreHeadsByHand(MoreHeads):
    attend = Scale.attend

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.scale = 0.25


@pytest.mark.parametrize("attention", [MoreHeads, MoreHeadsByHand])
def test_more_heads_of_the_same_size_change_nothing(attention: type[Heads]) -> None:
    model, base = LM(64, attention), LM(16, attention)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mup.parametrize(model, base)
        model(TOKENS)
    assert [getattr(layer, "scale", 0.25) for layer in model.layers] == [0.25] * 2


def test_fewer_layers_in_the_base() -> None:
    model = LM(64, Scale, layers=4)
    mup.parametrize(model, LM(16, Scale), residual=("*.o_proj",))
    model(TOKENS)
    assert [layer.scale for layer in model.layers] == [8**-0.5 / 4] * 4


class Maybe(LM):
    """Uses its second layer later."""

    uses_all = False

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers if self.uses_all else self.layers[:1]:
            x = x + layer(x)
        return x


def test_a_layer_that_runs_later_is_seen_later() -> None:
    model = Maybe(64, Scale)
    mup.parametrize(model, Maybe(16, Scale))
    model(TOKENS)
    assert [layer.scale for layer in model.layers] == [8**-0.5 / 4, 32**-0.5]
    model.uses_all = True
    model(TOKENS)
    assert [layer.scale for layer in model.layers] == [8**-0.5 / 4] * 2


def test_what_cannot_be_compared_is_told() -> None:
    class Sized(LM):
        def forward(self, tokens: Tensor) -> Tensor:
            if self.embed.embedding_dim < 64:
                raise RuntimeError("not with these inputs")
            return super().forward(tokens)

    mup.parametrize(model := Sized(64, Heads), Sized(16, Heads))
    with pytest.warns(
        UserWarning, match=r"cannot tell whether the heads of attention 'layers.0', 'layers.1' have grown"
    ):
        model(TOKENS)


@pytest.mark.parametrize("attention", [Scale, Divided])
def test_copies_and_compiles(attention: type[Heads]) -> None:
    name, power = SCALED[attention]
    model, base = LM(64, attention), LM(16, attention)
    mup.parametrize(model, base)
    twin, layer = copy.deepcopy(model), copy.deepcopy(model.layers[0])
    outputs = model(TOKENS)
    assert torch.equal(twin(TOKENS), outputs)
    assert number(twin.layers[0], name) == number(base.layers[0], name) * 4**-power
    layer(torch.randn(2, 9, 64))
    assert not any(module._forward_pre_hooks for module in model.layers[0].modules())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(TOKENS), outputs)
    fresh = LM(64, attention)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        mup.parametrize(fresh, base)
        fresh.load_state_dict(model.state_dict())
    compiled = torch.compile(fresh, backend="eager")
    torch.testing.assert_close(compiled(TOKENS), outputs)


@pytest.mark.parametrize("attention", [Scale, Capped])
def test_qk_clip_sees_the_scaled_logits(attention: type[Heads]) -> None:
    model, base = LM(64, attention), LM(16, attention)
    mup.parametrize(model, base)
    twin = copy.deepcopy(model)
    twin(TOKENS)
    with QKClip(twin, threshold=None) as expected:
        twin(TOKENS)
    with QKClip(model, threshold=None) as found:
        model(TOKENS)
    assert found.max_logits.isfinite().all()
    torch.testing.assert_close(found.max_logits, expected.max_logits)


# Heads --------------------------------------------------------------------------------------------------------------


class FusedLoss(torch.autograd.Function):
    """A cross-entropy that is given hidden states and the weight of the head."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return (hidden @ weight.mT).logsumexp(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        grads = grad[..., None] * (hidden @ weight.mT).softmax(-1)
        return grads @ weight, grads.flatten(0, -2).mT @ hidden.flatten(0, -2)


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "matmul": lambda h, w: h @ w.T,
    "einsum": lambda h, w: torch.einsum("btd,vd->btv", h, w),
    "biased": lambda h, w: F.linear(h, w, torch.zeros(VOCAB)),
    "cast": lambda h, w: F.linear(h.double(), w.double()),
    "fused": FusedLoss.apply,
}


class Uncalled(LM):
    """Applies the weight of a head itself."""

    def __init__(self, width: int, way: Any, kind: str) -> None:
        super().__init__(width, MoreHeads, layers=1)
        self.way, self.kind, self.factor = way, kind, 1.0
        if kind == "tied":
            self.lm_head.weight = self.embed.weight
        if kind == "bare":
            self.out = nn.Parameter(torch.randn(VOCAB, width) / width)
        if kind in ("embedding", "bare"):
            del self.lm_head

    def forward(self, tokens: Tensor) -> Tensor:
        weights = {"embedding": self.embed.weight, "bare": getattr(self, "out", None)}
        weight = self.lm_head.weight if hasattr(self, "lm_head") else weights[self.kind]
        return self.way(self.factor * self.hidden(tokens), weight)


NAMES = {"untied": "lm_head", "tied": "lm_head", "embedding": "embed.weight", "bare": "out"}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_a_head_that_is_not_called_is_refused_by_name(way: str, kind: str) -> None:
    def make(width: int) -> Uncalled:
        return Uncalled(width, WAYS[way], kind)

    name = NAMES[kind]
    message = rf"{name}.*0\.25.*multiplier\('{name}'\)"
    with pytest.raises(ValueError, match=message):
        mup.parametrize(make(64), make(16), example=((TOKENS,), {}))
    model = make(64)
    scaled = mup.parametrize(model, make(16))
    with torch.no_grad():
        model(TOKENS)  # of evaluation nothing can be told
    with pytest.raises(ValueError, match=message):
        model(TOKENS)
    model.factor = scaled.multiplier(name)
    assert model.factor == 0.25
    model(TOKENS).sum().backward()


@pytest.mark.parametrize("way", ["linear", "fused"])
def test_a_head_that_is_applied_outside_of_all_forwards(way: str) -> None:
    model, base = LM(64, MoreHeads), LM(16, MoreHeads)
    scaled = mup.parametrize(model, base)
    with torch.no_grad():
        model(TOKENS)  # of evaluation
    with pytest.raises(ValueError, match=r"lm_head\.weight is applied without"):
        WAYS[way](model.hidden(TOKENS), model.lm_head.weight).sum().backward()
    model, base = LM(64, MoreHeads), LM(16, MoreHeads)
    scaled = mup.parametrize(model, base)
    WAYS[way](model.hidden(TOKENS) * scaled.multiplier("lm_head"), model.lm_head.weight).sum().backward()


class Innocent(LM):
    """Uses weights in ways that are not those of a head."""

    def __init__(self, width: int) -> None:
        super().__init__(width, MoreHeads)
        self.positions = nn.Parameter(torch.randn(9, width))
        self.queries = nn.Parameter(torch.randn(3, width))
        self.features = nn.Linear(5, width)
        self.mix = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        soft = F.one_hot(tokens, VOCAB).float() @ self.embed.weight
        x = self.hidden(tokens) + soft + self.positions[: tokens.shape[1]] + self.features(torch.ones(5))
        x = x + (self.mix(self.queries) @ x.mT).tanh().mean((1, 2))[:, None, None]
        return self.lm_head(x) + self.lm_head.weight.square().mean() + self.embed.weight.square().mean()


def test_other_uses_of_weights_are_none_of_a_head() -> None:
    model = Innocent(64)
    scaled = mup.parametrize(model, Innocent(16))
    optimizer = scaled.apply(MuonClip(model, lr=1e-3))
    for _ in range(2):
        model(TOKENS).sum().backward()
        optimizer.step()
    optimizer.close()


# Libraries, Lightning -------------------------------------------------------------------------------------------------


def test_hugging_face_t5() -> None:
    transformers = pytest.importorskip("transformers")

    def make(head_dim: int) -> nn.Module:
        config = transformers.T5Config(
            vocab_size=VOCAB,
            d_model=4 * head_dim,
            d_kv=head_dim,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        )
        return transformers.T5ForConditionalGeneration(config)

    model = make(16)
    mup.parametrize(model, make(4))
    kwargs = {"input_ids": TOKENS, "labels": TOKENS}
    found = [m for m in model.modules() if type(m).__name__ == "T5Attention"]
    if not hasattr(found[0], "scaling"):  # older versions have no such number
        with pytest.raises(ValueError, match="have 16 channels, but 4 in the base"):
            model(**kwargs)
        return
    model(**kwargs)
    assert [module.scaling for module in found] == [0.25] * 3


@pytest.mark.parametrize("fused", [False, True])
def test_timm(fused: bool) -> None:
    pytest.importorskip("torchvision")
    import vision.torchvision_schemas  # noqa: F401

    timm = pytest.importorskip("timm")

    def make(width: int) -> nn.Module:
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, embed_dim=width, num_heads=2, depth=2, num_classes=5, pretrained=False
        )
        for block in model.blocks:
            block.attn.fused_attn = fused
        return model

    model, base = make(64), make(16)
    mup.parametrize(model, base)
    images = torch.randn(2, 3, 32, 32)
    if fused:
        with pytest.raises(ValueError, match=r"attention 'blocks.0.attn'.* have 32 channels, but 8 in the base"):
            model(images)
    else:
        model(images)
        assert [block.attn.scale for block in model.blocks] == [8**-0.5 / 4] * 2


class LitLM(pl.LightningModule):
    """Whose own forward never runs."""

    def __init__(self, width: int, attention: Any, calls_head: bool = True) -> None:
        super().__init__()
        self.model = LM(width, attention)
        self.calls_head = calls_head

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.calls_head:
            return next_token_loss(self.model, batch)
        logits = F.linear(self.model.hidden(batch[:, :-1]), self.model.lm_head.weight)
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return self.scaled.apply(torch.optim.AdamW(self.parameters(), lr=1e-3))

    def train_dataloader(self) -> Any:
        return DataLoader(token_batches(2).flatten(0, 1), batch_size=2)

    val_dataloader = train_dataloader


@pytest.mark.parametrize("whole", [False, True])
def test_in_a_trainer(whole: bool) -> None:
    def fit(attention: Any, **options: Any) -> LitLM:
        lit, base = LitLM(64, attention, **options), LitLM(16, attention)
        lit.scaled = mup.parametrize(lit, base) if whole else mup.parametrize(lit.model, base.model)
        trainer([MuonClipCallback(threshold=1.0)]).fit(lit)
        return lit

    assert [layer.scale for layer in fit(Scale).model.layers] == [8**-0.5 / 4] * 2
    with pytest.raises(ValueError, match=r"layers.0' \(Heads\) have 32 channels"):
        fit(Heads)
    with pytest.raises(ValueError, match=r"lm_head\.weight is applied without"):
        fit(MoreHeads, calls_head=False)
