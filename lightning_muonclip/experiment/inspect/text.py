"""A look as text, as wide as the terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence

from lightning_muonclip.experiment.inspect.costs import StateBytes
from lightning_muonclip.experiment.inspect.document import adamw_alone, flops, ways_out
from lightning_muonclip.experiment.inspect.look import Attention, Look
from lightning_muonclip.tables import table


def text(look: Look, width: int) -> str:
    """The whole page.

    Args:
        look: What was found out.
        width: Columns of the terminal.
    """
    sections = (_head(look), _routes(look, width), _attention(look), _state(look), _flops(look), _verdict(look))
    return "\n\n".join("\n".join(_wrapped(section, width)) for section in sections)


def _wrapped(lines: Iterator[str], width: int) -> Iterator[str]:
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        is_cell = "\t" in line  # a table has its own width
        yield (
            line.replace("\t", "")
            if is_cell
            else textwrap.fill(
                line, max(40, width), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
            )
        )


def _head(look: Look) -> Iterator[str]:
    model, target = look.target.model, look.target
    numbers = sum(p.numel() for p in model.parameters())
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))
    yield f"{target.title}: {type(model).__name__}, {numbers:,} parameters ({dtypes})"
    where = "with values" if look.has_values else "on the meta device, without values"
    yield f"Built {where}. Example inputs: {target.inputs}."
    yield from look.notes


def _routes(look: Look, width: int) -> Iterator[str]:
    yield "Who is stepped by what, and why"
    cells = [("goes to", "parameter", "shape", "count", "elements", "why")]
    for row in look.rows:
        shape = "x".join(map(str, row.shape)) or "scalar"
        cells.append((row.algorithm, row.name, shape, str(len(row.routes)), f"{row.elements:,}", row.reason))
    whole = table(cells, right=(3, 4)).splitlines()
    if max(map(len, whole)) + 2 <= width:
        yield from (f"\t  {line}" for line in whole)
        return
    for algorithm, name, shape, count, elements, why in cells[1:]:
        yield f"  {algorithm}: {name}"
        yield f"    {count} of {shape}, {elements} elements: {why}"


def _attention(look: Look) -> Iterator[str]:
    yield "Attention, and what QK-Clip scales of it"
    if look.attention is None:
        yield "  Not looked at: example inputs are missing, or the model cannot run on them."
        return
    for own in look.attention:
        yield f"  {ranges(own.names)} ({own.kind}{_heads(own)})"
        if own.layout:
            yield f"    layout: {own.layout}"
        if own.clips is not None:
            yield f"    scaled: {own.clips}"
        else:
            yield f"    {'REFUSED' if own.is_refused else 'watched'}: {own.watched}"
        yield from _proof(own)
    for reason, names in look.others.items():
        yield f"  {ranges(names)}: no logits to clip, {reason}"
    for reason, names in look.passed_over.items():
        yield (
            f"  {ranges(names)}: not run, since that needs values ({reason}); taken to return their first"
            " input. Attention inside of them would not be seen"
        )
    if look.attention:
        yield (
            "  Checked on the whole model too: nothing else changed in a bit."
            if look.has_values
            else "  The check on the whole model was skipped: it needs values. Use --values for a small model."
        )


def _heads(own: Attention) -> str:
    if not own.num_heads:
        return ""
    keys = f", {own.num_key_value_heads} of keys" if own.num_key_value_heads != own.num_heads else ""
    return f", {own.num_heads} head{'s' * (own.num_heads > 1)}{keys}"


def _proof(own: Attention) -> Iterator[str]:
    if own.proven_on:
        copies = "a copy" if len(own.proven_on) == 1 else "copies"
        on = ranges(own.proven_on)
        yield f"    proven on random inputs, on {copies} of {on} with random weights: off by {own.error:.0e} at most"
        if len(own.proven_on) < len(own.names):
            yield "    the others were not run alone: they are alike in classes, shapes, settings and inputs"


def _state(look: Look) -> Iterator[str]:
    bytes_ = look.ranks.state_bytes()
    most: StateBytes = max(bytes_, key=lambda own: own.total)
    yield f"Memory of the optimizer's states on {'the fullest of ' * (look.ranks.count > 1)}{_ranks(look)}"
    rows = [
        ("  Muon: momentum", _size(most.momentum)),
        *([("  Muon: second moment", _size(most.second_moment))] if most.second_moment else []),
        ("  AdamW: two moments", _size(most.adamw)),
        ("  together", _size(most.total)),
        ("  AdamW for everything would take", _size(adamw_alone(look))),
    ]
    yield from (f"\t{line}" for line in table(rows, right=(1,)).splitlines())


def _ranks(look: Look) -> str:
    return "one device" if look.ranks.count == 1 else f"{look.ranks.count} ranks ({look.strategy})"


def _flops(look: Look) -> Iterator[str]:
    own = flops(look)
    yield f"Work of a step of {own['tokens']:,} tokens (--tokens)"
    rows = [
        (f"  Muon, orthogonalizing in {own['dtype']}", f"{own['muon']:.3g} FLOPs"),
        *([("  of which the busiest rank", f"{own['muon_busiest_rank']:.3g} FLOPs")] if look.ranks.count > 1 else []),
        (f"  model, 6 x {own['active_parameters']:,} x tokens", f"{own['model']:.3g} FLOPs"),
        ("  Muon against the model" + (" on that rank" * (look.ranks.count > 1)), f"{own['muon_share']:.2%}"),
    ]
    yield from (f"\t{line}" for line in table(rows, right=(1,)).splitlines())
    if own["assumed"]:
        yield f"  Counted with {own['assumed']}."


def _verdict(look: Look) -> Iterator[str]:
    if look.refusal is not None:
        yield f"A run would stop: {look.refusal}"
    for own in look.refused:
        yield (
            f"A run would stop at {ranges(own.names)}: {own.watched}"
            if look.stops
            else (f'With unknown="error" a run would stop at {ranges(own.names)}: {own.watched}')
        )
        yield from (f"  - {way}" for way in ways_out(own))
    if not look.stops:
        yield (
            "Nothing found here would stop a run."
            if look.attention is not None
            else "Whether attention would stop a run is not known."
        )


def ranges(names: Sequence[str]) -> str:
    """Names of modules, with their numbers together.

    Example:
        >>> ranges(["layers.0.attn", "layers.1.attn", "layers.2.attn", "layers.7.attn"])
        'layers.{0-2,7}.attn'
    """
    found: dict[str, list[list[int]]] = {}
    for name in names:
        numbers = [int(part) for part in re.findall(r"(?<![^.])\d+(?![^.])", name)]
        found.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(numbers)
    return ", ".join(_range(pattern or "(model)", numbers) for pattern, numbers in found.items())


def _range(pattern: str, numbers: Sequence[Sequence[int]]) -> str:
    for column in zip(*numbers):
        pattern = pattern.replace("*", _runs(sorted(set(column))), 1)
    return pattern


def _runs(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) + "}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:,.4g} TB"
