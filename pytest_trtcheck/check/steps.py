"""The steps of a check: functions from what is known to what is known."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from pytest_trtcheck import backends
from pytest_trtcheck.backends.tensorrt.options import check_values
from pytest_trtcheck.check import blame, evidence, keeping, kept_inputs, latency, message, parity, scoring
from pytest_trtcheck.check.baseline import held
from pytest_trtcheck.check.rebuild import judged_again
from pytest_trtcheck.check.request import Known
from pytest_trtcheck.check.search import searched
from pytest_trtcheck.choices import half_part, quantized_part
from pytest_trtcheck.errors import (
    ArgumentError,
    BuildError,
    CalibrationError,
    CheckError,
    GpuError,
    InputError,
    ModelError,
    UnsupportedTargetError,
    listed,
    plural,
)
from pytest_trtcheck.model import golden as golden_samples
from pytest_trtcheck.model import inputs as model_inputs
from pytest_trtcheck.model import labelled
from pytest_trtcheck.model.labelled import Stream
from pytest_trtcheck.model.sources import Examples, Opening, is_model, open_model
from pytest_trtcheck.precision.arithmetic import MATRIX_OPERATORS
from pytest_trtcheck.precision.emulation import Emulated, computes_the_reference
from pytest_trtcheck.precision.lowering import Lowered, carried, lower
from pytest_trtcheck.precision.quantization import coverage
from pytest_trtcheck.precision.reference import (
    CallableReference,
    GoldenReference,
    Reference,
    SourceReference,
    reference_given,
)
from pytest_trtcheck.record import (
    BASELINE,
    CalibrationRecord,
    CheckRecord,
    Evidence,
    LoweredRecord,
    ServerRecord,
    combine,
    is_bad,
)
from pytest_trtcheck.spec import PRECISIONS, Tolerance

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from pytest_trtcheck.backends.base import Acceptance, Backend, Built, Runner
    from pytest_trtcheck.backends.tensorrt.existing import ExistingEngine
    from pytest_trtcheck.backends.tensorrt.plan_file import PlanFile
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


def in_its_own_precision(settings: Settings, request: Request, model: OnnxModel) -> tuple[Request, tuple[str, ...]]:
    """The request for a model that carries its precision, where none was asked for; and what to say about it."""
    carried_in = carried(model, settings.cache) if request.precision_is_default else None
    if carried_in is None:
        return request, ()
    note = f"{model.label} carries its precision: checked in {carried_in}, since --trt-precision asks for none"
    return replace(request, parity=replace(request.parity, precision=(carried_in,))), (note,)


def read_once(request: Request) -> Request:
    """The request with an iterator of inputs made safe to look into: sources look at the first item for its shapes."""
    return replace(request, inputs=Stream(request.inputs)) if isinstance(request.inputs, Iterator) else request


def fed_as_recorded(request: Request, model: OnnxModel) -> Request:
    """The request with the recorded samples that it names read, and their inputs fed where none are given."""
    if not golden_samples.is_named(request.parity.reference):
        return request
    golden = golden_samples.read(request.parity.reference, model, request.folders)
    if request.inputs is None:
        request = replace(request, inputs=list(golden.inputs), inputs_source="recorded")
    return replace(request, parity=replace(request.parity, reference=golden))


def model_of(settings: Settings, request: Request) -> OnnxModel:
    """The model that a request names; beside an engine, the model that its reference is says as much."""
    source, reference = request.model, request.parity.reference
    if source is None and request.parity.engine is not None:
        if golden_samples.is_named(reference) or not is_model(reference):
            raise ModelError(
                f"engine={request.parity.engine}: no model is named, whose outputs the engine's are compared with",
                'name the model that it was built from: @trt_parity("model.onnx", engine=…), or a model as reference=',
            )
        source = reference
    model = named_model(settings, source, request.folders, request.examples)
    return open_model(model, (), settings.cache, request.build_options.custom_ops)


def prepared(settings: Settings, request: Request, model: OnnxModel, record: CheckRecord) -> Known:
    """What a check begins with: inputs, reference and lowered model. Where no engine is built, nothing is fed to it."""
    existing = existing_engine(settings, request)
    if existing is None:
        settings.system(request).admit(model, request.parity, request.build_options)
    compares = request.judge_parity and not settings.build_only
    if compares:
        parity.refuse_random(model)
    cases, labels, notes = ([], [], []) if settings.only_judges(request) else _cases(request, model)
    if compares:
        parity.refuse_empty(cases)
    own = len(cases)
    # What a search found has no labels.
    if compares and request.parity.score is None:
        cases, notes = _with_kept(request, model, cases, notes)
    data = getattr(request.calibration, "data", request.calibration)
    if model_inputs.shuffles(data):
        notes = [*notes, f"the calibration data comes from a loader that shuffles: {_OTHERS}"]
    known = replace(lowered(settings, request, model, cases, existing), labels=labels, record=record)
    if len(cases) > own:
        known = replace(known, kept_from=own)
    if isinstance(known.reference, GoldenReference):
        golden_samples.require(known.reference.golden, cases, f"{request.inputs_source} inputs")
    if known.system.is_server and request.parity.keep_auto:
        notes = [*notes, "keep_fp32='auto' was not searched: the server has a model of its own"]
    elif request.judge_parity and request.parity.keep_auto:

        def keeping_fp32(nodes: tuple[str, ...]) -> Lowered:
            parity_spec = replace(request.parity, keep_fp32=nodes)
            return _lowered(settings, replace(request, parity=parity_spec), model)

        known = keeping.with_fewest(settings, known, keeping_fp32)
    if compares and request.parity.reference is None and known.lowered.integers_alone:
        weights = listed(known.lowered.integers_alone)
        notes = [
            *notes,
            f"the file has only integers of {weights}, and the reference is computed with them: what quantizing them "
            'cost was not compared; name the FP32 original, reference="model.onnx"',
        ]
    of_reference = getattr(known.reference, "notes", ())
    calibration = _calibration(known)
    if calibration is not None and calibration.inputs:
        notes = [*notes, *coverage.notes(calibration.inputs, request.inputs_source)]
    return known.recorded(
        *(*notes, *model.notes, *of_reference, *known.lowered.notes, *_overflowing(known)),
        cases=len(cases),
        inputs_sha256=model_inputs.digest_of(cases) if cases else None,
        reference_sha256=getattr(known.reference, "identity", None),
        calibration=calibration,
        # What was made elsewhere was lowered by others.
        lowered=None if known.is_given else _lowered_record(known),
        profile={name: (span.min, span.opt, span.max) for name, span in known.profile().items()} if cases else None,
    )


def _lowered_record(known: Known) -> LoweredRecord:
    made = known.lowered
    return LoweredRecord(made.key, known.precision, str(made.path) if made.path == known.model.path else None)


def _overflowing(known: Known) -> Iterator[str]:
    """Inputs that a 16-bit type of theirs cannot hold: what the engine is fed is infinite there."""
    largest = {"fp16": 65504.0, "bf16": 3.39e38}.get(known.request.build_options.io or "", math.inf)
    for index, case in enumerate(known.cases if largest < math.inf else ()):
        for name, array in case.items():
            peak = np.abs(array[np.isfinite(array)]).max(initial=0) if array.dtype.kind == "f" else 0
            if peak > largest:
                yield f"input {name!r} [{index}] reaches {peak:.4g}: in {known.request.build_options.io} it is infinite"


def _calibration(known: Known) -> CalibrationRecord | None:
    """How the ranges were chosen, where the model was calibrated, and whether that was with data as it is fed."""
    ranges = known.lowered.details.get("ranges")
    if ranges is None:
        return None
    digest, seen = (known.lowered.details.get(name) for name in ("samples", "seen"))
    found = CalibrationRecord(ranges["method"], ranges["percentile"], ranges["samples"], sha256=digest)
    if seen:
        some = known.cases[:: max(1, len(known.cases) // coverage.CASES)]
        found = replace(found, inputs=coverage.covered(known.model, seen, some))
    if not ranges["choice"]:
        return found
    errors = {
        method: {name: math.inf if error is None else error for name, error in by_output.items()}
        for method, by_output in ranges["choice"]["errors"].items()
    }
    return replace(found, held_out=ranges["choice"]["held_out"], errors=errors)


_OTHERS = "each run is given others, or in another order; shuffle=False makes runs comparable"


def _cases(request: Request, model: OnnxModel) -> tuple[Sequence[Case], list[Any], list[str]]:
    """What to feed, its labels where a score asks for them, and what to say about it."""
    spec = request.parity
    batch = spec.batch[0]
    source = f"{request.inputs_source} inputs"
    labels: list[Any] = []
    cases: Sequence[Case]
    if request.inputs is not None:
        if batch is not None:
            model_inputs.check_batch(model, batch, spec.shapes)
        if spec.score is not None:
            cases, labels = labelled.held(request.inputs, model, source)
        else:
            cases = model_inputs.cases_from(request.inputs, model, source)
            cases = cases if batch is None else model_inputs.rebatched(cases, model, batch)
        for case in cases:
            request.admit(model, case, source)
        notes = (
            [f"{source} come from a loader that shuffles: {_OTHERS}"] if model_inputs.shuffles(request.inputs) else []
        )
        return cases, labels, notes
    if spec.score is not None:
        raise InputError(
            f"score={spec.score.name}: there is nothing to score: neither the test nor trt_inputs gives inputs",
            "return the samples with their labels: [Case(inputs, labels), …], or a loader of batches",
        )
    ranges = model_inputs.shape_ranges(model, batch, spec.shapes, default_batch=request.default_batch)
    notes = [f"inputs were generated (seed {spec.seed})"]
    if request.default_batch is not None and batch is None and any(s.free_dims() for s in model.inputs):
        notes.append(f"open batch dimensions were taken as {request.default_batch}")
    return model_inputs.generate(model, ranges, spec.seed), labels, notes


def _with_kept(
    request: Request, model: OnnxModel, cases: Sequence[Case], notes: list[str]
) -> tuple[Sequence[Case], list[str]]:
    """The cases, and behind them those that a search found earlier."""
    path = kept_inputs.file_of(request, model)
    found = kept_inputs.read(path, model)
    if path is None or not found:
        return cases, notes
    shown = kept_inputs.shown(path)
    if isinstance(request.parity.reference, golden_samples.Golden):
        return cases, [*notes, f"the inputs kept in {shown} were not judged: the reference has no outputs of them"]
    kept_inputs.check_shapes(path, request.declared_for(model) | model_inputs.profile(model, {}, cases), found)
    which = f"inputs [{len(cases)}]" + (f" to [{len(cases) + len(found) - 1}]" if len(found) > 1 else "")
    return [*cases, *found], [*notes, f"{which} come from {shown}, where an earlier search kept what it found"]


def lowered(
    settings: Settings,
    request: Request,
    model: OnnxModel,
    cases: Sequence[Case],
    existing: ExistingEngine | None = None,
) -> Known:
    """The model in its precision. That TensorRT has no place for a model says more than that it cannot be lowered."""
    reference = _reference(settings, request, model)
    if existing is not None or settings.is_served(request):
        # Whoever built it lowered the model, nobody here knows how.
        as_it_is = Lowered(model.path, model.sha256, taken_as_it_is=True)
        system = existing or settings.system(request)
        return Known(request, model, as_it_is, cases, reference, existing, system=system)
    try:
        return Known(request, model, _lowered(settings, request, model), cases, reference)
    except (ModelError, CalibrationError):
        as_it_is = Lowered(model.path, model.sha256)
        _accepted(settings, settings.system(request), as_it_is, model, request, will_build=False)
        raise


def existing_engine(settings: Settings, request: Request) -> ExistingEngine | None:
    """The engine that a request names, looked up as models are, and what loads it; None where one is to be built.

    It is read, not loaded: that it is of another TensorRT, or for another GPU, is an error before anything else.
    """
    named = request.parity.engine
    if named is None:
        return None
    from pytest_trtcheck.backends.tensorrt import existing, plan_file

    file = plan_file.opened(Opening(request.folders, settings.cache).path(named, "engine file"), named, settings.cache)
    return existing.find(file, settings.backend_of(request), settings.machine)


def _accepted(
    settings: Settings, system: Backend, lowered: Lowered, model: OnnxModel, request: Request, *, will_build: bool
) -> Acceptance:
    """What a system says of a model that it takes; where nothing is compared, all that stands against one is told."""
    found = system.accepts(
        lowered,
        model.label,
        request.build_options,
        settings.cache,
        will_build=will_build and not settings.build_only,
    )
    found = found.complete() if settings.build_only else found
    found.require()
    return found


def _lowered(settings: Settings, request: Request, model: OnnxModel, precision: Precision | None = None) -> Lowered:
    if request.lowered is not None and precision in {None, request.precision}:
        return request.lowered
    return lower(
        model,
        precision or request.precision,
        settings.cache,
        keep_fp32=request.parity.keep_fp32,
        exclude=request.parity.exclude,
        calibration=request.calibration,
        folders=request.folders,
        io=request.build_options.io,
    )


def _reference(settings: Settings, request: Request, model: OnnxModel) -> AnyReference:
    given = request.parity.reference

    def made() -> AnyReference:
        if given is None:
            return Reference(model, settings.cache, settings.reference_provider)
        return reference_given(
            given, model, request.folders, settings.cache, settings.reference_provider, examples=request.examples
        )

    if settings.kept_open is None:
        return made()
    found: AnyReference = settings.kept_open.get(("reference", model.sha256, id(given)), made)
    found.keeps = False
    return found


# --- the engine ------------------------------------------------------------------------------------------------------


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
    problem = system.why_not(known.precision, op_types)
    will_build = system.builds and problem is None
    found = _accepted(settings, system, known.lowered, known.model, known.request, will_build=will_build)
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


def _placed_engine(known: Known, existing: ExistingEngine) -> Known:
    """An engine that exists with what its file, and what lies beside it, say."""
    file, stated = existing.file, existing.file.stated_precision
    if stated is not None and known.request.parity.states_precision and not _are_one(stated, known.precision):
        raise ModelError(
            f"{file.label}: precision={known.precision}, and the manifest beside it says {stated}",
            "leave precision= out, or name the engine of that precision",
        )
    if not known.request.parity.states_precision and file.stated_precision in PRECISIONS:
        known = known.in_precision(file.stated_precision)
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
        if known.request.judge_parity and not _decides_alone(known.request.parity.tol):
            raise ArgumentError(
                f"{known.model.label}: what {known.system.title} computes in is not known, and neither precision= nor "
                "tol= is given",
                'say what it was built in, @trt_parity("model.onnx", precision="fp16"), or give a limit, tol=',
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
        named = settings.backend_of(known.request) != backends.AUTO
        wanted = settings.requested is not None and settings.requested.supports(known.precision) is False
        if named or system.runs or settings.build_only or wanted:
            raise known.unsupported()
        return known.recorded(f"not compiled for {system.builds_for}: {known.problem}")
    if settings.build_only and not system.builds and not settings.only_judges(known.request):
        raise UnsupportedTargetError(f"--trt-build-only: {system.no_engine}", "name the GPU: --trt-gpu=A100")
    if not system.builds:
        return known
    try:
        with _getting_ready(settings, known):
            found = system.build(known.spec(system), settings.cache)
    except BuildError as error:
        raise BuildError(error.message, _advice(settings, known, error)) from error
    compiled_for = None if system.runs else system.builds_for
    return replace(known, built=found).recorded(engine=found.record, compiled_for=compiled_for)


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
    elif known.built is None:
        found = f"{known.title}: no problem found by {known.judged_by}; no engine was built: --trt-gpu=A100 builds one"
    return known.recorded(verdict="not_measured", message=f"--trt-build-only: {found}")


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
        pool.submit(known.system.start)
        pool.submit(compute)
        yield


def loaded_by(settings: Settings, system: Backend, built: Built) -> Runner:
    """What runs a built engine; none does once one has broken CUDA in this process."""
    if settings.broken and system.gpu is not None:
        raise GpuError(f"no engine can run: {settings.broken[0]}", "run this test in a process of its own")
    if settings.kept_open is None:
        return system.load(built)
    found: Runner = settings.kept_open.get((system.name, built.path, built.spec.precision), lambda: system.load(built))
    return found


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
    if request.judge_parity and system.is_the_source(known.precision) and isinstance(known.reference, SourceReference):
        raise ArgumentError(
            f"reference=SOURCE: {system.title} on the CPU in {known.precision} is what that computes: it would be "
            "compared with itself",
            "leave reference= out: the export's outputs on ONNX Runtime are the reference then",
        )
    _refuse_wrong_evidence(system)
    found = known.built if system.builds else system.build(known.spec(system), settings.cache)
    assert found is not None
    started = time.perf_counter()
    runner = loaded_by(settings, system, found)
    load_ms = 1000 * (time.perf_counter() - started) if system.loads and not system.is_emulation else None
    return replace(known, built=found, runner=runner, load_ms=load_ms).recorded(
        backend=system.name, evidence=system.evidence, gpu_ran=system.gpu_ran
    )


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
        )


def _refuse_wrong_evidence(system: Backend) -> None:
    """No system of another package's may count as a GPU's work where there was none."""
    claims = system.evidence == "engine" or system.gpu_ran is True
    if system.evidence not in get_args(Evidence) or (claims and system.gpu is None):
        raise ArgumentError(
            f"backend {system.name!r} says evidence = {system.evidence!r} and gpu_ran = {system.gpu_ran!r}, and names "
            "no GPU that it ran on",
            "say 'provider' or 'emulated', or set `gpu` to the machine's",
        )


# --- what it computes, and how fast ----------------------------------------------------------------------------------


def inspected(settings: Settings, known: Known) -> Known:
    """What the loaded engine tells of itself."""
    del settings
    if known.runner is None or known.built is None:
        return known
    engine = known.running.described(known.built, known.runner) or known.record.engine
    serving = known.running.serving(known.runner)
    known = known.recorded(*known.running.notes(known.built, known.runner), engine=engine, server=serving)
    return known if known.existing is None else _with_precision_read(known, known.existing.file)


def _with_precision_read(known: Known, file: PlanFile) -> Known:
    """An engine that exists with what its layers compute in, which what is stated must not contradict.

    Raises
    ------
    ModelError, ArgumentError
        It does; or the engine does not tell, and nothing else does.
    """
    from pytest_trtcheck.backends.tensorrt.existing import layers_shown, precisions_read

    engine, spec = known.record.engine, known.request.parity
    assert engine is not None
    layers = engine.layers_by_precision or {}
    read = precisions_read(file.label, layers)
    stated = known.precision if not known.has_unknown_precision else None
    if not read:
        if stated is None and not _decides_alone(spec.tol):
            raise ArgumentError(
                f"{file.label}: the engine does not tell what it computes in (it was built without detailed "
                "profiling), and neither precision= nor tol= is given",
                "give one, or build it with ProfilingVerbosity.DETAILED (trtexec --profilingVerbosity=detailed)",
            )
        shown = "the precision is not known" if stated is None else f"{stated} is stated, not proved"
        note = f"{shown}: the engine inspector tells no layer's type"
        return known.recorded(note, engine=replace(engine, proved=False), precision=stated and known.shown_precision)
    if stated is not None and stated not in read:
        by = "precision=" if spec.states_precision else "the manifest beside it says "
        raise ModelError(
            f"{file.label}: {by}{stated}, and the engine computes in {read[0]}: the engine inspector lists "
            f"{layers_shown(layers)}",
            "leave precision= out, or build the engine again" if spec.states_precision else "export the engine again",
        )
    if stated is None:
        exact = read[0]
        if exact == "fp32":
            exact = known.system.computes_in("fp32") if known.model.op_types & MATRIX_OPERATORS else "fp32"
        known = known.in_precision(exact)
    note = f"{known.computed_in} was read from the engine: {layers_shown(layers)}"
    return known.recorded(note, engine=replace(engine, proved=True), precision=known.shown_precision)


def _decides_alone(tol: object) -> bool:
    """Whether a tolerance leaves nothing to the default of a precision."""
    return isinstance(tol, float) or (isinstance(tol, Tolerance) and bool(tol.limits or tol.metrics))


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
        if known.request.judges_outputs or doubt:
            # Where a score alone is asked for, one case shows how far off what is doubted is.
            judged = known if known.request.judges_outputs else replace(known, cases=known.cases[:1])
            outcome = parity.judge(judged)
    known = _with_partition(known)
    if outcome is None:
        return known
    if outcome.record.verdict == "pass":
        known, doubt = _at_once(known, doubt)
    outcome = replace(outcome, record=replace(outcome.record, keep_fp32=known.fewest))
    if doubt is not None:
        outcome = replace(outcome, record=replace(outcome.record, verdict="fail", reason=doubt))
    return replace(known, outcome=outcome, doubt=doubt).recorded(*outcome.notes, parity=outcome.record)


def _at_once(known: Known, doubt: str | None) -> tuple[Known, str | None]:
    """Whether requests that are made together give what each gives alone, of what takes several at once."""
    assert known.runner is not None
    with known.alone():
        found = known.running.at_once(known.runner, known.cases)
    if found is None:
        return known, doubt
    apart = max(map(parity.apart, found.alone, found.together), default=0.0)
    note = f"{found.note}; an answer lies up to {apart:.3g} from that of the same request alone"
    server = known.record.server
    if server is not None:
        batches = None if found.batches is None else {str(size): count for size, count in found.batches.items()}
        server = replace(server, at_once=len(found.together), difference=apart, batches=batches)
    known = known.recorded(note, server=server)
    return known, doubt or parity.unlike_alone(known, found)


def _with_partition(known: Known) -> Known:
    """With how the system divided the model; what was asked of that and could not be looked at is said."""
    assert known.built is not None
    assert known.runner is not None
    found, most = known.running.partition(known.built, known.runner), known.request.parity.max_subgraphs
    unchecked = () if most is None else (f"max_subgraphs={most} was not checked: {known.running.title}",)
    if found is None:
        return known.recorded(*(f"{said} does not divide a model" for said in unchecked))
    alone = () if found.subgraphs else unchecked
    return known.recorded(*(f"{said} runs node by node" for said in alone), partition=found)


def costed(settings: Settings, known: Known) -> Known:
    """What it takes beside time, once it has run; of an engine that does not run here, what building it told."""
    del settings
    engine = known.record.engine
    found: dict[str, float | None] = {}
    if engine is not None:
        memory = engine.device_memory_bytes
        found |= {"engine_mib": engine.bytes / 2**20, "memory_mib": None if memory is None else memory / 2**20}
        found["build_s"] = engine.build_s if engine.source is None else None
    if known.runner is not None and known.built is not None:
        instances = known.request.latency.instances if known.request.latency else 1
        found |= known.running.costs(known.built, known.runner, instances)
        found["load_ms"] = known.load_ms
    costs = {name: value for name, value in found.items() if value is not None}
    return known.recorded(costs=costs or None)


def scored(settings: Settings, known: Known) -> Known:
    """How well it still does its task; of what does not compute the same twice, nothing can be said."""
    spec = known.request.parity.score
    if spec is None or known.runner is None or known.doubt is not None:
        return known
    settings.progress(f"{known.title}: scoring {plural(len(known.labels), 'case')}")
    return known.recorded(score=scoring.judge(known, spec, keeps_items=settings.baselines is not None))


def explained(settings: Settings, known: Known) -> Known:
    """Who is to blame for a failure; beside an engine's errors, those that its emulation has."""
    if known.outcome is None or known.doubt is not None:
        return known
    # What a plugin computes, nothing here can compute in pieces.
    if known.outcome.record.verdict == "fail" and not known.outcome.misplaced and not known.plugin_operators:
        if any(map(parity.is_joint, parity.limits_of(known).values())):
            known = known.recorded(
                "not diagnosed: detections are compared as sets, which no tensor inside the model is"
            )
        else:
            known = blame.blamed(settings, known)
    if known.running.is_emulation or known.is_given or not settings.emulate_too:
        return known
    if computes_the_reference(known.lowered, known.computed_in):
        return known
    with closing(Emulated(known.model, known.lowered, known.computed_in, settings.cache)) as emulated:
        return known.recorded(parity=parity.with_emulation(known, emulated))


