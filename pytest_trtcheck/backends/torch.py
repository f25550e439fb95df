"""PyTorch as a system under test: the module that the model was exported from, as it runs without any export.

Eager, or compiled by `torch.compile`; on the GPU where PyTorch has one, else on the CPU. It is the baseline that people
hold TensorRT against, and in FP32 on a CPU it checks the export.
"""

from __future__ import annotations

import importlib
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from itertools import cycle
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from pytest_trtcheck.backends.base import Backend, Built
from pytest_trtcheck.errors import InputError, MissingDependencyError, UnsupportedTargetError
from pytest_trtcheck.gpu.device import why_no_tf32
from pytest_trtcheck.latency.samples import IN_FLIGHT, HostTimed, Samples
from pytest_trtcheck.model.inputs import as_float
from pytest_trtcheck.model.sources.pytorch.export import quiet
from pytest_trtcheck.model.sources.pytorch.module import Module
from pytest_trtcheck.model.sources.pytorch.program import Program
from pytest_trtcheck.model.sources.pytorch.tensors import named_outputs

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from types import TracebackType

    from numpy.typing import NDArray

    from pytest_trtcheck.backends.base import Machine, Runner, TimedRuns
    from pytest_trtcheck.gpu.device import Gpu
    from pytest_trtcheck.model.inputs import Case
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.model.sources.pytorch.running import Running
    from pytest_trtcheck.record import Evidence
    from pytest_trtcheck.spec import BuildOptions, InputMapping, ParitySpec, Precision

