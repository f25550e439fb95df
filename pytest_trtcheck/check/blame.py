"""What a diagnosis needs of a check, and what a check makes of a diagnosis."""

from __future__ import annotations

import json
import time
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from pytest_trtcheck import __version__, compare
from pytest_trtcheck.cache import Key, hash_code, hash_file
from pytest_trtcheck.check import parity
from pytest_trtcheck.errors import CheckError
from pytest_trtcheck.metrics import METRICS, MISMATCHES
from pytest_trtcheck.model import inputs as model_inputs
from pytest_trtcheck.model import onnx_model
from pytest_trtcheck.model import onnxruntime as ort
from pytest_trtcheck.model import proto as protos
from pytest_trtcheck.model.sources.exported import module_path
from pytest_trtcheck.precision.emulation import Emulated
from pytest_trtcheck.precision.lowering import lower
from pytest_trtcheck.precision.reference import CallableReference, Reference, SourceReference
from pytest_trtcheck.record import BlameRecord, is_bad, jsonable, typed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from pytest_trtcheck.backends.base import Backend, EngineSpec, Runner
    from pytest_trtcheck.cache import Cache
    from pytest_trtcheck.check.parity import Failure
    from pytest_trtcheck.check.request import Known, Settings
    from pytest_trtcheck.diagnose import Blame, Subject
    from pytest_trtcheck.precision.lowering import Lowered


_BLAME_FILE = "blame.json"
_LONG_S = 10.0
"""From here on somebody who waits is told how to wait no longer."""


class _Unfinished(Exception):  # noqa: N818 - it keeps a diagnosis out of the cache, it is no error
    """A diagnosis that may find more another time."""

    def __init__(self, found: dict[str, Any]) -> None:
        super().__init__()
        self.found = found


def blamed(settings: Settings, known: Known, first: Callable[[Known], None] = lambda _: None) -> Known:
    """A failed check with who is to blame; `first` is given the same with what is known before it is refined."""

    def so_far(blame: Blame) -> None:
        first(_with(known, _with_module(known, blame.to_dict())))

    allowance = settings.allowance
    refusal = allowance.refusal()
    if refusal is None and known.is_given:
        refusal = _why_no_lowering(settings, known)
    if refusal is not None:
        return known.recorded(refusal)
    start = time.monotonic()
    own = _fault_of_the_model(known, settings.cache)
    if own is not None and isinstance(known.reference, SourceReference) and known.running.runs_parts:
        wrong = _export(known, settings.cache, own)
        allowance.spent_s += time.monotonic() - start
        return _with(known, wrong)
    if own is not None:
        label = known.model.label
        return known.recorded(
            f"not diagnosed: computed in FP32, {label} itself differs from {known.reference.title}: {own}"
        )

    def find() -> dict[str, Any] | None:
        if known.is_given:
            return _diagnosed_given(settings, known)
        return _diagnosed(settings, known, so_far) if known.running.runs_parts else _diagnosed_source(settings, known)

    # What an engine computed is no part of any key; the emulation computes the same from the same.
    found = remembered(known, settings.cache, find, worst=str(_worst(known))) if known.running.is_emulation else find()
    allowance.spent_s += time.monotonic() - start
    return _with(known, found)


def _with(known: Known, found: dict[str, Any] | None) -> Known:
    if found is None:
        return known
    traced = {name: (error, own) for name, (error, own) in (found.get("traced") or {}).items()}
    blamed = known.recorded(parity=replace(known.parity, blame=typed(jsonable(found), BlameRecord)))
    return replace(blamed, traced=traced)


def _why_no_lowering(settings: Settings, known: Known) -> str | None:
    """Why what was made elsewhere cannot be held against its precision; None where it can."""
    what = "the engine" if known.existing else "the server's model"
    if known.has_unknown_precision:
        return f"not diagnosed: nothing tells what precision {what} computes in"
    try:
        _lowered_here(settings, known)
    except CheckError as error:
        return f"not diagnosed: how {what} was lowered to {known.precision} is not known, and here: {error.headline}"
    return None


