"""Who is a hidden matrix: what multiplies activations, whatever its shape; and by which names a parameter is known."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel
from torch.nn.utils.parametrizations import orthogonal, weight_norm
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_muonclip import MuonClip, split_params
from lightning_muonclip.optim.routing import route_params, routing_table

Routes = dict[str, tuple[str, str]]


def routes(module: nn.Module, **options: Any) -> Routes:
    return {route.name: (route.algorithm, route.reason) for route in route_params(module, **options)}


class Owner(nn.Module):
    """Owns parameters of these shapes."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))


class HeadNorm(Owner):
    pass


class ColumnLinear(Owner):
    pass


class VocabEmbedding(Owner):
    pass


class GatedExperts(Owner):
    pass


# Shapes say nothing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["A_log", "rel_pos_h", "bias_u", "query", "latents", "registers", "alpha", "pe", "w"])
@pytest.mark.parametrize("place", ["", "layers.3.mixer"])
def test_a_bare_parameter_of_two_dimensions_is_no_matrix(name: str, place: str) -> None:
    model = nn.Module()
    inner = model
    for part in filter(None, place.split(".")):
        inner.add_module(part, nn.Module())
        inner = inner.get_submodule(part)
    inner.add_module("block", Owner(**{name: (16, 8)}))
    [(found, (algorithm, reason))] = routes(model).items()
    assert (found, algorithm) == (f"{place}.block.{name}".lstrip("."), "adamw")
    assert reason == f"guess: {name} of Owner is no matrix"
    assert routes(model, include=[f"*{name}"])[found] == ("muon", "included by name")


@pytest.mark.parametrize(
    ("module", "algorithm"),
    [
        (nn.LayerNorm((4, 8)), "adamw"),
        (nn.RMSNorm((4, 8)), "adamw"),
        (HeadNorm(weight=(4, 8)), "adamw"),
        (VocabEmbedding(weight=(50, 8)), "adamw"),
        (ColumnLinear(weight=(4, 8)), "muon"),
        (Owner(in_proj_weight=(24, 8)), "muon"),
        (Owner(proj=(16, 8)), "muon"),
    ],
)
def test_a_weight_of_an_unknown_class_is_guessed_by_its_names(module: nn.Module, algorithm: str) -> None:
    block = nn.ModuleList([nn.ModuleDict({"part": module})])
    for found, reason in routes(block).values():
        if reason != "vector":
            assert found == algorithm
            assert reason.startswith("guess: ")
            assert type(module).__name__ in reason
            assert reason in routing_table(route_params(block))


@pytest.mark.parametrize(
    ("module", "matrices"),
    [
        (nn.LSTM(4, 8), ["weight_ih_l0", "weight_hh_l0"]),
        (nn.GRUCell(4, 8), ["weight_ih", "weight_hh"]),
        (nn.MultiheadAttention(8, 2, kdim=4, vdim=6), ["q_proj_weight", "k_proj_weight", "v_proj_weight"]),
        (weight_norm(nn.Linear(4, 8)), ["parametrizations.weight.original1"]),
        (orthogonal(nn.Linear(4, 8)), ["parametrizations.weight.original"]),
        (nn.utils.weight_norm(nn.Linear(4, 8)), ["weight_v"]),
    ],
)
def test_modules_of_torch_that_multiply(module: nn.Module, matrices: list[str]) -> None:
    found = routes(nn.ModuleList([nn.ModuleDict({"part": module})]))
    taken = {name.removeprefix("0.part.") for name, own in found.items() if own == ("muon", "hidden matrix")}
    assert taken - {"out_proj.weight"} == set(matrices)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_matrices_are_not_muons(dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False, dtype=dtype), "experts": Owner(), "b": nn.Linear(4, 4)})
    model["experts"].up = nn.Parameter(torch.zeros(2, 4, 4, dtype=dtype))
    found = routes(model)
    assert found["a.weight"] == found["experts.up"] == ("adamw", "complex numbers")
    assert found["b.weight"][0] == "muon"
    with pytest.raises(ValueError, match=r"include matches a.weight .* real numbers"):
        route_params(model, include=["a.*"])


def test_an_expert_stack_is_known_by_its_class_too() -> None:
    block = nn.ModuleList([nn.ModuleDict({"up": GatedExperts(weight=(4, 8, 6), bias=(4, 8))})])
    assert routes(block) == {"0.up.weight": ("muon", "expert stack"), "0.up.bias": ("adamw", "biases of experts")}


# Heads -------------------------------------------------------------------------------------------------------------------


def linear() -> nn.Module:
    return nn.Linear(16, 5, bias=False)


def tree(path: str, leaf: nn.Module) -> nn.Module:
    """A backbone and, beside it, a module at a path."""
    for part in reversed(path.split(".")[1:]):
        leaf = nn.ModuleDict({part: leaf})
    return nn.ModuleDict({"backbone": nn.Linear(16, 16, bias=False), path.split(".")[0]: leaf})


