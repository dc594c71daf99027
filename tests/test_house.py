"""CONTRIBUTING.md and pyproject.toml list the real folders."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_muonclip"


def folders(path: Path) -> set[str]:
    return {p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith((".", "__"))}


def described() -> set[str]:
    """Paths in the tree of CONTRIBUTING.md, by its indentation."""
    tree = (ROOT / "CONTRIBUTING.md").read_text().split("## Layout")[1].split("```")[1]
    parents: list[str] = []
    found = set()
    for indent, name, purpose in re.findall(r"^( *)(\S+?)/?(?: {2,}(\S.*))?$", tree.strip("\n"), re.MULTILINE):
        parents[len(indent) // 2 :] = [name]
        assert purpose or parents == ["lightning_muonclip"], f"{name} has no line of its own"
        found.add("/".join(parents))
    return found


def test_the_tree_in_contributing_is_the_real_one() -> None:
    modules = {f"lightning_muonclip/{p.name}" for p in PACKAGE.glob("*.py") if not p.stem.startswith("__")}
    packages = {"lightning_muonclip"} | {f"lightning_muonclip/{name}" for name in folders(PACKAGE)}
    inner = {f"{package}/{name}" for package in packages - {"lightning_muonclip"} for name in folders(ROOT / package)}
    beside = {"conf", "docs", "examples", "benchmarks", "tests"}
    assert all((ROOT / name).is_dir() for name in beside)
    assert described() == modules | packages | inner | beside


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_every_package_and_config_folder_is_installed() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {p.parent.relative_to(ROOT).as_posix().replace("/", ".") for p in PACKAGE.rglob("*.py")}
    configs = {
        ".".join(["lightning_muonclip", *p.parent.relative_to(ROOT).parts]) for p in (ROOT / "conf").rglob("*.yaml")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == packages | configs


def test_tests_mirror_the_package() -> None:
    apart = {"distributed", "families", "vision"}  # several processes, and other libraries
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder = path.parent.relative_to(ROOT / "tests")
        assert folder.parts[:1] in [(name,) for name in apart] or (PACKAGE / folder).is_dir(), path
