"""Describes every attention of a model by what it does in one forward; refuses, with the reason, what cannot be told."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from lightning_muonclip.qk_clip.describe.alike import Likeness
from lightning_muonclip.qk_clip.describe.count import Frame, has_matrix
from lightning_muonclip.qk_clip.describe.infer import Heads, Layout, Unclear
from lightning_muonclip.qk_clip.describe.isolate import Isolated, Run, numel_without_values
from lightning_muonclip.qk_clip.describe.locate import locate
from lightning_muonclip.qk_clip.describe.prove import proven
from lightning_muonclip.qk_clip.describe.spec import Softmax

#: What a module that cannot be run alone may raise.
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError, AssertionError)


#: Elements of parameters without values that are drawn in double precision at most.
_MOST_IN_DOUBLE = 2**24


@dataclass(eq=False)
class Found:
    """One attention: the module whose parameters make its queries, and the layout or the reason why there is none.

    Attributes:
        name: Of the module.
        module: The module.
        calls: Numbers of the attention calls in the survey.
        layout: The heads and their channels.
        reason: Why there is no layout.
        softmaxes: Where it has its logits, if it calls no attention function.
        is_measurable: Whether its logits can be measured.
        elsewhere: Whether a module around it may tell.
        like: The name of the module that was described in its place, without values, because both are alike.
    """

    name: str
    module: nn.Module
    calls: list[int] = field(default_factory=list)
    layout: Layout | None = None
    reason: str = ""
    softmaxes: tuple[Softmax, ...] = ()
    is_measurable: bool = False
    elsewhere: bool = False
    like: str | None = None


class _Analyses:
    """What is known of modules in their forward.

    Without values, one of several layers alike stands for all: nothing but the values tells them apart.
    """

    def __init__(self) -> None:
        self._known: dict[Frame, list[Found]] = {}
        self._without_values: list[tuple[Likeness, list[Found]]] = []

    def of(self, frame: Frame, count: int) -> list[Found]:
        """One for each of the ``count`` attention calls in a forward."""
        if frame not in self._known:
            has_no_values = numel_without_values(frame.module) > 0
            self._known[frame] = self._of_layers_alike(frame, count) if has_no_values else _analyse(frame, count)
        return self._known[frame]

    def _of_layers_alike(self, frame: Frame, count: int) -> list[Found]:
        likeness = Likeness(frame)
        for other, found in self._without_values:
            if len(found) == count and likeness.is_of(other):
                return _copied(found, frame)
        found = _analyse(frame, count)
        self._without_values.append((likeness, found))
        return found


def _copied(found: Sequence[Found], frame: Frame) -> list[Found]:
    """What was found of a module, for another that is alike."""
    copies = {
        id(own): replace(
            own, name=frame.name, module=frame.module, calls=[], layout=copy.deepcopy(own.layout), like=own.name
        )
        for own in found
    }
    return [copies[id(own)] for own in found]


def describe(calls: Sequence[Sequence[Frame]]) -> list[Found]:
    """The attentions that a survey has seen.

    Args:
        calls: For every attention call, the modules in their forward.
    """
    inside: dict[Frame, list[int]] = {}
    for number, stack in enumerate(calls):
        for frame in stack:
            inside.setdefault(frame, []).append(number)
    analyses = _Analyses()
    found: list[Found] = []
    for number, stack in enumerate(calls):
        own = _of_call(number, stack, inside, analyses)
        own = next((other for other in found if other is own or _is_again(other, own)), own)
        if own not in found:
            found.append(own)
        own.calls.append(number)
    for own in found:
        if sum(other.module is own.module for other in found) > 1:
            own.layout, own.reason = (
                None,
                own.reason or "it makes several attentions, whose heads are different channels",
            )
    return found


def _is_again(known: Found, own: Found) -> bool:
    """Whether an attention is a known one, in a further forward of its module."""
    if known.module is not own.module or known is own:
        return known is own
    if known.layout is None or own.layout is None:
        return known.layout is own.layout
    ours, theirs = (
        {name: table for name, table in of.tables if table.scaled.any()} for of in (known.layout, own.layout)
    )
    shared = [name for name in ours.keys() & theirs.keys() if ours[name].overlaps(theirs[name])]
    if not shared:
        return not ours and not theirs  # both can only be watched
    if known.layout.sides != own.layout.sides and "k" not in (known.layout.sides, own.layout.sides):
        for layout in (known.layout, own.layout):
            layout.queries_alone("its keys come from elsewhere in some of its calls")
    if not all(ours[name].equals(theirs[name]) for name in shared):
        known.layout, known.reason = None, "its weights make the queries and keys of several calls in different ways"
    return True


def _of_call(number: int, stack: Sequence[Frame], inside: dict[Frame, list[int]], analyses: _Analyses) -> Found:
    frames = [frame for frame in reversed(stack) if any(p.is_floating_point() for p in frame.module.parameters())]
    best = Found(
        stack[-1].name if stack else "",
        stack[-1].module if stack else nn.Module(),
        reason="no module around it has parameters",
    )
    for frame in frames:
        own = analyses.of(frame, len(inside[frame]))[inside[frame].index(number)]
        if own.layout is not None and not own.layout.lacks_keys:
            return own
        is_of_several = len(inside[frame]) > len(inside[frames[0]])
        if best.layout is not None and is_of_several:
            break
        # What a module with weights says of its own attention is not overruled by what a module around it says of several.
        is_told = frame is not frames[0] and has_matrix(best.module) and (is_of_several or own.elsewhere)
        if own.layout is not None or (best.layout is None and not is_told):
            best = own
        if own.layout is None and not own.elsewhere:
            break
    return best


def run_alone(frame: Frame, sums: bool = True) -> tuple[Isolated, Run]:
    """Runs a module alone, in double precision unless some of its code wants single: it fails, or numbers overflow.

    In single precision too if there are no values and drawing them takes too much memory in double.
    """
    if numel_without_values(frame.module) <= _MOST_IN_DOUBLE:
        with suppress(RuntimeError, TypeError):
            isolated = Isolated(frame.module, frame.args, frame.kwargs, sums=sums)
            run = isolated.run()
            if not any(tensor.isnan().any() for tensor in run.rest):
                return isolated, run
    isolated = Isolated(frame.module, frame.args, frame.kwargs, torch.float32, sums)
    return isolated, isolated.run()


def _analyse(frame: Frame, count: int, sums: bool = True) -> list[Found]:
    """One for each of the calls of a module."""
    try:
        isolated, run = run_alone(frame, sums)
        if len(run.calls) != count:
            code = ", ".join(dict.fromkeys(run.unfollowed)) or "code that torch cannot trace"
            reason = (
                f"of its {count} attention calls, {len(run.calls) or 'none'} can be followed when it runs alone; others are"
                f" in {code}, or their logits are no matrix product (register_max_logits can tell of a kernel)"
            )
            raise Unclear(reason, elsewhere=not run.calls)
        heads = Heads(isolated, run)
        found: list[Found] = [Found(frame.name, frame.module)] * count
        for calls in heads.sites():
            own = Found(frame.name, frame.module)
            try:
                own.layout = proven(isolated, run, heads.layouts(calls))
                heads.refuse_parts(own.layout)
                own.softmaxes = _softmaxes(isolated, run, own.layout)
                heads.enter_others(own.layout)
            except Unclear as unclear:
                is_sum = any(len(call.pairs) > 1 or call.factors for call in run.calls)
                if sums and is_sum and not unclear.final:
                    return _analyse(frame, count, sums=False)
                own.layout = None
                own.reason, own.elsewhere = unclear.reason, unclear.elsewhere
                with suppress(Unclear):
                    own.softmaxes = _softmaxes(isolated, run, Layout(calls, 1, 1, [], []))
            own.is_measurable = bool(own.softmaxes) or not any(run.calls[call].is_by_hand for call in calls)
            for number in calls:
                found[number] = own
        return found
    except Unclear as unclear:
        reason, elsewhere = unclear.reason, unclear.elsewhere
    except FAILURES as error:
        reason, elsewhere = f"it cannot be run alone: {type(error).__name__}: {str(error)[:160]}", True
    return [Found(frame.name, frame.module, reason=reason, elsewhere=elsewhere)] * count


def _softmaxes(isolated: Isolated, run: Run, layout: Layout) -> tuple[Softmax, ...]:
    """Where attention by hand has its logits.

    Raises:
        Unclear: If they cannot be measured.
    """
    if not any(run.calls[call].is_by_hand for call in layout.calls):
        return ()
    found = locate(isolated, layout)
    if not found:
        raise Unclear("its logits cannot be measured: no softmax follows when its products change")
    return found


def softmaxes_of(frame: Frame) -> tuple[Softmax, ...]:
    """Where a module that somebody has described has its logits, if it attends by hand."""
    try:
        isolated, run = run_alone(frame)
        return _softmaxes(isolated, run, Layout(list(range(len(run.calls))), 1, 1, [], []))
    except (Unclear, *FAILURES):
        return ()
