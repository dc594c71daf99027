from __future__ import annotations

import functools
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_muonclip import Attention, MultiheadLatentAttention, Muon, split_params
from lightning_muonclip.experiment.gpt import GPT
from lightning_muonclip.optim.routing import route_params, routing_table

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
}


def gpt(**options: int) -> nn.Module:
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2} | options
    return GPT(functools.partial(Attention, num_attention_heads=2), **sizes)


def gpt_with_biases() -> nn.Module:
    return GPT(functools.partial(Attention, num_attention_heads=2, attention_bias=True, qk_norm=True), hidden_size=16)


def gpt_with_latent_attention() -> nn.Module:
    attention = functools.partial(
        MultiheadLatentAttention,
        num_attention_heads=2,
        q_lora_rank=4,
        kv_lora_rank=4,
        qk_nope_head_dim=4,
        qk_rope_head_dim=2,
        v_head_dim=4,
    )
    return GPT(attention, vocab_size=50, hidden_size=16, num_hidden_layers=2)


def llama(tied: bool = False) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=24, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def bert_for_words(tied: bool = True) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, tie_word_embeddings=tied))


def bert_for_classes() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(50, 16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16), nn.LayerNorm(16), nn.Linear(16, 50)
    )


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 1))


def torch_encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False)


def partly_frozen() -> nn.Module:
    model = gpt()
    for name, param in model.named_parameters():
        param.requires_grad_("layers.0." not in name and "norm" not in name)
    return model


MODELS: list[Callable[[], nn.Module]] = [
    gpt,
    gpt_with_biases,
    gpt_with_latent_attention,
    llama,
    functools.partial(llama, tied=True),
    gpt2,
    bert_for_words,
    functools.partial(bert_for_words, tied=False),
    bert_for_classes,
    mlp,
    convolutions,
    torch_encoder,
    partly_frozen,
]


def names(module: nn.Module, algorithm: str, **patterns: list[str]) -> set[str]:
    return {
        name
        for group in split_params(module, **patterns)
        if group["algorithm"] == algorithm
        for name, _ in group["params"]
    }


def reasons(module: nn.Module, **patterns: list[str]) -> dict[str, tuple[str, str]]:
    return {route.name: (route.algorithm, route.reason) for route in route_params(module, **patterns)}


@pytest.mark.parametrize("model", MODELS)
def test_every_trainable_parameter_is_in_exactly_one_group(model: Callable[[], nn.Module]) -> None:
    module = model()
    given = [pair for group in split_params(module) for pair in group["params"]]
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert sorted(name for name, _ in given) == sorted(trainable)
    assert all(p is trainable[name] for name, p in given)


@pytest.mark.parametrize("model", MODELS)
def test_muon_takes_the_groups(model: Callable[[], nn.Module]) -> None:
    module = model()
    optimizer = Muon(split_params(module))
    assert [group["name"] for group in optimizer.param_groups] == ["muon", "adamw"]
    assert all(p.ndim == 2 for p in optimizer.param_groups[0]["params"])
    assert optimizer.param_groups[0]["param_names"] == sorted(
        names(module, "muon"), key=[name for name, _ in module.named_parameters()].index
    )


