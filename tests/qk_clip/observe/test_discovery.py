"""Attention is found in the first training forward, whose maxima count, and nothing else changes."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracles import Residual, SdpaAttention, enlarge, true_maxima
from processes import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from lightning_muonclip import AttentionSpec, Muon, MuonClip, Projection, QKClip


class Fused(nn.Module):
    """Attention with one weight, under names that mean nothing."""

    def __init__(self, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.inner, self.outer = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.inner(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return self.outer(y.transpose(1, 2).flatten(2))


class Clamped(Fused):
    """Queries and keys that do not follow their weights."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.inner(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q.clamp(-1, 1), k.clamp(-1, 1), v, is_causal=True)
        return self.outer(y.transpose(1, 2).flatten(2))


class Branching(nn.Module):
    """Attention of which some runs only if it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = Fused(), nn.BatchNorm1d(16), SdpaAttention(16, 2)
        self.middle = Fused(2)
        self.takes_branch = False

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        if self.takes_branch:
            x = x + self.middle(x)
        x = self.norm(x.mT).mT
        return x + self.last(x)


class Attend(torch.autograd.Function):
    """A kernel of which torch sees nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.from_numpy((q.detach().numpy() * k.detach().numpy()) + v.detach().numpy())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, grad, grad


@torch.library.custom_op("strange::flash_attn_forward", mutates_args=())
def flash_attn_forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A kernel of which torch sees nothing."""
    return torch.from_numpy((q.numpy() * k.numpy()) + v.numpy())


class Gate(torch.autograd.Function):
    """A fused function of two activations, as in an MLP."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, grad


class Gated(nn.Module):
    """No attention, but a function of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(Gate.apply(self.up(x), self.gate(x)))


def batches(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 9, 16, generator=torch.Generator().manual_seed(seed))


def large(model: nn.Module) -> nn.Module:
    enlarge(model)
    return model


def test_the_first_step_is_clipped_by_the_maxima_of_the_first_forward() -> None:
    model = large(Residual(SdpaAttention(16, 4, 2), SdpaAttention(16, 2)))
    (x,) = batches(1)
    expected = true_maxima(model.layers[0], x)
    weight = model.layers[0].q_proj.weight.detach().clone()
    with QKClip(model, threshold=float(expected.max()) / 2) as qk_clip:
        assert qk_clip.layers == [] and qk_clip.max_logits.shape == (0, 0)
        model(x)
        assert qk_clip.layers == ["layers.0", "layers.1"]
        torch.testing.assert_close(qk_clip.max_logits[0].double(), expected, rtol=1e-5, atol=0)
        result = qk_clip.step()
    assert int(result.clipped_heads) > 0
    assert not torch.equal(model.layers[0].q_proj.weight, weight)


@pytest.mark.parametrize("how", ["plain", "autocast", "checkpointed", "reentrant", "accumulated"])
def test_a_run_in_which_nothing_is_clipped_is_the_run_without(how: str) -> None:
    """Bit for bit, with dropout, running statistics and a branch that is taken later."""

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        if how in ("checkpointed", "reentrant"):
            return checkpoint(model, x.clone().requires_grad_(), use_reentrant=how == "reentrant")
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            return model(x)

    def trained(is_observed: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = Branching()
        model.first.dropout = 0.2
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        qk_clip = QKClip(model, threshold=1e9) if is_observed else None
        for number, x in enumerate(batches(4)):
            model.takes_branch = number >= 2
            forward(model, x).square().mean().backward()
            if how == "accumulated" and number % 2 == 0:
                continue
            optimizer.step()
            optimizer.zero_grad()
            if qk_clip is not None:
                qk_clip.step()
        if qk_clip is not None:
            assert qk_clip.layers == ["first", "last", "middle"]
            qk_clip.close()
        return {**model.state_dict(), "random": torch.get_rng_state()}

    plain, observed = trained(False), trained(True)
    assert all(torch.equal(value, observed[name]) for name, value in plain.items())


def test_a_module_that_runs_later_gets_its_row_and_is_clipped_at_once() -> None:
    model = large(Branching())
    x, y = batches(2)
    with QKClip(model, threshold=1e-3) as qk_clip:
        model(x)
        qk_clip.step()
        before = qk_clip.clips
        assert qk_clip.layers == ["first", "last"] and (before[0] > 0).any()
        model.takes_branch = True
        weight = model.middle.inner.weight.detach().clone()
        model(y)
        assert qk_clip.layers == ["first", "last", "middle"]
        assert qk_clip.max_logits[2, :2].isfinite().all() and qk_clip.max_logits[2, 2:].isneginf().all()
        qk_clip.step()
        assert (qk_clip.clips[:2] >= before).all() and (qk_clip.clips[2, :2] == 1).all()
        assert qk_clip.sides["middle"] == "q and k"
    assert not torch.equal(model.middle.inner.weight, weight)


class Picky(nn.Module):
    """Takes batches of one size only, and counts how often it was tried."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.attention, self.size = Fused(), size
        self.sizes: list[int] = []

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        self.sizes.append(len(x))
        if self.size and len(x) != self.size:
            raise ValueError("another size of the batch")
        return self.attention(x if bias is None else x + bias)


