"""Models that other tools quantized: taken as they are where TensorRT takes them; otherwise, what to quantize with."""

from __future__ import annotations

import re
import shutil
import sys
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from pytest_trtcheck.backends.tensorrt import acceptance as accepting
from pytest_trtcheck.backends.tensorrt import build as tensorrt
from pytest_trtcheck.backends.tensorrt.module import Target, find_module
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.check.checker import Checker, Request
from pytest_trtcheck.model.onnx_model import load
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.precision.lowering import Lowered, lower
from pytest_trtcheck.precision.reference import Reference
from pytest_trtcheck.spec import BuildOptions, ParitySpec
from tests import onnx_models
from tests.test_asked import WITHOUT

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from pytest_trtcheck.backends.base import Acceptance
    from pytest_trtcheck.record import CheckRecord
    from tests.conftest import Run, Suite

needs_rtx = pytest.mark.skipif(
    util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed (extra rtx)"
)
DATA = Path(__file__).parent / "data" / "quantized"
SYMMETRIC = {"ActivationSymmetric": True, "AddQDQPairToWeight": True, "QuantizeBias": False}


def cnn() -> onnx.ModelProto:
    """Convolutions, a residual branch and a Gemm, with biases."""
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "conv1", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "conv2", pads=[1] * 4),
        helper.make_node("Add", ["c2", "r1"], ["a"], "add"),
        helper.make_node("Relu", ["a"], ["r2"], "relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["g"], "pool"),
        helper.make_node("Flatten", ["g"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], "dense"),
    ]
    shapes: dict[str, tuple[int, ...]] = {
        "w1": (8, 3, 3, 3),
        "b1": (8,),
        "w2": (8, 8, 3, 3),
        "b2": (8,),
        "w3": (8, 10),
        "b3": (10,),
    }
    weights = {name: onnx_models.weights(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    return onnx_models.model(
        nodes,
        {"x": (TensorProto.FLOAT, ["batch", 3, 16, 16])},
        {"y": (TensorProto.FLOAT, ["batch", 10])},
        weights,
        opset=17,
    )


def samples(count: int = 1, seed: int = 1) -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return [rng.random((4, 3, 16, 16), dtype=np.float32) for _ in range(count)]


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.samples = iter(samples(4))

    def get_next(self) -> dict[str, Any] | None:
        sample = next(self.samples, None)
        return None if sample is None else {"x": sample}


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return onnx_models.save(cnn(), tmp_path / "original.onnx")


@pytest.fixture
def quantized(tmp_path: Path, original: Path) -> Callable[..., Path]:
    def quantize(dynamic: bool = False, **arguments: Any) -> Path:
        path = tmp_path / "quantized.onnx"
        if dynamic:
            quantize_dynamic(original, path)
        else:
            quantize_static(original, path, Reader(), **arguments)
        return path

    return quantize


@pytest.fixture
def judged(tmp_path: Path) -> Callable[[Path], Acceptance]:
    cache = Cache(tmp_path / "cache")

    def judge(path: Path) -> Acceptance:
        lowered = Lowered(path, open_model(path, (), cache).sha256)
        return accepting.acceptance(lowered, "the model", ("tensorrt", "tensorrt_rtx"), BuildOptions(), cache)

    return judge


def check(path: Path, tmp_path: Path, **spec: Any) -> CheckRecord:
    spec = {"precision": ("int8",), **spec}
    request = Request("t", path, (), ParitySpec(**spec), inputs={"x": samples(seed=7)[0]})
    return Checker(Cache(tmp_path / "cache")).check(request)


# onnxruntime's quantizer

STATIC = {
    "defaults": (
        {},
        'extra_options={"ActivationSymmetric": True, "AddQDQPairToWeight": True, "QuantizeBias": False}',
    ),
    "uint8": (
        {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QUInt8},
        "activation_type=QuantType.QInt8, weight_type=QuantType.QInt8, "
        'extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "AddQDQPairToWeight": True, '
        '"QuantizeBias": False}',
    ),
    "bias alone": (
        {"extra_options": {**SYMMETRIC, "QuantizeBias": True}},
        'extra_options={"QuantizeBias": False}',
    ),
    "weights alone": (
        {"extra_options": {**SYMMETRIC, "WeightSymmetric": False}},
        'extra_options={"WeightSymmetric": True}',
    ),
    "activations of 16 bits": (
        {"activation_type": QuantType.QInt16, "extra_options": SYMMETRIC},
        'activation_type=QuantType.QInt8, extra_options={"ActivationSymmetric": True}',
    ),
    "per channel": (
        {"per_channel": True},
        "per_channel=True, "
        'extra_options={"ActivationSymmetric": True, "AddQDQPairToWeight": True, "QuantizeBias": False}',
    ),
    "QOperator": (
        {"quant_format": QuantFormat.QOperator},
        "quant_format=QuantFormat.QDQ, "
        'extra_options={"ActivationSymmetric": True, "AddQDQPairToWeight": True, "QuantizeBias": False}',
    ),
    "dynamic": (
        {"dynamic": True},
        "activation_type=QuantType.QInt8, "
        'extra_options={"ActivationSymmetric": True, "AddQDQPairToWeight": True, "QuantizeBias": False}',
    ),
}


@pytest.fixture
def who(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in () if installed else ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)


def printed_call(advice: str) -> str:
    (call,) = re.findall(
        r"quantize_static\(float_model, quantized_model, calibration_data_reader, (.*)\)$", advice, re.MULTILINE
    )
    return str(call)


@pytest.mark.parametrize(
    ("name", "installed"),
    [
        *(pytest.param(name, True, marks=needs_rtx, id=f"{name}-rtx") for name in STATIC),
        *(pytest.param(name, False, id=f"{name}-tables") for name in ("defaults", "QOperator", "dynamic")),
    ],
)
@pytest.mark.usefixtures("who")
def test_the_options_that_mend_it_are_printed_and_mend_it(
    name: str, installed: bool, quantized: Any, judged: Any, original: Path
) -> None:
    tmp_path = original.parent
    given, wanted = STATIC[name]
    found = judged(quantized(**given))
    assert found.refusal
    assert printed_call(found.advice) == wanted
    assert found.advice.count("→") == 0 or name == "dynamic"  # no advice beside it, but for uint8 tensors
    # Pasted, with the arguments that it leaves as they were.
    names = {"QuantType": QuantType, "QuantFormat": QuantFormat}
    others = {} if name == "dynamic" else dict(given)
    pasted = eval(f"dict({printed_call(found.advice)})", names)
    extra = {**others.get("extra_options", {}), **pasted.get("extra_options", {})}
    mended = quantized(**{**others, **pasted, "extra_options": extra})
    assert not judged(mended).refusal
    if installed:
        module = find_module("tensorrt_rtx")
        assert not tensorrt.parse(("tensorrt_rtx",), mended).errors
        fixed = tmp_path / "fixed.onnx"
        proto = onnx.load(mended)
        proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        onnx.save(proto, fixed)
        target = Target((8, 9), here=False)
        assert tensorrt.build(module, fixed, tmp_path / "engine", target=target, precision="int8").bytes
    record = check(mended, tmp_path, reference=str(original))
    assert record.verdict == "pass", record.message


@needs_rtx
def test_a_build_that_fails_says_so_too(suite: Suite, quantized: Any) -> None:
    shutil.copy(quantized(), suite.path / "default.onnx")
    run = suite.run("default.onnx", "--trt-gpu=L40")
    run.result.assert_outcomes(failed=1)
    assert "could not parse" in run.text
    assert 'extra_options={"ActivationSymmetric": True, "AddQDQPairToWeight": True, "QuantizeBias": False})' in run.text


def test_what_another_tool_quantized_names_no_argument_of_onnxruntimes(quantized: Any, judged: Any) -> None:
    path = quantized()
    proto = onnx.load(path)
    proto.producer_name = "something else"
    onnx.save(proto, path)
    advice = judged(path).advice
    assert "quantize_static(" not in advice
    assert "quantize symmetrically" in advice


# Taken as they are


def changed(path: Path, name: str, by: float) -> Path:
    """The model with one initializer scaled."""
    proto = onnx.load(path)
    (tensor,) = [each for each in proto.graph.initializer if each.name == name]
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((array * by).astype(array.dtype), name))
    target = path.with_name("changed.onnx")
    onnx.save(proto, target)
    return target


GOOD = {"extra_options": SYMMETRIC}
ONLY_INTEGERS = "the file has only integers"
INTEGERS = {"extra_options": {**SYMMETRIC, "AddQDQPairToWeight": False}}


@pytest.mark.parametrize("scale", ["x_scale", "w2_scale", "a_scale"])
@pytest.mark.parametrize("by", [0.05, 300.0])
def test_a_wrong_scale_passes_neither_with_nor_without_the_original(
    scale: str, by: float, quantized: Any, original: Path, tmp_path: Path
) -> None:
    path = quantized(**GOOD)
    if scale == "a_scale":
        names = {each.name for each in onnx.load(path).graph.initializer}
        scale = next(name for name in sorted(names) if name.endswith("_scale") and name[0] in "ar")
    assert check(path, tmp_path).verdict == "pass"
    wrong = changed(path, scale, by)
    assert check(wrong, tmp_path).verdict == "fail"
    assert check(wrong, tmp_path, reference=str(original)).verdict == "fail"


def test_weights_that_are_integers_alone_are_said_not_to_be_compared(
    quantized: Any, original: Path, tmp_path: Path
) -> None:
    path = quantized(**INTEGERS)
    (note,) = [each for each in check(path, tmp_path).notes if each.startswith(ONLY_INTEGERS)]
    assert note.startswith(f"{ONLY_INTEGERS} of w1_quantized, w2_quantized, w3_quantized")
    assert "was not compared" in note
    wrong = changed(path, "w2_scale", 3.0)
    with_original = check(wrong, tmp_path, reference=str(original))
    assert with_original.verdict == "fail"
    assert not any(each.startswith(ONLY_INTEGERS) for each in with_original.notes)
    assert not any(each.startswith(ONLY_INTEGERS) for each in check(quantized(**GOOD), tmp_path).notes)
    # A pair lowers the rest, and keeps them.
    in_a_pair = check(quantized(**INTEGERS, nodes_to_exclude=["dense"]), tmp_path, precision=("int8+fp16",))
    assert in_a_pair.verdict == "pass", in_a_pair.message
    assert any(each.startswith(ONLY_INTEGERS) for each in in_a_pair.notes)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_of_which_the_weights_alone_are_quantized(bits: int, precision: str, tmp_path: Path) -> None:
    weights, x = onnx_models.weights((64, 32), 1, scale=1), onnx_models.weights((4, 64), 2, scale=1)
    largest, rows = 2 ** (bits - 1) - 1, 64 // {4: 2, 8: 1}[bits]
    scales = np.abs(weights.reshape(-1, rows, 32)).max(axis=1) / largest
    integers = np.round(weights / scales.repeat(rows, axis=0)).astype(np.int8)
    blocks: dict[str, Any] = {"axis": 0, "block_size": rows} if bits == 4 else {"axis": 1}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scales"], ["floats"], "dequantize", **blocks),
        helper.make_node("MatMul", ["x", "floats"], ["y"], "product"),
    ]
    proto = onnx_models.model(
        nodes,
        {"x": (TensorProto.FLOAT, ["batch", 64])},
        {"y": (TensorProto.FLOAT, ["batch", 32])},
        {
            "w": integers.astype(ml_dtypes.int4) if bits == 4 else integers,
            "scales": scales if bits == 4 else scales[0],
        },
        opset=21,
    )
    proto.ir_version = 10
    onnx.save(proto, tmp_path / "weights.onnx")

    def checked(**spec: Any) -> CheckRecord:
        spec = {"precision": (precision,), **spec}
        request = Request("t", tmp_path / "weights.onnx", (), ParitySpec(**spec), inputs={"x": x})
        return Checker(Cache(tmp_path / "cache")).check(request)

    record = checked()
    assert record.verdict == "pass", record.message
    assert any(each.startswith(f"{ONLY_INTEGERS} of w") for each in record.notes)
    said = any(each.startswith("w: dequantized by arithmetic in") for each in record.notes)
    assert said == (bits == 8 and precision != "tf32")
    computed = x @ (integers * scales.repeat(rows, axis=0))
    float_model = checked(reference=lambda inputs: {"y": inputs["x"] @ weights})
    assert record.parity is not None
    assert float_model.parity is not None
    assert (record.parity.worst or 1) < {"fp16": 2e-3, "bf16": 1e-2, "tf32": 2e-3}[precision]
    lost = np.abs(computed - x @ weights).max() / np.abs(x @ weights).max()
    assert float_model.parity.outputs[0].max == pytest.approx(lost, rel=0.1, abs=1e-2)
    assert not any(each.startswith(ONLY_INTEGERS) for each in float_model.notes)


