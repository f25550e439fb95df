"""Q/DQ lowering: what is quantized and what is not, and the integer grid exactly as numpy has it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from pytest_trtcheck.errors import ArgumentError, CalibrationError, ModelError
from pytest_trtcheck.model import graph
from pytest_trtcheck.precision.quantization.calibrate import collect
from pytest_trtcheck.precision.quantization.plan import QuantizationPlan, points, summary
from pytest_trtcheck.precision.quantization.quantize import quantize, scale_of
from tests import onnx_models
from tests.onnx_models import FLOAT, save, weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pytest_trtcheck.spec import InputMapping

Dtype = Literal["int8", "fp8"]


def node(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
    """A node named after its output."""
    return helper.make_node(kind, list(inputs), [output], name=output, **attributes)


class OrtRunner:
    def __init__(self, path: Path, extra: Sequence[str] = ()) -> None:
        options = ort.SessionOptions()
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        proto = onnx.load(path)
        for name in extra:
            proto.graph.output.append(helper.make_empty_tensor_value_info(name))
        self.session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def __call__(self, inputs: InputMapping) -> dict[str, NDArray[Any]]:
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, dict(inputs)), strict=True))

    def close(self) -> None:
        self.session = None


def plan_of(proto: onnx.ModelProto, folder: Path, *keep_fp32: str) -> QuantizationPlan:
    return points(graph.read(save(proto, folder / "fp32.onnx")), keep_fp32)


def lowered(
    proto: onnx.ModelProto,
    folder: Path,
    ranges: Mapping[str, float] | float = 4.0,
    dtype: Dtype = "int8",
    keep_fp32: Sequence[str] = (),
) -> Path:
    """`proto` quantized, checked and written."""
    model = graph.read(save(proto, folder / "fp32.onnx"))
    plan = points(model, keep_fp32)
    if isinstance(ranges, float):
        ranges = dict.fromkeys(plan.tensors, ranges)
    path = folder / f"{dtype}.onnx"
    graph.write(quantize(model, plan, ranges, dtype), path)
    onnx.checker.check_model(path, full_check=True)
    return path


def nodes_of(path: Path, *kinds: str) -> list[onnx.NodeProto]:
    return [each for each in onnx.load(path).graph.node if each.op_type in kinds]


def initializers(path: Path) -> dict[str, NDArray[Any]]:
    return {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}


def is_quantized(path: Path, name: str, index: int) -> bool:
    """Whether operand `index` of the node comes out of a DequantizeLinear."""
    nodes = onnx.load(path).graph.node
    operand = next(each for each in nodes if each.name == name).input[index]
    return any(operand in each.output for each in nodes if each.op_type == "DequantizeLinear")


def numpy_qdq(array: NDArray[Any], scale: Any, dtype: Dtype) -> NDArray[np.float32]:
    """Quantize and dequantize as the ONNX standard says: a table of the grid, the nearest entry, ties to even codes."""
    if dtype == "int8":
        table = np.arange(-128, 128, dtype=np.float64)
        even = np.arange(-128, 128) % 2 == 0
    else:
        codes = np.arange(256, dtype=np.uint8)
        values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        # Of ±0 one is enough.
        kept = np.isfinite(values) & (codes != 128)
        order = np.argsort(values[kept])
        table, even = values[kept][order], (codes[kept][order] % 2 == 0)
    steps = np.clip(
        (np.asarray(array, np.float32) / np.asarray(scale, np.float32)).astype(np.float64), table[0], table[-1]
    )
    high = np.searchsorted(table, steps).clip(1, len(table) - 1)
    low = high - 1
    to_low, to_high = steps - table[low], table[high] - steps
    nearest = np.where((to_low < to_high) | ((to_low == to_high) & even[low]), low, high)
    return table[nearest].astype(np.float32) * np.asarray(scale, np.float32)


# --- the grid --------------------------------------------------------------------------------------------------------


def gemm(weight: NDArray[np.float32], opset: int = 17, **attributes: Any) -> onnx.ModelProto:
    rows, columns = weight.shape[::-1] if attributes.get("transB") else weight.shape
    bias = weights((columns,), 9)
    return onnx_models.model(
        [node("Gemm", ["x", "w", "b"], "y", **attributes)],
        {"x": (FLOAT, ["n", rows])},
        {"y": (FLOAT, ["n", columns])},
        {"w": weight, "b": bias},
        opset,
    )


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("amax", [127 * 0.5, 448 * 0.25, 3.7, 1e-3])
def test_activations_lie_on_the_grid_exactly(tmp_path: Path, dtype: Dtype, amax: float) -> None:
    path = lowered(gemm(weights((8, 3))), tmp_path, amax, dtype)
    scale = np.float32(amax / (127 if dtype == "int8" else 448))
    assert scale_of(amax, dtype) == scale
    # Halves of steps (ties), both ends of the range and beyond, infinities, zeros, subnormals, and random values.
    ties = (np.arange(-300, 300, dtype=np.float32) / 2) * scale
    ends = np.array([amax, np.nextafter(np.float32(amax), np.float32(np.inf)), 1e30, np.inf, 0.0, 1e-42], np.float32)
    random = np.random.default_rng(0).normal(size=4084).astype(np.float32) * np.float32(amax)
    x = np.concatenate([ties, ends, -ends, random])
    x = x[: x.size // 8 * 8].reshape(-1, 8)
    (dequantize,) = [each for each in nodes_of(path, "DequantizeLinear") if each.name.startswith("x_")]
    found = OrtRunner(path, [dequantize.output[0]])({"x": x})[dequantize.output[0]]
    np.testing.assert_array_equal(found, numpy_qdq(x, scale, dtype))
    top = 127 if dtype == "int8" else 448
    assert found.max() == top * scale
    assert found.min() == (-128 if dtype == "int8" else -448) * scale


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_weights_are_quantized_per_output_channel_exactly(tmp_path: Path, dtype: Dtype) -> None:
    weight = weights((64, 33), 1) * np.logspace(-3, 3, 33, dtype=np.float32)
    weight[:, 5] = 0
    path = lowered(gemm(weight), tmp_path, dtype=dtype)
    (dequantize,) = [each for each in nodes_of(path, "DequantizeLinear") if each.name.startswith("w_")]
    found = OrtRunner(path, [dequantize.output[0]])({"x": np.zeros((1, 64), np.float32)})[dequantize.output[0]]
    amax = np.abs(weight).max(axis=0)
    scale = np.where(amax > 0, amax / (127 if dtype == "int8" else 448), 1).astype(np.float32)
    np.testing.assert_array_equal(found, numpy_qdq(weight, scale, dtype))
    stored = initializers(path)
    assert (stored["w_scale"] == scale).all()
    assert stored["w_quantized"].dtype.itemsize == 1
    if dtype == "int8":
        assert np.abs(stored["w_quantized"].astype(int)).max() == 127


def test_the_whole_product_is_that_of_the_grid(tmp_path: Path) -> None:
    weight, x = weights((64, 16), 2), np.random.default_rng(3).normal(size=(5, 64)).astype(np.float32)
    path = lowered(gemm(weight), tmp_path, 2.0)
    found = OrtRunner(path)({"x": x})["y"]
    w_scale = (np.abs(weight).max(axis=0) / 127).astype(np.float32)
    on_grid = numpy_qdq(x, np.float32(2 / 127), "int8").astype(np.float64) @ numpy_qdq(weight, w_scale, "int8")
    np.testing.assert_allclose(found, on_grid + weights((16,), 9), rtol=1e-4, atol=1e-5)
    assert not np.allclose(found, x @ weight + weights((16,), 9), rtol=1e-4, atol=1e-5)


def test_per_tensor_weights_would_be_noticed(tmp_path: Path) -> None:
    """The planted fault: one scale for a weight whose channels differ by 10⁴ leaves the small ones nothing."""
    weight = weights((64, 8), 4) * np.logspace(-4, 0, 8, dtype=np.float32)
    x = np.random.default_rng(5).uniform(-1, 1, (256, 64)).astype(np.float32)
    expected = x @ weight

    def worst_channel(product: NDArray[np.float32]) -> float:
        return float((np.linalg.norm(product - expected, axis=0) / np.linalg.norm(expected, axis=0)).max())

    per_channel = OrtRunner(lowered(gemm(weight), tmp_path, 1.0))({"x": x})["y"] - weights((8,), 9)
    per_tensor = x @ numpy_qdq(weight, np.float32(np.abs(weight).max() / 127), "int8")
    assert worst_channel(per_channel) < 0.02
    assert worst_channel(per_tensor) > 0.9


def test_bad_ranges_are_noticed(tmp_path: Path) -> None:
    """The planted fault: ranges ten times too small saturate, ten times too large lose resolution."""
    proto = onnx_models.conv_net(1)
    path = save(proto, tmp_path / "fp32.onnx")
    image = np.random.default_rng(0).normal(size=(1, 3, 16, 16)).astype(np.float32)
    found = collect(OrtRunner, path, plan_of(proto, tmp_path), [{"image": image}]).amax()
    expected = OrtRunner(path)({"image": image})["logits"]

    def error(factor: float) -> float:
        ranges = {name: amax * factor for name, amax in found.items()}
        logits = OrtRunner(lowered(proto, tmp_path, ranges))({"image": image})["logits"]
        return float(np.abs(logits - expected).max() / np.abs(expected).max())

    right = error(1)
    assert right < 0.02
    assert error(0.1) > 10 * right
    assert error(10) > 2 * right


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_a_range_of_zero_or_almost_zero_has_a_scale_that_tensorrt_takes(tmp_path: Path, dtype: Dtype) -> None:
    assert scale_of(0, dtype) == 1
    smallest = scale_of(1e-42, dtype)
    assert smallest >= np.finfo(np.float32).tiny
    path = lowered(gemm(weights((8, 3))), tmp_path, 0.0, dtype)
    assert initializers(path)["x_scale"] == 1
    y = OrtRunner(path)({"x": np.zeros((2, 8), np.float32)})["y"]
    np.testing.assert_array_equal(y, np.tile(weights((3,), 9), (2, 1)))


# --- what is quantized -----------------------------------------------------------------------------------------------


OPERATORS = {
    "conv": ("Conv", (16, 8, 3, 3), (1, 8, 9, 9), {}, 0),
    "conv1d": ("Conv", (16, 8, 3), (1, 8, 9), {}, 0),
    "depthwise": ("Conv", (8, 1, 3, 3), (1, 8, 9, 9), {"group": 8}, 0),
    "conv_transpose": ("ConvTranspose", (8, 16, 3, 3), (1, 8, 9, 9), {}, 1),
    "gemm": ("Gemm", (8, 16), (4, 8), {}, 1),
    "gemm_trans_b": ("Gemm", (16, 8), (4, 8), {"transB": 1}, 0),
    "matmul": ("MatMul", (8, 16), (2, 4, 8), {}, 1),
    "batched_matmul": ("MatMul", (2, 8, 16), (2, 4, 8), {}, 2),
}


def operator_model(name: str, opset: int = 17) -> onnx.ModelProto:
    kind, shape, x_shape, attributes, _ = OPERATORS[name]
    bias = {} if kind == "MatMul" else {"b": weights((16,) if name != "depthwise" else (8,), 1)}
    return onnx_models.model(
        [node(kind, ["x", "w", *bias], "y", **attributes)],
        {"x": (FLOAT, x_shape)},
        {"y": (FLOAT, ["?"] * len(x_shape))},
        {"w": weights(shape), **bias},
        opset,
    )


@pytest.mark.parametrize("name", list(OPERATORS))
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_every_operator_is_quantized_along_its_output_channels(tmp_path: Path, name: str, dtype: Dtype) -> None:
    _, shape, x_shape, _, axis = OPERATORS[name]
    proto = operator_model(name)
    path = lowered(proto, tmp_path, dtype=dtype)
    assert [is_quantized(path, "y", index) for index in (0, 1)] == [True, True]
    assert len(nodes_of(path, "QuantizeLinear")) == 1, "the activation alone; the weight is stored quantized"
    assert len(nodes_of(path, "DequantizeLinear")) == 2, "none on the bias"
    assert initializers(path)["w_scale"].shape == (shape[axis],)
    x = np.random.default_rng(0).uniform(-4, 4, x_shape).astype(np.float32)
    expected, found = (OrtRunner(each)({"x": x})["y"] for each in (save(proto, tmp_path / "fp32.onnx"), path))
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < (0.02 if dtype == "int8" else 0.05)


def test_a_constant_on_the_left_of_a_product_is_its_weight(tmp_path: Path) -> None:
    proto = onnx_models.model(
        [node("MatMul", ["w", "x"], "y")], {"x": (FLOAT, [8, 4])}, {"y": (FLOAT, [16, 4])}, {"w": weights((16, 8))}
    )
    path = lowered(proto, tmp_path)
    assert initializers(path)["w_scale"].shape == (16,)
    assert is_quantized(path, "y", 0)
    assert is_quantized(path, "y", 1)


def test_what_cannot_be_quantized_stays_float_with_its_reason(tmp_path: Path) -> None:
    proto = onnx_models.model(
        [
            node("MatMul", ["x", "w"], "query"),
            node("Transpose", ["query"], "key", perm=[1, 0]),
            node("MatMul", ["query", "key"], "attention"),
            node("Softmax", ["attention"], "softmax"),
            node("MatMul", ["softmax", "vector"], "dot"),
            node("Exp", ["w"], "computed"),
            node("MatMul", ["query", "computed"], "hyper"),
            node("MatMul", ["w", "w"], "constant"),
            node("Add", ["hyper", "constant"], "y"),
        ],
        {"x": (FLOAT, [8, 8])},
        {"y": (FLOAT, [8, 8]), "dot": (FLOAT, [8])},
        {"w": weights((8, 8)), "vector": weights((8,))},
    )
    plan = plan_of(proto, tmp_path)
    assert plan.tensors == ("x",)
    assert dict(plan.left_float) == {
        "attention": "its weight is computed in the graph",
        "dot": "its weight has no output channels",
        "hyper": "its weight is computed in the graph",
        "constant": "both operands are constants",
    }
    assert summary(plan).startswith("1 node quantized; left float: its weight is computed in the graph (2 nodes)")
    path = lowered(proto, tmp_path)
    assert len(nodes_of(path, "QuantizeLinear")) == 1
    assert initializers(path)["w"].dtype == np.float32, "Exp still reads it"


def test_control_flow_stays_float(tmp_path: Path) -> None:
    branches = {
        f"{which}_branch": helper.make_graph(
            [node("MatMul", ["hidden", "w"], which)], which, [], [helper.make_tensor_value_info(which, FLOAT, [4, 8])]
        )
        for which in ("then", "else")
    }
    proto = onnx_models.model(
        [node("MatMul", ["x", "w"], "hidden"), helper.make_node("If", ["which"], ["y"], name="if", **branches)],
        {"x": (FLOAT, [4, 8]), "which": (TensorProto.BOOL, [])},
        {"y": (FLOAT, [4, 8])},
        {"w": weights((8, 8))},
        opset=11,
    )
    plan = plan_of(proto, tmp_path)
    assert dict(plan.left_float) == dict.fromkeys(("then", "else"), "inside If, Loop or Scan")
    path = lowered(proto, tmp_path)
    assert is_quantized(path, "hidden", 0)
    assert {"w", "w_quantized"} <= set(initializers(path)), "the branches still read the FP32 weight"


def test_one_pair_serves_all_readers_and_one_weight_all_its_products(tmp_path: Path) -> None:
    proto = onnx_models.model(
        [
            node("Gather", ["table", "ids"], "embedded"),
            node("Gemm", ["embedded", "shared"], "a"),
            node("Gemm", ["embedded", "shared"], "b"),
            node("Gemm", ["embedded", "table"], "logits", transB=1),
        ],
        {"ids": (TensorProto.INT64, [4])},
        {"a": (FLOAT, [4, 5]), "b": (FLOAT, [4, 5]), "logits": (FLOAT, [4, 20])},
        {"table": weights((20, 8)), "shared": weights((8, 5))},
    )
    plan = plan_of(proto, tmp_path)
    assert plan.tensors == ("embedded",)
    assert plan.readers("embedded") == ("a", "b", "logits")
    path = lowered(proto, tmp_path)
    assert len(nodes_of(path, "QuantizeLinear")) == 1
    assert len(nodes_of(path, "DequantizeLinear")) == 3
    stored = initializers(path)
    assert stored["table"].dtype == np.float32, "Gather reads FP32"
    assert stored["table_quantized"].dtype == np.int8
    assert "shared" not in stored, "nobody reads the FP32 twin any more"


def test_weights_behind_layout_operators_are_quantized_in_their_final_layout(tmp_path: Path) -> None:
    weight = weights((16, 8)).astype(np.float16)
    proto = onnx_models.model(
        [
            node("Cast", ["stored"], "wide", to=FLOAT),
            node("Transpose", ["wide"], "turned", perm=[1, 0]),
            node("MatMul", ["x", "turned"], "hidden"),
            node("Reshape", ["kernel", "shape"], "folded"),
            node("Conv", ["hidden", "folded"], "y"),
        ],
        {"x": (FLOAT, [1, 4, 8])},
        {"y": (FLOAT, [1, 6, 14])},
        {"stored": weight, "kernel": weights((6, 12)), "shape": np.array([6, 4, -1])},
    )
    path = lowered(proto, tmp_path, {"x": 4.0, "hidden": 40.0})
    assert {each.op_type for each in onnx.load(path).graph.node} == {
        "QuantizeLinear",
        "DequantizeLinear",
        "MatMul",
        "Conv",
    }
    stored = initializers(path)
    expected = np.abs(weight.astype(np.float32)).max(axis=1) / np.float32(127)
    np.testing.assert_allclose(stored["turned_scale"], expected, rtol=1e-6)
    assert stored["turned_quantized"].shape == (8, 16)
    assert stored["folded_quantized"].shape == (6, 4, 3)
    assert not {"stored", "kernel"} & set(stored)
    x = np.random.default_rng(0).uniform(-4, 4, (1, 4, 8)).astype(np.float32)
    expected, found = (OrtRunner(each)({"x": x})["y"] for each in (tmp_path / "fp32.onnx", path))
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.05


# --- residual sums ---------------------------------------------------------------------------------------------------


def block(body: Sequence[onnx.NodeProto], shortcut: Sequence[onnx.NodeProto], add: Sequence[str]) -> onnx.ModelProto:
    constants = {f"w{index}": weights((4, 4, 1, 1), index) for index in range(4)}
    statistics = {name: np.ones(4, np.float32) for name in ("scale", "shift", "mean", "variance")}
    return onnx_models.model(
        [node("Relu", ["x"], "stem"), *body, *shortcut, node("Add", add, "sum"), node("Relu", ["sum"], "y")],
        {"x": (FLOAT, [1, 4, 6, 6])},
        {"y": (FLOAT, [1, 4, 6, 6])},
        {**constants, **statistics, "bias": weights((1, 4, 1, 1))},
    )


BODY = [node("Conv", ["stem", "w0"], "c0"), node("Relu", ["c0"], "r0"), node("Conv", ["r0", "w1"], "c1")]
NORMALIZED = [*BODY, node("BatchNormalization", ["c1", "scale", "shift", "mean", "variance"], "n1")]


@pytest.mark.parametrize(
    ("body", "shortcut", "add", "quantized"),
    [
        pytest.param(BODY, [], ["c1", "stem"], [False, True], id="identity"),
        pytest.param(BODY, [], ["stem", "c1"], [True, False], id="identity first"),
        pytest.param(NORMALIZED, [], ["n1", "stem"], [False, True], id="batch normalization folds"),
        pytest.param([*BODY, node("Add", ["c1", "bias"], "s1")], [], ["s1", "stem"], [False, True], id="bias folds"),
        pytest.param(BODY, [node("Conv", ["stem", "w2"], "d")], ["c1", "d"], [False, True], id="downsampling"),
        pytest.param(BODY, [node("Conv", ["stem", "w2"], "d")], ["d", "c1"], [True, False], id="downsampling first"),
        pytest.param([*BODY, node("Relu", ["c1"], "r1")], [], ["r1", "stem"], [False, False], id="relu ends fusion"),
        pytest.param(BODY[:2], [], ["r0", "stem"], [False, False], id="no convolution"),
        pytest.param(BODY, [], ["c1", "bias"], [False, False], id="a bias is no residual"),
        pytest.param(BODY, [], ["c1", "c1"], [False, False], id="doubling"),
        pytest.param([*BODY, node("Sigmoid", ["c1"], "g")], [], ["c1", "g"], [False, False], id="read twice"),
        pytest.param(
            BODY,
            [node("GlobalAveragePool", ["stem"], "p")],
            ["c1", "p"],
            [False, False],
            id="a broadcast is no residual",
        ),
    ],
)
def test_only_the_residual_of_a_sum_that_fuses_is_quantized(
    tmp_path: Path,
    body: list[onnx.NodeProto],
    shortcut: list[onnx.NodeProto],
    add: list[str],
    quantized: list[bool],
) -> None:
    path = lowered(block(body, shortcut, add), tmp_path)
    assert [is_quantized(path, "sum", index) for index in (0, 1)] == quantized


def test_a_sum_kept_in_fp32_or_after_a_convolution_kept_in_fp32_is_left_alone(tmp_path: Path) -> None:
    proto = block(BODY, [], ["c1", "stem"])
    for kept in ("sum", "c1"):
        path = lowered(proto, tmp_path, keep_fp32=[kept])
        assert not is_quantized(path, "sum", 1)
    assert is_quantized(lowered(proto, tmp_path, keep_fp32=["c0"]), "sum", 1)


def test_one_weight_of_two_axes_is_quantized_along_each(tmp_path: Path) -> None:
    # Rows of very different size: along the wrong axis most of them would be lost.
    square = (weights((4, 4), 5) * np.logspace(-3, 0, 4, dtype=np.float32)[:, None]).astype(np.float32)
    proto = onnx_models.model(
        [node("MatMul", ["x", "w"], "columns"), node("Gemm", ["x", "w"], "rows", transB=1)],
        {"x": (FLOAT, [3, 4])},
        {"columns": (FLOAT, [3, 4]), "rows": (FLOAT, [3, 4])},
        {"w": square},
    )
    path = lowered(proto, tmp_path)
    scales = {name: array.shape for name, array in initializers(path).items() if "scale" in name and array.ndim}
    assert len(scales) == 2
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    found = OrtRunner(path)({"x": x})
    on_grid = numpy_qdq(x, np.float32(4 / 127), "int8").astype(np.float64)
    by_column = numpy_qdq(square, (np.abs(square).max(axis=0) / 127).astype(np.float32), "int8")
    by_row = numpy_qdq(square, (np.abs(square).max(axis=1, keepdims=True) / 127).astype(np.float32), "int8")
    np.testing.assert_allclose(found["columns"], on_grid @ by_column, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["rows"], on_grid @ by_row.T, rtol=1e-4, atol=1e-9)


def test_a_residual_of_unknown_rank_is_one_all_the_same(tmp_path: Path) -> None:
    nodes = [*BODY, node("Reshape", ["stem", "shape"], "residual"), node("Add", ["c1", "residual"], "sum")]
    proto = onnx_models.model(
        nodes,
        {"stem": (FLOAT, [1, 4, 8, 8]), "shape": (TensorProto.INT64, ["rank"])},
        {"sum": (FLOAT, [1, 4, 8, 8])},
        {"w0": weights((4, 4, 1, 1), 1), "w1": weights((4, 4, 1, 1), 2)},
    )
    path = lowered(proto, tmp_path)
    assert [is_quantized(path, "sum", index) for index in (0, 1)] == [False, True]


@pytest.mark.parametrize(
    ("stem", "skip", "quantized"),
    [
        pytest.param(["n", 4, 8, 8], [1, 4, 8, 8], True, id="a size that may be the same"),
        pytest.param(["n", 4, 8, 8], ["m", 4, 8, 8], True, id="a name that may be the same"),
        pytest.param([1, 4, 300, 1], [1, 4, 300, 1], True, id="the same size, a large one"),
        pytest.param([1, 4, 8, 8], [1, 4, 8, 1], False, id="broadcast"),
        pytest.param([1, 4, 8, 8], [8, 8], False, id="broadcast by rank"),
        pytest.param([1, 4, 8, 8], [1], False, id="broadcast by rank, sizes alike as far as they go"),
    ],
)
def test_a_residual_has_the_shape_of_the_sum(
    tmp_path: Path, stem: list[int | str], skip: list[int | str], quantized: bool
) -> None:
    proto = onnx_models.model(
        [*BODY, node("Neg", ["skip"], "residual"), node("Add", ["c1", "residual"], "sum")],
        {"stem": (FLOAT, stem), "skip": (FLOAT, skip)},
        {"sum": (FLOAT, stem)},
        {"w0": weights((4, 4, 1, 1), 1), "w1": weights((4, 4, 1, 1), 2)},
    )
    assert [is_quantized(lowered(proto, tmp_path), "sum", index) for index in (0, 1)] == [False, quantized]


@pytest.mark.parametrize("kind", ["Mul", "Sub", "Max"])
def test_what_is_no_sum_has_no_residual(tmp_path: Path, kind: str) -> None:
    shape = [1, 4, 8, 8]
    proto = onnx_models.model(
        [*BODY, node(kind, ["c1", "skip"], "sum")],
        {"stem": (FLOAT, shape), "skip": (FLOAT, shape)},
        {"sum": (FLOAT, shape)},
        {"w0": weights((4, 4, 1, 1), 1), "w1": weights((4, 4, 1, 1), 2)},
    )
    assert plan_of(proto, tmp_path).tensors == ("stem", "r0")


@pytest.mark.parametrize("operands", [["c1", "constant"], ["constant", "c1"]])
def test_a_constant_of_the_sums_own_shape_is_no_residual(tmp_path: Path, operands: list[str]) -> None:
    shape = [1, 4, 8, 8]
    proto = onnx_models.model(
        [*BODY, node("Add", operands, "sum")],
        {"stem": (FLOAT, shape)},
        {"sum": (FLOAT, shape)},
        {"w0": weights((4, 4, 1, 1), 1), "w1": weights((4, 4, 1, 1), 2), "constant": weights(shape, 3)},
    )
    assert plan_of(proto, tmp_path).tensors == ("stem", "r0")


def test_a_residual_may_be_an_input_of_the_model(tmp_path: Path) -> None:
    shape = [1, 4, 8, 8]
    proto = onnx_models.model(
        [*BODY, node("Add", ["skip", "c1"], "sum")],
        {"stem": (FLOAT, shape), "skip": (FLOAT, shape)},
        {"sum": (FLOAT, shape)},
        {"w0": weights((4, 4, 1, 1), 1), "w1": weights((4, 4, 1, 1), 2)},
    )
    assert [is_quantized(lowered(proto, tmp_path), "sum", index) for index in (0, 1)] == [True, False]


@pytest.mark.parametrize("rank", [3, 4, 5])
@pytest.mark.parametrize(("kind", "axis"), [("Conv", 0), ("ConvTranspose", 1)])
def test_convolutions_of_any_rank_are_quantized(tmp_path: Path, kind: str, axis: int, rank: int) -> None:
    spatial = [4] * (rank - 2)
    proto = onnx_models.model(
        [node(kind, ["x", "w"], "y")],
        {"x": (FLOAT, [1, 2, *spatial])},
        {"y": (FLOAT, [1, 2, *spatial])},
        {"w": weights((2, 2, *[1] * (rank - 2)))},
    )
    assert [(point.tensor, point.axis) for point in plan_of(proto, tmp_path).weights] == [("w", axis)]


def test_a_weight_without_elements_and_one_of_a_single_element(tmp_path: Path) -> None:
    proto = onnx_models.model(
        [node("MatMul", ["x", "nothing"], "empty"), node("MatMul", ["x", "one"], "y")],
        {"x": (FLOAT, [3, 1])},
        {"y": (FLOAT, [3, 1]), "empty": (FLOAT, [3, 0])},
        {"nothing": np.zeros((1, 0), np.float32), "one": np.array([[2.0]], np.float32)},
    )
    plan = plan_of(proto, tmp_path)
    assert [point.node for point in plan.weights] == ["y"]
    assert dict(plan.left_float) == {"empty": "its weight has no output channels"}


# --- keep_fp32, and models that cannot be ----------------------------------------------------------------------------


def test_kept_nodes_have_no_qdq_on_any_operand(tmp_path: Path) -> None:
    proto = onnx_models.conv_net()
    plan = plan_of(proto, tmp_path, "conv*", "add")
    assert plan.tensors == ("f1",)
    assert dict(plan.left_float) == dict.fromkeys(("conv1", "conv2"), "named in keep_fp32")
    path = lowered(proto, tmp_path, keep_fp32=["conv*"])
    assert not any(is_quantized(path, name, index) for name in ("conv1", "conv2") for index in (0, 1))
    assert is_quantized(path, "gemm", 0)
    with pytest.raises(ArgumentError, match=r"keep_fp32: no node is called 'convv1'\n.*conv1"):
        plan_of(proto, tmp_path, "convv1")


def test_a_model_with_nothing_to_quantize_is_an_error(tmp_path: Path) -> None:
    relu = onnx_models.elementwise([node("Relu", ["x"], "y")], 4)
    with pytest.raises(ModelError, match="nothing to quantize: the model has no Conv, ConvTranspose, Gemm or MatMul"):
        plan_of(relu, tmp_path)
    with pytest.raises(ModelError, match=r"every node that could be is left out\n.*gemm: named in keep_fp32"):
        plan_of(onnx_models.gemm_net(), tmp_path, "*")
    half = onnx_models.model(
        [node("MatMul", ["x", "w"], "y")],
        {"x": (TensorProto.FLOAT16, [4, 8])},
        {"y": (TensorProto.FLOAT16, [4, 3])},
        {"w": weights((8, 3)).astype(np.float16)},
    )
    with pytest.raises(ModelError, match="y: its weight is FLOAT16, not FLOAT"):
        plan_of(half, tmp_path)


def test_what_the_model_quantizes_itself_is_left_as_it_is(tmp_path: Path) -> None:
    once = lowered(onnx_models.conv_net(1), tmp_path, keep_fp32=["gemm"])
    again = points(graph.read(once))
    assert again.tensors == ("f1",)
    assert {reason for _, reason in again.left_float} == {"already quantized in the model"}
    with pytest.raises(ModelError, match="conv1: already quantized"):
        points(graph.read(once), ["gemm"])


def test_ranges_and_weights_that_no_scale_fits_are_named(tmp_path: Path) -> None:
    proto = onnx_models.conv_net(1)
    with pytest.raises(CalibrationError, match="no calibrated range for 2 of 3 tensors: r1, f1"):
        lowered(proto, tmp_path, {"image": 1.0})
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(CalibrationError, match=r"tensor 'r1': .* is no range"):
            lowered(proto, tmp_path, {"image": 1.0, "r1": bad, "f1": 1.0})
    for value in (np.nan, np.inf, -np.inf):
        weight = weights((8, 3))
        weight[4, 1] = value
        with pytest.raises(ModelError, match="weight 'w' of node 'y' holds NaN or infinity"):
            lowered(gemm(weight), tmp_path)


# --- opsets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "opset", "expected"), [("int8", 11, 13), ("int8", 17, 17), ("fp8", 13, 19)])
def test_the_opset_is_raised_as_far_as_needed_and_the_model_means_the_same(
    tmp_path: Path, dtype: Dtype, opset: int, expected: int
) -> None:
    # Softmax in opset 11 flattens from axis 1 on; in 13 it works along one axis.
    proto = onnx_models.model(
        [
            node("MatMul", ["x", "w"], "hidden"),
            node("Softmax", ["hidden"], "softmax"),
            node("ReduceSum", ["softmax"], "y", axes=[1], keepdims=0)
            if opset < 13
            else node("ReduceSum", ["softmax", "axes"], "y", keepdims=0),
        ],
        {"x": (FLOAT, [2, 4, 8])},
        {"y": (FLOAT, [2, 6])},
        {"w": weights((8, 6), 1), **({"axes": np.array([1])} if opset >= 13 else {})},
        opset,
    )
    path = lowered(proto, tmp_path, dtype=dtype)
    model = onnx.load(path)
    assert [each.version for each in model.opset_import] == [expected]
    assert dtype == "int8" or model.ir_version >= 9
    x = np.random.default_rng(0).uniform(-4, 4, (2, 4, 8)).astype(np.float32)
    fp32, found = (OrtRunner(each)({"x": x})["y"] for each in (tmp_path / "fp32.onnx", path))
    np.testing.assert_allclose(found, fp32, atol=0.05 if dtype == "int8" else 0.1)


@pytest.mark.parametrize(("dtype", "ir_version"), [("int8", 8), ("fp8", 9)])
def test_fp8_raises_the_version_of_the_file(tmp_path: Path, dtype: Dtype, ir_version: int) -> None:
    proto = gemm(weights((8, 3)))
    proto.ir_version = 8
    assert onnx.load(lowered(proto, tmp_path, dtype=dtype)).ir_version == ir_version


def test_names_that_are_taken_are_avoided(tmp_path: Path) -> None:
    proto = onnx_models.model(
        [
            helper.make_node("Relu", ["x"], ["x_scale"], name="x_QuantizeLinear"),
            helper.make_node("Gemm", ["x", "w"], ["x_QuantizeLinear_output"], name="w_DequantizeLinear"),
            helper.make_node("Add", ["x_QuantizeLinear_output", "w_scale"], ["y"], name="int8_zero_point"),
            *(helper.make_node("Relu", ["x"], [f"x_scale_{n}"], name=f"relu_{n}") for n in (1, 2, 3)),
        ],
        {"x": (FLOAT, [2, 4])},
        {
            "y": (FLOAT, [2, 4]),
            **{name: (FLOAT, [2, 4]) for name in ("x_scale", "x_scale_1", "x_scale_2", "x_scale_3")},
        },
        {"w": weights((4, 4)), "w_scale": weights((2, 4))},
    )
    x = np.random.default_rng(0).uniform(-4, 4, (2, 4)).astype(np.float32)
    expected, found = (
        OrtRunner(each)({"x": x}) for each in (save(proto, tmp_path / "fp32.onnx"), lowered(proto, tmp_path))
    )
    np.testing.assert_array_equal(found["x_scale"], expected["x_scale"])
    np.testing.assert_allclose(found["y"], expected["y"], atol=0.2)


# --- real models, and TensorRT itself --------------------------------------------------------------------------------


def rtx_errors(path: Path, capability: str) -> list[str]:
    """What TensorRT-RTX has against building the model for a compute capability; it needs no GPU to say so."""
    trt = importlib.import_module("tensorrt_rtx")

    class Collector(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

    logger = Collector()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        return logger.errors
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if any(dim < 0 for dim in tensor.shape):
            shape = {2: (1, 2048), 4: (1, 3, 320, 320)}[len(tensor.shape)]
            profile.set_shape(tensor.name, shape, shape, shape)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    return logger.errors if engine is None else []


@pytest.mark.parametrize(("dtype", "capability"), [("int8", "SM80"), ("fp8", "SM89")])
def test_tensorrt_takes_every_operator(tmp_path: Path, dtype: Dtype, capability: str) -> None:
    pytest.importorskip("tensorrt_rtx", minversion="1.7")
    for name in OPERATORS:
        assert rtx_errors(lowered(operator_model(name), tmp_path, dtype=dtype), capability) == [], name
    normalized = block(NORMALIZED, [node("Conv", ["stem", "w2"], "d")], ["n1", "d"])
    assert rtx_errors(lowered(normalized, tmp_path, dtype=dtype), capability) == []


def test_tensorrt_refuses_what_it_does_not_take(tmp_path: Path) -> None:
    """The check above can fail: an asymmetric zero point is not TensorRT's."""
    pytest.importorskip("tensorrt_rtx", minversion="1.7")
    path = lowered(onnx_models.conv_net(1), tmp_path)
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if tensor.name == "int8_zero_point":
            tensor.CopyFrom(numpy_helper.from_array(np.array(3, np.int8), tensor.name))
    assert rtx_errors(save(proto, tmp_path / "asymmetric.onnx"), "SM80")


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_nudenet_calibrated_computes_almost_the_same_and_builds(tmp_path: Path, dtype: Dtype) -> None:
    path = onnx_models.nudenet()
    rng = np.random.default_rng(0)
    # Smooth images with edges: noise alone is nothing that a detector responds to.
    coarse = rng.random((2, 3, 10, 10), dtype=np.float32)
    images = np.kron(coarse, np.ones((32, 32), np.float32))[:, None]
    model = graph.read(path)
    plan = points(model)
    assert len(plan.weights) == 64
    assert plan.left_float == ()
    ranges = collect(OrtRunner, path, plan, [{"images": image} for image in images])
    small = tmp_path / "small.onnx"
    graph.write(quantize(model, plan, ranges.amax(), dtype), small)
    assert small.stat().st_size < 0.3 * path.stat().st_size
    expected, found = (OrtRunner(each)({"images": images[0]})["output0"] for each in (path, small))
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.05
    pytest.importorskip("tensorrt_rtx", minversion="1.7")
    assert rtx_errors(small, "SM80" if dtype == "int8" else "SM89") == []


def test_magika_is_quantized_and_builds(tmp_path: Path) -> None:
    path = onnx_models.magika()
    model = graph.read(path)
    plan = points(model)
    assert len(plan.weights) == 3
    rng = np.random.default_rng(0)
    samples = [{"bytes": rng.integers(0, 257, (1, 2048)).astype(np.int32)} for _ in range(3)]
    ranges = collect(OrtRunner, path, plan, samples, method="entropy")
    small = tmp_path / "small.onnx"
    graph.write(quantize(model, plan, ranges.amax(), "int8"), small)
    expected, found = (OrtRunner(each)(samples[0])["target_label"] for each in (path, small))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 0.2
    pytest.importorskip("tensorrt_rtx", minversion="1.7")
    assert rtx_errors(small, "SM80") == []
