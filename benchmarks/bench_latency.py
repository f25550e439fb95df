"""How often chance decides a latency verdict, over simulated measurements of up to 30 s (the default `max_seconds`).

    python benchmarks/bench_latency.py [--share 0.1] [--json FILE]

- Clocks that settle 3 to 10 % over (under) the budget, from 1 to 10 % under (over) it, with a time constant of 2 to
  20 s (exponential, linear, in steps of a T4's clock): no pass (no fail) is right.
- Budgets 3 % off the median of a calm stream: all are to be decided rightly.
- Budgets that are the quantile itself, with independent and dependent samples, bimodal, coarse, heavy-tailed, stalling:
  at most 2.5 % pass and 2.5 % fail.
- Budgets that are the true throughput, with rare stalls: at most 2.5 % pass and 2.5 % fail.

A row's figures are counts of verdicts, and the seconds of the stream after which half of them were there; its `limits`
are the most of a verdict, as a share. The streams are those of `tests/latency_streams.py`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.latency_streams import (
    CALM,
    STATIONARY,
    Stalls,
    count,
    measured,
    speeding_up,
    true_quantile,
    warming_up,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tests.latency_streams import Process, Shape, Stream

CHANCE = 0.025
SHAPES: tuple[Shape, ...] = ("exponential", "ramp", "steps")
STALLS = [
    Stalls(5.0, per_s, stall_ms, exponential)
    for per_s, stall_ms, exponential in [
        (0.0, 0.0, False),
        (0.1, 100.0, False),
        (0.25, 150.0, False),
        (0.25, 200.0, False),
        (0.5, 100.0, False),
        (1.0, 50.0, False),
        (2.0, 100.0, False),
        (1.0, 50.0, True),
        (0.5, 100.0, True),
    ]
]


@dataclass(frozen=True)
class Row:
    """Streams against budgets or a throughput. `limits`: the most that each verdict may come, as a share."""

    name: str
    repeats: int
    limits: Mapping[str, float]
    stream: Callable[[np.random.Generator], Stream]
    budgets: Mapping[str, float] = field(default_factory=dict)
    min_qps: float | None = None


def scaled(random: np.random.Generator, process: Process) -> Stream:
    """33 s of runs of about 5 ms."""
    return 5.0 * process(random, 6_600)


def rows() -> Iterator[Row]:
    """Every row, in the order of the report."""
    for run_ms in (1.0, 5.0):
        for shape in SHAPES:
            stream = partial(warming_up, run_ms=run_ms, shape=shape)
            name = f"settles over the budget, {shape}, runs of {run_ms:g} ms"
            yield Row(name, 300, {"pass": 0.0}, stream, {"p50_ms": run_ms})
    for shape in SHAPES:
        stream = partial(speeding_up, run_ms=5.0, shape=shape)
        yield Row(f"settles under the budget, {shape}", 300, {"fail": 0.0}, stream, {"p50_ms": 5.0})
        stream = partial(warming_up, run_ms=5.0, shape=shape)
        yield Row(f"settles over min_qps, {shape}", 300, {"pass": 0.0}, stream, min_qps=200.0)
    for name, process in STATIONARY.items():
        steady = partial(scaled, process=process)
        for budget, q in (("p50_ms", 0.5), ("p99_ms", 0.99)):
            limits = {"pass": CHANCE, "fail": CHANCE}
            yield Row(f"{budget} is the budget, {name}", 200, limits, steady, {budget: 5.0 * true_quantile(process, q)})
        median = 5.0 * true_quantile(process, 0.5)
        for side, wrong in ((1.03, "fail"), (0.97, "pass")):
            limits = {wrong: 0.0, "undecided": 0.0} if name in CALM else {wrong: 0.0}
            yield Row(f"p50_ms {side:g} of the median, {name}", 100, limits, steady, {"p50_ms": side * median})
    for stalls in STALLS:
        size = f"{stalls.stall_ms:g} ms{' on average' if stalls.exponential else ''}"
        name = f"min_qps is the throughput, {stalls.per_s:g} stalls a second of {size}"
        yield Row(name, 500, {"pass": CHANCE, "fail": CHANCE}, stalls.stream, min_qps=stalls.qps)


def main() -> None:
    parser = argparse.ArgumentParser(description="How often chance decides a latency verdict.")
    parser.add_argument("--share", type=float, default=1.0, help="of the measurements that each row takes")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for index, row in enumerate(rows()):
        random = np.random.default_rng(index)
        repeats = max(1, round(arguments.share * row.repeats))
        outcomes = [measured(row.stream(random), row.budgets, row.min_qps) for _ in range(repeats)]
        counts = count(outcomes)
        results[row.name] = {
            "measured": repeats,
            **{verdict: counts[verdict] for verdict in ("pass", "fail", "undecided")},
            "median_s": round(statistics.median(outcome.seconds for outcome in outcomes), 2),
            "limits": row.limits,
            "within": all(counts[verdict] <= most * repeats for verdict, most in row.limits.items()),
        }
        print(row.name, results[row.name], flush=True)
    report = {
        "benchmark": "latency",
        "share": arguments.share,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "results": results,
        "within_limits": all(each["within"] for each in results.values()) if arguments.share >= 1 else None,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
