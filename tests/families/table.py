"""The table of families in the documentation, written from what the tests found."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from families.checks import CHECKS, Row, rows
from families.zoo import CASES, OF_OLDER_RELEASES

PATH = Path(__file__).parents[2] / "docs" / "families.md"
LIBRARIES = ("torch", "transformers", "litgpt", "timm")
TITLES = ("family", "implementation", "class", "layouts", "logits from", *CHECKS)

TEXT = """# Families of attention

Written by the tests themselves, with {versions}:

    FAMILIES_TABLE=docs/families.md pytest tests/families tests/vision

Every row is a tiny model of the library itself with random weights, on a batch with padding where the model takes any.
Each number is the worst of all its heads, layers and inputs:

- **brute force**: how far the largest logits that were seen are from those of an oracle that reads them from the elementary
  operations of the same model in float64 (`tests/families/brute_force.py`), relative to the layer's largest.
- **verify**: how far `QKClip.verify` finds a head's logits from half of themselves when its queries or keys are halved.
- **replay**: how far the largest logits of the same batch are after a clip from min(S, threshold), relative to the
  threshold. Heads that were not clipped are the same to the bit. Where all heads of a layer share one gain, they are scaled
  together, and the largest is compared with the threshold.

"watched" is a layer that is measured and never scaled (`qk_norm="monitor"`). The layouts of the other rows with QK-norm are
those of the gains.

{table}

Also known, but of older releases than these: {others}.
"""


def expected_rows() -> list[tuple[str, str]]:
    """Family and implementation of every row, in order."""
    pairs = [(case.family, implementation) for case in CASES for implementation in case.implementations]
    return list(dict.fromkeys(pairs))


def short(cls: str) -> str:
    """A class by its qualified name; those of Hugging Face have names of their own."""
    return cls.rpartition(".")[2] if cls.startswith("transformers.") else cls


def write(path: Path) -> None:
    """Writes the table; raises ValueError if some rows did not run."""
    missing = [row for row in expected_rows() if any(check not in rows.get(row, {}) for check in CHECKS)]
    if missing:
        raise ValueError(f"{path} is not written: {len(missing)} of its rows did not run, the first {missing[0]}")
    lines = [TITLES, ["---"] * len(TITLES), *(_cells(*key, rows[key]) for key in expected_rows())]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    versions = ", ".join(f"{name} {importlib.metadata.version(name).partition('+')[0]}" for name in LIBRARIES)
    others = ", ".join(f"`{short(cls)}` ({version})" for cls, version in OF_OLDER_RELEASES.items())
    path.write_text(TEXT.format(versions=versions, table=table, others=others))


def read() -> tuple[list[tuple[str, str]], str]:
    """Family and implementation of every row of the committed table, and its whole text."""
    text = PATH.read_text()
    cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("| ")]
    return [(row[1], row[2]) for row in cells[2:]], text


def _cells(family: str, implementation: str, row: Row) -> list[str]:
    classes, layouts = (
        ", ".join(f"`{name}`" for name in names) for names in (map(short, row["classes"]), row["layouts"])
    )
    errors = [error if isinstance(error, str) else f"{error:.0e}" if error else "0" for error in map(row.get, CHECKS)]
    sources = ", ".join(row["logits from"])
    return [family, implementation, classes, layouts.replace("|", "\\|"), sources, *errors]
