"""What TensorRT calls back into while an engine runs: a logger, an allocator of outputs, a profiler of layers."""

from __future__ import annotations

import functools
from collections import deque
from typing import TYPE_CHECKING, Any, SupportsFloat

import numpy as np

from pytest_trtcheck.backends.tensorrt.builder import listeners, process_logger
from pytest_trtcheck.backends.tensorrt.cuda import Cuda, Memory
from pytest_trtcheck.errors import GpuError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_trtcheck.backends.tensorrt.io import TensorSpec
    from pytest_trtcheck.backends.tensorrt.module import TensorRTModule
    from pytest_trtcheck.spec import Shape


class RuntimeLog:
    """What TensorRT's runtime says in this process."""

    def __init__(self, trt: Any) -> None:
        self._errors: deque[str] = deque(maxlen=100)
        self.logger = process_logger(trt)
        listeners.append(self._hear)

    def _hear(self, severity: str, text: str) -> None:
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self._errors.append(text)

    def take(self) -> list[str]:
        """The errors since the last call."""
        said = list(dict.fromkeys(self._errors))
        self._errors.clear()
        return said


@functools.cache
def runtime_log(module: TensorRTModule) -> RuntimeLog:
    """The log of this process for `module`, with TensorRT's own plugins registered."""
    log = RuntimeLog(module.handle)
    if not module.is_rtx:
        module.handle.init_libnvinfer_plugins(log.logger, "")
    return log


def output_allocator(trt: Any, cuda: Cuda) -> Any:
    """An output allocator, for outputs whose shape is known only when the run has got there."""

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc]  # the base class is known at run time only
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.memory: dict[str, Memory] = {}
            self.shapes: dict[str, Shape] = {}
            self.patterns: dict[str, tuple[int, int]] = {}
            self.error: GpuError | None = None

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
            del memory, alignment  # cuMemAlloc aligns to 256 bytes, TensorRT's most.
            # An exception must not pass through TensorRT: 0 tells it that there is no memory.
            try:
                present = self.memory.get(tensor_name)
                if present is None or present.nbytes < size:
                    if present is not None:
                        self.memory.pop(tensor_name).close()
                    # Whole words, so that the pattern fills all of it.
                    present = self.memory[tensor_name] = Memory(cuda, -(-size // 8) * 8, host=False)
                if tensor_name in self.patterns:
                    present.fill(*self.patterns[tensor_name])
            except GpuError as error:
                self.error = error
                return 0
            return present.address

        def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            del stream  # It is the one that the engine runs on, and filling is ordered by it.
            return self.reallocate_output(tensor_name, memory, size, alignment)

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            self.shapes[tensor_name] = tuple(int(size) for size in shape)

        def fetch(self, spec: TensorSpec) -> tuple[NDArray[np.uint8], Shape]:
            """The bytes and shape of an output; the run has ended."""
            shape = self.shapes[spec.name]
            raw = np.empty(int(np.prod(shape, dtype=np.int64)) * spec.dtype.itemsize, np.uint8)
            if raw.nbytes:
                cuda.call("cuMemcpyDtoH", raw.ctypes.data, self.memory[spec.name].address, raw.nbytes)
            return raw, shape

        def close(self) -> None:
            for memory in self.memory.values():
                memory.close()
            self.memory = {}

    return Allocator()


def layer_profiler(trt: Any) -> Any:
    """A profiler that keeps what it is told of a run in `taken`: layer and milliseconds."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]  # the base class is known at run time only
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.taken: list[tuple[str, float]] = []

        def report_layer_time(self, layer_name: str, ms: SupportsFloat) -> None:
            self.taken.append((str(layer_name), float(ms)))

    return Profiler()
