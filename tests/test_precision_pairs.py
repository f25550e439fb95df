"""Pairs of precisions (int8+fp16, …): what is lowered to what, what it computes, and that its faults are found."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pytest_trtcheck.backends.tensorrt import build as tensorrt
from pytest_trtcheck.backends.tensorrt.layers import tensor_types, unproved
from pytest_trtcheck.backends.tensorrt.module import Target, find_module
from pytest_trtcheck.backends.tensorrt.support import unsupported
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.choices import PRECISIONS, half_part, is_pair, parts_of, quantized_part
from pytest_trtcheck.diagnose import diagnose
from pytest_trtcheck.errors import ArgumentError, NothingComputedError
from pytest_trtcheck.gpu.names import find_gpu
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.precision.emulation import emulation
from pytest_trtcheck.precision.lowering import lower
from pytest_trtcheck.precision.quantization.quantize import LARGEST, scale_of
from tests import onnx_models
from tests.diagnosed import Bench, conv_chain, image

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from pytest_trtcheck.choices import HalfName, Precision, QuantizedName
    from pytest_trtcheck.precision.lowering import Lowered
    from tests.conftest import Suite

PAIRS = [precision for precision in PRECISIONS if is_pair(precision)]
HALVES = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
ELEMENTS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def samples(count: int = 3) -> list[dict[str, NDArray[Any]]]:
    return [image(seed) for seed in range(count)]


def squared(factor: float = 3000.0) -> onnx.ModelProto:
    """A net whose second block squares and takes the root: what nobody quantizes, and FP16 does not hold."""
    extra = {
        1: [
            helper.make_node("Mul", ["r1", "factor"], ["large"], "enlarge"),
            helper.make_node("Mul", ["large", "large"], ["square"], "square"),
            helper.make_node("Sqrt", ["square"], ["root"], "root"),
            helper.make_node("Div", ["root", "factor"], ["x2"], "reduce"),
        ]
    }
    return conv_chain(3, extra=extra, more_weights={"factor": np.array(factor, np.float32)})


def lowered(tmp_path: Path, model: onnx.ModelProto, precision: Precision, **given: Any) -> Lowered:
    cache = Cache(tmp_path / "cache")
    return lower(open_model(model, [], cache), precision, cache, **{"calibration": samples(), **given})


def kinds(found: Lowered) -> dict[str, str]:
    return {node: kind for node, operator, kind in found.details["arithmetic"] if operator != "QuantizeLinear"}


# What a pair is


def test_a_pair_is_a_quantized_type_and_a_16_bit_one() -> None:
    assert {(quantized_part(pair), half_part(pair)) for pair in PAIRS} == {
        (quantized, half) for quantized in ("int8", "fp8") for half in ("fp16", "bf16")
    }
    assert all(parts_of(each) == (each,) for each in PRECISIONS if not is_pair(each))
    assert (quantized_part("fp16"), half_part("int8"), half_part("tf32")) == (None, None, None)


def test_a_gpu_must_compute_in_both() -> None:
    assert [find_gpu("T4").supports(pair) for pair in ("int8+fp16", "int8+bf16")] == [True, False]
    assert [find_gpu("A100").supports(pair) for pair in ("int8+bf16", "fp8+fp16")] == [True, False]


@given(
    amax=st.floats(2.0**-100, 2.0**30, width=32),
    quantized=st.sampled_from(["int8", "fp8"]),
    rest=st.sampled_from(["fp16", "bf16"]),
)
def test_a_scale_is_the_next_number_of_the_rest_that_narrows_no_range(
    amax: float, quantized: QuantizedName, rest: HalfName
) -> None:
    scale, dtype = scale_of(amax, quantized, rest), HALVES[rest]
    held = np.asarray(scale).astype(dtype)
    assert float(held.astype(np.float32)) == float(scale) > 0
    exact = np.float32(amax / LARGEST[quantized])
    largest = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
    if exact <= largest:
        below = (held.view(np.uint16) - np.uint16(1)).view(dtype).astype(np.float64)
        assert float(scale) >= exact
        assert below < exact
    else:
        assert float(scale) == largest


# The lowered model


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair != "fp8+fp16"])
def test_qdq_nodes_are_of_the_type_that_is_around_them(tmp_path: Path, pair: Precision) -> None:
    found = lowered(tmp_path, conv_chain(3), pair)
    proto = onnx.load(found.path)
    if half_part(pair) == "fp16":  # TensorRT has BF16 for more than ONNX does.
        onnx.checker.check_model(proto, full_check=True)
    types = {value.name: value.type.tensor_type.elem_type for value in (*proto.graph.value_info, *proto.graph.input)}
    types |= {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    half = ELEMENTS[str(half_part(pair))]
    seen = Counter(node.op_type for node in proto.graph.node)
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear":
            assert types[node.output[0]] == types[node.input[1]] == half
        if node.op_type == "QuantizeLinear":
            # The model's own input is FP32, and quantized from there.
            expected = TensorProto.FLOAT if node.input[0] == "image" else half
            assert types[node.input[0]] == types[node.input[1]] == expected
        if node.op_type in {"Conv", "Relu"}:
            assert types[node.output[0]] == half
    # One cast alone, before the output.
    assert seen["Cast"] == 1
    assert set(kinds(found).values()) == set(parts_of(pair))


@pytest.mark.parametrize("brings_qdq", [False, True])
def test_fp8_products_beside_fp16_are_fp32(tmp_path: Path, *, brings_qdq: bool) -> None:
    """TensorRT-RTX 1.5 on an H100 holds a product of FP8's codes in the operator's type: FP16 overflows."""
    net: Any = conv_chain(3)
    if brings_qdq:
        net = onnx.load(lowered(tmp_path, net, "fp8").path)
    found = lowered(tmp_path, net, "fp8+fp16", calibration=None if brings_qdq else samples())
    proto = onnx.load(found.path)
    onnx.checker.check_model(proto, full_check=True)
    types = {value.name: value.type.tensor_type.elem_type for value in proto.graph.value_info}
    types |= {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            assert types[node.input[1]] == TensorProto.FLOAT
        if node.op_type in {"Conv", "Relu"}:
            expected = TensorProto.FLOAT if node.op_type == "Conv" else TensorProto.FLOAT16
            assert types[node.output[0]] == expected
    assert set(kinds(found).values()) == {"fp8", "fp16"}


def test_what_is_kept_and_what_is_excluded(tmp_path: Path) -> None:
    found = kinds(lowered(tmp_path, conv_chain(3), "int8+fp16", keep_fp32=("conv0", "relu1"), exclude=("conv2",)))
    expected = {"conv0": "fp32", "relu0": "fp16", "conv1": "int8", "relu1": "fp32", "conv2": "fp16", "relu2": "fp16"}
    assert {name: found[name] for name in expected} == expected
    alone = kinds(lowered(tmp_path, conv_chain(3), "int8", exclude=("conv2",)))
    assert (alone["conv1"], alone["conv2"]) == ("int8", "fp32")


def test_excluding_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="exclude: no node is called 'conv9'"):
        lowered(tmp_path, conv_chain(3), "int8+fp16", exclude=("conv9",))


def test_a_pair_without_a_rest_says_so(tmp_path: Path) -> None:
    net = onnx_models.model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        {"x": (onnx_models.FLOAT, [2, 8])},
        {"y": (onnx_models.FLOAT, [2, 8])},
        {"w": onnx_models.weights((8, 8))},
    )
    rows = [{"x": np.random.default_rng(seed).normal(size=(2, 8)).astype(np.float32)} for seed in range(3)]
    notes = lowered(tmp_path, net, "int8+fp16", calibration=rows).notes
    assert any("nothing is left that computes in fp16" in note for note in notes)


# What it computes


@pytest.mark.parametrize("rest", ["fp16", "bf16"])
def test_emulation_is_integer_products_between_16_bit_values(tmp_path: Path, rest: HalfName) -> None:
    """Against numpy: a product of integers, rounded to the 16-bit type; the bias and all that follows in that type."""
    rng, half = np.random.default_rng(0), HALVES[rest]
    w = [rng.normal(size=(8, 8)).astype(np.float32) for _ in range(2)]
    b = rng.normal(size=8).astype(np.float32)
    net = onnx_models.model(
        [
            helper.make_node("MatMul", ["x", "w0"], ["m0"], "m0"),
            helper.make_node("Add", ["m0", "b"], ["a"], "a"),
            helper.make_node("Relu", ["a"], ["r"], "r"),
            helper.make_node("MatMul", ["r", "w1"], ["m1"], "m1"),
            helper.make_node("Mul", ["m1", "m1"], ["y"], "square"),
        ],
        {"x": (onnx_models.FLOAT, [4, 8])},
        {"y": (onnx_models.FLOAT, [4, 8])},
        {"w0": w[0], "w1": w[1], "b": b},
    )
    rows = [{"x": rng.normal(size=(4, 8)).astype(np.float32)} for _ in range(3)]
    cache = Cache(tmp_path / "cache")
    model = open_model(net, [], cache)
    pair: Any = f"int8+{rest}"
    found = lower(model, pair, cache, calibration=rows)
    ranges = found.details["ranges"]["tensors"]

    def rounded(x: NDArray[Any]) -> NDArray[Any]:
        return x.astype(np.float32).astype(half).astype(np.float64)

    def product(x: NDArray[Any], weight: NDArray[Any], step: float) -> NDArray[Any]:
        steps = np.array([scale_of(float(each), "int8", rest) for each in np.abs(weight).max(axis=0)], np.float64)
        q = np.clip(np.rint(x / step), -128, 127)
        return rounded((q @ np.clip(np.rint(weight / steps), -128, 127)) * steps * step)

    x = rows[0]["x"]
    steps = [float(scale_of(ranges[name]["amax"], "int8", rest)) for name in ("x", "r")]
    relu = np.maximum(rounded(product(x.astype(np.float64), w[0], steps[0]) + rounded(b)), 0)
    last = product(relu, w[1], steps[1])
    expected = rounded(last * last)
    epsilon = float(ml_dtypes.finfo(half).eps)  # type: ignore[no-untyped-call]
    actual = emulation(model, found, pair, cache)({"x": x})["y"]
    np.testing.assert_allclose(actual, expected, rtol=2 * epsilon, atol=1e-6)
    assert np.mean(actual == expected) > 0.9


# Faults


def test_an_overflow_of_the_rest_fails_where_the_quantized_type_alone_passes(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    alone = bench.failed(squared(), "int8", [image(7)], calibration=samples())
    assert bench.error(alone) < 0.05
    pair = bench.failed(squared(), "int8+fp16", [image(7)], calibration=samples())
    assert bench.error(pair) > 0.05
    found = diagnose(pair, bench.cache)
    assert found is not None
    assert found.culprit is not None
    assert (found.culprit.node, found.culprit.kind, found.culprit.part) == ("square", "overflow", "fp16")
    assert found.parts is not None
    int8, fp16 = (found.parts[part] or 0.0 for part in ("int8", "fp16"))
    assert int8 < 0.05 < fp16
    assert found.keep_fp32 is not None
    assert found.confirmed
    assert bench.error(pair, found.keep_fp32) < 0.05


def test_a_range_that_is_too_narrow_is_the_quantized_part_s_fault(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    subject = bench.failed(conv_chain(3), "int8+fp16", [image(7)], calibration=samples())
    assert bench.error(subject) < 0.05
    found = diagnose(bench.requantized(subject, "x2", 0.1), bench.cache)
    assert found is not None
    assert found.culprit is not None
    assert (found.culprit.tensor, found.culprit.kind, found.culprit.part) == ("x2", "saturation", "int8")
    assert found.parts is not None
    int8, fp16 = (found.parts[part] or 0.0 for part in ("int8", "fp16"))
    assert fp16 < 0.05 < int8


# Models that are quantized already


def test_a_model_s_own_qdq_is_kept_and_its_rest_lowered(tmp_path: Path) -> None:
    quantized = onnx.load(lowered(tmp_path, conv_chain(3), "int8").path)
    found = lowered(tmp_path, quantized, "int8+fp16", calibration=None)
    assert set(kinds(found).values()) == {"int8", "fp16"}
    assert any("already carries Q/DQ nodes: they are kept" in note for note in found.notes)
    with pytest.raises(ArgumentError, match=r"exclude: .* brings its Q/DQ nodes with it"):
        lowered(tmp_path, quantized, "int8+fp16", calibration=None, exclude=("conv0",))
    with pytest.raises(NothingComputedError, match="carries its precision already"):
        lowered(tmp_path, quantized, "fp8+fp16", calibration=None)


def test_a_scale_that_the_rest_cannot_hold_stays_fp32(tmp_path: Path) -> None:
    quantized = onnx.load(lowered(tmp_path, conv_chain(1), "int8").path)
    for tensor in quantized.graph.initializer:
        if tensor.name == "image_scale":
            tensor.CopyFrom(numpy_helper.from_array(np.array(1e-9, np.float32), tensor.name))
    found = onnx.load(lowered(tmp_path, quantized, "int8+fp16", calibration=None).path)
    (node,) = [each for each in found.graph.node if each.name == "image_DequantizeLinear"]
    assert node.input[1] == "image_scale"


def test_a_model_that_is_a_pair_is_taken_as_it_is(tmp_path: Path) -> None:
    both = onnx.load(lowered(tmp_path, conv_chain(3), "int8+fp16").path)
    found = lowered(tmp_path, both, "int8+fp16", calibration=None)
    assert found.taken_as_it_is
    half = onnx.load(lowered(tmp_path, conv_chain(3), "fp16").path)
    with pytest.raises(NothingComputedError, match="carries its precision already"):
        lowered(tmp_path, half, "int8+fp16")


# Engines


@pytest.mark.parametrize(
    ("layers", "types", "missing"),
    [
        ({"int8": 3, "fp16": 2}, {"int8", "fp16", "fp32"}, None),
        ({"int8": 3}, {"int8", "fp32"}, None),
        ({"int8": 3, "fp32": 2}, {"int8", "fp32"}, None),
        ({"int8": 3, "fp32": 9}, {"int8", "fp32"}, "fp16"),
        ({"int8": 3, "tf32": 4}, {"int8", "fp32"}, "fp16"),
        ({"fp16": 9}, {"fp16"}, "int8"),
        ({"fp8": 3, "fp16": 9}, {"fp8", "fp16"}, "int8"),
    ],
)
def test_an_engine_shows_both_parts(layers: dict[str, int], types: set[str], missing: str | None) -> None:
    assert unproved(layers, types, "int8+fp16") == missing


def test_the_types_between_layers_are_read() -> None:
    layer = {"Name": "k", "Inputs": [{"Name": "a", "Datatype": "Int8"}], "Outputs": [{"Name": "b", "Datatype": "Half"}]}
    assert tensor_types(json.dumps({"Layers": [layer, "a name alone"]})) == {"int8", "fp16"}


BUILT: list[tuple[str, int]] = [
    ("int8+fp16", 75),
    *((f"int8+{half}", sm) for half in HALVES for sm in (80, 120)),
    *((f"fp8+{half}", 89) for half in HALVES),
]


@pytest.mark.parametrize(("pair", "sm"), BUILT)
def test_tensorrt_rtx_builds_it(tmp_path: Path, pair: Precision, sm: int) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra rtx)", exc_type=ImportError)
    module = find_module("tensorrt_rtx")
    if module.release < (1, 7):
        pytest.skip("INT8 convolutions come with TensorRT-RTX 1.7")
    target = Target(divmod(sm, 10), here=False)
    found = lowered(tmp_path, onnx_models.conv_net(batch=1), pair)
    assert unsupported(module, target, pair, {"Conv", "Gemm"}) is None
    plan = tensorrt.build(module, found.path, tmp_path / "engine.plan", target=target, precision=pair)
    assert plan.bytes > 0


# As a user runs it

PROJECT = """
def data():
    rng = np.random.default_rng(0)
    return [{"image": rng.uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32)} for _ in range(3)]