@pytest.mark.parametrize("name", ["modelopt_int8_fp16", "pt2e_qat"])
def test_model_optimizer_and_pytorch_are_taken_as_they_are(name: str, tmp_path: Path, judged: Any) -> None:
    path = DATA / f"{name}.onnx"
    assert not judged(path).refusal
    record = check(path, tmp_path, reference=str(DATA / "original.onnx"))
    assert record.verdict == "pass", record.message
    assert any("taken as it is" in note for note in record.notes)
    proto = onnx.load(path)
    (scale, *_) = [node.input[1] for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    wrong = changed_any(path, scale, tmp_path)
    assert check(wrong, tmp_path, reference=str(DATA / "original.onnx")).verdict == "fail"


def changed_any(path: Path, name: str, tmp_path: Path) -> Path:
    copied = Path(shutil.copy(path, tmp_path / path.name))
    return changed(copied, name, 0.03)


def test_pytorchs_asymmetric_activations_are_refused_with_what_to_ask_for(judged: Any) -> None:
    found = judged(DATA / "pt2e_asymmetric.onnx")
    assert "zero point is not 0" in found.refusal
    assert "qscheme=torch.per_tensor_symmetric" in found.advice
    assert "quantize_static" not in found.advice


def test_a_scale_that_is_not_above_0_is_found_without_tensorrt(
    quantized: Any, tmp_path: Path, judged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    refusal = judged(changed(quantized(**GOOD), "x_scale", 0.0)).refusal
    assert "node 'x_QuantizeLinear' (QuantizeLinear): 1 of its 1 scales is not above 0 (0)" in refusal
    assert "1 of its 1 scales is not above 0 (nan)" in judged(changed(quantized(**GOOD), "w1_scale", np.nan)).refusal


# The precision of a file without test code


def test_a_file_that_carries_its_precision_is_checked_in_it(suite: Suite, quantized: Any) -> None:
    shutil.copy(quantized(**GOOD), suite.path / "good.onnx")
    run = suite.run("good.onnx", "gemm.onnx")
    run.result.assert_outcomes(passed=2)
    # The name of such a test speaks of no precision that it was not asked for.
    assert {record["nodeid"]: record["precision"] for record in run.checks} == {
        "good.onnx::parity": "int8",
        "gemm.onnx::parity": "fp16",
    }
    wanted = "good.onnx carries its precision: checked in int8, since --trt-precision asks for none"
    assert any(note.endswith(wanted) for record in run.checks for note in record["notes"])
    np.save(suite.path / "data.npy", np.zeros((1, 4), np.float32))
    data = suite.run("good.onnx", "gemm.onnx", "--trt-calibration=data.npy")
    for name, why in (
        ("good", "the calibration data is not used: good.onnx brings its own scales with it"),
        ("gemm", "the calibration data is not used in fp16: --trt-precision=int8 asks for what it is for"),
    ):
        assert why in data.check(f"{name}.onnx::parity")["notes"]
    asked = suite.run("good.onnx", "--trt-precision=fp16")
    asked.result.assert_outcomes(failed=1)
    assert "carries its precision already" in asked.text


# The lint


def several_problems(quantized: Any) -> onnx.ModelProto:
    """What onnxruntime makes by default, and behind it an operator that no TensorRT has."""
    proto = onnx.load(quantized())
    proto.graph.node.append(helper.make_node("BitShift", ["bits", "bits"], ["shifted"], "shift", direction="LEFT"))
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1, 2], np.uint8), "bits"))
    proto.graph.output.append(helper.make_tensor_value_info("shifted", TensorProto.UINT8, [2]))
    return proto


