"""What a diagnosis needs of a check, and what a check makes of a diagnosis."""

from __future__ import annotations

import time
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_trtcheck import engines, parity
from pytest_trtcheck.cache import hash_file
from pytest_trtcheck.gpu.lock import gpu_lock
from pytest_trtcheck.model import inputs as model_inputs
from pytest_trtcheck.model import onnx_model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from numpy.typing import NDArray

    from pytest_trtcheck.artifacts import Reference
    from pytest_trtcheck.backends.base import Runner
    from pytest_trtcheck.cache import Cache
    from pytest_trtcheck.job import Job


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
    reference: Reference,
    cache: Cache,
    *,
    allowance: Allowance,
    progress: Callable[[str], None],
) -> parity.Outcome:
    """The outcome of a failed check with who is to blame, in its first line and in full."""
    refusal = allowance.refusal()
    if refusal is not None:
        return replace(outcome, notes=(*outcome.notes, refusal))
    # With the libraries for graphs it takes half a second to load, which a check that passes has no use for.
    from pytest_trtcheck import diagnose

    subject = diagnose.Subject(
        model=job.model,
        lowered=job.lowered,
        precision=job.precision if job.place is None else engines.computed_in(job.precision, job.place),
        keep_fp32=job.request.parity.keep_fp32,
        calibration=job.request.calibration,
        folders=job.request.folders,
        cases=job.cases,
        worst=outcome.worst,
        limits=parity.limits_of(job),
        reference=reference,
    )
    start = time.monotonic()
    is_engine = runner.evidence == "engine"
    with alone_on_gpu(job) if is_engine else nullcontext():
        outputs = runner(subject.case)
    blame = diagnose.diagnose(
        subject,
        cache,
        diagnose.Engine(outputs, lambda path: _run_part(job, path, cache, outcome.worst)) if is_engine else None,
        emulated=None if is_engine else outputs,
        budget=diagnose.Budget(seconds=allowance.seconds, engine_seconds=5 * allowance.seconds),
        progress=lambda line: progress(f"{job.title}: {line}"),
    )
    allowance.spent_s += time.monotonic() - start
    if blame is None:
        return outcome
    found = blame.to_dict()
    return replace(
        outcome,
        record=replace(outcome.record, blame=found),
        head=f"{outcome.head}: {diagnose.verdict(found)}",
        text=f"{diagnose.explain(found)}\n\n{outcome.text}",
    )


def _run_part(job: Job, path: Path, cache: Cache, worst: int) -> Mapping[str, NDArray[Any]]:
    """Build an engine of a beginning of the lowered model, as the engine that failed was built, and run it."""
    assert job.place is not None
    options = job.request.build_options
    lowered = replace(job.lowered, path=path, key=f"{job.lowered.key}:{hash_file(path)}")
    part = onnx_model.load(path, f"{job.model.label} (a part of it)")
    names = {spec.name for spec in part.inputs}
    case = {name: array for name, array in job.cases[worst].items() if name in names}
    ranges = model_inputs.declared_ranges(job.model, job.request.parity.shapes)
    profile = {name: span for name, span in model_inputs.profile(job.model, ranges, job.cases).items() if name in names}
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
