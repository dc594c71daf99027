"""The callback against a hand-written loop, and beside what Lightning users have in their Trainer."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from helpers import QUERIES_AND_KEYS, LitTiny, loader, next_token_loss, tiny_gpt, token_batches, trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn

from lightning_muonclip import (
    Attention,
    AttentionSpec,
    MaxLogitsMixin,
    Muon,
    MuonClip,
    MuonClipCallback,
    Projection,
    QKClip,
    split_params,
)

OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=3e-3, weight_decay=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=3e-2, momentum=0.9, weight_decay=0.01),
}


def plain_loop(model: nn.Module, tokens: Any, make: Any, clip: float | None, accumulate: int, exclude: Any) -> int:
    """Backward, clip of all gradients together, Muon, AdamW or SGD, QK-Clip; returns the number of head-clips."""
    groups = split_params(model, exclude=exclude)
    matrices = {p for g in groups if g["algorithm"] == "muon" for _, p in g["params"]}
    user = make([p for p in model.parameters() if p not in matrices])
    muon = Muon(
        [p for p in model.parameters() if p in matrices],
        lr=user.param_groups[0]["lr"],
        weight_decay=user.param_groups[0]["weight_decay"],
        adjust_lr_fn="match_rms_adamw",
    )
    qk_clip = QKClip(model, threshold=1.0)
    clips = 0
    for i, batch in enumerate(tokens):
        if i % accumulate == 0:
            model.zero_grad()
        (next_token_loss(model, batch) / accumulate).backward()
        if i % accumulate == accumulate - 1:
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            muon.step()
            user.step()
            clips += int(qk_clip.step().clipped_heads)
    qk_clip.close()
    return clips


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("exclude", [(), QUERIES_AND_KEYS], ids=["callback_owns_qk", "user_owns_qk"])
def test_bitwise_equal_to_a_plain_loop(exclude: Any, optimizer: str, clip: float | None, accumulate: int) -> None:
    model = tiny_gpt()
    start = copy.deepcopy(model.state_dict())
    by_hand = copy.deepcopy(model)
    tokens = token_batches(6 * accumulate)
    clips = plain_loop(by_hand, tokens, OPTIMIZERS[optimizer], clip, accumulate, exclude)
    assert clips > 0

    callback = MuonClipCallback(threshold=1.0, exclude=exclude)
    fit = trainer([callback], gradient_clip_val=clip, accumulate_grad_batches=accumulate)
    fit.fit(LitTiny(model, OPTIMIZERS[optimizer]), loader(tokens))

    assert fit.global_step == 6
    assert int(callback.qk_clip.clips.sum()) == clips
    for (name, ours), theirs in zip(model.state_dict().items(), by_hand.state_dict().values()):
        assert torch.equal(ours, theirs), name
        assert not torch.equal(ours, start[name]), name


def test_user_owning_only_keys_still_clips_after_both() -> None:
    model = tiny_gpt()
    by_hand = copy.deepcopy(model)
    tokens = token_batches(4)
    plain_loop(by_hand, tokens, OPTIMIZERS["adamw"], None, 1, ("*k_proj*",))
    trainer([MuonClipCallback(threshold=1.0, exclude=["*k_proj*"])]).fit(
        LitTiny(model, OPTIMIZERS["adamw"]), loader(tokens)
    )
    for ours, theirs in zip(model.parameters(), by_hand.parameters()):
        assert torch.equal(ours, theirs)


def test_value_clipping_covers_both_optimizers() -> None:
    seen: list[float] = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            seen.append(max(float(p.grad.abs().max()) for p in pl_module.parameters()))

    fit = trainer([MuonClipCallback(), Watch()], gradient_clip_val=1e-3, gradient_clip_algorithm="value")
    fit.fit(LitTiny(tiny_gpt(), OPTIMIZERS["adamw"]), loader(token_batches(2)))
    assert seen == pytest.approx([1e-3, 1e-3])


def test_threshold_none_only_monitors() -> None:
    model = tiny_gpt()
    by_hand = copy.deepcopy(model)
    tokens = token_batches(3)
    callback = MuonClipCallback(threshold=None)
    fit = trainer([callback])
    fit.fit(LitTiny(model, OPTIMIZERS["adamw"]), loader(tokens))
    assert float(fit.callback_metrics["muonclip/max_logit"]) > 1
    assert float(fit.callback_metrics["muonclip/min_gamma"]) == 1

    unclipped = MuonClipCallback(logits="off")
    trainer([unclipped]).fit(LitTiny(by_hand, OPTIMIZERS["adamw"]), loader(tokens))
    assert unclipped.qk_clip is None
    for ours, theirs in zip(model.parameters(), by_hand.parameters()):
        assert torch.equal(ours, theirs)


def test_logs_and_works_beside_the_usual_callbacks(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    callbacks = [
        LearningRateMonitor(),
        MuonClipCallback(threshold=1.0, log_heads_every_n_steps=2),
        ModelCheckpoint(tmp_path, monitor="muonclip/max_logit", every_n_train_steps=2, save_top_k=1),
        EarlyStopping("val_loss"),
    ]
    fit = trainer(
        callbacks, logger=logger, enable_checkpointing=True, log_every_n_steps=1, max_epochs=2, precision="bf16-mixed"
    )
    tokens = loader(token_batches(4))
    fit.fit(LitTiny(tiny_gpt(), OPTIMIZERS["adamw"], schedule=True), tokens, tokens)
    logger.save()
    header, *rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    columns = header.split(",")
    for name in ("muonclip/max_logit", "muonclip/min_gamma", "muonclip/clipped_heads", "muonclip/nonfinite"):
        assert name in columns
    assert "max_logits/model.layers.1.self_attn/1" in columns
    user, muon = columns.index("lr-AdamW"), columns.index("lr-Muon")
    cells = [row.split(",") for row in rows]
    rates = [(row[user], row[muon]) for row in cells if row[user]]
    assert len(set(rates)) > 2
    assert all(ours == theirs for theirs, ours in rates)
    assert list(tmp_path.glob("*.ckpt"))


def test_lr_is_its_own_base_under_the_same_schedule() -> None:
    callback = MuonClipCallback(lr=0.5, weight_decay=0.25)
    lit = LitTiny(tiny_gpt(), OPTIMIZERS["adamw"], schedule=True)
    fit = trainer([callback])
    fit.fit(lit, loader(token_batches(5)))
    user, muon = fit.optimizers
    group = muon.param_groups[0]
    assert group["weight_decay"] == 0.25
    assert user.param_groups[0]["lr"] == pytest.approx(3e-3 * (1 + math.cos(5 * math.pi / 20)) / 2)
    assert group["lr"] == pytest.approx(0.5 * (1 + math.cos(5 * math.pi / 20)) / 2)


def test_lr_is_its_own_base_after_a_warmup() -> None:
    class LitWarm(LitTiny):
        def configure_optimizers(self) -> Any:
            optimizer = self.make_optimizer(self.parameters())
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (1 + step) / 4))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    class Rates(pl.Callback):
        seen: list[float]

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append(trainer.optimizers[1].param_groups[0]["lr"])

    rates = Rates()
    rates.seen = []
    trainer([MuonClipCallback(lr=0.5), rates]).fit(LitWarm(tiny_gpt(), OPTIMIZERS["adamw"]), loader(token_batches(5)))
    assert rates.seen == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])


def test_groups_keep_their_own_rates_and_emptied_groups_stay() -> None:
    model = tiny_gpt(layers=1)

    def make(params: Any) -> torch.optim.Optimizer:
        del params
        queries = [p for n, p in model.named_parameters() if "q_proj" in n]
        others = [p for n, p in model.named_parameters() if "q_proj" not in n]
        return torch.optim.AdamW([{"params": queries, "lr": 1e-2}, {"params": others, "lr": 1e-3}], weight_decay=0.2)

    fit = trainer([MuonClipCallback()])
    fit.fit(LitTiny(model, make), loader(token_batches(1)))
    user, muon = fit.optimizers
    assert user.param_groups[0]["params"] == []
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in muon.param_groups] == [
        (1e-2, 0.2, 1),
        (1e-3, 0.2, 5),
    ]


def test_prints_the_routing_table_once(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    trainer([MuonClipCallback()]).fit(LitTiny(tiny_gpt(), OPTIMIZERS["adamw"]), loader(token_batches(3)))
    text = capsys.readouterr().err + caplog.text
    assert text.count("routes the parameters") == 1
    assert "model.layers.*.self_attn.q_proj.weight" in text


def test_mixin_shares_its_observer_with_the_callback() -> None:
    class LitMixed(MaxLogitsMixin, LitTiny):
        seen: list[float]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.seen.append(float(self.max_logits.max()))
            return loss

    callback = MuonClipCallback(threshold=1.0)
    lit = LitMixed(tiny_gpt(), OPTIMIZERS["adamw"])
    lit.seen = []
    ends: list[float] = []

    class Ends(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            ends.append(float(pl_module.max_logits.max()))
            assert float(callback.last.max_logit) == ends[-1]

    trainer([callback, Ends()]).fit(lit, loader(token_batches(3)))
    assert lit.seen == ends
    assert len(set(ends)) == 3


def scaled(scale: float) -> Any:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    return trainer, {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


class InfAt(pl.Callback):
    """Puts an infinity into one parameter's gradient at one batch."""

    def __init__(self, name: str, batch_idx: int) -> None:
        self.name = name
        self.batch_idx = batch_idx
        self.batch = -1

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch = batch_idx
        if batch_idx == self.batch_idx:
            self.before = copy.deepcopy(pl_module.state_dict())

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if self.batch == self.batch_idx:
            pl_module.get_parameter(self.name).grad[0, 0] = float("inf")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch_idx:
            self.unchanged = all(torch.equal(v, self.before[k]) for k, v in pl_module.state_dict().items())