@pytest.mark.parametrize(
    ("size", "bias", "expected"),
    [
        (0, None, {2, 6}),  # a survey takes two samples
        (6, None, {2, 6}),  # but the whole batch if the model refuses them,
        (0, torch.zeros(5, 16), {6}),  # or if it is not clear what the batch is
        (0, torch.zeros(1, 5, 16), {2, 6}),
    ],
)
def test_a_survey_takes_a_part_of_the_batch_where_it_can(size: int, bias: Tensor | None, expected: set[int]) -> None:
    model, x = Picky(size), torch.randn(6, 5, 16)
    with QKClip(model) as qk_clip:
        model(x, bias)
        assert qk_clip.layers == ["attention"]
        inner = model.attention.inner(x if bias is None else x + bias).detach()
        query, key = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in inner.chunk(3, -1)[:2])
        maxima = (query @ key.mT / 2).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).amax((0, 2, 3))
        torch.testing.assert_close(qk_clip.max_logits[0], maxima)
    assert set(model.sizes) == expected


class Refused(nn.Module):
    """Of two samples, it cannot be told; of more, it can."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.clamped = Fused(), Clamped()

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x) if len(x) > 2 else self.clamped(x)


def test_what_a_part_of_the_batch_does_not_tell_the_whole_may() -> None:
    model = Refused()
    with QKClip(model) as qk_clip:
        model(torch.randn(6, 5, 16))
        assert qk_clip.layers == ["plain"]


class Handing(nn.Module):
    """The second attention has the keys of the first, as layers that share a cache do."""

    class First(SdpaAttention):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), self.k_proj(x)

    class Second(SdpaAttention):
        def forward(self, x: Tensor, keys: Tensor) -> Tensor:
            parts = self.q_proj(x), keys, self.v_proj(x)
            heads = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in parts)
            return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = self.First(16, 4), self.Second(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, keys = self.first(x)
        return self.second(x + y, keys)


def test_keys_that_a_later_layer_uses_too_are_left_alone() -> None:
    model = large(Handing())
    before = copy.deepcopy(model)
    with QKClip(model, threshold=1.0) as qk_clip:
        model(torch.randn(2, 5, 16))
        assert set(qk_clip.sides.values()) == {"q"}
        assert qk_clip.step().clipped_heads > 0
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert changed and all("q_proj" in name for name in changed)


class Additive(nn.Module):
    """Attention by a network of queries and keys instead of their product."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.score = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.score((self.query(x)[:, :, None] + self.key(x)[:, None]).tanh())[..., 0]
        return logits.softmax(-1) @ x


def test_a_softmax_over_no_product_is_listed() -> None:
    model = Residual(SdpaAttention(16, 4), Additive())
    with QKClip(model) as qk_clip:
        model(torch.randn(2, 5, 16))
        assert qk_clip.layers == ["layers.0"]
        last = qk_clip.summary().splitlines()[-1]
        assert last.startswith("layers.1") and last.endswith(
            "nothing: no product of queries and keys is seen behind its softmax"
        )
        state = qk_clip.state_dict()
    with QKClip(model) as resumed:
        resumed.load_state_dict(state)
        assert resumed.summary().splitlines()[-1].split() == last.split()