def all_nodes_of(proto: onnx.ModelProto) -> set[str]:
    zero = {each.name: numpy_helper.to_array(each) for each in proto.graph.initializer}
    return {
        node.name
        for node in proto.graph.node
        if (node.op_type in {"QuantizeLinear", "DequantizeLinear"} and np.any(zero[node.input[2]]))
        or (node.op_type == "DequantizeLinear" and zero.get(node.input[0], np.array(0)).dtype == np.int32)
    }


@pytest.mark.parametrize("installed", [pytest.param(True, marks=needs_rtx, id="rtx"), pytest.param(False, id="tables")])
def test_the_lint_names_every_node_by_rule(suite: Suite, quantized: Any, installed: bool) -> None:
    if not installed:
        suite.write(conftest=WITHOUT.format(missing=("tensorrt", "tensorrt_rtx")))
    proto = several_problems(quantized)
    onnx.save(proto, suite.path / "default.onnx")
    run = (suite.run if installed else suite.run_apart)("default.onnx", "--trt-build-only")
    run.result.assert_outcomes(failed=1)
    (record,) = run.checks
    assert record["verdict"] == "error"
    message = record["message"]
    wrong = all_nodes_of(proto)
    assert len(wrong) > 12
    assert {name for name in wrong if f"'{name}'" in message} == wrong
    assert "'shift' (BitShift)" in message
    assert "bias in INT32, 3 nodes:" in message
    assert "asymmetric quantization, 14 nodes:" in message
    assert "operator that it does not have, 1 node:" in message
    assert "quantize_static(float_model" in message
    if installed:
        assert " said:\n" in message
    else:
        assert "none of TensorRT 10, TensorRT 11 and TensorRT-RTX takes the model" in message


