"""The engine, or what runs in its place: placed, built, loaded."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import replace
from typing import TYPE_CHECKING, get_args

from pytest_trtcheck.backends.tensorrt import emulated
from pytest_trtcheck.backends.tensorrt.options import check_values
from pytest_trtcheck.check import parity, scoring
from pytest_trtcheck.check.steps.asked import accepted, decides_alone
from pytest_trtcheck.choices import quantized_part
from pytest_trtcheck.errors import (
    ArgumentError,
    BuildError,
    CheckError,
    GpuError,
    ModelError,
    UnsupportedTargetError,
    first_line,
)
from pytest_trtcheck.gpu.device import why_no_tf32
from pytest_trtcheck.model.kept_outputs import KeptOutputs
from pytest_trtcheck.precision.emulation import Emulated, computes_the_reference
from pytest_trtcheck.precision.reference import CallableReference, ModelReference, SourceReference
from pytest_trtcheck.record import Evidence, GpuRecord
from pytest_trtcheck.spec import PRECISIONS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_trtcheck.backends.base import Backend, Built, Runner
    from pytest_trtcheck.backends.tensorrt.existing import ExistingEngine
    from pytest_trtcheck.check.request import Known, Request, Settings


def placed(settings: Settings, known: Known) -> Known:
    """What is to run it, and whether that takes the model.

    Raises
    ------
    ModelError
        It does not.
    """
    check_values(known.request.build_options)
    if known.existing is not None:
        return _placed_engine(known, known.existing)
    if known.system.is_server:
        return _placed_on_server(known)
    system = settings.system(known.request)
    op_types = known.lowered.op_types(known.model, quantized_part(known.precision) or known.precision)
    problem = system.why_not(known.precision, op_types) or _why_no_tf32(known, system)
    will_build = system.builds and problem is None
    found = accepted(settings, system, known.lowered, known.model, known.request, will_build=will_build)
    known = replace(
        known, system=system, problem=problem, plugin_operators=found.plugin_operators, judged_by=found.judged_by
    )
    notes = found.notes
    if known.computed_in != known.precision:
        is_rtx = known.computed_in == "tf32" and system.evidence == "engine"
        why = "has no FP32 matrix products: it " if is_rtx else ""
        computed = known.computed_in.upper()
        notes = (*notes, f"{system.title} {why}computes in {computed}, and is judged by {computed}'s limit")
    return known.recorded(*notes, precision=known.shown_precision)


def _why_no_tf32(known: Known, system: Backend) -> str | None:
    """Why what was asked to be computed in TF32 would not be; FP32 would pass for it."""
    asked = known.precision == "tf32" or known.request.build_options.tf32
    return why_no_tf32(system.gpu) if asked else None


def _placed_engine(known: Known, existing: ExistingEngine) -> Known:
    """An engine that exists with what its file, and what lies beside it, say."""
    file, stated = existing.file, existing.file.stated_precision
    if stated is not None and known.request.parity.states_precision and not _are_one(stated, known.precision):
        raise ModelError(
            f"{file.label}: precision={known.precision}, and the manifest beside it says {stated}",
            "leave precision= out, or name the engine of that precision",
            code="engine-precision",
        )
    if not known.request.parity.states_precision and file.stated_precision in PRECISIONS:
        known = known.in_precision(file.stated_precision)
    if why := _why_no_tf32(known, existing):
        raise replace(known, problem=why).unsupported()
    precision = None if known.has_unknown_precision else known.shown_precision
    notes = list(file.notes)
    if file.stated_model not in {None, known.model.sha256}:
        notes.append(f"by its manifest {file.label} was built from another model than {known.model.label} is now")
    return known.recorded(*notes, engine=existing.found_in_file(), precision=precision)


def _placed_on_server(known: Known) -> Known:
    """A served model with the precision that is said of it: no server tells what it computes in.

    Raises
    ------
    ArgumentError
        Neither is a precision said, nor what decides without one.
    """
    if known.has_unknown_precision:
        if known.request.judge_parity and not decides_alone(known.request.parity.tol):
            raise ArgumentError(
                f"{known.model.label}: what {known.system.title} computes in is not known, and neither precision= nor "
                "tol= is given",
                'say what it was built in, @trt_parity("model.onnx", precision="fp16"), or give a limit, tol=',
                code="engine-precision",
            )
        return known.recorded("the precision is not known: a server does not tell", precision=None)
    return known.recorded(f"{known.precision} is stated, not proved: a server does not tell what it computes in")


def _are_one(first: str, second: str) -> bool:
    """Whether two precisions are the same; TensorRT-RTX computes FP32 in TF32."""
    return first == second or {first, second} == {"fp32", "tf32"}


def built(settings: Settings, known: Known) -> Known:
    """The engine, from the cache or built now.

    One that cannot be built is an error, unless it was only to be compiled along the way: with `auto` and no GPU, what
    this TensorRT-RTX cannot compile says nothing about the TensorRT that is deployed.
    """
    system = known.system
    if known.existing is not None:
        return known
    if known.problem is not None:
        if not system.is_served_elsewhere(known.precision):
            raise known.unsupported()
        return _not_built(known, known.problem)
    if settings.build_only and not system.builds and not settings.only_judges(known.request):
        hint = "" if settings.requested else "name the GPU: --trt-gpu=A100"
        raise UnsupportedTargetError(f"--trt-build-only: {system.no_engine}", hint, code="gpu-needed")
    if not system.builds:
        return known
    try:
        with _getting_ready(settings, known):
            found = system.build(known.spec(system), settings.cache)
    except BuildError as error:
        if system.is_served_elsewhere(known.precision, error.message):
            return _not_built(known, error.message)
        raise BuildError(error.message, _advice(settings, known, error), code=error.code) from error
    compiled_for = None if system.runs else system.builds_for
    return replace(known, built=found).recorded(engine=found.record, compiled_for=compiled_for)


def _not_built(known: Known, reason: str) -> Known:
    """What no engine could be built of here says nothing against the TensorRT of that GPU, nor for it."""
    return known.recorded(f"not built for {known.system.builds_for}: {first_line(reason)}", not_built=reason)


def _advice(settings: Settings, known: Known, error: BuildError) -> str:
    """What to do about a build that failed: what the builder's words tell, and what the rules say of the model."""
    found = known.system.accepts(
        known.lowered, known.model.label, known.request.build_options, settings.cache, will_build=False
    )
    return "\n  → ".join(dict.fromkeys(filter(None, (found.advice, error.hint))))


