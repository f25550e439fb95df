"""What a diagnosis costs and finds on real models that fail: its time against that of the check that failed.

    python benchmarks/bench_blame.py [--zoo FOLDER] [--models NAME …] [--json FILE]

Ten checks of nine real models without a GPU that fail: in FP16, in BF16 where FP16 passes, and one in both
(`faults/zoo.py` and `quantizers.py` say where they come from). Each is made in a process of its own, three times:
without a diagnosis and with an empty cache (the check's own time: lowering, reference, emulation), again with a full
one, and with the diagnosis. Times are processor time, which other processes disturb least: of the whole diagnosis, of
what passes until its first answer, and both as multiples of the check's own time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import reports  # type: ignore[import-not-found]  # beside this script

from pytest_trtcheck.cache import Cache
from pytest_trtcheck.check.checker import Checker, Request
from pytest_trtcheck.check.request import Allowance
from pytest_trtcheck.spec import ParitySpec

sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))
import quantizers  # type: ignore[import-not-found]
import zoo  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from pytest_trtcheck.record import CheckRecord
    from pytest_trtcheck.spec import Precision

CHECKS: tuple[tuple[str, Precision, bool], ...] = (
    ("magika", "fp16", False),
    ("nudenet", "fp16", False),
    ("ocr_detector", "fp16", False),
    ("ocr_reader", "fp16", False),
    ("ocr_turn", "bf16", False),
    ("silero_vad", "fp16", False),
    ("ddddocr_detector", "fp16", False),
    ("basic_pitch", "fp16", False),
    ("layout", "fp16", True),
    ("layout", "bf16", False),
)
"""Which model in which precision, and whether on generated inputs."""
MEDIAN_LIMIT, LARGEST_LIMIT, FIRST_LIMIT = 20.0, 60.0, 2.0
FOUND = ("step", "headline", "keep_fp32", "keep_value", "confirmed", "trials", "is_complete", "notes")


class Diagnosed:
    """One check, made again and again."""

    def __init__(self, name: str, precision: Precision, folder: Path | None, *, generated: bool) -> None:
        subject = {each.name: each for each in (*zoo.SUBJECTS, quantizers.LAYOUT)}[name]
        cases = [subject.make(np.random.default_rng(seed)) for seed in range(2)]
        given: dict[str, Any] = {} if generated else {"inputs": cases, "inputs_source": "returned"}
        self.request = Request(name, str(subject.path(folder)), [], ParitySpec(precision=(precision,)), **given)
        self.first_s: float | None = None

    def made(self, cache: Path, seconds: float) -> tuple[CheckRecord, float]:
        """The record of the check, and its processor time."""
        self.first_s = None
        checker = Checker(Cache(cache), "onnxruntime", allowance=Allowance(seconds), progress=self._told)
        self._start = processor_s()
        record = checker.check(self.request)
        return record, processor_s() - self._start

    def _told(self, line: str) -> None:
        if self.first_s is None and ": so far, " in line:
            self.first_s = processor_s() - self._start


def processor_s() -> float:
    """The processor time of this process and of those that it started: ONNX Runtime has one of its own (on Linux)."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (
        time.process_time() + ended.ru_utime + ended.ru_stime + sum(map(_ticks, _children())) / os.sysconf("SC_CLK_TCK")
    )


def _children() -> list[str]:
    return [pid for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()]


def _ticks(pid: str) -> int:
    """User and system time of a process, as proc(5) has them."""
    return sum(map(int, Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[11:13]))


def work(name: str, precision: Precision, folder: Path | None, *, generated: bool, seconds: float) -> dict[str, Any]:
    """The figures of one check."""
    check = Diagnosed(name, precision, folder, generated=generated)
    with tempfile.TemporaryDirectory() as once, tempfile.TemporaryDirectory() as cache:
        # What a process loads, it loads once.
        check.made(Path(once), 0)
        _, own = check.made(Path(cache), 0)
        _, again = check.made(Path(cache), 0)
        record, diagnosed = check.made(Path(cache), seconds)
    assert record.parity is not None
    assert record.parity.blame is not None, record.message
    blame, first = record.parity.blame, check.first_s
    culprit = blame.culprit or {}
    return {
        "check_s": own,
        "check_again_s": again,
        "diagnosis_s": diagnosed - again,
        "ratio": (diagnosed - again) / own,
        "first_answer": None if first is None else (first - again) / own,
        **{key: getattr(blame, key) for key in FOUND},
        **{key: culprit.get(key) for key in ("node", "tensor", "kind")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What a diagnosis of real models costs, and what it finds.")
    parser.add_argument("--zoo", type=Path, help="a folder with the packages' files, instead of installed packages")
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME", help="some of them")
    parser.add_argument("--seconds", type=float, default=60.0, help="as --trt-diagnose has it (default: 60)")
    parser.add_argument("--json", type=Path, help="write the result there as well")
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        name, precision, generated = CHECKS[arguments.work]
        found = work(name, precision, arguments.zoo, generated=generated, seconds=arguments.seconds)
        print(json.dumps(found))
        return
    results: dict[str, Any] = {}
    for index, (name, precision, generated) in enumerate(CHECKS):
        if arguments.models and name not in arguments.models:
            continue
        command = [sys.executable, __file__, f"--work={index}", f"--seconds={arguments.seconds}"]
        command += [f"--zoo={arguments.zoo}"] if arguments.zoo else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[f"{name} {precision}{' generated' * generated}"] = json.loads(done.stdout)
    ratios = [each["ratio"] for each in results.values()]
    firsts = [each["first_answer"] for each in results.values()]
    found = {
        "median": statistics.median(ratios),
        "largest": max(ratios),
        "first_answer": None if None in firsts else max(firsts),
    }
    limits = {"median": MEDIAN_LIMIT, "largest": LARGEST_LIMIT, "first_answer": FIRST_LIMIT}
    report = {
        "benchmark": "blame",
        "python": platform.python_version(),
        "machine": platform.machine(),
        "seconds": arguments.seconds,
        "limits": limits,
        "ratios": found,
        "results": results,
        "within_limits": all(value is not None and value <= limits[name] for name, value in found.items()),
    }
    reports.keep(report, arguments.json)


if __name__ == "__main__":
    main()
