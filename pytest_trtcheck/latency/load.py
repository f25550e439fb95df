"""Throughput under load: requests sent at once, 1, 2, 4, …, until more of them bring no more throughput.

A measurement counts once it stands still, by the rule of Triton's Performance Analyzer (documentation,
`--stability-percentage`): over the three most recent windows the largest throughput is at most 10 % above the smallest,
and so is the mean latency. A level that has not come to rest after ten windows is recorded as not stable.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pytest_trtcheck.errors import ServerError
from pytest_trtcheck.record import LoadRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

STABILITY = 0.10
STABLE_WINDOWS = 3
MOST_WINDOWS = 10
WINDOW_S = 0.5
WINDOW_REQUESTS = 50
"""A window lasts until it has at least so many, as the Performance Analyzer's windows by count do."""
GAIN = 0.05
"""A level that brings less than this over the best so far does not make throughput grow."""
PATIENCE = 2
"""So many levels in a row that bring no gain end the search: one may be noise, or just too few for the next batch."""
MOST_AT_ONCE = 256
PLATEAU = "throughput grew no more"
"""Why a search ended that found the most that there is."""


@dataclass(frozen=True)
class Window:
    """The requests that were answered in a stretch of time.

    Parameters
    ----------
    latency_ms
        From sending each to its answer; shape (n,), in the order of the answers.
    interval_ms
        From the answer before to each answer; shape (n,).
    seconds
        How long the window lasted.
    client_cores
        Processor time that this process took meanwhile, in cores.
    """

    latency_ms: NDArray[np.float64]
    interval_ms: NDArray[np.float64]
    seconds: float
    client_cores: float

    @property
    def qps(self) -> float:
        """Answers a second."""
        return self.latency_ms.size / self.seconds

    @property
    def mean_ms(self) -> float:
        """The mean latency; infinite where nothing was answered."""
        return float(self.latency_ms.mean()) if self.latency_ms.size else float("inf")


class LoadRuns(Protocol):
    """What keeps requests under way."""

    def run(self, concurrency: int, seconds: float) -> Window:
        """Keep `concurrency` requests under way for so long, and tell what was answered."""


def is_stable(windows: Sequence[Window]) -> bool:
    """Whether throughput and mean latency stood still over the most recent windows."""
    recent = windows[-STABLE_WINDOWS:]
    if len(recent) < STABLE_WINDOWS or not all(window.latency_ms.size for window in recent):
        return False
    return all(
        max(values) <= (1 + STABILITY) * min(values)
        for values in ([window.qps for window in recent], [window.mean_ms for window in recent])
    )


def level(concurrency: int, windows: Sequence[Window]) -> LoadRecord:
    """What the most recent windows of one number of requests at once come to."""
    recent = windows[-STABLE_WINDOWS:]
    latency_ms = np.concatenate([window.latency_ms for window in recent])
    seconds = sum(window.seconds for window in recent)
    p50_ms, p99_ms = np.quantile(latency_ms, [0.5, 0.99]) if latency_ms.size else (None, None)
    return LoadRecord(
        concurrency=concurrency,
        requests=latency_ms.size,
        qps=latency_ms.size / seconds,
        p50_ms=None if p50_ms is None else float(p50_ms),
        p99_ms=None if p99_ms is None else float(p99_ms),
        stable=is_stable(windows),
        windows=len(windows),
        client_cores=sum(window.client_cores * window.seconds for window in recent) / seconds,
    )


def sweep(runs: LoadRuns, max_seconds: float) -> tuple[tuple[LoadRecord, ...], str]:
    """Measure level by level; the levels, and why there are no more.

    Raises
    ------
    ServerError
        A request failed that was alone. Where more at once fail, as by a full queue, there are the levels before.
    """
    deadline = time.monotonic() + max_seconds
    levels: list[LoadRecord] = []
    concurrency, rate, best, without_gain = 1, 0.0, 0.0, 0
    while concurrency <= MOST_AT_ONCE:
        windows: list[Window] = []
        while len(windows) < MOST_WINDOWS and not is_stable(windows):
            left = deadline - time.monotonic()
            if left <= 0 and (levels or windows):  # However little is allowed, there is something to tell.
                break
            wanted = max(WINDOW_S, WINDOW_REQUESTS / rate if rate else 0.0)
            try:
                windows.append(runs.run(concurrency, min(wanted, max(left, WINDOW_S))))
            except ServerError as error:
                if not levels:
                    raise
                return tuple(levels), f"with {concurrency} at once a request failed: {error.headline}"
            rate = windows[-1].qps
        if windows:
            levels.append(level(concurrency, windows))
        if time.monotonic() >= deadline:
            return tuple(levels), f"the {max_seconds:g} s allowed were over"
        gained = levels[-1].qps > (1 + GAIN) * best
        best, without_gain = max(best, levels[-1].qps), 0 if gained else without_gain + 1
        if without_gain == PATIENCE:
            return tuple(levels), PLATEAU
        concurrency *= 2
    return tuple(levels), f"more than {MOST_AT_ONCE} requests at once are not tried"


def best(levels: Sequence[LoadRecord]) -> LoadRecord:
    """The level with the highest throughput."""
    return max(levels, key=lambda each: each.qps)