@pytest.mark.parametrize("installed", [pytest.param(True, marks=needs_rtx, id="rtx"), pytest.param(False, id="tables")])
def test_the_lint_of_a_sound_model_passes_nothing_and_says_who_judged(
    suite: Suite, quantized: Any, installed: bool
) -> None:
    if not installed:
        suite.write(conftest=WITHOUT.format(missing=("tensorrt", "tensorrt_rtx")))
    shutil.copy(quantized(**GOOD), suite.path / "good.onnx")
    run = (suite.run if installed else suite.run_apart)("good.onnx", "--trt-build-only", "-rs")
    run.result.assert_outcomes(skipped=1)
    (record,) = run.checks
    assert (record["verdict"], record["parity"], record["engine"]) == ("not_measured", None, None)
    assert "no problem found by the" in record["message"]
    judge = "the parser of TensorRT-RTX 1." if installed else "no TensorRT's parser was asked"
    assert judge in record["message"]


def test_the_lint_needs_no_shapes_and_no_inputs(run_everywhere: Callable[..., Run], suite: Suite) -> None:
    free = onnx_models.model(
        [helper.make_node("Relu", ["x"], ["y"], "relu")],
        {"x": (TensorProto.FLOAT, ["a", "b", "c"])},
        {"y": (TensorProto.FLOAT, ["a", "b", "c"])},
        {},
    )
    onnx_models.save(free, suite.path / "free.onnx")
    suite.write(test_free='@trt_parity("free.onnx")\ndef test_free(): ...\n')
    run = run_everywhere("free.onnx", "test_free.py", "--trt-build-only")
    run.result.assert_outcomes(skipped=2)
    assert all(record["verdict"] == "not_measured" for record in run.checks)