# What a transformer's author would call hidden: every matrix inside of a block, and nothing else.
@pytest.mark.parametrize(
    ("model", "hidden"),
    [
        (gpt, r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(up|down)_proj)\.weight"),
        (gpt_with_biases, r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(up|down)_proj)\.weight"),
        (gpt_with_latent_attention, r"layers\.\d+\.(self_attn\.\w+_proj(_with_mqa)?|mlp\.(up|down)_proj)\.weight"),
        (llama, r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight"),
        (functools.partial(llama, tied=True), r"model\.layers\.\d+\.(self_attn|mlp)\.\w+\.weight"),
        (gpt2, r"transformer\.h\.\d+\.(attn|mlp)\.c_(attn|proj|fc)\.weight"),
        (bert_for_words, r"bert\.encoder.*(query|key|value|dense)\.weight|cls\.predictions\.transform\.dense\.weight"),
        (bert_for_classes, r"bert\.encoder.*(query|key|value|dense)\.weight|bert\.pooler\.dense\.weight"),
        (mlp, r"[13]\.weight"),
        (convolutions, r"3\.weight"),
        (torch_encoder, r"layers\.\d\.(self_attn\.(in_proj_weight|out_proj\.weight)|linear[12]\.weight)"),
        (partly_frozen, r"layers\.1\.(self_attn\.[qkvo]_proj|mlp\.(up|down)_proj)\.weight"),
    ],
)
def test_hidden_matrices_go_to_muon(model: Callable[[], nn.Module], hidden: str) -> None:
    module = model()
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    expected = {name for name in trainable if re.fullmatch(hidden, name)}
    assert expected
    assert names(module, "muon") == expected
    assert names(module, "adamw") == trainable - expected


def test_reasons() -> None:
    found = reasons(gpt_with_biases())
    assert found["embed_tokens.weight"] == ("adamw", "embedding")
    assert found["lm_head.weight"] == ("adamw", "output head")
    assert found["norm.weight"] == ("adamw", "vector")
    assert found["layers.0.self_attn.q_proj.bias"] == ("adamw", "vector")
    assert found["layers.3.self_attn.q_proj.weight"] == ("muon", "hidden matrix")
    assert reasons(partly_frozen())["layers.0.mlp.up_proj.weight"] == ("frozen", "requires no gradient")
    assert reasons(convolutions())["4.weight"] == ("adamw", "vector")
    assert reasons(nn.Sequential(nn.Conv1d(3, 4, 2)))["0.weight"] == ("adamw", "3-D tensor")
    assert reasons(nn.Sequential(nn.Conv2d(3, 4, 2)))["0.weight"] == ("adamw", "4-D tensor")


def test_routes_follow_the_order_of_the_module() -> None:
    module = gpt()
    assert [route.name for route in route_params(module)] == [name for name, _ in module.named_parameters()]


def test_heads_are_known_by_name_or_by_an_embedding_of_their_shape() -> None:
    assert reasons(gpt2())["transformer.wpe.weight"] == ("adamw", "embedding")
    assert reasons(bert_for_words(tied=False))["cls.predictions.decoder.weight"] == ("adamw", "output head")
    assert reasons(bert_for_classes())["classifier.weight"] == ("adamw", "output head")
    assert reasons(mlp())["5.weight"] == ("adamw", "output head")


def test_a_hidden_matrix_of_the_shape_of_the_embedding_stays_hidden() -> None:
    module = gpt(vocab_size=64, hidden_size=16)
    assert module.layers[0].mlp.up_proj.weight.shape == module.embed_tokens.weight.shape
    assert "layers.0.mlp.up_proj.weight" in names(module, "muon")


@pytest.mark.parametrize(
    "name", ["lm_head", "head", "classifier", "score", "unembed", "embed_out", "to_logits", "output"]
)
def test_names_of_heads(name: str) -> None:
    module = nn.ModuleDict({"hidden": nn.Linear(16, 16), name: nn.Linear(16, 50)})
    assert reasons(module)[f"{name}.weight"] == ("adamw", "output head")
    inside = nn.ModuleDict({"layers": nn.ModuleList([module])})
    assert reasons(inside)[f"layers.0.{name}.weight"] == ("muon", "hidden matrix")


@pytest.mark.parametrize("name", ["embed_tokens", "wte", "wpe", "patch_embedding"])
def test_names_of_embeddings(name: str) -> None:
    module = nn.ModuleDict({"hidden": nn.Linear(16, 16), name: nn.Linear(16, 50)})
    assert reasons(module)[f"{name}.weight"] == ("adamw", "embedding")
    inside = nn.ModuleDict({"layers": nn.ModuleList([module])})
    assert reasons(inside)[f"layers.0.{name}.weight"] == ("muon", "hidden matrix")


def test_an_embedding_may_be_one_of_a_list() -> None:
    module = nn.ModuleDict({"embeddings": nn.ModuleList([nn.Linear(16, 50)]), "hidden": nn.Linear(16, 16)})
    assert reasons(module)["embeddings.0.weight"] == ("adamw", "embedding")


def test_an_embedding_inside_of_a_block_is_known_by_its_class() -> None:
    inside = nn.ModuleList([nn.ModuleDict({"positions": nn.Embedding(8, 4), "hidden": nn.Linear(4, 4)})])
    assert reasons(inside)["0.positions.weight"] == ("adamw", "embedding")


class Tied(nn.Module):
    """The head comes first, so that its name is the one the shared weight goes by."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(16, 50, bias=False)
        self.hidden = nn.Linear(16, 16, bias=False)
        self.tokens = nn.Embedding(50, 16)
        self.tokens.weight = self.decoder.weight


def test_tied_parameters_are_routed_once_as_embeddings() -> None:
    assert reasons(Tied()) == {"decoder.weight": ("adamw", "embedding"), "hidden.weight": ("muon", "hidden matrix")}


def test_nothing_trainable_is_no_group() -> None:
    assert split_params(gpt().requires_grad_(False)) == []


class TestPatterns:
    def test_exclude(self) -> None:
        module = gpt()
        kept = {"layers.0.self_attn.q_proj.weight", "layers.1.self_attn.q_proj.weight"}
        assert names(module, "muon", exclude=["*.q_proj.weight"]) == names(module, "muon") - kept
        assert kept < names(module, "adamw", exclude=["*.q_proj.weight"])
        found = reasons(module, exclude=["*.q_proj.*"])
        assert found["layers.0.self_attn.q_proj.weight"] == ("adamw", "excluded by name")

    def test_include(self) -> None:
        module = gpt()
        assert names(module, "muon", include=["lm_head.weight"]) == names(module, "muon") | {"lm_head.weight"}
        found = reasons(module, include=["embed*", "lm_head.*"])
        assert found["embed_tokens.weight"] == found["lm_head.weight"] == ("muon", "included by name")

    def test_exclude_wins_and_frozen_stays_frozen(self) -> None:
        found = reasons(partly_frozen(), exclude=["lm_head.*", "layers.0.*"], include=["lm_head.*"])
        assert found["lm_head.weight"] == ("adamw", "excluded by name")
        assert found["layers.0.mlp.up_proj.weight"] == ("frozen", "requires no gradient")

    def test_patterns_match_case_and_the_whole_name(self) -> None:
        for pattern in ("LM_HEAD.weight", "lm_head"):
            with pytest.raises(ValueError, match="matches no parameter"):
                split_params(gpt(), exclude=[pattern])

    @pytest.mark.parametrize("option", ["exclude", "include"])
    def test_a_pattern_that_matches_nothing(self, option: str) -> None:
        with pytest.raises(ValueError, match=r"'\*\.router\.weight' matches no parameter of GPT"):
            split_params(gpt(), **{option: ["*.weight", "*.router.weight"]})

    @pytest.mark.parametrize(("pattern", "shape"), [("norm.weight", r"\(16,\)"), ("layers.*.bias", r"\(16,\)")])
    def test_include_of_something_that_is_not_a_matrix(self, pattern: str, shape: str) -> None:
        with pytest.raises(ValueError, match=rf"include matches .*{shape}, which is not a matrix"):
            split_params(gpt_with_biases(), include=[pattern])
        grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose1d(4, 4, 3))
        for name in ("0.weight", "1.weight"):
            with pytest.raises(ValueError, match=rf"include matches {name} .* grouped or transposed convolution"):
                split_params(grouped, include=[name])

    @pytest.mark.parametrize("option", ["exclude", "include"])
    def test_a_bare_string_is_no_list(self, option: str) -> None:
        with pytest.raises(
            ValueError, match=rf"{option} must be a list of patterns, got '0.weight'; use \['0.weight'\]"
        ):
            split_params(convolutions(), **{option: "0.weight"})


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 6, 5))
        self.down_proj_bias = nn.Parameter(torch.randn(4, 6))


class TestTensorsOfMoreDimensions:
    @staticmethod
    def model() -> nn.Module:
        model = nn.Module()
        model.embed_tokens = nn.Embedding(9, 5)
        model.layers = nn.ModuleList([nn.ModuleDict({"experts": Experts(), "conv": nn.Conv1d(5, 7, 3, bias=False)})])
        model.table = nn.Parameter(torch.randn(2, 3, 5))
        return model

    def test_experts_go_to_muon_and_the_rest_is_not_guessed(self) -> None:
        routes = {route.name: (route.algorithm, route.kind, route.reason) for route in route_params(self.model())}
        assert routes["layers.0.experts.gate_up_proj"] == ("muon", "experts", "expert stack")
        assert routes["layers.0.experts.down_proj_bias"] == ("adamw", "matrix", "biases of experts")
        assert routes["layers.0.conv.weight"] == ("adamw", "convolution", "3-D tensor")
        assert routes["table"] == ("adamw", "experts", "3-D tensor")

    def test_include_names_the_kind(self) -> None:
        model = self.model()
        groups = {group["name"]: group for group in split_params(model, include=["*conv.weight", "table"])}
        assert {name: group.get("kind") for name, group in groups.items() if name != "adamw"} == {
            "experts": "experts",
            "convolutions": "convolution",
        }
        assert [name for name, _ in groups["experts"]["params"]] == ["table", "layers.0.experts.gate_up_proj"]
        assert [name for name, _ in groups["convolutions"]["params"]] == ["layers.0.conv.weight"]
        Muon(list(groups.values()))


class TestTable:
    def test_blocks_are_collapsed(self) -> None:
        module = gpt(num_hidden_layers=3)
        lines = routing_table(route_params(module)).splitlines()
        assert len(lines) == 1 + 6 + 2 + 3  # header; matrices and norms of a block; embedding, last norm, head
        [queries] = [line for line in lines if "q_proj" in line]
        assert queries.split(maxsplit=5) == [
            "muon",
            "layers.*.self_attn.q_proj.weight",
            "16x16",
            "3",
            "768",
            "hidden matrix",
        ]

    def test_a_number_that_is_no_index_is_kept(self) -> None:
        table = routing_table(route_params(torch_encoder()))
        assert all(f" layers.*.norm{i}.weight " in table for i in (1, 2))
        table = routing_table(route_params(mlp()))
        assert all(f" {i}.weight " in table for i in (0, 1, 3, 4, 5))

    def test_muon_comes_first_and_frozen_last(self) -> None:
        lines = routing_table(route_params(partly_frozen())).splitlines()
        column = [line.split()[0] for line in lines[1:]]
        assert column == sorted(column, key=["muon", "adamw", "frozen"].index)
        assert set(column) == {"muon", "adamw", "frozen"}

    def test_different_routes_are_not_collapsed(self) -> None:
        table = routing_table(route_params(gpt(), exclude=["layers.0.mlp.up_proj.weight"]))
        assert len([line for line in table.splitlines() if "layers.*.mlp.up_proj.weight" in line]) == 2

    @pytest.mark.parametrize("model", MODELS)
    def test_every_element_is_counted(self, model: Callable[[], nn.Module]) -> None:
        module = model()
        rows = [line.split(maxsplit=5) for line in routing_table(route_params(module)).splitlines()[1:]]
        assert sum(int(row[3]) for row in rows) == len(list(module.parameters()))
        assert sum(int(row[4].replace(",", "")) for row in rows) == sum(p.numel() for p in module.parameters())

    def test_a_scalar(self) -> None:
        module = nn.Module()
        module.temperature = nn.Parameter(torch.ones(()))
        assert "scalar" in routing_table(route_params(module))
