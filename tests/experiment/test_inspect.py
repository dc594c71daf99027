import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import on_ranks
from torch import nn

from lightning_muonclip import Attention, Muon, QKClip, split_params
from lightning_muonclip.experiment.inspect import command, text
from lightning_muonclip.experiment.inspect.abstract import Rehearsal, without_values
from lightning_muonclip.experiment.inspect.costs import Ranks, multiplied
from lightning_muonclip.optim.routing import route_params

transformers = pytest.importorskip("transformers")

PAGE = Path(__file__).parents[2] / "docs" / "inspect.md"


def _runs_on_meta() -> bool:
    """Whether rotary embeddings run there; older releases ask for an autocast that torch refuses."""
    autocast = getattr(transformers.utils.generic, "maybe_autocast", None)
    return autocast is None or '"meta"' in inspect.getsource(autocast)


on_meta = pytest.mark.skipif(not _runs_on_meta(), reason="this release of transformers does not run on the meta device")


class Unreadable(nn.Module):
    """Queries and keys are nonlinear in every weight, so no factor scales its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, tokens):
        x = self.embed(tokens)
        return torch.softmax(self.q(x).sigmoid() @ self.k(x).sigmoid().mT, -1) @ x


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)

    def forward(self, x, y):
        return self.attention(x, y, y)[0]


class NeedsNumbers(nn.Module):
    """A mixture of experts, of which a forward needs values."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.router = nn.Linear(16, 4)
        self.top_k = 2

    def forward(self, x):
        chosen = self.router(x).softmax(-1).topk(2).indices
        return sum(self.experts[i](x) for i in chosen.unique().tolist())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = nn.MultiheadAttention(16, 2, batch_first=True), NeedsNumbers()

    def forward(self, x):
        return self.mlp(self.attention(x, x, x)[0])


