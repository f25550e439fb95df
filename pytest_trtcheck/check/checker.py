"""The use case: a request becomes a record.

A check flows one way: spec → model and inputs → reference and lowered model → engine or emulation → outputs and samples
→ verdicts → record.
"""

from __future__ import annotations

import functools
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.backends.tensorrt import cached as engines
from pytest_trtcheck.check import blame as blaming
from pytest_trtcheck.check import parity
from pytest_trtcheck.check.acceptance import Acceptance, acceptance
from pytest_trtcheck.check.latency import Judge, Ledger
from pytest_trtcheck.check.request import Job, Judged, Request
from pytest_trtcheck.errors import (
    ArgumentError,
    CalibrationError,
    CheckError,
    GpuError,
    ModelError,
    UnsupportedTargetError,
    name_of,
)
from pytest_trtcheck.latency import baselines
from pytest_trtcheck.model import inputs as model_inputs
from pytest_trtcheck.model.sources import computes_outputs, open_model
from pytest_trtcheck.precision.emulation import Emulated, computes_the_reference, emulation
from pytest_trtcheck.precision.lowering import Lowered, lower
from pytest_trtcheck.precision.reference import CallableReference, ModelReference, Reference, reference_given
from pytest_trtcheck.record import CheckRecord, LatencyRecord, combine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.backends.base import Runner
    from pytest_trtcheck.backends.tensorrt.cached import Built, Place
    from pytest_trtcheck.backends.tensorrt.engine import Engine
    from pytest_trtcheck.cache import Cache
    from pytest_trtcheck.gpu import GpuModel
    from pytest_trtcheck.gpu.device import Gpu
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.model.onnxruntime import OrtRunner, Provider
    from pytest_trtcheck.precision.reference import AnyReference
    from pytest_trtcheck.record import Evidence
    from pytest_trtcheck.spec import Backend, InputMapping, Precision

__all__ = ["Request", "Workshop"]


