"""What a check of a large model costs the first time and the second, in time and in memory.

    python benchmarks/bench_large.py [--layers N] [--width N] [--json FILE]

The model is a stack of fully connected layers (604 MB unless told otherwise), its weights in a file beside it, then
(below 2 GiB) in its own. Each check runs in a process of its own, which starts others; what is counted of their memory
is looked at every 5 ms, those that ended included, less that of a process that only imported the same:

- `peak`: the peaks of all processes (VmHWM, which the kernel keeps, however short they were) added up, though they were
  at other times, and pages that several processes map are counted for each.
- `together`: the most that all had in memory at one time (VmRSS), as far as it was looked at. It may miss what was
  there for less than 5 ms.

Mapped pages of a model's files count in both; the kernel's cache of files that nobody maps in neither, since it is
given up for whoever needs memory. `cpu_s` is the processor's time in all of them, less that process's. How long making
each artifact took, with all that it is made from, comes from the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networks  # type: ignore[import-not-found]  # beside this script
import numpy as np
import reports  # type: ignore[import-not-found]  # beside this script

from pytest_trtcheck.cache import Cache
from pytest_trtcheck.cache.manifest import read_manifest
from pytest_trtcheck.check import checker as check
from pytest_trtcheck.check.request import Allowance
from pytest_trtcheck.model import onnxruntime as ort
from pytest_trtcheck.spec import ParitySpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_trtcheck.spec import Precision

MIB = 2**20
SETTLED_S = 2.5
LOOKS_S = 0.005
LARGEST_FILE = 2**31
"""Of protobuf."""
PRECISIONS: tuple[Precision, ...] = ("fp16", "int8")


def family(process: int) -> Iterator[int]:
    """A process and those that it and its threads started, as far as they are there."""
    yield process
    with suppress(OSError):
        for thread in Path(f"/proc/{process}/task").iterdir():
            for started in (thread / "children").read_text(encoding="ascii").split():
                yield from family(int(started))


def memory_mib(process: int) -> tuple[float, float]:
    """A process's peak until now, and what it has in memory."""
    with suppress(OSError):
        text = Path(f"/proc/{process}/status").read_text(encoding="ascii")
        if "VmHWM:" in text:
            peak, now = (int(text.partition(key)[2].split()[0]) / 1024 for key in ("VmHWM:", "VmRSS:"))
            return peak, now
    return 0.0, 0.0


def child(precision: Precision | None, folder: Path, width: int) -> None:
    """Make the check, or only what every process does before it; print what it took."""
    image = np.random.default_rng(0).standard_normal((1, width), dtype=np.float32)
    ort.module()
    seconds = 0.0
    if precision is not None:
        request = check.Request(
            nodeid=precision,
            model=str(folder / "large.onnx"),
            folders=(folder,),
            parity=ParitySpec(precision=(precision,)),
            inputs={"image": image},
            calibration=[{"image": image}] if precision == "int8" else None,
        )
        checker = check.Checker(cache=Cache(folder / precision), allowance=Allowance(0))
        record = checker.check(request)
        if record.verdict not in {"pass", "fail"}:
            raise SystemExit(f"{record.verdict}: {record.message}")
        seconds = record.duration_s
    print(json.dumps({"seconds": seconds}))


def run(kind: str, folder: Path, width: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", kind, "--folder", str(folder), "--width", str(width)]
    peaks: dict[int, float] = {}
    together, before = 0.0, os.times()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        while running.poll() is None:
            found = {each: memory_mib(each) for each in family(running.pid)}
            # One that has just ended tells nothing any more; what it told last counts.
            peaks |= {each: peak for each, (peak, _) in found.items() if peak}
            together = max(together, sum(now for _, now in found.values()))
            time.sleep(LOOKS_S)
        out, errors = running.communicate()
    if running.returncode:
        raise SystemExit(errors)
    answer: dict[str, float] = json.loads(out.splitlines()[-1])
    used = os.times()
    cpu_s = used.children_user - before.children_user + used.children_system - before.children_system
    return {**answer, "cpu_s": cpu_s, "peak": sum(peaks.values()), "together": together}


def measured(precision: Precision, folder: Path, width: int, weights_mib: float) -> dict[str, Any]:
    baseline = run("none", folder, width)
    result: dict[str, Any] = {}
    for time_of in ("first", "second"):
        taken = run(precision, folder, width)
        result[f"{time_of}_s"] = round(taken["seconds"], 2)
        result[f"{time_of}_cpu_s"] = round(taken["cpu_s"] - baseline["cpu_s"], 2)
        for kind in ("peak", "together"):
            mib = taken[kind] - baseline[kind]
            result[f"{time_of}_{kind}_mib"] = round(mib)
            result[f"{time_of}_{kind}_ratio"] = round(mib / weights_mib, 2)
        time.sleep(SETTLED_S)
    made = Cache(folder / precision).entries()
    result["making_s"] = {entry.kind: round(read_manifest(entry.path).make_s, 2) for entry in made}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of checking a large model.")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--json", type=Path, help="write the result there as well")
    parser.add_argument("--child", choices=(*PRECISIONS, "none"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(None if arguments.child == "none" else arguments.child, arguments.folder, arguments.width)
        return
    results: dict[str, dict[str, Any]] = {}
    is_small_enough = arguments.layers * arguments.width**2 * 4 < LARGEST_FILE
    for form in ("beside", "one_file") if is_small_enough else ("beside",):
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "large.onnx")
            size = networks.large(path, arguments.layers, arguments.width, external=form == "beside")
            weights_mib = size / MIB
            results[form] = {name: measured(name, path.parent, arguments.width, weights_mib) for name in PRECISIONS}
    report = {
        "benchmark": "large",
        "weights_mib": round(weights_mib, 1),
        "python": platform.python_version(),
        "onnxruntime": version("onnxruntime"),
        "machine": platform.machine(),
        "results": results,
    }
    reports.keep(report, arguments.json)


if __name__ == "__main__":
    main()