_TYPES = {"fp32": "float32", "tf32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Torch(Backend):
    """PyTorch, eager.

    Parameters
    ----------
    gpu
        The GPU that it runs on; None: the CPU.
    why_cpu
        Why it runs there although there is a GPU.
    """

    gpu: Gpu | None = None
    why_cpu: str = ""

    evidence: ClassVar[Evidence] = "provider"
    name: ClassVar[str] = "torch"
    mode: ClassVar[str] = "eager"
    compiles: ClassVar[bool] = False
    is_timed: ClassVar[bool] = True
    runs_parts: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """With the mode."""
        return f"PyTorch ({self.mode})"

    @property
    def how(self) -> str:
        """Where it ran."""
        return f"by {self.title} on the {'CPU' if self.gpu is None else 'GPU'}"

    @property
    def device(self) -> str:
        """As PyTorch names it: what CUDA uses first is the GPU that was detected."""
        return "cpu" if self.gpu is None else "cuda:0"

    @classmethod
    def require(cls) -> None:
        """See that PyTorch is installed."""
        if find_spec("torch") is None:
            raise MissingDependencyError(
                f"torch is not installed, and backend={cls.name!r} runs it", "pip install 'pytest-trtcheck[torch]'"
            )

    @classmethod
    def find(cls, machine: Machine) -> Backend:
        """On the GPU that is here, if PyTorch can use it."""
        cls.require()
        import torch

        if cls.compiles:
            # Takes seconds, which are no part of loading; what PyTorch deprecates is no error of the user's test.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module("torch._inductor.compile_fx")
        if machine.detected is None:
            return cls()
        why_not = None if torch.cuda.is_available() else f"PyTorch {torch.__version__} cannot use the GPU that is here"
        return cls(None, why_not) if why_not else cls(machine.detected)

    def versions(self) -> dict[str, str]:
        """PyTorch."""
        return {"torch": metadata.version("torch")}

    def admit(self, model: OnnxModel, spec: ParitySpec, options: BuildOptions) -> None:
        """It has to come from PyTorch, and be asked for in one float type throughout."""
        del options
        if not isinstance(model.origin, (Module, Program)):
            raise UnsupportedTargetError(
                f"backend={self.name!r}: {model.label} comes from no PyTorch model, which is what it would run",
                "give the torch.nn.Module, ExportedProgram or .pt2 file itself as model=",
            )
        for argument, given in {"keep_fp32": spec.keep_auto or spec.keep_fp32, "exclude": spec.exclude}.items():
            if given:
                raise UnsupportedTargetError(
                    f"backend={self.name!r}: {argument}= names nodes of the ONNX graph, and PyTorch runs the module, "
                    "in one type throughout",
                    f"leave {argument}= out, or take another backend",
                    code="argument-conflict",
                )
        if (reason := self.why_not(spec.precision[0], ())) is not None:
            raise UnsupportedTargetError(f"backend={self.name!r}: {reason}", "choose another precision or backend")

    def why_not(self, precision: Precision, op_types: Collection[str]) -> str | None:
        """What is quantized, and TF32 where there is none."""
        del op_types
        if precision not in _TYPES:
            return f"a module converted by .to(dtype) knows no {precision}"
        if precision == "tf32":
            return "a CPU has no TF32" if self.gpu is None else why_no_tf32(self.gpu)
        return None

    def is_the_source(self, precision: Precision) -> bool:
        """On the CPU in FP32, eagerly."""
        return self.gpu is None and precision == "fp32" and not self.compiles

    def load(self, built: Built) -> Runner:
        """A copy of the module on the device, in its precision."""
        return TorchRunner(self, built)

    def doubt(self, built: Built, runner: Runner, case: Case) -> str | None:
        """That nothing was computed in 16 bits, or that nothing was compiled."""
        own = cast("TorchRunner", runner)
        kind = _TYPES[built.spec.precision]
        if kind != "float32":
            found = own.types(case)
            if kind not in found:
                listed = ", ".join(f"{count} {name}" for name, count in found.items()) or "no float tensor"
                return f"{built.spec.precision} did not take effect: the operators of the module gave {listed}"
        if self.compiles:
            own(case)
            if not own.graphs:
                return "torch.compile compiled nothing: the module ran eagerly (is it disabled, for it or altogether?)"
        return None

    def notes(self, built: Built, runner: Runner) -> tuple[str, ...]:
        """What ran it, and what was not taken."""
        del runner
        where = f"on {self.gpu.name}" if self.gpu else f"on the CPU{self.why_cpu and f': {self.why_cpu}'}"
        kind = _TYPES[built.spec.precision]
        tf32 = f", TF32 {'on' if built.spec.precision == 'tf32' else 'off'}" if kind == "float32" and self.gpu else ""
        version = self.versions()["torch"]
        found = [f"run by PyTorch {version} ({self.mode}) as the module itself, in {kind}{tf32}, {where}"]
        if given := sorted(built.spec.options.given()):
            found.append(f"{self.title} knows no BuildOptions: {', '.join(given)} had no effect on it")
        return tuple(found)

    def costs(self, built: Built, runner: Runner, instances: int = 1) -> dict[str, float]:
        """What it took of the GPU's memory at the most, and how long `torch.compile` took."""
        del built, instances
        own = cast("TorchRunner", runner)
        known = {"memory_mib": own.memory_mib, "build_s": own.compile_s}
        return {name: value for name, value in known.items() if value is not None}

    def timed_runs(
        self, runner: Runner, cases: Sequence[InputMapping], *, graph: bool = True, transfers: bool = False
    ) -> TimedRuns:
        """By CUDA events, or on a CPU by the host's clock."""
        del graph
        own = cast("TorchRunner", runner)
        if not cases:
            raise InputError("there are no inputs to measure with", code="input-empty")
        if len({tuple(np.shape(array) for array in case.values()) for case in cases}) > 1:
            raise InputError(
                "the inputs to measure with differ in shape", "measure each shape by itself", code="input-shape"
            )
        own(cases[0])  # What a first run of this shape sets up, or compiles, is not measured.
        turns = cycle([own.opened().tensors(dict(case)) for case in cases])
        if self.gpu is None:
            return HostTimed(lambda: own.compute(next(turns)), "host time on the CPU")
        return TimedModule(own, turns, transfers=transfers)


@dataclass(frozen=True)
class TorchCompile(Torch):
    """PyTorch, compiled by `torch.compile` as it is by default."""

    name: ClassVar[str] = "torch-compile"
    mode: ClassVar[str] = "torch.compile"
    compiles: ClassVar[bool] = True


class TorchRunner:
    """A copy of a module, ready to run. Inputs and outputs are arrays by name; floats come back as the model has them.

    Parameters
    ----------
    system
        Eager or compiled, and where.
    built
        Of whom it is, and in which precision.
    """

    def __init__(self, system: Torch, built: Built) -> None:
        import torch

        model, precision = built.spec.model, built.spec.precision
        assert isinstance(model.origin, (Module, Program))
        self.on_gpu = system.gpu is not None
        self.device = system.device
        self.tf32 = precision == "tf32"
        self.graphs = 0
        """How many graphs `torch.compile` made."""
        self.compile_s: float | None = None
        """How long the first run took in which it did so, in seconds; None before, and for eager ones."""
        self.memory_mib: float | None = None
        """The most device memory that PyTorch held for it up to the end of the first run; None on a CPU."""
        self._types = {spec.name: spec.dtype for spec in model.outputs}
        self._is_first = True
        self._held_before = 0
        if self.on_gpu:
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats()
            self._held_before = torch.cuda.memory_allocated()
        with self.settings():
            self._eager: Running | None = model.origin.running(self.device, getattr(torch, _TYPES[precision]))
        self.running: Running | None = self._eager
        if system.compiles:
            # What was compiled of other copies counts against a limit, behind which it would run eagerly.
            torch.compiler.reset()
            self.running = replace(self._eager, module=torch.compile(self._eager.module))

    @contextmanager
    def settings(self, *, exact: bool = True) -> Iterator[None]:
        """PyTorch's settings as the precision has them, and as they were once it is left.

        `exact`: without the short cut through attention that leaves padding at 0, as the model was exported.
        """
        import torch

        mha = torch.backends.mha
        before = mha.get_fastpath_enabled()
        if exact:
            mha.set_fastpath_enabled(False)
        try:
            with _float32_products(tf32=self.tf32):
                yield
        finally:
            mha.set_fastpath_enabled(before)

    def __call__(self, inputs: InputMapping) -> dict[str, NDArray[Any]]:
        """Run once."""
        running = self.opened()
        with self.settings(), self._first():
            outputs = running.outputs(dict(inputs))
        return {name: as_float(array, self._types.get(name, array.dtype.name)) for name, array in outputs.items()}

    def compute(self, tensors: Mapping[str, Any]) -> Any:
        """One run on tensors that are there, as users have it: with PyTorch's own short cuts."""
        with self.settings(exact=False):
            return self.opened().call(tensors)

    def types(self, case: Case) -> dict[str, int]:
        """How many tensors of which float type one eager run gives."""
        assert self._eager is not None
        with self.settings():
            return self._eager.types(case)

    @contextmanager
    def _first(self) -> Iterator[None]:
        """Notes of the first run what it took."""
        if not self._is_first:
            yield
            return
        import torch

        compiled, started = _compiled_graphs(), time.perf_counter()
        with quiet():
            yield
        self._is_first = False
        self.graphs = _compiled_graphs() - compiled
        if self.graphs:
            self.compile_s = time.perf_counter() - started
        if self.on_gpu:
            self.memory_mib = (torch.cuda.max_memory_allocated() - self._held_before) / 2**20

    def opened(self) -> Running:
        """What runs, unless it was closed."""
        if self.running is None:
            raise RuntimeError("the runner is closed")
        return self.running

    def close(self) -> None:
        """Give the GPU's memory back."""
        if self.running is None:
            return
        self.running = self._eager = None
        if self.on_gpu:
            import torch

            torch.cuda.empty_cache()


class TimedModule:
    """A module on the GPU made ready for measuring: by CUDA events, on a stream of its own.

    Parameters
    ----------
    turns
        Inputs on the device, used in turn.
    transfers
        Whether each run copies its inputs to the device and its outputs back, from and to page-locked memory.
    """

    measured: ClassVar[str] = "GPU time"
    graph: None = None
    graph_reason: None = None

    def __init__(self, runner: TorchRunner, turns: Iterator[Mapping[str, Any]], *, transfers: bool) -> None:
        import torch

        self._runner, self._turns, self._transfers = runner, turns, transfers
        self._pinned: dict[int, dict[str, Any]] = {}
        self._stream = torch.cuda.Stream()

    def run(self, n: int) -> Samples:
        """Measure `n` runs, behind one that is not counted: before it the GPU was idle.

        Raises
        ------
        GpuError, ModelError
            A run failed.
        """
        import torch

        if n < 1:
            raise ValueError("at least one run must be measured")
        run_ms, latency_ms, enqueue_ms, ends_ms = np.empty(n), np.empty(n), np.empty(n), np.empty(n)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(4)] for _ in range(IN_FLIGHT)]
        before_first = torch.cuda.Event(enable_timing=True)

        def collect(index: int) -> None:
            start, ready, done, end = events[index % IN_FLIGHT]
            end.synchronize()
            if index > 0:
                run_ms[index - 1] = ready.elapsed_time(done)
                latency_ms[index - 1] = start.elapsed_time(end)
                ends_ms[index - 1] = before_first.elapsed_time(end)

        try:
            with self._runner.settings(exact=False), torch.cuda.stream(self._stream):
                for index in range(n + 1):
                    if index >= IN_FLIGHT:
                        collect(index - IN_FLIGHT)
                    took_ms = self._launched(*events[index % IN_FLIGHT])
                    if index == 0:
                        before_first.record()
                    else:
                        enqueue_ms[index - 1] = took_ms
                for index in range(max(n + 1 - IN_FLIGHT, 0), n + 1):
                    collect(index)
        except RuntimeError as error:
            raise self._runner.opened().failure(error, {}) from error
        intervals_ms = np.diff(ends_ms, prepend=0.0)
        return Samples(run_ms, enqueue_ms, latency_ms if self._transfers else None, intervals_ms)

    def _launched(self, start: Any, ready: Any, done: Any, end: Any) -> float:
        """Put one run with its events on the stream; the host's milliseconds for the module's part of that."""
        tensors = next(self._turns)
        start.record()
        for name, pinned in self._on_host(tensors).items():
            tensors[name].copy_(pinned, non_blocking=True)
        ready.record()
        began = time.perf_counter()
        outputs = self._runner.opened().call(tensors)
        took = time.perf_counter() - began
        done.record()
        if self._transfers:
            for tensor in named_outputs(outputs, ()).values():
                tensor.to("cpu", non_blocking=True)
        end.record()
        return 1000 * took

    def _on_host(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """What is copied to the device before a run, in page-locked memory."""
        if not self._transfers:
            return {}
        if id(tensors) not in self._pinned:
            self._pinned[id(tensors)] = {name: each.cpu().pin_memory() for name, each in tensors.items()}
        return self._pinned[id(tensors)]

    def launch(self) -> None:
        """Put one run on the stream."""
        import torch

        with torch.cuda.stream(self._stream):
            self._runner.compute(next(self._turns))

    def mark(self) -> Any:
        """A point in time behind all that was launched; a difference of two is in milliseconds."""
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        event.synchronize()
        return _Mark(event)

    def close(self) -> None:
        """Free what is page-locked."""
        self._pinned = {}

    def __enter__(self) -> TimedModule:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class _Mark:
    """A CUDA event of PyTorch's, whose differences are in milliseconds."""

    event: Any

    def __sub__(self, other: _Mark) -> float:
        return float(other.event.elapsed_time(self.event))


@contextmanager
def _float32_products(*, tf32: bool) -> Iterator[None]:
    """FP32 products as they are or in TF32, and as they were once it is left."""
    import torch

    backends = torch.backends
    try:
        before = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
    except RuntimeError:
        # Where the newer settings were used (from PyTorch 2.9 on), the older ones can't be read any more.
        places = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul)
        earlier = [place.fp32_precision for place in places]
        try:
            for place in places:
                place.fp32_precision = "tf32" if tf32 and place is not backends.mkldnn.matmul else "ieee"
            yield
        finally:
            for place, precision in zip(places, earlier, strict=True):
                place.fp32_precision = precision
        return
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        backends.cudnn.allow_tf32 = tf32
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        backends.cudnn.allow_tf32 = before[1]


def _compiled_graphs() -> int:
    """How many graphs `torch.compile` has made in this process."""
    import torch._dynamo.utils

    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
