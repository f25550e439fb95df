"""Measuring an engine: GPU time by CUDA events, host time of the enqueue, transfers. Deciding is not done here."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pytest_trtcheck.backends.tensorrt.cuda import Cuda
from pytest_trtcheck.backends.tensorrt.io import check_inputs
from pytest_trtcheck.errors import GpuError, InputError
from pytest_trtcheck.latency.samples import Samples

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from pytest_trtcheck.backends.tensorrt.cuda import Graph, Memory
    from pytest_trtcheck.backends.tensorrt.engine import Engine
    from pytest_trtcheck.spec import InputMapping

IN_FLIGHT = 2
"""Runs on the stream at a time: one that the GPU computes, and one that is ready when it has done so."""


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

    Raises
    ------
    InputError
        There is no input, or the inputs do not fit the engine or differ in shape.
    GpuError
        A run failed.
    """

    measured: ClassVar[str] = "GPU time"

    def __init__(
        self, engine: Engine, input_sets: Sequence[InputMapping], *, graph: bool = True, transfers: bool = False
    ) -> None:
        engine.check_usable()
        if engine.is_profiled:
            raise RuntimeError("the engine's layers were timed: load it again to measure it")
        if not input_sets:
            raise InputError("there are no inputs to measure with")
        arrays = [check_inputs(engine.inputs, inputs) for inputs in input_sets]
        shapes = [{name: array.shape for name, array in each.items()} for each in arrays]
        if any(each != shapes[0] for each in shapes):
            raise InputError("the inputs to measure with differ in shape", "measure each shape by itself")
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
                self._events = [self._event_set() for _ in range(IN_FLIGHT)]
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
        timeout_s = self._engine.timeout_s

        def collect(index: int) -> None:
            start, ready, done, end = self._events[index % IN_FLIGHT]
            self._cuda.wait(timeout_s, end)
            if index > 0:
                gpu_ms[index - 1] = done - ready
                if self._transfers:
                    latency_ms[index - 1] = end - start
                ends_ms[index - 1] = end - before_first

        with self._engine.guard("measuring the engine"):
            for index in range(n + 1):
                if index >= IN_FLIGHT:
                    collect(index - IN_FLIGHT)
                took_ms = self._launch(self._events[index % IN_FLIGHT])
                if index == 0:
                    self._cuda.stream.record(before_first)
                else:
                    enqueue_ms[index - 1] = took_ms
            for index in range(max(n + 1 - IN_FLIGHT, 0), n + 1):
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
        with self._engine.guard("measuring the engine"):
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
