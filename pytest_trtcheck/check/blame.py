"""What a diagnosis needs of a check, and what a check makes of a diagnosis."""

from __future__ import annotations

import json
import time
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_trtcheck import __version__
from pytest_trtcheck.backends.tensorrt import cached as engines
from pytest_trtcheck.cache import Key, hash_code, hash_file
from pytest_trtcheck.check import parity
from pytest_trtcheck.gpu.lock import gpu_lock
from pytest_trtcheck.model import inputs as model_inputs
from pytest_trtcheck.model import onnx_model
from pytest_trtcheck.model import onnxruntime as ort
from pytest_trtcheck.precision.reference import CallableReference, Reference
from pytest_trtcheck.record import BlameRecord, jsonable, typed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from numpy.typing import NDArray

    from pytest_trtcheck.backends.base import Runner
    from pytest_trtcheck.cache import Cache
    from pytest_trtcheck.check.request import Job
    from pytest_trtcheck.precision.lowering import Lowered
    from pytest_trtcheck.precision.reference import AnyReference


_BLAME_FILE = "blame.json"
_LONG_S = 10.0
"""From here on somebody who waits is told how to wait no longer."""


class _Unfinished(Exception):  # noqa: N818 - it keeps a diagnosis out of the cache, it is no error
    """A diagnosis that may find more another time."""

    def __init__(self, found: dict[str, Any]) -> None:
        super().__init__()
        self.found = found


@dataclass
class Allowance:
    """What the diagnoses of a session may cost.

    Parameters
    ----------
    seconds
        The most that one may take on the emulation; 0: nothing is diagnosed.
    session_seconds
        The most that all of them may take: a run in which everything fails must end too.
    spent_s
        What they took so far.
    """

    seconds: float = 60.0
    session_seconds: float = 600.0
    spent_s: float = 0.0

    def refusal(self) -> str | None:
        """Why nothing is diagnosed; None when something may be."""
        if self.seconds <= 0:
            return "not diagnosed: trt_diagnose is 0"
        if self.spent_s >= self.session_seconds:
            return f"not diagnosed: the diagnoses of this run took {self.spent_s:.0f} s already; run this test alone"
        return None


def blamed(
    job: Job,
    outcome: parity.Outcome,
    runner: Runner,
    reference: AnyReference,
    cache: Cache,
    *,
    allowance: Allowance,
    progress: Callable[[str], None],
) -> parity.Outcome:
    """The outcome of a failed check with who is to blame, in its first line and in full."""
    refusal = allowance.refusal()
    if refusal is not None:
        return replace(outcome, notes=(*outcome.notes, refusal))
    own = _fault_of_the_model(job, outcome, reference, cache)
    if own is not None:
        return replace(outcome, notes=(*outcome.notes, f"not diagnosed: {own}"))
    start = time.monotonic()
    is_engine = runner.evidence == "engine"

    def find() -> dict[str, Any] | None:
        return _diagnosed(job, outcome, runner, reference, cache, seconds=allowance.seconds, progress=progress)

    # What an engine computed is no part of any key; the emulation computes the same from the same.
    # Nor is what a callable of the user's computed.
    is_kept = not is_engine and not isinstance(reference, CallableReference)
    found = _remembered(job, outcome, cache, find) if is_kept else find()
    allowance.spent_s += time.monotonic() - start
    if found is None:
        return outcome
    # With the libraries for graphs it takes half a second to load, which a check that passes has no use for.
    from pytest_trtcheck.diagnose import text

    return replace(
        outcome,
        record=replace(outcome.record, blame=typed(jsonable(found), BlameRecord)),
        head=f"{outcome.head}: {text.verdict(found)}",
        text=f"{text.explain(found)}\n\n{outcome.observations}",
    )


def _fault_of_the_model(job: Job, outcome: parity.Outcome, reference: AnyReference, cache: Cache) -> str | None:
    """Where a reference was given: how far the checked model is from it before anything is lowered, if that is too far.

    The diagnosis holds the lowered model against the FP32 model that it was made from, and finds what was lost between
    the two.
    """
    if job.request.parity.reference is None:
        return None
    case = job.cases[outcome.worst]
    found = parity.first_failure(job, Reference(job.model, cache)(case), reference(case))
    return found and f"computed in FP32, {job.model.label} itself differs from {reference.title}: {found}"