def watched(settings: Settings, known: Known) -> Known:
    """What the watcher says; what goes wrong there never hides what the check found."""
    watch = known.request.watch
    if watch is None:
        return known
    score, is_kept = known.record.score, known.outcome is not None and known.outcome.record.verdict == "fail"
    if score is not None and is_bad(score.verdict) and not is_kept:
        known = known.recorded(f"no failure bundle holds the score {score.name}: it is code; run the test itself again")
    if known.outcome is None:
        return known
    try:
        with known.alone():
            return known.recorded(*watch(known))
    except CheckError as error:
        note_broken(settings, known.request, error)
        return known.recorded(str(error))


def _refuse_the_same(known: Known, other: ServerRecord | None, precision: Precision) -> None:
    """What a served model is compared with for speed must not be that model itself."""
    own = known.record.server
    if own is not None and other is not None and (own.model, own.version) == (other.model, other.version):
        raise ArgumentError(
            f"min_speedup={{{precision!r}: …}}: the server's model {own.model!r} would be compared with itself",
            "name the models by their precision: --trt-triton-url=http://localhost:8000/{model}_{precision}",
        )


def timed(settings: Settings, known: Known) -> Known:
    """How fast it is; of several systems each is measured, whether a budget holds or not."""
    spec = known.request.latency or (latency.COMPARED if known.request.parity.is_compared else None)
    if spec is None:
        return known

    def load_again() -> Runner:
        assert known.built is not None
        assert known.runner is not None
        known.running.keep(known.built, known.runner)
        return loaded_by(settings, known.running, known.built)

    record = latency.judge(settings, known, spec, lambda name: _rival(settings, known, name), load_again)
    missed = [
        f"{entry.name} was not measured: {entry.text}"
        for entry in record.budgets
        if entry.verdict == "not_measured" != record.verdict and entry.name != BASELINE
    ]
    return known.recorded(*latency.notes(record), *missed, latency=record)