@pytest.mark.parametrize(
    "path",
    [
        *("heads.0", "heads.ctc.0", "lm_heads.3", "heads.0.1", "fc", "fc.1", "out", "output_layer", "span_classifier"),
        *("classifiers.2", "ctc_head", "dist_head.proj", "box_predictor.layers.0", "classification_head.out_proj"),
        *("Classifier", "head_dist", "logits_proj"),
    ],
)
def test_output_heads_in_lists_and_by_plainer_names(path: str) -> None:
    model = tree(path, linear())
    assert routes(model) == {"backbone.weight": ("muon", "hidden matrix"), f"{path}.weight": ("adamw", "output head")}
    lightning = nn.ModuleDict({"model": model})
    assert routes(lightning)[f"model.{path}.weight"] == ("adamw", "output head")


@pytest.mark.parametrize("name", ["fc", "out", "final_layer"])
def test_a_last_layer_is_beside_the_blocks_of_its_model(name: str) -> None:
    blocks = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
    student = nn.ModuleDict({"layers": blocks, name: linear()})
    model = nn.ModuleDict({"student": student, "attention": nn.ModuleDict({"qkv": nn.Linear(8, 9), name: linear()})})
    found = routes(model)
    assert found[f"student.{name}.weight"] == ("adamw", "output head")
    assert found[f"attention.{name}.weight"] == ("muon", "hidden matrix")


@pytest.mark.parametrize(
    "path", ["layers.0.fc", "blocks.2.head", "flow_head.layers.0.fc1", "attn.multihead.proj", "mlp.fc", "stage.1.se.fc"]
)
def test_what_only_looks_like_a_head_stays_hidden(path: str) -> None:
    assert routes(tree(path, linear()))[f"{path}.weight"] == ("muon", "hidden matrix")


def test_a_last_layer_that_keeps_the_width_is_a_projection() -> None:
    attention = nn.ModuleDict({"qkv": nn.Linear(8, 24, bias=False), "out": nn.Linear(8, 8, bias=False)})
    assert {own[0] for own in routes(attention).values()} == {"muon"}


# Routers, LoRA -----------------------------------------------------------------------------------------------------------


def experts_in(kind: str) -> nn.Module:
    if kind == "list":
        return nn.ModuleList([nn.Linear(6, 6, bias=False) for _ in range(4)])
    return Owner(up=(4, 8, 6))


class ScoreRouter(Owner):
    pass


@pytest.mark.parametrize("kind", ["list", "stack"])
@pytest.mark.parametrize(
    ("name", "router"),
    [
        ("gate", nn.Linear(6, 4, bias=False)),
        ("router", nn.Linear(6, 4, bias=False)),
        ("choose", ScoreRouter(weight=(4, 6))),
    ],
)
@pytest.mark.parametrize("of_router", ["muon", "adamw"])
def test_routers_go_where_the_option_says(kind: str, name: str, router: nn.Module, of_router: str) -> None:
    block = {name: router, "experts": experts_in(kind), "gate_proj": nn.Linear(6, 8, bias=False)}
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict(block)])})
    found = routes(model, router=of_router)
    assert found.pop(f"layers.0.{name}.weight") == (of_router, "router of experts")
    assert {own for own in found.values()} <= {("muon", "hidden matrix"), ("muon", "expert stack")}
    [groups] = [
        [p for group in split_params(model, router=of_router) if group["algorithm"] == "adamw" for p in group["params"]]
    ]
    assert len(groups) == (of_router == "adamw")
    with MuonClip(model, router=of_router, logits="off").qk_clip:
        pass


def test_a_router_beside_no_experts_of_its_number_is_a_matrix() -> None:
    block = nn.ModuleDict({"gate": nn.Linear(6, 5, bias=False), "experts": experts_in("list")})
    assert routes(nn.ModuleList([block]), router="adamw")["0.gate.weight"] == ("muon", "hidden matrix")


@pytest.mark.parametrize("option", ["sgd", "Muon"])
def test_an_unknown_optimizer_of_routers(option: str) -> None:
    with pytest.raises(ValueError, match=f"router must be one of 'muon', 'adamw', got '{option}'"):
        route_params(nn.Linear(2, 2), router=option)


def test_lora_factors_are_matrices_of_their_own() -> None:
    peft = pytest.importorskip("peft")
    block = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "tokens": nn.Embedding(9, 8)})
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "tokens"], use_dora=False)
    found = routes(peft.inject_adapter_in_model(config, nn.ModuleDict({"layers": nn.ModuleList([block])})))
    of_lora = {re.sub(r".*(lora_\w+).*", r"\1", name): own for name, own in found.items() if "lora" in name}
    assert of_lora["lora_A"] == of_lora["lora_B"] == ("muon", "LoRA factor")
    assert of_lora["lora_embedding_A"][0] == of_lora["lora_embedding_B"][0] == "adamw"
    bare = Owner(lora_A=(2, 8), lora_B=(8, 2))  # litgpt's
    assert set(routes(nn.ModuleList([bare])).values()) == {("muon", "LoRA factor")}