def _remembered(
    job: Job, outcome: parity.Outcome, cache: Cache, find: Callable[[], dict[str, Any] | None]
) -> dict[str, Any] | None:
    """A diagnosis from the cache: a test that is known to fail is not diagnosed in every run.

    One that broke off, or for which there was not enough time, is not kept.
    """
    limits = {name: [asdict(limit) for limit in each] for name, each in parity.limits_of(job).items()}
    parts = {
        "lowered": job.lowered.key,
        "inputs": json.dumps([model_inputs.digest(case) for case in job.cases]),
        "worst": str(outcome.worst),
        "limits": json.dumps(limits, sort_keys=True),
        "reference": getattr(job.reference, "identity", None) or "",
        "code": hash_code("diagnose/*.py"),
        "onnxruntime": ort.version(),
        "version": __version__,
    }

    def make(folder: Path) -> None:
        found = find()
        if found is not None and not found["is_complete"]:
            raise _Unfinished(found)
        (folder / _BLAME_FILE).write_text(json.dumps(jsonable(found)))

    try:
        entry = cache.get_or_make(Key("blame", job.title, parts), make)
    except _Unfinished as unfinished:
        return unfinished.found
    found: dict[str, Any] | None = json.loads((entry.path / _BLAME_FILE).read_text())
    return found


def _diagnosed(
    job: Job,
    outcome: parity.Outcome,
    runner: Runner,
    reference: AnyReference,
    cache: Cache,
    *,
    seconds: float,
    progress: Callable[[str], None],
) -> dict[str, Any] | None:
    from pytest_trtcheck import diagnose

    subject = diagnose.Subject(
        model=job.model,
        lowered=job.lowered,
        precision=job.computed_in,
        keep_fp32=job.request.parity.keep_fp32,
        calibration=job.request.calibration,
        folders=job.request.folders,
        cases=job.cases,
        worst=outcome.worst,
        limits=parity.limits_of(job),
        reference=reference,
    )
    is_engine = runner.evidence == "engine"
    with alone_on_gpu(job) if is_engine else nullcontext():
        outputs = runner(subject.case)
    blame = diagnose.diagnose(
        subject,
        cache,
        diagnose.Engine(
            outputs,
            lambda path: _run_part(job, path, cache, outcome.worst),
            lambda lowered: _rebuilt(job, lowered, cache),
        )
        if is_engine
        else None,
        emulated=None if is_engine else outputs,
        budget=diagnose.Budget(seconds=seconds, engine_seconds=5 * seconds),
        progress=_timed(f"{job.title}: ", progress),
    )
    return None if blame is None else blame.to_dict()


def _timed(before: str, progress: Callable[[str], None]) -> Callable[[str], None]:
    """Progress with how long it has taken, once that is long."""
    start = time.monotonic()

    def show(line: str) -> None:
        seconds = time.monotonic() - start
        after = f" ({seconds:.0f} s so far, --trt-diagnose=SECONDS limits it)" if seconds >= _LONG_S else ""
        progress(f"{before}{line}{after}")

    return show


@contextmanager
def _rebuilt(job: Job, lowered: Lowered, cache: Cache) -> Iterator[Runner]:
    """The engine of another lowering of the model, built as the engine that failed was, ready to run."""
    assert job.place is not None
    options = job.request.build_options
    order = engines.Order(job.model, lowered, job.precision, job.profile(), options)
    built = engines.build(order, job.place, cache)
    with alone_on_gpu(job), closing(engines.load(built, job.place, options)) as engine:
        yield engine
        engines.keep_kernels(built, engine)


def _run_part(job: Job, path: Path, cache: Cache, worst: int) -> Mapping[str, NDArray[Any]]:
    """Build an engine of a beginning of the lowered model, as the engine that failed was built, and run it."""
    assert job.place is not None
    options = job.request.build_options
    lowered = replace(job.lowered, path=path, key=f"{job.lowered.key}:{hash_file(path)}")
    part = onnx_model.load(path, f"{job.model.label} (a part of it)")
    names = {spec.name for spec in part.inputs}
    case = {name: array for name, array in job.cases[worst].items() if name in names}
    profile = {name: span for name, span in job.profile().items() if name in names}
    built = engines.build(engines.Order(part, lowered, job.precision, profile, options), job.place, cache)
    with alone_on_gpu(job), closing(engines.load(built, job.place, options)) as engine:
        outputs = engine(case)
        engines.keep_kernels(built, engine)
        return outputs


def alone_on_gpu(job: Job) -> AbstractContextManager[None]:
    """The lock of the job's GPU. It is to be held for a run at a time: others measure while an engine is built."""
    assert job.place is not None
    assert job.place.gpu is not None
    return gpu_lock(job.place.gpu.lock_name)