def _lowered_here(settings: Settings, known: Known) -> Lowered:
    """The model in the precision of what was made elsewhere; as the marker says, if it says how."""
    parity = known.request.parity
    return lower(
        known.model,
        known.precision,
        settings.cache,
        keep_fp32=parity.keep_fp32,
        exclude=parity.exclude,
        calibration=known.request.calibration,
        folders=known.request.folders,
    )


def _export(known: Known, cache: Cache, own: Failure) -> dict[str, Any]:
    """What an export gets wrong. What is computed inside is held against it anew each time: the check is rare."""
    from pytest_trtcheck import diagnose

    limit = None if own.limit is None else float(own.limit)
    errors = diagnose.Errors(own.metric or "max", limit, own.output, None, None, own.value, export=own.value)
    case = known.cases[_worst(known)]
    return diagnose.diagnose_export(known.model, Reference(known.model, cache).path(), case, errors).to_dict()


def _fault_of_the_model(known: Known, cache: Cache) -> Failure | None:
    """Where a reference was given: how far the checked model is from it before anything is lowered, if that is too far.

    The diagnosis holds the lowered model against the FP32 model that it was made from, and finds what was lost between
    the two.
    """
    if known.request.parity.reference is None:
        return None
    case = known.cases[_worst(known)]
    with closing(Reference(known.model, cache)) as own:
        return parity.first_failure(known, own(case), known.reference(case))


def _worst(known: Known) -> int:
    assert known.outcome is not None
    return known.outcome.worst


def remembered(
    known: Known,
    cache: Cache,
    find: Callable[[], dict[str, Any] | None],
    *,
    kind: str = "blame",
    **more: str,
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
        "limits": json.dumps(limits, sort_keys=True),
        "reference": getattr(known.reference, "identity", None) or "",
        "code": hash_code("diagnose/*.py", "model/pieces.py", "check/keeping.py"),
        "onnxruntime": ort.version(),
        "version": __version__,
        **more,
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
    return entry.read_json(_BLAME_FILE, _complete)


def _complete(found: Any) -> dict[str, Any] | None:
    if found is None:
        return None
    if found["is_complete"] is not True:
        raise ValueError("it is not complete")
    typed(found, BlameRecord)
    traced = typed(found.get("traced") or {}, dict[str, tuple[float, float]])
    return {**found, "traced": traced}


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
        **({"system": known.running.title} if known.running.evidence in {"provider", "server"} else {}),
    )


def _diagnosed(settings: Settings, known: Known, first: Callable[[Blame], None]) -> dict[str, Any] | None:
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
        first=first,
    )
    return None if blame is None else _with_module(known, blame.to_dict())


def _with_module(known: Known, found: dict[str, Any]) -> dict[str, Any]:
    """The same with where the source of an exported model has the node that is to blame."""
    culprit = found["culprit"]
    if known.model.origin is not None and culprit is not None:
        nodes = protos.load(known.model.path).graph.node
        node = next((each for each in nodes if each.name == culprit["node"]), None)
        culprit["module"] = (node is not None and module_path(node)) or None
    return found


def _diagnosed_source(settings: Settings, known: Known) -> dict[str, Any] | None:
    """What is to blame where no lowered model ran, but its source: the export, the precision, or what ran it."""
    origin, case = known.model.origin, known.cases[_worst(known)]
    if origin is not None and known.request.parity.reference is None:
        with closing(Reference(known.model, settings.cache)) as of_export:
            wrong = parity.first_failure(known, of_export(case), origin(case))
        if wrong is not None:
            return _export(known, settings.cache, wrong)
    ran = f"emulated, {known.computed_in} keeps the limits, and {known.running.title} does not"
    return _beside_emulation(settings, known, known.lowered, ran, list)


