"""What every system under test is: one class, from which each of them extends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from pytest_trtcheck.errors import ArgumentError, ModelError, kind_of, listed
from pytest_trtcheck.model.arrays import arrays_of, as_array, copied, is_array

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import NDArray

    from pytest_trtcheck.cache import Cache, Entry
    from pytest_trtcheck.gpu import GpuModel
    from pytest_trtcheck.gpu.device import Gpu
    from pytest_trtcheck.latency.load import LoadRuns
    from pytest_trtcheck.latency.samples import Samples
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.precision.lowering import Lowered
    from pytest_trtcheck.record import EngineRecord, Evidence, GpuRan, PartitionRecord, ServerRecord
    from pytest_trtcheck.spec import BuildOptions, InputMapping, ParitySpec, Precision, Shape, ShapeRange


class Runner(Protocol):
    """A model that can be run. Inputs and outputs are numpy arrays by tensor name."""

    def __call__(self, inputs: InputMapping) -> dict[str, NDArray[Any]]:
        """Run once. Every output of the model comes back, in the model's order."""

    def close(self) -> None:
        """Free what the runner holds (device memory, sessions); calling it twice is harmless."""


class TimedRuns(Protocol):
    """A runner made ready for measuring, within a `with` block."""

    @property
    def measured(self) -> str:
        """What a run is said to take, such as "GPU time"."""

    @property
    def graph(self) -> bool | None:
        """Whether the runs are launched as CUDA graphs; None of a system that has no say in it."""

    @property
    def graph_reason(self) -> str | None:
        """Why they are not."""

    def run(self, n: int) -> Samples:
        """Measure `n` runs; a GpuError where one fails."""

    def launch(self) -> None:
        """Put one run on its way; where that can't be told from the run, make it."""

    def mark(self) -> Any:
        """A point in time behind all that was launched; a difference of two is in milliseconds."""

    def close(self) -> None:
        """Free what measuring took; the runner can be called again."""

    def __enter__(self) -> TimedRuns: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True)
class Machine:
    """What a system finds: the GPU that `--trt-gpu` names, the one that is here, and where servers are.

    Parameters
    ----------
    requested
        The GPU that `--trt-gpu` names; None: none was named.
    detected
        The GPU that is here; None: there is none.
    no_gpu
        Why no GPU is here.
    gpu_note
        What records should say of why it is this one of several.
    triton_url
        The Triton server that `--trt-triton-url` names.
    triton_models
        What it calls which models: the lines of the ini key `trt_triton_models`.
    """

    requested: GpuModel | None = None
    detected: Gpu | None = None
    no_gpu: str = "there is no GPU"
    gpu_note: str | None = None
    triton_url: str | None = None
    triton_models: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineSpec:
    """What to build, whatever builds it.

    Parameters
    ----------
    model
        The model as it was named, in FP32.
    lowered
        The model of the precision: `lowered.path` is its ONNX file.
    precision
        What was asked for.
    profile
        By input, the range of every open shape.
    options
        What the user said of the build.
    """

    model: OnnxModel
    lowered: Lowered
    precision: Precision
    profile: Mapping[str, ShapeRange]
    options: BuildOptions
    max_subgraphs: int | None = None
    """Into how many subgraphs a system that divides models may divide it; no matter of what is built."""
    cases: Sequence[InputMapping] = ()
    """What it will be fed: a new engine is tried with some of that; no matter of what is built either."""


@dataclass(frozen=True)
class Built:
    """What was built, or the file that needs no building.

    Parameters
    ----------
    spec
        What it was built from.
    path
        What is loaded.
    record
        The engine, for the report; None where the system builds none.
    entry
        Where it lies in the cache; None where it does not.
    loaded
        What runs it already, in the process in which it was tried: for what it computes, not for how fast. It is
        closed by who closes that, and by who loads it elsewhere.
    """

    spec: EngineSpec
    path: Path
    record: EngineRecord | None = None
    entry: Entry | None = None
    loaded: Runner | None = None

    def close(self) -> None:
        """End what runs it already."""
        if self.loaded is not None:
            self.loaded.close()


