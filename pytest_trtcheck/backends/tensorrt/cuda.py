"""CUDA for running engines: one device, one stream, memory that is freed when it is said to be, and graphs.

By the driver bindings alone: what is built on them takes ten times as long to import, keeps what is freed in pools, and
has a graph builder that does not outlive a capture that fails.
"""

from __future__ import annotations

import ctypes
import functools
import time
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pytest_trtcheck.errors import GpuError, MissingDependencyError
from pytest_trtcheck.gpu.cuda_query import DRIVER

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

INSTALL = 'pip install "pytest-trtcheck[tensorrt]" or "pytest-trtcheck[rtx]", for CUDA 12 "pytest-trtcheck[cuda12]"'
SPIN_S = 0.002
"""How long a wait with a time limit polls without sleeping: longer than most inferences, so that they pay nothing."""
_SUCCESS, _NOT_READY = 0, 600  # CUDA_SUCCESS, CUDA_ERROR_NOT_READY
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: it does not wait for the default stream's work, which others may use
_DISABLE_TIMING = 2  # CU_EVENT_DISABLE_TIMING


def load() -> Any:
    """The module cuda.bindings.driver.

    Raises
    ------
    MissingDependencyError
        It is not installed.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise MissingDependencyError(
            f"cuda-bindings is needed to run engines: {error}", INSTALL, code="library-broken"
        ) from error
    return driver


def make_context(index: int = 0) -> None:
    """Have the driver make a device's primary context, which takes half a second once and stays with the process.

    By ctypes, which holds no lock of Python's meanwhile: what is to be imported can be. What goes wrong says `Cuda`.
    """
    with suppress(OSError, AttributeError):
        driver = ctypes.CDLL(DRIVER)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if not (driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index)):
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


@functools.cache
def _context(index: int) -> Any:
    """A device's primary context, which this process keeps."""
    driver = load()
    _call(driver, "cuInit", 0)
    return _call(driver, "cuDevicePrimaryCtxRetain", _call(driver, "cuDeviceGet", index))


def _call(driver: Any, name: str, *arguments: Any) -> Any:
    """Call a function of the driver; what it returns beside its status; a GpuError with CUDA's text for the error."""
    status, *values = getattr(driver, name)(*arguments)
    if status != _SUCCESS:
        raise _failure(driver, name, status)
    return values[0] if len(values) == 1 else tuple(values)


def _failure(driver: Any, name: str, status: Any) -> GpuError:
    _, error = driver.cuGetErrorName(status)
    _, text = driver.cuGetErrorString(status)
    return GpuError(f"{name}: {b' '.join(part for part in (error, text) if part).decode()}")


class Cuda:
    """The CUDA device that engines run on, with a stream of its own.

    Parameters
    ----------
    index
        The device's number among those that CUDA_VISIBLE_DEVICES shows.

    Raises
    ------
    MissingDependencyError
        cuda-bindings is not installed.
    GpuError
        There is no driver or no such device.
    """

    hangs: ClassVar[bool] = False
    """Whether the GPU was left at work that does not end: then every call that waits for it waits for ever."""

    def __init__(self, index: int = 0) -> None:
        self.driver = load()
        if Cuda.hangs:
            raise poisoned(f"CUDA device {index} cannot be used: an earlier run of this process has not ended")
        self._context: Any = None
        try:
            self._context = _context(index)
            self.make_current()
            self.stream = Stream(self)
        except Exception as error:  # Without a driver, the bindings raise a RuntimeError.
            message = error.message if isinstance(error, GpuError) else error
            failure = GpuError(f"CUDA device {index} cannot be used: {message}", "see nvidia-smi")
            failure.poisoned = self._context is not None  # One that gives no stream was broken by an earlier failure.
            raise failure from error
        self.handle = int(self.stream.handle)

    def make_current(self) -> None:
        """Make the device's primary context current in this thread: other libraries may have changed it."""
        self.call("cuCtxSetCurrent", self._context)

    def event(self) -> Event:
        """An event that can be timed."""
        return Event(self, flags=0)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call the driver function `name`; what it returns beside its status.

        Raises
        ------
        GpuError
            With CUDA's name and text for the error.
        """
        return _call(self.driver, name, *arguments)

    def failure(self, name: str, status: Any) -> GpuError:
        """What is raised for a status of the driver function `name`."""
        return _failure(self.driver, name, status)

    def free_memory(self) -> tuple[int, int]:
        """Bytes of device memory that are free, and that there are."""
        free, total = self.call("cuMemGetInfo")
        return int(free), int(total)

    def wait(self, timeout_s: float | None, event: Event | None = None) -> None:
        """Wait until the stream has done all its work, or all up to `event`.

        Raises
        ------
        GpuError
            `poisoned`: it has not within `timeout_s`; nothing but the end of this process stops it.
        """
        event = event or self.stream.record(Event(self, flags=_DISABLE_TIMING))
        if timeout_s is None:
            event.sync()
            return
        started = time.perf_counter()
        while not event.is_done:
            waited = time.perf_counter() - started
            if waited > timeout_s:
                Cuda.hangs = True
                raise poisoned(f"the GPU has not finished within {timeout_s:g} s and is still at work")
            if waited > SPIN_S:
                time.sleep(min(waited / 20, 0.05))

    def is_broken(self) -> bool:
        """Whether every further CUDA call in this process fails, as after an illegal memory access, or never ends."""
        if Cuda.hangs:
            return True
        try:
            self.make_current()
            self.call("cuCtxSynchronize")
        except GpuError:
            return True
        return False

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """What `enqueue` puts on the stream, as a graph.

        Raises
        ------
        GpuError
            Something in it cannot be captured; the stream can be used on.
        """
        thread_local = self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.call("cuStreamBeginCapture", self.stream.handle, thread_local)
        try:
            enqueue()
        except BaseException:
            # Ends the capture; its own status repeats the failure.
            self.driver.cuStreamEndCapture(self.stream.handle)
            raise
        captured = self.call("cuStreamEndCapture", self.stream.handle)
        try:
            executable = self.call("cuGraphInstantiate", captured, 0)
        finally:
            self.call("cuGraphDestroy", captured)
        self.call("cuGraphUpload", executable, self.stream.handle)
        return Graph(self, executable)

    def close(self) -> None:
        """Destroy the stream; the device's context is the process's and stays."""
        self.stream.close()


class Stream:
    """A stream of the current context."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.handle = cuda.call("cuStreamCreate", _NON_BLOCKING)
        self._record = cuda.driver.cuEventRecord

    def record(self, event: Event) -> Event:
        """Put an event on it."""
        (status,) = self._record(event.handle, self.handle)
        if status != _SUCCESS:
            raise self._cuda.failure("cuEventRecord", status)
        return event

    def close(self) -> None:
        """Destroy it, once its work has ended; calling it twice is harmless."""
        handle, self.handle = self.handle, None
        if handle is not None:
            self._cuda.driver.cuStreamDestroy(handle)