def test_one_familys_problems_are_all_in_the_note(suite: Suite) -> None:
    suite.write(conftest=WITHOUT.format(missing=("tensorrt", "tensorrt_rtx")))
    nodes = [helper.make_node("NonZero", ["x"], [f"y{index}"], f"find{index}") for index in range(7)]
    outputs: dict[str, Any] = {f"y{index}": (TensorProto.INT64, [2, None]) for index in range(7)}
    proto = onnx_models.model(
        [*nodes, helper.make_node("Relu", ["x"], ["z"], "relu")],
        {"x": (TensorProto.FLOAT, [2, 3])},
        {**outputs, "z": (TensorProto.FLOAT, [2, 3])},
        {},
    )
    onnx_models.save(proto, suite.path / "find.onnx")
    run = suite.run_apart("find.onnx", "--trt-build-only")
    run.result.assert_outcomes(skipped=1)
    (note,) = [each for each in run.checks[0]["notes"] if "would not take this model" in each]
    assert all(f"'find{index}'" in note for index in range(7))


# An original that does not fit


def test_an_original_that_does_not_fit_says_what_does_not(quantized: Any, original: Path, tmp_path: Path) -> None:
    other = onnx_models.save(onnx_models.gemm_net(), tmp_path / "other.onnx")
    record = check(quantized(**GOOD), tmp_path, reference=str(other))
    assert record.verdict == "error"
    assert "does not fit" in (record.message or "")


