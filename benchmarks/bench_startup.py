"""What the plugin adds to runs that have no inference test: `pytest --help`, and collecting 1,000 other tests.

    python benchmarks/bench_startup.py [--pairs N] [--json FILE]

Runs with and without the plugin take turns; the median of the differences within a pair counts, and the interval that
holds it with 95 % confidence is given. The bytecode is cached beforehand, as it is after anybody's first run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import reports  # type: ignore[import-not-found]  # beside this script

LIMIT_MS = 5.0
TEST_FILES, TESTS_PER_FILE = 20, 50
HEAVY = ("numpy", "onnx", "onnx_ir", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda", "hypothesis", "ml_dtypes")
RUNS = {"help": ["--help"], "collect": ["--collect-only", "-q"]}

# Alone with pytest: other plugins load some of the same libraries for themselves.
LOADED = f"""
import contextlib, io, json, sys
import pytest
with contextlib.redirect_stdout(io.StringIO()):
    code = pytest.main(sys.argv[1:])
ours = sorted(name for name in sys.modules if name.partition(".")[0] == "pytest_trtcheck")
print(json.dumps({{"code": int(code), "heavy": [name for name in {HEAVY!r} if name in sys.modules], "ours": ours}}))
"""


@dataclass(frozen=True)
class Cost:
    """Seconds of one process."""

    wall: float
    cpu: float


def run(arguments: list[str], folder: Path, environment: dict[str, str]) -> Cost:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    return Cost(wall, usage.ru_utime + usage.ru_stime)


def median_interval(values: list[float]) -> tuple[float, float]:
    """Order statistics that enclose the median of the distribution with 95 % confidence (normal approximation)."""
    count = len(values)
    rank = max(0, math.floor((count - 1.96 * math.sqrt(count)) / 2))
    ordered = sorted(values)
    return ordered[rank], ordered[count - 1 - rank]


def measured(arguments: list[str], folder: Path, environment: dict[str, str], pairs: int) -> dict[str, object]:
    without, with_it = [*arguments, "-p", "no:trtcheck"], arguments
    for each in (without, with_it):
        run(each, folder, environment)
    costs: list[tuple[Cost, Cost]] = []
    for index in range(pairs):
        # The order changes from pair to pair, so that neither profits from what the other left in the caches.
        if index % 2:
            second = run(with_it, folder, environment)
            costs.append((run(without, folder, environment), second))
        else:
            costs.append((run(without, folder, environment), run(with_it, folder, environment)))
    result: dict[str, object] = {}
    for clock in ("wall", "cpu"):
        before = [asdict(first)[clock] for first, _ in costs]
        added = [1e3 * (asdict(second)[clock] - asdict(first)[clock]) for first, second in costs]
        low, high = median_interval(added)
        result[f"without_{clock}_ms"] = round(1e3 * statistics.median(before), 2)
        result[f"added_{clock}_ms"] = round(statistics.median(added), 2)
        result[f"added_{clock}_interval_ms"] = [round(low, 2), round(high, 2)]
    return result


def loaded(arguments: list[str], folder: Path, environment: dict[str, str]) -> dict[str, list[str]]:
    """The heavy libraries, and the plugin's own modules, that a run with no other plugin loads."""
    command = [sys.executable, "-c", LOADED, "-p", "trtcheck", "-p", "no:cacheprovider", *arguments]
    alone = {**environment, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=folder, env=alone, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    if answer["code"]:
        raise SystemExit(f"{' '.join(arguments)}: exit status {answer['code']}")
    return {"heavy": answer["heavy"], "ours": answer["ours"]}


def write_tests(folder: Path) -> None:
    (folder / "pytest.ini").write_text("[pytest]\n")
    for index in range(TEST_FILES):
        tests = "\n\n".join(f"def test_{number}():\n    assert True" for number in range(TESTS_PER_FILE))
        (folder / f"test_{index}.py").write_text(f"{tests}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="What the plugin adds to runs without inference tests.")
    parser.add_argument("--pairs", type=int, default=100, help="runs with and without the plugin")
    parser.add_argument("--json", type=Path, help="write the result there as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "project")
        folder.mkdir()
        write_tests(folder)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = str(Path(scratch, "bytecode"))
        results = {
            name: {**measured(given, folder, environment, arguments.pairs), **loaded(given, folder, environment)}
            for name, given in RUNS.items()
        }
    report = {
        "benchmark": "startup",
        "pairs": arguments.pairs,
        "tests": TEST_FILES * TESTS_PER_FILE,
        "python": platform.python_version(),
        "pytest": version("pytest"),
        "machine": platform.machine(),
        "limits": {"added_ms": LIMIT_MS, "heavy": []},
        "results": results,
        "within_limits": all(
            not each["heavy"] and max(float(str(each[f"added_{clock}_ms"])) for clock in ("wall", "cpu")) <= LIMIT_MS
            for each in results.values()
        ),
    }
    reports.keep(report, arguments.json)


if __name__ == "__main__":
    main()
