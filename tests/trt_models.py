"""One-operator models with FP32 inputs and outputs, the operator itself in the precision asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from onnx import TensorProto, helper

from tests.onnx_models import FLOAT, model, weights

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from pytest_trtcheck.spec import Precision

SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "Conv": ((2, 16, 16, 16), (8, 16, 3, 3), (2, 8, 14, 14)),
    "ConvTranspose": ((2, 16, 16, 16), (16, 8, 3, 3), (2, 8, 18, 18)),
    "MatMul": ((4, 64), (64, 32), (4, 32)),
    "Gemm": ((4, 64), (64, 32), (4, 32)),
}
"""Input, weight and output, by operator."""
CHANNEL_AXIS = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1, "Gemm": 1}
SCALE = 0.05


def operator(op: str, precision: Precision, *, weight_scale: float = 1.0) -> onnx.ModelProto:
    """x → the operator → y."""
    _, w_shape, _ = SHAPES[op]
    weight = weights(w_shape, 3, 0.1) * np.float32(weight_scale)
    if precision in {"fp16", "bf16"}:
        return _half(op, weight, precision)
    if precision in {"int8", "fp8"}:
        return _quantized(op, weight, precision)
    return _model(op, [helper.make_node(op, ["x", "w"], ["y"], name=op.lower())], {"w": weight})


def _half(op: str, weight: NDArray[np.float32], precision: str) -> onnx.ModelProto:
    kind, dtype = (
        (TensorProto.FLOAT16, np.dtype(np.float16))
        if precision == "fp16"
        else (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16))
    )
    nodes = [
        helper.make_node("Cast", ["x"], ["x_low"], name="cast_in", to=kind),
        helper.make_node(op, ["x_low", "w"], ["y_low"], name=op.lower()),
        helper.make_node("Cast", ["y_low"], ["y"], name="cast_out", to=FLOAT),
    ]
    return _model(op, nodes, {"w": weight.astype(dtype)}, opset=22)


def _quantized(op: str, weight: NDArray[np.float32], precision: str) -> onnx.ModelProto:
    zero: NDArray[Any]
    w_zero: NDArray[Any]
    axis: dict[str, Any] = {}
    if precision == "int8":
        zero = np.zeros((), np.int8)
        axis = {"axis": CHANNEL_AXIS[op]}
        channels = weight.shape[CHANNEL_AXIS[op]]
        w_scale, w_zero = np.full(channels, SCALE / 8, np.float32), np.zeros(channels, np.int8)
    else:
        zero = w_zero = np.zeros((), ml_dtypes.float8_e4m3fn)
        w_scale = np.array(SCALE / 8, np.float32)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"], name="x_q"),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"], name="x_dq"),
        helper.make_node("QuantizeLinear", ["w", "ws", "wz"], ["wq"], name="w_q", **axis),
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], name="w_dq", **axis),
        helper.make_node(op, ["xd", "wd"], ["y"], name=op.lower()),
    ]
    values: dict[str, NDArray[Any]] = {
        "w": weight,
        "ws": w_scale,
        "wz": w_zero,
        "xs": np.array(SCALE, np.float32),
        "xz": zero,
    }
    return _model(op, nodes, values, opset=19)


def _model(op: str, nodes: list[onnx.NodeProto], values: dict[str, NDArray[Any]], opset: int = 17) -> onnx.ModelProto:
    x_shape, _, y_shape = SHAPES[op]
    return model(nodes, {"x": (FLOAT, x_shape)}, {"y": (FLOAT, y_shape)}, values, opset)


def dynamic_conv() -> onnx.ModelProto:
    """x [n, 4, 16, width] → Conv → y."""
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="conv")
    return model(
        [node],
        {"x": (FLOAT, ["n", 4, 16, "width"])},
        {"y": (FLOAT, ["n", 8, 14, "out_width"])},
        {"w": weights((8, 4, 3, 3), 5)},
    )


def many_types() -> onnx.ModelProto:
    """Inputs and outputs of int64, int32, bool, uint8, fp16 and fp32, the outputs not in the order of the inputs."""
    kinds = {
        "i64": TensorProto.INT64,
        "i32": TensorProto.INT32,
        "flag": TensorProto.BOOL,
        "u8": TensorProto.UINT8,
        "half": TensorProto.FLOAT16,
        "x": FLOAT,
    }
    nodes = [
        helper.make_node("Add", ["i64", "i64"], ["i64_sum"], name="add64"),
        helper.make_node("Mul", ["i32", "i32"], ["i32_square"], name="mul32"),
        helper.make_node("Not", ["flag"], ["flag_not"], name="not"),
        helper.make_node("Identity", ["u8"], ["u8_same"], name="same8"),
        helper.make_node("Add", ["half", "half"], ["half_sum"], name="add16"),
        helper.make_node("Neg", ["x"], ["x_neg"], name="neg"),
    ]
    outputs = {
        "x_neg": FLOAT,
        "half_sum": TensorProto.FLOAT16,
        "u8_same": TensorProto.UINT8,
        "flag_not": TensorProto.BOOL,
        "i32_square": TensorProto.INT32,
        "i64_sum": TensorProto.INT64,
    }
    return model(
        nodes,
        {name: (kind, [4]) for name, kind in kinds.items()},
        {name: (kind, [4]) for name, kind in outputs.items()},
    )


def rows_of_values() -> onnx.ModelProto:
    """x [4, 8] reshaped to the values of the shape tensor s [2]."""
    node = helper.make_node("Reshape", ["x", "s"], ["y"], name="reshape")
    inputs = {"x": (FLOAT, [4, 8]), "s": (TensorProto.INT64, [2])}
    return model([node], inputs, {"y": (FLOAT, ["rows", "columns"])})


def nonzero() -> onnx.ModelProto:
    """x [4, 8] → the indices of its nonzero elements [2, count]."""
    node = helper.make_node("NonZero", ["x"], ["y"], name="nonzero")
    return model([node], {"x": (FLOAT, [4, 8])}, {"y": (TensorProto.INT64, [2, "count"])})
