"""pytest-benchmark by the GPU's own clock: an engine's work on its stream is timed, not the host's waiting."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from pytest_trtcheck.backends.base import RunnerByShape
from pytest_trtcheck.errors import ArgumentError, kind_of
from pytest_trtcheck.gpu.lock import gpu_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from pytest_trtcheck.backends.base import Runner, TimedRuns
    from pytest_trtcheck.gpu.device import Gpu
    from pytest_trtcheck.spec import InputMapping


class GpuClock:
    """Seconds by CUDA events on the stream of the engine that is benchmarked; each reading waits for the stream."""

    __name__ = "gpu_time"

    def __init__(self) -> None:
        self.timed: TimedRuns | None = None
        self._last: Any = None
        self._seconds = 0.0

    def __call__(self) -> float:
        """The reading."""
        assert self.timed is not None
        event = self.timed.mark()
        if self._last is not None:
            # From one event to the next: CUDA tells the time between two in FP32.
            self._seconds += (event - self._last) / 1000.0
        self._last = event
        return self._seconds


class GpuBenchmark:
    """pytest-benchmark's `benchmark` for an engine of `trt_build`; all of its attributes are here too.

    Parameters
    ----------
    request
        Of the test that benchmarks.
    """

    def __init__(self, request: pytest.FixtureRequest, gpu: Gpu) -> None:
        self._request = request
        self._clock = GpuClock()
        self._gpu = gpu

    @functools.cached_property
    def _benchmark(self) -> Any:
        """The fixture `benchmark`; made once something is to be timed, since it complains where nothing is."""
        given = self._request.node.get_closest_marker("benchmark")
        options = {**(given.kwargs if given else {}), "timer": self._clock}
        # The fixture takes its options from the nearest marker.
        self._request.node.add_marker(pytest.mark.benchmark(**options), append=False)
        return self._request.getfixturevalue("benchmark")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._benchmark, name)

    def __call__(self, engine: Runner, inputs: InputMapping, *, graph: bool = True) -> Mapping[str, NDArray[Any]]:
        """Benchmark the engine's runs on `inputs`, which stay on the device; its outputs.

        Parameters
        ----------
        graph
            Whether to launch each run as a CUDA graph, where the engine allows it.

        Raises
        ------
        ArgumentError
            `engine` is none that `trt_build` or `trt_engine` gave.
        """
        with self._timing(engine, inputs, graph=graph) as launch:
            self._benchmark(launch)
        return engine(inputs)

    def pedantic(self, engine: Runner, inputs: InputMapping, *, graph: bool = True, **options: Any) -> None:
        """pytest-benchmark's `pedantic`: with a number of rounds and iterations of one's own."""
        with self._timing(engine, inputs, graph=graph) as launch:
            self._benchmark.pedantic(launch, **options)

    @contextmanager
    def _timing(self, engine: Runner, inputs: InputMapping, *, graph: bool) -> Iterator[Callable[[], None]]:
        if getattr(engine, "evidence", None) == "emulated":
            pytest.skip("not measured: the engine is emulated, and a CPU has no GPU time")
        if not isinstance(engine, RunnerByShape):
            raise ArgumentError(
                f"trt_benchmark: expected an engine, got {kind_of(engine)}",
                "give what trt_build returned and its inputs: trt_benchmark(engine, {'input': array})",
            )
        engine.prepare(inputs)
        with gpu_lock(self._gpu.lock_name), engine.timed_runs(inputs, graph=graph) as timed:
            self._clock.timed = timed
            self._benchmark.extra_info.update(
                gpu=self._gpu.name, cuda_graph=timed.graph, cuda_graph_reason=timed.graph_reason
            )
            yield timed.launch
