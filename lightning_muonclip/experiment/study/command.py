"""``muonclip-study``: runs a study that a Hydra config describes, and writes its report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import hydra
from hydra.utils import to_absolute_path
from omegaconf import MISSING, DictConfig, OmegaConf

from lightning_muonclip.experiment.config import ConfigError, check_config
from lightning_muonclip.experiment.study.report import draw, report, rule, write_section
from lightning_muonclip.experiment.study.runs import Results
from lightning_muonclip.experiment.study.study import Configuration, Study
from lightning_muonclip.experiment.train import run_command

# OmegaConf reads these annotations at run time; on Python 3.10 it does not support X | None.
# ruff: noqa: UP045


@dataclass
class StudyConfig:
    """A run of ``muonclip-study``; see :class:`~.study.Study`."""

    name: str = MISSING
    question: str = MISSING
    common: list[str] = field(default_factory=list)
    configurations: dict[str, Any] = MISSING
    rates: dict[str, list[float]] = field(default_factory=dict)
    seeds: list[int] = MISSING
    significance: float = MISSING
    run: bool = True
    jobs: Optional[int] = None
    results: str = MISSING
    report: str = MISSING


def study_of(config: DictConfig) -> Study:
    """The study that a composed ``study`` config describes.

    Raises:
        ConfigError: If it has an unknown key or a wrong type.
    """
    check_config(config, StudyConfig)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    if len(set(plain["seeds"])) != len(plain["seeds"]) or len(plain["seeds"]) < 2:
        raise ConfigError(
            f"seeds must be different, one to sweep the rates and others to compare; got {plain['seeds']}"
        )
    configurations: dict[str, Configuration] = {}
    for name, node in plain["configurations"].items():
        own = node or {}
        if not isinstance(own, dict) or (unknown := own.keys() - {"overrides", "rates"}):
            wrong = f"unknown key {sorted(unknown)[0]!r}" if isinstance(own, dict) else f"got {own!r}"
            raise ConfigError(f"configurations.{name}: {wrong}; a configuration has overrides and rates")
        overrides = (*plain["common"], *own.get("overrides", ()))
        configurations[name] = Configuration(overrides, own.get("rates", plain["rates"]))
    return Study(plain["name"], plain["question"], configurations, plain["seeds"], plain["significance"])


def conduct(config: DictConfig) -> str:
    """Runs what is missing of a study, and writes its report and picture.

    Returns:
        The report.

    Raises:
        ConfigError: If the config is wrong, or if a run fails.
    """
    study = study_of(config)
    results, page = Results(Path(to_absolute_path(config.results))), Path(to_absolute_path(config.report))
    print(rule(study))
    if config.run:
        try:
            study.run(results, config.jobs)
        except RuntimeError as error:
            raise ConfigError(f"{error}\nwhat has run is in {results.path}") from error
    picture = page.with_name(f"{page.stem}_{study.name}.png")
    text = report(study, results, picture.name)
    draw(study, results, picture)
    write_section(page, study.name, text)
    print(f"{text}\n\nThe report is in {page}, all runs are in {results.path}")
    return text


@hydra.main(version_base="1.3", config_path="pkg://lightning_muonclip.conf", config_name="study")
def _hydra_main(config: DictConfig) -> None:
    conduct(config)


def main() -> None:
    """Entry point."""
    run_command("muonclip-study", _hydra_main)


if __name__ == "__main__":
    main()