@pytest.mark.parametrize("exclude", [(), QUERIES_AND_KEYS], ids=["callback_owns_qk", "user_owns_qk"])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.lm_head.weight"])
def test_an_infinity_in_either_optimizer_skips_both(name: str, exclude: Any) -> None:
    model = tiny_gpt()
    inf = InfAt(name, 2)
    callback = MuonClipCallback(threshold=1.0, exclude=exclude)
    make, options = scaled(2.0**10)
    fit = make([inf, callback], **options)
    fit.fit(LitTiny(model, OPTIMIZERS["adamw"]), loader(token_batches(5)))
    assert inf.unchanged
    assert all(p.isfinite().all() for p in model.parameters())
    user, _ = fit.optimizers
    assert {int(state["step"]) for state in user.state.values()} == {4}
    assert int(callback.qk_clip.clips.max()) <= 4
    assert fit.precision_plugin.scaler.get_scale() == 2.0**9


def test_a_skipped_step_forgets_what_it_saw() -> None:
    callback = MuonClipCallback(threshold=1.0)
    windows: list[float] = []

    class Windows(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            windows.append(float(callback.qk_clip.max_logits.max()))

    make, options = scaled(2.0**10)
    make([InfAt("model.lm_head.weight", 1), callback, Windows()], **options).fit(
        LitTiny(tiny_gpt(), OPTIMIZERS["adamw"]), loader(token_batches(3))
    )
    assert windows == [float("-inf")] * 3


def test_a_trainer_that_never_fitted_can_save(tmp_path: Path) -> None:
    fit = trainer([MuonClipCallback()])
    fit.validate(LitTiny(tiny_gpt(), OPTIMIZERS["adamw"]), loader(token_batches(1)), verbose=False)
    fit.save_checkpoint(tmp_path / "validated.ckpt")
    assert "muonclip" not in torch.load(tmp_path / "validated.ckpt", weights_only=True)


def test_a_rate_set_by_hand_before_the_step_is_followed() -> None:
    class ByHand(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            trainer.optimizers[0].param_groups[0]["lr"] = 0.0

    model = tiny_gpt()
    before = copy.deepcopy(model.state_dict())
    trainer([MuonClipCallback(threshold=None), ByHand()]).fit(
        LitTiny(model, OPTIMIZERS["adamw"]), loader(token_batches(1))
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_named_parameters_keep_their_names() -> None:
    model = tiny_gpt()
    fit = trainer([MuonClipCallback()])
    fit.fit(LitTiny(model, lambda _: torch.optim.AdamW(model.named_parameters())), loader(token_batches(1)))
    group = fit.optimizers[0].param_groups[0]
    names = {p: n for n, p in model.named_parameters()}
    assert group["param_names"] == [names[p] for p in group["params"]]


def test_a_model_in_eval_mode_is_told_of() -> None:
    model = tiny_gpt().eval()
    with pytest.warns(UserWarning, match=r"no logits were recorded in model.layers.0.self_attn.*call model.train"):
        trainer([MuonClipCallback()]).fit(LitTiny(model, OPTIMIZERS["adamw"]), loader(token_batches(1)))


def test_scaled_gradients_are_unscaled_before_they_are_clipped() -> None:
    plain, scaled_model = tiny_gpt(), tiny_gpt()
    scaled_model.load_state_dict(plain.state_dict())
    tokens = token_batches(4)
    norms: dict[str, list[float]] = {"plain": [], "scaled": []}

    class Norms(pl.Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            norms[self.name].append(float(torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters()])))

    def muonclip() -> MuonClipCallback:
        return MuonClipCallback(threshold=None, exclude=QUERIES_AND_KEYS)

    trainer([muonclip(), Norms("plain")], gradient_clip_val=0.3, precision="bf16-mixed").fit(
        LitTiny(plain, OPTIMIZERS["sgd"]), loader(tokens)
    )
    make, options = scaled(2.0**8)
    make([muonclip(), Norms("scaled")], gradient_clip_val=0.3, **options).fit(
        LitTiny(scaled_model, OPTIMIZERS["sgd"]), loader(tokens)
    )
    assert norms["plain"] == pytest.approx([0.3] * 4, rel=1e-3)
    assert norms["scaled"] == pytest.approx([0.3] * 4, rel=1e-3)


def test_observation_ends_with_the_fit_also_after_an_exception() -> None:
    original = torch.nn.functional.scaled_dot_product_attention

    class Crash(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                raise RuntimeError("crash")

    model = tiny_gpt()
    with pytest.raises(RuntimeError, match="crash"):
        trainer([MuonClipCallback(), Crash()]).fit(LitTiny(model, OPTIMIZERS["adamw"]), loader(token_batches(3)))
    assert all(m.max_logits_recorder is None for m in model.modules() if isinstance(m, Attention))
    trainer([MuonClipCallback()]).fit(LitTiny(model, OPTIMIZERS["adamw"]), loader(token_batches(3)))
    assert torch.nn.functional.scaled_dot_product_attention is original


@pytest.mark.parametrize("bases", [(LitTiny,), (MaxLogitsMixin, LitTiny)], ids=["plain", "mixin"])
def test_fitting_twice_with_one_callback(bases: tuple[type, ...]) -> None:
    callback = MuonClipCallback(threshold=1.0)
    lit = type("Lit", bases, {})(tiny_gpt(), OPTIMIZERS["adamw"])
    for _ in range(2):
        fit = trainer([callback])
        fit.fit(lit, loader(token_batches(2)))
        assert len(fit.optimizers) == 2
        assert float(fit.callback_metrics["muonclip/max_logit"]) > 0


@pytest.mark.parametrize("precision", ["32-true", "scaler"])
def test_a_training_step_without_a_loss_is_skipped(precision: str) -> None:
    class Skips(LitTiny):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

    model = tiny_gpt()
    options = scaled(2.0)[1] if precision == "scaler" else {}
    fit = trainer([MuonClipCallback(threshold=1.0)], **options)
    fit.fit(Skips(model, OPTIMIZERS["adamw"]), loader(token_batches(3)))
    assert {int(state["step"]) for state in fit.optimizers[0].state.values()} == {2}


def test_a_resumed_window_keeps_its_first_micro_batch(tmp_path: Path) -> None:
    """Maxima of all micro-batches count, also in the first step after a checkpoint was loaded."""
    tokens = token_batches(6)
    seen: dict[str, Any] = {}

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 1 and batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "one.ckpt")
            if batch_idx == 5:
                seen[trainer.ckpt_path] = callback.last.max_logits, callback.qk_clip.clips.clone()

    class Stateful(torch.utils.data.DataLoader):
        start = 0

        def __iter__(self) -> Any:
            yield from list(super().__iter__())[self.start :]

        def state_dict(self) -> dict[str, int]:
            return {"start": 3}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.start = state["start"]

    for path in (None, tmp_path / "one.ckpt"):
        torch.manual_seed(0)
        callback = MuonClipCallback(threshold=1.0)
        data = Stateful(torch.utils.data.TensorDataset(tokens.flatten(0, 1)), batch_size=2)
        lit = LitTiny(tiny_gpt(), OPTIMIZERS["adamw"])
        trainer([callback, Keep()], accumulate_grad_batches=3).fit(lit, data, ckpt_path=path)
    straight, resumed = seen.values()
    assert torch.equal(straight[0], resumed[0])
    assert torch.equal(straight[1], resumed[1])  # the counts go on where the checkpoint left them
    assert int(straight[1].sum()) > 0


@pytest.mark.parametrize("search", ["lr_find", "scale_batch_size"])
@pytest.mark.parametrize("twice", [False, True])
def test_a_trainer_can_fit_after_a_tuner_was_refused(search: str, twice: bool, tmp_path: Path) -> None:
    class Tuned(LitTiny):
        lr = 3e-3
        batch_size = 2

        def train_dataloader(self) -> Any:
            return loader(token_batches(3))

    def make() -> LitTiny:
        torch.manual_seed(0)
        return Tuned(tiny_gpt(), OPTIMIZERS["adamw"])

    lit, twin = make(), make()
    fit = trainer([MuonClipCallback(threshold=1.0)], default_root_dir=tmp_path)
    for _ in range(1 + twice):
        with pytest.raises(ValueError, match="Finder does not work with MuonClipCallback"):
            getattr(Tuner(fit), search)(lit)
    fit.fit(lit)
    assert fit.global_step == 3
    trainer([MuonClipCallback(threshold=1.0)]).fit(twin)
    assert all(torch.equal(a, b) for a, b in zip(lit.parameters(), twin.parameters()))


def test_what_is_scaled_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """Though the fused weights of the MLP are found after the attention, which has a spec."""
    model = tiny_gpt(layers=1)
    model.layers[0].mlp = FusedMLP()
    with caplog.at_level("INFO"):
        trainer([MuonClipCallback()], max_steps=2).fit(
            LitTiny(model, lambda params: torch.optim.AdamW(params, lr=1e-3)), loader(token_batches(2))
        )
    assert caplog.text.count("QK-Clip scales") == 1
    assert "2 parts" in caplog.text


class FusedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(16, 64, bias=False), nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class TestRefusals:
    """Each names the thing, the reason and the way out."""

    def fit(self, callbacks: Any = None, lit: Any = None, ckpt_path: Any = None, **options: Any) -> None:
        lit = lit or LitTiny(tiny_gpt(), OPTIMIZERS["adamw"])
        trainer(callbacks or [MuonClipCallback()], **options).fit(lit, loader(token_batches(2)), ckpt_path=ckpt_path)

    @pytest.mark.parametrize("threshold", [0, -1.0, float("nan")])
    def test_threshold(self, threshold: float) -> None:
        with pytest.raises(ValueError, match="threshold must be positive, or None to only monitor"):
            MuonClipCallback(threshold=threshold)

    @pytest.mark.parametrize("alpha", [-0.1, 1.1])
    def test_alpha(self, alpha: float) -> None:
        with pytest.raises(ValueError, match=r"alpha.*\[0, 1\]"):
            MuonClipCallback(alpha=alpha)

    def test_unknown_attention(self) -> None:
        class StrangeAttention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.qkv = nn.Linear(16, 48)

            def forward(self, x: Any) -> Any:
                query, key, value = self.qkv(x).clamp(-1, 1).chunk(3, -1)
                return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed = nn.Embedding(17, 16)
                self.attn = StrangeAttention()
                self.head = nn.Linear(16, 17)

            def forward(self, tokens: Any) -> Any:
                return self.head(self.attn(self.embed(tokens)))

        with pytest.raises(ValueError, match=r"'model.attn' \(StrangeAttention\)[\s\S]*specs="):
            self.fit(lit=LitTiny(Odd(), OPTIMIZERS["adamw"]))

    def test_qk_norm(self) -> None:
        with pytest.raises(ValueError, match=r"layers.0.self_attn.*QK-norm[\s\S]*monitor"):
            self.fit([MuonClipCallback(qk_norm="error")], LitTiny(tiny_gpt(qk_norm=True), OPTIMIZERS["adamw"]))
        self.fit([MuonClipCallback()], LitTiny(tiny_gpt(qk_norm=True), OPTIMIZERS["adamw"]))

    def test_no_hidden_matrix(self) -> None:
        with pytest.raises(ValueError, match=r"Muon takes no parameter of AdamW[\s\S]*exclude"):
            self.fit([MuonClipCallback(exclude=["*"])])

    def test_nothing_for_the_user_under_a_scaler(self) -> None:
        model = tiny_gpt()
        lit = LitTiny(model, lambda _: torch.optim.AdamW(p for n, p in model.named_parameters() if "proj" in n))
        _, options = scaled(2.0)
        with pytest.raises(ValueError, match=r"takes every parameter of AdamW.*GradScaler.*exclude"):
            self.fit(lit=lit, **options)
        self.fit(lit=lit)  # without a scaler an emptied optimizer is no harm

    @pytest.mark.parametrize(
        ("name", "way_out"), [("FSDPStrategy", "fsdp2"), ("DeepSpeedStrategy", "DDP"), ("XLAStrategy", "CUDA")]
    )
    def test_strategies(self, name: str, way_out: str) -> None:
        callback = MuonClipCallback()
        fit = trainer([callback])
        fit.strategy.__class__ = type(name, (type(fit.strategy),), {})
        with pytest.raises(ValueError, match=rf"{name}.*Use .*{way_out}"):
            fit.fit(LitTiny(tiny_gpt(), OPTIMIZERS["adamw"]), loader(token_batches(2)))

    def test_swa_and_learning_rate_finder(self) -> None:
        with pytest.raises(ValueError, match="StochasticWeightAveraging does not work with MuonClipCallback"):
            self.fit([StochasticWeightAveraging(1e-3), MuonClipCallback()])
        with pytest.raises(ValueError, match="LearningRateFinder does not work with MuonClipCallback"):
            self.fit([LearningRateFinder(), MuonClipCallback()])

    def test_optimizers_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="LBFGS evaluates the model several times"):
            self.fit(lit=LitTiny(tiny_gpt(), lambda p: torch.optim.LBFGS(p)))
        with pytest.raises(ValueError, match=r"maximize=True.*negate the loss"):
            self.fit(lit=LitTiny(tiny_gpt(), lambda p: torch.optim.SGD(p, lr=0.1, maximize=True)))
        _, options = scaled(2.0)
        with pytest.raises(ValueError, match="pass fused=False"):
            self.fit(lit=LitTiny(tiny_gpt(), lambda p: torch.optim.AdamW(p, fused=True)), **options)

    @pytest.mark.parametrize(
        "option",
        [
            {"lr": -1.0},
            {"weight_decay": -1.0},
            {"momentum": 2.0},
            {"adjust_lr_fn": "x"},
            {"shared_keys": "x"},
            {"logits": "x"},
        ],
        ids=str,
    )
    def test_options_out_of_range(self, option: Any) -> None:
        with pytest.raises(ValueError, match=next(iter(option))):
            MuonClipCallback(**option)

    def test_two_callbacks(self) -> None:
        with pytest.raises(ValueError, match="more than one MuonClipCallback"):
            self.fit([MuonClipCallback(), MuonClipCallback()])

    def test_manual_optimization(self) -> None:
        lit = LitTiny(tiny_gpt(), OPTIMIZERS["adamw"])
        lit.automatic_optimization = False
        with pytest.raises(ValueError, match=r"manual optimization.*MuonClip from configure_optimizers"):
            self.fit(lit=lit)

    def test_optimizer_is_muonclip_already(self) -> None:
        model = tiny_gpt()
        with pytest.raises(ValueError, match=r"returns MuonClip.*either"):
            self.fit(lit=LitTiny(model, lambda _: MuonClip(model)))

    def test_checkpoint_without_the_callback(self, tmp_path: Path) -> None:
        fit = trainer()
        fit.fit(LitTiny(tiny_gpt(), OPTIMIZERS["adamw"]), loader(token_batches(2)))
        fit.save_checkpoint(tmp_path / "plain.ckpt")
        with pytest.raises(ValueError, match=r"saved without MuonClipCallback.*load_from_checkpoint"):
            self.fit(ckpt_path=tmp_path / "plain.ckpt")


class FusedBlock(nn.Module):
    """A language model around torch's own attention, whose queries, keys and values are one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 17)
        with torch.no_grad():
            self.attention.in_proj_weight.mul_(20)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        hidden = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(x + self.attention(x, x, x, attn_mask=hidden, need_weights=False)[0])


class TestVerify:
    SWAPPED = AttentionSpec((Projection("in_proj_weight", "[k(H d) | q(H d) | *]"),), 2, sizes={"d": 8})

    @pytest.mark.parametrize("make", [tiny_gpt, FusedBlock])
    def test_the_first_batch_proves_the_specs_and_changes_nothing(self, make: Any) -> None:
        weights = []
        for verify in (False, True):
            torch.manual_seed(0)
            model = make()
            callback = MuonClipCallback(threshold=1.0, verify=verify)
            trainer([callback]).fit(LitTiny(model, OPTIMIZERS["adamw"]), loader(token_batches(3)))
            assert int(callback.qk_clip.clips.sum()) > 0
            weights.append([p.detach().clone() for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*weights))

    def test_a_wrong_spec_ends_the_run_before_anything_is_updated(self) -> None:
        model = FusedBlock()
        before = copy.deepcopy(model.state_dict())
        callback = MuonClipCallback(threshold=1.0, verify=True, specs={"model.attention": self.SWAPPED})
        with pytest.raises(
            ValueError, match=r"(?s)does not describe its attention.*model.attention: the queries of head 0 should"
        ):
            trainer([callback]).fit(LitTiny(model, OPTIMIZERS["adamw"]), loader(token_batches(3)))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not model.attention._forward_pre_hooks

    def test_without_qk_clip_there_is_nothing_to_verify(self) -> None:
        with pytest.raises(ValueError, match="verify=True needs QK-Clip, which logits='off' turns off"):
            MuonClipCallback(logits="off", verify=True)


def assert_stepped_alike(model: nn.Module, twin: nn.Module, optimizer: MuonClip, tokens: torch.Tensor) -> None:
    """Trains the twin by a plain loop, and compares it with what the Trainer has made of the model."""
    for batch in tokens:
        optimizer.zero_grad()
        next_token_loss(twin, batch).backward()
        optimizer.step()
    optimizer.close()
    for ours, theirs in zip(model.parameters(), twin.parameters()):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("split", ["qkv", "heads", "none"])
def test_split_reaches_muon_as_in_a_plain_loop(split: str) -> None:
    tokens = token_batches(3)
    torch.manual_seed(0)
    model = FusedBlock()
    twin = copy.deepcopy(model)
    callback = MuonClipCallback(threshold=1.0, split=split)
    trainer([callback]).fit(LitTiny(model, lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1)), loader(tokens))
    optimizer = MuonClip(twin, lr=3e-3, adamw_betas=(0.9, 0.999), decay_vectors=True, threshold=1.0, split=split)
    assert_stepped_alike(model, twin, optimizer, tokens)


class MixedBlock(FusedBlock):
    """With a convolution over time, and two experts that every token passes."""

    def __init__(self) -> None:
        super().__init__()
        width = self.embedding.embedding_dim
        self.conv = nn.Conv1d(width, width, 3, padding=1, bias=False)
        self.experts = nn.ParameterDict({"up": nn.Parameter(torch.randn(2, width, width) / width**0.5)})

    def forward(self, tokens: Any) -> Any:
        x = self.conv(self.embedding(tokens).mT).mT
        return super().forward(tokens) + self.head((x @ self.experts["up"].sum(0)).relu())


def test_experts_and_convolutions_step_as_in_a_plain_loop() -> None:
    tokens = token_batches(3)
    torch.manual_seed(0)
    model = MixedBlock()
    twin = copy.deepcopy(model)
    callback = MuonClipCallback(threshold=1.0, include=["*conv.weight"])
    groups = [{"params": list(model.parameters()), "name": "all"}]
    lit = LitTiny(model, lambda _: torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.1))
    trainer([callback]).fit(lit, loader(tokens))
    assert [(g["name"], g["kind"]) for g in callback.muon.param_groups] == [
        ("all", "matrix"),
        ("all-experts", "experts"),
        ("all-convolution", "convolution"),
    ]
    options = {"adamw_betas": (0.9, 0.999), "decay_vectors": True, "include": ["conv.weight"]}
    optimizer = MuonClip(twin, lr=3e-3, threshold=1.0, **options)
    assert_stepped_alike(model, twin, optimizer, tokens)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_every_precision_is_watched_and_clipped(precision: str) -> None:
    torch.manual_seed(0)
    callback = MuonClipCallback(threshold=1.0)
    fit = trainer([callback], precision=precision)
    fit.fit(LitTiny(tiny_gpt(), OPTIMIZERS["adamw"]), loader(token_batches(2)))
    assert callback.last is not None and callback.last.max_logits.isfinite().all()
    assert callback.qk_clip is not None and int(callback.qk_clip.clips.sum()) > 0


def test_every_n_steps_clips_only_then_also_after_a_resume(tmp_path: Path) -> None:
    def fit(path: str | None, max_epochs: int) -> QKClip:
        torch.manual_seed(0)
        callback = MuonClipCallback(threshold=1.0, every_n_steps=3)
        fitter = trainer([callback], max_epochs=max_epochs)
        fitter.fit(LitTiny(tiny_gpt(), OPTIMIZERS["adamw"]), loader(token_batches(4)), ckpt_path=path)
        fitter.save_checkpoint(tmp_path / f"{max_epochs}.ckpt")
        return callback.qk_clip

    whole = fit(None, 2)
    fit(None, 1)
    resumed = fit(str(tmp_path / "1.ckpt"), 2)
    assert torch.equal(whole.clips, resumed.clips)
    assert 0 < int(whole.clips.max()) <= 3  # steps 0, 3 and 6 of 8
    assert [torch.load(tmp_path / f"{n}.ckpt", weights_only=False)["muonclip"]["steps"] for n in (1, 2)] == [4, 8]
