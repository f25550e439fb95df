"""What is asked for: model, inputs, reference, and the model in its precision."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck import backends
from pytest_trtcheck.backends.tensorrt.options import loaded_files
from pytest_trtcheck.cache import hashed
from pytest_trtcheck.check import evidence, keeping, kept_inputs, parity
from pytest_trtcheck.check.request import Known
from pytest_trtcheck.choices import quantized_part
from pytest_trtcheck.errors import CalibrationError, CheckError, InputError, ModelError, listed
from pytest_trtcheck.model import free_dims, labelled
from pytest_trtcheck.model import golden as golden_samples
from pytest_trtcheck.model import inputs as model_inputs
from pytest_trtcheck.model.labelled import Stream
from pytest_trtcheck.model.sources import Examples, Opening, is_model, open_model
from pytest_trtcheck.precision.lowering import Lowered, carried, lower
from pytest_trtcheck.precision.quantization import coverage
from pytest_trtcheck.precision.quantization.calibration_data import ReadOnce
from pytest_trtcheck.precision.reference import GoldenReference, Reference, first_that_runs, reference_given
from pytest_trtcheck.record import CalibrationRecord, CheckRecord, LoweredRecord
from pytest_trtcheck.spec import Calibration, Tolerance

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from pytest_trtcheck.backends.base import Acceptance, Backend
    from pytest_trtcheck.backends.tensorrt.existing import ExistingEngine
    from pytest_trtcheck.check.request import Request, Settings
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.precision.reference import AnyReference
    from pytest_trtcheck.spec import Precision, Shape


def named_model(
    settings: Settings, source: object, folders: Sequence[Path], examples: Examples | None = None
) -> OnnxModel:
    """The model that a marker or fixture names."""
    if source is None:
        raise ModelError(
            "no model is named",
            'name it in the marker, @trt_parity("model.onnx"), or override the fixture trt_model',
            code="model-unnamed",
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
    """The request with iterators made safe to look into: sources look at the first of the inputs for its shapes, and a
    diagnosis at the calibration data once more.
    """
    if isinstance(request.inputs, Iterator):
        request = replace(request, inputs=Stream(request.inputs))
    given = request.calibration
    usual = given if isinstance(given, Calibration) else Calibration(given)
    if isinstance(usual.data, Iterator):
        once = ReadOnce(usual.data, usual.max_samples)
        request = replace(request, calibration=replace(usual, data=once) if given is usual else once)
    return request


def fed_as_recorded(settings: Settings, request: Request, model: OnnxModel) -> Request:
    """The request with the recorded samples that it names read, and their inputs fed where none are given."""
    if not golden_samples.is_named(request.parity.reference):
        return request
    golden = golden_samples.read(request.parity.reference, model, request.folders, settings.cache)
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
                code="model-unnamed",
            )
        source = reference
    model = named_model(settings, source, request.folders, request.examples)
    for file in loaded_files(request.build_options):
        with suppress(OSError):  # whoever needs it says so
            settings.cache.rest_on(hashed(file))
    return open_model(model, (), settings.cache, request.build_options.custom_ops)


def prepared(settings: Settings, request: Request, model: OnnxModel, record: CheckRecord) -> Known:
    """What a check begins with: inputs, reference and lowered model. Where no engine is built, nothing is fed to it."""
    existing = existing_engine(settings, request)
    if existing is None:
        _expect_build(settings, request, model)
        settings.system(request).admit(model, request.parity, request.build_options)
    compares = request.judge_parity and not settings.build_only
    if compares:
        parity.refuse_random(model)
    cases, labels, notes = ([], [], []) if settings.only_judges(request) else _cases(settings, request, model)
    if compares:
        parity.refuse_empty(cases)
    if request.latency_for is not None and cases:
        batch, source = model_inputs.batch_of(model, cases[0]), f"{request.inputs_source} inputs"
        request = replace(request, latency=request.latency_for(batch, source=source))
    own = len(cases)
    if compares:
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
            return lowered_model(settings, replace(request, parity=parity_spec), model)

        known = keeping.with_fewest(settings, known, keeping_fp32)
    if compares and request.parity.reference is None and known.lowered.integers_alone:
        weights = listed(known.lowered.integers_alone)
        notes = [
            *notes,
            f"the file has only integers of {weights}, and the reference is computed with them: what quantizing them "
            'cost was not compared; name the FP32 original, reference="model.onnx"',
        ]
    of_reference = (*_unfed(settings, known), *getattr(known.reference, "notes", ()))
    notes = [*notes, *_unused_calibration(known)]
    calibration = _calibration(known)
    if calibration is not None and calibration.inputs:
        notes = [*notes, *coverage.notes(calibration.inputs, request.inputs_source)]
    return known.recorded(
        *(*notes, *model.notes, *of_reference, *known.lowered.notes, *_overflowing(known)),
        cases=len(cases),
        inputs_sha256=model_inputs.digest_of(cases) if cases else None,
        reference_sha256=getattr(known.reference, "identity", None),
        asked=evidence.asked(known.request, bitwise=settings.bitwise),
        calibration=calibration,
        # What was made elsewhere was lowered by others.
        lowered=None if known.is_given else _lowered_record(known),
        profile={name: (span.min, span.opt, span.max) for name, span in known.profile().items()} if cases else None,
    )


def _unfed(settings: Settings, known: Known) -> Iterator[str]:
    """What is said of sizes that the profile declares and no input has: an engine may go wrong at those alone."""
    if not known.cases or settings.build_only or settings.kept_open is not None:
        return
    alike: dict[str, list[str]] = {}
    for name, span in known.profile().items():
        for axis, (least, most) in enumerate(zip(span.min, span.max, strict=True)):
            fed = sorted({case[name].shape[axis] for case in known.cases})
            if least < most and not {least, most} <= set(fed):
                sizes = listed(map(str, fed), separator=" and ")
                alike.setdefault(f"{sizes}, of {least} to {most}", []).append(f"{name}[{axis}]")
    if alike:
        seen = (f"{listed(axes, separator=' and ')} {sizes}" for sizes, axes in alike.items())
        yield f"shapes: these sizes alone were checked: {'; '.join(seen)}"


def _expect_build(settings: Settings, request: Request, model: OnnxModel) -> None:
    """Have the builder get ready beside the lowering, where neither that nor an engine of the model is in the cache."""
    if settings.detected is None or settings.broken:
        return
    cache, label, sha256 = settings.cache, model.label, model.sha256
    is_made = cache.remembers("engine", label, lowered=sha256) or cache.remembers(
        "lowered", label, model=sha256, precision=request.precision
    )
    if not is_made:
        backends.load(settings.backend_of(request)).expect_build()


def dismiss_builder(settings: Settings, request: Request) -> None:
    """Let go of the builder, where nothing was built after all."""
    if settings.detected is not None:
        with suppress(CheckError):
            backends.load(settings.backend_of(request)).dismiss_builder()


def _lowered_record(known: Known) -> LoweredRecord:
    made = known.lowered
    spec, path = known.request.parity, str(made.path) if made.path == known.model.path else None
    return LoweredRecord(made.key, known.precision, path, tuple(spec.keep_fp32), tuple(spec.exclude))


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
    method, percentile, samples, rows = (ranges[name] for name in ("method", "percentile", "samples", "rows"))
    found = CalibrationRecord(method, percentile, samples, sha256=digest, rows=rows)
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


def _unused_calibration(known: Known) -> Iterator[str]:
    """That calibration data was given and nothing is calibrated; in FP16 beside INT8 of one test nobody expects it."""
    if known.request.calibration is None or known.is_given or known.lowered.details.get("ranges") is not None:
        return
    if quantized_part(known.precision) is not None:
        yield f"the calibration data is not used: {known.model.label} brings its own scales with it"
    elif known.request.precision_is_default:
        yield f"the calibration data is not used in {known.precision}: --trt-precision=int8 asks for what it is for"


_OTHERS = "each run is given others, or in another order; shuffle=False makes runs comparable"


def _cases(settings: Settings, request: Request, model: OnnxModel) -> tuple[Sequence[Case], list[Any], list[str]]:
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
        notes = [*model_inputs.infinities(cases, source), *model_inputs.zeros(cases, source)]
        if model_inputs.shuffles(request.inputs):
            notes.append(f"{source} come from a loader that shuffles: {_OTHERS}")
        return cases, labels, notes
    if spec.score is not None:
        raise InputError(
            f"score={spec.score.name}: there is nothing to score: neither the test nor trt_inputs gives inputs",
            "return the samples with their labels: [Case(inputs, labels), …], or a loader of batches",
            code="labels-missing",
        )

    def answer(proposed: Sequence[Mapping[str, Shape]]) -> str:
        """What to paste: the likeliest sizes that the model runs with."""
        found = first_that_runs(model, proposed, settings.cache, settings.reference_provider)
        open_first = [each.name for each in model.inputs if each.shape and not isinstance(each.shape[0], int)]
        batches = [size for size in request.batches if size is not None]
        spelled = request.spell_shapes(free_dims.over(found or proposed[0], batches, open_first))
        tried = "which the model runs with" if found else "with sizes that the model takes"
        return f"fix them: {spelled} ({tried}), or give real inputs"

    ranges = model_inputs.shape_ranges(model, batch, spec.shapes, default_batch=request.default_batch, answer=answer)
    notes = [f"inputs were generated (seed {spec.seed}){f': {why}' if (why := request.why_generated) else ''}"]
    if request.default_batch is not None and batch is None and model_inputs.leaves_batch_open(model, spec.shapes):
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
    if request.parity.score is not None:
        return cases, [*notes, f"the inputs kept in {shown} were not judged: they have no labels for the score"]
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
        return Known(request, model, lowered_model(settings, request, model), cases, reference)
    except (ModelError, CalibrationError):
        as_it_is = Lowered(model.path, model.sha256)
        accepted(settings, settings.system(request), as_it_is, model, request, will_build=False)
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


def accepted(
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


def lowered_model(
    settings: Settings, request: Request, model: OnnxModel, precision: Precision | None = None
) -> Lowered:
    """The model in the check's precision, or in another one."""
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
    found: AnyReference = settings.kept_open.get(("reference", model.sha256, _which(given)), made, of=given)
    found.keeps = False
    return found


def _which(reference: object) -> object:
    """What tells a reference from others: each example may name it by a new path, or have it read anew."""
    if isinstance(reference, golden_samples.Golden):
        return reference.sha256
    if isinstance(reference, (str, bytes, os.PathLike)):
        return os.fspath(reference)
    return id(reference)


def decides_alone(tol: object) -> bool:
    """Whether a tolerance leaves nothing to the default of a precision."""
    return isinstance(tol, float) or (isinstance(tol, Tolerance) and bool(tol.limits or tol.metrics))