@dataclass(frozen=True)
class AtOnce:
    """Requests that were made at once, and each alone.

    Parameters
    ----------
    alone, together
        The outputs of each request, in the same order.
    batches
        How many executions the system counted meanwhile, by batch size; None where it does not count.
    note
        What to say of how it put them together.
    """

    alone: Sequence[Mapping[str, NDArray[Any]]]
    together: Sequence[Mapping[str, NDArray[Any]]]
    batches: Mapping[int, int] | None
    note: str


@dataclass(frozen=True)
class Acceptance:
    """Whether a system takes a model.

    Parameters
    ----------
    refusal, advice
        Why it does not, node by node, and what to do; empty where it does.
    notes
        What other systems refuse, and what could not be found out.
    plugin_operators
        The operators that only a plugin computes, and a GPU alone can tell of.
    judged_by
        Who said so; empty where nobody was asked.
    in_full, notes_in_full
        The refusal and the notes once more, with every node there is, by rule; empty where they say so already.
    """

    refusal: str = ""
    advice: str = ""
    notes: tuple[str, ...] = ()
    plugin_operators: tuple[str, ...] = ()
    judged_by: str = field(default="", compare=False)
    in_full: str = field(default="", compare=False)
    notes_in_full: tuple[str, ...] = field(default=(), compare=False)

    def complete(self) -> Acceptance:
        """The same with all that was found, for who asked for nothing else."""
        return replace(self, refusal=self.in_full or self.refusal, notes=self.notes_in_full or self.notes)

    def require(self) -> None:
        """Raise what stands against the model, a ModelError."""
        if self.refusal:
            raise ModelError(self.refusal, self.advice, code="model-refused")


