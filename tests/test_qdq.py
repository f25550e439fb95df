"""The emulated integer grid against a numpy model of Q/DQ, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from pytest_trtcheck.model import graph
from pytest_trtcheck.model.ort_runner import OrtRunner
from pytest_trtcheck.precision.emulation import rewrite
from tests import onnx_models

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

Array = "NDArray[Any]"
SHAPE = (2, 3, 5)
GRIDS = {
    "int8": (TensorProto.INT8, np.int8),
    "uint8": (TensorProto.UINT8, np.uint8),
    "int16": (TensorProto.INT16, np.int16),
    "fp8": (TensorProto.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn),
}


def expected(x: NDArray[Any], scale: NDArray[Any], zero: NDArray[Any], axis: int) -> NDArray[Any]:
    """ONNX's definition, in numpy's own FP32 arithmetic."""
    if scale.ndim:
        shape = [1] * x.ndim
        shape[axis] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    if zero.dtype == ml_dtypes.float8_e4m3fn:
        return np.asarray(np.clip(x / scale, -448, 448).astype(zero.dtype).astype(np.float32) * scale)
    info = np.iinfo(zero.dtype)
    q = np.clip(np.round(x / scale) + zero.astype(np.float32), info.min, info.max)
    return np.asarray((q - zero.astype(np.float32)) * scale, np.float32)


@pytest.fixture(scope="module", params=[(grid, axis) for grid in GRIDS for axis in (None, 0, 1, 2, -1)], ids=str)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[OrtRunner, Callable[..., Any]]:
    grid, axis = request.param
    dtype = GRIDS[grid][1]
    rng = np.random.default_rng(0)
    shape = () if axis is None else (SHAPE[axis],)
    scale = np.asarray(rng.uniform(0.01, 0.1, shape), np.float32)
    zero = np.zeros(shape, dtype) if grid in {"fp8", "int16"} else np.asarray(rng.integers(0, 100, shape), dtype)
    attributes = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes),
    ]
    proto = onnx_models.model(
        nodes,
        {"x": (TensorProto.FLOAT, SHAPE)},
        {"y": (TensorProto.FLOAT, SHAPE)},
        {"s": scale, "z": zero},
        opset=21,
    )
    path = onnx_models.save(proto, tmp_path_factory.mktemp("qdq") / "m.onnx")
    target = path.with_name("emulated.onnx")
    graph.write(rewrite.emulated(graph.read(path)), target)
    return OrtRunner(target, "qdq"), lambda x: expected(x, scale, zero, axis or 0)


@settings(max_examples=100, deadline=None)
@given(x=hnp.arrays(np.float32, SHAPE, elements=st.floats(-40, 40, width=32) | st.sampled_from([0.5, 1e30, -1e30])))
def test_the_grid_is_exact(pair: tuple[OrtRunner, Callable[..., Any]], x: NDArray[np.float32]) -> None:
    runner, model = pair
    np.testing.assert_array_equal(runner({"x": x})["y"], model(x))


def test_ties_saturation_and_nan(tmp_path: Any) -> None:
    """Half to even, both ends, infinity saturates, and NaN is 0, as a GPU's conversion makes it."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    weights: dict[str, NDArray[Any]] = {"s": np.array(1, np.float32), "z": np.array(0, np.int8)}
    path = onnx_models.save(onnx_models.elementwise(nodes, 9, weights), tmp_path / "m.onnx")
    target = tmp_path / "emulated.onnx"
    graph.write(rewrite.emulated(graph.read(path)), target)
    x = np.array([0.5, 1.5, 2.5, -0.5, 127.5, -128.5, np.inf, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(OrtRunner(target, "m")({"x": x})["y"], [0, 2, 2, 0, 127, -128, 127, -128, 0])


def test_weights_and_branches(tmp_path: Any) -> None:
    """A quantized weight by channel, and one Q read by two DQs."""
    weight = np.random.default_rng(0).integers(-127, 128, (4, 3)).astype(np.int8)
    scales = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d1"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d2"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("Gemm", ["d1", "wd"], ["g"], transB=1),
        helper.make_node("ReduceSum", ["d2"], ["r"], keepdims=1),
        helper.make_node("Add", ["g", "r"], ["y"]),
    ]
    proto = onnx_models.model(
        nodes,
        {"x": (TensorProto.FLOAT, [2, 3])},
        {"y": (TensorProto.FLOAT, [2, 4])},
        {
            "s": np.array(0.05, np.float32),
            "z": np.array(0, np.int8),
            "w": weight,
            "ws": scales,
            "wz": np.zeros(4, np.int8),
        },
    )
    path = onnx_models.save(proto, tmp_path / "m.onnx")
    target = tmp_path / "emulated.onnx"
    graph.write(rewrite.emulated(graph.read(path)), target)
    x = np.random.default_rng(1).standard_normal((2, 3)).astype(np.float32)
    d = np.clip(np.round(x / np.float32(0.05)), -128, 127) * np.float32(0.05)
    expected_y = d @ (weight * scales[:, None]).T + d.sum()
    np.testing.assert_allclose(OrtRunner(target, "m")({"x": x})["y"], expected_y, rtol=1e-5, atol=1e-6)
