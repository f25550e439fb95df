"""What comparing two large tensors costs, against one `np.max(np.abs(a - b))` of them.

    python benchmarks/bench_compare.py [--elements N] [--repeat K] [--json FILE]

Both are timed in turn, in one process, and medians are compared. Memory is what numpy allocates beyond the tensors, as
tracemalloc counts it, in a run of its own, since tracing slows the clock.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import reports  # type: ignore[import-not-found]  # beside this script
from numpy.typing import NDArray

from pytest_trtcheck.compare import Division, Limit, measure
from pytest_trtcheck.metrics import METRICS
from pytest_trtcheck.spec import Part

if TYPE_CHECKING:
    from collections.abc import Callable

TIME_LIMIT_RATIO = 3.0
MEMORY_LIMIT_MIB = 64.0
LIMITS_FROM = 10**7
"""Elements from which the limits are meant: below, the fixed cost of a comparison (0.1 ms) and its buffers weigh in."""

Tensor = NDArray[Any]
_SEARCHED = Division(search=True)
"""As a check has it of an output of which the graph says nothing."""


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def extra_mib(run: Callable[[], object]) -> float:
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        run()
        return (tracemalloc.get_traced_memory()[1] - before) / 2**20
    finally:
        tracemalloc.stop()


def tensors(elements: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs that differ in what they cost: noise as an engine's, errors in proportion, and errors that keep growing."""
    rng = np.random.default_rng(0)
    reference = rng.standard_normal(elements, dtype=np.float32)
    noisy = reference + np.float32(1e-3) * rng.standard_normal(elements, dtype=np.float32)
    return {
        "noise": (noisy, reference),
        "scaled": (reference * np.float32(1.001), reference),
        "growing": (reference + np.linspace(0, 1, elements, dtype=np.float32), reference),
        "equal": (reference.copy(), reference),
    }


def compare(actual: Tensor, reference: Tensor, repeat: int, division: Division = _SEARCHED) -> dict[str, float]:
    def baseline() -> object:
        return np.max(np.abs(actual - reference))

    limits = (Limit(METRICS["max"], 0.01, "", division=division),)

    def ours() -> object:
        return measure("output", actual, reference, limits=limits)

    baseline()
    ours()
    times = [(seconds(baseline), seconds(ours)) for _ in range(repeat)]
    base, own = (statistics.median(each) for each in zip(*times, strict=True))
    return {
        "baseline_s": base,
        "measure_s": own,
        "time_ratio": own / base,
        "extra_mib": extra_mib(ours),
        "baseline_extra_mib": extra_mib(baseline),
    }


def divided(elements: int, repeat: int) -> dict[str, float]:
    """A detector's output: four coordinates beside eighty scores, known from the graph."""
    anchors = max(1, elements // 84)
    reference = np.random.default_rng(2).random((1, 84, anchors), dtype=np.float32)
    reference[:, :4] *= 640
    division = Division((Part(((1, 0, 4),)), Part(((1, 4, 84),), 1.0)), search=True)
    return compare(reference * np.float32(1.0001), reference, repeat, division)


def top1(elements: int, repeat: int) -> dict[str, float]:
    """The pass of its own that `top1` costs, on rows of 1,000 classes."""
    reference = np.random.default_rng(1).standard_normal((max(1, elements // 1000), 1000), dtype=np.float32)
    actual = reference + np.float32(1e-3)
    without = statistics.median(seconds(lambda: measure("output", actual, reference)) for _ in range(repeat))
    asked = (Limit(METRICS["top1"], 0.0, ""),)
    with_it = statistics.median(
        seconds(lambda: measure("output", actual, reference, limits=asked)) for _ in range(repeat)
    )
    return {"measure_s": without, "measure_with_top1_s": with_it, "ratio": with_it / without}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of comparing two large FP32 tensors.")
    parser.add_argument("--elements", type=int, default=10**8, help="elements per tensor (default: 1e8)")
    parser.add_argument("--repeat", type=int, default=5, help="runs of which the median counts")
    parser.add_argument("--json", type=Path, help="write the result there as well")
    arguments = parser.parse_args()
    pairs = tensors(arguments.elements)
    results = {name: compare(*pair, arguments.repeat) for name, pair in pairs.items()}
    pairs.clear()
    report = {
        "benchmark": "compare",
        "elements": arguments.elements,
        "repeat": arguments.repeat,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "limits": {"time_ratio": TIME_LIMIT_RATIO, "extra_mib": MEMORY_LIMIT_MIB},
        "results": results,
        "divided": divided(arguments.elements, arguments.repeat),
        "top1": top1(arguments.elements, arguments.repeat),
        "within_limits": None
        if arguments.elements < LIMITS_FROM
        else all(
            each["time_ratio"] <= TIME_LIMIT_RATIO and each["extra_mib"] <= MEMORY_LIMIT_MIB
            for each in results.values()
        ),
    }
    reports.keep(report, arguments.json)


if __name__ == "__main__":
    main()
