"""What a check with an engine costs, cold and warm, against a bare script and against Polygraphy. On the GPU here.

    python benchmarks/gpu/bench_check.py MODEL.onnx … [--repeats N] [--batch N] [--json FILE]

Figures are of whole processes, and less the start of an empty one where that is said. Cold: nothing is cached. The
bare script does the least that the same answer takes: the reference on ONNX Runtime, an engine, one run, one
comparison; of the FP32 model as it is, which TensorRT-RTX computes in TF32, and of a lowered model that it is given.
Polygraphy compares ONNX Runtime with TensorRT on the FP32 model; its engine may use TF32, and so may ours. Warm, it
is given the engine and the reference outputs that it saved. Where the time of a cold and of a warm check goes is told
by stages; what goes on beside another stage (in a thread, or in the builder process) is said to.

Polygraphy is pure Python: `pip install --no-deps polygraphy`, or where there is no network its one wheel, which
`pip download --no-deps polygraphy` fetches elsewhere (polygraphy-0.53.6-py3-none-any.whl).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LIMITS = {
    # Warm, of Polygraphy's whole process; cold, of a bare script, each less its own empty process.
    "warm_process_to_polygraphy": 1 / 3,
    "warm_check_to_polygraphy": 1 / 6,
    "cold_from_lowered_to_bare": 1.10,
    "cold_from_fp32_to_bare": 1.25,
}

COLD_TURNS = 3
"""How often a round runs what is cold: kernels compile a quarter longer in one process than in the next."""

POLYGRAPHY = [sys.executable, "-c", "from polygraphy.tools import main; main()"]

SUITE = """
import time, json, numpy as np
from pytest_trtcheck import trt_parity

@trt_parity({model!r}, precision={precision!r}, tol=0.05, reference={reference!r})
def test_model():
    return {{{name!r}: np.load({inputs!r})}}
"""

BARE = """
import sys, numpy as np, onnxruntime as ort
import importlib, json
from cuda.bindings import driver
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
_, primary = driver.cuDevicePrimaryCtxRetain(0)
driver.cuCtxSetCurrent(primary)
_, stream = driver.cuStreamCreate(1)
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
context.execute_async_v3(int(stream))
driver.cuStreamSynchronize(stream)
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

    def __init__(self, model: Path, precision: str, batch: int, folder: Path) -> None:
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
        (case,) = model_inputs.generate(opened, model_inputs.shape_ranges(opened, batch, {}), 0)
        ((self.name, array),) = case.items()
        self.inputs = folder / "inputs.npy"
        np.save(self.inputs, array)
        self.shape = array.shape
        self.write_suite("test_model.py", model, precision)
        self.write_suite("test_lowered.py", self.lowered, precision, reference=str(model))
        self.write_suite("test_tf32.py", model, "tf32")
        (folder / "bare.py").write_text(BARE)
        (folder / "test_nothing.py").write_text("def test_nothing(): ...\n")

    def write_suite(self, file: str, model: Path, precision: str, reference: str | None = None) -> None:
        """A test module with one parity test."""
        given = {"model": str(model), "precision": precision, "reference": reference}
        (self.folder / file).write_text(SUITE.format(**given, name=self.name, inputs=str(self.inputs)))

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


