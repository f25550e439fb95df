"""What a check with an engine costs, cold and warm, against a bare script and against Polygraphy. On the GPU here.

    python benchmarks/gpu/bench_check.py MODEL.onnx [--repeats N] [--json FILE]

Figures are of whole processes, and less the start of an empty one where that is said. Cold: nothing is cached. The
bare script does the least that the same answer takes: the reference on ONNX Runtime, an engine, one run, one
comparison; of the FP32 model as it is, which TensorRT-RTX computes in TF32, and of a lowered model that it is given.
Polygraphy compares ONNX Runtime with TensorRT on the FP32 model; its engine may use TF32, and so may ours. Warm, it
is given the engine and the reference outputs that it saved.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 8
WARM_LIMIT_S, OURS_LIMIT_S = 1.0, 0.05
COLD_LIMIT = 1.10
POLYGRAPHY_WARM = 3.0

POLYGRAPHY = [sys.executable, "-c", "from polygraphy.tools import main; main()"]

SUITE = """
import time, json, numpy as np
from pytest_trtcheck import trt_parity

@trt_parity({model!r}, precision={precision!r}, tol=0.05)
def test_model():
    return {{{name!r}: np.load({inputs!r})}}
"""

BARE = """
import sys, numpy as np, onnxruntime as ort
import importlib, json
from cuda.bindings import driver
from cuda.core import Device
model, lowered, inputs, name, module = sys.argv[1:]
trt = importlib.import_module(module)
x = np.load(inputs)
session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
expected = session.run(None, {name: x})
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network()
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(lowered)
config = builder.create_builder_config()
profile = builder.create_optimization_profile()
profile.set_shape(name, x.shape, x.shape, x.shape)
config.add_optimization_profile(profile)
plan = builder.build_serialized_network(network, config)
Device(0).set_current()
stream = Device(0).create_stream()
engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
context = engine.create_execution_context()
context.set_input_shape(name, x.shape)
held = {}
for index in range(engine.num_io_tensors):
    tensor = engine.get_tensor_name(index)
    shape = tuple(context.get_tensor_shape(tensor))
    held[tensor] = array = np.empty(shape, trt.nptype(engine.get_tensor_dtype(tensor)))
    _, address = driver.cuMemAlloc(array.nbytes)
    held[tensor] = array, address
    context.set_tensor_address(tensor, int(address))
driver.cuMemcpyHtoD(held[name][1], x.ctypes.data, x.nbytes)
context.execute_async_v3(int(stream.handle))
stream.sync()
for index, output in enumerate(session.get_outputs()):
    array, address = held[output.name]
    driver.cuMemcpyDtoH(array.ctypes.data, address, array.nbytes)
    error = np.abs(array - expected[index]).max() / np.abs(expected[index]).max()
    assert error < 0.05, error
print(error)
"""


def with_bytecode(**environment: str) -> dict[str, str]:
    """The environment, with bytecode cached as it is after anybody's first run."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPYCACHEPREFIX": str(Path(tempfile.gettempdir(), "trtcheck-bytecode")), **environment}


def timed(command: list[str], folder: Path, **environment: str) -> float:
    """Seconds of a process that must succeed."""
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=with_bytecode(**environment), capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return seconds


