"""What is said of versions is said once: in pyproject.toml, in .ci/oldest.txt and in the README alike."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


def floors() -> dict[str, str]:
    """Every dependency, also of the extras, that names its oldest release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    found = {"python": project["requires-python"].removeprefix(">=")}
    for requirement in (Requirement(text) for requirements in lists for text in requirements):
        for specifier in requirement.specifier:
            if specifier.operator == ">=":
                found[requirement.name] = specifier.version
    return found


def padded(version: str) -> str:
    """With three numbers, as releases have."""
    return ".".join([*version.split("."), "0", "0"][:3])


def test_the_oldest_releases_are_those_that_are_tried() -> None:
    lines = (ROOT / ".ci" / "oldest.txt").read_text().splitlines()
    oldest = dict(line.split("==") for line in lines if not line.startswith("#"))
    expected = {name: padded(version) for name, version in floors().items() if name not in ("python", "torch")}
    assert oldest == expected
    assert f"set -- {padded(floors()['torch'])} " in (ROOT / ".ci" / "versions").read_text()


def test_the_readme_names_them() -> None:
    section = (ROOT / "README.md").read_text().partition("\n## Supported versions\n")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|", section, flags=re.M))
    assert len(rows) > 5
    assert rows == {name: floors()[name] for name in rows}
