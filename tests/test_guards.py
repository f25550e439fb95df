"""Guards: what stands between a broken engine, or a meaningless comparison, and a green test. Each with its fault.

Where a GPU would run an engine, a runner on ONNX Runtime stands for it: the same protocol, and faults can be planted.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pytest_trtcheck import gpu
from pytest_trtcheck.backends.base import Backend, Built, EngineSpec, Runner
from pytest_trtcheck.backends.tensorrt.backend import TensorRT
from pytest_trtcheck.backends.tensorrt.module import Target, find_module
from pytest_trtcheck.cache import Cache, Key
from pytest_trtcheck.check import parity
from pytest_trtcheck.check.checker import Checker, Request
from pytest_trtcheck.check.request import Allowance
from pytest_trtcheck.errors import GpuError, InputError
from pytest_trtcheck.gpu.device import Gpu
from pytest_trtcheck.metrics import of_arrays
from pytest_trtcheck.model import graph
from pytest_trtcheck.model import onnxruntime as ort
from pytest_trtcheck.model.ort_runner import OrtRunner
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.precision import batch_norm
from pytest_trtcheck.precision.emulation import Emulated, emulation
from pytest_trtcheck.precision.lowering import Lowered, lower
from pytest_trtcheck.precision.reference import Reference
from pytest_trtcheck.record import EngineRecord, LayerRecord
from pytest_trtcheck.spec import BuildOptions, LatencySpec, ParitySpec
from tests import onnx_models

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.record import CheckRecord
    from pytest_trtcheck.spec import Precision

    Outputs = dict[str, NDArray[Any]]

FLOAT = TensorProto.FLOAT
X = {"x": np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)}


@pytest.fixture
def checker(tmp_path: Path) -> Checker:
    return Checker(Cache(tmp_path / "cache", None))


def check(checker: Checker, model: object, inputs: object = None, **spec: Any) -> CheckRecord:
    return checker.check(Request("t.py::t", model, (), ParitySpec(**spec), inputs=inputs, inputs_source="returned"))


# --- a reference that says nothing -----------------------------------------------------------------------------------


def one_operator(*operators: str) -> onnx.ModelProto:
    """x [4] through each operator alone, to outputs of the operators' names."""
    nodes = [helper.make_node(operator, ["x"], [operator], name=operator.lower()) for operator in operators]
    return onnx_models.model(nodes, {"x": (FLOAT, [4])}, {operator: (FLOAT, [4]) for operator in operators}, {})


@pytest.mark.parametrize(("operator", "value"), [("Log", -1.0), ("Exp", 1000.0)])
def test_a_reference_that_is_nan_or_infinite_throughout_is_an_error(
    checker: Checker, operator: str, value: float
) -> None:
    # Both sides are ruined alike: without the guard nothing differs, and the check passes.
    record = check(checker, one_operator(operator), {"x": np.full(4, value, np.float32)})
    assert record.verdict == "error"
    assert f"NaN or infinite in every element of output '{operator}'" in str(record.message)


def test_one_ruined_output_of_two_is_an_error_too(checker: Checker) -> None:
    record = check(checker, one_operator("Sigmoid", "Log"), {"x": np.full(4, -1, np.float32)})
    assert record.verdict == "error"
    assert "'Log'" in str(record.message)


def test_nan_in_some_elements_is_no_error(checker: Checker) -> None:
    record = check(checker, one_operator("Log"), {"x": np.array([-1, 1, 2, 3], np.float32)})
    assert record.verdict == "pass"
    assert record.parity is not None
    assert record.parity.outputs[0].nonfinite == 1


def test_a_reference_of_nan_and_infinities_alone_is_an_error(checker: Checker) -> None:
    log = one_operator("Log")
    x = np.array([0, 0, -1, -1], np.float32)
    record = check(checker, log, {"x": x})
    assert record.verdict == "error"
    assert "NaN or infinite in every element of output 'Log'" in str(record.message)
    x[0] = 2
    assert check(checker, log, {"x": x}).verdict == "pass"


def test_an_empty_input_among_others_is_no_empty_batch() -> None:
    """Such as the keys and values of the past, at the first token."""
    parity.refuse_empty([{"ids": np.ones((1, 4)), "past": np.ones((1, 0, 8))}])
    with pytest.raises(InputError, match="hold no elements"):
        parity.refuse_empty([{"ids": np.ones((0, 4)), "past": np.ones((0, 2, 8))}])


# --- an engine that does not compute the same twice ------------------------------------------------------------------


