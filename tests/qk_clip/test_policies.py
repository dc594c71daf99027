"""How a clip is divided: frozen sides, shared keys, tied weights, gains of norms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from drawn import Case, Drawn, true_spec
from oracles import Residual, SdpaAttention, between, enlarge, policy_factors, snapshot, true_maxima
from torch import Tensor, nn

from lightning_muonclip import Attention, AttentionSpec, MultiheadLatentAttention, Projection, QKClip
from lightning_muonclip.qk_clip.rule import SHARED_KEYS

ALPHAS = [0.0, 0.25, 1.0]
LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 6}
EXAMPLE: Any = ((torch.randn(2, 5, 16),), {})
SEPARATE = Projection("q_proj", "q(H d)"), Projection("k_proj", "k(G d)")
every_policy = pytest.mark.parametrize("shared_keys", SHARED_KEYS)
every_alpha = pytest.mark.parametrize("alpha", ALPHAS)

MODULES: dict[str, Callable[[], Any]] = {
    "mha": lambda: SdpaAttention(16, 4),
    "gqa": lambda: SdpaAttention(16, 4, 2),
    "mqa": lambda: SdpaAttention(16, 4, 1),
    "ours": lambda: Attention(16, 4, 2, attention_bias=True),
}
every_module = pytest.mark.parametrize("kind", MODULES)


def make(kind: str) -> Any:
    module = MODULES[kind]()
    enlarge(module)
    return module


def close(found: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=0)


def factors_of(module: nn.Module, name: str, before: dict[str, Tensor], heads: int) -> list[float]:
    """The factors applied to the rows of every head of a projection, equal for weight and bias."""
    found = []
    for leaf in ("weight", "bias"):
        old, new = before[f"{name}.{leaf}"].double(), module.get_parameter(f"{name}.{leaf}").detach().double()
        ratio = (new / old).reshape(heads, -1)
        close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-5)
        found.append(ratio[:, 0])
    close(*found)
    return found[0].tolist()


def equal(found: Sequence[float], expected: Sequence[float]) -> None:
    assert found == pytest.approx(expected, rel=1e-5)


# Frozen sides

FROZEN: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "q and k"),
    "q": (["q_proj.weight", "q_proj.bias"], "k"),
    "weight of q": (["q_proj.weight"], "k"),
    "bias of q": (["q_proj.bias"], "k"),
    "k": (["k_proj.weight", "k_proj.bias"], "q"),
    "weight of k": (["k_proj.weight"], "q"),
    "both": (["q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias"], "watched (not trained)"),
    "both weights": (["q_proj.weight", "k_proj.weight"], "watched (not trained)"),
}


#: Where something is frozen, neither should matter.
POLICIES = list(itertools.product(ALPHAS, SHARED_KEYS))
FEWER = list(zip(itertools.cycle(ALPHAS), SHARED_KEYS))


@pytest.mark.parametrize(
    ("frozen", "alpha", "shared_keys"),
    [(frozen, *own) for frozen, (names, _) in FROZEN.items() for own in (FEWER if names else POLICIES)],
)
@every_module
def test_what_is_trained_takes_all_of_gamma(kind: str, frozen: str, alpha: float, shared_keys: str) -> None:
    module, x = make(kind), torch.randn(3, 9, 16)
    names, side = FROZEN[frozen]
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    before, old = snapshot(module), true_maxima(module, x)
    threshold = between(old)
    with QKClip(module, threshold, alpha, shared_keys=shared_keys) as qk_clip:
        module(x)
        assert qk_clip.summary().splitlines()[1].endswith(side)
        result = qk_clip.step()
    gamma = [threshold / s if s > threshold else 1.0 for s in old.tolist()]
    groups = module.k_proj.out_features // 4
    smallest = [min(gamma[g * 4 // groups : (g + 1) * 4 // groups]) for g in range(groups)]
    query, key = {
        "q and k": policy_factors(old.tolist(), threshold, alpha, groups, shared_keys),
        "q": (gamma, [1.0] * groups),
        "k": ([1.0] * 4, smallest),
        "watched (not trained)": ([1.0] * 4, [1.0] * groups),
    }[side]
    equal(factors_of(module, "q_proj", before, 4), query)
    equal(factors_of(module, "k_proj", before, groups), key)
    equal(result.gamma[0].tolist(), [1.0] * 4 if side.startswith("watched") else gamma)
    both = torch.tensor([query[h] * key[h * groups // 4] for h in range(4)])
    close(true_maxima(module, x), old * both)
    if side.startswith("watched"):
        return
    assert (true_maxima(module, x) <= threshold * 1.00001).all()
    is_exact = shared_keys in ("query", "compensate") if side == "q and k" else side == "q"
    if is_exact or groups == 4:
        close(true_maxima(module, x), old.clamp(max=threshold))
    assert all(torch.equal(before[name], module.get_parameter(name)) for name in (*names, "v_proj.weight"))


@pytest.mark.parametrize(
    ("frozen", "side"),
    [
        ([], "q and k"),
        (["kv_b_proj"], "q"),
        (["q_b_proj"], "watched (not trained)"),  # the key of its rotated part cannot be scaled
        (["q_a_proj", "kv_a_proj_with_mqa"], "q and k"),
    ],
)
@every_alpha
def test_frozen_sides_of_latent_attention(frozen: list[str], side: str, alpha: float) -> None:
    module, x = MultiheadLatentAttention(16, 4, **LATENT, q_lora_rank=6), torch.randn(3, 9, 16)
    enlarge(module)
    for name in frozen:
        module.get_submodule(name).requires_grad_(False)
    before, old = snapshot(module), true_maxima(module, x)
    threshold = between(old)
    with QKClip(module, threshold, alpha) as qk_clip:
        assert qk_clip.summary().endswith(side)
        module(x)
        qk_clip.step()
    close(true_maxima(module, x), old if side.startswith("watched") else old.clamp(max=threshold))
    gamma = [threshold / s if s > threshold and not side.startswith("watched") else 1.0 for s in old.tolist()]
    share = 1.0 if side == "q" else alpha
    weight, key = module.q_b_proj.weight.detach(), module.kv_b_proj.weight.detach()
    for head, g in enumerate(gamma):
        rows = slice(6 * head, 6 * head + 4), slice(6 * head + 4, 6 * head + 6)
        close(weight[rows[0]], before["q_b_proj.weight"][rows[0]] * g**share)
        close(weight[rows[1]], before["q_b_proj.weight"][rows[1]] * g)
        rows = slice(10 * head, 10 * head + 4), slice(10 * head + 4, 10 * head + 10)
        close(key[rows[0]], before["kv_b_proj.weight"][rows[0]] * g ** (1 - share))
        assert torch.equal(key[rows[1]], before["kv_b_proj.weight"][rows[1]])


def test_layers_may_be_frozen_differently() -> None:
    model, x = Residual(*(make("mha") for _ in range(4))), torch.randn(3, 9, 16)
    for layer, child in zip(model.layers, ("q_proj", "k_proj", "v_proj", "q_proj")):
        layer.get_submodule(child).requires_grad_(False)
    model.layers[3].k_proj.requires_grad_(False)
    before = [snapshot(layer) for layer in model.layers]
    with QKClip(model, threshold=1.0, alpha=0.25) as qk_clip:
        model(x)
        result = qk_clip.step([[4.0, 1.0, 1.0, 1.0]] * 4)
        assert qk_clip.clips.tolist() == [[1, 0, 0, 0]] * 3 + [[0] * 4]
        assert len(qk_clip.params) == 2 + 2 + 4
    assert result.gamma.tolist() == [[0.25, 1, 1, 1]] * 3 + [[1] * 4]
    expected = [(1, 0.25), (0.25, 1), (0.25**0.25, 0.25**0.75), (1, 1)]
    for layer, old, (query, key) in zip(model.layers, before, expected):
        equal(factors_of(layer, "q_proj", old, 4), [query, 1, 1, 1])
        equal(factors_of(layer, "k_proj", old, 4), [key, 1, 1, 1])


# Tied weights


@every_alpha
def test_a_key_weight_of_two_layers_is_scaled_once_for_the_largest_logit_of_both(alpha: float) -> None:
    model, x = Residual(make("mha"), make("mha"), make("mha")), torch.randn(3, 9, 16)
    model.layers[2].k_proj = model.layers[0].k_proj
    before = [snapshot(layer) for layer in model.layers]
    maxima = [[4.0, 1.0, 9.0, 1.0], [16.0, 1.0, 1.0, 1.0], [1.0, 25.0, 4.0, 1.0]]
    with QKClip(model, threshold=1.0, alpha=alpha, example=((x,), {})) as qk_clip:
        result = qk_clip.step(maxima)
        assert len(qk_clip.params) == 2 + 4 + 4
        assert (qk_clip.clips == (result.gamma < 1)).all()
    both = [1 / 4, 1 / 25, 1 / 9, 1]
    close(result.gamma, torch.tensor([both, [1 / 16, 1, 1, 1], both]))
    for layer, old, gamma in zip(model.layers, before, (both, [1 / 16, 1, 1, 1], both)):
        equal(factors_of(layer, "q_proj", old, 4), [g**alpha for g in gamma])
        equal(factors_of(layer, "k_proj", old, 4), [g ** (1 - alpha) for g in gamma])
    x = torch.randn(3, 9, 16)
    old = [true_maxima(layer, x) for layer in model.layers]
    threshold = between(torch.cat([old[0], old[2]]))
    with QKClip(model, threshold, alpha, example=((x,), {})) as qk_clip:
        for layer in model.layers:
            layer(x)
        qk_clip.step()
    new = [true_maxima(layer, x) for layer in model.layers]
    assert all((maxima <= threshold * 1.00001).all() for maxima in new)
    worst = torch.maximum(old[0], old[2]) > threshold
    close(torch.maximum(new[0], new[2])[worst], torch.full_like(worst[worst], threshold, dtype=torch.float64))


def test_a_chain_of_ties_is_one() -> None:
    model = Residual(*(make("mha") for _ in range(4)))
    model.layers[1].k_proj = model.layers[0].k_proj
    model.layers[3].q_proj = model.layers[1].q_proj
    with QKClip(model, threshold=1.0, example=EXAMPLE) as qk_clip:
        result = qk_clip.step([[1.0] * 4, [1.0] * 4, [1.0] * 4, [4.0] * 4])
    assert result.gamma.tolist() == [[0.25] * 4, [0.25] * 4, [1.0] * 4, [0.25] * 4]
    model = Residual(*(make("mha") for _ in range(4)))
    model.layers[3].k_proj, model.layers[3].q_proj = model.layers[0].k_proj, model.layers[2].q_proj
    with QKClip(model, threshold=1.0, example=EXAMPLE) as qk_clip:
        result = qk_clip.step([[4.0] * 4, [1.0] * 4, [1.0] * 4, [1.0] * 4])
    assert result.gamma.tolist() == [[0.25] * 4, [1.0] * 4, [0.25] * 4, [0.25] * 4]


@pytest.mark.parametrize("kind", ["mha", "ours"])
@every_alpha
def test_a_weight_that_makes_queries_and_keys_takes_half_of_gamma(kind: str, alpha: float) -> None:
    module, x = SdpaAttention(16, 4) if kind == "mha" else Attention(16, 4), torch.randn(3, 9, 16)
    enlarge(module)
    module.k_proj = module.q_proj
    before, old = snapshot(module), true_maxima(module, x)
    threshold = between(old)
    with QKClip(module, threshold, alpha) as qk_clip:
        module(x)
        assert qk_clip.summary().endswith("q and k")
        assert qk_clip.step().clipped_heads == 2
    close(true_maxima(module, x), old.clamp(max=threshold))
    gamma = old.clamp(min=threshold).reciprocal() * threshold
    close(module.q_proj.weight.detach(), before["q_proj.weight"] * gamma.sqrt().repeat_interleave(4)[:, None])


def test_a_tied_weight_keeps_the_biases_that_are_not_tied_in_step() -> None:
    module, x = make("mha"), torch.randn(3, 9, 16)
    module.k_proj.weight = module.q_proj.weight
    old = true_maxima(module, x)
    specs = {"": AttentionSpec(SEPARATE, 4, sizes={"d": 4})}
    with QKClip(module, between(old), alpha=0.2, specs=specs) as qk_clip:
        module(x)
        assert qk_clip.step().clipped_heads == 2
    close(true_maxima(module, x), old.clamp(max=qk_clip.threshold))
    module.k_proj.bias.requires_grad_(False)
    with QKClip(module, 1.0, specs=specs) as qk_clip:
        assert qk_clip.summary().endswith("watched (not trained)")


def test_layers_that_share_a_weight_that_makes_queries_and_keys() -> None:
    model, x = Residual(make("mha"), make("mha")), torch.randn(3, 9, 16)
    shared = model.layers[0].q_proj
    for layer in model.layers:
        layer.q_proj = layer.k_proj = shared
    old = true_maxima(model.layers[0], x)
    with QKClip(model, between(old), alpha=0.2) as qk_clip:
        for layer in model.layers:
            layer(x)
        assert qk_clip.step().clipped_heads == 4
        assert len(qk_clip.params) == 2
    close(true_maxima(model.layers[0], x), old.clamp(max=qk_clip.threshold))


def _other_heads(model: Residual) -> None:
    model.layers[1] = SdpaAttention(16, 2)
    model.layers[1].k_proj = model.layers[0].k_proj


def _other_queries(model: Residual) -> None:
    """As many key heads, but more queries to each."""
    model.layers[0], model.layers[1] = SdpaAttention(16, 4, 2), SdpaAttention(16, 4, 2)
    model.layers[1].q_proj = nn.Linear(16, 32)
    model.layers[1].num_heads = 8
    model.layers[1].k_proj = model.layers[0].k_proj


def _queries_as_keys(model: Residual) -> None:
    model.layers[1].k_proj = model.layers[0].q_proj


def _frozen_here(model: Residual) -> None:
    model.layers[1].k_proj = model.layers[0].k_proj
    model.layers[1].q_proj.requires_grad_(False)


def _tied_in_itself(model: Residual) -> None:
    model.layers[1].q_proj = model.layers[0].q_proj
    model.layers[1].k_proj = model.layers[0].q_proj


class Beside(Residual):
    """Every layer attends to the same."""

    def forward(self, x: Tensor) -> Any:
        return [layer(x) for layer in self.layers]


def described(layer: Any) -> AttentionSpec:
    return AttentionSpec(SEPARATE, layer.num_heads, layer.num_kv_heads, {"d": layer.dim})


@pytest.mark.parametrize("tie", [_other_heads, _other_queries, _queries_as_keys, _frozen_here, _tied_in_itself])
def test_a_tie_that_no_factor_fits_is_refused(tie: Callable[[Residual], None]) -> None:
    model = Beside(make("mha"), make("mha"))
    tie(model)
    specs = {f"layers.{i}": described(layer) for i, layer in enumerate(model.layers)}
    with pytest.raises(
        ValueError, match=r"attention 'layers.1' and 'layers.0' share [qk]_proj.weight.*'layers.1': None"
    ):
        QKClip(model, alpha=0.25, specs=specs)
    with pytest.raises(
        ValueError, match=r"attention 'layers.[01]'[\s\S]*layers.[01][\s\S]*specs={'layers.[01]': None}"
    ):
        QKClip(model, alpha=0.25, example=EXAMPLE)
    with QKClip(model, specs={"layers.1": None, "layers.0": specs["layers.0"]}) as qk_clip:
        assert qk_clip.layers == ["layers.0"]
    QKClip(model, threshold=None, example=EXAMPLE).close()


def test_a_weight_whose_heads_two_layers_lay_out_differently_is_refused() -> None:
    model = Residual(make("mha"), make("mha"))
    model.layers[1].k_proj = model.layers[0].k_proj
    other = SEPARATE[0], Projection("k_proj", "k(d G)")
    specs = {"layers.0": described(model.layers[0]), "layers.1": AttentionSpec(other, 4, sizes={"d": 4})}
    with pytest.raises(
        ValueError, match=r"'layers.1' and 'layers.0' share k_proj.weight, but use it as different heads"
    ):
        QKClip(model, specs=specs)


def test_one_weight_as_different_heads_of_one_layer_is_refused() -> None:
    module = make("mha")
    projections = Projection("q_proj", "q(H d)"), Projection("q_proj", "k(d H)")
    spec = {"": AttentionSpec(projections, 4, sizes={"d": 4})}
    with pytest.raises(
        ValueError, match=r"uses one weight as q_proj.weight and q_proj.weight, but with different heads"
    ):
        QKClip(module, specs=spec)


def test_a_weight_that_is_named_twice_is_scaled_once() -> None:
    module = make("mha")
    projections = Projection("q_proj", "q(H d)"), Projection("q_proj", "q(H d)"), Projection("k_proj", "k(G d)")
    before = snapshot(module)
    with QKClip(module, 1.0, specs={"": AttentionSpec(projections, 4, sizes={"d": 4})}) as qk_clip:
        qk_clip.step([[4.0] * 4])
    equal(factors_of(module, "q_proj", before, 4), [0.5] * 4)


# Gains of norms


def gained(gains: str, offset: float, groups: int = 2) -> tuple[Any, dict[str, AttentionSpec]]:
    case = Case("separate", heads=4, groups=groups, dim=4, gains=gains, offset=offset)
    module = Drawn(case)
    with torch.no_grad():
        for gain in (module.q_gain, module.k_gain):
            gain.mul_(4).add_(torch.randn_like(gain))
    return module, {"": true_spec(case)}


def gained_maxima(module: Any, specs: dict[str, AttentionSpec], x: Tensor) -> Tensor:
    """Float64, causal."""
    case, twin = module.case, Drawn(module.case).double()
    twin.load_state_dict(module.state_dict())
    with torch.no_grad():
        query, key, _ = twin._separate(x.double())
        query, key = twin._normed(query, twin.q_gain), twin._normed(key, twin.k_gain)
    key = key.repeat_interleave(case.heads // case.groups, 1)
    logits = query @ key.mT / math.sqrt(case.dim)
    return logits.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -math.inf).amax((0, 2, 3))


@every_policy
@every_alpha
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_gains_of_every_head_are_clipped_as_weights_are(
    groups: int, offset: float, alpha: float, shared_keys: str
) -> None:
    module, specs = gained("head", offset, groups)
    x = torch.randn(3, 9, 7)
    before, old = snapshot(module), gained_maxima(module, specs, x)
    threshold = between(old)
    options: dict[str, Any] = {"specs": specs, "shared_keys": shared_keys, "qk_norm": "gain"}
    with QKClip(module, threshold, alpha, **options) as qk_clip:
        module(x)
        assert qk_clip.step().clipped_heads == 2
        assert len(qk_clip.params) == 2
    for name, factors in zip(("q_gain", "k_gain"), policy_factors(old.tolist(), threshold, alpha, groups, shared_keys)):
        factor = torch.tensor(factors).repeat_interleave(4)
        torch.testing.assert_close(
            module.get_parameter(name).detach(), (before[name] + offset) * factor - offset, rtol=1e-5, atol=1e-6
        )
    new = gained_maxima(module, specs, x)
    assert (new <= threshold * 1.0001).all()
    if groups == 4 or shared_keys in ("query", "compensate"):
        close(new, old.clamp(max=threshold), rtol=1e-4)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items() if "gain" not in name)


@every_policy
@every_alpha
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_a_gain_of_all_heads_follows_the_worst_of_them(
    groups: int, offset: float, alpha: float, shared_keys: str
) -> None:
    module, specs = gained("shared", offset, groups)
    x = torch.randn(3, 9, 7)
    before, old = snapshot(module), gained_maxima(module, specs, x)
    threshold = between(old)
    options: dict[str, Any] = {"specs": specs, "shared_keys": shared_keys, "qk_norm": "gain"}
    with QKClip(module, threshold, alpha, **options) as qk_clip:
        module(x)
        qk_clip.step()
    smallest = threshold / float(old.max())
    for name, factor in (("q_gain", smallest**alpha), ("k_gain", smallest ** (1 - alpha))):
        torch.testing.assert_close(
            module.get_parameter(name).detach(), (before[name] + offset) * factor - offset, rtol=1e-5, atol=1e-6
        )
    close(gained_maxima(module, specs, x), old * smallest, rtol=1e-4)


@pytest.mark.parametrize("frozen", ["q_gain", "k_gain"])
@pytest.mark.parametrize("gains", ["head", "shared"])
def test_a_frozen_gain_leaves_all_of_gamma_to_the_other(gains: str, frozen: str) -> None:
    module, specs = gained(gains, 1.0)
    module.get_parameter(frozen).requires_grad_(False)
    x = torch.randn(3, 9, 7)
    before, old = snapshot(module), gained_maxima(module, specs, x)
    threshold = between(old)
    with QKClip(module, threshold, 0.25, specs, qk_norm="gain") as qk_clip:
        assert qk_clip.summary().endswith("q" if frozen == "k_gain" else "k")
        module(x)
        qk_clip.step()
    assert torch.equal(module.get_parameter(frozen), before[frozen])
    new = gained_maxima(module, specs, x)
    if gains == "shared":
        close(new, old * threshold / old.max(), rtol=1e-4)
    elif frozen == "k_gain":
        close(new, old.clamp(max=threshold), rtol=1e-4)
    else:
        gamma = (threshold / old).clamp(max=1).where(old > 0, torch.ones(()).double())
        close(new, old * gamma.unflatten(0, (2, 2)).amin(1).repeat_interleave(2), rtol=1e-4)
    module.get_parameter("k_gain" if frozen == "q_gain" else "q_gain").requires_grad_(False)
    with QKClip(module, threshold, 0.25, specs, qk_norm="gain") as qk_clip:
        assert qk_clip.summary().endswith("watched (not trained)")


@every_policy
@every_alpha
@pytest.mark.parametrize("shared", ["q_gain", "k_gain"])
def test_where_only_one_gain_is_of_all_heads_no_logit_stays_above_the_threshold(
    shared: str, alpha: float, shared_keys: str
) -> None:
    module, specs = gained("head", 0.0)
    spec = specs[""]
    names = {"q_gain": "q(H d)", "k_gain": "k(G d)"} | {shared: f"{shared[0]}(d)"}
    mixed = tuple(Projection(name, layout) for name, layout in names.items())
    case = module.case
    with torch.no_grad():  # one gain of four numbers, and the module repeats it
        gain = module.get_parameter(shared)
        setattr(module, shared, nn.Parameter(gain[: case.dim].clone()))

    def normed(x: Tensor, gain: Tensor) -> Tensor:
        gain = gain.reshape(-1, case.dim)[:, None]
        return x / x.square().mean(-1, keepdim=True).sqrt() * gain

    module._normed = normed
    x = torch.randn(3, 9, 7)
    options: dict[str, Any] = {"qk_norm": "gain", "shared_keys": shared_keys}
    specs = {"": AttentionSpec(spec.projections, 4, 2, spec.sizes, qk_norm=True, gains=mixed)}
    with QKClip(module, None, specs=specs) as watcher:
        module(x)
        old = watcher.max_logits[0]
    threshold = between(old)
    with QKClip(module, threshold, alpha, specs, **options) as qk_clip:
        module(x)
        qk_clip.step()
        module(x)
        new = qk_clip.max_logits[0]
        qk_clip.verify(x)
    assert (new <= threshold * 1.0001).all() and (old > threshold).any()
    close(new[old.argmax()], torch.tensor(threshold), rtol=1e-4)


class NormedAttention(SdpaAttention):
    """Queries and keys behind a LayerNorm whose gain is 1 + w, bias and all."""

    class Norm(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(size)), nn.Parameter(torch.randn(size))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.layer_norm(x, x.shape[-1:], 1 + self.weight, self.bias)

    def __init__(self) -> None:
        super().__init__(16, 4)
        self.q_norm, self.k_norm = self.Norm(4), self.Norm(4)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (-1, 4)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return nn.functional.scaled_dot_product_attention(self.q_norm(query), self.k_norm(key), value, is_causal=True)


def test_a_bias_beside_a_gain_has_no_offset() -> None:
    module, x = NormedAttention(), torch.randn(3, 9, 16)
    gains = Projection("q_norm", "q(d)", offset=1.0), Projection("k_norm", "k(d)", offset=1.0)
    specs = {"": AttentionSpec((), 4, sizes={"d": 4}, qk_norm=True, gains=gains)}
    before = snapshot(module)
    with QKClip(module, 0.01, alpha=0.25, specs=specs, qk_norm="gain") as qk_clip:
        qk_clip.verify(x)
        module(x)
        maxima = qk_clip.step().max_logits[0]
        factor = (0.01 / maxima.max()) ** 0.25
        close(module.q_norm.weight.detach() + 1, (before["q_norm.weight"] + 1) * factor, rtol=1e-4)
        close(module.q_norm.bias.detach(), before["q_norm.bias"] * factor)
        module(x)
        close(qk_clip.max_logits[0], maxima * 0.01 / maxima.max(), rtol=1e-3)


def test_a_norm_without_a_gain_can_only_be_watched() -> None:
    specs = {"": AttentionSpec((), 4, sizes={"d": 4}, qk_norm=True)}
    for qk_norm, side in (("gain", "watched (QK-norm without a gain)"), ("monitor", "watched (QK-norm)")):
        with QKClip(SdpaAttention(16, 4), specs=specs, qk_norm=qk_norm) as qk_clip:
            assert qk_clip.sides == {"": side}


def test_our_attention_with_qk_norm() -> None:
    module, x = Attention(16, 4, 2, qk_norm=True), torch.randn(3, 9, 16)
    enlarge(module)
    old = true_maxima(module, x)
    with QKClip(module, between(old), qk_norm="gain") as qk_clip:
        assert qk_clip.summary().splitlines()[1].endswith("q and k")
        module(x)
        close(qk_clip.step().max_logits[0], old)
    close(true_maxima(module, x), old * qk_clip.threshold / old.max())
