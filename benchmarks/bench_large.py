"""What a check of a large model costs the first time and the second, in time and in memory.

    python benchmarks/bench_large.py [--layers N] [--width N] [--json FILE]

The model is a stack of fully connected layers, its weights in a file beside it (604 MB unless told otherwise). Each
check runs in a process of its own; its memory is that process's peak less that of one that only imported the same. How
long making each artifact took, with all that it is made from, comes from the cache.
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
    from pytest_trtcheck.spec import Precision

MIB = 2**20
SETTLED_S = 2.5
PRECISIONS: tuple[Precision, ...] = ("fp16", "int8")


def peak_mib() -> float:
    """The peaks of this process and of those that it keeps (ONNX Runtime, a builder), whenever each was."""
    own = Path("/proc/self")
    kept = (own / "task" / str(os.getpid()) / "children").read_text(encoding="ascii").split()
    texts = [Path("/proc", each, "status").read_text(encoding="ascii") for each in ("self", *kept)]
    return sum(int(text.partition("VmHWM:")[2].split()[0]) for text in texts) / 1024


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
    print(json.dumps({"seconds": seconds, "peak_mib": peak_mib()}))


def run(kind: str, folder: Path, width: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", kind, "--folder", str(folder), "--width", str(width)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def measured(precision: Precision, folder: Path, width: int, weights_mib: float) -> dict[str, Any]:
    baseline = run("none", folder, width)["peak_mib"]
    result: dict[str, Any] = {}
    for time_of in ("first", "second"):
        taken = run(precision, folder, width)
        peak = taken["peak_mib"] - baseline
        result[f"{time_of}_s"] = round(taken["seconds"], 2)
        result[f"{time_of}_peak_mib"] = round(peak)
        result[f"{time_of}_peak_ratio"] = round(peak / weights_mib, 2)
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
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        weights_mib = networks.large(folder / "large.onnx", arguments.layers, arguments.width) / MIB
        results = {name: measured(name, folder, arguments.width, weights_mib) for name in PRECISIONS}
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