class Turns:
    """Gives one output after the other, and begins anew."""

    def __init__(self, *outputs: NDArray[Any]) -> None:
        self._outputs = outputs
        self._runs = 0

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> Outputs:  # noqa: ARG002
        self._runs += 1
        return {"steady": np.ones(2, np.float32), "y": self._outputs[(self._runs - 1) % len(self._outputs)]}

    def close(self) -> None: ...


ONE = np.array([1.0, 0.5], np.float32)
# Half of what the contract lets pass, and twice as much, as max|a − b| / max|a|.
NOISE = {"fp32": 1e-5, "tf32": 2e-3, "fp16": 2e-3, "bf16": 1.6e-2, "int8": 1e-2, "fp8": 3e-2}


@pytest.mark.parametrize("precision", NOISE)
@pytest.mark.parametrize("turn", [1, 2])
def test_runs_that_lie_apart_by_more_than_rounding_are_unstable(precision: Precision, turn: int) -> None:
    def runs(spread: float) -> Turns:
        outputs = [ONE, ONE, ONE]
        outputs[turn] = ONE + np.array([0, spread], np.float32)
        return Turns(*outputs)

    assert parity.unstable(runs(NOISE[precision] / 2), {}, precision, bitwise=False) is None
    doubt = parity.unstable(runs(NOISE[precision] * 2), {}, precision, bitwise=False)
    assert doubt is not None
    assert "output 'y' is not deterministic: 3 runs" in doubt


def test_bitwise_lets_nothing_pass() -> None:
    nearly = Turns(ONE, np.nextafter(ONE, np.float32(2)))
    assert parity.unstable(nearly, {}, "fp16", bitwise=False) is None
    assert parity.unstable(nearly, {}, "fp16", bitwise=True) is not None
    assert parity.unstable(Turns(ONE), {}, "fp16", bitwise=True) is None


NAN = np.array([np.nan, 0.5], np.float32)
INFINITE = np.array([np.inf, 0.5], np.float32)


@pytest.mark.parametrize(
    "others",
    [
        pytest.param((ONE, NAN), id="NaN now and then"),
        pytest.param((NAN, ONE), id="NaN at first"),
        pytest.param((ONE, INFINITE), id="infinite now and then"),
        pytest.param((INFINITE, -INFINITE), id="infinite in turns"),
        pytest.param((ONE, ONE[:1]), id="another shape"),
        pytest.param((np.array([1, 2]), np.array([1, 3])), id="another label"),
        pytest.param((ONE[:1], np.ones(2, np.float32)), id="more rows, all alike"),
        pytest.param((np.array([1000, 1]), np.array([1001, 1])), id="a label of many"),
        pytest.param((np.array([True, False]), np.array([True, True])), id="another choice"),
    ],
)
def test_no_rounding_explains_these(others: Sequence[NDArray[Any]]) -> None:
    assert parity.unstable(Turns(*others), {}, "fp8", bitwise=False) is not None


@pytest.mark.parametrize("same", [NAN, INFINITE, np.array([1, 2]), np.zeros(2, np.float32)])
def test_what_is_the_same_each_time_is_stable(same: NDArray[Any]) -> None:
    assert parity.unstable(Turns(same), {}, "fp16", bitwise=True) is None


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_how_far_runs_lie_apart_is_relative_to_the_largest_value(size: float) -> None:
    def runs(spread: float) -> Turns:
        return Turns(ONE * np.float32(size), (ONE + np.float32(spread)) * np.float32(size))

    assert parity.unstable(runs(NOISE["fp16"] / 2), {}, "fp16", bitwise=False) is None
    assert parity.unstable(runs(NOISE["fp16"] * 2), {}, "fp16", bitwise=False) is not None


def test_one_element_that_lies_apart_among_others_that_hardly_do_is_unstable() -> None:
    nearly = ONE + np.array([1e-6, 2 * NOISE["fp16"]], np.float32)
    assert parity.unstable(Turns(ONE, nearly), {}, "fp16", bitwise=False) is not None


def test_runs_that_leave_zero_lie_apart_by_what_they_reach() -> None:
    def runs(spread: float) -> Turns:
        return Turns(np.zeros(2, np.float32), np.array([0, spread], np.float32))

    assert parity.unstable(runs(NOISE["fp16"] * 0.8), {}, "fp16", bitwise=False) is None
    assert parity.unstable(runs(NOISE["fp16"] * 1.2), {}, "fp16", bitwise=False) is not None


def test_nan_that_comes_and_goes_beside_rounding_is_unstable() -> None:
    for first, second in ((NAN, ONE + np.float32(1e-5)), (ONE + np.float32(1e-5), NAN)):
        assert parity.unstable(Turns(first, second), {}, "fp16", bitwise=False) is not None


