"""The table that QKClip.summary() prints."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_muonclip.qk_clip.describe.layout import layout_text
from lightning_muonclip.qk_clip.describe.spec import AttentionSpec, Projection
from lightning_muonclip.qk_clip.observe.observer import Observer
from lightning_muonclip.tables import table


def summary_table(observer: Observer, sides: Sequence[str]) -> str:
    """One row per layer: name, class, heads, layouts, source of the logits, and the sides that a clip scales.

    Attention that cannot even be watched comes last.
    """
    rows = [("layer", "class", "heads", "layout", "logits from", "clip scales")]
    for (name, (module, spec)), recorder, side in zip(observer.attention.items(), observer.recorders, sides):
        rows.append(
            (
                name or "(model)",
                type(module).__name__,
                _heads(spec),
                layouts_text(spec),
                recorder.source or "not seen",
                side,
            )
        )
    rows += [
        (name or "(model)", "", "", "", "nowhere", f"nothing: {reason}")
        for name, reason in observer.discovery.unmeasured.items()
    ]
    return table(rows)


def _heads(spec: AttentionSpec) -> str:
    groups = spec.sizes["G"]
    return str(spec.num_heads) if groups == spec.num_heads else f"{spec.num_heads} / {groups}"


def layouts_text(spec: AttentionSpec) -> str:
    """The layout of every weight that a spec names, such as ``"q_proj.weight: q(H 64)"``."""
    layouts = [
        f"{p.name}: {_text(p, spec)}" + (f" dim={p.dim}" if p.dim else "") for p in (*spec.projections, *spec.gains)
    ]
    return ", ".join(layouts)


def _text(projection: Projection, spec: AttentionSpec) -> str:
    layout = projection.layout
    return layout if isinstance(layout, str) else layout_text(layout, spec.sizes)
