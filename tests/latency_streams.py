"""Simulated latency streams, and measuring them as `measure` does: look by look, until it is decided or the time is up.

Every stream is in ms, one run after the other. `tests/test_latency_streams.py` judges some hundred, and
`benchmarks/bench_latency.py` some thousand.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from pytest_trtcheck.latency import QUANTILES, LookPlan, decide, decide_qps

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    Stream = NDArray[np.float64]
    Process = Callable[[np.random.Generator, int], Stream]

MAX_SECONDS = 30.0
"""The default of `trt_latency`."""
STEP = 15 / 1590
"""By what share a T4's clock moves in one step."""


def ar1(random: np.random.Generator, n: int, rho: float) -> Stream:
    """A stationary standard normal series with autocorrelation rho^k."""
    noise = random.normal(size=n) * math.sqrt(1 - rho * rho)
    noise[0] = random.normal()
    # In blocks over which rho^k stays far from underflow, so that the recursion becomes a cumulative sum.
    out, state = np.empty(n), 0.0
    step = n if rho == 0 else max(1, int(-20 / math.log(rho)))
    for start in range(0, n, step):
        powers = rho ** np.arange(1, min(step, n - start) + 1)
        out[start : start + step] = (
            noise[start : start + step]
            if rho == 0
            else powers * (state + np.cumsum(noise[start : start + step] / powers))
        )
        state = out[min(start + step, n) - 1]
    return out


def two_clocks(random: np.random.Generator, n: int) -> Stream:
    """Two clocks 1 % apart, each held for 50 runs on average."""
    slow = (np.cumsum(random.random(n) < 0.02) + random.integers(2)) % 2
    return np.asarray(1 + 0.01 * (slow - 0.5) + 0.002 * random.normal(size=n))


STATIONARY: Mapping[str, Process] = {
    "iid, 0.3 %": lambda random, n: 1 + 0.003 * random.normal(size=n),
    "iid, 1 %": lambda random, n: 1 + 0.01 * random.normal(size=n),
    "AR(1) 0.9, 1 %": lambda random, n: 1 + 0.01 * ar1(random, n, 0.9),
    "AR(1) 0.99, 0.5 %": lambda random, n: 1 + 0.005 * ar1(random, n, 0.99) + 0.003 * random.normal(size=n),
    "two clocks": two_clocks,
    "two kernels": lambda random, n: 1 + 0.03 * (random.random(n) < 0.3) + 0.003 * random.normal(size=n),
    "coarse timer": lambda random, n: np.round((1 + 0.01 * random.normal(size=n)) / 0.02) * 0.02,
    "heavy tail": lambda random, n: np.asarray(1 + 0.003 * random.standard_t(1.5, size=n).clip(-50, 5000)),
    "stalls": lambda random, n: 1 + 0.005 * random.normal(size=n) + 40.0 * (random.random(n) < 0.002),
}
"""Of a median of about 1, and nothing that drifts."""
CALM = ("iid, 0.3 %", "iid, 1 %", "two kernels", "coarse timer", "stalls")

Shape = Literal["exponential", "ramp", "steps"]


def settling_clocks(
    random: np.random.Generator, run_ms: float, *, shape: Shape, settle_s: float, start: float, end: float
) -> Stream:
    """Latencies that move from `start` to `end` (in ms) as clocks settle, in steps of a clock for "steps"."""
    seconds = np.arange(int(1100 * MAX_SECONDS / run_ms)) * run_ms / 1000
    to_go = np.clip(1 - seconds / settle_s, 0, 1) if shape == "ramp" else np.exp(-seconds / settle_s)
    if shape == "steps":
        step = STEP * end / abs(end - start)
        to_go = np.round(to_go / step) * step
    noise = random.choice([0.002, 0.005, 0.01])
    return np.asarray((end + (start - end) * to_go) * (1 + noise * random.normal(size=seconds.size)))


def warming_up(random: np.random.Generator, run_ms: float, shape: Shape) -> Stream:
    """Settles 3 to 10 % above `run_ms`, from 1 to 10 % below it, over 2 to 20 s."""
    over, under = random.uniform(0.03, 0.1), random.uniform(0.01, 0.1)
    return settling_clocks(
        random,
        run_ms,
        shape=shape,
        settle_s=random.uniform(2, 20),
        start=run_ms * (1 - under),
        end=run_ms * (1 + over),
    )


def speeding_up(random: np.random.Generator, run_ms: float, shape: Shape) -> Stream:
    """Settles 3 to 10 % below `run_ms`, from 1 to 10 % above it, over 2 to 20 s: clocks that rise from idle."""
    over, under = random.uniform(0.01, 0.1), random.uniform(0.03, 0.1)
    return settling_clocks(
        random,
        run_ms,
        shape=shape,
        settle_s=random.uniform(2, 20),
        start=run_ms * (1 + over),
        end=run_ms * (1 - under),
    )


@dataclass(frozen=True)
class Stalls:
    """Runs of `run_ms` with stalls: `per_s` a second of running, of `stall_ms` each (exponential: on average)."""

    run_ms: float
    per_s: float
    stall_ms: float
    exponential: bool = False

    @property
    def qps(self) -> float:
        """The true throughput."""
        return 1000 / (self.run_ms * (1 + self.per_s * self.stall_ms / 1000))

    def stream(self, random: np.random.Generator) -> Stream:
        n = int(1100 * MAX_SECONDS / self.run_ms)
        size = random.exponential(size=n) if self.exponential else 1.0
        stalls = self.stall_ms * size * (random.random(n) < self.per_s * self.run_ms / 1000)
        return np.asarray(self.run_ms * (1 + 0.01 * random.normal(size=n)) + stalls)


@dataclass(frozen=True)
class Outcome:
    """A verdict, and after how many seconds of the stream it was there."""

    decision: str
    seconds: float


def measured(
    stream: Stream,
    budgets: Mapping[str, float] | None = None,
    min_qps: float | None = None,
    max_seconds: float = MAX_SECONDS,
) -> Outcome:
    """Measure a stream by `LookPlan` until every budget is decided or `max_seconds` are over."""
    budgets = budgets or {}
    plan = LookPlan(tuple(QUANTILES[name] for name in budgets), min_qps is not None)
    elapsed_ms = np.cumsum(stream)
    last = min(stream.size, int(np.searchsorted(elapsed_ms, 1000 * max_seconds)) + 1)
    # As many runs at a time as fit into 50 ms.
    chunk = max(5, int(50 / float(np.median(stream[:100]))))
    taken, look = 0, 1
    while True:
        taken = min(last, taken + chunk)
        total_ms = float(elapsed_ms[taken - 1])
        if plan.is_due(look, taken, total_ms) or taken == last:
            confidence = plan.confidence_at(look)
            decisions = [decide(stream[:taken], budgets, confidence=confidence).decision]
            if min_qps is not None:
                decisions.append(decide_qps(stream[:taken], min_qps, confidence=confidence).decision)
            decision = next((one for one in ("fail", "undecided") if one in decisions), "pass")
            if decision != "undecided" or taken == last:
                return Outcome(decision, total_ms / 1000)
            look += 1


def count(outcomes: list[Outcome]) -> Counter[str]:
    """How often each verdict came."""
    return Counter(outcome.decision for outcome in outcomes)


def true_quantile(process: Process, q: float) -> float:
    """A stationary process's quantile, from many samples of many runs."""
    random = np.random.default_rng(99)
    return float(np.quantile(np.concatenate([process(random, 20_000) for _ in range(100)]), q))
