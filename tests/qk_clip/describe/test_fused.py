"""Weights that hold several matrices are found, and stepped as their unfused twins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from processes import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_muonclip import Muon, MuonClip
from lightning_muonclip.optim.routing import route_params, routing_table
from lightning_muonclip.qk_clip.describe.fused import Channels, FusedWeights
from lightning_muonclip.qk_clip.describe.split import matrix_parts

#: Cuts a weight into its matrices of shape (out, in).
Cut = Callable[[Tensor], list[Tensor]]

SIZES = {
    "vocab_size": 32,
    "hidden_size": 40,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_layer_types": ["sparse"]}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 6, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
TOKENS = torch.arange(36).reshape(2, 18) % 30


def rows(*sizes: int) -> Cut:
    return lambda weight: list(weight.split(sizes))


def experts(weight: Tensor) -> list[Tensor]:
    """(experts, 2 · channels, width): gate, then up."""
    return [half for expert in weight for half in expert.chunk(2)]


def experts_across(weight: Tensor) -> list[Tensor]:
    """(experts, width, 2 · channels): gate, then up."""
    return experts(weight.mT)


def experts_in_turns(weight: Tensor) -> list[Tensor]:
    """(experts, width, 2 · channels): gate and up in turns."""
    return [half for expert in weight.mT for half in (expert[::2], expert[1::2])]


def per_group(groups: int, *sizes: int) -> Cut:
    """Within each group, so many channels of each matrix."""
    return lambda weight: [
        part.reshape(-1, weight.shape[1]) for part in weight.view(groups, -1, weight.shape[1]).split(sizes, 1)
    ]


def stack(weight: Tensor) -> list[Tensor]:
    return list(weight)


def stack_across(weight: Tensor) -> list[Tensor]:
    return list(weight.mT)


#: The model and its configuration, the options of that, and the weights that hold several matrices.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Cut]]] = {
    "Phi3": ("Phi3", {}, {"qkv_proj.weight": rows(16, 8, 8), "gate_up_proj.weight": rows(24, 24)}),
    "Mixtral": ("Mixtral", {"num_local_experts": 3}, {"gate_up_proj": experts}),
    "Qwen3-MoE": ("Qwen3Moe", {"num_experts": 3, **MIXTURE}, {"gate_up_proj": experts}),
    "GPT-OSS": (
        "GptOss",
        {"num_local_experts": 3, "num_experts_per_tok": 2},
        {"gate_up_proj": experts_in_turns, "experts.down_proj": stack_across},
    ),
    "DeepSeek-V3": (
        "DeepseekV3",
        {**MIXTURE, **LATENT, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
        | {"num_key_value_heads": 4},
        {
            "experts.gate_up_proj": experts,
            "kv_a_proj_with_mqa.weight": rows(6, 4),
            "kv_b_proj.weight": per_group(4, 4, 4),
        },
    ),
    "GLM-4 MoE": (
        "Glm4Moe",
        {**MIXTURE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0},
        {"experts.gate_up_proj": experts},
    ),
    "Llama 4": (
        "Llama4Text",
        {"num_local_experts": 2, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1},
        {"gate_up_proj": experts_across, "experts.down_proj": stack_across},
    ),
    "Mamba": (
        "Mamba",
        {"state_size": 4, "time_step_rank": 3, "intermediate_size": 80},
        {"in_proj.weight": rows(80, 80), "x_proj.weight": rows(3, 4, 4)},
    ),
    "Mamba-2": (
        "Mamba2",
        {"state_size": 4, "num_heads": 5, "head_dim": 16, "expand": 2, "n_groups": 1, "chunk_size": 4},
        {"in_proj.weight": rows(80, 80, 4, 4, 5)},
    ),
    "Qwen3-Next": (
        "Qwen3Next",
        {**MIXTURE, "num_experts": 3, "shared_expert_intermediate_size": 8, "num_hidden_layers": 2}
        | {"layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["sparse"] * 2}
        | {
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 4,
        },
        {
            "in_proj_qkvz.weight": per_group(2, 4, 4, 8, 8),
            "in_proj_ba.weight": per_group(2, 2, 2),
            "q_proj.weight": per_group(4, 4, 4),
            "gate_up_proj": experts,
        },
    ),
    "LFM2": (
        "Lfm2",
        {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
        {"in_proj.weight": rows(40, 40, 40)},
    ),
    "GPT-2": (
        "GPT2",
        {"n_embd": 40, "n_layer": 1, "n_head": 4, "n_positions": 32},
        {
            "c_attn.weight": lambda weight: list(weight.mT.chunk(3)),
            "c_proj.weight": lambda weight: [weight.mT],
            "c_fc.weight": lambda weight: [weight.mT],
        },
    ),
}


def model_of(kind: str) -> tuple[nn.Module, dict[str, Cut]]:
    """The model of a kind, and how to cut its weights."""
    name, options, cuts = KINDS[kind]
    if not hasattr(transformers, f"{name}Model"):
        pytest.skip(f"transformers has no {name}")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | options))
    model = getattr(transformers, f"{name}Model")(config).train()
    for param in model.parameters():
        nn.init.normal_(param, std=0.1)
    return model, cuts


def deviation(kind: str) -> float:
    """How far the updates of a model are from those of its unfused twin, relative to their norm."""
    model, cuts = model_of(kind)
    optimizer = MuonClip(model, 0.1, threshold=None, adjust_lr_fn="spectral_unclamped", dtype="float64")
    model(TOKENS)
    model.double()  # torch's products of many experts are not for float64
    muons = {name: p for name, p in model.named_parameters() if p.ndim > 1 and is_muons(optimizer, p)}
    used = {own: name for name in muons for own in cuts if name.endswith(own)}
    assert used.keys() == cuts.keys()
    whole: Cut = lambda weight: [weight] if weight.ndim == 2 else stack(weight)  # noqa: E731
    cut_of = {name: next((cuts[own] for own in cuts if name.endswith(own)), whole) for name in muons}
    twins = [nn.Parameter(part.detach().clone()) for name, p in muons.items() for part in cut_of[name](p)]
    before = [twin.detach().clone() for twin in twins]
    alone = Muon(twins, 0.1, adjust_lr_fn="spectral_unclamped", dtype=torch.float64)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        for p in muons.values():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        grads = [part.clone() for name, p in muons.items() for part in cut_of[name](p.grad)]
        for twin, grad in zip(twins, grads):
            twin.grad = grad
        optimizer.step()
        alone.step()
    found = [part.detach() for name, p in muons.items() for part in cut_of[name](p)]
    errors = [(ours - twin).norm() / (twin - start).norm() for ours, twin, start in zip(found, twins, before)]
    return float(torch.stack(errors).max())


def is_muons(optimizer: Any, param: Tensor) -> bool:
    return any(g["algorithm"] == "muon" and any(param is p for p in g["params"]) for g in optimizer.param_groups)


@pytest.mark.filterwarnings("ignore:no logits were recorded")
@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_model_is_stepped_as_its_unfused_twin(kind: str) -> None:
    assert deviation(kind) < 1e-12


def deviations(kinds: list[str]) -> list[float]:
    return [deviation(kind) for kind in kinds]


@pytest.mark.slow
def test_on_two_ranks() -> None:
    kinds = [kind for kind in ("Phi3", "GPT-OSS", "Qwen3-Next") if hasattr(transformers, f"{KINDS[kind][0]}Model")]
    for found in on_ranks(2, deviations, kinds):
        assert max(found) < 1e-12, dict(zip(kinds, found))


def shown(model: nn.Module, *args: Any) -> FusedWeights:
    """What a forward shows."""
    channels = Channels()
    for name, module in model.named_modules():
        channels.register(module, name)
    with torch.no_grad(), channels:
        model(*args)
    return channels.found()


class Wired(nn.Module):
    """A layer of six channels, and what becomes of them."""

    def __init__(self, wire: Callable[[Tensor], Any], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.wire = layer or nn.Linear(8, 6), wire

    def forward(self, x: Tensor) -> Any:
        return self.wire(self.layer(x))


def rotated(y: Tensor) -> Tensor:
    first, second = y.chunk(2, -1)
    return torch.cat([first * 0.6 - second * 0.8, second * 0.6 + first * 0.8], -1).softmax(-1)


ONE_MATRIX: dict[str, Callable[[Tensor], Any]] = {
    "taken together": lambda y: (y.norm(dim=-1), y[..., :3].sigmoid() * y[..., 3:]),
    "halves that are added": lambda y: (y[..., :3] + y[..., 3:]).softmax(-1),
    "rotary positions": rotated,
    "a part that is not used": lambda y: y[..., :2].sigmoid() * y[..., 2:4],
    "channels one by one": lambda y: [channel.exp().sum() for channel in y.unbind(-1)],
    "cut and put together": lambda y: torch.cat(y.split([2, 4], -1), -1).softmax(-1),
    "not used at all": lambda y: y,
}


@pytest.mark.parametrize("wire", ONE_MATRIX)
def test_one_matrix(wire: str) -> None:
    assert shown(Wired(ONE_MATRIX[wire]), torch.randn(2, 5, 8)) == {}


def gated(y: Tensor) -> Tensor:
    up, gate = y.unflatten(-1, (-1, 2)).unbind(-1)
    return (up * nn.functional.gelu(gate)).sum(-1)


def of_convolution(y: Tensor) -> Tensor:
    q, k, v = y.flatten(2).mT.split(2, -1)
    return nn.functional.scaled_dot_product_attention(q, k, v)


SEVERAL: dict[str, tuple[nn.Module, Tensor, list[list[int]], tuple[str, ...]]] = {
    "in turns": (Wired(gated), torch.randn(5, 8), [[0, 2, 4], [1, 3, 5]], ("up", "gate")),
    "attention by convolution": (
        Wired(of_convolution, nn.Conv2d(3, 6, 2)),
        torch.randn(2, 3, 4, 4),
        [[0, 1], [2, 3], [4, 5]],
        (),
    ),
    "a state behind": (
        Wired(lambda y: (y[..., :4].cumsum(-2).sum(), y[..., 4:].sin().amax())),
        torch.randn(2, 5, 8),
        [[0, 1, 2, 3], [4, 5]],
        (),
    ),
}


@pytest.mark.parametrize("wire", SEVERAL)
def test_several_matrices(wire: str) -> None:
    model, x, expected, names = SEVERAL[wire]
    found = shown(model, x)
    assert {name: ([own.tolist() for own in parts.channels], parts.names) for name, parts in found.items()} == (
        {"layer.weight": (expected, names)}
    )


def sharded() -> list[list[int]]:
    """The parts that a forward under FSDP2 shows."""
    model = nn.Sequential(Wired(gated), nn.Identity())
    fully_shard(model[0], mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = MuonClip(model, 0.1, threshold=None, include=["0.layer.weight"])
    model(torch.randn(2, 5, 8)).sum().backward()
    optimizer.step()
    return [own.tolist() for own in optimizer.parts[model[0].layer.weight][1]]


def test_under_fsdp2() -> None:
    assert on_ranks(2, sharded) == [[[0, 2, 4], [1, 3, 5]]] * 2


def test_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = shown(Wired(gated), torch.randn(2, 5, 8))
    assert [own.tolist() for own in found["layer.weight"].channels] == [[0, 2, 4], [1, 3, 5]]


def test_a_weight_that_is_used_both_ways_is_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            gate, up = (x @ self.weight).chunk(2, -1)
            return torch.cat([gate.sigmoid() * up] * 2, -1) @ self.weight.mT

    assert shown(Tied(), torch.randn(3, 6)) == {}


@pytest.mark.parametrize("cell", [nn.LSTM(6, 4, num_layers=2, bidirectional=True), nn.GRU(6, 4), nn.LSTMCell(6, 4)])
def test_recurrent_layers_are_their_gates(cell: nn.Module) -> None:
    gates = 3 if isinstance(cell, nn.GRU) else 4
    parts = matrix_parts(cell, {}, "qkv")
    assert {name for name, p in cell.named_parameters() if p in parts} == {
        name for name, p in cell.named_parameters() if p.ndim == 2
    }
    assert all([len(own) for own in found.channels] == [4] * gates for found in parts.values())
    assert matrix_parts(nn.LSTM(6, 4, proj_size=2), {}, "qkv").keys().isdisjoint(nn.RNN(6, 4).parameters())
    table = routing_table(route_params(cell), parts)
    assert f"{gates} parts: {'reset, update, new' if gates == 3 else 'input, forget, cell, output'}" in table


HALVES = [range(12), range(12, 24)]


def test_the_users_word_goes_above_what_is_found() -> None:
    model, _ = model_of("Phi3")
    thirds = [range(i, 48, 3) for i in range(3)]
    given = {"*.gate_up_proj.weight": (0, thirds), "layers.0.mlp.down_proj.weight": (1, [range(24)])}
    optimizer = MuonClip(model, 0.1, threshold=None, parts=given)
    for _ in range(2):  # before and after the first forward
        by_name = {name: optimizer.parts[p] for name, p in model.named_parameters() if p in optimizer.parts}
        assert [own.tolist() for own in by_name["layers.0.mlp.gate_up_proj.weight"][1]] == [list(own) for own in thirds]
        assert by_name["layers.0.mlp.down_proj.weight"][0] == 1
        model(TOKENS).last_hidden_state.sum().backward()
        optimizer.step()
    assert by_name["layers.0.self_attn.qkv_proj.weight"].channels


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"*.gate_up": (0, HALVES)}, r"parts names '\*.gate_up', which matches no weight"),
        (
            {"*.gate_up_proj.weight": (0, HALVES)},
            r"48 channels .* of layers.0.mlp.gate_up_proj.weight .parts.'\*.gate_up_proj",
        ),
        ({"*.gate_up_proj.weight": (2, HALVES)}, r"parts.'\*.gate_up_proj.weight'. names dimension 2"),
    ],
)
def test_parts_that_fit_no_weight_are_refused(parts: dict[str, Any], message: str) -> None:
    model, _ = model_of("Phi3")
    with pytest.raises(ValueError, match=message):
        MuonClip(model, 0.1, parts=parts)


def test_a_resumed_run_has_the_parts_of_the_one_before() -> None:
    model, _ = model_of("Phi3")
    before = MuonClip(model, 0.1, threshold=None)
    model(TOKENS).last_hidden_state.sum().backward()
    before.step()
    after = MuonClip(model, 0.1, threshold=None)
    after.load_state_dict(before.state_dict())
    after.step()
    found = [[own.tolist() for own in parts[1]] for optimizer in (before, after) for parts in optimizer.parts.values()]
    assert found[: len(found) // 2] == found[len(found) // 2 :] != []
