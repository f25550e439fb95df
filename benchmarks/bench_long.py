"""What 1,000 checks in one process leave behind, beyond what the report needs.

    python benchmarks/bench_long.py [--checks N] [--json FILE]

One pytest process makes N checks: nets of six sizes in FP16, INT8 and BF16, other inputs each time, with engines built
for an A100 where there is no GPU (TensorRT-RTX). Every tenth fails and is diagnosed, every tenth is an error (a model
that is missing, inputs that do not fit), every fiftieth builder times out. On a GPU the engines run, and there is a
latency check to every five. Every 20 checks: resident memory, open files, threads, child processes, temporary folders;
on a GPU its memory by NVML, and the processes on it.

What grows with the checks is told by the slope over the second half (a line through the samples); the JSON of the
records, which the report needs, is beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networks  # type: ignore[import-not-found]  # beside this script
import numpy as np
import reports  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from collections.abc import Sequence

EVERY = 20
SIZES = (8, 12, 16, 20, 24, 32)

TESTS = """
import numpy as np
import pytest
from pytest_trtcheck import BuildOptions, CheckError, CheckFailed, trt_latency, trt_parity

PRECISIONS = ("fp16", "int8", "bf16")

def sample(size, seed):
    return {"image": np.random.default_rng(seed).standard_normal((1, 3, size, size)).astype("float32")}

@pytest.fixture
def trt_build_options(request):
    number = request.node.callspec.params["number"]
    slow = request.node.name.startswith("test_one") and number % 50 == 49
    return BuildOptions(timeout_s=0.01, workspace_mib=1 + number) if slow else BuildOptions()