@dataclass(frozen=True)
class Workshop:
    """Makes checks with what holds for the whole session.

    Parameters
    ----------
    requested
        The GPU that `--trt-gpu` names.
    detected
        The GPU in this machine; `no_gpu_reason` says why there is none.
    extra_gpus
        The GPUs of the ini key `trt_gpus`.
    bitwise
        Whether an engine must compute the same bits in every run.
    emulate_too
        Whether an engine's errors are wanted beside the emulated model's, even where the check passes.
    allowance
        What saying why checks failed may cost.
    progress
        Is told, in a line each, what takes long.
    ledger
        What latency is held against.
    broken
        Why no engine can run any more in this process, once one has broken CUDA; empty until then.
    """

    cache: Cache
    backend: Backend = "auto"
    reference_provider: Provider = "cpu"
    requested: GpuModel | None = None
    detected: Gpu | None = None
    no_gpu_reason: str | None = None
    extra_gpus: Sequence[GpuModel] = ()
    require_gpu: bool = False
    build_only: bool = False
    bitwise: bool = False
    emulate_too: bool = False
    allowance: blaming.Allowance = field(default_factory=blaming.Allowance)
    progress: Callable[[str], None] = lambda _: None
    ledger: Ledger = field(default_factory=Ledger)
    broken: list[str] = field(default_factory=list)

    def judged_gpu(self) -> GpuModel | None:
        """The GPU whose budgets apply: the real one, else the one that is named."""
        if self.detected is None:
            return self.requested
        from pytest_trtcheck.gpu.device import require_match

        return self.detected.model if self.requested is None else require_match(self.requested, self.detected)

    # --- what fixtures use -------------------------------------------------------------------------------------------

    def reference(self, model: object, folders: Sequence[Path], custom_ops: Sequence[str] = ()) -> Reference:
        """The FP32 model as a callable."""
        opened = open_model(self.open_model(model, folders), (), self.cache, custom_ops)
        return Reference(opened, self.cache, self.reference_provider)

    def runner(self, request: Request) -> Runner:
        """The model in its precision, ready to run: the engine, or without a GPU its emulation."""
        model = self._open(request)
        reference = self._reference(request, model)
        lowered = self._lowered_or_refused(request, model, reference)
        job = Job(request, model, lowered, (), reference, self._place(request)[0])
        problem = _why_not(job)
        job = replace(job, plugin_operators=self._accepted(job, problem).plugin_operators)
        if job.place is None or job.place.gpu is None:
            if job.plugin_operators:
                raise UnsupportedTargetError(_plugins_need_gpu(job), "run it on a machine with the GPU")
            runner = emulation(model, job.lowered, job.precision, self.cache)
            return _Declared(runner, functools.partial(request.admit, model, source="inputs"))
        if problem is not None:
            raise _unsupported(job, job.place, problem)

        def open_for(case: Case) -> Engine:
            request.admit(model, case, "inputs")
            asked = replace(job, cases=[case])
            return self._load(asked, self._build(asked))

        return engines.EngineByShape(open_for)

    def open_model(self, source: object, folders: Sequence[Path]) -> OnnxModel:
        """The model that a marker or fixture names."""
        if source is None:
            raise ModelError(
                "no model is named",
                'name it in the marker, @trt_parity("model.onnx"), or override the fixture trt_model',
            )
        return open_model(source, folders, self.cache)

    def _open(self, request: Request) -> OnnxModel:
        model = self.open_model(request.model, request.folders)
        return open_model(model, (), self.cache, request.build_options.custom_ops)

    # --- the check ---------------------------------------------------------------------------------------------------

    def check(self, request: Request) -> CheckRecord:
        """Make one check. What the user got wrong becomes a record with the verdict `error`, never a traceback."""
        start = time.perf_counter()
        record = CheckRecord(
            nodeid=request.nodeid,
            model=_label(request.model),
            verdict="error",
            precision=request.precision,
            seed=request.parity.seed,
            inputs=request.inputs_source,
            reference=_reference_label(request.parity.reference),
        )
        try:
            model = self._open(request)
            record = replace(record, model=model.label, model_sha256=model.sha256)
            record = self._check(request, model, record)
        except CheckError as error:
            self._note_broken(error, request)
            record = replace(record, verdict="error", message=str(error))
        return replace(record, duration_s=time.perf_counter() - start)

    def _note_broken(self, error: CheckError, request: Request) -> None:
        if isinstance(error, GpuError) and error.poisoned and not self.broken:
            self.broken.append(f"{request.nodeid} broke CUDA in this process: {error.message.splitlines()[0]}")

    def _check(self, request: Request, model: OnnxModel, record: CheckRecord) -> CheckRecord:
        if request.judge_parity:
            parity.refuse_random(model)
        cases, notes = _cases(request, model)
        if request.judge_parity:
            parity.refuse_empty(cases)
        reference = self._reference(request, model)
        lowered = self._lowered_or_refused(request, model, reference)
        record = replace(record, cases=len(cases), notes=(*notes, *lowered.notes))
        place, reason = self._place(request)
        job = Job(request, model, lowered, cases, reference, place)
        problem = _why_not(job)
        taken = self._accepted(job, problem)
        job = replace(job, plugin_operators=taken.plugin_operators)
        record = replace(record, precision=job.shown_precision, notes=(*record.notes, *taken.notes))
        if place is not None and job.computed_in != job.precision:
            note = (
                f"{place.module.title} has no FP32 matrix products: it computes in TF32, and is judged by TF32's limit"
            )
            record = replace(record, notes=(*record.notes, note))
        if place is not None:
            if problem is None:
                with self._getting_ready(job):
                    built = self._build(job)
                job = replace(job, built=built)
                record = replace(record, engine=built.record, compiled_for=None if place.gpu else place.name)
            else:
                self._refuse_if_needed(job, place, problem)
                record = replace(record, notes=(*record.notes, f"not compiled for {place.name}: {problem}"))
        elif self.build_only:
            raise ArgumentError(f"--trt-build-only: {reason}", "name the GPU: --trt-gpu=A100")
        if self.build_only:
            return replace(record, verdict="not_measured", message="--trt-build-only: built, nothing compared")
        if place is not None and place.gpu is not None and job.built is not None:
            try:
                record = self._on_gpu(job, job.built, place, record)
            except CheckError as error:
                # With the engine named: it failed, whatever other checks say of it.
                self._note_broken(error, request)
                return replace(record, verdict="error", message=str(error))
        else:
            record = self._emulated(job, record)
        parts = [part for part in (record.parity, record.latency) if part is not None]
        return self._concluded(replace(record, verdict=combine([part.verdict for part in parts])))

    def _lowered(self, request: Request, model: OnnxModel, precision: Precision | None = None) -> Lowered:
        if request.lowered is not None and precision in {None, request.precision}:
            return request.lowered
        return lower(
            model,
            precision or request.precision,
            self.cache,
            keep_fp32=request.parity.keep_fp32,
            calibration=request.calibration,
            folders=request.folders,
        )

    def _lowered_or_refused(self, request: Request, model: OnnxModel, reference: AnyReference) -> Lowered:
        """The lowered model. That TensorRT has no place for a model says more than that it cannot be lowered."""
        try:
            return self._lowered(request, model)
        except (ModelError, CalibrationError):
            as_it_is = Lowered(model.path, model.sha256)
            self._accepted(Job(request, model, as_it_is, (), reference), None)
            raise

    def _accepted(self, job: Job, problem: str | None) -> Acceptance:
        """What TensorRT says of the model before anything is built.

        Raises
        ------
        ModelError
            It does not take it.
        """
        found = acceptance(
            job.lowered,
            job.model.label,
            job.request.parity.backend or self.backend,
            job.request.build_options,
            self.cache,
            builds=job.place.module if job.place is not None and problem is None else None,
        )
        found.require()
        return found

    def _reference(self, request: Request, model: OnnxModel) -> AnyReference:
        given = request.parity.reference
        if given is None:
            return Reference(model, self.cache, self.reference_provider)
        return reference_given(given, model, request.folders, self.cache, self.reference_provider)

    def _place(self, request: Request) -> tuple[Place | None, str]:
        return engines.place_for(request.parity.backend or self.backend, self.requested, self.detected)

    def _refuse_if_needed(self, job: Job, place: Place, problem: str) -> None:
        """An engine that cannot be built is an error, unless it was only to be compiled along the way.

        With `auto` and no GPU, what this TensorRT-RTX cannot compile says nothing about the TensorRT that is deployed.
        """
        backend = job.request.parity.backend or self.backend
        asked = backend != "auto" or self.build_only or place.gpu is not None
        if asked or (self.requested is not None and self.requested.supports(job.precision) is False):
            raise _unsupported(job, place, problem)

    def _build(self, job: Job, *, precision: Precision | None = None, lowered: Lowered | None = None) -> Built:
        """The engine of a job, or of the same job in another precision."""
        assert job.place is not None
        order = engines.Order(
            job.model,
            lowered or job.lowered,
            precision or job.precision,
            job.profile(),
            job.request.build_options,
        )
        return engines.build(order, job.place, self.cache)

    @contextmanager
    def _getting_ready(self, job: Job) -> Iterator[None]:
        """Beside the build, which is another process's work, get ready what a GPU will need: CUDA and the reference.

        Without a GPU the memory counts more than the time: nothing else is in it while the model is lowered.
        """
        if job.place is None or job.place.gpu is None or self.build_only or self.broken:
            yield
            return
        reference = job.reference
        # A callable of the user's is not kept, and may not like another thread.
        wanted = job.request.judge_parity and not isinstance(reference, CallableReference)

        def compute() -> None:
            # What is wrong with it is said when it is asked for in earnest.
            with suppress(CheckError):
                for case in job.cases if wanted else ():
                    reference(case)

        with ThreadPoolExecutor(2, "trtcheck") as pool:
            pool.submit(engines.start_cuda)
            pool.submit(compute)
            yield

    def _load(self, job: Job, built: Built) -> Engine:
        assert job.place is not None
        if self.broken:
            raise GpuError(f"no engine can run: {self.broken[0]}", "run this test in a process of its own")
        return engines.load(built, job.place, job.request.build_options)

    # --- without a GPU -----------------------------------------------------------------------------------------------

    def _emulated(self, job: Job, record: CheckRecord) -> CheckRecord:
        request = job.request
        if request.latency is not None:
            record = replace(record, latency=self._no_latency())
        if not request.judge_parity:
            return record
        if computes_the_reference(job.lowered, job.computed_in) and request.parity.reference is None:
            reason = "fp32 can only be checked on a GPU: without one, the reference would be compared with itself"
            return replace(record, parity=parity.not_measured(request.parity, reason).record)
        if job.plugin_operators:
            return replace(record, parity=parity.not_measured(request.parity, _plugins_need_gpu(job)).record)
        _refuse_itself(job)
        runner = emulation(job.model, job.lowered, job.computed_in, self.cache)
        try:
            reference = job.reference
            outcome = self._blamed(job, parity.judge(job, runner, reference), runner, reference)
            record = _with(replace(record, backend="onnxruntime", evidence="emulated"), outcome)
            return self._watched(Judged(job, runner, reference, outcome.record), record)
        finally:
            runner.close()

    def _blamed(self, job: Job, outcome: parity.Outcome, runner: Runner, reference: AnyReference) -> parity.Outcome:
        # What a plugin computes, nothing here can compute in pieces.
        if outcome.record.verdict != "fail" or outcome.explained or job.plugin_operators:
            return outcome
        return blaming.blamed(
            job, outcome, runner, reference, self.cache, allowance=self.allowance, progress=self.progress
        )

    def _watched(self, judged: Judged, record: CheckRecord) -> CheckRecord:
        """The record with what the watcher says; what goes wrong there never hides what the check found."""
        request = judged.job.request
        if request.watch is None:
            return record
        try:
            with blaming.alone_on_gpu(judged.job) if record.evidence == "engine" else nullcontext():
                notes = request.watch(judged)
        except CheckError as error:
            self._note_broken(error, request)
            notes = (str(error),)
        return replace(record, notes=(*record.notes, *notes))

    def _no_latency(self) -> LatencyRecord:
        gpu = self.requested.product if self.requested else None
        where = "no GPU in this machine" if gpu is None else f"no {gpu} in this machine"
        if self.detected is not None:
            where = "no engine ran"
        return LatencyRecord("not_measured", where, gpu)

    # --- on the GPU --------------------------------------------------------------------------------------------------

    def _on_gpu(self, job: Job, built: Built, place: Place, record: CheckRecord) -> CheckRecord:
        engine = self._load(job, built)
        try:
            record = replace(
                record,
                backend=place.module.name,
                evidence="engine",
                engine=replace(
                    built.record,
                    device_memory_bytes=engine.device_memory_bytes,
                    layers_by_precision=engine.layers_by_precision(),
                ),
            )
            if engines.is_stated_alone(engine, job.precision):
                note = f"{job.precision} is stated, not proved: the engine inspector tells no layer's type"
                record = replace(record, notes=(*record.notes, note))
            reference = job.reference
            outcome = None
            with blaming.alone_on_gpu(job):
                # An engine is not trusted, and not timed, before it was seen to compute the same twice.
                doubt = engines.precision_not_in_effect(
                    engine, job.precision, job.lowered, job.cases[0]
                ) or parity.unstable(engine, job.cases[0], job.computed_in, bitwise=self.bitwise)
                if job.request.judge_parity or doubt:
                    outcome = parity.judge(job, engine, reference)
            if outcome is not None:
                outcome = self._explained(job, outcome, engine, reference, doubt=doubt)
                record = self._watched(Judged(job, engine, reference, outcome.record), _with(record, outcome))
            if job.request.latency is not None:
                found = self._latency(job, engine)
                record = replace(record, latency=found, notes=(*record.notes, *baselines.notes(found)))
            engines.keep_kernels(built, engine)
        finally:
            engine.close()
        return record

    def _explained(
        self, job: Job, outcome: parity.Outcome, engine: Engine, reference: AnyReference, *, doubt: str | None
    ) -> parity.Outcome:
        if doubt is not None:
            return replace(outcome, record=parity.failed(outcome.record, doubt), head=f"{job.title}: {doubt}", text="")
        outcome = self._blamed(job, outcome, engine, reference)
        if not self.emulate_too or computes_the_reference(job.lowered, job.computed_in):
            return outcome
        emulated = Emulated(job.model, job.lowered, job.computed_in, self.cache)
        return parity.with_emulation(job, outcome, emulated, reference)

    def _latency(self, job: Job, engine: Engine) -> LatencyRecord:
        judged = self.judged_gpu()
        assert judged is not None
        return Judge(judged, self.extra_gpus, self.ledger, self._load_other).judge(job, engine)

    def _load_other(self, job: Job, precision: Precision) -> Engine:
        other = self._lowered(job.request, job.model, precision)
        return self._load(job, self._build(job, precision=precision, lowered=other))

    # --- the verdict -------------------------------------------------------------------------------------------------

    def _concluded(self, record: CheckRecord) -> CheckRecord:
        """The record with its message; under `--trt-require-gpu`, what no GPU ran or measured fails."""
        parts = {"parity": record.parity, "latency": record.latency}
        reasons = [
            part.reason
            for part in parts.values()
            if part is not None and part.verdict != "pass" and part.reason and record.verdict == part.verdict
        ]
        message = record.message
        if message is None or (record.latency is not None and record.latency.verdict == record.verdict != "pass"):
            message = "\n".join(
                filter(None, [record.message, *(r for r in reasons if r not in (record.message or ""))])
            )
        record = replace(record, message=message or None)
        missing = [f"{name} not measured" for name, part in parts.items() if part and part.verdict == "not_measured"]
        if record.evidence == "emulated":
            missing.append("parity was emulated on the CPU")
        if not self.require_gpu or not missing or record.verdict in {"fail", "error"}:
            return record
        refused = f"--trt-require-gpu: {', '.join(missing)}"
        return replace(record, verdict="fail", message=f"{refused}\n{message}" if message else refused)