def _diagnosed_given(settings: Settings, known: Known) -> dict[str, Any] | None:
    """What is to blame in an engine or served model that was made elsewhere, from a lowering that nobody here knows.

    It is held against this package's own lowering to its precision: emulated, which tells whether the precision as such
    loses as much, and built here, which tells whether TensorRT does.
    """
    system, lowered = known.running.builder, _lowered_here(settings, known)
    what = "file" if known.existing else "server"
    headline = f"emulated, {known.computed_in} keeps the limits, and the {what} does not"

    def built_here() -> list[str]:
        return _built_here(settings, known, system, lowered) if known.existing else []

    return _beside_emulation(settings, known, lowered, headline, built_here, known_lowering=False)


def _beside_emulation(
    settings: Settings,
    known: Known,
    lowered: Lowered,
    headline: str,
    notes: Callable[[], list[str]],
    *,
    known_lowering: bool = True,
) -> dict[str, Any] | None:
    """The precision where its emulation loses as much, else what ran, which `headline` says; with notes on that."""
    from pytest_trtcheck import diagnose

    case = known.cases[_worst(known)]
    expected = known.reference(case)
    with known.alone():
        outputs = known.run(case)
    with closing(Emulated(known.model, lowered, known.computed_in, settings.cache)) as emulation:
        emulated = emulation(case)
    loses = parity.first_failure(known, emulated, expected)
    if loses is not None:
        subject = replace(subject_of(known, _worst(known)), lowered=lowered, calibration=None)
        seconds = settings.allowance.seconds
        budget = diagnose.Budget(seconds=seconds, engine_seconds=0.0)
        found = diagnose.diagnose(subject, settings.cache, None, emulated=emulated, budget=budget)
        if found is not None:
            note = "of the model in that precision, emulated"
            note += "" if known_lowering else ": how what failed was lowered is not known"
            return {**found.to_dict(), "notes": (*found.notes, note)}
    return {
        "step": "engine",
        "headline": headline,
        "summary": headline,
        "errors": _errors_of_steps(known, outputs, emulated, expected),
        "notes": notes(),
    }


def _built_here(settings: Settings, known: Known, system: Backend, lowered: Lowered) -> list[str]:
    """Whether an engine that is built here and now, from the same model in the same precision, fails as well."""
    case = known.cases[_worst(known)]
    try:
        built = system.build(known.spec(system, lowered), settings.cache)
        with known.alone(), system.opened(built) as runner:
            fails = parity.first_failure(known, runner(case), known.reference(case))
    except CheckError as error:
        return [f"no engine of the model could be built here to compare with: {error.headline}"]
    if fails is None:
        return [
            f"an engine built here from {known.model.label} in {known.precision} keeps the limits: the file was built "
            "from other weights, with other options, or from a lowering that loses more"
        ]
    return [
        f"an engine built here from {known.model.label} in {known.precision} fails as well ({fails}): see to it first"
    ]


def _errors_of_steps(
    known: Known,
    outputs: Mapping[str, NDArray[Any]],
    emulated: Mapping[str, NDArray[Any]],
    expected: Mapping[str, NDArray[Any]],
) -> dict[str, Any]:
    """The error of each step by the limit that failed, as `diagnose.result.Errors` has them."""
    limits = parity.limits_of(known)
    worst = next(output for output in compare.judge_all(outputs, expected, limits) if is_bad(output.verdict))
    judged = next(entry for entry in worst.judged if is_bad(entry.verdict))

    def error(actual: Mapping[str, NDArray[Any]], right: Mapping[str, NDArray[Any]]) -> float | None:
        output = next(each for each in compare.judge_all(actual, right, limits) if each.name == worst.name)
        return next((entry.value for entry in output.judged if entry.metric == judged.metric), None)

    return {
        "metric": judged.metric,
        "limit": judged.limit,
        "output": worst.name,
        "lowered": error(emulated, expected),
        "engine": error(outputs, emulated),
        "total": judged.value,
    }


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
    case = {name: array for name, array in known.cases[_worst(known)].items() if name in names}
    spec = replace(
        whole,
        model=part,
        lowered=replace(known.lowered, path=path, key=f"{known.lowered.key}:{hash_file(path)}"),
        profile={name: span for name, span in whole.profile.items() if name in names},
        cases=[case],
    )
    with _opened(settings, known, spec) as runner:
        return runner(case)