class Backend(ABC):
    """A system under test, on one machine.

    It has to say its `name` and `title`, and to `load` a model; all else has a default.
    """

    evidence: ClassVar[Evidence] = "emulated"
    """`engine` where a GPU runs TensorRT, and nothing else; `provider` where a library runs the lowered model on a GPU
    or as it is; `server` where somebody else's machine does."""
    gpu: Gpu | None = None
    """The GPU that it runs on, which is then held alone for each run."""
    builds: ClassVar[bool] = False
    """Whether there is an engine to build, for these shapes alone."""
    is_emulation: ClassVar[bool] = False
    """Whether it is our own emulation, which in FP32 is the reference itself."""
    is_file: ClassVar[bool] = False
    """Whether it is an engine that exists: no part of another model is built by it, and nothing stands in for it."""
    is_server: ClassVar[bool] = False
    """Whether it serves a model of its own: nothing is lowered or built for it, and its precision is what is said of
    it."""
    is_timed: ClassVar[bool] = False
    """Whether `timed_runs` measures it."""
    runs_parts: ClassVar[bool] = True
    """Whether it runs what it is given: a part of the model too, or another lowering of it."""
    loads: ClassVar[bool] = True
    """Whether `load` brings the model to where it runs, so that its time says something."""
    takes_instances: ClassVar[bool] = False
    """Whether `timed_runs` takes `instances=`, how many of it are to run at once."""

    @property
    @abstractmethod
    def name(self) -> str:
        """As `backend=` takes it and records have it."""

    @property
    @abstractmethod
    def title(self) -> str:
        """As messages have it, with the version."""

    @property
    def gpu_ran(self) -> GpuRan:
        """Whether a GPU computes what it gives; "unknown" where somebody else's word is all there is."""
        return self.gpu is not None

    @property
    def lock_name(self) -> str | None:
        """What is held alone while it runs or is measured: the GPU; None where nothing need be."""
        return None if self.gpu is None else self.gpu.lock_name

    @property
    def runs(self) -> bool:
        """Whether what it builds runs here; otherwise the outputs are emulated."""
        return True

    @property
    def builder(self) -> Backend:
        """What builds other engines of the same model: for `min_speedup`, and to see who is to blame."""
        return self

    @property
    def builds_for(self) -> str:
        """The GPU or system that engines are for."""
        return self.title

    @property
    def no_engine(self) -> str:
        """Why there is no engine, where none is built."""
        return f"{self.title} builds no engine"

    @property
    def how(self) -> str:
        """Where the outputs came from, in the first line of a failure."""
        return f"by {self.title}"

    @classmethod  # noqa: B027 - most need nothing
    def require(cls) -> None:
        """See that what it needs is installed; otherwise a MissingDependencyError says how to install it."""

    @classmethod
    def find(cls, machine: Machine) -> Backend:
        """The system on this machine, or what stands in for it there.

        Raises
        ------
        MissingDependencyError
            What it needs is not installed.
        """
        del machine
        cls.require()
        return cls()

    def versions(self) -> dict[str, str]:
        """The libraries that it rests on, the most important one first."""
        return {}

    def admit(self, model: OnnxModel, spec: ParitySpec, options: BuildOptions) -> None:
        """Refuse what it can't do of what is asked for, before anything is made of the model.

        Raises
        ------
        UnsupportedTargetError
            It can't; in a comparison of several systems that is its row.
        """
        del model, spec, options

    def accepts(
        self, lowered: Lowered, label: str, options: BuildOptions, cache: Cache, *, will_build: bool
    ) -> Acceptance:
        """Whether it takes a lowered model, found out before anything is built."""
        del lowered, label, options, cache, will_build
        return Acceptance()

    def why_not(self, precision: Precision, op_types: Collection[str]) -> str | None:
        """Why it cannot compute these operators in a precision; None where nothing is known to stand against it.

        Of a pair ("int8+fp16") the operators are those that are quantized.
        """
        del precision, op_types
        return None

    def is_served_elsewhere(self, precision: Precision, said: str = "") -> bool:
        """Whether another system than this one, which ships as well, serves what this one refuses for its GPU.

        `said`: what came of building it; empty where it was refused before.
        """
        del precision, said
        return False

    def computes_in(self, precision: Precision) -> Precision:
        """The precision that it really computes in when asked for another, and is judged by."""
        return precision

    def is_the_source(self, precision: Precision) -> bool:
        """Whether it runs what `reference=SOURCE` runs, in the same way."""
        del precision
        return False

    @classmethod  # noqa: B027 - most have nothing
    def expect_build(cls) -> None:
        """Get what builds ready: on a machine with a GPU, an engine will probably be built soon."""

    @classmethod  # noqa: B027 - most have nothing
    def dismiss_builder(cls) -> None:
        """Let go of what was expected to be needed, and was not."""

    @classmethod  # noqa: B027 - most have nothing
    def start(cls) -> None:
        """Get ready in this process what takes a while, beside something else."""

    def build(self, spec: EngineSpec, cache: Cache) -> Built:
        """The engine, built by one process and taken from the cache by all others; a BuildError where it can't be."""
        del cache
        return Built(spec, spec.lowered.path)

    @abstractmethod
    def load(self, built: Built) -> Runner:
        """What runs it; a GpuError or ModelError where it cannot be loaded."""

    def described(self, built: Built, runner: Runner) -> EngineRecord | None:
        """The engine's record with what only the loaded engine tells."""
        del runner
        return built.record

    def doubt(self, built: Built, runner: Runner, case: Case) -> str | None:
        """Why it does not compute what was asked for, whatever comes out; None where nothing says so."""
        del built, runner, case
        return None

    def partition(self, built: Built, runner: Runner) -> PartitionRecord | None:
        """How it divided the model among several providers, once `doubt` has looked; None where it does not."""
        del built, runner
        return None

    def notes(self, built: Built, runner: Runner) -> tuple[str, ...]:
        """What the record should say of it."""
        del built, runner
        rests_on = ", ".join(f"{name} {version}" for name, version in self.versions().items())
        return (f"run by {self.title}" + (f" ({rests_on})" if rests_on else ""),)

    def costs(self, built: Built, runner: Runner, instances: int = 1) -> dict[str, float]:
        """What it takes beside time, after its first run, as far as its engine's record does not say so already.

        By the argument of `trt_latency`: `memory_mib`, `engine_mib`, `build_s`. `instances`: how many run at once.
        """
        del built, runner, instances
        return {}

    def serving(self, runner: Runner) -> ServerRecord | None:
        """The served model; None of what is no server."""
        del runner
        return None

    def at_once(self, runner: Runner, cases: Sequence[Case]) -> AtOnce | None:
        """What it computes of requests that are made together; None where one comes after the other."""
        del runner, cases
        return None

    def load_runs(self, runner: Runner, cases: Sequence[InputMapping]) -> AbstractContextManager[LoadRuns] | None:
        """Prepare measuring with several requests under way at once; None where one comes after the other."""
        del runner, cases
        return None

    def disturbed(self, runner: Runner) -> tuple[str, ...]:
        """What slowed it down since this was asked last, as far as it is no GPU in this machine."""
        del runner
        return ()

    def timed_runs(
        self, runner: Runner, cases: Sequence[InputMapping], *, graph: bool = True, transfers: bool = False
    ) -> TimedRuns:
        """Prepare measuring with inputs of equal shapes, used in turn; it must be closed before the next call."""
        raise NotImplementedError

    def profiled(self, engine: EngineRecord, runner: Runner, case: Case) -> EngineRecord:
        """The engine's record with what each layer takes; behind that, the runner is for nothing that is measured.

        Raises
        ------
        GpuError
            The attempt broke CUDA. What else stands against it is in the record.
        """
        del runner, case
        return engine

    def keep(self, built: Built, runner: Runner) -> None:
        """Keep beside the engine what running it brought."""
        del built, runner

    @contextmanager
    def opened(self, built: Built) -> Iterator[Runner]:
        """What runs it, until it is left; where that is told apart, not to be measured."""
        runner = built.loaded or self.load(built)
        try:
            yield runner
            self.keep(built, runner)
        finally:
            runner.close()


