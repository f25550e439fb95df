"""What installing the plugin adds to runs that have no inference test, all that it depends on included.

    python benchmarks/bench_startup.py [--pairs N] [--json FILE]

Three environments are made, which takes minutes and the index: one with pytest alone, one with the plugin beside the
same pytest, and one with as many files in which the plugin is an empty module. That one is the floor: pytest looks at
every file that a plugin's distribution installs. Runs of the three take turns; the median of the differences within a
round counts, and the interval that holds it with 95 % confidence is given. The bytecode is cached beforehand, as it is
after anybody's first run.

An empty run has one test; of the others it is told what 1,000 tests cost that have nothing to do with the plugin.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
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

EMPTIED = """
import importlib.metadata
files = importlib.metadata.files("pytest-trtcheck")
for name in ("__init__", "plugin/__init__", "plugin/hooks"):
    importlib.metadata.distribution("pytest-trtcheck").locate_file(f"pytest_trtcheck/{name}.py").write_text("")
print(len(files))
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


def empty_the_plugin(python: Path) -> int:
    """Leave nothing in the modules that every run loads first. Returns how many files the distribution has."""
    answer = subprocess.run([str(python), "-c", EMPTIED], check=True, capture_output=True, text=True)
    return int(answer.stdout)


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
    pythons: dict[str, Path], arguments: list[str], folder: Path, environment: dict[str, str], pairs: int
) -> dict[str, object]:
    """What the other Pythons take beyond that of the key "without", which has no plugin."""
    for python in pythons.values():
        run(python, arguments, folder, environment)
    rounds: list[dict[str, Cost]] = []
    for _ in range(pairs):
        # The order changes from round to round, so that none profits from what another left in the caches.
        turns = random.sample(sorted(pythons), len(pythons))
        rounds.append({name: run(pythons[name], arguments, folder, environment) for name in turns})
    result: dict[str, object] = {}
    for clock in ("wall", "cpu"):
        taken = {name: [1e3 * asdict(each[name])[clock] for each in rounds] for name in pythons}
        result[f"without_{clock}_ms"] = round(statistics.median(taken["without"]), 2)
        for name in ("floor", "added"):
            added = [one - other for one, other in zip(taken[name], taken["without"], strict=True)]
            result[f"{name}_{clock}_ms"] = round(statistics.median(added), 2)
            result[f"{name}_{clock}_interval_ms"] = [round(each, 2) for each in median_interval(added)]
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
    parser.add_argument("--pairs", type=int, default=100, help="rounds of runs, with and without the plugin")
    parser.add_argument("--json", type=Path, help="write the result there as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "project")
        folder.mkdir()
        write_tests(folder)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        made = {name: Path(scratch, name) for name in ("without", "floor", "added")}
        pythons = {
            name: environment_with(place, *([] if name == "without" else [f"{ROOT}[cpu]"]))
            for name, place in made.items()
        }
        files = empty_the_plugin(pythons["floor"])
        results = {
            name: {
                **measured(pythons, given, folder, environment, arguments.pairs),
                **loaded(pythons["added"], given, folder, environment),
            }
            for name, given in RUNS.items()
        }
    report = {
        "benchmark": "startup",
        "pairs": arguments.pairs,
        "installed_files": files,
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
