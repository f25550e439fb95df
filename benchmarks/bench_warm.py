"""What a parity check costs beyond its own inference once reference, lowered model and engine are cached.

    python benchmarks/bench_warm.py [--processes N] [--json FILE]

Inference is loading the emulated model into ONNX Runtime, running and freeing it, where its outputs are not kept; all
else within `Checker.check` counts as overhead. Each process imports the libraries and prepares its inputs first, then
makes the same check several times: the first one, and the median of those after it, are reported, medians over all
processes. Where TensorRT-RTX is installed, one check is also made with an engine that was compiled for another GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networks  # type: ignore[import-not-found]  # beside this script
import numpy as np
import reports  # type: ignore[import-not-found]  # beside this script

from pytest_trtcheck import gpu
from pytest_trtcheck.backends.base import Machine
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.check import checker as check
from pytest_trtcheck.check.request import Allowance
from pytest_trtcheck.model import onnxruntime as ort
from pytest_trtcheck.model.ort_runner import OrtRunner
from pytest_trtcheck.spec import ParitySpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_trtcheck.record import CheckRecord

LIMIT_MS = 20.0
REPEATS = 8
SAMPLES = 32
SETTLED_S = 2.5
CASES = ("nudenet_fp16", "magika_fp16", "resnet_int8", *(["nudenet_fp16_engine"] if find_spec("tensorrt_rtx") else []))


class Inference:
    """Adds up the time that ONNX Runtime takes to load, run and free the emulated model."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._count("__init__")
        self._count("__call__")
        self._count("close")

    def _count(self, name: str) -> None:
        method: Callable[..., Any] = getattr(OrtRunner, name)

        def timed(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        setattr(OrtRunner, name, timed)


def request(case: str, folder: Path) -> tuple[check.Request, bool]:
    """The check to make, and whether an engine belongs to it."""
    name, precision, *engine = case.split("_")
    rng = np.random.default_rng(0)
    inputs: dict[str, Any] = {
        "nudenet": {"images": rng.random((1, 3, 320, 320), dtype=np.float32)},
        "magika": {"bytes": rng.integers(0, 257, (1, 2048)).astype(np.int32)},
        "resnet": {"image": rng.random((1, 3, 224, 224), dtype=np.float32)},
    }
    models = {"nudenet": networks.nudenet, "magika": networks.magika, "resnet": lambda: folder / "resnet.onnx"}
    made = check.Request(
        nodeid=case,
        model=str(models[name]()),
        folders=(folder,),
        parity=ParitySpec(precision=(precision,)),  # type: ignore[arg-type]
        inputs=inputs[name],
        inputs_source="returned",
        calibration="samples/*.npz" if precision == "int8" else None,
    )
    return made, bool(engine)


def checks(case: str, folder: Path) -> list[dict[str, float]]:
    """Milliseconds of each of several checks in this process."""
    made, with_engine = request(case, folder)
    checker = check.Checker(
        allowance=Allowance(0),  # what a failed check costs is bench_diagnose's matter
        cache=Cache(folder / "cache"),
        machine=Machine(gpu.find_gpu("A100", ()) if with_engine else None),
    )
    ort.module()
    if with_engine:
        import_module("tensorrt_rtx")
    inference = Inference()
    times = []
    for _ in range(REPEATS):
        inference.seconds = 0.0
        start = time.perf_counter()
        record = checker.check(made)
        total = time.perf_counter() - start
        require_sound(record, with_engine)
        times.append({"overhead": 1e3 * (total - inference.seconds), "inference": 1e3 * inference.seconds})
    return times


def require_sound(record: CheckRecord, with_engine: bool) -> None:
    if record.verdict == "error" or record.parity is None or (record.engine is not None) != with_engine:
        raise SystemExit(f"{record.nodeid}: {record.verdict}: {record.message}")


def measured(case: str, folder: Path, processes: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", case, "--folder", str(folder)]
    # Bytecode is cached, as it is after anybody's first run.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")

    def child() -> list[dict[str, float]]:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        times: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
        return times

    child()
    # Only files that were left alone for a while are trusted to be what they were; a user's model is older than that.
    time.sleep(SETTLED_S)
    child()
    runs = [child() for _ in range(processes)]
    later = [each for times in runs for each in times[1:]]
    return {
        "first_overhead_ms": round(statistics.median(times[0]["overhead"] for times in runs), 2),
        "later_overhead_ms": round(statistics.median(each["overhead"] for each in later), 2),
        "inference_ms": round(statistics.median(each["inference"] for each in later), 2),
    }


def prepare(folder: Path) -> None:
    networks.resnet(folder / "resnet.onnx")
    (folder / "samples").mkdir()
    rng = np.random.default_rng(1)
    for index in range(SAMPLES):
        np.savez(folder / "samples" / f"{index:03}.npz", image=rng.random((1, 3, 224, 224), dtype=np.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description="Overhead of a parity check with everything cached.")
    parser.add_argument("--processes", type=int, default=7, help="processes of which the medians count")
    parser.add_argument("--json", type=Path, help="write the result there as well")
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(checks(arguments.child, arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch))
        results = {case: measured(case, Path(scratch), arguments.processes) for case in CASES}
    report = {
        "benchmark": "warm",
        "processes": arguments.processes,
        "checks_per_process": REPEATS,
        "calibration_samples": SAMPLES,
        "python": platform.python_version(),
        "onnxruntime": version("onnxruntime"),
        "machine": platform.machine(),
        "limits": {"overhead_ms": LIMIT_MS},
        "results": results,
        "within_limits": all(
            max(each["first_overhead_ms"], each["later_overhead_ms"]) <= LIMIT_MS for each in results.values()
        ),
    }
    reports.keep(report, arguments.json)


if __name__ == "__main__":
    main()
