"""Random attention modules, each with its correct spec and many wrong ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_muonclip import AttentionSpec, Projection

LENGTH = 5


@dataclass(frozen=True)
class Case:
    """A random case.

    ``form`` is ``"separate"`` (three weights), ``"concatenated"`` (``[q | k | v]`` in some order), ``"interleaved"`` (by
    head), ``"grouped"`` (by key head), or ``"latent"`` (with a rotated key that all heads share).
    """

    form: str
    heads: int
    groups: int
    dim: int
    order: tuple[str, ...] = ("q", "k", "v")
    d_major: bool = False
    transposed: bool = False
    square: bool = False
    bias: str = "none"
    by_parameter: bool = False
    gains: str = "none"
    offset: float = 0.0
    scale: float = 1.0
    is_causal: bool = True
    nope: int = 3
    rope: int = 2
    seed: int = 0

    @property
    def channels(self) -> dict[str, int]:
        """Output channels of every projection."""
        q, k = self.heads * self.dim, self.groups * self.dim
        if self.form == "separate":
            return {"q": q, "k": k, "v": k}
        if self.form == "latent":
            return {
                "q": self.heads * (self.nope + self.rope),
                "kv": self.heads * (self.nope + self.dim),
                "rope": self.rope,
            }
        return {"qkv": q + 2 * k}

    @property
    def hidden(self) -> int:
        return next(iter(self.channels.values())) if self.square else 7


class Affine(nn.Module):
    """A linear layer whose weight may be (in, out)."""

    def __init__(self, inputs: int, outputs: int, case: Case) -> None:
        super().__init__()
        self.transposed = case.transposed
        self.weight = nn.Parameter(
            case.scale * torch.randn((inputs, outputs) if self.transposed else (outputs, inputs))
        )
        bias = None if case.bias == "none" else torch.zeros(outputs) if case.bias == "zero" else torch.randn(outputs)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ (self.weight if self.transposed else self.weight.T)
        return y if self.bias is None else y + self.bias


class Drawn(nn.Module):
    """Attention as a case has it, by reshaping and nothing else."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        for name, channels in case.channels.items():
            setattr(self, name, Affine(case.hidden, channels, case))
        if case.gains != "none":
            sizes = {"head": (case.heads * case.dim, case.groups * case.dim), "shared": (case.dim, case.dim)}
            for name, size in zip(("q_gain", "k_gain"), sizes[case.gains]):
                setattr(self, name, nn.Parameter(0.3 * torch.randn(size)))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = getattr(self, f"_{self.case.form}")(x)  # (batch, heads, length, d)
        if self.case.gains != "none":
            query, key = self._normed(query, self.q_gain), self._normed(key, self.k_gain)
        repeats = query.shape[1] // key.shape[1]
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        if self.case.seed % 2:
            key, repeats = key.repeat_interleave(repeats, 1), 1
        is_causal = self.case.is_causal
        width = value.shape[-1]
        if repeats > 1:
            value = value[:, ::repeats]
        output = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=repeats > 1)
        return output[..., :width].transpose(1, 2).flatten(2)

    def _separate(self, x: Tensor) -> tuple[Tensor, ...]:
        return self._heads(self.q(x)), self._heads(self.k(x)), self._heads(self.v(x))

    def _concatenated(self, x: Tensor) -> tuple[Tensor, ...]:
        case = self.case
        sizes = {"q": case.heads * case.dim, "k": case.groups * case.dim, "v": case.groups * case.dim}
        parts = dict(zip(case.order, self.qkv(x).split([sizes[name] for name in case.order], -1)))
        return self._heads(parts["q"]), self._heads(parts["k"]), self._heads(parts["v"])

    def _interleaved(self, x: Tensor) -> tuple[Tensor, ...]:
        slots = self.qkv(x).reshape(*x.shape[:2], self.case.heads, 3, self.case.dim).permute(3, 0, 2, 1, 4)
        parts = dict(zip(self.case.order, slots))
        return parts["q"], parts["k"], parts["v"]

    def _grouped(self, x: Tensor) -> tuple[Tensor, ...]:
        case = self.case
        slots = self.qkv(x).reshape(*x.shape[:2], case.groups, -1, case.dim)
        sizes = {"q": case.heads // case.groups, "k": 1, "v": 1}
        parts = dict(zip(case.order, slots.split([sizes[name] for name in case.order], 3)))
        query, key, value = (parts[name].flatten(2, 3).transpose(1, 2) for name in ("q", "k", "v"))
        return query, key, value

    def _latent(self, x: Tensor) -> tuple[Tensor, ...]:
        case = self.case
        query = self.q(x).reshape(*x.shape[:2], case.heads, -1).transpose(1, 2)
        sizes = {"k": case.nope, "v": case.dim}
        order = [name for name in case.order if name != "q"]
        both = self.kv(x).reshape(*x.shape[:2], case.heads, -1).transpose(1, 2).split([sizes[n] for n in order], -1)
        parts = dict(zip(order, both))
        shared = self.rope(x)[:, None].expand(-1, case.heads, -1, -1)
        rope_first = case.order[0] != "q"
        key = torch.cat([shared, parts["k"]] if rope_first else [parts["k"], shared], -1)
        return query, key, parts["v"]

    def _heads(self, x: Tensor) -> Tensor:
        if self.case.d_major:
            return x.reshape(*x.shape[:2], self.case.dim, -1).permute(0, 3, 1, 2)
        return x.reshape(*x.shape[:2], -1, self.case.dim).transpose(1, 2)

    def _normed(self, x: Tensor, gain: Tensor) -> Tensor:
        if self.case.gains == "head":
            gain = gain.reshape(self.case.dim, -1).T if self.case.d_major else gain.reshape(-1, self.case.dim)
            gain = gain[:, None]
        return x / x.square().mean(-1, keepdim=True).sqrt() * (gain + self.case.offset)


def true_spec(case: Case) -> AttentionSpec:
    """The correct spec of a case."""
    return AttentionSpec(
        _projections(case, _layouts(case)),
        case.heads,
        case.groups,
        {"d": case.dim, "n": case.nope, "rope": case.rope},
        qk_norm=case.gains != "none",
        gains=_gains(case),
    )


def _layouts(case: Case) -> dict[str, str]:
    q, k, v = ("q(d H)", "k(d G)", "*(d G)") if case.d_major else ("q(H d)", "k(G d)", "*(G d)")
    whole = {"q": q, "k": k, "v": v}
    if case.form == "separate":
        return whole
    if case.form == "concatenated":
        if not case.seed % 2:
            whole["v"] = "*"
        return {"qkv": f"[{' | '.join(whole[name] for name in case.order)}]"}
    if case.form == "interleaved":
        return {"qkv": f"(H [{', '.join({'v': '*'}.get(name, name) + ':d' for name in case.order)}])"}
    if case.form == "grouped":
        pieces = {"q": "q:r·d", "k": "k:d", "v": "*:d"}
        return {"qkv": f"(G [{', '.join(pieces[name] for name in case.order)}])"}
    queries = ["qn:n", "qr:rope"] if case.order[0] == "q" else ["qr:rope", "qn:n"]
    pieces = {"k": "kn:n", "v": "*:d"}
    return {
        "q": f"(H [{', '.join(queries)}])",
        "kv": f"(H [{', '.join(pieces[name] for name in case.order if name != 'q')}])",
    }


def _projections(case: Case, layouts: dict[str, str]) -> tuple[Projection, ...]:
    dim = int(case.transposed)
    if not case.by_parameter:
        return tuple(Projection(name, layout, dim) for name, layout in layouts.items())
    own = [Projection(f"{name}.weight", layout, dim) for name, layout in layouts.items()]
    if case.bias != "none":
        own += [Projection(f"{name}.bias", layout) for name, layout in layouts.items()]
    return tuple(own)


def _gains(case: Case) -> tuple[Projection, ...]:
    layouts = {"none": (), "shared": ("q(d)", "k(d)"), "head": ("q(H d)", "k(G d)")}[case.gains]
    if case.gains == "head" and case.d_major:
        layouts = "q(d H)", "k(d G)"
    return tuple(Projection(n, layout, offset=case.offset) for n, layout in zip(("q_gain", "k_gain"), layouts))


def other_specs(case: Case) -> Iterator[tuple[str, AttentionSpec]]:
    """Plausible wrong specs, each with its mistake; some happen to be correct."""
    spec = true_spec(case)
    if case.gains != "none":
        yield from _other_gains(case, spec)
    else:
        yield from _other_projections(case, spec)
    for heads, groups, dim in [
        (case.heads * 2, case.groups * 2, case.dim // 2),
        (case.heads // 2, case.groups // 2, case.dim * 2),
        (case.heads, case.groups * 2, case.dim // 2),
        (case.heads, case.groups // 2, case.dim * 2),
        (case.heads, case.heads, case.dim),
        (case.heads, 1, case.dim),
        (case.heads + 1, case.groups + 1, case.dim),
    ]:
        if heads and groups and dim and heads % groups == 0 and (heads, groups, dim) != (*_sizes(case),):
            note = "number of heads" if heads != case.heads else "number of key heads"
            yield note, _resized(spec, heads, groups, {"d": dim})


def _sizes(case: Case) -> tuple[int, int, int]:
    return case.heads, case.groups, case.dim


def _other_gains(case: Case, spec: AttentionSpec) -> Iterator[tuple[str, AttentionSpec]]:
    yield "the norm is missing", replace(spec, qk_norm=False, gains=())
    for offset in (0.0, 1.0, 0.5):
        if offset != case.offset:
            yield f"offset {offset}", replace(spec, gains=tuple(replace(gain, offset=offset) for gain in spec.gains))
    names = [gain.name for gain in spec.gains]
    swapped = tuple(replace(gain, name=name) for gain, name in zip(spec.gains, reversed(names)))
    yield "q and k swapped", replace(spec, gains=swapped)
    yield "one gain for all heads", replace(spec, gains=(replace(spec.gains[0], layout="q(d)"), spec.gains[1]))
    turned = {"q(H d)": "q(d H)", "q(d H)": "q(H d)", "k(G d)": "k(d G)", "k(d G)": "k(G d)"}
    for side in (0, 1):
        gains = list(spec.gains)
        gains[side] = replace(gains[side], layout=turned.get(gains[side].layout, "q(H d)"))
        yield "gains turned", replace(spec, gains=tuple(gains))


def _other_projections(case: Case, spec: AttentionSpec) -> Iterator[tuple[str, AttentionSpec]]:
    def written(note: str, layouts: dict[str, str]) -> tuple[str, AttentionSpec]:
        return note, replace(spec, projections=_projections(case, layouts))

    layouts = _layouts(case)
    turned = (p if p.name.endswith("bias") else replace(p, dim=1 - p.dim) for p in spec.projections)
    yield "dim", replace(spec, projections=tuple(turned))
    if case.by_parameter and case.bias != "none":
        weights = tuple(p for p in spec.projections if p.name.endswith("weight"))
        yield "bias left out", replace(spec, projections=weights)
        for left_out in (p for p in spec.projections if p.name.endswith("bias")):
            yield "one bias left out", replace(spec, projections=tuple(p for p in spec.projections if p != left_out))
    swap = str.maketrans("qkHG", "kqGH")
    if case.form != "latent":
        yield written("q and k swapped", {name: layout.translate(swap) for name, layout in layouts.items()})
        yield written("q and k swapped", {n: _exchanged(layout) for n, layout in layouts.items()})
    if case.form in ("separate", "concatenated"):
        for piece, turned in (("H d", "d H"), ("G d", "d G")):
            if case.d_major:
                piece, turned = turned, piece
            yield written("heads turned", {name: layout.replace(piece, turned) for name, layout in layouts.items()})
    if case.form in ("concatenated", "interleaved", "grouped"):
        for order in permutations("qkv"):
            for form in ("concatenated", "interleaved", "grouped"):
                if (order, form) != (case.order, case.form):
                    note = "order" if form == case.form else "interleaved by something else"
                    yield written(note, _layouts(replace(case, order=order, form=form)))
        for note, size in (("d too small", case.dim - 1), ("d too large", case.dim + 1)):
            if size:
                layout = f"[{'q(H e) | k(G e)' if case.order[0] == 'q' else 'k(G e) | q(H e)'} | *]"
                wrong = _resized(spec, case.heads, case.groups, {"e": size})
                yield note, replace(wrong, projections=_projections(case, {"qkv": layout}))
        named = _layouts(replace(case, seed=1))["qkv"]
        yield written("values as keys", {"qkv": named.replace("*", "k")})
        yield written("values as queries", {"qkv": named.replace("*", "q").replace("q(G d)", "q(H d)")})
        if case.form == "concatenated" and case.groups == 1 and case.order[2] != "q":
            rest = "k(G 2·d)"
            order = [rest if name == "k" else "q(H d)" for name in case.order if name != "v"]
            yield written("keys and values as keys", {"qkv": f"[{' | '.join(order)}]"})
    if case.form == "latent":
        yield from _other_latents(case, spec, layouts)


def _other_latents(case: Case, spec: AttentionSpec, layouts: dict[str, str]) -> Iterator[tuple[str, AttentionSpec]]:
    def written(note: str, q: str = layouts["q"], kv: str = layouts["kv"], **sizes: int) -> tuple[str, AttentionSpec]:
        wrong = _resized(spec, case.heads, case.groups, sizes)
        return note, replace(wrong, projections=_projections(case, {"q": q, "kv": kv}))

    q, kv = layouts["q"], layouts["kv"]
    yield written("parts of the query swapped", q="(H [qr:rope, qn:n])" if "[qn" in q else "(H [qn:n, qr:rope])")
    yield written("keys and values swapped", kv="(H [*:d, kn:n])" if "[kn" in kv else "(H [kn:n, *:d])")
    yield written("values only", kv=kv.replace("kn:n", "x").replace("*", "kn").replace("x", "*:n"))
    for step in (-1, 1):
        m, o, e = case.nope + step, case.rope - step, case.dim - step
        if m > 0 and o > 0:
            yield written("queries split elsewhere", q=q.replace(":n", ":m").replace(":rope", ":o"), m=m, o=o)
        if m > 0 and e > 0:
            yield written("keys split elsewhere", kv=kv.replace(":n", ":m").replace(":d", ":e"), m=m, e=e)
        if m > 0 and o > 0 and e > 0:
            both = q.replace(":n", ":m").replace(":rope", ":o"), kv.replace(":n", ":m").replace(":d", ":e")
            yield written("both split elsewhere", *both, m=m, o=o, e=e)
    yield written("no rotated part", q="(H [q:e])", e=case.nope + case.rope)
    yield written("all rotated", q="(H [qr:e])", e=case.nope + case.rope)
    yield written("none rotated", q="(H [qn:e])", e=case.nope + case.rope)


def _exchanged(layout: str) -> str:
    """The names of q and k exchanged, the axes as they are."""
    return layout.translate(str.maketrans("qk", "kq"))


def _resized(spec: AttentionSpec, heads: int, groups: int, sizes: dict[str, int]) -> AttentionSpec:
    kept = {name: size for name, size in spec.sizes.items() if name not in "HGr"}
    return replace(spec, num_heads=heads, num_key_value_heads=groups, sizes=kept | sizes)


@st.composite
def cases(draw: Any) -> Case:
    """Cases of every form."""
    form = draw(st.sampled_from(["separate", "concatenated", "concatenated", "interleaved", "grouped", "latent"]))
    latent = form == "latent"
    group = 1 if form in ("interleaved", "latent") else draw(st.sampled_from([1, 2, 3]))
    groups = draw(st.sampled_from([2, 3] if latent else [1, 2, 3]))
    can_have_gains = form in ("separate", "concatenated")
    gains = draw(st.sampled_from(["none", "none", "none", "head", "shared"])) if can_have_gains else "none"
    return Case(
        form=form,
        heads=group * groups,
        groups=groups,
        dim=draw(st.sampled_from([2, 3, 4])),
        order=draw(st.permutations(("q", "k", "v")).map(tuple)),
        d_major=can_have_gains and draw(st.booleans()),
        transposed=draw(st.booleans()),
        square=draw(st.booleans()),
        bias=draw(st.sampled_from(["none", "zero", "random"])),
        by_parameter=draw(st.booleans()),
        gains=gains,
        offset=draw(st.sampled_from([0.0, 1.0])) if gains != "none" else 0.0,
        scale=draw(st.sampled_from([1e-3, 1.0, 1e3])),
        is_causal=draw(st.booleans()),
        nope=draw(st.sampled_from([2, 3])),
        rope=draw(st.sampled_from([2, 3])),
        seed=draw(st.integers(0, 99)),
    )
