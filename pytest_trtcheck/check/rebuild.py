"""`--trt-rebuild`: TensorRT chooses kernels by timing them, so that two builds of one model need not compute the same.

Each further build is made from nothing, judged like the first, and thrown away; the worst of them decides.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_trtcheck.baselines.errors import figures
from pytest_trtcheck.cache import Cache, scratch_folder
from pytest_trtcheck.errors import CheckError
from pytest_trtcheck.record import SEVERITY, BuildRecord, RebuildRecord, Verdict, combine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pytest_trtcheck.check.request import Known, Settings

    Step = Callable[[Settings, Known], Known]


def judged_again(settings: Settings, known: Known, judging: Sequence[Step], explaining: Sequence[Step]) -> Known:
    """What is known of the worst of `settings.rebuild` builds, the first of which `known` tells of.

    Parameters
    ----------
    judging
        The steps that run an engine and judge it.
    explaining
        Those that say why, made for a build that is worse than all before it.

    Raises
    ------
    CheckError
        One of the builds could not be made or run; the message says which.
    """
    if settings.rebuild == 1:
        return known
    if known.record.engine is None or known.existing is not None:
        return known.recorded(f"--trt-rebuild={settings.rebuild}: no engine was built, so none was built again")
    for held in (known.runner, known.built):
        if held is not None:
            held.close()  # Two engines at a time may be more than the GPU holds.
    runs = known.system.runs and not settings.build_only
    worst, builds = known, [_found(known)]
    for number in range(2, settings.rebuild + 1):
        name = f"build {number} of {settings.rebuild}"
        settings.progress(f"{known.title}: {name}")
        try:
            again = _judged(settings, replace(known, build=name), worst, judging if runs else (), explaining)
        except CheckError as error:
            error.message = f"{name}: {error.message}"
            raise
        builds.append(_found(again))
        if _severity(again) > _severity(worst):
            worst = again
    found = RebuildRecord(
        builds=tuple(builds),
        engines=len({build.sha256 for build in builds}),
        **{name: _span(getattr(build, name) for build in builds) for name in ("error", "p50_ms", "p99_ms")},
    )
    decides = f"; {worst.build} decides" if worst.build else ""
    metric = worst.record.parity.metric if worst.record.parity else "error"
    searched = ["the worst input was searched on the first build alone"] if known.record.search else []
    notes = (*worst.record.notes, *searched, found.text(metric) + decides)
    # What each build says anew is said once.
    record = replace(worst.record, rebuild=found, notes=tuple(dict.fromkeys(notes)))
    return replace(worst, record=record)


def _judged(
    settings: Settings, known: Known, worst: Known, judging: Sequence[Step], explaining: Sequence[Step]
) -> Known:
    """The same check of an engine of its own, which a cache of its own makes: neither a plan nor timings are there."""
    with scratch_folder("rebuild") as scratch:
        made = known.system.build(known.spec(known.system), Cache(Path(scratch)))
        again = replace(known, built=made, runner=None, outcome=None, doubt=None, traced={})
        if judging:
            again = again.recorded(parity=None, score=None, latency=None)
        again = again.recorded(engine=made.record)
        try:
            for step in judging:
                again = step(settings, again)
            for step in explaining if _severity(again) > _severity(worst) else ():
                again = step(settings, again)
        finally:
            if again.runner is not None:
                again.runner.close()
            made.close()
    return again


def _verdict(known: Known) -> Verdict:
    return combine([part.verdict for part in known.record.parts.values()])


def _severity(known: Known) -> int:
    return SEVERITY.index(_verdict(known))


def _found(known: Known) -> BuildRecord:
    """What there is to compare of one build; an engine that did not run has bytes alone."""
    engine, parity, latency = known.record.engine, known.record.parity, known.record.latency
    assert engine is not None
    ran = known.system.runs and known.runner is not None
    return BuildRecord(
        sha256=engine.sha256,
        bytes=engine.bytes,
        build_s=engine.build_s,
        verdict=_verdict(known) if ran else "not_measured",
        error=parity.worst if parity and ran else None,
        p50_ms=latency.p50_ms if latency and ran else None,
        p99_ms=latency.p99_ms if latency and ran else None,
        device_memory_bytes=engine.device_memory_bytes,
        errors=figures(parity) if parity and ran else None,
    )


def _span(values: Iterable[float | None]) -> tuple[float, float] | None:
    """The least and the largest of what is known; NaN is worse than any number."""
    found = sorted((value for value in values if value is not None), key=lambda value: (math.isnan(value), value))
    return (found[0], found[-1]) if found else None
