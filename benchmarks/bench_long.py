"""What 1,000 checks in one process leave behind, beyond what the report needs.

    python benchmarks/bench_long.py [--checks N] [--json FILE]

One pytest process makes N checks: nets of six sizes in FP16, INT8 and BF16, other inputs each time, with engines built
for an A100 where there is no GPU (TensorRT-RTX). Every tenth fails and is diagnosed, every tenth is an error (a model
that is missing, inputs that do not fit), every fiftieth builder times out. On a GPU the engines run, in TF32 instead of
INT8 (the TensorRT-RTX that runs on Hopper builds no INT8 convolution), and every fifth check measures latency. Every 20
checks: resident memory and what of the heap is in use (Linux with glibc 2.33), open files, threads, child processes,
temporary folders; on a GPU its memory by NVML, the processes on it, and how many contexts of engines were made.

What grows with the checks is told by the slope over the second half (a line through the samples); the JSON of the
records, which the report needs, is beside it. TensorRT keeps something of every context that it makes, also where
nothing but TensorRT is there: that is measured in a process of its own, and is not counted.
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

PRECISIONS = ("fp16", "tf32" if ON_GPU else "int8", "bf16")

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
    @trt_parity("net16.onnx")
    @trt_latency(p50_ms={"default": 1000.0}, max_seconds=0.2)
    def test_latency(number):
        return None
"""

WATCH = """
import gc, json, os, threading
from pathlib import Path

FOLDER = Path(__file__).parent
COUNT = CONTEXTS = 0

if ON_GPU:
    import pynvml
    from pytest_trtcheck.backends.tensorrt.engine import Engine

    create_context = Engine._create_context

    def counted(*arguments):
        global CONTEXTS
        CONTEXTS += 1
        return create_context(*arguments)

    Engine._create_context = counted

def pytest_collection_modifyitems(items):
    # What measures latency among the others: each half of the run holds as many.
    items.sort(key=lambda item: item.callspec.params["number"] * (5 if item.originalname == "test_latency" else 1))

def now():
    status = Path("/proc/self/status").read_text()
    found = {"checks": COUNT, "rss_kib": int(status.split("VmRSS:")[1].split()[0]), "heap_kib": round(heap_kib())}
    found["files"] = len(os.listdir("/proc/self/fd"))
    found["os_threads"] = len(os.listdir("/proc/self/task"))
    found["threads"] = threading.active_count()
    found["children"] = len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
    found["temporary"] = sum(1 for _ in Path(os.environ["TMPDIR"]).iterdir())
    found["objects"] = len(gc.get_objects())
    if ON_GPU:
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
        found["gpu_kib"] = pynvml.nvmlDeviceGetMemoryInfo(gpu).used // 1024
        found["gpu_processes"] = len(pynvml.nvmlDeviceGetComputeRunningProcesses(gpu))
        found["contexts"] = CONTEXTS
    return found

def pytest_runtest_logfinish():
    global COUNT
    COUNT += 1
    if COUNT % EVERY == 0:
        gc.collect()
        with (FOLDER / "samples.jsonl").open("a") as file:
            file.write(json.dumps(now()) + "\\\\n")
""".replace("\\\\n", "\\n")

HEAP = """
import ctypes

class Mallinfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo

def heap_kib():
    # What is in use: how much of the free memory stays with the process is the allocator's affair.
    found = libc.mallinfo2()
    return (found.uordblks + found.hblkhd) / 1024
"""

BARE = (
    HEAP
    + """
import json, sys
from pathlib import Path
import numpy as np, pynvml
import tensorrt_rtx as trt
from cuda.bindings import driver

driver.cuInit(0)
_, primary = driver.cuDevicePrimaryCtxRetain(0)
driver.cuCtxSetCurrent(primary)
pynvml.nvmlInit()
gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
logger = trt.Logger(trt.Logger.ERROR)
engine = trt.Runtime(logger).deserialize_cuda_engine(Path(sys.argv[1]).read_bytes())
kernels, samples = None, []
for number in range(int(sys.argv[2])):
    config = engine.create_runtime_config()
    cache = config.create_runtime_cache()
    if kernels:
        cache.deserialize(kernels)
    config.set_runtime_cache(cache)
    context = engine.create_execution_context(config)
    kernels = kernels or bytes(memoryview(cache.serialize()))
    del context, config, cache
    samples.append((heap_kib(), pynvml.nvmlDeviceGetMemoryInfo(gpu).used / 1024))
half = np.array(samples[len(samples) // 2 :])
print(json.dumps(np.polyfit(range(len(half)), half, 1)[0].tolist()))
"""
)
CONTEXTS = 300


def left_by_a_context(folder: Path) -> dict[str, float]:
    """What TensorRT alone keeps of each context of an engine that it makes and frees, its kernels compiled, in KiB."""
    from pytest_trtcheck.backends.tensorrt import build
    from pytest_trtcheck.backends.tensorrt.module import Target, find_module
    from pytest_trtcheck.gpu import device

    gpu = device.detect(()).gpu
    assert gpu is not None
    target = Target(gpu.compute_capability, here=True)
    build.build(find_module("tensorrt_rtx"), folder / "net16.onnx", folder / "bare", target=target, precision="tf32")
    command = [sys.executable, "-c", BARE, str(folder / "bare"), str(CONTEXTS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    heap_kib, gpu_kib = json.loads(done.stdout)
    return {"heap_kib": round(heap_kib, 1), "gpu_kib": round(gpu_kib, 1)}


def has_gpu() -> bool:
    from pytest_trtcheck.gpu import device

    return device.detect(()).gpu is not None


def write_suite(folder: Path, checks: int, *, on_gpu: bool) -> None:
    told = f"CHECKS, EVERY, SIZES, ON_GPU = {checks}, {EVERY}, {SIZES}, {on_gpu}\n"
    (folder / "test_long.py").write_text(told + TESTS)
    (folder / "conftest.py").write_text(told + HEAP + WATCH)
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


LIMITS = {"heap_kib": 40.0, "gpu_kib": 8.0}
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
        by_context = left_by_a_context(folder) if on_gpu else {}
    if done.returncode:
        print(done.stdout[-5000:], done.stderr[-2000:], file=sys.stderr)
    counted = [name for name in samples[-1] if name != "checks"]
    slopes = {name: round(slope(samples, name), 3) for name in counted}
    ours = {
        name: round(each - by_context.get(name, 0.0) * slopes.get("contexts", 0.0), 3)
        for name, each in slopes.items()
        if name not in {"objects", "contexts", "rss_kib"}
    }
    holds = {name: each <= LIMITS.get(name, _NONE) for name, each in ours.items()}
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
            "left_by_a_context_of_bare_tensorrt": by_context,
            "growth_beyond_that": ours,
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
