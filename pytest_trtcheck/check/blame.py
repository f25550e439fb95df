"""What a diagnosis needs of a check, and what a check makes of a diagnosis."""

from __future__ import annotations

import json
import time
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from pytest_trtcheck import __version__
from pytest_trtcheck.cache import Key, hash_code, hash_file
from pytest_trtcheck.check import parity
from pytest_trtcheck.metrics import METRICS, MISMATCHES
from pytest_trtcheck.model import inputs as model_inputs
from pytest_trtcheck.model import onnx_model
from pytest_trtcheck.model import onnxruntime as ort
from pytest_trtcheck.precision.reference import CallableReference, Reference
from pytest_trtcheck.record import BlameRecord, jsonable, typed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from pytest_trtcheck.backends.base import EngineSpec, Runner
    from pytest_trtcheck.cache import Cache
    from pytest_trtcheck.check.request import Known, Settings
    from pytest_trtcheck.diagnose import Subject


_BLAME_FILE = "blame.json"
_LONG_S = 10.0
"""From here on somebody who waits is told how to wait no longer."""


class _Unfinished(Exception):  # noqa: N818 - it keeps a diagnosis out of the cache, it is no error
    """A diagnosis that may find more another time."""

    def __init__(self, found: dict[str, Any]) -> None:
        super().__init__()
        self.found = found


def blamed(settings: Settings, known: Known) -> Known:
    """A failed check with who is to blame."""
    allowance = settings.allowance
    refusal = allowance.refusal()
    if refusal is None and (own := _fault_of_the_model(known, settings.cache)) is not None:
        refusal = f"not diagnosed: {own}"
    if refusal is not None:
        return known.recorded(refusal)
    start = time.monotonic()

    def find() -> dict[str, Any] | None:
        return _diagnosed(settings, known)

    # What an engine computed is no part of any key; the emulation computes the same from the same.
    found = remembered(known, settings.cache, find, worst=_worst(known)) if known.running.is_emulation else find()
    allowance.spent_s += time.monotonic() - start
    return known.recorded(parity=replace(known.parity, blame=typed(jsonable(found), BlameRecord)))


def _fault_of_the_model(known: Known, cache: Cache) -> str | None:
    """Where a reference was given: how far the checked model is from it before anything is lowered, if that is too far.

    The diagnosis holds the lowered model against the FP32 model that it was made from, and finds what was lost between
    the two.
    """
    if known.request.parity.reference is None:
        return None
    case = known.cases[_worst(known)]
    with closing(Reference(known.model, cache)) as own:
        found = parity.first_failure(known, own(case), known.reference(case))
    return found and f"computed in FP32, {known.model.label} itself differs from {known.reference.title}: {found}"


def _worst(known: Known) -> int:
    assert known.outcome is not None
    return known.outcome.worst


def remembered(
    known: Known,
    cache: Cache,
    find: Callable[[], dict[str, Any] | None],
    *,
    kind: str = "blame",
    worst: int | None = None,
) -> dict[str, Any] | None:
    """What a search on the emulation finds, from the cache: a test that is known to fail is not diagnosed in every run.

    One that broke off, or for which there was not enough time (it is not `is_complete`), is not kept. Nor is one with a
    callable of the user's, as the reference or as a metric: what that computes is no part of any key.
    """
    applied = {limit.metric.name for limits in parity.limits_of(known).values() for limit in limits}
    if isinstance(known.reference, CallableReference) or not applied <= {*METRICS, MISMATCHES.name}:
        return find()
    limits = {
        name: [(each.metric.name, each.metric.axis, each.limit, each.source, asdict(each.division)) for each in applied]
        for name, applied in parity.limits_of(known).items()
    }
    parts = {
        "lowered": known.lowered.key,
        "inputs": json.dumps([model_inputs.digest(case) for case in known.cases]),
        "worst": str(worst),
        "limits": json.dumps(limits, sort_keys=True),
        "reference": getattr(known.reference, "identity", None) or "",
        "code": hash_code("diagnose/*.py", "model/pieces.py", "check/keeping.py"),
        "onnxruntime": ort.version(),
        "version": __version__,
    }

    def make(folder: Path) -> None:
        found = find()
        if found is not None and not found["is_complete"]:
            raise _Unfinished(found)
        (folder / _BLAME_FILE).write_text(json.dumps(jsonable(found)))

    try:
        entry = cache.get_or_make(Key(kind, known.title, parts), make)
    except _Unfinished as unfinished:
        return unfinished.found
    found: dict[str, Any] | None = json.loads((entry.path / _BLAME_FILE).read_text())
    return found


def subject_of(known: Known, worst: int) -> Subject:
    """The check as a diagnosis takes it; `worst` is the index of the case to look at."""
    from pytest_trtcheck import diagnose

    request = known.request
    return diagnose.Subject(
        model=known.model,
        lowered=known.lowered,
        precision=known.computed_in,
        keep_fp32=request.parity.keep_fp32,
        exclude=request.parity.exclude,
        calibration=request.calibration,
        folders=request.folders,
        cases=known.cases,
        worst=worst,
        limits=parity.limits_of(known),
        reference=known.reference,
    )


def _diagnosed(settings: Settings, known: Known) -> dict[str, Any] | None:
    from pytest_trtcheck import diagnose

    seconds, subject = settings.allowance.seconds, subject_of(known, _worst(known))
    is_emulation = known.running.is_emulation
    with known.alone():
        outputs = known.run(subject.case)
    engine = diagnose.Engine(
        outputs,
        lambda path: _run_part(settings, known, path),
        lambda lowered: _opened(settings, known, known.spec(known.running, lowered)),
    )
    blame = diagnose.diagnose(
        subject,
        settings.cache,
        None if is_emulation else engine,
        emulated=outputs if is_emulation else None,
        budget=diagnose.Budget(seconds=seconds, engine_seconds=5 * seconds),
        progress=told(f"{known.title}: ", settings.progress),
    )
    return None if blame is None else blame.to_dict()


def told(before: str, progress: Callable[[str], None]) -> Callable[[str], None]:
    """Progress with how long it has taken, once that is long."""
    start = time.monotonic()

    def show(line: str) -> None:
        seconds = time.monotonic() - start
        after = f" ({seconds:.0f} s so far, --trt-diagnose=SECONDS limits it)" if seconds >= _LONG_S else ""
        progress(f"{before}{line}{after}")

    return show


@contextmanager
def _opened(settings: Settings, known: Known, spec: EngineSpec) -> Iterator[Runner]:
    """Another engine of the system, built as the one that failed was, ready to run until it is left."""
    built = known.running.build(spec, settings.cache)
    with known.alone(), known.running.opened(built) as runner:
        yield runner


def _run_part(settings: Settings, known: Known, path: Path) -> Mapping[str, NDArray[Any]]:
    """What the engine of a beginning of the lowered model computes."""
    whole = known.spec(known.running)
    part = onnx_model.load(path, f"{known.model.label} (a part of it)")
    names = {spec.name for spec in part.inputs}
    spec = replace(
        whole,
        model=part,
        lowered=replace(known.lowered, path=path, key=f"{known.lowered.key}:{hash_file(path)}"),
        profile={name: span for name, span in whole.profile.items() if name in names},
    )
    with _opened(settings, known, spec) as runner:
        return runner({name: array for name, array in known.cases[_worst(known)].items() if name in names})