def test_evaluation_finds_nothing_and_says_so() -> None:
    model = Residual(SdpaAttention(16, 4)).eval()
    with QKClip(model) as qk_clip:
        model(batches(1)[0])
        with pytest.warns(UserWarning, match=r"no logits were recorded in the model.*call model.train\(\)"):
            qk_clip.step()
        with torch.inference_mode():
            model.train()(batches(1)[0])
        assert qk_clip.layers == []
        model(batches(1)[0])
        assert qk_clip.layers == ["layers.0"]


def test_a_model_without_attention_is_an_error_at_the_first_step() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with QKClip(model) as qk_clip:
        model(batches(1)[0])
        with pytest.raises(ValueError, match=r"Sequential computes no attention.*logits='off'"):
            qk_clip.step()


class TestUnknown:
    def test_an_error_names_the_module_the_reason_and_three_ways_out(self) -> None:
        model = Residual(SdpaAttention(16, 4), Clamped())
        with QKClip(model) as qk_clip, pytest.raises(ValueError, match=r"'layers.1' \(Clamped\)") as error:
            model(batches(1)[0])
        for part in (
            "its queries do not scale",
            "inner.weight (48, 16)",
            "specs={'layers.1': None}",
            "unknown='monitor'",
        ):
            assert part in str(error.value)
        qk_clip.close()
        assert not any(module._forward_pre_hooks for module in model.modules())

    def test_monitor_watches_the_largest_logit_of_all_heads(self) -> None:
        model = large(Residual(SdpaAttention(16, 4), Clamped()))
        before = copy.deepcopy(model.layers[1].state_dict())
        with QKClip(model, threshold=1e-3, unknown="monitor") as qk_clip:
            model(batches(1)[0])
            result = qk_clip.step()
            assert qk_clip.sides["layers.1"].startswith("watched (its queries")
            assert "watched" in qk_clip.summary()
        assert result.max_logits[1].isfinite().sum() == 1
        assert int(result.clipped_heads) == 4
        assert all(torch.equal(value, before[name]) for name, value in model.layers[1].state_dict().items())

    @pytest.mark.parametrize("how", ["threshold", "frozen"])
    def test_what_no_clip_can_reach_is_never_refused(self, how: str) -> None:
        model = Residual(Clamped())
        model.requires_grad_(how != "frozen")
        with QKClip(model, threshold=None if how == "threshold" else 1.0) as qk_clip:
            model(batches(1)[0])
            assert qk_clip.layers == ["layers.0"]
            assert int(qk_clip.step().clipped_heads) == 0

    def test_a_module_that_is_left_alone_is_neither_read_nor_observed(self) -> None:
        model = Residual(SdpaAttention(16, 4), Clamped())
        with QKClip(model, specs={"layers.1": None}) as qk_clip:
            model(batches(1)[0])
            assert qk_clip.layers == ["layers.0"]

    @pytest.mark.parametrize("kernel", ["an operation", "a function"])
    def test_a_kernel_that_nobody_can_see_into_is_refused_beside_one_that_can_be_seen(self, kernel: str) -> None:
        class Opaque(Fused):
            def forward(self, x: Tensor) -> Tensor:
                q, k, v = self.inner(x).chunk(3, -1)
                attend = torch.ops.strange.flash_attn_forward if kernel == "an operation" else Attend.apply
                return self.outer(attend(q, k, v))

        model = Residual(SdpaAttention(16, 4), Opaque(), Gated())
        with (
            QKClip(model) as qk_clip,
            pytest.raises(ValueError, match=r"'layers.1' \(Opaque\): it calls .*ttend|flash"),
        ):
            model(batches(1)[0])
        with QKClip(model, unknown="monitor") as qk_clip:
            model(batches(1)[0])
            assert qk_clip.layers == ["layers.0"]
            assert "layers.1" in qk_clip.summary()
        with QKClip(model, specs={"layers.1": None}) as qk_clip:
            model(batches(1)[0])
            assert qk_clip.layers == ["layers.0"]

    def test_a_wrong_word(self) -> None:
        with pytest.raises(ValueError, match="unknown unknown 'ignore'; use one of error, monitor"):
            QKClip(nn.Linear(2, 2), unknown="ignore")