# --- an engine in the place of a GPU's -------------------------------------------------------------------------------


@dataclass
class OnCpu:
    """An engine whose outputs ONNX Runtime computes, with the faults of one planted.

    `spoiled` changes the outputs of a run, which is counted from 0.
    """

    runner: OrtRunner
    layers: Mapping[str, int]
    spoiled: Callable[[int, Outputs], Outputs]
    runs: int = 0
    device_memory_bytes: int = 1
    aux_streams: int = 0
    streamed_bytes: int | None = None

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> Outputs:
        self.runs += 1
        return self.spoiled(self.runs - 1, self.runner(inputs))

    def layers_by_precision(self) -> Mapping[str, int]:
        return self.layers

    def layer_records(self, computing: Collection[str] | None) -> tuple[LayerRecord, ...]:
        del computing
        return ()

    def tensor_types(self) -> frozenset[str]:
        return frozenset(self.layers)

    def new_kernels(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class StandIn(TensorRT):
    """A TensorRT-RTX whose engines are not built, and are `OnCpu`'s; all else is as it is."""

    cache: Any = None
    layers: Mapping[str, int] = field(default_factory=dict)
    spoiled: Callable[[int, Outputs], Outputs] = lambda _, outputs: outputs

    def build(self, spec: EngineSpec, cache: Cache) -> Built:
        key = Key("engine", spec.model.label, {"lowered": spec.lowered.key})
        entry = cache.get_or_make(key, lambda _: None)
        record = EngineRecord(key.digest, cached=False, miss_reason=None, build_s=0, bytes=1)
        return Built(spec, entry.path, record, entry)

    def load(self, built: Built) -> Runner:
        spec = built.spec
        return OnCpu(emulation(spec.model, spec.lowered, spec.precision, self.cache), self.layers, self.spoiled)


@dataclass(frozen=True)
class OnGpu(Checker):
    """A checker in a machine with an A100, as far as one can tell without loading an engine."""

    layers: Mapping[str, int] = field(default_factory=lambda: {"fp16": 1})
    spoiled: Callable[[int, Outputs], Outputs] = lambda _, outputs: outputs

    def system(self, request: Request) -> Backend:  # noqa: ARG002
        module = find_module("tensorrt_rtx")
        card = Gpu(name="a stand-in", model=gpu.find_gpu("A100"), compute_capability=(8, 0), uuid="GPU-stand-in")
        return StandIn(module, Target((8, 0), here=True), "A100", card, self.cache, self.layers, self.spoiled)


@pytest.fixture
def on_gpu(tmp_path: Path) -> OnGpu:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra rtx)", exc_type=ImportError)
    return OnGpu(Cache(tmp_path / "cache", None), allowance=Allowance(0))


def shifted(by: float, runs: Callable[[int], bool]) -> Callable[[int, Outputs], Outputs]:
    """Adds `by` times the largest value to an output's first element, in some runs."""

    def spoil(run: int, outputs: Outputs) -> Outputs:
        spoiled = {name: array.copy() for name, array in outputs.items()}
        if runs(run):
            for array in spoiled.values():
                array.flat[0] += by * np.abs(array).max()
        return spoiled

    return spoil


def test_a_sound_engine_passes(on_gpu: OnGpu) -> None:
    record = check(on_gpu, onnx_models.gemm_net(), X)
    assert (record.verdict, record.evidence) == ("pass", "engine")