class Branches(nn.Module):
    """Cannot run without values: no part of it is to blame."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2)

    def forward(self, x):
        x = self.first(x)
        return self.attention(x, x, x)[0] if x.sum() < 1e9 else x


def stack():
    return nn.Sequential(nn.Linear(16, 16), Block(), Block())


def two_inputs():
    print("a word on stdout")
    return TwoInputs(), (torch.randn(5, 2, 16), torch.randn(5, 2, 16)), {}


def fails():
    raise KeyError("no weights")


def needs(size):
    return nn.Linear(size, size)


def own(name: str) -> str:
    return f"{__name__}:{name}"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        command.main(arguments)
    out, err = capsys.readouterr()
    return end.value.code, out, err


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    code, out, _ = run(capsys, *arguments, "--json")
    found = json.loads(out)
    assert found["exit_code"] == code
    return found


def llama(**changes) -> "transformers.LlamaConfig":
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaConfig(**{**small, "num_hidden_layers": 3, "vocab_size": 64, **changes})


def test_the_applications_models_are_looked_at(capsys):
    found = inspected(capsys, "model=mla", "trainer=fsdp2", "trainer.devices=4")
    (attention,) = found["attention"]
    assert attention["layers"] == [f"layers.{i}.self_attn" for i in range(4)]
    assert attention["clips"] == "q and k" and attention["proof"]["on"] == ["layers.0.self_attn"]
    assert (found["optimizer_state"]["strategy"], found["optimizer_state"]["ranks"]) == ("fsdp2", 4)
    assert found["flops"]["tokens"] == 8 * 256 * 4 and not found["has_values"] and found["exit_code"] == 0


def test_with_values_the_whole_model_is_checked(capsys):
    found = inspected(capsys, "model.num_hidden_layers=2", "model.hidden_size=16", "--values")
    assert found["has_values"] and found["checked_on_whole_model"]
    assert len(found["attention"][0]["proof"]["on"]) == 2


@on_meta
def test_a_config_tells_what_qk_clip_tells_of_the_model(tmp_path, capsys):
    config = llama()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    found = inspected(capsys, str(tmp_path))
    with QKClip(
        transformers.LlamaForCausalLM(config), example=((), {"input_ids": torch.arange(32).view(2, 16)})
    ) as clip:
        assert [name for row in found["attention"] for name in row["layers"]] == clip.layers
        assert {row["clips"] for row in found["attention"]} == set(clip.sides.values())
        assert found["attention"][0]["layout"] in clip.summary()
    assert found["attention"][0]["proof"]["on"] == ["model.layers.0.self_attn"]


@on_meta
def test_nothing_of_a_wide_model_is_materialised(tmp_path):
    sizes = {"hidden_size": 2**16, "num_attention_heads": 512, "num_key_value_heads": 8, "intermediate_size": 2**18}
    config = llama(**sizes, num_hidden_layers=40, vocab_size=2**17)
    with without_values():
        model = transformers.LlamaForCausalLM(config)
    assert all(param.is_meta for param in model.parameters()) and sum(p.numel() for p in model.parameters()) > 2**40
    Rehearsal(model).prepare((), {"input_ids": torch.arange(8).view(1, 8), "use_cache": False})
    assert model.model.rotary_emb.inv_freq.device.type == "cpu"  # what depends on no parameter has numbers


@on_meta
def test_layers_that_differ_are_proven_apart(capsys, tmp_path):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    kinds = ["sliding_attention", "full_attention"] * 2
    config = transformers.Gemma2Config(**sizes, num_hidden_layers=4, vocab_size=64, layer_types=kinds, sliding_window=4)
    config.to_json_file(tmp_path / "config.json")
    (attention,) = inspected(capsys, str(tmp_path))["attention"]
    assert attention["proof"]["on"] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def test_modules_that_need_values_are_passed_over(capsys):
    found = inspected(capsys, own("stack"))
    assert found["attention"][0]["layers"] == ["1.attention", "2.attention"]
    assert found["passed_over"][0]["modules"] == ["1.mlp", "2.mlp"]
    assert "2 of 4 experts" in found["flops"]["assumed"]


def test_a_model_that_cannot_run_without_values_gets_some(capsys):
    found = inspected(capsys, own("Branches"))
    assert found["has_values"] and found["checked_on_whole_model"] and found["attention"][0]["clips"] == "q and k"
    assert any("values" in note for note in found["notes"])


def test_qk_norm_may_be_refused(tmp_path, capsys):
    config = transformers.Qwen3Config(
        **{**llama().to_dict(), "model_type": "qwen3", "head_dim": 8, "rope_parameters": None}
    )
    config.to_json_file(tmp_path / "config.json")
    (attention,) = inspected(capsys, str(tmp_path))["attention"]
    assert attention["watched"] == "QK-norm" and not attention["refused"]
    found = inspected(capsys, str(tmp_path), "muonclip.qk_norm=error")
    assert found["exit_code"] == 1 and "QK-norm" in found["refusal"]


def test_attention_that_cannot_be_read_is_exit_code_1(capsys):
    found = inspected(capsys, own("Unreadable"))
    assert found["exit_code"] == 1 and found["refusals"][0]["layers"] == [""] and found["refusals"][0]["ways_out"]
    found = inspected(capsys, own("Unreadable"), "muonclip.unknown=monitor")
    assert found["exit_code"] == 0 and found["refusals"]


def test_without_example_inputs_the_routes_alone_are_told(capsys):
    code, out, _ = run(capsys, own("TwoInputs"))
    assert code == 0 and "(module, args, kwargs)" in " ".join(out.split()) and "is not known" in out
    assert inspected(capsys, own("TwoInputs"))["attention"] is None
    assert inspected(capsys, own("two_inputs"))["attention"][0]["clips"] == "q and k"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model.hiden_size=3"], "hidden_size"),
        (["optimizer=adamw"], "optimizer=muonclip"),
        (["--ranks", "0"], "positive"),
        (["--ranks", "4"], "--strategy"),
        (["--tokens", "-5"], "--tokens"),
        (["nonsense"], "nonsense"),
        ([own("missing")], "missing"),
        ([own("fails")], "KeyError: 'no weights'"),
        ([own("needs")], "size"),
        (["no_such_package:model"], "no_such_package"),
        (["no/such/config.json"], "does not exist"),
        ([own("TwoInputs"), "model=mla"], "model=mla"),
        ([own("TwoInputs"), "muonclip.treshold=3"], "threshold"),
        ([own("TwoInputs"), "muonclip.include=[nothing]"], "nothing"),
    ],
)
def test_usage_errors_are_one_line_and_exit_code_2(capsys, arguments, said):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and not out and said in err and len(err.strip().splitlines()) == 1


def leaves():
    sys.exit(0)


def unlike_inputs():
    return nn.MultiheadAttention(16, 2), 3 * (torch.ones(2, 3, 5),), {}


@pytest.mark.parametrize(("factory", "said"), [("leaves", "raised SystemExit"), ("unlike_inputs", "inputs do not fit")])
def test_a_factory_that_gives_nothing_to_look_at_is_exit_code_2(capsys, factory, said):
    with pytest.raises(SystemExit) as ended:
        command.main([own(factory)])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_file_that_is_no_config_is_refused(tmp_path, capsys):
    for content in ("{}", "[", '{"model_type": "lama"}'):
        (tmp_path / "config.json").write_text(content)
        code, _, err = run(capsys, str(tmp_path / "config.json"))
        assert code == 2 and "config.json" in err


def stepped(**options) -> tuple[nn.Module, Muon]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), Attention(hidden_size=8, num_attention_heads=2), nn.Linear(8, 7))
    return model, Muon(split_params(model), lr=0.1, **options)


def bytes_of(optimizer: torch.optim.Optimizer) -> int:
    local = (getattr(x, "_local_tensor", x) for state in optimizer.state.values() for x in state.values())
    return sum(x.numel() * x.itemsize for x in local)


@pytest.mark.parametrize("options", [{}, {"momentum_dtype": "bfloat16"}, {"second_moment": "rows"}])
def test_the_memory_is_that_of_a_real_optimizer(options):
    model, optimizer = stepped(**options)
    (told,) = Ranks(optimizer, "single", 1).state_bytes()
    model(torch.arange(6).view(2, 3)).square().mean().backward()
    optimizer.step()
    assert told.total == bytes_of(optimizer)


def fsdp2_bytes(world_size: int) -> tuple[int, list[int]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    told = [own.total for own in Ranks(stepped()[1], "fsdp2", world_size).state_bytes()]
    model, _ = stepped()
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    optimizer = Muon(split_params(model), lr=0.1)
    model(torch.arange(6).view(2, 3)).square().mean().backward()
    optimizer.step()
    return bytes_of(optimizer), told


def test_the_memory_of_fsdp2_is_that_of_real_ranks():
    for rank, (real, told) in enumerate(on_ranks(2, fsdp2_bytes, 2)):
        assert told[rank] == real


def test_the_work_is_shared_by_owners():
    _, optimizer = stepped()
    alone, shared = Ranks(optimizer, "single", 1).flops, Ranks(optimizer, "ddp", 3).flops
    assert sum(shared) == pytest.approx(sum(alone)) == pytest.approx(sum(optimizer.flops().values()))
    assert max(shared) < alone[0]


def test_tables_multiply_only_if_a_head_is_tied_to_them():
    model = nn.ModuleDict({"embed": nn.Embedding(11, 8), "lm_head": nn.Linear(8, 11, bias=False)})
    assert multiplied(model, route_params(model)).active == 88
    model["lm_head"].weight = model["embed"].weight
    assert multiplied(model, route_params(model)).active == 88
    del model["lm_head"]
    assert multiplied(model, route_params(model)).active == 0


def test_the_page_describes_every_field(capsys):
    documented = set(re.findall(r"^\| `([\w.]+)` \|", PAGE.read_text(), re.MULTILINE))
    found: set[str] = set()

    def walk(value, path: str) -> None:
        if path:
            found.add(path)
        if path == "options":  # MuonClip's own
            return
        for one in value if isinstance(value, list) else [value]:
            for key, inner in one.items() if isinstance(one, dict) else ():
                walk(inner, f"{path}.{key}".lstrip("."))

    for arguments in (["model=mla"], [own("stack")], [own("Unreadable")]):
        walk(inspected(capsys, *arguments), "")
    assert found == documented


@pytest.mark.parametrize("width", [80, 200])
def test_no_line_is_wider_than_the_terminal(width):
    look, _ = command.inspect(["model=moe"])
    assert max(map(len, text.text(look, width).splitlines())) <= width


def test_the_command_writes_one_document(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os\nimport torch\n\ndef make():\n    os.write(1, b'what an extension says')\n"
        "    return torch.nn.MultiheadAttention(16, 2), 3 * (torch.ones(2, 3, 16),), {}\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", command.__name__, "mine:make", "--json"], capture_output=True, text=True, cwd=tmp_path
    )
    assert json.loads(done.stdout)["schema"] == 1, done.stderr