class Event:
    """A point on a stream. `later - earlier`: the milliseconds between two that were reached.

    Several of its calls stand around every run that is measured: they go to the driver at once.
    """

    def __init__(self, cuda: Cuda, flags: int) -> None:
        self._cuda = cuda
        self.handle = cuda.call("cuEventCreate", flags)
        self._query, self._elapsed = cuda.driver.cuEventQuery, cuda.driver.cuEventElapsedTime
        weakref.finalize(self, cuda.driver.cuEventDestroy, self.handle).atexit = False

    @property
    def is_done(self) -> bool:
        """Whether it was reached.

        Raises
        ------
        GpuError
            What is on the stream before it failed.
        """
        (status,) = self._query(self.handle)
        if status not in (_SUCCESS, _NOT_READY):
            raise self._cuda.failure("cuEventQuery", status)
        return bool(status == _SUCCESS)

    def sync(self) -> None:
        """Wait until it was reached."""
        self._cuda.call("cuEventSynchronize", self.handle)

    def __sub__(self, earlier: Event) -> float:
        status, elapsed_ms = self._elapsed(earlier.handle, self.handle)
        if status != _SUCCESS:
            raise self._cuda.failure("cuEventElapsedTime", status)
        return float(elapsed_ms)


class Graph:
    """A captured graph that can be launched on its stream again and again."""

    def __init__(self, cuda: Cuda, executable: Any) -> None:
        self._cuda = cuda
        self._executable = executable

    def launch(self) -> None:
        """Put it on the stream."""
        self._cuda.call("cuGraphLaunch", self._executable, self._cuda.stream.handle)

    def close(self) -> None:
        """Destroy it; nothing of it may be running."""
        if self._executable is not None:
            self._cuda.call("cuGraphExecDestroy", self._executable)
            self._executable = None


class Memory:
    """A piece of memory: on the device, page-locked on the host, or both with copies between them.

    Parameters
    ----------
    nbytes
        Its size; TensorRT wants an address for empty tensors too, so at least one byte is allocated.
    device, host
        Which sides there are.
    """

    def __init__(self, cuda: Cuda, nbytes: int, *, device: bool = True, host: bool = True) -> None:
        self._cuda = cuda
        self.nbytes = nbytes
        self.device_address = 0
        self.host_address = 0
        size = max(nbytes, 1)
        try:
            if device:
                self.device_address = int(cuda.call("cuMemAlloc", size))
            if host:
                self.host_address = int(cuda.call("cuMemAllocHost", size))
        except GpuError:
            self.close()
            raise
        self.host: NDArray[np.uint8] = np.empty(0, np.uint8)
        if host:
            self.host = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self.host_address))
        """The host side as bytes; no copy, so it is gone after `close`."""

    @property
    def address(self) -> int:
        """What TensorRT is given: the device side where there is one."""
        return self.device_address or self.host_address

    def upload(self) -> None:
        """Copy host to device, in stream order."""
        if self.nbytes and self.device_address:
            self._cuda.call(
                "cuMemcpyHtoDAsync", self.device_address, self.host_address, self.nbytes, self._cuda.stream.handle
            )

    def download(self, nbytes: int | None = None) -> None:
        """Copy device to host, in stream order: all of it, or the first `nbytes`."""
        size = self.nbytes if nbytes is None else nbytes
        if size and self.device_address:
            self._cuda.call("cuMemcpyDtoHAsync", self.host_address, self.device_address, size, self._cuda.stream.handle)

    def fill(self, pattern: int, width: int) -> None:
        """Repeat `pattern`, of `width` 1, 2 or 4 bytes, over the memory, in stream order on the device."""
        count = self.nbytes // width
        if count and self.device_address:
            name = f"cuMemsetD{8 * width}Async"
            self._cuda.call(name, self.device_address, pattern, count, self._cuda.stream.handle)
        elif count:
            self.host.view(f"u{width}")[:] = pattern

    def close(self) -> None:
        """Free both sides at once; nothing on the stream may use them any more."""
        device, self.device_address = self.device_address, 0
        host, self.host_address = self.host_address, 0
        self.host = np.empty(0, np.uint8)
        if device:
            self._cuda.call("cuMemFree", device)
        if host:
            self._cuda.call("cuMemFreeHost", host)


def poisoned(message: str, hint: str = "") -> GpuError:
    """A GpuError after which CUDA cannot be used in this process."""
    error = GpuError(message, hint, code="cuda-broken")
    error.poisoned = True
    return error
