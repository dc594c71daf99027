"""Options that are declared once are flat keywords everywhere."""

from __future__ import annotations

import inspect

import pytest

from lightning_muonclip import Muon, MuonClip, MuonClipCallback, QKClip
from lightning_muonclip.signatures import share_out, takes_keywords_of


class Engine:
    def __init__(self, size: int, fuel: str = "coal", power: float = 3.0) -> None: ...


class Wagon:
    def __init__(self, size: int = 1, *, roof: bool = False) -> None: ...


@takes_keywords_of(Engine, Wagon, but=("fuel",))
class Train:
    def __init__(self, name: str, size: int = 7, **options: object) -> None:
        self.size, self.options = size, options


def test_a_constructor_takes_the_keywords_of_what_it_builds() -> None:
    train = Train("a", 5, roof=True)
    assert str(inspect.signature(Train)) == "(name: str, size: int = 7, *, power: float = 3.0, roof: bool = False)"
    assert (train.size, train.options) == (5, {"power": 3.0, "roof": True})
    assert share_out(train.options, Engine, Wagon) == [{"power": 3.0}, {"roof": True}]


def test_two_classes_cannot_declare_one_keyword() -> None:
    class Other:
        def __init__(self, name: str, **options: object) -> None: ...

    with pytest.raises(TypeError, match="Other would pass size to two classes"):
        takes_keywords_of(Engine, Wagon)(Other)


@pytest.mark.parametrize("keyword", ["fuel", "rof", "options"])
def test_an_unknown_keyword_is_refused(keyword: str) -> None:
    with pytest.raises(TypeError, match=rf"Train\(\): got an unexpected keyword argument '{keyword}'") as error:
        Train("a", **{keyword: 1})
    assert ("did you mean 'roof'?" in str(error.value)) == (keyword == "rof")


@pytest.mark.parametrize("cls", [MuonClipCallback, MuonClip])
def test_every_option_of_muon_and_qk_clip_is_a_keyword_with_its_default(cls: type) -> None:
    objects = {"model", "observer", "process_group", "params"}
    objects |= {"example", "track_stats"} if cls is MuonClipCallback else set()
    own_defaults = {"adjust_lr_fn", "lr", "weight_decay"}  # the callback and MuonClip have their own defaults for these
    found = inspect.signature(cls).parameters
    for builds in (QKClip, Muon):
        for name, parameter in inspect.signature(builds).parameters.items():
            if name not in objects:
                assert name in own_defaults or found[name].default == parameter.default, name


def test_lightning_cli_knows_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.demos.boring_classes import BoringModel

    def cli(*args: str) -> LightningCLI:
        return LightningCLI(BoringModel, run=False, args=list(args), seed_everything_default=False)

    with pytest.raises(SystemExit) as end:
        cli("--trainer.callbacks.help=lightning_muonclip.MuonClipCallback")
    assert end.value.code == 0
    assert "How a key that several query heads share" in " ".join(capsys.readouterr().out.split())
    callback = ["--trainer.callbacks=lightning_muonclip.MuonClipCallback", "--trainer.callbacks.qk_norm=gain"]
    options = ["--trainer.callbacks.momentum=0.5", "--trainer.callbacks.lr=0.01", "--trainer.accelerator=cpu"]
    found = cli(*callback, *options).trainer.callbacks[0]
    assert (found._clip_options["qk_norm"], found._muon_options["momentum"], found.lr) == ("gain", 0.5, 0.01)