def stages(folder: Path, cache: str) -> list[dict[str, Any]]:
    """Where the time of a check goes, in a process of its own."""
    command = [sys.executable, __file__, "--stages", str(folder)]
    done = subprocess.run(
        command, env=with_bytecode(TRTCHECK_CACHE_DIR=cache), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


class Trace:
    """A pytest plugin that notes when what began and how long it took, from the start of pytest on."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.rows: list[dict[str, Any]] = []

    def note(self, stage: str, began: float, depth: int = 0) -> None:
        """A stage that ends now."""
        ended, main = time.perf_counter(), threading.current_thread() is threading.main_thread()
        row = {"stage": stage, "began_s": round(began - self.start, 4), "seconds": round(ended - began, 4)}
        self.rows.append({**row, "depth": depth, "beside": not main})

    def around(self, stage: str, inner: Callable[..., Any], depth: int = 0) -> Callable[..., Any]:
        """A function that is noted each time that it is called."""

        def noted(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.note(stage, began, depth)

        return noted

    def pytest_runtest_setup(self) -> None:
        """Put a watch on every stage."""
        self.note("pytest until the first test", self.start)
        began = time.perf_counter()
        from pytest_trtcheck.backends.tensorrt import backend, engine, trial
        from pytest_trtcheck.backends.tensorrt import build as tensorrt
        from pytest_trtcheck.check import checker
        from pytest_trtcheck.check.request import Settings
        from pytest_trtcheck.check.steps import asked
        from pytest_trtcheck.model import apart
        from pytest_trtcheck.precision import reference

        self.note("imports for the first check", began)
        for owner, name, stage, depth in (
            (checker.Checker, "check", "the check", 0),
            (asked, "model_of", "the model is opened and hashed", 1),
            (asked, "lowered_model", "it is lowered, or found in the cache", 1),
            (Settings, "system", "TensorRT is imported in this process", 1),
            (backend.TensorRT, "accepts", "does TensorRT take it?", 1),
            (backend.TensorRT, "start", "CUDA starts in this process", 2),
            (tensorrt._Early, "is_fit", "waiting for the builder process to be ready", 2),
            (tensorrt, "build", "the builder process parses and builds", 2),
            (backend, "hash_file", "the engine is hashed", 2),
            (trial.EngineApart, "__init__", "the builder process loads and runs it once", 2),
            (trial.EngineApart, "__call__", "a run there", 3),
            (apart, "_close", "another process is ended", 2),
            (reference.Reference, "__call__", "the reference", 2),
            (engine.Engine, "__init__", "the engine is loaded, with its kernels", 2),
            (engine.Engine, "__call__", "a run", 2),
            (engine.Engine, "layer_information", "the engine inspector", 2),
            (engine.Engine, "close", "the engine is freed", 1),
        ):
            setattr(owner, name, self.around(stage, getattr(owner, name), depth))
        names = vars(checker)
        names["CHECKING"] = tuple(self.around(f"step: {step.__name__}", step, 1) for step in names["CHECKING"])


def traced(folder: Path) -> list[dict[str, Any]]:
    """One check: its stages in the order in which they began."""
    import pytest

    trace = Trace()
    code = pytest.main(["-q", "-p", "no:cacheprovider", str(folder / "test_model.py")], plugins=[trace])
    if code:
        raise SystemExit(f"exit status {code}")
    trace.note("all of pytest", trace.start)
    return sorted(trace.rows, key=lambda row: (row["began_s"], row["depth"]))


def table(rows: Sequence[dict[str, Any]], least_s: float = 0.002) -> str:
    """The stages as Markdown, without those that take nothing."""
    lines = ["| stage | began, s | seconds |", "| --- | --- | --- |"]
    for row in rows:
        if row["seconds"] >= least_s:
            beside = " (beside)" if row["beside"] else ""
            indent = "&nbsp; " * row["depth"]
            lines.append(f"| {indent}{row['stage']}{beside} | {row['began_s']:.3f} | {row['seconds']:.3f} |")
    return "\n".join(lines)


def measured(model: Path, precision: str, batch: int, repeats: int) -> dict[str, Any]:
    """All figures of one model."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bench = Bench(model, precision, batch, folder)
        bench.bare(bench.model)  # Libraries into the page cache, for everybody.
        bench.ours(str(folder / "first"))
        taken: dict[str, list[float]] = defaultdict(list)
        for index in range(repeats):
            for name, value in bench.nothing().items():
                taken[f"empty_{name}_s"].append(value)
            for turn in range(COLD_TURNS):
                cold, record = bench.ours(str(folder / f"cache{index}.{turn}"))
                taken["cold_s"].append(cold)
                taken["cold_check_s"].append(record["duration_s"])
                taken["bare_lowered_s"].append(bench.bare(bench.lowered))
                lowered = bench.ours(str(folder / f"lowered{index}.{turn}"), "test_lowered.py")[0]
                taken["cold_from_lowered_s"].append(lowered)
            warm, again = bench.ours(str(folder / f"cache{index}.0"))
            taken["warm_s"].append(warm)
            taken["warm_check_s"].append(again["duration_s"])
            engine = folder / f"polygraphy{index}.engine"
            taken["polygraphy_cold_s"].append(bench.polygraphy(engine, again=False))
            taken["polygraphy_warm_s"].append(bench.polygraphy(engine, again=True))
            taken["bare_s"].append(bench.bare(bench.model))
            for kind in ("cold", "warm"):
                taken[f"tf32_{kind}_s"].append(bench.ours(str(folder / f"tf32_{index}"), "test_tf32.py")[0])
        time.sleep(3)  # Only files that were left alone for a while are trusted to be what they were.
        bench.ours(str(folder / "cache0.0"))
        found = {"cold": stages(folder, str(folder / "stages")), "warm": stages(folder, str(folder / "cache0.0"))}
    medians = {name: round(statistics.median(values), 3) for name, values in taken.items()}
    pytest, python = medians["empty_pytest_s"], medians["empty_python_s"]
    bare_lowered = medians["bare_lowered_s"] - python
    ratios = {
        "warm_process_to_polygraphy": medians["warm_s"] / medians["polygraphy_warm_s"],
        "warm_check_to_polygraphy": medians["warm_check_s"] / medians["polygraphy_warm_s"],
        "cold_from_lowered_to_bare": (medians["cold_from_lowered_s"] - pytest) / bare_lowered,
        "cold_from_fp32_to_bare": (medians["cold_s"] - pytest) / bare_lowered,
        "tf32_cold_to_bare": (medians["tf32_cold_s"] - pytest) / (medians["bare_s"] - python),
        "tf32_warm_process_to_polygraphy": medians["tf32_warm_s"] / medians["polygraphy_warm_s"],
    }
    return {
        "model": "/".join(model.parts[-2:]),
        "tensorrt": f"{bench.module.name} {bench.module.version}",
        "medians": medians,
        "ranges": {name: [round(min(values), 3), round(max(values), 3)] for name, values in taken.items()},
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        "stages": found,
        "within_limits": all(ratios[name] <= limit for name, limit in LIMITS.items()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Whole checks against a bare script and against Polygraphy.")
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stages", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stages:
        print(json.dumps(traced(arguments.stages)))
        return
    found = []
    for model in arguments.models:
        found.append(measured(model.resolve(), arguments.precision, arguments.batch, arguments.repeats))
        print(json.dumps({key: value for key, value in found[-1].items() if key != "stages"}, indent=2), flush=True)
        for name, rows in found[-1]["stages"].items():
            print(f"\n{found[-1]['model']}, {name}:\n\n{table(rows)}\n", flush=True)
    report = {
        "benchmark": "check",
        "precision": arguments.precision,
        "batch": arguments.batch,
        "repeats": arguments.repeats,
        "limits": {name: round(limit, 3) for name, limit in LIMITS.items()},
        "models": found,
        "within_limits": all(each["within_limits"] for each in found),
    }
    if arguments.json:
        arguments.json.write_text(f"{json.dumps(report, indent=2)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
