"""One check: what it was asked for, what holds for all of them, and what is known of it so far."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from pytest_trtcheck import backends
from pytest_trtcheck.backends.base import EngineSpec, Machine, outputs_of
from pytest_trtcheck.backends.tensorrt.emulated import Emulated
from pytest_trtcheck.errors import CheckError, Code, InputError, UnsupportedTargetError
from pytest_trtcheck.gpu.lock import gpu_lock
from pytest_trtcheck.model import free_dims
from pytest_trtcheck.model import inputs as model_inputs
from pytest_trtcheck.model.sources import Examples
from pytest_trtcheck.precision.arithmetic import MATRIX_OPERATORS
from pytest_trtcheck.record import CheckRecord
from pytest_trtcheck.spec import BuildOptions, LatencySpec, ParitySpec, Precision

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pytest_trtcheck import compare
    from pytest_trtcheck.backends.base import Backend, Built, Runner
    from pytest_trtcheck.backends.tensorrt.existing import ExistingEngine
    from pytest_trtcheck.baselines import Baselines
    from pytest_trtcheck.cache import Cache
    from pytest_trtcheck.check.evidence import EvidenceReport
    from pytest_trtcheck.check.kept_open import KeptOpen
    from pytest_trtcheck.choices import GraphsOf
    from pytest_trtcheck.gpu import GpuModel
    from pytest_trtcheck.gpu.device import Gpu
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.model.onnxruntime import Provider
    from pytest_trtcheck.precision.lowering import Lowered
    from pytest_trtcheck.precision.reference import AnyReference
    from pytest_trtcheck.record import ParityRecord
    from pytest_trtcheck.spec import ShapeRange


@dataclass(frozen=True)
class Request:
    """One check to make.

    Parameters
    ----------
    model
        What the marker or the fixture named; None is an error that says how to name one.
    folders
        Where relative paths are looked up, in this order.
    parity, latency
        The specs, with one precision and one batch; `judge_parity` is False for a test with `trt_latency` alone.
    inputs, inputs_source
        What to feed, and where it came from; None: generated.
    why_generated
        What is said of that beside it.
    batches
        All that were listed beside the one batch of this check.
    spell_shapes
        How whoever asked would give shapes, for messages.
    default_batch
        Taken for open first dimensions that nothing else fixes (files collected without test code).
    precision_is_default
        Whether nobody asked for the precision: a model that carries one is then checked in that.
    lowered
        The model in its precision, where it was made before (a replay); None: it is made.
    search_folder
        Where inputs are kept that a search found, and are taken from; None: nowhere.
    for_gpu
        Which of the several GPUs of `--trt-gpu` it is for, as it is named there.
    latency_for
        Where marks are limited to batches and only the inputs tell theirs: the spec that judges inputs of a batch
        (None: no one batch), for an error with their source in words.
    watch
        Is shown what was compared while the runner is open; the notes that it returns join the record's.
    cut_off
        Is given the record of a failed check whose diagnosis is cut off (Ctrl-C, a limit on a test's time), before the
        exception that does so goes on; None: there is no record then.
    """

    nodeid: str
    model: object
    folders: Sequence[Path]
    parity: ParitySpec = field(default_factory=ParitySpec)
    judge_parity: bool = True
    latency: LatencySpec | None = None
    latency_for: Callable[..., LatencySpec | None] | None = None
    inputs: object = None
    inputs_source: str = "generated"
    why_generated: str = ""
    calibration: object = None
    options: BuildOptions | None = None
    batches: tuple[int | None, ...] = ()
    spell_shapes: Callable[[free_dims.Shapes], str] = free_dims.in_python
    default_batch: int | None = None
    precision_is_default: bool = False
    lowered: Lowered | None = None
    search_folder: Path | None = None
    for_gpu: str | None = None
    watch: Watcher | None = None
    cut_off: Callable[[CheckRecord], None] | None = None

    @property
    def precision(self) -> Precision:
        """The one precision to check."""
        return self.parity.precision[0]

    @property
    def judges_outputs(self) -> bool:
        """Whether the outputs are held to a tolerance, rather than to a score alone, or to nothing."""
        return self.judge_parity and self.parity.judges_outputs

    @property
    def build_options(self) -> BuildOptions:
        """How TensorRT is to build."""
        return self.options or BuildOptions()

    @property
    def examples(self) -> Examples:
        """What a source is told that has no shapes of its own."""
        return Examples(
            model_inputs.unlabelled(self.inputs), self.parity.batch[0] or self.default_batch, self.parity.shapes
        )

    def declared_for(self, model: OnnxModel) -> dict[str, ShapeRange]:
        """The shapes that the check is declared for, by input.

        Raises
        ------
        InputError
            What is declared does not fit the model.
        """
        return model_inputs.declared_ranges(model, self.parity.shapes)

    def admit(self, model: OnnxModel, case: Case, source: str) -> None:
        """See that a case has the shapes, and the batch, that the check is declared for.

        Raises
        ------
        InputError
            It lies outside.
        """
        model_inputs.check_declared(self.declared_for(model), case, source)
        batch = self.parity.batch[0]
        if batch is not None:
            model_inputs.check_is_batch(model, batch, case, source)


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


@dataclass(frozen=True)
class Settings:
    """What holds for all checks of a session.

    Parameters
    ----------
    backend
        What runs the checks that name none.
    machine
        What systems under test find.
    extra_gpus
        The GPUs of the ini key `trt_gpus`.
    time_layers
        Whether the layers of every engine that runs are timed, not only of those that are measured.
    evidence
        What every check must have passed in, on a GPU; None: nothing.
    rebuild
        How many times every engine is built and judged.
    search
        How many inputs are tried in every check to find its worst one; None: as the check says.
    graphs
        The checks whose model is recorded as a graph.
    bitwise
        Whether an engine must compute the same bits in every run.
    emulate_too
        Whether an engine's errors are wanted beside the emulated model's, even where the check passes.
    allowance
        What saying why checks failed may cost.
    progress
        Is told, in a line each, what takes long.
    baselines, update_baselines
        What latency is held against, None: nothing; and whether this run's latencies are to be recorded.
    kept_open
        What stays open until the test ends; None: each check closes what it opened.
    broken
        Why no engine can run any more in this process, once one has broken CUDA; empty until then.
    """

    cache: Cache
    backend: str = backends.AUTO
    reference_provider: Provider = "cpu"
    machine: Machine = field(default_factory=Machine)
    extra_gpus: Sequence[GpuModel] = ()
    require_gpu: bool = False
    evidence: EvidenceReport | None = None
    build_only: bool = False
    time_layers: bool = False
    rebuild: int = 1
    search: int | None = None
    graphs: GraphsOf = "failed"
    bitwise: bool = False
    emulate_too: bool = False
    allowance: Allowance = field(default_factory=Allowance)
    progress: Callable[[str], None] = lambda _: None
    baselines: Baselines | None = None
    update_baselines: bool = False
    kept_open: KeptOpen | None = None
    broken: list[str] = field(default_factory=list)

    def backend_of(self, request: Request) -> str:
        """The name of what is to run the check."""
        return request.parity.backend or self.backend

    def system(self, request: Request) -> Backend:
        """The system under test, on this machine.

        Raises
        ------
        MissingDependencyError
            What was asked for by name is not installed.
        UnsupportedTargetError
            The same, where it is one of several that are compared.
        """
        try:
            return backends.load(self.backend_of(request)).find(self.machine)
        except CheckError as error:
            if not request.parity.is_compared:
                raise
            raise UnsupportedTargetError(error.message, error.hint, code=error.code) from error

    def is_served(self, request: Request) -> bool:
        """Whether a server is asked, which has a model of its own."""
        return backends.load(self.backend_of(request)).is_server

    @property
    def requested(self) -> GpuModel | None:
        """The GPU that `--trt-gpu` names."""
        return self.machine.requested

    @property
    def detected(self) -> Gpu | None:
        """The GPU in this machine."""
        return self.machine.detected

    def only_judges(self, request: Request) -> bool:
        """Whether engines are asked for and no GPU tells what for: whether TensorRT takes the model can be said."""
        named = self.requested is not None or self.detected is not None
        return self.build_only and not named and backends.load(self.backend_of(request)).builds

    def judged_gpu(self) -> GpuModel | None:
        """The GPU whose budgets apply: the real one, else the one that is named."""
        if self.detected is None:
            return self.requested
        from pytest_trtcheck.gpu.device import require_match

        return (
            self.detected.model
            if self.requested is None
            else require_match(self.requested, self.detected, self.extra_gpus)
        )


@dataclass(frozen=True)
class Outcome:
    """What a comparison found.

    Parameters
    ----------
    measured, found
        Every output as it was measured, and the failed ones looked at once more.
    misplaced
        What the headline says where the right values came out in the wrong place, so that there is nobody to blame in
        the model; empty where they did not.
    worst
        The index of the case on which a failure is best looked at.
    error
        Why nothing was compared.
    """

    record: ParityRecord
    measured: Mapping[str, compare.Measurement] = field(default_factory=dict)
    found: Mapping[str, compare.Examination] = field(default_factory=dict)
    misplaced: str = ""
    notes: tuple[str, ...] = ()
    worst: int = 0
    error: InputError | None = None


@dataclass(frozen=True)
class Known:
    """What is known of a check so far. Each step returns it with more.

    Parameters
    ----------
    reference
        What counts as right.
    existing
        The engine that `engine=` names.
    reads_precision
        Of that engine: whether the precision is what it, or what is said of it, tells. Until then it is unknown.
    system
        What was asked for, as far as this machine has it.
    problem
        Why that cannot build an engine of this model.
    plugin_operators
        The operators that only a plugin library computes.
    judged_by
        Who said that the system takes the model.
    built, runner
        The engine or file, and what runs it; the runner is open until the check is made.
    load_ms
        How long loading it took, where that says something.
    outcome
        What the comparison found.
    answered
        What a server answered to the first of the cases, once all were compared and passed.
    doubt
        Why what it computes does not count, whatever comes out.
    traced
        The error of every tensor of the model and what its operator loses by itself, where a diagnosis traced them.
    doubt_code
        The code of that.
    fewest, no_fewest
        The nodes that `keep_fp32="auto"` found; and what is said where it found none that are enough.
    kept_from
        The first of the cases that an earlier search kept; None: there are none.
    build
        Which of several builds it is, for messages; empty for the first.
    labels
        Of each case, for the score; empty where no score is asked for.
    """

    request: Request
    model: OnnxModel
    lowered: Lowered
    cases: Sequence[Case]
    reference: AnyReference
    existing: ExistingEngine | None = None
    reads_precision: bool = False
    system: Backend = field(default_factory=Emulated)
    problem: str | None = None
    plugin_operators: tuple[str, ...] = ()
    judged_by: str = ""
    built: Built | None = None
    runner: Runner | None = None
    load_ms: float | None = None
    outcome: Outcome | None = None
    answered: Mapping[str, NDArray[Any]] | None = None
    doubt: str | None = None
    traced: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    doubt_code: Code = "precision-not-applied"
    fewest: tuple[str, ...] | None = None
    no_fewest: str = ""
    kept_from: int | None = None
    build: str = ""
    labels: Sequence[Any] = ()
    record: CheckRecord = field(default_factory=lambda: CheckRecord("", "", "error"))

    def in_precision(self, precision: Precision) -> Known:
        """The same engine, of which it is known now what it computes in."""
        parity = replace(self.request.parity, precision=(precision,))
        return replace(self, request=replace(self.request, parity=parity), reads_precision=True)

    def recorded(self, *notes: str, **found: Any) -> Known:
        """The same with fields of the record, and more notes in it."""
        return replace(self, record=replace(self.record, notes=(*self.record.notes, *notes), **found))

    @property
    def parity(self) -> ParityRecord:
        """What the comparison found, once it was made."""
        assert self.record.parity is not None
        return self.record.parity

    def run(self, case: Case) -> Mapping[str, NDArray[Any]]:
        """What the open runner computes."""
        assert self.runner is not None
        return outputs_of(self.running, self.runner, case)

    def computed(self, case: Case) -> Mapping[str, NDArray[Any]]:
        """The same, computed now and kept nowhere."""
        assert self.runner is not None
        return outputs_of(self.running, getattr(self.runner, "computed", self.runner), case)

    def close(self) -> None:
        """Free what runs the model and its reference."""
        self.reference.close()
        for held in (self.runner, self.built):
            if held is not None:
                held.close()

    @property
    def precision(self) -> Precision:
        """The one precision to check."""
        return self.request.precision

    @property
    def computed_in(self) -> Precision:
        """The precision that the system really computes in, and by whose limits it is judged.

        TF32 is for matrix products: a model without one is computed in FP32 as it was asked to be.
        """
        computed = self.system.computes_in(self.precision)
        return computed if computed != "tf32" or self.model.op_types & MATRIX_OPERATORS else self.precision

    @property
    def shown_precision(self) -> str:
        """The precision as records and messages have it: what is computed in, and what was asked for instead."""
        if self.has_unknown_precision:
            return "a precision that is not known"
        computed = self.computed_in
        return computed if computed == self.precision else f"{computed} (asked {self.precision})"

    @property
    def is_given(self) -> bool:
        """Whether what is tested was made elsewhere: an engine that exists, or a served model."""
        return self.existing is not None or self.system.is_server

    @property
    def has_unknown_precision(self) -> bool:
        """Whether it was made elsewhere, and nothing tells, or told yet, what it computes in."""
        return self.is_given and not self.reads_precision and not self.request.parity.states_precision

    @property
    def title(self) -> str:
        """What messages call it."""
        build = f" ({self.build})" if self.build else ""
        if self.existing is not None:
            known = "" if self.has_unknown_precision else f" in {self.shown_precision}"
            return f"{self.model.label}: the engine {self.existing.file.label}{known}"
        return f"{self.model.label} in {self.shown_precision}{build}"

    @property
    def running(self) -> Backend:
        """What runs here: the system itself, or the emulation of what it builds for another machine."""
        return self.system if self.system.runs else Emulated()

    def profile(self) -> dict[str, ShapeRange]:
        """The optimization profile of its engine: what the marker declares, and all of its inputs.

        Raises
        ------
        InputError
            What the marker declares does not fit the model.
        """
        return model_inputs.profile(self.model, self.request.declared_for(self.model), self.cases)

    def spec(self, system: Backend, lowered: Lowered | None = None, precision: Precision | None = None) -> EngineSpec:
        """What `system` is to build: this check's engine, or that of another lowering of its model."""
        return EngineSpec(
            self.model,
            lowered or self.lowered,
            precision or (self.computed_in if system.is_emulation else self.precision),
            self.profile() if system.builds or system.is_file else {},
            self.request.build_options,
            self.request.parity.max_subgraphs,
            self.cases,
        )

    def alone(self) -> AbstractContextManager[None]:
        """The lock of the GPU or server that runs it, to be held for a run at a time.

        Others measure while an engine is built.
        """
        name = self.running.lock_name
        return nullcontext() if name is None else gpu_lock(name)

    def unsupported(self) -> UnsupportedTargetError:
        """The error for its problem."""
        return UnsupportedTargetError(
            f"{self.title} for {self.system.builds_for}: {self.problem}", "choose another precision, GPU or TensorRT"
        )

    def plugins_need_gpu(self) -> str:
        """Why what a plugin computes was not compared."""
        names = ", ".join(self.plugin_operators)
        return f"{self.model.label}: {names} is computed by a plugin, which runs on a GPU alone: none ran here"


Watcher: TypeAlias = Callable[[Known], tuple[str, ...]]
"""Looks at a check while its runner is open, and returns notes on it."""
