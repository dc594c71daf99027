"""What MuonClipCallback prints of a run: where parameters go, how fused weights are split, and what QK-Clip scales."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_muonclip.optim.parts import MatrixParts
from lightning_muonclip.optim.routing import Route, routing_table
from lightning_muonclip.qk_clip.clip import QKClip


def announce_routes(routes: Sequence[Route], parts: MatrixParts) -> None:
    """Prints where every parameter goes."""
    rank_zero_info(f"MuonClip routes the parameters as follows\n{routing_table(routes, parts)}")


def announce_parts(routes: Sequence[Route], parts: MatrixParts) -> None:
    """Prints the weights that Muon takes for several matrices."""
    split = [route for route in routes if len(parts.get(route.param, ((), ()))[1]) > 1]
    if split:
        rank_zero_info(f"Muon takes these weights for several matrices\n{routing_table(split, parts)}")


def sides_of(qk_clip: QKClip) -> list[str]:
    """What QK-Clip scales of every layer, and why it scales nothing of others, one line each."""
    if not qk_clip.sides:
        return []
    by_reason: dict[str, list[str]] = {}
    for name, reason in qk_clip.observer.discovery.unmeasured.items():
        by_reason.setdefault(reason, []).append(name or "(model)")
    return [
        "QK-Clip scales " + ", ".join(f"{name}: {side}" for name, side in qk_clip.sides.items()),
        *(f"QK-Clip scales nothing of {', '.join(names)}: {reason}" for reason, names in by_reason.items()),
    ]
