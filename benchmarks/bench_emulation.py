"""What emulated FP16 and INT8+FP16 cost, against the FP32 model on ONNX Runtime, in time and (FP16) in memory.

    python benchmarks/bench_emulation.py [--repeat N] [--json FILE]

Time is one run of a session that is loaded, all kinds in turn, medians. Memory is the peak of a process that loads and
runs the model once, less that of a process that only imported the same; each in a process of its own. The activations
are every value that the FP32 model computes, added up: what a runtime that frees nothing would hold.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networks  # type: ignore[import-not-found]  # beside this script
import numpy as np
import onnx
import reports  # type: ignore[import-not-found]  # beside this script

from pytest_trtcheck.cache import Cache
from pytest_trtcheck.model import onnxruntime as ort
from pytest_trtcheck.model.ort_runner import OrtRunner
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.precision.emulation import emulated_path
from pytest_trtcheck.precision.lowering import lower
from pytest_trtcheck.spec import Calibration

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_trtcheck.spec import Precision

LIMITS = {"time_ratio": 3.0, "int8_fp16_time_ratio": 3.5, "memory_ratio": 2.5}
MIB = 2**20

Inputs = dict[str, "NDArray[Any]"]


def models(folder: Path) -> dict[str, tuple[Path, Inputs]]:
    """The nets and what to feed them."""
    rng = np.random.default_rng(0)
    resnet = folder / "resnet.onnx"
    if not resnet.exists():
        networks.resnet(resnet)
    return {
        "nudenet": (networks.nudenet(), {"images": rng.random((1, 3, 320, 320), dtype=np.float32)}),
        "nudenet_batch_8": (networks.nudenet(), {"images": rng.random((8, 3, 320, 320), dtype=np.float32)}),
        "resnet": (resnet, {"image": rng.random((1, 3, 224, 224), dtype=np.float32)}),
        "resnet_batch_8": (resnet, {"image": rng.random((8, 3, 224, 224), dtype=np.float32)}),
    }


def emulated(path: Path, folder: Path, precision: Precision = "fp16", inputs: Inputs | None = None) -> Path:
    """The emulated model, made where it is not in the cache yet; what is quantized is calibrated with `inputs`."""
    cache = Cache(folder / "cache")
    model = open_model(path, (), cache)
    lowered = lower(model, precision, cache, calibration=inputs and Calibration([inputs], method="minmax"))
    return emulated_path(model, lowered, precision, cache)


def time_ratio(path: Path, folder: Path, inputs: Inputs, repeat: int) -> dict[str, float]:
    lowered = [emulated(path, folder), emulated(path, folder, "int8+fp16", inputs)]
    runners = [OrtRunner(each, "emulated") for each in (path, *lowered)]
    exact, *others = (next(iter(runner(inputs).values())) for runner in runners)
    if any(np.array_equal(exact, other) for other in others):
        raise SystemExit(f"{path.name}: nothing was rounded, so nothing was emulated")
    times: list[list[float]] = [[] for _ in runners]
    for _ in range(repeat + 1):
        for runner, taken in zip(runners, times, strict=True):
            start = time.perf_counter()
            runner(inputs)
            taken.append(time.perf_counter() - start)
    before, after, pair = (statistics.median(each[1:]) for each in times)
    return {
        "fp32_ms": 1e3 * before,
        "emulated_ms": 1e3 * after,
        "time_ratio": after / before,
        "int8_fp16_ms": 1e3 * pair,
        "int8_fp16_time_ratio": pair / before,
    }


def peak_kib() -> int:
    # Not ru_maxrss: a child inherits its parent's.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0])


def peak_mib(kind: str, name: str, folder: Path) -> float:
    """What a process needs beyond importing the libraries and making the inputs."""
    command = [sys.executable, __file__, "--child", f"{kind}:{name}", "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1]) / 1024


def child(kind: str, name: str, folder: Path) -> None:
    path, inputs = models(folder)[name]
    ort.module()
    if kind != "baseline":
        OrtRunner(emulated(path, folder) if kind == "emulated" else path, kind)(inputs)
    print(peak_kib())


def activations_mib(path: Path, inputs: Inputs) -> float:
    """Bytes of every value that the FP32 model computes, as ONNX infers their shapes."""
    model = onnx.load(path)
    for value in model.graph.input:
        if value.name in inputs:
            for dim, size in zip(value.type.tensor_type.shape.dim, inputs[value.name].shape, strict=True):
                dim.dim_value = size
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    total = 0
    for value in (*inferred.value_info, *inferred.output):
        dims = value.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            size = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).itemsize
            total += int(np.prod([dim.dim_value for dim in dims], dtype=np.int64)) * size
    return total / MIB


def memory_ratio(name: str, path: Path, inputs: Inputs, folder: Path) -> dict[str, float]:
    emulated(path, folder)
    baseline = statistics.median(peak_mib("baseline", name, folder) for _ in range(3))
    fp32, ours = (
        statistics.median(peak_mib(kind, name, folder) for _ in range(3)) - baseline for kind in ("fp32", "emulated")
    )
    model = path.stat().st_size / MIB
    activations = activations_mib(path, inputs)
    return {
        "model_mib": model,
        "activations_mib": activations,
        "fp32_peak_mib": fp32,
        "emulated_peak_mib": ours,
        "memory_ratio": ours / (model + activations),
        "memory_ratio_to_fp32": ours / fp32,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of emulated FP16 inference.")
    parser.add_argument("--repeat", type=int, default=30, help="runs of which the medians count")
    parser.add_argument("--json", type=Path, help="write the result there as well")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, _, name = arguments.child.partition(":")
        child(kind, name, arguments.folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        results = {
            name: {
                key: round(value, 3)
                for key, value in (
                    time_ratio(path, folder, inputs, arguments.repeat) | memory_ratio(name, path, inputs, folder)
                ).items()
            }
            for name, (path, inputs) in models(folder).items()
        }
    report = {
        "benchmark": "emulation",
        "repeat": arguments.repeat,
        "python": platform.python_version(),
        "onnxruntime": version("onnxruntime"),
        "machine": platform.machine(),
        "limits": LIMITS,
        "results": results,
        "within_limits": all(each[name] <= limit for each in results.values() for name, limit in LIMITS.items()),
    }
    reports.keep(report, arguments.json)


if __name__ == "__main__":
    main()