_OURS = __name__.partition(".")[0]


def outputs_of(system: Backend, run: Callable[[Case], Any], case: Case) -> dict[str, NDArray[Any]]:
    """What a system's runner computes of a case.

    One of another package gets copies, and gives some: it may change its inputs in place, which the reference is fed
    afterwards, and fill the same arrays in each run, which then agree with each other whatever it computes.

    Raises
    ------
    ArgumentError
        That is no mapping of arrays.
    """
    if type(system).__module__.partition(".")[0] == _OURS:
        ours: dict[str, NDArray[Any]] = run(case)
        return ours
    found = run(copied(case))
    if not isinstance(found, Mapping) or not all(map(is_array, found.values())):
        kinds = listed(map(kind_of, found.values())) if isinstance(found, Mapping) else kind_of(found)
        raise ArgumentError(
            f"the backend {system.name!r} gave {kinds} for the outputs",
            "its runner has to return a dict from output name to numpy array",
            code="extension-failed",
        )
    return {str(name): np.array(as_array(value, f"output {name!r}")) for name, value in found.items()}


class RunnerByShape:
    """A runner for each shape that it is called with, made at the first call: what `trt_build` gives.

    Parameters
    ----------
    system
        What runs it.
    open_for
        Makes the runner for one case; for all of them where the system builds nothing for a shape.
    admit
        Refuses a case of a shape that is not declared.
    by_shape
        Whether each shape has an engine of its own: not where one is declared for all of them.
    """

    def __init__(
        self, system: Backend, open_for: Callable[[Case], Runner], admit: Callable[[Case], None], *, by_shape: bool
    ) -> None:
        self._system = system
        self._open_for = open_for
        self._admit = admit
        self._by_shape = by_shape
        self._runners: dict[tuple[tuple[str, Shape], ...], Runner] = {}
        self.evidence, self.gpu_ran = system.evidence, system.gpu_ran

    def __call__(self, inputs: InputMapping) -> dict[str, NDArray[Any]]:
        """Run once."""
        case = arrays_of(inputs)
        return outputs_of(self._system, self._runner(case), case)

    def prepare(self, inputs: InputMapping) -> None:
        """Have the runner of these inputs made, which may wait for others: not while the GPU is held alone."""
        self._runner(arrays_of(inputs))

    def timed_runs(self, inputs: InputMapping, *, graph: bool = True) -> TimedRuns:
        """Prepare measuring with these inputs; what it gives must be closed before the next call.

        Raises
        ------
        ArgumentError
            The system has no clock.
        """
        if not self._system.is_timed:
            raise ArgumentError(f"{self._system.title} is not timed", "take another backend=", code="benchmark-untimed")
        case = arrays_of(inputs)
        return self._system.timed_runs(self._runner(case), [case], graph=graph)

    def _runner(self, case: Case) -> Runner:
        self._admit(case)
        shapes = tuple((name, np.shape(array)) for name, array in sorted(case.items())) if self._by_shape else ()
        if shapes not in self._runners:
            self._runners[shapes] = self._open_for(case)
        return self._runners[shapes]

    def close(self) -> None:
        """Free every runner."""
        for runner in self._runners.values():
            runner.close()
        self._runners.clear()
