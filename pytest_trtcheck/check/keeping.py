"""`keep_fp32="auto"`: the smallest set of nodes with which a check passes, searched on the emulation.

What it is searched with are the check's own inputs, and what comes out is judged as any check is. The set is kept: the
same model, inputs and limits have the same one.
"""

from __future__ import annotations

import json
import time
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.check import blame, parity
from pytest_trtcheck.errors import ArgumentError, plural
from pytest_trtcheck.precision.emulation import emulation

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_trtcheck.check.request import Known, Settings
    from pytest_trtcheck.precision.lowering import Lowered


_TRIALS = 1000
"""Sets of nodes that are tried: time is what ends a search of a large model."""
_CUT_SHORT = " (the search was cut short: with a --trt-diagnose of more than {:g} they may be fewer)"


def with_fewest(settings: Settings, known: Known, lowered: Callable[[tuple[str, ...]], Lowered]) -> Known:
    """The check with as few nodes in FP32 as let it pass; as it was where none are needed, or no set was found.

    Parameters
    ----------
    lowered
        Lowers the model with these nodes in FP32.

    Raises
    ------
    ArgumentError
        Nothing can be kept in FP32, or there is no time to search.
    """
    request, spec = known.request, replace(known.request.parity, keep_auto=False)
    known = replace(known, request=replace(request, parity=spec))
    if known.precision in {"fp32", "tf32"}:
        return known
    if known.lowered.taken_as_it_is:
        raise ArgumentError(
            f"keep_fp32='auto': {known.model.label} brings its precision with it and is taken as it is",
            "leave keep_fp32 out, or give the FP32 model",
            code="precision-carried",
        )
    if not known.cases:
        return known.recorded("keep_fp32='auto' was not searched: no engine is built here that it could be for")
    found, seconds = _remembered(settings, known), settings.allowance.seconds
    if found["cut_s"] is not None and found["cut_s"] < seconds:
        found = _remembered(settings, known, seconds=f"{seconds:g}")
    inputs = f"{plural(len(known.cases), 'input')} ({request.inputs_source})"
    if found["nodes"] is None:
        note = f"keep_fp32='auto': no set of nodes was found with which it passes on its {inputs}: {found['why']}"
        return replace(known, no_fewest=note).recorded(note)
    nodes = tuple(found["nodes"])
    if not nodes:
        return replace(known, fewest=()).recorded(f"keep_fp32='auto': it passes on its {inputs} with nothing kept")
    note = (
        f"keep_fp32='auto' was searched by emulation with the {inputs} that it is judged by: "
        f"keep_fp32={json.dumps(list(nodes), ensure_ascii=False)}"
        + (_CUT_SHORT.format(found["cut_s"]) if found["cut_s"] is not None else "")
    )
    request = replace(request, parity=replace(spec, keep_fp32=nodes))
    return replace(known, request=request, lowered=lowered(nodes), fewest=nodes).recorded(note)


def _remembered(settings: Settings, known: Known, **more: str) -> dict[str, Any]:
    found = blame.remembered(known, settings.cache, lambda: _search(settings, known), kind="keep_auto", **more)
    assert found is not None
    return found


def _search(settings: Settings, known: Known) -> dict[str, Any]:
    """The `nodes`, None where no set was found; `why`; whether another search would find the same; and what time cut
    it short, None where none did.
    """
    from pytest_trtcheck import diagnose
    from pytest_trtcheck.diagnose import judging

    limits, allowance, start = parity.limits_of(known), settings.allowance, time.monotonic()
    with closing(emulation(known.model, known.lowered, known.precision, settings.cache)) as runner:
        usages = [judging.judge(runner(case), known.reference(case), limits)[0].usage for case in known.cases]
    if max(usages) <= 1:
        return {"nodes": [], "why": "", "is_complete": True, "cut_s": None}
    refusal = allowance.refusal()
    if refusal is not None:
        why = refusal.removeprefix("not diagnosed: ")
        raise ArgumentError(
            f"keep_fp32='auto': it cannot be searched: {why}",
            "name the nodes, or raise --trt-diagnose",
            code="search-impossible",
        )
    found = diagnose.diagnose(
        blame.subject_of(known, usages.index(max(usages))),
        settings.cache,
        budget=diagnose.Budget(seconds=allowance.seconds, trials=_TRIALS),
        progress=blame.told(f"{known.title}: ", settings.progress),
        search_only=True,
    )
    allowance.spent_s += time.monotonic() - start
    if found is not None and found.keep_fp32:
        cut = None if found.is_complete else allowance.seconds
        return {"nodes": list(found.keep_fp32), "why": "", "is_complete": True, "cut_s": cut}
    said = [note.removeprefix("no set of nodes to keep in FP32 was found: ") for note in found.notes] if found else []
    why = "; ".join(said) if found is not None else "its outputs have another shape or type"
    is_complete = found is not None and found.is_complete
    return {"nodes": None, "why": why or "the search was given up", "is_complete": is_complete, "cut_s": None}
