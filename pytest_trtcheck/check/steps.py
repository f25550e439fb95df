"""The steps of a check: functions from what is known to what is known."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, get_args

from pytest_trtcheck import backends
from pytest_trtcheck.check import blame, latency, message, parity
from pytest_trtcheck.check.request import Known
from pytest_trtcheck.errors import ArgumentError, CalibrationError, CheckError, GpuError, ModelError
from pytest_trtcheck.latency import baselines
from pytest_trtcheck.model import inputs as model_inputs
from pytest_trtcheck.model.sources import Examples, open_model
from pytest_trtcheck.precision.emulation import Emulated, computes_the_reference
from pytest_trtcheck.precision.lowering import Lowered, lower
from pytest_trtcheck.precision.reference import CallableReference, ModelReference, Reference, reference_given
from pytest_trtcheck.record import CheckRecord, Evidence, combine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from pytest_trtcheck.backends.base import Backend, Built, Runner
    from pytest_trtcheck.check.request import Request, Settings
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.precision.reference import AnyReference
    from pytest_trtcheck.spec import Precision

    Step = Callable[[Settings, Known], Known]


# --- what is asked for -----------------------------------------------------------------------------------------------


def named_model(
    settings: Settings, source: object, folders: Sequence[Path], examples: Examples | None = None
) -> OnnxModel:
    """The model that a marker or fixture names."""
    if source is None:
        raise ModelError(
            "no model is named", 'name it in the marker, @trt_parity("model.onnx"), or override the fixture trt_model'
        )
    return open_model(source, folders, settings.cache, examples=examples)


def model_of(settings: Settings, request: Request) -> OnnxModel:
    """The model that a request names."""
    model = named_model(settings, request.model, request.folders, request.examples)
    return open_model(model, (), settings.cache, request.build_options.custom_ops)


def prepared(settings: Settings, request: Request, model: OnnxModel, record: CheckRecord) -> Known:
    """What a check begins with: inputs, reference and lowered model."""
    if request.judge_parity:
        parity.refuse_random(model)
    cases, notes = _cases(request, model)
    if request.judge_parity:
        parity.refuse_empty(cases)
    data = getattr(request.calibration, "data", request.calibration)
    if model_inputs.shuffles(data):
        notes.append(f"the calibration data comes from a loader that shuffles: {_OTHERS}")
    known = replace(lowered(settings, request, model, cases), record=record)
    return known.recorded(*notes, *model.notes, *known.lowered.notes, cases=len(cases))


_OTHERS = "each run is given others, or in another order; shuffle=False makes runs comparable"


def _cases(request: Request, model: OnnxModel) -> tuple[list[Case], list[str]]:
    """What to feed, and what to say about it."""
    spec = request.parity
    batch = spec.batch[0]
    if request.inputs is not None:
        source = f"{request.inputs_source} inputs"
        cases = model_inputs.cases_from(request.inputs, model, source)
        if batch is not None:
            model_inputs.check_batch(model, batch, spec.shapes)
            cases = model_inputs.rebatched(cases, model, batch)
        for case in cases:
            request.admit(model, case, source)
        notes = (
            [f"{source} come from a loader that shuffles: {_OTHERS}"] if model_inputs.shuffles(request.inputs) else []
        )
        return cases, notes
    ranges = model_inputs.shape_ranges(model, batch, spec.shapes, default_batch=request.default_batch)
    notes = [f"inputs were generated (seed {spec.seed})"]
    if request.default_batch is not None and batch is None and any(s.free_dims() for s in model.inputs):
        notes.append(f"open batch dimensions were taken as {request.default_batch}")
    return model_inputs.generate(model, ranges, spec.seed), notes


def lowered(settings: Settings, request: Request, model: OnnxModel, cases: Sequence[Case]) -> Known:
    """The model in its precision. That TensorRT has no place for a model says more than that it cannot be lowered."""
    reference = _reference(settings, request, model)
    try:
        return Known(request, model, _lowered(settings, request, model), cases, reference)
    except (ModelError, CalibrationError):
        as_it_is = Lowered(model.path, model.sha256)
        system = settings.system(request)
        system.accepts(as_it_is, model.label, request.build_options, settings.cache, will_build=False).require()
        raise


def _lowered(settings: Settings, request: Request, model: OnnxModel, precision: Precision | None = None) -> Lowered:
    if request.lowered is not None and precision in {None, request.precision}:
        return request.lowered
    return lower(
        model,
        precision or request.precision,
        settings.cache,
        keep_fp32=request.parity.keep_fp32,
        calibration=request.calibration,
        folders=request.folders,
    )


def _reference(settings: Settings, request: Request, model: OnnxModel) -> AnyReference:
    given = request.parity.reference
    if given is None:
        return Reference(model, settings.cache, settings.reference_provider)
    return reference_given(
        given, model, request.folders, settings.cache, settings.reference_provider, examples=request.examples
    )


# --- the engine ------------------------------------------------------------------------------------------------------


def placed(settings: Settings, known: Known) -> Known:
    """What is to run it, and whether that takes the model.

    Raises
    ------
    ModelError
        It does not.
    """
    system = settings.system(known.request)
    op_types = known.lowered.op_types(known.model, known.precision)
    problem = system.why_not(known.precision, op_types)
    found = system.accepts(
        known.lowered,
        known.model.label,
        known.request.build_options,
        settings.cache,
        will_build=system.builds and problem is None,
    )
    found.require()
    known = replace(known, system=system, problem=problem, plugin_operators=found.plugin_operators)
    notes = found.notes
    if known.computed_in != known.precision:
        why = "has no FP32 matrix products: it " if known.computed_in == "tf32" else ""
        computed = known.computed_in.upper()
        notes = (*notes, f"{system.title} {why}computes in {computed}, and is judged by {computed}'s limit")
    return known.recorded(*notes, precision=known.shown_precision)


def built(settings: Settings, known: Known) -> Known:
    """The engine, from the cache or built now.

    One that cannot be built is an error, unless it was only to be compiled along the way: with `auto` and no GPU, what
    this TensorRT-RTX cannot compile says nothing about the TensorRT that is deployed.
    """
    system = known.system
    if known.problem is not None:
        named = settings.backend_of(known.request) != backends.AUTO
        wanted = settings.requested is not None and settings.requested.supports(known.precision) is False
        if named or system.runs or settings.build_only or wanted:
            raise known.unsupported()
        return known.recorded(f"not compiled for {system.builds_for}: {known.problem}")
    if settings.build_only and not system.builds:
        raise ArgumentError(f"--trt-build-only: {system.no_engine}", "name the GPU: --trt-gpu=A100")
    if not system.builds:
        return known
    with _getting_ready(settings, known):
        found = system.build(known.spec(system), settings.cache)
    compiled_for = None if system.runs else system.builds_for
    return replace(known, built=found).recorded(engine=found.record, compiled_for=compiled_for)


def nothing_compared(settings: Settings, known: Known) -> Known:
    """All that there is to say where engines are only built."""
    del settings
    return known.recorded(verdict="not_measured", message="--trt-build-only: built, nothing compared")


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
    wanted = known.request.judge_parity and not isinstance(reference, CallableReference)

    def compute() -> None:
        # What is wrong with it is said when it is asked for in earnest.
        with suppress(CheckError):
            for case in known.cases if wanted else ():
                reference(case)

    with ThreadPoolExecutor(2, "trtcheck") as pool:
        pool.submit(known.system.start)
        pool.submit(compute)
        yield


def loaded_by(settings: Settings, system: Backend, built: Built) -> Runner:
    """What runs a built engine; none does once one has broken CUDA in this process."""
    if settings.broken and system.gpu is not None:
        raise GpuError(f"no engine can run: {settings.broken[0]}", "run this test in a process of its own")
    return system.load(built)


def note_broken(settings: Settings, request: Request, error: CheckError) -> None:
    """Remember an error after which no engine can run in this process."""
    if isinstance(error, GpuError) and error.poisoned and not settings.broken:
        settings.broken.append(f"{request.nodeid} broke CUDA in this process: {error.headline}")


def loaded(settings: Settings, known: Known) -> Known:
    """What runs it: the engine, without a GPU its emulation, or neither where there is nothing to learn."""
    system, request = known.running, known.request
    if system.is_emulation:
        if not request.judge_parity:
            return known
        reason = None
        if computes_the_reference(known.lowered, known.computed_in) and request.parity.reference is None:
            reason = "fp32 can only be checked on a GPU: without one, the reference would be compared with itself"
        elif known.plugin_operators:
            reason = known.plugins_need_gpu()
        if reason is not None:
            return known.recorded(parity=parity.not_measured(request.parity, reason))
        _refuse_itself(known)
    _refuse_wrong_evidence(system)
    found = known.built if system.builds else system.build(known.spec(system), settings.cache)
    assert found is not None
    runner = loaded_by(settings, system, found)
    return replace(known, built=found, runner=runner).recorded(backend=system.name, evidence=system.evidence)


def _refuse_itself(known: Known) -> None:
    """Without a GPU, a model in FP32 that is its own reference can only agree with itself."""
    reference = known.reference
    is_itself = isinstance(reference, ModelReference) and reference.identity == known.model.sha256
    if is_itself and computes_the_reference(known.lowered, known.computed_in):
        raise ArgumentError(
            f"reference= is {known.model.label} itself, and nothing was lowered: it would be compared with itself",
            "name another model, or a precision to lower it to",
        )


def _refuse_wrong_evidence(system: Backend) -> None:
    """No system of another package's may count as a GPU's work where there was none."""
    if system.evidence not in get_args(Evidence) or (system.evidence == "engine" and system.gpu is None):
        raise ArgumentError(
            f"backend {system.name!r} says evidence = {system.evidence!r}, and names no GPU that it ran on",
            "say 'emulated', or set `gpu` to the machine's",
        )


# --- what it computes, and how fast ----------------------------------------------------------------------------------


def inspected(settings: Settings, known: Known) -> Known:
    """What the loaded engine tells of itself."""
    del settings
    if known.runner is None or known.built is None:
        return known
    engine = known.running.described(known.built, known.runner) or known.record.engine
    return known.recorded(*known.running.notes(known.built, known.runner), engine=engine)


def compared(settings: Settings, known: Known) -> Known:
    """The outputs against the reference. An engine is not trusted before it was seen to compute the same twice."""
    if known.runner is None or known.built is None:
        return known
    doubt = outcome = None
    with known.alone():
        if not known.running.is_emulation:
            case = known.cases[0]
            doubt = known.running.doubt(known.built, known.runner, case) or parity.unstable(
                known.runner, case, known.computed_in, bitwise=settings.bitwise
            )
        if known.request.judge_parity or doubt:
            outcome = parity.judge(known)
    if outcome is None:
        return known
    if doubt is not None:
        outcome = replace(outcome, record=replace(outcome.record, verdict="fail", reason=doubt))
    return replace(known, outcome=outcome, doubt=doubt).recorded(*outcome.notes, parity=outcome.record)


def explained(settings: Settings, known: Known) -> Known:
    """Who is to blame for a failure; beside an engine's errors, those that its emulation has."""
    if known.outcome is None or known.doubt is not None:
        return known
    # What a plugin computes, nothing here can compute in pieces.
    if known.outcome.record.verdict == "fail" and not known.outcome.misplaced and not known.plugin_operators:
        known = blame.blamed(settings, known)
    if known.running.is_emulation or not settings.emulate_too:
        return known
    if computes_the_reference(known.lowered, known.computed_in):
        return known
    with closing(Emulated(known.model, known.lowered, known.computed_in, settings.cache)) as emulated:
        return known.recorded(parity=parity.with_emulation(known, emulated))