def _rival(settings: Settings, known: Known, name: str) -> latency.Rival:
    """What `min_speedup` compares with: the model's engine in another precision, or another system.

    Raises
    ------
    UnsupportedTargetError
        That can't be measured beside it.
    """
    if name in PRECISIONS:
        return _loaded_rival(settings, known, known.system.builder, name)
    try:
        system = backends.load(name).find(settings.machine)
    except CheckError as error:
        raise UnsupportedTargetError(error.message, error.hint) from error
    if system.name == known.running.name:
        raise UnsupportedTargetError(f"{system.title} is what was checked itself")
    if not system.is_timed or system.gpu is None or known.running.gpu is None:
        slow = system if system.gpu is None else known.running
        raise UnsupportedTargetError(f"{slow.title} is not measured on the GPU here")
    precision = known.computed_in
    if system.why_not(precision, known.model.op_types) is not None:
        precision = half_part(precision) or "fp32"
    plain = replace(known.request.parity, precision=(precision,), keep_fp32=(), keep_auto=False, exclude=())
    system.admit(known.model, plain, known.request.build_options)
    rival = _loaded_rival(settings, known, system, precision)
    # One that does not do what it is named after would make a slow rival, and any engine fast.
    with known.alone():
        doubt = system.doubt(rival.built, rival.runner, known.cases[0])
    if doubt is not None:
        rival.runner.close()
        raise UnsupportedTargetError(doubt)
    return rival