@trt_parity("conv.onnx", precision=["int8+fp16", "fp8+bf16"], calibration=data(), exclude="conv1")
def test_pair():
    return data()[:1]

@trt_parity("conv.onnx", precision="fp16", exclude="conv1")
def test_excludes_nothing(): ...

@trt_parity("conv.onnx", precision="int8+fp61", calibration=data())
def test_unknown(): ...
"""


def test_pairs_are_parametrized_and_reported(run_everywhere: Any, suite: Suite) -> None:
    suite.write(test_pairs=PROJECT)
    run = run_everywhere()
    run.result.assert_outcomes(passed=2, errors=2)
    check = run.check("test_pair[int8+fp16]")
    assert (check["precision"], check["parity"]["tol"]) == ("int8+fp16", 0.05)
    assert any("named in exclude (1 node)" in note for note in check["notes"])
    assert "expected a precision that quantizes" in run.said
    assert "did you mean 'int8+fp16'?" in run.text


def test_files_without_test_code_take_pairs(suite: Suite) -> None:
    run = suite.run("conv.onnx", "--trt-precision=fp16,int8+fp16")
    assert {check["precision"]: check["verdict"] for check in run.checks} == {"fp16": "pass", "int8+fp16": "error"}
    assert "no calibration data is given" in run.check("int8+fp16")["message"]