@pytest.mark.parametrize("precision", ["int8", "int8+fp16", "fp8", "fp16", "bf16"])
@pytest.mark.parametrize("kind", [np.int8, np.uint8, ml_dtypes.int4, ml_dtypes.float8_e4m3fn])
def test_a_model_of_which_the_weights_alone_are_quantized_is_lowered(kind: Any, precision: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    largest = 7 if kind == ml_dtypes.int4 else 100
    numbers = [np.asarray(rng.integers(-largest, largest, shape)) for shape in ((50, 64), (64, 32))]
    # FP8 holds the nearest only.
    rounds = kind == ml_dtypes.float8_e4m3fn
    table, weights = ((each.astype(kind) if rounds else each).astype(np.float64) for each in numbers)
    zero = 128 if kind == np.uint8 else 0
    scales = rng.random(50).astype(np.float32) / 50 + 0.01
    nodes = [
        helper.make_node("DequantizeLinear", ["rows", "scales", "zeros"], ["table"], "embedding", axis=0),
        helper.make_node("Gather", ["table", "ids"], ["x"], "look up"),
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["weights"], "dequantize"),
        helper.make_node("MatMul", ["x", "weights"], ["y"], "product"),
    ]
    constants = {"rows": (table + zero).astype(kind), "scales": scales, "zeros": np.full(50, zero, kind)}
    constants |= {"w": (weights + zero).astype(kind), "scale": np.array(0.01, np.float32), "zero": np.array(zero, kind)}
    proto = onnx_models.model(
        nodes, {"ids": (TensorProto.INT64, [50])}, {"y": (TensorProto.FLOAT, [50, 32])}, constants, opset=21
    )
    onnx.save(proto, tmp_path / "weights.onnx")
    ids = np.arange(50)
    calibration = [{"ids": ids}, {"ids": ids[::-1].copy()}]
    model, cache = load(tmp_path / "weights.onnx"), Cache(tmp_path / "cache")
    found = lower(model, precision, cache, calibration=calibration)
    assert found.details["left_float"] == {}
    graph = onnx.load(found.path).graph
    # TensorRT's own rule.
    floats = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT64}
    integers = {each.name for each in graph.initializer if each.data_type not in floats}
    assert {node.op_type for node in graph.node if integers & set(node.input)} <= {"DequantizeLinear", "QuantizeLinear"}
    if util.find_spec("tensorrt_rtx") is not None:
        module, target = find_module("tensorrt_rtx"), Target((8, 9), here=False)
        assert tensorrt.build(module, found.path, tmp_path / "engine", target=target, precision=precision).bytes
    spec = ParitySpec(precision=(precision,), tol=0.1)
    asked = Request("t", tmp_path / "weights.onnx", (), spec, inputs={"ids": ids}, calibration=calibration)
    record = Checker(cache).check(asked)
    assert record.verdict == "pass", record.message
    exact = (table * scales[:, None]) @ (weights * 0.01)
    np.testing.assert_allclose(Reference(model, cache)({"ids": ids})["y"], exact, rtol=1e-4, atol=1e-4)