class Bench:
    """One model in one precision, and the commands to compare."""

    def __init__(self, model: Path, precision: str, folder: Path) -> None:
        from pytest_trtcheck.backends.tensorrt.module import available
        from pytest_trtcheck.cache import Cache
        from pytest_trtcheck.model import inputs as model_inputs
        from pytest_trtcheck.model.sources import open_model
        from pytest_trtcheck.precision.lowering import lower

        cache = Cache(folder / "preparation")
        opened = open_model(str(model), (), cache)
        self.folder = folder
        self.model = model
        self.lowered = lower(opened, precision, cache).path  # type: ignore[arg-type]
        found = available()
        if found is None:
            raise SystemExit("neither tensorrt nor tensorrt_rtx is installed")
        self.module = found
        (case,) = model_inputs.generate(opened, model_inputs.shape_ranges(opened, BATCH, {}), 0)
        ((self.name, array),) = case.items()
        self.inputs = folder / "inputs.npy"
        np.save(self.inputs, array)
        self.shape = array.shape
        self.write_suite("test_model.py", precision)
        self.write_suite("test_tf32.py", "tf32")
        (folder / "bare.py").write_text(BARE)
        (folder / "test_nothing.py").write_text("def test_nothing(): ...\n")

    def write_suite(self, name: str, precision: str) -> None:
        """A test module with one parity test."""
        text = SUITE.format(model=str(self.model), precision=precision, name=self.name, inputs=str(self.inputs))
        (self.folder / name).write_text(text)

    def nothing(self) -> dict[str, float]:
        """Seconds of Python, of pytest with one empty test, and of Polygraphy's help."""
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_nothing.py"]
        return {
            "python": timed([sys.executable, "-c", "pass"], self.folder),
            "pytest": timed(pytest, self.folder),
            "polygraphy": timed([*POLYGRAPHY, "--help"], self.folder),
        }

    def bare(self, built: Path) -> float:
        """Seconds of the bare script, which builds its engine from `built`."""
        script = [sys.executable, "bare.py", str(self.model), str(built), str(self.inputs), self.name]
        return timed([*script, self.module.name], self.folder)

    def ours(self, cache: str, test: str = "test_model.py") -> tuple[float, dict[str, Any]]:
        """Seconds of the process, and the check's record."""
        report = self.folder / "report.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
        # The record's own clock; a report asks for nothing more than the check does.
        seconds = timed([*command, f"--junitxml={report.with_suffix('.xml')}"], self.folder, TRTCHECK_CACHE_DIR=cache)
        return seconds, _record(report.with_suffix(".xml"))

    def polygraphy(self, engine: Path, *, again: bool) -> float:
        """Seconds of Polygraphy's comparison; `again`: with the engine and the reference that it saved before."""
        command = [*POLYGRAPHY, "run"]
        kept = [str(self.folder / f"polygraphy_{name}.json") for name in ("inputs", "outputs")]
        if again:
            command += [
                str(engine),
                "--model-type=engine",
                "--trt",
                "--load-inputs",
                kept[0],
                "--load-outputs",
                kept[1],
            ]
        else:
            shape = f"{self.name}:[{','.join(map(str, self.shape))}]"
            command += [str(self.model), "--onnxrt", "--trt", f"--input-shapes={shape}", "--save-engine", str(engine)]
            command += [f"--trt-{kind}-shapes={shape}" for kind in ("min", "opt", "max")]
            command += ["--save-inputs", kept[0], "--save-outputs", kept[1]]
        command += ["--check-error-stat=max", "--rtol=0.05", "--atol=0.05"]
        return timed(command, self.folder, POLYGRAPHY_USE_TENSORRT_RTX="1")


def _record(junit: Path) -> dict[str, Any]:
    from xml.etree import ElementTree

    for each in ElementTree.parse(junit).iter("property"):
        if each.get("name") == "trtcheck":
            record: dict[str, Any] = json.loads(str(each.get("value")))
            return record
    raise SystemExit("the check left no record")


