"""Real models under ``strategy="fsdp2"`` on two processes, against one process on the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from helpers import VOCAB, LitTiny, loader, tiny_gpt, token_batches, trainer
from lightning.pytorch.loops import utilities
from processes import on_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, TensorDataset
from tp_worker import whole

from lightning_muonclip import FSDP2Strategy, MuonClipCallback
from lightning_muonclip.experiment.gpt import Block as GPTBlock
from lightning_muonclip.trainer.fsdp2 import chosen_modules, repeated_blocks
from lightning_muonclip.trainer.strategies import check_strategy

RANKS, STEPS, EPOCHS = 2, 2, 2


class LitWithoutForward(pl.LightningModule):
    """A network of which ``training_step`` calls parts, and never ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        gpt = tiny_gpt()
        self.embed, self.layers, self.norm, self.head = gpt.embed_tokens, gpt.layers, gpt.norm, gpt.lm_head

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.embed(batch[0][:, :-1])
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(self.norm(x), self.head.weight)
        return F.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class LitLanguageModel(LitTiny):
    """A model of Hugging Face, called by ``forward``."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0][:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten())

    validation_step = None


class LitVision(LitTiny):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])


def lit(cls: type[LitTiny], model: nn.Module) -> LitTiny:
    """Logits pass the threshold."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "query", "key", "qkv")) and param.ndim > 1:
                param.mul_(40)
    return cls(model, partial(torch.optim.AdamW, lr=3e-3))


def gpt() -> pl.LightningModule:
    torch.manual_seed(0)
    return LitTiny(tiny_gpt(), partial(torch.optim.AdamW, lr=3e-3))


def llama() -> pl.LightningModule:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    return lit(LitLanguageModel, LlamaForCausalLM(config))


def bert() -> pl.LightningModule:
    from transformers import BertConfig, BertLMHeadModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=VOCAB, is_decoder=True, max_position_embeddings=16, **sizes)
    model = BertLMHeadModel(config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return lit(LitLanguageModel, model)


def vit() -> pl.LightningModule:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, num_heads=2, depth=2, num_classes=5
    )
    return lit(LitVision, model)


#: The model, and the modules that are sharded one by one.
MODELS: dict[str, tuple[Callable[[], pl.LightningModule], int]] = {
    "gpt": (gpt, 2),
    "without forward": (LitWithoutForward, 2),
    "llama": (llama, 2),
    "bert": (bert, 2),
    "vit": (vit, 2),
}


