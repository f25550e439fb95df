"""Running a TensorRT engine on the GPU in this machine."""

from __future__ import annotations

import copy
import ctypes
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pytest_trtcheck.backends.tensorrt.builder import load_plugin
from pytest_trtcheck.backends.tensorrt.callbacks import layer_profiler, output_allocator, runtime_log
from pytest_trtcheck.backends.tensorrt.cuda import Cuda, Memory, poisoned
from pytest_trtcheck.backends.tensorrt.io import (
    TensorSpec,
    check_inputs,
    never_written,
    numpy_dtype,
    poison,
    poisoned_elements,
    unwritten,
)
from pytest_trtcheck.backends.tensorrt.layers import Inspected
from pytest_trtcheck.errors import GpuError, lacked_memory, listed, plural
from pytest_trtcheck.spec import ShapeRange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.backends.tensorrt.module import TensorRTModule
    from pytest_trtcheck.spec import InputMapping, Shape

RUN_TIMEOUT_S = 120.0
PROFILED_RUNS, UNCOUNTED_RUNS = 50, 5
"""How many runs layers are timed in, behind some that are not counted."""
PROFILED_S = 2.0
"""The most seconds for that, once there are runs enough to bound a median."""
FEWEST_RUNS = 12


class Engine(Inspected):
    """An engine, loaded and ready to run.

    Parameters
    ----------
    plan
        The serialized engine, or the file that holds it.
    module
        The TensorRT that built it.
    jit_cache
        What `jit_cache()` gave when the same engine was loaded before: TensorRT-RTX then compiles no kernels.
    plugins
        The plugin libraries that it was built with.
    weights
        The ONNX file that a plan without weights gets them from.
    streaming_mib
        The most of its streamable weights that stay on the GPU, in MiB, of an engine that streams them; `auto`:
        TensorRT's own choice. None: they are not streamed.
    profile
        The index of the optimization profile that it runs under.
    outer
        By tensor name, the dtype that callers give and get where the engine has another one.
    timeout_s
        The most seconds that one run may take; None: no limit. A run that exceeds it leaves the process without CUDA.

    Raises
    ------
    GpuError
        The engine cannot be loaded on this GPU, or there is none.
    MissingDependencyError
        cuda-bindings is not installed.
    """

    def __init__(
        self,
        plan: Path | bytes,
        module: TensorRTModule,
        *,
        jit_cache: bytes | None = None,
        plugins: Sequence[str] = (),
        weights: Path | None = None,
        streaming_mib: int | Literal["auto"] | None = None,
        profile: int = 0,
        outer: Mapping[str, str] | None = None,
        timeout_s: float | None = RUN_TIMEOUT_S,
    ) -> None:
        started = time.perf_counter()
        self.module = module
        self.title = module.title
        self.timeout_s = timeout_s
        self.poisoned = False
        """Whether CUDA cannot be used any more in this process because of a failure here."""
        self.jit_cache_used = False
        """Whether `jit_cache` was accepted; TensorRT-RTX refuses one of another GPU, driver or release."""
        self.streamed_bytes: int | None = None
        """How many bytes of its weights are streamed from host memory; None where streaming was not asked for."""
        self.end_timing: Callable[[], None] | None = None
        """Ends the `TimedRun` that the engine is being measured by; None when it is not."""
        self._profile = profile
        self._outer = outer or {}
        self._closed = False
        self._information: str | None = None
        self._placed: dict[str, Memory] = {}
        self._on_demand: set[str] = set()
        self._runtime: Any = None
        self._engine: Any = None
        self._jit: Any = None
        self._runtime_config: Any = None
        self._context: Any = None
        self._allocator: Any = None
        self._profiler: Any = None
        self._log = runtime_log(module)
        self.cuda = Cuda()
        try:
            with self.guard("loading the engine"):
                self._load(plan if isinstance(plan, bytes) else Path(plan).read_bytes(), plugins)
                if weights is not None:
                    self._refit(weights)
                if streaming_mib is not None:
                    self._stream(streaming_mib)
                self.inputs, self.outputs = self._specs()
                self._context = self._create_context(jit_cache)
                self._allocator = output_allocator(self.module.handle, self.cuda)
        except BaseException:
            self.close()
            raise
        self.load_s = time.perf_counter() - started
        """Seconds from the serialized engine to one that is ready, kernel compilation by TensorRT-RTX included."""

    def _load(self, serialized: bytes, plugins: Sequence[str]) -> None:
        self.plan_bytes = len(serialized)
        self._runtime = self.module.handle.Runtime(self._log.logger)
        self._runtime.engine_host_code_allowed = True  # Version-compatible engines bring their runtime with them.
        try:
            self._libraries = [load_plugin(self._runtime.get_plugin_registry(), path) for path in plugins]
        except ValueError as error:
            raise GpuError(str(error)) from error
        self._engine = self._runtime.deserialize_cuda_engine(serialized)
        if self._engine is None:
            raise GpuError(f"{self.module.title} cannot load the engine on this GPU")

    def _refit(self, weights: Path) -> None:
        """Give a plan without weights those of the ONNX file that it was built from."""
        trt = self.module.handle
        refitter = trt.Refitter(self._engine, self._log.logger)
        parser = trt.OnnxParserRefitter(refitter, self._log.logger)
        if not parser.refit_from_file(str(weights)):
            said = [str(parser.get_error(index).desc()) for index in range(parser.num_errors)]
            raise GpuError(
                f"the plan without weights does not take those of {weights}: {'; '.join(said)}", code="engine-weights"
            )
        if missing := list(refitter.get_missing_weights()):
            raise GpuError(
                f"the plan without weights lacks {listed(missing)}, which {weights} does not give",
                code="engine-weights",
            )
        if not refitter.refit_cuda_engine():
            raise GpuError("the plan without weights could not be given any", code="engine-weights")

    def _stream(self, budget_mib: int | Literal["auto"]) -> None:
        """Say how much of the weights may stay on the GPU; that is to be said before there is a context."""
        engine = self._engine
        budget = engine.get_weight_streaming_automatic_budget() if budget_mib == "auto" else budget_mib << 20
        budget = min(budget, engine.streamable_weights_size)
        engine.weight_streaming_budget_v2 = budget
        if engine.weight_streaming_budget_v2 != budget:
            raise GpuError(f"{self.module.title} refused a weight streaming budget of {plural(budget, 'byte')}")
        self.streamed_bytes = int(engine.streamable_weights_size) - int(budget)

    def another(self) -> Engine:
        """The same engine once more: with a context, a stream and memory of its own. It is closed before this one."""
        self.check_usable()
        other = copy.copy(self)
        other._placed, other._on_demand = {}, set()
        other._context = other._allocator = None
        other.cuda = Cuda()
        try:
            with other.guard("making another context of the engine"):
                other._context = other._create_context(self.jit_cache())
                other._allocator = output_allocator(self.module.handle, other.cuda)
        except BaseException:
            other.close()
            raise
        return other

    @property
    def aux_streams(self) -> int:
        """How many CUDA streams it uses beside its own."""
        return int(self._engine.num_aux_streams)

    @property
    def device_memory_bytes(self) -> int:
        """Device memory that the engine needs beside its inputs and outputs: weights and scratch, in bytes."""
        trt, engine = self.module.handle, self._engine
        weights = self.plan_bytes
        if hasattr(trt, "EngineStat") and hasattr(engine, "get_engine_stat"):  # From TensorRT 10.14 on.
            weights = engine.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE)
        return self.context_bytes + max(int(weights) - (self.streamed_bytes or 0), 0)

    @property
    def context_bytes(self) -> int:
        """What of that is one context's scratch memory."""
        return int(self._engine.device_memory_size_v2)

    def jit_cache(self) -> bytes | None:
        """TensorRT-RTX's compiled kernels, to be stored beside the engine; None where there are none."""
        return None if self._jit is None else bytes(memoryview(self._jit.serialize()))

    def new_kernels(self) -> bytes | None:
        """The same, where it was not given any that it took."""
        return None if self.jit_cache_used else self.jit_cache()

    def layer_times(self, inputs: InputMapping) -> list[list[tuple[str, float]]]:
        """What each layer took, by TensorRT's profiler: of each run the layers' names and milliseconds.

        The profiler puts events between the layers, and stays: behind this, the engine is for nothing that is measured.

        Raises
        ------
        InputError
            The inputs do not fit the engine.
        GpuError
            A run failed, or nothing was said of one.
        """
        arrays = check_inputs(self.inputs, inputs)
        self.check_usable()
        runs: list[list[tuple[str, float]]] = []
        with self.guard("timing the layers"):
            self.set_shapes(arrays)
            self.upload(arrays, self._placed)
            self.place_outputs(self._placed)
            self.leave_outputs_as_they_are()
            self._profiler = layer_profiler(self.module.handle)
            self._context.enqueue_emits_profile = False  # It is to be said when a run has ended.
            self._context.profiler = self._profiler
            until = time.monotonic() + PROFILED_S
            while len(runs) < UNCOUNTED_RUNS + PROFILED_RUNS:
                self._profiler.taken = []
                self.enqueue()
                self.cuda.wait(self.timeout_s)
                if not self._context.report_to_profiler() or not self._profiler.taken:
                    raise GpuError(f"{self.module.title} tells its profiler of no layer")
                runs.append(self._profiler.taken)
                if len(runs) >= UNCOUNTED_RUNS + FEWEST_RUNS and time.monotonic() > until:
                    break
        return runs[UNCOUNTED_RUNS:]

    @property
    def is_profiled(self) -> bool:
        """Whether its layers were timed, and each run tells of them."""
        return self._profiler is not None

    def io(self) -> dict[str, list[dict[str, Any]]]:
        """The "inputs" and "outputs" as plain data: name, dtype (TensorRT's name), shape (-1: open) and, of an input
        that is open, each profile's (min, opt, max).
        """
        count = self._engine.num_optimization_profiles

        def described(spec: TensorSpec) -> dict[str, Any]:
            spans = [self._range(spec.name, index) for index in range(count)] if spec.range is not None else []
            return {
                "name": spec.name,
                "dtype": self._engine.get_tensor_dtype(spec.name).name,
                "shape": list(spec.shape),
                "profiles": [[span.min, span.opt, span.max] for span in spans],
            }

        return {"inputs": [*map(described, self.inputs)], "outputs": [*map(described, self.outputs)]}

    def layer_information(self) -> str:
        """What the engine inspector says of every layer, as JSON."""
        if self._information is None:
            inspector = self._engine.create_engine_inspector()
            inspector.execution_context = self._context
            self._information = str(inspector.get_engine_information(self.module.handle.LayerInformationFormat.JSON))
        return self._information

    def __call__(self, inputs: InputMapping) -> dict[str, NDArray[Any]]:
        """Run once: arrays by input name in, arrays by output name out, in the model's order.

        Raises
        ------
        InputError
            The inputs do not fit the engine.
        GpuError
            The run failed, took longer than `timeout_s`, or left elements of an output unwritten.
        """
        arrays = check_inputs(self.inputs, inputs)
        self.check_usable()
        with self.guard("running the engine"):
            self.set_shapes(arrays)
            self.upload(arrays, self._placed)
            outputs, held = self._run(turn=0)
            if held:
                _, again = self._run(turn=1)
                missing = unwritten(held, again)
                if missing:
                    raise never_written(missing, {name: outputs[name].shape for name in missing})
        return outputs

    def close(self) -> None:
        """Free all device and host memory of the engine."""
        if self.end_timing is not None:
            self.end_timing()
        try:
            self._free()
        except GpuError:  # Another engine has broken the context since.
            self.poisoned = True
        if self.poisoned:
            _abandon(self.__dict__.copy())
        self._closed = True
        self._placed = {}
        # In this order: a context must not outlive its engine, nor that its runtime.
        self._context = self._runtime_config = self._jit = self._engine = self._allocator = self._runtime = None
        self._profiler = None

    def _free(self) -> None:
        if self._closed or self.poisoned:
            return
        if Cuda.hangs:
            raise poisoned("the GPU does not end its work")
        for memory in self._placed.values():
            memory.close()
        if self._allocator is not None:
            self._allocator.close()
        self.cuda.close()

    # What follows is shared with TimedRun; each needs the guard.

    def set_shapes(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Tell the context the shapes of the inputs to come."""
        for spec in self.inputs:
            if spec.is_dynamic and not self._context.set_input_shape(spec.name, arrays[spec.name].shape):
                raise GpuError(f"{self.module.title} refused the shape {arrays[spec.name].shape} for {spec.name!r}")

    def upload(self, arrays: Mapping[str, NDArray[Any]], into: dict[str, Memory]) -> None:
        """Copy inputs to where the engine reads them, in stream order, and point the engine there."""
        for spec in self.inputs:
            array = arrays[spec.name]
            memory = self.place(spec, array.nbytes, into)
            memory.host[:] = array.reshape(-1).view(np.uint8)
            memory.upload()
        self.point_at(self.inputs, into)
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as error:
            raise GpuError(f"{self.module.title} cannot infer the output shapes: {error}") from error
        if missing:
            raise GpuError(f"{self.module.title} lacks shapes or values of {', '.join(missing)}")

    def place(self, spec: TensorSpec, nbytes: int, into: dict[str, Memory]) -> Memory:
        """Memory of exactly that size for a tensor; what is in `into` is used again if it fits."""
        memory = into.get(spec.name)
        if memory is None or memory.nbytes != nbytes:
            if memory is not None:
                into.pop(spec.name).close()
            memory = into[spec.name] = Memory(self.cuda, nbytes, device=not spec.on_host)
        return memory

    def point_at(self, specs: Sequence[TensorSpec], placed: Mapping[str, Memory]) -> None:
        """Tell the context where those of the tensors are that have a place."""
        for spec in specs:
            if spec.name in placed and not self._context.set_tensor_address(spec.name, placed[spec.name].address):
                raise GpuError(f"{self.module.title} refused the memory for {spec.name!r}")

    def leave_outputs_as_they_are(self) -> None:
        """Do not poison the outputs that are allocated on demand, as the last call did."""
        self._allocator.patterns = {}

    def place_outputs(self, into: dict[str, Memory]) -> dict[str, Shape]:
        """Memory for the outputs whose shape is known now, with those shapes; the others are allocated on demand."""
        shapes: dict[str, Shape] = {}
        for spec in self.outputs:
            shape = tuple(int(size) for size in self._context.get_tensor_shape(spec.name))
            if -1 in shape or spec.name in self._on_demand:
                self._context.set_output_allocator(spec.name, self._allocator)
                self._on_demand.add(spec.name)
                continue
            shapes[spec.name] = shape
            self.place(spec, int(np.prod(shape, dtype=np.int64)) * spec.dtype.itemsize, into)
        self.point_at(self.outputs, into)
        return shapes

    def enqueue(self) -> None:
        """Put one run on the stream."""
        if not self._context.execute_async_v3(self.cuda.handle):
            raise self._allocator.error or GpuError(f"{self.module.title} could not start the run")

    def why_no_graph(self) -> str | None:
        """Why this engine's runs cannot be captured as a CUDA graph; None when they can."""
        if self._on_demand:
            return f"the shape of {', '.join(sorted(self._on_demand))} depends on the data"
        on_host = [spec.name for spec in (*self.inputs, *self.outputs) if spec.on_host]
        if on_host:
            return f"{', '.join(on_host)} is read or written on the host"
        # Not asked: the context's own `is_stream_capturable`, which TensorRT-RTX 1.5 answers with no where the capture
        # works. One that fails says so itself.
        return None

    def _run(self, turn: int) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[np.bool_]]]:
        """One run into poisoned outputs; the outputs, and which of their elements still hold the poison."""
        shapes = self.place_outputs(self._placed)
        self._allocator.patterns = {spec.name: poison(spec.dtype, turn) for spec in self.outputs}
        for name in shapes:
            self._placed[name].fill(*self._allocator.patterns[name])
        self.enqueue()
        for name in shapes:
            self._placed[name].download()
        self.cuda.wait(self.timeout_s)
        outputs, held = {}, {}
        for spec in self.outputs:
            if spec.name in shapes:
                raw, shape = self._placed[spec.name].host.copy(), shapes[spec.name]
            else:
                raw, shape = self._allocator.fetch(spec)
            elements = poisoned_elements(raw, spec.dtype, turn)
            if elements is not None:
                held[spec.name] = elements
            array = raw.view(spec.dtype).reshape(shape)
            outputs[spec.name] = array if spec.outer is None else array.astype(spec.outer)
        return outputs, held

    def _specs(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        trt, engine = self.module.handle, self._engine
        inputs: list[TensorSpec] = []
        outputs: list[TensorSpec] = []
        for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            shape = tuple(int(size) for size in engine.get_tensor_shape(name))
            spec = TensorSpec(
                name=name,
                dtype=numpy_dtype(engine.get_tensor_dtype(name).name, name),
                shape=shape,
                on_host=engine.get_tensor_location(name) == trt.TensorLocation.HOST,
                range=self._range(name, self._profile) if is_input and -1 in shape else None,
                outer=np.dtype(self._outer[name]) if name in self._outer else None,
            )
            (inputs if is_input else outputs).append(spec)
        return tuple(inputs), tuple(outputs)

    def _range(self, name: str, profile: int) -> ShapeRange:
        least, usual, most = (
            tuple(int(size) for size in shape) for shape in self._engine.get_tensor_profile_shape(name, profile)
        )
        return ShapeRange(least, usual, most)

    def _create_context(self, jit_cache: bytes | None) -> Any:
        engine = self._engine
        if self.module.is_rtx:
            # RTX reads it again when the profile is set, and holds no reference to it: 1.5 died there.
            self._runtime_config = self._with_kernels(jit_cache)
            context = engine.create_execution_context(self._runtime_config)
        else:
            context = engine.create_execution_context()
        if context is None:
            raise GpuError(f"{self.module.title} cannot create an execution context")
        if self._profile and not context.set_optimization_profile_async(self._profile, self.cuda.handle):
            raise GpuError(f"{self.module.title} refused the optimization profile {self._profile}")
        return context

    def _with_kernels(self, jit_cache: bytes | None) -> Any:
        """TensorRT-RTX's settings for a context that keeps the kernels which it compiles, and takes those of before."""
        config = self._engine.create_runtime_config()
        self._jit = config.create_runtime_cache()
        if jit_cache:
            self.jit_cache_used = bool(self._jit.deserialize(jit_cache))
        config.set_runtime_cache(self._jit)
        if any(spec.is_dynamic for spec in self.inputs):
            # The default compiles a shape's kernels in the background and switches to them between two runs, which
            # would change both outputs and latency in the middle of a check.
            strategies = self.module.handle.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        return config

    def check_usable(self) -> None:
        """Refuse to run when closed, being measured, or without CUDA."""
        if self._closed:
            raise RuntimeError("the engine is closed")
        if self.end_timing is not None:
            raise RuntimeError("the engine is being measured: close its TimedRun first")
        if self.poisoned:
            raise poisoned("an earlier failure of this engine left the process without CUDA")

    @contextmanager
    def guard(self, task: str) -> Iterator[None]:
        """Turn CUDA's and TensorRT's failures into GpuError, with all that TensorRT said, and note a broken context."""
        self._log.take()
        try:
            self.cuda.make_current()
            yield
        except GpuError as error:
            raise self._failure(task, error) from error

    def _failure(self, task: str, error: GpuError) -> GpuError:
        hint, code = error.hint, error.code
        text = "\n".join([f"{task}: {error.message}", *(f"    {line}" for line in self._log.take())])
        self.poisoned = self.cuda.is_broken()
        if self.poisoned:
            code = "cuda-broken"
            hint = hint or "CUDA cannot be used any more in this process"
        elif lacked := lacked_memory(text):
            free, total = self.cuda.free_memory()
            hint = f"{free >> 20} of {total >> 20} MiB are free: use a smaller batch, or end other processes on the GPU"
            if lacked == "certainly":
                text = text.replace(task, f"{task}: out of GPU memory", 1)
                code = "out-of-memory"
            else:
                hint = f"cuDNN and cuBLAS fail like this where GPU memory runs out, too; {hint}"
        failure = GpuError(text, hint, code=code)
        failure.poisoned = self.poisoned
        return failure


def _abandon(held: object) -> None:
    """Keep what a broken CUDA context holds, even when Python ends: freeing it can block for ever."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))
