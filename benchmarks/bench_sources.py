"""What opening a PyTorch module takes beyond opening an ONNX file, once its export is cached.

    python benchmarks/bench_sources.py [--processes N] [--pairs N] [--json FILE]

A module has to be read whole each time: that its weights are those which were exported is what the cache stands on.
Each process imports PyTorch and makes the module first, then opens the export by its path and the module in turn; what
counts is the median of the differences of such pairs, and of the first pair of each process. The limit is 50 ms; the
processor's time stands beside it, since other work on the machine makes the wall time longer.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import reports  # type: ignore[import-not-found]  # beside this script

from pytest_trtcheck.cache import Cache
from pytest_trtcheck.model.sources import Examples, open_model

LIMIT_MS = 50.0
CASES = ("mobilenet_v3_small", "resnet18", "resnet50")


def milliseconds(pairs: int, case: str, folder: Path) -> dict[str, Any]:
    """How long each took, in turn."""
    import torch
    import torchvision

    torch.manual_seed(0)
    module = getattr(torchvision.models, case)().eval()
    weights = sum(each.nbytes for each in module.state_dict().values())
    cache = Cache(folder / "cache")
    examples = Examples({"x": np.ones((1, 3, 64, 64), np.float32)})
    path = folder / f"{case}.onnx"
    if not path.exists():
        path.write_bytes(open_model(module, (), cache, examples=examples).path.read_bytes())
    wall: list[float] = []
    processor: list[float] = []
    for _ in range(pairs):
        added = []
        for source in (str(path), module):
            start, start_cpu = time.perf_counter(), time.process_time()
            open_model(source, (), cache, examples=examples)
            added.append((time.perf_counter() - start, time.process_time() - start_cpu))
        wall.append(1e3 * (added[1][0] - added[0][0]))
        processor.append(1e3 * (added[1][1] - added[0][1]))
    return {"wall": wall, "processor": processor, "weights_mb": weights / 1e6}


def measured(case: str, folder: Path, processes: int, pairs: int) -> dict[str, float]:
    options = ["--child", case, "--folder", str(folder), "--pairs", str(pairs)]
    command = [sys.executable, "-W", "ignore", __file__, *options]

    def child() -> dict[str, Any]:
        done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    child()
    # Only files that were left alone for a while are trusted to be what they were.
    time.sleep(2.5)
    child()
    runs = [child() for _ in range(processes)]
    found = {"weights_mb": round(runs[0]["weights_mb"], 1)}
    for clock in ("processor", "wall"):
        found[f"first_added_{clock}_ms"] = round(statistics.median(run[clock][0] for run in runs), 2)
        found[f"later_added_{clock}_ms"] = round(statistics.median(ms for run in runs for ms in run[clock][1:]), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Opening a cached PyTorch module against opening a file.")
    parser.add_argument("--processes", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=9, help="in each process")
    parser.add_argument("--json", type=Path, help="write the result there as well")
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(milliseconds(arguments.pairs, arguments.child, arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        results = {case: measured(case, Path(scratch), arguments.processes, arguments.pairs) for case in CASES}
    report = {
        "benchmark": "sources",
        "processes": arguments.processes,
        "pairs_per_process": arguments.pairs,
        "python": platform.python_version(),
        "torch": version("torch"),
        "machine": platform.machine(),
        "limits": {"added_wall_ms": LIMIT_MS},
        "results": results,
        "within_limits": all(
            results[case][f"{which}_added_wall_ms"] <= LIMIT_MS for case in CASES for which in ("first", "later")
        ),
    }
    reports.keep(report, arguments.json)


if __name__ == "__main__":
    main()