@pytest.mark.parametrize("number", range(CHECKS))
def test_one(number, trt_check):
    size, precision = SIZES[number % len(SIZES)], PRECISIONS[number // len(SIZES) % 3]
    model, inputs, more = f"net{size}.onnx", sample(size, number), {}
    if precision == "int8":
        more["calibration"] = [sample(size, seed) for seed in range(2)]
    if number % 10 == 3:
        with pytest.raises(CheckFailed):
            trt_check(model, inputs, precision=precision, tol=1e-9, **more)
    elif number % 10 == 7:
        with pytest.raises(CheckError):
            trt_check("missing.onnx" if number % 20 == 7 else model, {"image": np.zeros((1, 1))}, precision=precision)
    elif number % 50 == 49:
        with pytest.raises(CheckError):
            trt_check(model, inputs, precision=precision, tol=0.5, **more)
    else:
        trt_check(model, inputs, precision=precision, tol=0.5, **more)

if ON_GPU:
    @pytest.mark.parametrize("number", range(CHECKS // 5))
    @trt_latency(p50_ms={"default": 1000.0}, max_seconds=0.2)
    def test_latency(number):
        return None
"""

WATCH = """
import gc, json, os, threading
from pathlib import Path

FOLDER = Path(__file__).parent
COUNT = 0

def now():
    status = Path("/proc/self/status").read_text()
    found = {"checks": COUNT, "rss_kib": int(status.split("VmRSS:")[1].split()[0])}
    found["files"] = len(os.listdir("/proc/self/fd"))
    found["os_threads"] = len(os.listdir("/proc/self/task"))
    found["threads"] = threading.active_count()
    found["children"] = len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
    found["temporary"] = sum(1 for _ in Path(os.environ["TMPDIR"]).iterdir())
    found["objects"] = len(gc.get_objects())
    if ON_GPU:
        import pynvml
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
        found["gpu_kib"] = pynvml.nvmlDeviceGetMemoryInfo(gpu).used // 1024
        found["gpu_processes"] = len(pynvml.nvmlDeviceGetComputeRunningProcesses(gpu))
    return found

def pytest_runtest_logfinish():
    global COUNT
    COUNT += 1
    if COUNT % EVERY == 0:
        gc.collect()
        with (FOLDER / "samples.jsonl").open("a") as file:
            file.write(json.dumps(now()) + "\\\\n")
""".replace("\\\\n", "\\n")


def has_gpu() -> bool:
    from pytest_trtcheck.gpu import device

    return device.detect(()).gpu is not None


def write_suite(folder: Path, checks: int, *, on_gpu: bool) -> None:
    told = f"CHECKS, EVERY, SIZES, ON_GPU = {checks}, {EVERY}, {SIZES}, {on_gpu}\n"
    (folder / "test_long.py").write_text(
        told + TESTS.replace("@trt_latency", "@trt_parity('net16.onnx')\n    @trt_latency")
    )
    (folder / "conftest.py").write_text(told + WATCH)
    (folder / "tmp").mkdir()
    for number, size in enumerate(SIZES):
        net = networks.Builder(number)
        value = net.node("Relu", [net.conv("image", (3, 8))])
        value = net.node("Add", [net.conv(value, (8, 8)), value])
        net.node("GlobalAveragePool", [net.conv(value, (8, 10))])
        networks.save(net, folder / f"net{size}.onnx", [1, 3, size, size], [1, 10, 1, 1])


def slope(samples: Sequence[dict[str, Any]], name: str) -> float:
    """Growth by check over the second half: the line of least squares."""
    half = samples[len(samples) // 2 :]
    return float(np.polyfit([each["checks"] for each in half], [each[name] for each in half], 1)[0])


LIMITS = {"rss_kib": 40.0, "gpu_kib": 8.0}
"""The most by check. Records and their JSON are kept for the report; all else that is counted must not grow at all."""
_NONE = 0.005


def main() -> None:
    parser = argparse.ArgumentParser(description="Make many checks in one process, and watch what grows.")
    parser.add_argument("--checks", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    on_gpu = has_gpu()
    with tempfile.TemporaryDirectory(prefix="long-") as name:
        folder = Path(name)
        write_suite(folder, given.checks, on_gpu=on_gpu)
        arguments = [
            f"--trt-cache-dir={folder / 'cache'}",
            f"--trt-report={folder / 'report.json'}",
            "--trt-diagnose=2",
        ]
        plain = ["-q", "-p", "no:cacheprovider", "-p", "no:asyncio", "--tb=short"]
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                *plain,
                *arguments,
                *([] if on_gpu else ["--trt-gpu=A100"]),
                "test_long.py",
            ],
            cwd=folder,
            env={**os.environ, "TMPDIR": str(folder / "tmp")},
            check=False,
            capture_output=True,
            text=True,
        )
        samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        report = (folder / "report.json").read_bytes() if (folder / "report.json").exists() else b"{}"
    if done.returncode:
        print(done.stdout[-5000:], done.stderr[-2000:], file=sys.stderr)
    counted = [name for name in samples[-1] if name != "checks"]
    slopes = {name: round(slope(samples, name), 3) for name in counted}
    holds = {name: each <= LIMITS.get(name, _NONE) for name, each in slopes.items() if name != "objects"}
    verdicts = json.loads(report).get("summary")
    reports.keep(
        {
            "benchmark": "long",
            "checks": samples[-1]["checks"],
            "verdicts": verdicts,
            "exit_status": done.returncode,
            "first": samples[0],
            "half": samples[len(samples) // 2],
            "last": samples[-1],
            "growth_by_check_over_the_second_half": slopes,
            "report_bytes_by_check": len(report) // samples[-1]["checks"],
            "limits": {**LIMITS, "all others": _NONE},
            "over": [name for name, each in holds.items() if not each],
            "within_limits": all(holds.values()) and done.returncode == 0,
            "versions": {name: version(name) for name in ("pytest", "numpy", "onnxruntime", "tensorrt-rtx")},
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {['no', 'a'][on_gpu]} GPU",
        },
        given.json,
    )


if __name__ == "__main__":
    main()
