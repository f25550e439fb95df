"""Engines run on the GPU in this machine, against ONNX Runtime and against NumPy; faults planted."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from pytest_trtcheck.backends.tensorrt import build as tensorrt
from pytest_trtcheck.backends.tensorrt.module import Target, TensorRTModule, available
from pytest_trtcheck.backends.tensorrt.support import unsupported
from pytest_trtcheck.backends.tensorrt.timing import TimedInstances, TimedRun
from pytest_trtcheck.errors import BuildError, GpuError, InputError
from pytest_trtcheck.spec import BuildOptions, Precision, ShapeRange
from tests import onnx_models, trt_models

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import onnx
    from numpy.typing import NDArray

    from pytest_trtcheck.backends.tensorrt.engine import Engine
    from pytest_trtcheck.gpu.device import Gpu

    MakeEngine = Callable[..., Engine]

pytestmark = pytest.mark.gpu

TOLERANCE: dict[str, float] = {"fp32": 5e-3, "fp16": 1e-2, "bf16": 4e-2}
"""FP32 as TF32 computes it: TensorRT-RTX does so whatever it is told."""


@pytest.fixture(scope="module")
def module() -> TensorRTModule:
    found = available()
    if found is None:
        pytest.skip("neither tensorrt nor tensorrt_rtx is installed")
    return found


@pytest.fixture
def target(real_gpu: Gpu) -> Target:
    return Target(real_gpu.compute_capability, here=True)


@pytest.fixture
def plan(module: TensorRTModule, target: Target, tmp_path: Path) -> Callable[..., Path]:
    def build(
        model: onnx.ModelProto, profile: Mapping[str, ShapeRange] | None = None, precision: Precision = "fp32"
    ) -> Path:
        path = onnx_models.save(model, tmp_path / "model.onnx")
        options = BuildOptions(timeout_s=300)
        built = tensorrt.build(
            module, path, tmp_path / "engine.plan", target=target, precision=precision, profile=profile, options=options
        )
        return built.path

    return build


@pytest.fixture
def make(plan: Callable[..., Path], module: TensorRTModule) -> Iterator[MakeEngine]:
    from pytest_trtcheck.backends.tensorrt.engine import Engine

    made: list[Engine] = []

    def build(
        model: onnx.ModelProto,
        profile: Mapping[str, ShapeRange] | None = None,
        precision: Precision = "fp32",
        **given: Any,
    ) -> Engine:
        made.append(Engine(plan(model, profile, precision), module, **given))
        return made[-1]

    yield build
    for engine in made:
        engine.close()


def random(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def conv_input(seed: int = 0) -> dict[str, NDArray[Any]]:
    return {"x": random(trt_models.SHAPES["Conv"][0], seed)}


def reference(model: onnx.ModelProto, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def worst(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.max(np.abs(found.astype(np.float64) - expected)) / np.max(np.abs(expected)))


# What comes out


@pytest.mark.parametrize("op", ["Conv", "Gemm"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_an_engine_computes_what_onnx_runtime_computes(
    make: MakeEngine, module: TensorRTModule, target: Target, op: str, precision: Precision
) -> None:
    reason = unsupported(module, target, precision, {op})
    if reason:
        pytest.skip(reason)
    engine = make(trt_models.operator(op, precision), precision=precision)
    inputs = {"x": random(trt_models.SHAPES[op][0])}
    outputs = engine(inputs)
    expected = reference(trt_models.operator(op, "fp32"), inputs)
    assert outputs["y"].dtype == np.float32
    assert worst(outputs["y"], expected["y"]) < TOLERANCE[precision]
    # The same comparison sees a weight that is 10 % off.
    scaled = reference(trt_models.operator(op, "fp32", weight_scale=1.1), inputs)
    assert worst(outputs["y"], scaled["y"]) > TOLERANCE[precision]


def test_all_types_and_the_models_order_of_outputs(make: MakeEngine) -> None:
    engine = make(trt_models.many_types())
    inputs: dict[str, NDArray[Any]] = {
        "i64": np.array([1 << 40, -(1 << 35), 0, 7]),
        "i32": np.array([3, -4, 0, 1000], np.int32),
        "flag": np.array([True, False, False, True]),
        "u8": np.array([0xA5, 0x5A, 0, 255], np.uint8),
        "half": np.array([0.5, -2, 0, 1000], np.float16),
        "x": np.array([1.5, -0.0, np.inf, np.nan], np.float32),
    }
    outputs = engine(inputs)
    assert list(outputs) == ["x_neg", "half_sum", "u8_same", "flag_not", "i32_square", "i64_sum"]
    expected: dict[str, NDArray[Any]] = {
        "x_neg": -inputs["x"],
        "half_sum": inputs["half"] + inputs["half"],
        "u8_same": inputs["u8"],
        "flag_not": ~inputs["flag"],
        "i32_square": inputs["i32"] * inputs["i32"],
        "i64_sum": inputs["i64"] * 2,
    }
    for name, values in expected.items():
        assert outputs[name].dtype == values.dtype
        np.testing.assert_array_equal(outputs[name], values)


def test_dynamic_shapes(make: MakeEngine) -> None:
    model = trt_models.dynamic_conv()
    engine = make(model, {"x": ShapeRange((1, 4, 16, 16), (2, 4, 16, 32), (8, 4, 16, 64))})
    for shape in [(1, 4, 16, 16), (8, 4, 16, 64), (3, 4, 16, 40), (1, 4, 16, 16)]:
        inputs = {"x": random(shape)}
        outputs = engine(inputs)
        expected = reference(model, inputs)["y"]
        assert outputs["y"].shape == expected.shape
        assert worst(outputs["y"], expected) < TOLERANCE["fp32"]
    with pytest.raises(InputError, match=r"the engine takes \(1, 4, 16, 16\) to \(8, 4, 16, 64\)"):
        engine({"x": random((9, 4, 16, 16))})


def test_runs_repeat_exactly_and_do_not_touch_earlier_outputs(make: MakeEngine) -> None:
    engine = make(trt_models.operator("Conv", "fp32"))
    first = engine(conv_input(0))["y"]
    kept = first.copy()
    other = engine(conv_input(1))["y"]
    assert not np.array_equal(other, kept)
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(engine(conv_input(0))["y"], kept)


def test_an_output_whose_shape_depends_on_the_data(make: MakeEngine, module: TensorRTModule) -> None:
    if module.is_rtx:  # It has no such operators; TensorRT does.
        with pytest.raises(BuildError) as info:
            make(trt_models.nonzero())
        assert "depends on the data" in info.value.hint
        return
    engine = make(trt_models.nonzero())
    for seed in range(3):
        x = random((4, 8), seed)
        x[x < seed - 1] = 0
        np.testing.assert_array_equal(engine({"x": x})["y"], np.array(np.nonzero(x)))
    assert engine({"x": np.zeros((4, 8), np.float32)})["y"].shape == (2, 0)


def test_outputs_that_are_allocated_on_demand(make: MakeEngine) -> None:
    """The way of NonZero's output, taken by an output whose shape is known, since TensorRT-RTX has no NonZero."""
    engine = make(trt_models.operator("Conv", "fp32"))
    expected = engine(conv_input())["y"]
    engine._on_demand.add("y")
    for _ in range(2):
        np.testing.assert_array_equal(engine(conv_input())["y"], expected)
    with TimedRun(engine, [conv_input()], graph=True) as timed:
        assert not timed.graph
        assert timed.graph_reason is not None
        assert "y" in timed.graph_reason
        assert (timed.run(5).run_ms > 0).all()