def watched(settings: Settings, known: Known) -> Known:
    """What the watcher says; what goes wrong there never hides what the check found."""
    watch = known.request.watch
    if watch is None or known.outcome is None:
        return known
    try:
        with known.alone():
            return known.recorded(*watch(known))
    except CheckError as error:
        note_broken(settings, known.request, error)
        return known.recorded(str(error))


def timed(settings: Settings, known: Known) -> Known:
    """How fast it is."""
    if known.request.latency is None:
        return known

    def built_in(precision: Precision) -> Built:
        other = _lowered(settings, known.request, known.model, precision)
        return known.system.build(known.spec(known.system, other, precision), settings.cache)

    record = latency.judge(settings, known, lambda precision: loaded_by(settings, known.system, built_in(precision)))
    return known.recorded(*baselines.notes(record), latency=record)


def kept(settings: Settings, known: Known) -> Known:
    """What running the engine brought is kept beside it."""
    del settings
    if known.runner is not None and known.built is not None:
        known.running.keep(known.built, known.runner)
    return known


def concluded(settings: Settings, known: Known) -> Known:
    """The verdict, and what is to be read first; under `--trt-require-gpu`, what no GPU ran or measured fails."""
    parts = [part for part in (known.record.parity, known.record.latency) if part is not None]
    known = known.recorded(verdict=combine([part.verdict for part in parts]))
    return known.recorded(**message.conclusion(known, require_gpu=settings.require_gpu))


BUILDING: Sequence[Step] = (placed, built, nothing_compared)
CHECKING: Sequence[Step] = (placed, built, loaded, inspected, compared, explained, watched, timed, kept, concluded)