def nothing_compared(settings: Settings, known: Known) -> Known:
    """All that there is to say where engines are only built, or not even that."""
    del settings
    found = "built, nothing compared"
    if known.existing is not None:
        found = "engine= names a file, nothing was built, nothing compared"
    elif known.record.not_built is not None:
        found = f"not built for {known.system.builds_for}: {known.record.not_built}"
    elif known.built is None:
        found = f"{known.title}: no problem found by {known.judged_by}; no engine was built: --trt-gpu=A100 builds one"
    return known.recorded(verdict="not_measured", message=f"--trt-build-only: {found}", code="not-measured")


@contextmanager
def _getting_ready(settings: Settings, known: Known) -> Iterator[None]:
    """Beside the build, which is another process's work, get ready what a GPU will need: CUDA and the reference.

    Without a GPU the memory counts more than the time: nothing else is in it while the model is lowered.
    """
    if known.system.gpu is None or settings.build_only or settings.broken:
        yield
        return
    reference = known.reference
    # A callable of the user's is not kept, and may not like another thread.
    wanted = known.request.judges_outputs and not isinstance(reference, CallableReference)

    def compute() -> None:
        # What is wrong with it is said when it is asked for in earnest.
        with suppress(CheckError):
            for case in known.cases if wanted else ():
                reference(case)

    with ThreadPoolExecutor(2, "trtcheck") as pool:
        if not _computes_alone(settings, known.request):
            pool.submit(known.system.start)
        pool.submit(copy_context().run, compute)
        yield


def loaded_by(settings: Settings, system: Backend, built: Built, *, computes_alone: bool = False) -> Runner:
    """What runs a built engine; none does once one has broken CUDA in this process.

    Parameters
    ----------
    computes_alone
        Whether nothing else is wanted of it: then it goes on where it was tried, and is not loaded again.
    """
    if computes_alone and built.loaded is not None:
        return built.loaded
    built.close()  # two engines at a time may be more than the GPU holds
    if settings.broken and system.gpu is not None:
        raise GpuError(
            f"no engine can run: {settings.broken[0]}", "run this test in a process of its own", code="cuda-broken"
        )
    if settings.kept_open is None:
        return system.load(built)
    found: Runner = settings.kept_open.get((system.name, built.path, built.spec.precision), lambda: system.load(built))
    return found