def _loaded_rival(settings: Settings, known: Known, system: Backend, precision: Precision) -> latency.Rival:
    lowered = None if system.is_server else _lowered(settings, known.request, known.model, precision)
    built = system.build(known.spec(system, lowered, precision), settings.cache)
    runner = loaded_by(settings, system, built)
    _refuse_the_same(known, system.serving(runner), precision)
    return latency.Rival(system, runner, f"{system.title} in {precision}", built)


def kept(settings: Settings, known: Known) -> Known:
    """What running the engine brought is kept beside it."""
    del settings
    if known.runner is not None and known.built is not None:
        known.running.keep(known.built, known.runner)
    return known


def profiled(settings: Settings, known: Known) -> Known:
    """What each layer takes, where latency was measured or it is asked for: last of all, to disturb nothing."""
    engine, runner, measured = known.record.engine, known.runner, known.record.latency
    wanted = settings.time_layers or (measured is not None and measured.samples > 0)
    if not wanted or engine is None or runner is None or known.running.gpu is None:
        return known
    if settings.kept_open is not None:
        return known.recorded(engine=replace(engine, layers_untimed="the engine serves further examples"))
    with known.alone():
        found, disturbed = latency.while_watched(
            known.running.gpu, lambda: known.running.profiled(engine, runner, known.cases[0])
        )
    # What somebody else slowed down says nothing of a layer.
    return known.recorded(engine=replace(engine, layers_untimed=disturbed[0]) if disturbed else found)


