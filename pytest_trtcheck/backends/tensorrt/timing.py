"""Measuring an engine: GPU time by CUDA events, host time of the enqueue, transfers. Deciding is not done here."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np

from pytest_trtcheck.backends.tensorrt.cuda import Cuda, poisoned
from pytest_trtcheck.backends.tensorrt.io import check_inputs
from pytest_trtcheck.errors import GpuError, InputError
from pytest_trtcheck.latency.samples import IN_FLIGHT, Samples

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from pytest_trtcheck.backends.tensorrt.cuda import Graph, Memory
    from pytest_trtcheck.backends.tensorrt.engine import Engine
    from pytest_trtcheck.spec import InputMapping

_TASK = "measuring the engine"
_OF_EACH_INSTANCE = 2
"""Runs of one of several instances in flight: the others keep the GPU at work, and what is under way in the end is
measured for nothing."""
_LEAST_OF_EACH = 5
"""Runs that are counted of each of several instances, whose first runs, and what they wait for each other, are not."""


class TimedRun:
    """An engine made ready for measuring; it must be closed before the engine is called again.

    Parameters
    ----------
    input_sets
        Inputs of equal shapes, used in turn; each has device memory of its own.
    graph
        Whether to launch the work as a CUDA graph. `graph` says whether that is so, `graph_reason` why not.
    transfers
        Whether each run copies its inputs to the device and its outputs back, from and to page-locked memory.
    in_flight
        How many runs are on the stream at a time.

    Raises
    ------
    InputError
        There is no input, or the inputs do not fit the engine or differ in shape.
    GpuError
        A run failed.
    """

    measured: ClassVar[str] = "GPU time"

    def __init__(
        self,
        engine: Engine,
        input_sets: Sequence[InputMapping],
        *,
        graph: bool = True,
        transfers: bool = False,
        in_flight: int = IN_FLIGHT,
    ) -> None:
        engine.check_usable()
        if engine.is_profiled:
            raise RuntimeError("the engine's layers were timed: load it again to measure it")
        if not input_sets:
            raise InputError("there are no inputs to measure with", code="input-empty")
        arrays = [check_inputs(engine.inputs, inputs) for inputs in input_sets]
        shapes = [{name: array.shape for name, array in each.items()} for each in arrays]
        if any(each != shapes[0] for each in shapes):
            raise InputError(
                "the inputs to measure with differ in shape", "measure each shape by itself", code="input-shape"
            )
        self._engine = engine
        self._cuda = engine.cuda
        self._transfers = transfers
        self._sets: list[dict[str, Memory]] = [{} for _ in arrays]
        self._outputs: dict[str, Memory] = {}
        self._graphs: list[Graph] = []
        self._next = 0
        self.graph_reason: str | None = None if graph else "not asked for"
        try:
            with engine.guard("preparing to measure"):
                engine.set_shapes(arrays[0])
                for each, memory in zip(arrays, self._sets, strict=True):
                    engine.upload(each, memory)
                engine.place_outputs(self._outputs)
                engine.leave_outputs_as_they_are()
                # The first run after a change of shape sets up what a graph must not capture.
                engine.enqueue()
                self._cuda.wait(engine.timeout_s)
                self._events = [self._event_set() for _ in range(in_flight)]
                if graph:
                    self._capture()
        except BaseException:
            self.close()
            raise
        engine.end_timing = self.close

    def _event_set(self) -> list[Any]:
        """Events before the copies, before and behind the engine's work, and behind the copies back.

        Without transfers the outer ones are the inner ones: every event recorded costs host time.
        """
        ready, done = self._cuda.event(), self._cuda.event()
        return [self._cuda.event(), ready, done, self._cuda.event()] if self._transfers else [ready, ready, done, done]

    @property
    def graph(self) -> bool:
        """Whether the runs are launched as CUDA graphs."""
        return bool(self._graphs)

    @property
    def in_flight(self) -> int:
        """How many runs are on the stream at a time."""
        return len(self._events)

    def _capture(self) -> None:
        """One graph for each set of inputs: a graph has the addresses in it."""
        engine = self._engine
        self.graph_reason = engine.why_no_graph()
        if self.graph_reason:
            return
        try:
            for memory in self._sets:
                engine.point_at(engine.inputs, memory)
                self._graphs.append(self._cuda.capture(engine.enqueue))
        except GpuError as error:
            if self._cuda.is_broken():
                raise
            self.graph_reason = f"the capture failed: {error.message}"
            for graph in self._graphs:
                graph.close()
            self._graphs = []

    def run(self, n: int) -> Samples:
        """Measure `n` runs, behind one that is not counted: before it the GPU was idle.

        Raises
        ------
        GpuError
            A run failed or took longer than the engine's `timeout_s`.
        """
        if n < 1:
            raise ValueError("at least one run must be measured")
        gpu_ms, latency_ms, enqueue_ms, ends_ms = np.empty(n), np.empty(n), np.empty(n), np.empty(n)
        before_first = self._cuda.event()
        timeout_s, in_flight = self._engine.timeout_s, self.in_flight

        def collect(index: int) -> None:
            start, ready, done, end = self.events(index)
            self._cuda.wait(timeout_s, end)
            if index > 0:
                gpu_ms[index - 1] = done - ready
                if self._transfers:
                    latency_ms[index - 1] = end - start
                ends_ms[index - 1] = end - before_first

        with self._engine.guard(_TASK):
            for index in range(n + 1):
                if index >= in_flight:
                    collect(index - in_flight)
                took_ms = self.put(index)
                if index == 0:
                    self._cuda.stream.record(before_first)
                else:
                    enqueue_ms[index - 1] = took_ms
            for index in range(max(n + 1 - in_flight, 0), n + 1):
                collect(index)
        intervals_ms = np.diff(ends_ms, prepend=0.0)
        return Samples(gpu_ms, enqueue_ms, latency_ms if self._transfers else None, intervals_ms)

    def launch(self) -> None:
        """Put one run on the stream, without copies, and do not wait for it."""
        self._next_turn()()

    def mark(self) -> Any:
        """An event behind all that is on the stream, once it was reached.

        Raises
        ------
        GpuError
            It took longer than the engine's `timeout_s`.
        """
        event = self._cuda.event()
        with self._engine.guard(_TASK):
            self._cuda.stream.record(event)
            self._cuda.wait(self._engine.timeout_s, event)
        return event

    def _next_turn(self) -> Callable[[], None]:
        """What runs the engine on the next inputs."""
        turn, self._next = self._next, (self._next + 1) % len(self._sets)
        if self._graphs:
            return self._graphs[turn].launch
        if len(self._sets) > 1:
            self._engine.point_at(self._engine.inputs, self._sets[turn])
        return self._engine.enqueue

    def put(self, index: int) -> float:
        """Put the run of this number on the stream, with its copies; the host's milliseconds for the engine's part."""
        return self._launch(self.events(index))

    def events(self, index: int) -> list[Any]:
        """The four events of a run by its number: those of as many runs as are in flight are there at a time."""
        return self._events[index % self.in_flight]

    def _launch(self, events: list[Any]) -> float:
        """Put one run with its events on the stream; the host's milliseconds for the engine's part of that."""
        start, ready, done, end = events
        record = self._cuda.stream.record
        inputs = self._sets[self._next]
        enqueue = self._next_turn()
        if self._transfers:
            record(start)
            for memory in inputs.values():
                memory.upload()
        record(ready)
        began = time.perf_counter()
        enqueue()
        took = time.perf_counter() - began
        record(done)
        if self._transfers:
            for memory in self._outputs.values():
                memory.download()
            record(end)
        return 1000.0 * took

    def close(self) -> None:
        """Free the inputs, outputs and graphs; the engine can be called again."""
        if self._engine.end_timing == self.close:
            self._engine.end_timing = None
        if self._engine.poisoned or Cuda.hangs:
            return  # What a broken context holds cannot be freed.
        for graph in self._graphs:
            graph.close()
        for memory in [memory for each in (*self._sets, self._outputs) for memory in each.values()]:
            memory.close()
        self._graphs, self._sets, self._outputs = [], [], {}

    def __enter__(self) -> TimedRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Run(NamedTuple):
    """One run of an instance, in ms; `end_ms` since a point in time that all instances share."""

    end_ms: float
    run_ms: float
    latency_ms: float
    enqueue_ms: float


class Lane(Protocol):
    """An instance that is kept at work."""

    @property
    def has_room(self) -> bool:
        """Whether one more of its runs may be put on its stream."""

    def put(self) -> None:
        """Put one run on its stream."""

    def take(self) -> Run | None:
        """Its oldest run, once that is done."""


class _EngineLane:
    def __init__(self, timed: TimedRun, since: Any) -> None:
        self._timed, self._since = timed, since
        self._taken = 0
        self._enqueue_ms: deque[float] = deque()

    @property
    def has_room(self) -> bool:
        return len(self._enqueue_ms) < self._timed.in_flight

    def put(self) -> None:
        self._enqueue_ms.append(self._timed.put(self._taken + len(self._enqueue_ms)))

    def take(self) -> Run | None:
        events = self._timed.events(self._taken)
        if not self._enqueue_ms or not events[-1].is_done:
            return None
        start, ready, done, end = events
        self._taken += 1
        return Run(end - self._since, done - ready, end - start, self._enqueue_ms.popleft())


def overlapped(lanes: Sequence[Lane], n: int, timeout_s: float | None) -> tuple[float, list[Run]]:
    """Runs that ended while every lane was at work, at least `n` in all, and since when that was so (ms).

    What comes before each lane has ended its first run is not counted, nor what is still under way in the end.

    Raises
    ------
    GpuError
        `poisoned`: no run of any lane ended within `timeout_s`.
    """
    # Lanes that are alike end their runs at the same time: those of some would count with the time of all.
    n = len(lanes) * max(_LEAST_OF_EACH, math.ceil(n / len(lanes)))
    first: dict[int, float] = {}
    counted: list[Run] = []
    last = time.perf_counter()
    while len(counted) < n:
        for index, lane in enumerate(lanes):
            while lane.has_room:
                lane.put()
            if (run := lane.take()) is None:
                continue
            last = time.perf_counter()
            if len(first) == len(lanes) and run.end_ms > max(first.values()):
                counted.append(run)
            first.setdefault(index, run.end_ms)
        if timeout_s is not None and time.perf_counter() - last > timeout_s:
            Cuda.hangs = True
            raise poisoned(f"the GPU has not finished within {timeout_s:g} s and is still at work")
    return max(first.values()), sorted(counted)


class TimedInstances:
    """Several contexts of one engine, measured while all of them are at work: each has a stream, inputs and outputs.

    One thread of the host feeds them all, each with a run in progress and one behind it. Threads would hold each other
    up (the one that waits for its GPU holds Python's lock), and the GPU with them.

    Parameters
    ----------
    count
        How many there are.
    input_sets, graph, transfers
        Of each, as `TimedRun` takes them.

    Raises
    ------
    InputError, GpuError
        As `TimedRun`.
    """

    def __init__(
        self,
        engine: Engine,
        input_sets: Sequence[InputMapping],
        count: int,
        *,
        graph: bool = True,
        transfers: bool = False,
    ) -> None:
        self._engine, self._transfers = engine, transfers
        self._others: list[Engine] = []
        self._runs: list[TimedRun] = []
        try:
            for _ in range(count - 1):
                self._others.append(engine.another())
            for each in (engine, *self._others):
                run = TimedRun(each, input_sets, graph=graph, transfers=transfers, in_flight=_OF_EACH_INSTANCE)
                self._runs.append(run)
        except BaseException:
            self.close()
            raise

    @property
    def measured(self) -> str:
        """What a run takes beside the others."""
        return f"{TimedRun.measured}, {len(self._runs)} instances at once"

    @property
    def graph(self) -> bool:
        """Whether all of them are launched as CUDA graphs."""
        return all(run.graph for run in self._runs)

    @property
    def graph_reason(self) -> str | None:
        """Why one of them is not."""
        return next((run.graph_reason for run in self._runs if not run.graph), None)

    def run(self, n: int) -> Samples:
        """Measure at least `n` runs of them all together.

        Raises
        ------
        GpuError
            A run failed, or none of them ended within the engine's `timeout_s`.
        """
        if n < 1:
            raise ValueError("at least one run must be measured")
        since = self._runs[0].mark()
        with self._engine.guard(_TASK):
            lanes = [_EngineLane(run, since) for run in self._runs]
            since_ms, runs = overlapped(lanes, n, self._engine.timeout_s)
        self.mark()
        ends_ms, run_ms, latency_ms, enqueue_ms = (np.array(column) for column in zip(*runs, strict=True))
        intervals_ms = np.diff(ends_ms, prepend=since_ms)
        return Samples(run_ms, enqueue_ms, latency_ms if self._transfers else None, intervals_ms)

    def launch(self) -> None:
        """Put one run on each stream."""
        for run in self._runs:
            run.launch()

    def mark(self) -> Any:
        """An event behind all that is on the streams, once it was reached."""
        return [run.mark() for run in self._runs][-1]

    def close(self) -> None:
        """Free all of them but the engine itself."""
        for run in self._runs:
            run.close()
        for other in self._others:
            other.poisoned = other.poisoned or self._engine.poisoned
            other.close()
        self._runs, self._others = [], []

    def __enter__(self) -> TimedInstances:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