# Names -------------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8, bias=False)
        self.down = nn.Linear(8, 4, bias=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Net(), Net()
        self.second.up = self.first.up
        self.second.down.weight = self.first.down.weight


def compiled_inside() -> nn.Module:
    net = nn.ModuleDict({"net": Net()})
    net["net"] = torch.compile(net["net"])
    return net


@pytest.mark.parametrize(
    ("make", "name", "stored"),
    [
        (lambda: torch.compile(Net()), "up.weight", "_orig_mod.up.weight"),
        (compiled_inside, "net.up.weight", "net._orig_mod.up.weight"),
        (lambda: AveragedModel(Net()), "up.weight", "module.up.weight"),
        (lambda: DataParallel(torch.compile(Net())), "up.weight", "module._orig_mod.up.weight"),
        (lambda: checkpoint_wrapper(Net()), "up.weight", "up.weight"),
        (lambda: weight_norm(Net().up), "weight", "parametrizations.weight.original1"),
        (Tied, "second.up.weight", "first.up.weight"),
        (lambda: torch.compile(Tied()), "second.down.weight", "_orig_mod.first.down.weight"),
    ],
)
def test_a_parameter_is_known_by_any_of_its_names(make: Callable[[], nn.Module], name: str, stored: str) -> None:
    model = make()
    for pattern in (name, stored, f"*{name[1:]}"):
        assert routes(model)[stored] == ("muon", "hidden matrix")
        assert routes(model, exclude=[pattern])[stored] == ("adamw", "excluded by name")
        assert routes(model, include=[pattern.replace("weight", "w?ight") if pattern == stored else stored])[
            stored
        ] == (
            "muon",
            "included by name",
        )
    with pytest.raises(ValueError, match=r"'up\.weights' matches no parameter"):
        route_params(model, exclude=["up.weights"])


def test_a_wrapped_head_is_a_head() -> None:
    model = nn.ModuleDict({"backbone": nn.Linear(8, 8, bias=False), "fc": nn.Linear(8, 3, bias=False)})
    for wrapped in (AveragedModel(model), torch.compile(model)):
        assert [own for own in routes(wrapped).values()] == [("muon", "hidden matrix"), ("adamw", "output head")]


# What is no model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [split_params, route_params, MuonClip])
@pytest.mark.parametrize(
    "given", [lambda m: m.parameters(), lambda m: list(m.named_parameters()), lambda m: [{"params": m}]]
)
def test_parameters_are_not_their_model(make: Any, given: Any) -> None:
    with pytest.raises(
        TypeError, match=r"expected the model, an nn.Module, got (generator|list); pass the model itself"
    ):
        make(given(nn.Linear(2, 2)))


@pytest.mark.parametrize("make", [split_params, route_params, MuonClip])
@pytest.mark.parametrize("lazy", [nn.LazyLinear(3), nn.LazyConv1d(3, 2)])
def test_a_lazy_module_needs_its_first_forward(make: Any, lazy: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"^head.weight is an UninitializedParameter .* run a forward first"):
        make(nn.ModuleDict({"head": lazy}))


# A forward tells ---------------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Which parameters a forward multiplies by activations, and which it uses otherwise."""

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_grouped_mm")
    VIEWS = (
        "t",
        "transpose",
        "view",
        "_unsafe_view",
        "permute",
        "expand",
        "slice",
        "select",
        "unsqueeze",
        "detach",
        "alias",
    )

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters()}
        self.multiplied: set[str] = set()
        self.used_otherwise: set[str] = set()

    def name_of(self, tensor: Tensor) -> str | None:
        return self.names.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = func.overloadpacket.__name__
        operands = [self.name_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if operation in self.NAMES:
            factors = operands[1:3] if operation in ("addmm", "baddbmm") else operands[:2]
            if None in factors:
                self.multiplied |= {name for name in factors if name}
        elif operation not in self.VIEWS:
            self.used_otherwise |= {name for name in operands if name}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "family",
    [
        *("llama", "gpt2", "bert", "mamba", "falcon_mamba", "swin", "levit", "funnel", "gpt_oss", "mixtral"),
        *("idefics2", "beit", "ibert", "t5", "wav2vec2-conformer"),
    ],
)
def test_what_muon_takes_is_multiplied_by_activations(family: str) -> None:
    pytest.importorskip("transformers")
    from families.shrunk import tiny

    torch.manual_seed(0)
    try:
        model, inputs = tiny(family)
    except RuntimeError as reason:
        pytest.skip(f"this release builds no small {family}: {reason}")
    with Products(model) as products:
        model(**inputs)
    found = routes(model)
    muons = {name for name, (algorithm, _) in found.items() if algorithm == "muon"}
    assert muons & products.multiplied
    assert not muons & (products.used_otherwise - products.multiplied)
    for name, p in model.named_parameters():
        if p.ndim == 2 and min(p.shape) > 1 and name in products.multiplied - muons:
            assert found[name][1] in ("embedding", "output head"), name