def _computes_alone(settings: Settings, request: Request) -> bool:
    """Whether no time is asked for: what is measured is loaded, run and kept open in this process."""
    measures = request.latency is not None or request.parity.is_compared or settings.time_layers
    return not measures and settings.kept_open is None


def note_broken(settings: Settings, request: Request, error: CheckError) -> None:
    """Remember an error after which no engine can run in this process."""
    if isinstance(error, GpuError) and error.poisoned and not settings.broken:
        settings.broken.append(f"{request.nodeid} broke CUDA in this process: {error.headline}")


def loaded(settings: Settings, known: Known) -> Known:
    """What runs it: the engine, without a GPU its emulation, or neither where there is nothing to learn."""
    system, request = known.running, known.request
    if known.existing is not None and not known.system.runs:
        return _uncompared(known, known.system.no_engine)
    if system.is_emulation:
        if not request.judge_parity:
            return known
        reason = None
        if computes_the_reference(known.lowered, known.computed_in) and request.parity.reference is None:
            reason = "fp32 can only be checked on a GPU: without one, the reference would be compared with itself"
        elif known.plugin_operators:
            reason = known.plugins_need_gpu()
        if reason is not None:
            return _uncompared(known, reason)
        _refuse_itself(known)
        if isinstance(known.reference, KeptOutputs | ModelReference):
            known.reference.keep(known.cases)
    if request.judge_parity and system.is_the_source(known.precision) and isinstance(known.reference, SourceReference):
        raise ArgumentError(
            f"reference=SOURCE: {system.title} on the CPU in {known.precision} is what that computes: it would be "
            "compared with itself",
            "leave reference= out: the export's outputs on ONNX Runtime are the reference then",
            code="compared-with-itself",
        )
    _refuse_wrong_evidence(system)
    found = known.built if system.builds else system.build(known.spec(system), settings.cache)
    assert found is not None
    started = time.perf_counter()
    runner: Runner
    if isinstance(system, emulated.Emulated) and settings.kept_open is None:
        # What was computed before is not computed again: it depends on nothing else than its key.
        runner = Emulated(known.model, known.lowered, found.spec.precision, settings.cache)
    else:
        runner = loaded_by(settings, system, found, computes_alone=_computes_alone(settings, known.request))
    is_loaded_here = system.loads and not system.is_emulation and runner is not found.loaded
    load_ms = 1000 * (time.perf_counter() - started) if is_loaded_here else None
    known = replace(known, built=found, runner=runner, load_ms=load_ms)
    if system.gpu is not None:
        notes = filter(None, [settings.machine.gpu_note])
        known = known.recorded(*notes, gpu=GpuRecord(**system.gpu.environment()))
    return known.recorded(backend=system.name, evidence=system.evidence, gpu_ran=system.gpu_ran)


def _uncompared(known: Known, reason: str) -> Known:
    """What was asked of the outputs and could not be found out here, with the reason."""
    spec = known.request.parity
    return known.recorded(
        parity=parity.not_measured(spec, reason) if known.request.judges_outputs else None,
        score=scoring.not_measured(spec.score, reason) if spec.score else None,
    )


def _refuse_itself(known: Known) -> None:
    """Without a GPU, a model in FP32 that is its own reference can only agree with itself."""
    reference = known.reference
    is_itself = getattr(reference, "computed_by", None) == known.model.sha256
    if is_itself and computes_the_reference(known.lowered, known.computed_in):
        raise ArgumentError(
            f"{known.reference.title} is {known.model.label} itself, and nothing was lowered: it would be compared "
            "with itself",
            "name another model, or a precision to lower it to",
            code="compared-with-itself",
        )


def _refuse_wrong_evidence(system: Backend) -> None:
    """No system of another package's may count as a GPU's work where there was none."""
    claims = system.evidence == "engine" or system.gpu_ran is True
    if system.evidence not in get_args(Evidence) or (claims and system.gpu is None):
        raise ArgumentError(
            f"backend {system.name!r} says evidence = {system.evidence!r} and gpu_ran = {system.gpu_ran!r}, and names "
            "no GPU that it ran on",
            "say 'provider' or 'emulated', or set `gpu` to the machine's",
            code="extension-failed",
        )