def _with(record: CheckRecord, outcome: parity.Outcome) -> CheckRecord:
    return replace(record, parity=outcome.record, message=outcome.message, notes=(*record.notes, *outcome.notes))


def _why_not(job: Job) -> str | None:
    """What is known to stand against building for the place; None where nothing is, or nothing is to be built."""
    if job.place is None:
        return None
    return engines.why_not(job.place, job.precision, job.lowered.op_types(job.model, job.precision))


def _plugins_need_gpu(job: Job) -> str:
    names = ", ".join(job.plugin_operators)
    return f"{job.model.label}: {names} is computed by a plugin, which runs on a GPU alone: none ran here"


def _unsupported(job: Job, place: Place, problem: str) -> UnsupportedTargetError:
    return UnsupportedTargetError(
        f"{job.title} for {place.name}: {problem}", "choose another precision, GPU or TensorRT"
    )


def _label(source: object) -> str:
    if callable(source):
        return f"{name_of(source)}()"
    return str(source) if isinstance(source, (str, Path)) else f"<{type(source).__name__}>"


def _reference_label(source: object) -> str | None:
    if source is None:
        return None
    return name_of(source) if computes_outputs(source) else _label(source)


def _refuse_itself(job: Job) -> None:
    """Without a GPU, a model in FP32 that is its own reference can only agree with itself."""
    reference = job.reference
    is_itself = isinstance(reference, ModelReference) and reference.identity == job.model.sha256
    if is_itself and computes_the_reference(job.lowered, job.computed_in):
        raise ArgumentError(
            f"reference= is {job.model.label} itself, and nothing was lowered: it would be compared with itself",
            "name another model, or a precision to lower it to",
        )


@dataclass(frozen=True)
class _Declared:
    """A runner that takes inputs of the declared shapes alone."""

    runner: OrtRunner
    admit: Callable[[Case], None]

    @property
    def evidence(self) -> Evidence:
        return self.runner.evidence

    def __call__(self, inputs: InputMapping) -> dict[str, NDArray[Any]]:
        self.admit(dict(inputs))
        return self.runner(inputs)

    def close(self) -> None:
        self.runner.close()


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
        return cases, []
    ranges = model_inputs.shape_ranges(model, batch, spec.shapes, default_batch=request.default_batch)
    notes = [f"inputs were generated (seed {spec.seed})"]
    if request.default_batch is not None and batch is None and any(s.free_dims() for s in model.inputs):
        notes.append(f"open batch dimensions were taken as {request.default_batch}")
    return model_inputs.generate(model, ranges, spec.seed), notes
