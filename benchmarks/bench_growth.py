"""How time and memory grow with checks, cache entries and workers.

    python benchmarks/bench_growth.py [--rounds N] [--json FILE]

Three questions, each a row a size, and what the figures grow as: the exponent b of a·nᵇ, by least squares of the
logarithms over the larger two thirds of the sizes (1 is linear, 0 does not grow).

- checks: one pytest process with as many parity tests of one small net, each with inputs of its own; its seconds and
  its peak memory less those of one check, the JSON report and the HTML page, and the same again with a warm cache.
- entries: a cache of as many entries, a hit and a miss in it, in microseconds: medians of pairs in turn, with a small
  cache on the other side, each in a `Cache` that knows nothing yet (the first look of a process) and in one that does.
- workers: the same 64 checks by as many of pytest-xdist's workers, in seconds, on the cores that are here.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networks  # type: ignore[import-not-found]  # beside this script
import numpy as np
import reports  # type: ignore[import-not-found]

from pytest_trtcheck.cache import Cache, Key

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CHECKS = (10, 100, 1000)
ENTRIES = (100, 1000, 10_000)
WORKERS = (1, 2, 4, 8)
ENTRY_LIMIT_MS = 20.0
_SHARED_CHECKS = 64

SUITE = """
import numpy as np
import pytest
from pytest_trtcheck import trt_parity

@pytest.mark.parametrize("number", range({checks}))
@trt_parity("net.onnx", precision="fp16", tol=0.5)
def test_one(number):
    return {{"image": np.random.default_rng(number).standard_normal((1, 3, 12, 12)).astype("float32")}}
"""


def write_suite(folder: Path, checks: int) -> None:
    net = networks.Builder(0)
    value = net.node("Relu", [net.conv("image", (3, 8))])
    net.node("GlobalAveragePool", [net.conv(value, (8, 10))])
    networks.save(net, folder / "net.onnx", [1, 3, 12, 12], [1, 10, 1, 1])
    (folder / "test_growth.py").write_text(SUITE.format(checks=checks))


def timed(folder: Path, cache: Path, *more: str) -> dict[str, float]:
    """Seconds and peak memory (MiB) of a pytest process; the memory of its children is not in it."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--trt-cache-dir={cache}", *more]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(text[-3000:])
    return {"s": time.perf_counter() - started, "peak_mib": usage.ru_maxrss / 1024}


def checks(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for count in CHECKS:
        taken: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
        for _ in range(rounds if count < CHECKS[-1] else 1):
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                write_suite(folder, count)
                told = ("--trt-report=report.json", "--trt-html=report.html")
                for runs in taken.values():
                    runs.append(timed(folder, folder / "cache", *told))
                sizes = {f"{kind}_kib": (folder / f"report.{kind}").stat().st_size / 1024 for kind in ("json", "html")}
        row: dict[str, Any] = {"checks": count, **{name: round(size, 1) for name, size in sizes.items()}}
        for kind, runs in taken.items():
            row[f"{kind}_s"] = round(statistics.median(run["s"] for run in runs), 3)
            row[f"{kind}_peak_mib"] = round(statistics.median(run["peak_mib"] for run in runs), 1)
        rows.append(row)
    return rows


def fill(root: Path, count: int) -> Cache:
    cache = Cache(root)
    for index in range(count):
        cache.get_or_make(key(index), lambda folder: (folder / "value").write_text("x"))
    return cache


def key(index: int) -> Key:
    return Key("lowered", f"model{index % 50}.onnx", {"model": f"{index:08x}", "precision": "fp16"})


def paired_us(small: Callable[[], object], large: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Medians of each, in turn."""
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for side, action in zip(taken, (small, large), strict=True):
            started = time.perf_counter()
            action()
            side.append(1e6 * (time.perf_counter() - started))
    return statistics.median(taken[0]), statistics.median(taken[1])


def entries(rounds: int) -> list[dict[str, Any]]:
    rows = []
    fresh = itertools.count(10**6)

    def miss(root: Path) -> Callable[[], object]:
        return lambda: Cache(root).get_or_make(key(next(fresh)), lambda made: (made / "value").write_text("x"))

    with tempfile.TemporaryDirectory() as scratch:
        few = Path(scratch, "few")
        fill(few, 10)
        for count in ENTRIES:
            many = Path(scratch, str(count))
            known = {few: fill(few, 10), many: fill(many, count)}

            def hit(root: Path) -> Callable[[], object]:
                return lambda: Cache(root).get_or_make(key(3), _never)

            def known_hit(root: Path, known: dict[Path, Cache] = known) -> Callable[[], object]:
                return lambda: known[root].get_or_make(key(3), _never)

            row: dict[str, Any] = {"entries": count}
            for name, action in {"first_hit": hit, "hit": known_hit, "miss": miss}.items():
                beside, found = paired_us(action(few), action(many), rounds * 10)
                row[f"{name}_us"], row[f"{name}_beside_10_us"] = round(found, 1), round(beside, 1)
            rows.append(row)
    return rows


def _never(folder: Path) -> None:
    raise AssertionError(f"made again in {folder}")


def workers(rounds: int) -> list[dict[str, Any]]:
    taken: dict[int, list[dict[str, float]]] = {count: [] for count in WORKERS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_suite(folder, _SHARED_CHECKS)
        for number in range(rounds):
            for count, runs in taken.items():
                runs.append(timed(folder, folder / f"cache{number}-{count}", f"-n{count}"))
    return [
        {"workers": count, "s": round(statistics.median(run["s"] for run in runs), 2)} for count, runs in taken.items()
    ]


def exponents(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What each column grows as, over the last two sizes of three and three of four."""
    size, *columns = rows[0]
    last = rows[len(rows) // 3 :]
    logarithms = np.log([row[size] for row in last])
    return {
        name: round(float(np.polyfit(logarithms, np.log([row[name] for row in last]), 1)[0]), 2) for name in columns
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="How time and memory grow with checks, entries and workers.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    results = {"checks": checks(given.rounds), "entries": entries(given.rounds), "workers": workers(given.rounds)}
    largest = results["entries"][-1]
    slowest_ms = max(largest["first_hit_us"], largest["hit_us"], largest["miss_us"]) / 1000
    report = {
        "benchmark": "growth",
        "python": platform.python_version(),
        "onnxruntime": version("onnxruntime"),
        "cores": len(os.sched_getaffinity(0)),
        "rounds": given.rounds,
        "results": results,
        "grow_as": {name: exponents(rows) for name, rows in results.items()},
        "limits": {"a hit or a miss among 10,000, ms": ENTRY_LIMIT_MS},
        "within_limits": slowest_ms <= ENTRY_LIMIT_MS,
    }
    reports.keep(report, given.json)


if __name__ == "__main__":
    main()
