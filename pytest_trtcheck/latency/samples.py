"""What a system was measured to take, run by run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from numpy.typing import NDArray

IN_FLIGHT = 8
"""Runs on a GPU's stream at a time: the one that it computes, and those that are ready while the host is held up.
Of an engine of 15 µs, two are too few for a host that others share: it is held up for longer."""


@dataclass(frozen=True)
class Samples:
    """What `n` runs took. Every array has shape (n,) and dtype float64; times are in milliseconds.

    Parameters
    ----------
    run_ms
        What budgets speak of: GPU time between CUDA events around the work, or the host's time where no events are.
    enqueue_ms
        Host time of putting that work on the stream. Where it exceeds `run_ms`, the GPU waits for the host and
        `run_ms` holds that waiting. None where work and waiting for it are one call.
    latency_ms
        The inputs' copy to the device, the work and the outputs' copy back; None without transfers.
    interval_ms
        From the end of the run before to the end of each: the run, and what lay between the two.
    """

    run_ms: NDArray[np.float64]
    enqueue_ms: NDArray[np.float64] | None
    latency_ms: NDArray[np.float64] | None
    interval_ms: NDArray[np.float64]


class HostTimed:
    """Runs by the host's clock: what a call takes that makes one run and waits for it.

    Parameters
    ----------
    call
        Makes a run.
    measured
        What it is said to take.
    """

    graph: None = None
    graph_reason: None = None

    def __init__(self, call: Callable[[], object], measured: str = "host time") -> None:
        self._call = call
        self.measured = measured

    def run(self, n: int) -> Samples:
        """Measure `n` runs, one behind the other."""
        if n < 1:
            raise ValueError("at least one run must be measured")
        took_ms, ends_ms = np.empty(n), np.empty(n + 1)
        ends_ms[0] = self.mark()
        for index in range(n):
            started = self.mark()
            self._call()
            ends_ms[index + 1] = self.mark()
            took_ms[index] = ends_ms[index + 1] - started
        return Samples(took_ms, None, None, np.diff(ends_ms))

    def launch(self) -> None:
        """Make one run."""
        self._call()

    def mark(self) -> float:
        """The time, in milliseconds."""
        return 1000 * time.perf_counter()

    def close(self) -> None:
        """Nothing is held."""

    def __enter__(self) -> HostTimed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