def test_a_shape_tensor_is_read_on_the_host(make: MakeEngine) -> None:
    engine = make(trt_models.rows_of_values(), {"s": ShapeRange((1, 1), (4, 8), (32, 32))})
    assert {spec.name: spec.on_host for spec in engine.inputs} == {"x": False, "s": True}
    x = random((4, 8))
    for rows in (2, 8, 32):
        outputs = engine({"x": x, "s": np.array([rows, 32 // rows])})
        np.testing.assert_array_equal(outputs["y"], x.reshape(rows, 32 // rows))


# What the engine says of itself


def test_the_inspector_tells_the_precision_that_runs(make: MakeEngine) -> None:
    half = make(trt_models.operator("Conv", "fp16"), precision="fp16").layers_by_precision()
    full = make(trt_models.operator("Conv", "fp32")).layers_by_precision()
    assert half.get("fp16", 0) > 0, half
    assert full.get("fp16", 0) == 0, full
    assert full.get("fp32", 0) + full.get("tf32", 0) > 0, full


def test_memory_is_said_and_given_back(make: MakeEngine) -> None:
    from pytest_trtcheck.backends.tensorrt.cuda import Cuda

    cuda = Cuda()
    make(trt_models.operator("Conv", "fp32")).close()  # What CUDA and TensorRT load once per process.
    before, _ = cuda.free_memory()
    wide = onnx_models.model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="matmul")],
        {"x": (onnx_models.FLOAT, [4, 4096])},
        {"y": (onnx_models.FLOAT, [4, 4096])},
        {"w": onnx_models.weights((4096, 4096))},
    )
    engine = make(wide)
    engine({"x": random((4, 4096))})
    assert engine.device_memory_bytes >= 4096 * 4096 * 4
    assert before - cuda.free_memory()[0] >= 32 << 20
    engine.close()
    engine.close()
    assert before - cuda.free_memory()[0] < 16 << 20
    with pytest.raises(RuntimeError, match="closed"):
        engine({"x": random((4, 4096))})
    cuda.close()


def test_the_jit_cache_saves_compiling_and_a_bad_one_is_refused(
    plan: Callable[..., Path], module: TensorRTModule
) -> None:
    from pytest_trtcheck.backends.tensorrt.engine import Engine

    if not module.is_rtx:
        pytest.skip("TensorRT compiles nothing at load time")
    path = plan(trt_models.operator("Conv", "fp16"), precision="fp16")
    cold = Engine(path, module)
    expected = cold(conv_input())["y"]
    cache = cold.jit_cache()
    cold.close()
    assert not cold.jit_cache_used
    assert cache
    warm = Engine(path, module, jit_cache=cache)
    assert warm.jit_cache_used
    assert warm.load_s < cold.load_s
    np.testing.assert_array_equal(warm(conv_input())["y"], expected)
    warm.close()
    for bad in (b"no cache", cache[: len(cache) // 2]):
        engine = Engine(path, module, jit_cache=bad)
        assert not engine.jit_cache_used
        np.testing.assert_array_equal(engine(conv_input())["y"], expected)
        engine.close()


# What goes wrong


def test_outputs_that_are_not_written_are_found(make: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(trt_models.operator("Conv", "fp32"))
    engine(conv_input())
    monkeypatch.setattr(engine, "enqueue", lambda: None)
    with pytest.raises(GpuError, match=r"output 'y': never written in ([\d,]+) of \1 elements"):
        engine(conv_input())
    monkeypatch.undo()
    enqueue = engine.enqueue

    def forget_the_first_three() -> None:
        enqueue()
        pattern, width = engine._allocator.patterns["y"]
        assert width == 4
        engine.cuda.call("cuMemsetD32Async", engine._placed["y"].device_address, pattern, 3, engine.cuda.stream.handle)

    monkeypatch.setattr(engine, "enqueue", forget_the_first_three)
    with pytest.raises(GpuError, match=r"output 'y': never written in 3 of [\d,]+ elements, first at \(0, 0, 0, 0\)"):
        engine(conv_input())
    monkeypatch.undo()
    assert not engine.poisoned
    engine(conv_input())


def test_a_value_that_looks_like_poison_passes(make: MakeEngine) -> None:
    node = helper.make_node("Identity", ["x"], ["y"], name="same")
    kind = {"x": (TensorProto.UINT8, [4])}
    engine = make(onnx_models.model([node], kind, {"y": (TensorProto.UINT8, [4])}))
    x = np.array([0xA5, 0x5A, 0xA5, 1], np.uint8)
    np.testing.assert_array_equal(engine({"x": x})["y"], x)


def test_a_plan_that_cannot_be_loaded(module: TensorRTModule) -> None:
    from pytest_trtcheck.backends.tensorrt.engine import Engine

    with pytest.raises(GpuError, match="loading the engine") as info:
        Engine(b"no engine" * 100, module)
    assert not info.value.poisoned


def test_memory_that_runs_out_is_named_and_the_engine_goes_on(make: MakeEngine) -> None:
    from pytest_trtcheck.backends.tensorrt.cuda import Memory

    engine = make(trt_models.operator("Conv", "fp32"))
    expected = engine(conv_input())["y"]
    with pytest.raises(GpuError, match="out of GPU memory") as info, engine.guard("allocating"):
        Memory(engine.cuda, 1 << 45, host=False)
    assert "MiB are free" in info.value.hint
    assert not info.value.poisoned
    np.testing.assert_array_equal(engine(conv_input())["y"], expected)


def test_memory_is_named_where_cudnn_names_none(make: MakeEngine) -> None:
    engine = make(trt_models.operator("Conv", "fp32"))
    with pytest.raises(GpuError, match="CUDNN_STATUS_INTERNAL_ERROR") as info, engine.guard("running the engine"):
        raise GpuError("could not start the run: CUDNN_STATUS_INTERNAL_ERROR")
    assert "MiB are free" in info.value.hint


def heavy_model() -> onnx.ModelProto:
    """A model whose run takes a good while longer than to start it."""
    return onnx_models.model(
        [
            helper.make_node("Conv", ["x", "w1"], ["h"], name="conv1", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["h"], ["r"], name="relu"),
            helper.make_node("Conv", ["r", "w2"], ["y"], name="conv2", pads=[1, 1, 1, 1]),
        ],
        {"x": (onnx_models.FLOAT, [8, 64, 128, 128])},
        {"y": (onnx_models.FLOAT, [8, 64, 128, 128])},
        {"w1": onnx_models.weights((64, 64, 3, 3), 1), "w2": onnx_models.weights((64, 64, 3, 3), 2)},
    )


BREAK = """
import ctypes
import sys
from pathlib import Path
import numpy as np
from pytest_trtcheck.backends.tensorrt.engine import Engine
from pytest_trtcheck.backends.tensorrt.module import find_module
from pytest_trtcheck.errors import GpuError

plan, module = Path(sys.argv[1]), find_module(sys.argv[2])
engine, bystander = Engine(plan, module), Engine(plan, module)
x = {"x": np.ones((8, 64, 128, 128), np.float32)}
engine(x)
bystander(x)
if sys.argv[3] == "illegal address":
    point_at = engine.point_at

    def astray(specs, placed):
        point_at(specs, placed)
        engine._context.set_tensor_address("x", 4096)

    engine.point_at = astray
else:
    # Whatever else the machine is busy with: the stream stands still for 20 s behind the run.
    cuda, libc, enqueue = ctypes.CDLL("libcuda.so.1"), ctypes.CDLL(None), engine.enqueue

    def endless():
        enqueue()
        stream, sleep = ctypes.c_void_p(engine.cuda.handle), ctypes.cast(libc.sleep, ctypes.c_void_p)
        assert cuda.cuLaunchHostFunc(stream, sleep, ctypes.c_void_p(20)) == 0

    engine.enqueue, engine.timeout_s = endless, 0.2

def run(what):
    try:
        for _ in range(100):
            what()
    except GpuError as error:
        print(error.poisoned, error.message.splitlines()[0])

run(lambda: engine(x))
run(lambda: engine(x))
run(lambda: Engine(plan, module))
engine.close()
bystander.close()
print("end", flush=True)
"""


@pytest.mark.parametrize("fault", ["illegal address", "endless run"])
def test_a_failure_that_breaks_cuda_is_said_and_survived(
    plan: Callable[..., Path], module: TensorRTModule, fault: str
) -> None:
    """In a process of its own: nothing repairs a CUDA context."""
    path = plan(heavy_model())
    ended = subprocess.run(
        [sys.executable, "-c", BREAK, str(path), module.name, fault],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = ended.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["True", "True", "True", "end"], ended.stdout + ended.stderr
    assert ("has not finished within" in lines[0]) is (fault == "endless run")
    assert ended.returncode == 0, ended.stderr


# Measuring


@pytest.fixture
def heavy(make: MakeEngine) -> Engine:
    """An engine whose run takes long enough to be measured to a few percent."""
    return make(heavy_model())


def heavy_input(seed: int = 0) -> dict[str, NDArray[Any]]:
    return {"x": random((8, 64, 128, 128), seed)}


@pytest.mark.parametrize("graph", [False, True])
def test_gpu_time_is_what_a_bare_loop_of_events_measures(heavy: Engine, graph: bool) -> None:
    expected = heavy(heavy_input())["y"]
    with TimedRun(heavy, [heavy_input()], graph=graph) as timed:
        assert timed.graph is graph, timed.graph_reason
        timed.run(50)
        bare: list[float] = []
        ours: list[NDArray[np.float64]] = []
        for _ in range(5):  # In turns, so that clocks that move do so for both.
            start, end = heavy.cuda.event(), heavy.cuda.event()
            for _ in range(20):
                heavy.cuda.stream.record(start)
                (timed._graphs[0].launch if graph else heavy.enqueue)()
                heavy.cuda.stream.record(end)
                end.sync()
                bare.append(end - start)
            ours.append(timed.run(20).run_ms)
        measured = float(np.median(np.concatenate(ours)))
        assert measured == pytest.approx(float(np.median(bare)), rel=0.05)
        # What the measured runs computed is right too.
        timed._outputs["y"].download()
        heavy.cuda.wait(60)
        found = timed._outputs["y"].host.view(np.float32).reshape(expected.shape).copy()
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(heavy(heavy_input())["y"], expected)


def test_samples_agree_with_each_other_and_the_clock(heavy: Engine) -> None:
    with TimedRun(heavy, [heavy_input()], graph=True) as timed:
        timed.run(20)
        began = time.perf_counter()
        samples = timed.run(200)
        wall_ms = 1000 * (time.perf_counter() - began)
    assert samples.enqueue_ms is not None
    assert samples.run_ms.shape == samples.enqueue_ms.shape == (200,)
    assert samples.latency_ms is None
    assert (samples.run_ms > 0).all()
    assert 0.95 * samples.run_ms.sum() < samples.interval_ms.sum() < 1.2 * wall_ms
    # From the end of a run to the end of the next lies at least that run.
    assert samples.interval_ms.shape == (200,)
    assert (samples.interval_ms >= 0.98 * samples.run_ms).all()
    assert np.median(samples.enqueue_ms) < np.median(samples.run_ms)


def test_transfers_are_part_of_the_latency(heavy: Engine) -> None:
    with TimedRun(heavy, [heavy_input()], transfers=True) as timed:
        timed.run(5)
        samples = timed.run(30)
    assert samples.latency_ms is not None
    # 32 MiB each way takes at least half a millisecond on any link there is.
    assert (samples.latency_ms > samples.run_ms + 0.5).all()


@pytest.mark.parametrize("graph", [False, True])
def test_every_set_of_inputs_is_used(heavy: Engine, graph: bool) -> None:
    sets = [heavy_input(seed) for seed in range(3)]
    expected = [heavy(inputs)["y"] for inputs in sets]
    with TimedRun(heavy, sets, graph=graph) as timed:
        for turn in (0, 2, 1, 0):  # Two runs each, of which the first is not counted.
            timed.run(1)
            timed._outputs["y"].download()
            heavy.cuda.wait(60)
            found = timed._outputs["y"].host.view(np.float32).reshape(expected[0].shape)
            np.testing.assert_array_equal(found, expected[(turn + 1) % 3])
        with pytest.raises(RuntimeError, match="close its TimedRun"):
            heavy(sets[0])


def test_what_cannot_be_measured_is_refused(heavy: Engine) -> None:
    with pytest.raises(InputError, match="no inputs"):
        TimedRun(heavy, [])
    with pytest.raises(InputError, match="shape"):
        TimedRun(heavy, [{"x": random((1, 64, 128, 128))}])
    heavy(heavy_input())


def test_an_engine_that_the_host_cannot_feed_is_seen(make: MakeEngine) -> None:
    """A tiny operator: launching it takes longer than computing it, and the throughput shows that."""
    engine = make(trt_models.operator("Gemm", "fp32"))
    with TimedRun(engine, [{"x": random(trt_models.SHAPES["Gemm"][0])}], graph=False) as timed:
        timed.run(50)
        samples = timed.run(500)
    assert samples.enqueue_ms is not None
    assert np.median(samples.enqueue_ms) > 0
    assert samples.interval_ms.sum() >= 0.95 * float(samples.enqueue_ms.sum())


def test_a_run_of_nothing_is_refused(heavy: Engine) -> None:
    with TimedRun(heavy, [heavy_input()]) as timed, pytest.raises(ValueError, match="at least one"):
        timed.run(0)


# --- several contexts at once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", [False, True])
def test_several_contexts_compute_the_same_and_share_the_gpu(heavy: Engine, graph: bool) -> None:
    expected = heavy(heavy_input())["y"]
    other = heavy.another()
    assert np.array_equal(other(heavy_input())["y"], expected)
    assert np.array_equal(heavy(heavy_input())["y"], expected)
    other.close()
    with TimedRun(heavy, [heavy_input()], graph=graph) as timed:
        timed.run(20)
        alone = timed.run(200)
    with TimedInstances(heavy, [heavy_input(), heavy_input(1)], 4, graph=graph) as several:
        several.run(20)
        beside = several.run(400)
        assert several.measured == "GPU time, 4 instances at once"
        assert several.graph is graph
    assert beside.run_ms.shape == beside.interval_ms.shape == (400,)
    assert np.all(beside.interval_ms >= 0)
    # All of them together do as much and no less, and each is at work all the time (Little's law).
    assert beside.interval_ms.mean() < 1.15 * alone.interval_ms.mean()
    assert beside.run_ms.mean() == pytest.approx(4 * beside.interval_ms.mean(), rel=0.25)
    assert np.array_equal(heavy(heavy_input())["y"], expected), "the engine itself goes on"
    # What CUDA keeps once several streams were at work, it keeps once.
    before = heavy.cuda.free_memory()[0]
    with TimedInstances(heavy, [heavy_input()], 4, graph=graph) as several:
        several.run(20)
    assert heavy.cuda.free_memory()[0] >= before - (64 << 20), "what the others took was given back"


def test_small_engines_gain_from_several_contexts(make: MakeEngine) -> None:
    """One that is busy long enough to be launched meanwhile, on a small part of the GPU."""
    layers = 60
    nodes = [helper.make_node("MatMul", [f"y{n}", f"w{n}"], [f"y{n + 1}"]) for n in range(layers)]
    weights = {f"w{n}": onnx_models.weights((64, 64), n) for n in range(layers)}
    shaped = (onnx_models.FLOAT, [8, 64])
    engine = make(onnx_models.model(nodes, {"y0": shaped}, {f"y{layers}": shaped}, weights))
    case = {"y0": random((8, 64))}
    with TimedRun(engine, [case]) as timed:
        timed.run(50)
        alone = timed.run(1000)
    with TimedInstances(engine, [case], 4) as several:
        several.run(50)
        beside = several.run(4000)
    assert beside.interval_ms.mean() < alone.interval_ms.mean()