def test_tf32_that_the_environment_turns_off_is_no_tf32(on_gpu: OnGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def checked(precision: Precision) -> CheckRecord:
        return check(on_gpu, onnx_models.gemm_net(), X, precision=(precision,))

    assert [checked(each).precision for each in ("tf32", "fp32")] == ["tf32", "tf32 (asked fp32)"]
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    refused = checked("tf32")
    assert refused.verdict == "error"
    assert "NVIDIA_TF32_OVERRIDE=0 turns TF32 off in this process: unset it" in str(refused.message)
    exact = checked("fp32")
    assert (exact.verdict, exact.precision) == ("pass", "fp32")


def test_an_engine_gives_floats_where_the_model_has_doubles(on_gpu: OnGpu) -> None:
    double = TensorProto.DOUBLE
    nodes = [helper.make_node("Mul", ["x", "x"], ["y"]), helper.make_node("Shape", ["y"], ["shape"])]
    outputs: dict[str, tuple[int, list[int | str]]] = {"y": (double, [8]), "shape": (TensorProto.INT64, [1])}
    model = onnx_models.model(nodes, {"x": (double, [8])}, outputs)
    floats = replace(on_gpu, spoiled=lambda _, found: {**found, "y": found["y"].astype(np.float32)})
    assert check(floats, model, {"x": np.linspace(-1, 1, 8)}, precision=("fp32",)).verdict == "pass"


def test_an_engine_that_flickers_fails_although_the_error_is_small(on_gpu: OnGpu) -> None:
    # 4e-3 apart: within fp16's limit of 1e-2 in every run, and beyond what rounding explains.
    flickers = replace(on_gpu, spoiled=shifted(4e-3, lambda run: run == 1))
    record = check(flickers, onnx_models.gemm_net(), X)
    assert record.verdict == "fail"
    assert "not deterministic" in str(record.message)
    assert record.parity is not None
    assert record.parity.verdict == "fail"


def test_bitwise_is_handed_to_the_engine_check(on_gpu: OnGpu) -> None:
    # 2^-11 of the largest value: an ulp of FP16.
    nearly = replace(on_gpu, spoiled=shifted(2**-11, lambda run: run == 2))
    assert check(nearly, onnx_models.gemm_net(), X).verdict == "pass"
    assert check(replace(nearly, bitwise=True), onnx_models.gemm_net(), X).verdict == "fail"


def test_an_engine_that_flickers_fails_a_latency_test_as_well(on_gpu: OnGpu) -> None:
    # A test with trt_latency alone asks for no parity; a time of an engine that is not to be trusted is worth nothing.
    flickers = replace(on_gpu, spoiled=shifted(0.1, lambda run: run == 1))
    request = Request("t.py::t", onnx_models.gemm_net(), (), ParitySpec(), judge_parity=False, inputs=X)
    assert flickers.check(request).verdict == "fail"


@pytest.mark.parametrize("layers", [{"fp32": 9}, {"fp32": 9, "unknown": 1}, {}, {"fp16": 0, "fp32": 2}])
def test_an_engine_that_computes_in_another_precision_fails(on_gpu: OnGpu, layers: Mapping[str, int]) -> None:
    record = check(replace(on_gpu, layers=layers), onnx_models.gemm_net(), X)
    stated = "fp16 is stated, not proved: the engine inspector tells no layer's type"
    assert (stated in record.notes) == (not layers)
    if not layers:
        assert record.verdict == "pass"
        return
    assert record.verdict == "fail"
    assert "fp16 did not take effect: the engine inspector lists" in str(record.message)


@pytest.mark.parametrize(
    ("precision", "layers", "as_it_is", "doubted"),
    [
        ("fp16", {"fp32": 3}, False, True),
        ("bf16", {"fp16": 3}, False, True),
        ("int8", {"fp32": 3, "fp16": 1}, False, True),
        ("fp8", {"int8": 3}, False, True),
        ("int8", {"fp32": 3, "int8": 1}, False, False),
        ("fp16", {"unknown": 3}, False, False),
        ("fp32", {"fp16": 3}, False, False),
        ("tf32", {"fp32": 3}, False, False),
        ("fp16", {"fp32": 3}, True, False),
        ("int8+fp16", {"int8": 3, "fp16": 2}, False, False),
        ("int8+fp16", {"int8": 3, "fp32": 2}, False, False),
        ("int8+fp16", {"fp16": 3}, False, True),
        ("int8+fp16", {"int8": 3, "fp32": 9}, False, True),
        ("int8+fp16", {"unknown": 3}, False, False),
    ],
)
def test_what_the_inspector_must_list(
    precision: Precision, layers: Mapping[str, int], as_it_is: bool, doubted: bool
) -> None:
    class Inspected:
        def layers_by_precision(self) -> Mapping[str, int]:
            return layers

        def tensor_types(self) -> frozenset[str]:
            return frozenset(layers)

    lowered = Lowered(Path("m.onnx"), "key", taken_as_it_is=as_it_is)
    case = {"x": np.ones((1, 4), np.float32)}
    spec = EngineSpec(cast("Any", None), lowered, precision, {}, BuildOptions())
    system = TensorRT(cast("Any", None), Target((8, 0), here=True), "A100")
    doubt = system.doubt(Built(spec, lowered.path), cast("Runner", Inspected()), case)
    assert (doubt is not None) == doubted


def test_an_engine_that_is_wrong_fails(on_gpu: OnGpu) -> None:
    wrong = replace(on_gpu, spoiled=shifted(0.05, lambda _: True))
    record = check(wrong, onnx_models.gemm_net(), X)
    assert record.verdict == "fail"
    assert "on the GPU" in str(record.message)


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_every_case_is_compared(on_gpu: OnGpu, wrong: int) -> None:
    # Three runs on the first case look whether the engine is stable; then each case has its run.
    faulty = replace(on_gpu, spoiled=shifted(0.5, lambda run: run == 3 + wrong))
    record = check(faulty, onnx_models.gemm_net(), [X, {"x": X["x"] * 2}, {"x": X["x"] * 3}])
    assert record.verdict == "fail"
    assert record.cases == 3
    assert record.parity is not None
    (judged,) = (entry for entry in record.parity.outputs[0].judged if entry.metric == "max")
    assert judged.case == wrong
    assert judged.value == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("wrong", ["Relu", "Sigmoid"])
def test_every_output_is_compared(on_gpu: OnGpu, wrong: str) -> None:
    def spoil(_: int, outputs: Outputs) -> Outputs:
        return {**outputs, wrong: outputs[wrong] * np.float32(1.05)}

    record = check(replace(on_gpu, spoiled=spoil), one_operator("Relu", "Sigmoid"), {"x": np.ones(4, np.float32)})
    assert record.verdict == "fail"
    assert record.parity is not None
    assert {output.name for output in record.parity.outputs if output.verdict == "fail"} == {wrong}


def test_an_output_that_does_not_come_back_is_an_error(on_gpu: OnGpu) -> None:
    def spoil(_: int, outputs: Outputs) -> Outputs:
        return {name: array for name, array in outputs.items() if name != "Sigmoid"}

    record = check(replace(on_gpu, spoiled=spoil), one_operator("Relu", "Sigmoid"), {"x": np.ones(4, np.float32)})
    assert record.verdict == "error"
    assert "without Sigmoid" in str(record.message)


def test_the_emulations_errors_stand_beside_the_engines(on_gpu: OnGpu) -> None:
    wrong = replace(on_gpu, spoiled=shifted(0.005, lambda _: True), emulate_too=True)
    record = check(wrong, onnx_models.gemm_net(), X)
    assert record.verdict == "pass"
    assert record.parity is not None
    output = record.parity.outputs[0]
    assert output.max == pytest.approx(0.005, rel=0.2)
    assert 0 < ((output.details.emulated or {})["max"] or 0.0) < 0.001


@pytest.mark.parametrize("fault", [np.nan, np.inf])
def test_an_engine_that_gives_nan_fails(on_gpu: OnGpu, fault: float) -> None:
    def spoil(_: int, outputs: Outputs) -> Outputs:
        spoiled = {name: array.copy() for name, array in outputs.items()}
        spoiled["y"].flat[-1] = fault
        return spoiled

    assert check(replace(on_gpu, spoiled=spoil), onnx_models.gemm_net(), X).verdict == "fail"


def test_a_process_whose_cuda_broke_judges_nothing_more(on_gpu: OnGpu) -> None:
    def broken(_: int, outputs: Outputs) -> Outputs:
        error = GpuError("an illegal memory access")
        error.poisoned = True
        raise error

    first = replace(on_gpu, spoiled=broken)
    assert check(first, onnx_models.gemm_net(), X).verdict == "error"
    record = check(OnGpu(first.cache, broken=first.broken), onnx_models.conv_net(2))
    assert record.verdict == "error"
    assert "no engine can run: t.py::t broke CUDA in this process: an illegal memory access" in str(record.message)


def test_an_engine_that_cannot_be_inspected_is_closed(on_gpu: OnGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[OnCpu] = []

    def refuse(engine: OnCpu) -> Mapping[str, int]:
        raise GpuError("the engine inspector's answer cannot be read")

    def close(engine: OnCpu) -> None:
        closed.append(engine)

    monkeypatch.setattr(OnCpu, "layers_by_precision", refuse)
    monkeypatch.setattr(OnCpu, "close", close)
    record = check(on_gpu, onnx_models.gemm_net(), X)
    assert (record.verdict, len(closed)) == ("error", 1)
    assert record.engine is not None, "it is named: it failed, whatever other checks say of it"


def test_a_budget_on_what_an_engine_does_not_tell_is_not_kept(on_gpu: OnGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandIn, "described", lambda _, built, *__: built.record)
    latency = LatencySpec(memory_mib=1.0)
    request = Request("t.py::t", onnx_models.gemm_net(), (), judge_parity=False, latency=latency, inputs=X)
    record = replace(on_gpu, machine=replace(on_gpu.machine, requested=gpu.find_gpu("A100"))).check(request)
    assert record.verdict == "not_measured"
    assert record.message is not None
    assert record.message.startswith("memory_mib: TensorRT")
    assert record.message.endswith("does not tell it")


@pytest.mark.parametrize("tol", [1e-2, 1e-9])
def test_every_session_is_closed_when_a_check_is_made(
    checker: Checker, monkeypatch: pytest.MonkeyPatch, tol: float
) -> None:
    opened: dict[int, OrtRunner] = {}
    make, close = OrtRunner.__init__, OrtRunner.close

    def making(runner: OrtRunner, *args: Any, **kwargs: Any) -> None:
        make(runner, *args, **kwargs)
        opened[id(runner)] = runner

    def closing(runner: OrtRunner) -> None:
        close(runner)
        opened.pop(id(runner))

    monkeypatch.setattr(OrtRunner, "__init__", making)
    monkeypatch.setattr(OrtRunner, "close", closing)
    record = check(replace(checker, allowance=Allowance(0)), onnx_models.gemm_net(), X, tol=tol)
    assert record.verdict == ("pass" if tol > 1e-3 else "fail")
    assert not opened


def test_what_no_gpu_ran_fails_where_one_is_required(checker: Checker) -> None:
    assert check(checker, onnx_models.gemm_net(), X).verdict == "pass"
    record = check(replace(checker, require_gpu=True), onnx_models.gemm_net(), X)
    assert record.verdict == "fail"
    assert "--trt-require-gpu: parity was emulated on the CPU" in str(record.message)


# --- what diagnoses may cost -----------------------------------------------------------------------------------------


def ruined(seed: int) -> onnx.ModelProto:
    """A model that FP16 ruins: products beyond 65504 that are scaled back."""
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"], name="gemm"),
        helper.make_node("Mul", ["h", "up"], ["u"], name="scale_up"),
        helper.make_node("Div", ["u", "up"], ["y"], name="scale_down"),
    ]
    return onnx_models.model(
        nodes,
        {"x": (FLOAT, [2, 4])},
        {"y": (FLOAT, [2, 3])},
        {"w": onnx_models.weights((4, 3), seed) + 1, "up": np.array(6e4, np.float32)},
    )


def test_the_session_ends_where_every_check_fails(checker: Checker) -> None:
    some = replace(checker, allowance=Allowance(60.0, session_seconds=1e-6))
    first = check(some, ruined(1), X)
    assert first.verdict == "fail"
    assert first.parity is not None
    assert first.parity.blame is not None
    assert some.allowance.spent_s > 1e-6
    second = check(some, ruined(2), X)
    assert second.verdict == "fail"
    assert second.parity is not None
    assert second.parity.blame is None
    assert any(note.startswith("not diagnosed: the diagnoses of this run took") for note in second.notes)


def test_what_is_within_the_allowance_is_diagnosed(checker: Checker) -> None:
    ample = replace(checker, allowance=Allowance(60.0, session_seconds=600.0))
    for seed in (1, 2):
        record = check(ample, ruined(seed), X)
        assert record.parity is not None
        assert record.parity.blame is not None


def test_nothing_is_diagnosed_without_an_allowance(checker: Checker) -> None:
    record = check(replace(checker, allowance=Allowance(0)), ruined(1), X)
    assert record.verdict == "fail"
    assert record.parity is not None
    assert record.parity.blame is None
    assert "not diagnosed: trt_diagnose is 0" in record.notes


# --- what a key must hold --------------------------------------------------------------------------------------------


def test_a_reference_of_one_provider_is_not_anothers(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", None)
    model = open_model(onnx_models.gemm_net(), (), cache)
    kept = Reference(model, cache, "cpu")(X)

    class Elsewhere(Reference):
        """What another provider computes: something else."""

        def computed(self, case: Mapping[str, NDArray[Any]]) -> Outputs:
            return {name: array + 1 for name, array in super().computed(case).items()}

    other = Elsewhere(model, cache, "cuda")
    other._runner = OrtRunner(model.path, model.label, "cpu")
    np.testing.assert_array_equal(other(X)["y"], kept["y"] + 1)
    np.testing.assert_array_equal(Reference(model, cache, "cpu")(X)["y"], kept["y"])


def test_a_reference_follows_model_inputs_and_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "cache", None)

    def references() -> int:
        return sum(entry.kind == "reference" for entry in cache.entries())

    model = open_model(onnx_models.gemm_net(), (), cache)
    first = Reference(model, cache)(X)["y"]
    doubled = Reference(model, cache)({"x": X["x"] * 2})["y"]
    assert not np.array_equal(first, doubled)
    changed = onnx_models.gemm_net()
    changed.graph.initializer[0].raw_data = (np.frombuffer(changed.graph.initializer[0].raw_data, "f4") * 2).tobytes()
    other = Reference(open_model(changed, (), cache), cache)(X)["y"]
    assert not np.array_equal(first, other)
    assert references() == 3
    monkeypatch.setattr(ort, "version", lambda: "another")
    Reference(model, cache)(X)
    assert references() == 4


def test_a_diagnosis_is_kept_for_what_it_was_made_of(checker: Checker) -> None:
    def diagnoses() -> int:
        return sum(entry.kind == "blame" for entry in checker.cache.entries())

    check(checker, ruined(1), X)
    check(checker, ruined(1), X)
    assert diagnoses() == 1
    check(checker, ruined(1), {"x": X["x"] * 2})
    assert diagnoses() == 2
    check(checker, ruined(1), X, tol=1e-3)
    assert diagnoses() == 3
    check(checker, ruined(2), X)
    assert diagnoses() == 4


def test_a_diagnosis_by_a_metric_of_the_users_is_not_kept(checker: Checker) -> None:
    mine = of_arrays(lambda actual, expected: float(np.abs(actual - expected).max()), name="mine")
    record = check(checker, ruined(1), X, metric=mine, tol=1e-3)
    assert record.verdict == "fail"
    assert "blame" not in {entry.kind for entry in checker.cache.entries()}


def test_an_emulation_is_of_one_precision(tmp_path: Path) -> None:
    # fp32 and tf32 have one lowered model, the file itself, and not one emulation.
    cache = Cache(tmp_path / "cache", None)
    model = open_model(onnx_models.conv_net(2), (), cache)
    case = {"image": np.random.default_rng(0).random((2, 3, 16, 16), dtype=np.float32)}

    def emulated(precision: Precision) -> NDArray[Any]:
        lowered: Lowered = lower(model, precision, cache)
        return Emulated(model, lowered, precision, cache)(case)["logits"]

    fp32, tf32 = emulated("fp32"), emulated("tf32")
    np.testing.assert_array_equal(fp32, Reference(model, cache)(case)["logits"])
    assert not np.array_equal(tf32, fp32)


# --- folding that changes nothing ------------------------------------------------------------------------------------

NORM = {
    "scale": np.array([2, 3, 4, 5], np.float32),
    "bias": np.array([1, -1, 2, -2], np.float32),
    "mean": np.array([0.5, 0.25, -0.5, 1], np.float32),
    "var": np.array([4, 0.25, 1, 9], np.float32),
}
IMAGE = {"x": np.random.default_rng(0).standard_normal((2, 4, 5, 5)).astype(np.float32)}
SHAPE = (FLOAT, [2, 4, 5, 5])
CONV = helper.make_node("Conv", ["x", "w"], ["c"], name="conv")
NORMALIZE = helper.make_node("BatchNormalization", ["c", *NORM], ["y"], name="norm")


def normalized(value: NDArray[Any]) -> NDArray[np.float64]:
    """Batch normalization in FP64: scale · (x − mean) / √(var + ε) + bias, by channel."""
    scale, bias, mean, var = (each.astype(np.float64).reshape(1, -1, 1, 1) for each in NORM.values())
    return np.asarray(scale * (value.astype(np.float64) - mean) / np.sqrt(var + 1e-5) + bias)


def folded_outputs(model: onnx.ModelProto, folder: Path, keep: Sequence[str] = ()) -> tuple[Outputs, set[str]]:
    """What the folded model computes, and its operators."""
    path = onnx_models.save(model, folder / "m.onnx")
    folded = batch_norm.fold_batch_norm(graph.read(path), keep)
    graph.write(folded, folder / "folded.onnx")
    operators = {node.op_type for node in graph.all_nodes(folded.graph)}
    return OrtRunner(folder / "folded.onnx", "folded")(IMAGE), operators


def test_a_convolution_that_is_an_output_keeps_its_weights(tmp_path: Path) -> None:
    weights = {"w": onnx_models.weights((4, 4, 1, 1), 3), **NORM}
    model = onnx_models.model([CONV, NORMALIZE], {"x": SHAPE}, {"y": SHAPE, "c": SHAPE}, weights)
    outputs, operators = folded_outputs(model, tmp_path)
    assert "BatchNormalization" not in operators
    expected = np.einsum("oi,nihw->nohw", weights["w"][:, :, 0, 0], IMAGE["x"])
    np.testing.assert_allclose(outputs["c"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outputs["y"], normalized(expected), rtol=1e-5, atol=1e-5)


def test_a_convolution_that_others_read_keeps_its_weights(tmp_path: Path) -> None:
    nodes = [CONV, NORMALIZE, helper.make_node("Neg", ["c"], ["n"], name="neg")]
    weights = {"w": onnx_models.weights((4, 4, 1, 1), 3), **NORM}
    outputs, _ = folded_outputs(onnx_models.model(nodes, {"x": SHAPE}, {"y": SHAPE, "n": SHAPE}, weights), tmp_path)
    expected = np.einsum("oi,nihw->nohw", weights["w"][:, :, 0, 0], IMAGE["x"])
    np.testing.assert_allclose(outputs["n"], -expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outputs["y"], normalized(expected), rtol=1e-5, atol=1e-5)


def test_a_convolution_with_a_bias_of_its_own(tmp_path: Path) -> None:
    bias = np.array([0.5, -3, 1, 2], np.float32)
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv"), NORMALIZE]
    weights = {"w": onnx_models.weights((4, 4, 1, 1), 3), "b": bias, **NORM}
    outputs, operators = folded_outputs(onnx_models.model(nodes, {"x": SHAPE}, {"y": SHAPE}, weights), tmp_path)
    assert operators == {"Conv"}
    expected = np.einsum("oi,nihw->nohw", weights["w"][:, :, 0, 0], IMAGE["x"]) + bias.reshape(1, 4, 1, 1)
    np.testing.assert_allclose(outputs["y"], normalized(expected), rtol=1e-5, atol=1e-5)


def test_a_convolution_whose_weights_or_bias_are_computed(tmp_path: Path) -> None:
    for operand in ("w", "b"):
        names = {"w": "w", "b": "b"} | {operand: "computed"}
        nodes = [
            helper.make_node("Neg", [operand], ["computed"], name="neg"),
            helper.make_node("Conv", ["x", names["w"], names["b"]], ["c"], name="conv"),
            NORMALIZE,
        ]
        weights = {"w": onnx_models.weights((4, 4, 1, 1), 3), "b": np.array([0.5, -3, 1, 2], np.float32), **NORM}
        outputs, _ = folded_outputs(onnx_models.model(nodes, {"x": SHAPE}, {"y": SHAPE}, weights), tmp_path)
        w, b = (-weights[name] if name == operand else weights[name] for name in ("w", "b"))
        expected = np.einsum("oi,nihw->nohw", w[:, :, 0, 0], IMAGE["x"]) + b.reshape(1, 4, 1, 1)
        np.testing.assert_allclose(outputs["y"], normalized(expected), rtol=1e-5, atol=1e-5)


def test_a_convolution_that_is_kept_is_not_changed(tmp_path: Path) -> None:
    weights = {"w": onnx_models.weights((4, 4, 1, 1), 3), **NORM}
    model = onnx_models.model([CONV, NORMALIZE], {"x": SHAPE}, {"y": SHAPE}, weights)
    outputs, operators = folded_outputs(model, tmp_path, ["conv"])
    assert operators == {"Conv", "Mul", "Add"}
    expected = np.einsum("oi,nihw->nohw", weights["w"][:, :, 0, 0], IMAGE["x"])
    np.testing.assert_allclose(outputs["y"], normalized(expected), rtol=1e-5, atol=1e-5)


# --- what is asked for reaches who does it ---------------------------------------------------------------------------


def test_options_reach_the_checker(pytester: pytest.Pytester, all_loaded: None) -> None:
    pytester.makepyfile(
        test_it="""
        from pytest_trtcheck.plugin.session import session_of

        def test_checker(request):
            checker = session_of(request.config).checker
            assert checker.bitwise is True
            assert checker.require_gpu is True
            assert checker.reference_provider == "cuda"
            assert checker.allowance.seconds == 7.0
            assert checker.allowance.session_seconds == 600.0
            assert checker.backend == "onnxruntime"
        """
    )
    pytester.makeini("[pytest]\ntrt_bitwise = true\ntrt_reference = cuda")
    result = pytester.runpytest_inprocess(
        "--trt-require-gpu",
        "--trt-diagnose=7",
        "--trt-backend=onnxruntime",
        "-p",
        "no:cacheprovider",
    )
    result.assert_outcomes(passed=1)


def test_one_input_whose_reference_is_nan_throughout_is_refused(checker: Checker) -> None:
    proto = one_operator("Sqrt")
    good, bad = ({"x": np.full(4, value, np.float32)} for value in (4.0, -4.0))
    assert check(checker, proto, [good, good]).verdict == "pass"
    record = check(checker, proto, [good, bad])
    assert record.verdict == "error"
    assert "NaN or infinite in every element of output 'Sqrt' on input [1]" in str(record.message)