def inside(folder: Path, cache: str) -> dict[str, float]:
    """Where the time of a warm check goes, in this order, in a process of its own."""
    command = [sys.executable, __file__, "--inside", str(folder)]
    done = subprocess.run(
        command, env=with_bytecode(TRTCHECK_CACHE_DIR=cache), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def traced(folder: Path) -> dict[str, float]:
    """One warm check: its seconds, and those in which TensorRT and the GPU were at work."""
    import pytest

    from pytest_trtcheck.backends.tensorrt import backend as engines
    from pytest_trtcheck.check import checker as checks

    spent = {"check": 0.0, "engine": 0.0, "beside": 0.0}

    def counted(owner: Any, name: str, what: str) -> None:
        inner = getattr(owner, name)

        def timed_call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                spent[what] += time.perf_counter() - start

        setattr(owner, name, timed_call)

    from pytest_trtcheck.backends.tensorrt.engine import Engine

    counted(checks.Checker, "check", "check")
    counted(engines.TensorRT, "load", "engine")
    counted(engines.TensorRT, "start", "beside")
    counted(engines, "available", "engine")  # It imports TensorRT.
    for name in ("__call__", "close", "layers_by_precision"):
        counted(Engine, name, "engine")
    code = pytest.main(["-q", "-p", "no:cacheprovider", str(folder / "test_model.py")])
    if code:
        raise SystemExit(f"exit status {code}")
    # A warm check finds nothing else to do while CUDA starts, so that all of it counts as the engine's.
    return {**spent, "ours": spent["check"] - spent["engine"] - spent["beside"]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Whole checks against a bare script and against Polygraphy.")
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(traced(arguments.inside)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bench = Bench(arguments.model.resolve(), arguments.precision, folder)
        bench.bare(bench.model)  # Libraries into the page cache, for everybody.
        bench.ours(str(folder / "first"))
        rounds = []
        for index in range(arguments.repeats):
            cache, tf32_cache = str(folder / f"cache{index}"), str(folder / f"tf32_{index}")
            empty = bench.nothing()
            cold, record = bench.ours(cache)
            warm, again = bench.ours(cache)
            engine = folder / f"polygraphy{index}.engine"
            rounds.append(
                {
                    **{f"empty_{name}_s": value for name, value in empty.items()},
                    "bare_s": bench.bare(bench.model),
                    "bare_lowered_s": bench.bare(bench.lowered),
                    "cold_s": cold,
                    "cold_check_s": record["duration_s"],
                    "warm_s": warm,
                    "warm_check_s": again["duration_s"],
                    "polygraphy_cold_s": bench.polygraphy(engine, again=False),
                    "polygraphy_warm_s": bench.polygraphy(engine, again=True),
                    "tf32_cold_s": bench.ours(tf32_cache, "test_tf32.py")[0],
                    "tf32_warm_s": bench.ours(tf32_cache, "test_tf32.py")[0],
                }
            )
        time.sleep(3)  # Only files that were left alone for a while are trusted to be what they were.
        bench.ours(str(folder / "cache0"))
        details = inside(folder, str(folder / "cache0"))
    medians = {name: round(statistics.median(each[name] for each in rounds), 3) for name in rounds[0]}
    started = medians["empty_pytest_s"]
    ratios = {
        "cold_to_bare": (medians["tf32_cold_s"] - started) / (medians["bare_s"] - medians["empty_python_s"]),
        "cold_with_lowering_to_bare_without": (medians["cold_s"] - started)
        / (medians["bare_lowered_s"] - medians["empty_python_s"]),
        "polygraphy_cold_to_ours": (medians["polygraphy_cold_s"] - medians["empty_polygraphy_s"])
        / (medians["tf32_cold_s"] - started),
        "polygraphy_warm_to_ours": (medians["polygraphy_warm_s"] - medians["empty_polygraphy_s"])
        / (medians["tf32_warm_s"] - started),
    }
    report = {
        "benchmark": "check",
        "model": arguments.model.name,
        "precision": arguments.precision,
        "tensorrt": f"{bench.module.name} {bench.module.version}",
        "batch": BATCH,
        "repeats": arguments.repeats,
        "medians": medians,
        "less_the_empty_process": {name: round(value, 3) for name, value in ratios.items()},
        "warm_check_s": {name: round(value, 4) for name, value in details.items()},
        "limits": {
            "warm_check_s": WARM_LIMIT_S,
            "ours_s": OURS_LIMIT_S,
            "cold_to_bare": COLD_LIMIT,
            "polygraphy_cold_to_ours": 1.0,
            "polygraphy_warm_to_ours": POLYGRAPHY_WARM,
        },
        "within_limits": details["check"] <= WARM_LIMIT_S
        and details["ours"] <= OURS_LIMIT_S
        and ratios["cold_to_bare"] <= COLD_LIMIT
        and ratios["polygraphy_cold_to_ours"] >= 1
        and ratios["polygraphy_warm_to_ours"] >= POLYGRAPHY_WARM,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
