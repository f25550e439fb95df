"""Is the latency that the plugin reports the engine's, and are its verdicts stable? On the GPU in this machine.

    python benchmarks/gpu/bench_timing.py MODEL.onnx [--repeats N] [--json FILE]

- The median that a check measures, against the median of a bare loop of CUDA events around `execute_async_v3`, on the
  same plan in the same process and in turns; with and without a CUDA graph.
- A net of microseconds with 1 to 16 of its runs in flight, in turns: how far a host that is held up for microseconds
  tells in its times.
- N repeated latency checks at a budget 3 % above the engine's median, and N at one 3 % below it; each takes some 5 to
  10 s, since the clocks may not have settled before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pytest_trtcheck.backends.base import EngineSpec, Machine
from pytest_trtcheck.backends.tensorrt.backend import Auto, TensorRT
from pytest_trtcheck.backends.tensorrt.timing import TimedRun
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.check import latency as measure
from pytest_trtcheck.gpu import device
from pytest_trtcheck.model import inputs as model_inputs
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.precision.lowering import lower
from pytest_trtcheck.spec import BuildOptions, LatencySpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_trtcheck.backends.base import Built
    from pytest_trtcheck.backends.tensorrt.module import TensorRTModule

BATCH = 8
ROUNDS, RUNS = 12, 200
DEPTHS, SECONDS = (1, 2, 4, 8, 16), 0.3
LIMIT_RATIO = 0.01
MARGIN = 0.03


class BareLoop:
    """What a person would write: an engine, one stream, two events around each run, one wait at the end.

    Nothing of the plugin is used.
    """

    def __init__(self, plan: bytes, module: TensorRTModule, case: dict[str, NDArray[Any]]) -> None:
        from cuda.bindings import driver

        self.driver = driver
        self._checked(driver.cuInit(0))
        self._checked(driver.cuCtxSetCurrent(self._checked(driver.cuDevicePrimaryCtxRetain(0))))
        self.handle = int(self._checked(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)))
        self.pairs = [tuple(self._checked(driver.cuEventCreate(0)) for _ in range(2)) for _ in range(RUNS)]
        trt = module.handle
        self.logger = trt.Logger(trt.Logger.ERROR)
        self.runtime = trt.Runtime(self.logger)
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        self.context = self.engine.create_execution_context()
        for name, array in case.items():
            self.context.set_input_shape(name, array.shape)
        for index in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(index)
            shape = tuple(self.context.get_tensor_shape(name))
            size = int(np.prod(shape)) * np.dtype(trt.nptype(self.engine.get_tensor_dtype(name))).itemsize
            address = int(self._checked(driver.cuMemAlloc(size)))
            if name in case:
                array = np.ascontiguousarray(case[name])
                self._checked(driver.cuMemcpyHtoD(address, array.ctypes.data, array.nbytes))
            self.context.set_tensor_address(name, address)
        self.context.execute_async_v3(self.handle)
        self._checked(driver.cuStreamSynchronize(self.handle))
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._checked(driver.cuStreamBeginCapture(self.handle, mode))
        self.context.execute_async_v3(self.handle)
        captured = self._checked(driver.cuStreamEndCapture(self.handle))
        self.graph = self._checked(driver.cuGraphInstantiate(captured, 0))

    @staticmethod
    def _checked(result: tuple[Any, ...]) -> Any:
        if int(result[0]):
            raise SystemExit(f"CUDA: {result[0]}")
        return result[1] if len(result) > 1 else None

    def run(self, count: int, *, graph: bool) -> list[float]:
        """Milliseconds of each run."""
        for start, end in self.pairs[:count]:
            self.driver.cuEventRecord(start, self.handle)
            if graph:
                self.driver.cuGraphLaunch(self.graph, self.handle)
            else:
                self.context.execute_async_v3(self.handle)
            self.driver.cuEventRecord(end, self.handle)
        self._checked(self.driver.cuStreamSynchronize(self.handle))
        return [self._checked(self.driver.cuEventElapsedTime(*pair)) for pair in self.pairs[:count]]


def compared(engine: Any, bare: BareLoop, case: dict[str, NDArray[Any]], *, graph: bool) -> dict[str, float]:
    """Medians of both, in turns, so that what drifts, drifts for both."""
    ours: list[float] = []
    theirs: list[float] = []
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        bare.run(20, graph=graph)
    with TimedRun(engine, [case], graph=graph) as timed:
        for _ in range(ROUNDS):
            ours += timed.run(RUNS).run_ms.tolist()
            theirs += bare.run(RUNS, graph=graph)
    medians = statistics.median(ours), statistics.median(theirs)
    return {
        "p50_ms": round(medians[0], 5),
        "bare_p50_ms": round(medians[1], 5),
        "difference": round(medians[0] / medians[1] - 1, 5),
    }


def small(path: Path) -> Path:
    """A net that takes a GPU some 15 µs."""
    rng = np.random.default_rng(0)
    shapes = [(8, 3, 3, 3), (8, 8, 3, 3), (8, 8, 3, 3)]
    weights = [rng.standard_normal(shape).astype(np.float32) * 0.1 for shape in shapes]
    nodes, value = [], "image"
    for index in range(len(shapes)):
        nodes.append(helper.make_node("Conv", [value, f"w{index}"], [f"c{index}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"]))
        value = f"r{index}"
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["batch", 8, 16, 16])],
        [numpy_helper.from_array(array, f"w{index}") for index, array in enumerate(weights)],
    )
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def in_flight(engine: Any, case: dict[str, NDArray[Any]]) -> dict[str, dict[str, float]]:
    """What a run takes by the number of those in flight, in ms."""
    found: dict[int, list[NDArray[np.float64]]] = {depth: [] for depth in DEPTHS}
    for turn in range(ROUNDS):
        for depth in DEPTHS[:: 1 if turn % 2 else -1]:
            with TimedRun(engine, [case], in_flight=depth) as timed:
                timed.run(500)
                until = time.monotonic() + SECONDS
                while time.monotonic() < until:
                    found[depth].append(timed.run(10 * RUNS).run_ms)
    return {
        str(depth): {
            **{f"p{q}_ms": round(float(np.percentile(np.concatenate(runs), q)), 5) for q in (50, 95, 99)},
            "deviation_of_medians_ms": round(float(np.std([np.median(each) for each in runs])), 6),
        }
        for depth, runs in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The plugin's latencies and verdicts against a bare loop.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    gpu = device.detect().gpu
    if gpu is None:
        raise SystemExit("no GPU in this machine")
    with tempfile.TemporaryDirectory() as scratch:
        cache = Cache(Path(scratch) / "cache")
        system = Auto.find(Machine(detected=gpu))
        if not isinstance(system, TensorRT):
            raise SystemExit(system.no_engine)

        def built_of(path: Path) -> tuple[Built, dict[str, NDArray[Any]]]:
            model = open_model(str(path.resolve()), (), cache)
            case = model_inputs.generate(model, model_inputs.shape_ranges(model, BATCH, {}), 0)[0]
            profile = model_inputs.profile(model, {}, [case])
            lowered = lower(model, arguments.precision, cache)
            built = system.build(EngineSpec(model, lowered, arguments.precision, profile, BuildOptions()), cache)
            built.close()  # the one in the process that built it
            return built, case

        built, case = built_of(small(Path(scratch) / "small.onnx"))
        engine = system.load(built)
        depths = in_flight(engine, case)
        engine.close()
        built, case = built_of(arguments.model)
        engine = system.load(built)
        bare = BareLoop(built.path.read_bytes(), system.module, case)
        medians = {name: compared(engine, bare, case, graph=name == "graph") for name in ("graph", "no_graph")}
        subject = measure.Subject(system, engine, [case])
        p50_ms = medians["graph"]["p50_ms"]
        verdicts: dict[str, dict[str, int]] = {}
        seconds: dict[str, float] = {}
        for name, factor in {"above": 1 + MARGIN, "below": 1 - MARGIN}.items():
            spec = LatencySpec(p50_ms=p50_ms * factor)
            budgets = measure.budgets_for(spec, gpu.model, ())
            start = time.monotonic()
            found = [measure.measure(subject, spec, budgets, gpu, gpu.model) for _ in range(arguments.repeats)]
            seconds[name] = round((time.monotonic() - start) / arguments.repeats, 3)
            verdicts[name] = dict(Counter(record.verdict for record in found))
        engine.close()
    right = not verdicts["above"].get("fail") and not verdicts["below"].get("pass")
    report = {
        "benchmark": "timing",
        "gpu": gpu.name,
        "driver": gpu.driver,
        "tensorrt": f"{system.module.name} {system.module.version}",
        "model": arguments.model.name,
        "precision": arguments.precision,
        "batch": BATCH,
        "medians": medians,
        "in_flight": depths,
        "repeats": arguments.repeats,
        "margin": MARGIN,
        "verdicts": verdicts,
        "seconds_a_check": seconds,
        "limits": {"difference": LIMIT_RATIO, "fail_above": 0, "pass_below": 0},
        "within_limits": right and all(abs(each["difference"]) <= LIMIT_RATIO for each in medians.values()),
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