def fit(
    name: str, rank: int, ranks: int, checkpoint: str | None = None, epochs: int = EPOCHS, **options: Any
) -> dict[str, Any]:
    """Trains on one shard of the data."""
    module = MODELS[name][0]().double()
    if name == "vit":
        images = torch.randn(STEPS, 4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        data, labels = images.chunk(ranks, 1)[rank], (torch.arange(STEPS * 4) % 5).view(STEPS, 4).chunk(ranks, 1)[rank]
        batches: DataLoader[Any] = DataLoader(TensorDataset(data.flatten(0, 1), labels.flatten()), 4 // ranks)
    else:
        batches = loader(token_batches(STEPS, batch_size=4).chunk(ranks, 1)[rank])
    callback = MuonClipCallback(threshold=0.5, dtype=torch.float64)
    options |= {"use_distributed_sampler": False, "gradient_clip_val": 0.3, "max_epochs": epochs}
    own = trainer([callback], devices=ranks, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            utilities, "_distributed_is_initialized", lambda: False
        )  # by gloo, Lightning uses no inference mode
        own.fit(module, batches, batches if name == "gpt" else None, ckpt_path=checkpoint)
    assert callback.qk_clip is not None
    units = sum(isinstance(m, FSDPModule) for m in module.modules()) - isinstance(module, FSDPModule)
    return {
        "weights": {name: whole(p) for name, p in module.named_parameters()},
        "clips": callback.qk_clip.clips,
        "units": units,
        "trainer": own,
    }


def fit_sharded(name: str, folder: Path) -> dict[str, Any]:
    """Trains, saves after the first epoch, and resumes."""
    rank = torch.distributed.get_rank()
    found = {"whole": fit(name, rank, RANKS, strategy="fsdp2")}
    if name == "gpt":
        found["offloaded"] = fit(name, rank, RANKS, strategy=FSDP2Strategy(cpu_offload=True))
        half = fit(name, rank, RANKS, strategy=FSDP2Strategy(save_distributed_checkpoint=False), epochs=1)
        half["trainer"].save_checkpoint(folder / "half.ckpt")
        found["resumed"] = fit(name, rank, RANKS, str(folder / "half.ckpt"), strategy="fsdp2")
    for own in found.values():
        del own["trainer"]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_sharded_model_trains_as_on_one_device(name, tmp_path):
    expected = fit(name, 0, 1)
    assert expected["clips"].sum() > 0
    for found in on_ranks(RANKS, fit_sharded, name, tmp_path):
        for kind, own in found.items():
            assert own["units"] == MODELS[name][1]
            torch.testing.assert_close(
                own["clips"], expected["clips"], rtol=0, atol=0, msg=lambda m, k=kind: f"{k}: {m}"
            )
            for key, weight in expected["weights"].items():
                torch.testing.assert_close(own["weights"][key], weight, rtol=1e-9, atol=1e-11, msg=f"{name}: {key}")


class Block(nn.Module):
    """Attention and MLP, with experts or without."""

    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(experts))


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.merge = nn.Linear(4, 4)


class Routed(nn.Module):
    """Experts that are modules of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU())) for _ in range(3))


def tied() -> nn.Module:
    """The first and the third of three blocks share a weight."""
    model = nn.Sequential(Block(), Block(), Block())
    model[2].mlp[0].weight = model[0].mlp[0].weight
    return model


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.ModuleDict({"h": nn.ModuleList([Block(), Block()]), "head": nn.Linear(4, 4)}), ["h.0", "h.1"]),
        (nn.Sequential(Stage(), Stage()), ["0.blocks.0", "0.blocks.1", "0", "1.blocks.0", "1.blocks.1", "1"]),
        (nn.Sequential(Block(experts=3), Block(experts=3)), ["0", "1"]),  # an expert may get no tokens on some rank
        (nn.Sequential(Routed(), Routed()), ["0", "1"]),
        (nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), Block(), Block()), ["2", "3"]),
        (
            nn.ModuleList([nn.ModuleList([Block(), Block()]), nn.ModuleList([Block(), Block()])]),
            ["0.0", "0.1", "1.0", "1.1"],
        ),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), []),
        (nn.ModuleDict({"one": nn.ModuleList([Block()])}), []),
        (tied(), ["1"]),
        (nn.Sequential(*[Block()] * 3), ["0"]),
    ],
)
def test_repeated_blocks_are_found(model, expected):
    names = {module: name for name, module in reversed(list(model.named_modules()))}
    assert [names[unit] for unit in repeated_blocks(model)] == expected


def test_modules_are_chosen_by_class_or_function():
    model = nn.Sequential(Stage(), Stage())
    assert [type(unit) for unit in chosen_modules(model, (Stage, Block))] == [Block, Block, Stage] * 2
    assert chosen_modules(model, lambda module: module is model[0].merge) == [model[0].merge]
    with pytest.raises(
        ValueError, match=r"wrap=<class .*Conv2d'> chooses no module of Sequential; its modules are Block, "
    ):
        chosen_modules(model, nn.Conv2d)
    with pytest.raises(ValueError, match=r"chooses a Block that shares mlp.0.weight with a module outside of it"):
        chosen_modules(tied(), Block)


def test_the_name_is_known_and_named():
    assert isinstance(trainer(strategy="fsdp2").strategy, FSDP2Strategy)
    for strategy in ("fsdp", "deepspeed"):
        with pytest.raises(ValueError, match=r'Use (DDP, or )?strategy="fsdp2" instead'):
            check_strategy(type({"fsdp": "FSDPStrategy", "deepspeed": "DeepSpeedStrategy"}[strategy], (), {})())


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("32-true", None), ("bf16-true", None)]
)
def test_precision_decides_what_is_gathered(precision, dtype):
    policy = trainer(strategy="fsdp2", precision=precision).strategy._mixed_precision()
    assert policy.param_dtype == dtype
    assert policy.reduce_dtype == (torch.float32 if dtype else None)


def train_one(strategy: FSDP2Strategy, precision: str, meta: bool = False) -> list[str]:
    with torch.device("meta") if meta else nullcontext():
        module = gpt()
    try:
        own = trainer([MuonClipCallback(threshold=0.5)], strategy=strategy, precision=precision)
        own.fit(module, loader(token_batches(2)))
    except ValueError as error:
        return [str(error)]
    return [str(p.dtype) for p in module.parameters() if p.isfinite().all()]


def test_one_rank_in_mixed_precision_and_refusals():
    (dtypes,) = on_ranks(1, train_one, FSDP2Strategy(wrap=GPTBlock), "bf16-mixed")
    assert set(dtypes) == {"torch.float32"}
    ((message,),) = on_ranks(1, train_one, FSDP2Strategy(cpu_offload=True), "32-true", True)
    assert "cpu_offload=True needs weights with values" in message