def test_a_resumed_run_infers_nothing_and_goes_on_bitwise() -> None:
    calls: list[int] = []

    class Counted(Branching):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return super().forward(x)

    def steps(model: nn.Module, optimizer: MuonClip, xs: Tensor) -> None:
        for x in xs:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    torch.manual_seed(0)
    model = large(Counted())
    optimizer = MuonClip(model, lr=1e-2, threshold=1.0)
    steps(model, optimizer, batches(2))
    saved = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], saved)
    steps(model, optimizer, batches(2, seed=1))
    optimizer.close()
    expected = model.state_dict()

    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    twin = Counted()
    twin.load_state_dict(weights)
    resumed = MuonClip(twin, lr=1e-2, threshold=1.0)
    resumed.load_state_dict(state)
    assert resumed.qk_clip.layers == ["first", "last"]
    calls.clear()
    steps(twin, resumed, batches(2, seed=1))
    resumed.close()
    assert len(calls) == 2
    assert all(torch.equal(value, expected[name]) for name, value in twin.state_dict().items())

    other = MuonClip(nn.Sequential(Counted()), lr=1e-2, threshold=1.0)
    with pytest.raises(ValueError, match=r"of layers that the model does not have: 'first', 'last'"):
        other.qk_clip.load_state_dict(state["qk_clip"])
    other.close()


def test_muon_splits_a_fused_weight_from_its_first_step_on() -> None:
    """As if the three matrices in it were three parameters."""
    fused = Fused()
    apart = copy.deepcopy(fused)
    (x,) = batches(1)
    optimizer = MuonClip(fused, lr=0.1, weight_decay=0.0, threshold=1e9)
    fused(x).square().mean().backward()
    optimizer.step()
    optimizer.close()
    apart(x).square().mean().backward()

    parts = [nn.Parameter(part.clone()) for part in apart.inner.weight.chunk(3)]
    for part, grad in zip(parts, apart.inner.weight.grad.chunk(3)):
        part.grad = grad.clone()
    Muon(parts, lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    torch.testing.assert_close(fused.inner.weight, torch.cat(parts), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickled(m)], ids=["deepcopy", "pickle"])
