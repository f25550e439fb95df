"""What installing the plugin adds to runs that have no inference test, all that it depends on included.

    python benchmarks/bench_startup.py [--pairs N] [--json FILE]

Two environments are made, which takes a minute and the index: one with pytest alone, one with the plugin beside the
same pytest. Runs of the two take turns; the median of the differences within a pair counts, and the interval that holds
it with 95 % confidence is given. The bytecode is cached beforehand, as it is after anybody's first run.

An empty run has one test; of the others it is told what 1,000 tests cost that have nothing to do with the plugin.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import tempfile
import time
import venv
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import reports  # type: ignore[import-not-found]  # beside this script

LIMIT_MS = 5.0
TEST_FILES, TESTS_PER_FILE = 20, 50
HEAVY = ("numpy", "onnx", "onnx_ir", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda", "hypothesis", "ml_dtypes")
ROOT = Path(__file__).parents[1]
RUNS = {
    "empty": ["-q", "test_0.py::test_0"],
    "help": ["--help"],
    "collect": ["--collect-only", "-q"],
    "run": ["-q"],
}
LIMITED = ("empty", "help")
"""What must stay within the limit; a thousand tests are asked a thousand times whether they check something."""

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
    """Seconds of one process: by the clock, and of its own work."""

    wall: float
    cpu: float


def environment_with(place: Path, *packages: str) -> Path:
    """The Python of a new environment with this pytest and what else is named."""
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, f"pytest=={version('pytest')}", *packages], check=True)
    return python


def run(python: Path, arguments: list[str], folder: Path, environment: dict[str, str]) -> Cost:
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", *arguments]
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


def measured(
    pythons: tuple[Path, Path], arguments: list[str], folder: Path, environment: dict[str, str], pairs: int
) -> dict[str, object]:
    """What the second Python takes beyond the first, which has no plugin."""
    for python in pythons:
        run(python, arguments, folder, environment)
    costs: list[tuple[Cost, Cost]] = []
    for index in range(pairs):
        # The order changes from pair to pair, so that neither profits from what the other left in the caches.
        turns = pythons if index % 2 else pythons[::-1]
        taken = {python: run(python, arguments, folder, environment) for python in turns}
        costs.append((taken[pythons[0]], taken[pythons[1]]))
    result: dict[str, object] = {}
    for clock in ("wall", "cpu"):
        before = [asdict(first)[clock] for first, _ in costs]
        added = [1e3 * (asdict(second)[clock] - asdict(first)[clock]) for first, second in costs]
        low, high = median_interval(added)
        result[f"without_{clock}_ms"] = round(1e3 * statistics.median(before), 2)
        result[f"added_{clock}_ms"] = round(statistics.median(added), 2)
        result[f"added_{clock}_interval_ms"] = [round(low, 2), round(high, 2)]
    return result


def loaded(python: Path, arguments: list[str], folder: Path, environment: dict[str, str]) -> dict[str, list[str]]:
    """The heavy libraries, and the plugin's own modules, that a run loads."""
    command = [str(python), "-c", LOADED, "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
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
        pythons = (
            environment_with(Path(scratch, "without")),
            environment_with(Path(scratch, "with"), f"{ROOT}[cpu]"),
        )
        results = {
            name: {
                **measured(pythons, given, folder, environment, arguments.pairs),
                **loaded(pythons[1], given, folder, environment),
            }
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
            not each["heavy"] and (name not in LIMITED or float(str(each["added_cpu_ms"])) <= LIMIT_MS)
            for name, each in results.items()
        ),
    }
    reports.keep(report, arguments.json)


if __name__ == "__main__":
    main()