def rebuilt(settings: Settings, known: Known) -> Known:
    """What further builds of the engine come to, where they are asked for; the worst of all is what is concluded on."""
    again = (loaded, inspected, compared, scored, costed, timed, profiled)
    return judged_again(settings, known, again, (explained, watched))


def concluded(settings: Settings, known: Known) -> Known:
    """The verdict, and what is to be read first; under `--trt-require-gpu`, what no GPU ran or measured fails."""
    known = known.recorded(verdict=combine([part.verdict for part in known.record.parts.values()]))
    return known.recorded(**message.conclusion(known, require_gpu=settings.require_gpu))


def proved(settings: Settings, known: Known) -> Known:
    """Under `--trt-require-evidence`, whether the same check passed on a GPU: what did not, fails."""
    if settings.evidence is None:
        return known
    model = settings.judged_gpu()
    assert model is not None
    spec = known.request.latency
    limits = latency.budgets_for(spec, model, settings.extra_gpus).limits if spec else {}
    built_by = " ".join(next(iter(known.system.versions().items()))) if known.built and known.system.builds else None
    wanted = evidence.Wanted(known.record, model, limits, built_by, settings.extra_gpus)
    found = evidence.proof(wanted, settings.evidence)
    if not isinstance(found, str):
        return known.recorded(proof=found)
    reason = f"--trt-require-evidence={settings.evidence.file}: {found}"
    if is_bad(known.record.verdict):
        return known.recorded(reason)
    return known.recorded(verdict="fail", message="\n".join(filter(None, (reason, known.record.message))))


BUILDING: Sequence[Step] = (placed, built, rebuilt, nothing_compared)
CHECKING: Sequence[Step] = (
    *(placed, built, loaded, inspected, compared, searched, scored, costed),
    *(explained, watched, timed, kept, profiled, rebuilt, held, concluded, proved),
)