def test_a_copy_is_not_searched(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = Residual(SdpaAttention(16, 4))
    with QKClip(model) as qk_clip:
        twin = copied(model)
        twin(batches(1)[0])
        assert qk_clip.layers == []
        model(batches(1)[0])
        assert qk_clip.layers == ["layers.0"]


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_a_forward_that_is_redirected_is_looked_into() -> None:
    """As strategies do, which put another function in the place of a module's forward for one call."""
    model = nn.Sequential(SdpaAttention(16, 4))
    (x,) = batches(1)
    with QKClip(model) as qk_clip:
        original = model.forward

        def redirected(x: Tensor, number: int) -> Tensor:
            model.forward = original  # type: ignore[method-assign]
            return model[0](x) * number

        model.forward = redirected  # type: ignore[method-assign, assignment]
        torch.testing.assert_close(model(x, 2), 2 * model[0](x))
        assert qk_clip.layers == ["0"]


def test_a_spec_of_attention_by_hand_needs_no_word_on_its_softmax() -> None:
    class ByHand(SdpaAttention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
            return ((q @ k.mT * 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)

    spec = AttentionSpec((Projection("q_proj", "q(H d)"), Projection("k_proj", "k(H d)")), 4, sizes={"d": 4})
    (x,) = batches(1)
    for model, name in ((ByHand(16, 4), ""), (Residual(SdpaAttention(16, 4), ByHand(16, 4)), "layers.1")):
        module = model.get_submodule(name)
        with QKClip(model, specs={name: spec}) as qk_clip, QKClip(copy.deepcopy(model)) as inferred:
            assert qk_clip.layers == [name]
            model(x)
            inferred.model(x)
            assert torch.equal(qk_clip.max_logits, inferred.max_logits)
            assert qk_clip.max_logits.isfinite().all()
        assert module.q_proj.weight.isfinite().all()


def attention_as_a_unit(rank_count: int) -> Any:
    """The layers and maxima of a model in which FSDP2 has made a unit of an attention module itself."""
    torch.manual_seed(0)
    model = large(Residual(SdpaAttention(16, 4, 2), Fused()))
    mesh = init_device_mesh("cpu", (rank_count,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with QKClip(model, threshold=1.0) as qk_clip:
        model(batches(1)[0])
        result = qk_clip.step()
        assert max(proof.error for proof in qk_clip.verify(batches(1)[0]).proofs) < 1e-12
    return qk_clip.layers, result.max_logits, {n: p.full_tensor().detach() for n, p in model.named_parameters()}


def test_attention_may_be_a_unit_of_fsdp2() -> None:
    torch.manual_seed(0)
    model = large(Residual(SdpaAttention(16, 4, 2), Fused()))
    with QKClip(model, threshold=1.0) as qk_clip:
        model(batches(1)[0])
        expected = qk_clip.step()
    for layers, maxima, weights in on_ranks(2, attention_as_a_unit, 2):
        assert layers == ["layers.0", "layers.1"]
        torch.testing.assert_close(maxima, expected.max_logits, rtol=1e-5, atol=0)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, model.get_parameter(name).detach(), rtol=1e-5, atol=1e-7)


def ranks_that_differ(steps: int) -> list[Any]:
    """What a rank sees and ends with; the second takes a branch one step before the first."""
    torch.manual_seed(0)
    model = large(Branching()).eval()
    model.train()
    found = []
    with QKClip(model, threshold=0.5) as qk_clip:
        for number in range(steps):
            model.takes_branch = number + dist.get_rank() >= 2
            model(batches(steps, seed=dist.get_rank())[number])
            result = qk_clip.step()
            found.append((list(qk_clip.settle()), result.gamma[:, :2].clone()))
        clips = qk_clip.clips
    return [found, clips, {name: param.detach() for name, param in model.named_parameters()}]


def test_ranks_that_find_attention_at_different_steps_stay_alike() -> None:
    first, second = on_ranks(2, ranks_that_differ, 5)
    names = [[layers for layers, _ in rank[0]] for rank in (first, second)]
    assert names[0] == names[1]
    assert names[0][0] == ["first", "last"]
    assert names[0][-1] == ["first", "last", "middle"]
    assert torch.equal(first[1], second[1])
    assert (first[1][2, :2] > 0).all()
    assert all(torch.equal(value, second[2][name]) for name, value in first[2].items())
    assert not math.isnan(float(first[1].sum()))


def batches_of_other_sizes(rank_count: int) -> tuple[list[str], Tensor]:
    """The layers and maxima of a model whose ranks have batches of other sizes, so that only some can take a part."""
    torch.manual_seed(0)
    model = Residual(SdpaAttention(16, 4, 2), Fused())
    fully_shard(model, mesh=init_device_mesh("cpu", (rank_count,)))
    with QKClip(model, threshold=1.0) as qk_clip:
        model(torch.randn(2 + 2 * dist.get_rank(), 5, 16))
        return qk_clip.layers, qk_clip.step().max_logits


def test_ranks_may_have_batches_of_other_sizes() -> None:
    (layers, maxima), (others, theirs) = on_ranks(2, batches_of_other_sizes, 2)
    assert layers == others == ["layers.0", "layers.1"] and torch.equal(maxima, theirs)


@pytest.mark.parametrize("threshold", [1.0, None])
def test_attention_in_eval_mode_is_warned_of(threshold: float | None) -> None:
    model = nn.Sequential(nn.LayerNorm(16), SdpaAttention(16, 4))
    model[1].eval()
    with QKClip(model, threshold=threshold) as qk_clip:
        model(torch.randn(2, 5, 16))
        with pytest.warns(UserWarning, match="in eval mode"):
            result = qk_clip.step()
        assert result.max_logit == -math.inf and result.min_gamma == 1


@pytest.mark.parametrize("name", ["", "layers.0"])
def test_a_model_whose_attention_is_left_alone_is_not_warned_of(name: str, recwarn: pytest.WarningsRecorder) -> None:
    model = Residual(SdpaAttention(16, 4))
    with QKClip(model, specs={name: None}) as qk_clip:
        model(batches(1)[0])
        assert qk_clip.step().max_logits.shape == (0, 0)
    assert not recwarn.list
