"""Lowering to INT8 or FP8: QuantizeLinear/DequantizeLinear nodes as a strongly typed TensorRT takes them.

Everything is symmetric (zero points are 0), as TensorRT demands. An activation that several nodes read has one Q/DQ
pair. Weights are stored quantized, with a DequantizeLinear alone behind them: the file is a quarter of the FP32 model,
and TensorRT takes it like the pair ("Explicit Quantization", pre-quantized weights).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from pytest_trtcheck.errors import CalibrationError, ModelError, listed
from pytest_trtcheck.model import graph as graphs
from pytest_trtcheck.precision import rewriting
from pytest_trtcheck.precision.constants import constant, fold_dequantized

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from pytest_trtcheck.choices import HalfName, QuantizedName
    from pytest_trtcheck.model.onnx_model import OnnxModel
    from pytest_trtcheck.precision.quantization.plan import QuantizationPlan, WeightPoint

DTYPES: dict[QuantizedName, ir.DataType] = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}
LARGEST: dict[QuantizedName, float] = {"int8": 127.0, "fp8": 448.0}
"""What the largest magnitude of a range becomes. INT8 holds −128 too, but a symmetric range ends at −127."""
OPSETS: dict[QuantizedName, int] = {"int8": 13, "fp8": 19}
"""The first opset with Q/DQ per axis; with FP8."""
_HALVES: dict[HalfName, Any] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
_FLOAT8_IR_VERSION = 9
_SMALLEST = float(np.finfo(np.float32).tiny)


def scale_of(amax: float, dtype: QuantizedName, rest: HalfName | None = None) -> np.float32:
    """The step of a symmetric range: amax / 127 for INT8, amax / 448 for FP8 (E4M3FN).

    Where `rest` is to hold it, it is the next larger number of that type, so that no range gets narrower.

    A range of 0 gets the scale 1: TensorRT demands scales above 0, and zeros stay zeros with any scale. A scale is
    never subnormal, since GPUs may take those for 0.
    """
    exact = np.float32(max(amax / LARGEST[dtype], _SMALLEST)) if amax else np.float32(1)
    return exact if rest is None else _at_least(exact, rest)


def _at_least(scale: np.float32, kind: HalfName) -> np.float32:
    """The least number of a 16-bit type that is not below `scale`; the type's largest where there is none."""
    largest = ml_dtypes.finfo(_HALVES[kind]).max  # type: ignore[no-untyped-call]
    nearest = np.asarray(min(scale, np.float32(largest))).astype(_HALVES[kind])
    if nearest.astype(np.float32) < scale and nearest < largest:
        # Of numbers above 0, the next one has the next pattern of bits.
        nearest = (nearest.view(np.uint16) + np.uint16(1)).view(_HALVES[kind])
    return np.float32(nearest)


def quantized(array: NDArray[Any], scale: NDArray[np.float32] | np.float32, dtype: QuantizedName) -> NDArray[Any]:
    """QuantizeLinear with zero point 0: round half to even, saturate. `scale` broadcasts against `array`.

    Some rows at a time, so that the quotients are never as large as a weight.
    """
    scales, found = np.broadcast_to(scale, array.shape), np.empty(array.shape, DTYPES[dtype].numpy())
    count = max(1, rewriting.BLOCK * len(array) // max(1, array.size))
    for start in range(0, len(array), count):
        rows = slice(start, start + count)
        steps = array[rows] / scales[rows]
        if dtype == "int8":
            found[rows] = np.clip(np.rint(steps, out=steps), -128, 127, out=steps)
        else:
            found[rows] = np.clip(steps, -448, 448, out=steps)
    return found


def read(model: OnnxModel, path: Path) -> ir.Model:
    """The FP32 model at `path`, with weights of the user's `model` that are integers as floats again.

    Beside Q/DQ nodes TensorRT takes integers only in front of a DequantizeLinear, and what is quantized is a constant.
    """
    graph = graphs.read(path)
    if model.has_qdq:
        fold_dequantized(graph)
    return graph


def quantize(
    model: ir.Model,
    plan: QuantizationPlan,
    ranges: Mapping[str, float],
    dtype: QuantizedName = "int8",
    rest: HalfName | None = None,
) -> ir.Model:
    """Put Q/DQ where `plan` says.

    Parameters
    ----------
    model
        The model, as `read` gives it, that `plan` was made from. It is used up: work with what is returned.
    plan
        From `points`.
    ranges
        For each of `plan.tensors` the largest magnitude that must be represented; larger ones saturate.
    dtype
        "int8", or "fp8" (E4M3FN).
    rest
        The 16-bit type that Q/DQ nodes are lowered to afterwards: scales are numbers that it holds.

    Returns
    -------
    ir.Model
        In opset 13 (FP8: 19) or later. Weights are quantized one at a time, when the model is written.

    Raises
    ------
    CalibrationError
        A tensor has no range, or its range is negative or not finite.
    ModelError
        The opset is too old and can't be raised, or a weight holds NaN or infinity.
    """
    _check_ranges(plan, ranges)
    model = graphs.at_least_opset(model, OPSETS[dtype])
    if dtype == "fp8":
        model.ir_version = max(model.ir_version, _FLOAT8_IR_VERSION)
    _Quantizer(model, dtype, rest).run(plan, ranges)
    passes.RemoveUnusedNodesPass()(model)
    return model


def _check_ranges(plan: QuantizationPlan, ranges: Mapping[str, float]) -> None:
    if missing := [name for name in plan.tensors if name not in ranges]:
        raise CalibrationError(
            f"no calibrated range for {len(missing)} of {len(plan.tensors)} tensors: {listed(missing, 5)}",
            "calibrate this model with these keep_fp32; ranges of another model don't fit",
            code="calibration-fit",
        )
    for name in plan.tensors:
        if not math.isfinite(ranges[name]) or ranges[name] < 0:
            raise CalibrationError(
                f"tensor {name!r}: {ranges[name]} is no range",
                "a range is a magnitude, finite, ≥ 0",
                code="calibration-fit",
            )


class _Quantizer:
    def __init__(self, model: ir.Model, dtype: QuantizedName, rest: HalfName | None) -> None:
        self.rest = rest
        self.graph = model.graph
        self.name: QuantizedName = dtype
        self.dtype = DTYPES[dtype]
        self.nodes = {node.name: node for node in self.graph}
        self._unused = graphs.Names(model).unused
        self.zero_points: dict[int | None, ir.Value] = {}
        self.dequantized: dict[tuple[ir.Value, int | None], ir.Value] = {}

    def run(self, plan: QuantizationPlan, ranges: Mapping[str, float]) -> None:
        for point in plan.activations:
            value = self._operand(point.node, point.index)
            if (value, None) not in self.dequantized:
                scale = scale_of(ranges[point.tensor], self.name, self.rest)
                self.dequantized[value, None] = self._quantized_activation(value, scale)
            self.nodes[point.node].replace_input_with(point.index, self.dequantized[value, None])
        for weight in plan.weights:
            value, axis = self._operand(weight.node, weight.index), weight.axis
            if (value, axis) not in self.dequantized:
                self.dequantized[value, axis] = self._quantized_weight(value, weight)
            self.nodes[weight.node].replace_input_with(weight.index, self.dequantized[value, axis])
            self._forget(value)

    def _operand(self, node: str, index: int) -> ir.Value:
        value = self.nodes[node].inputs[index] if node in self.nodes else None
        if value is None:
            raise ModelError(
                f"node {node!r} is not in the model any more",
                "this is a mistake of this tool's opset step",
                code="unforeseen",
            )
        return value

    def _quantized_activation(self, value: ir.Value, scale: np.float32) -> ir.Value:
        name = value.name or ""
        scales = self._initializer(f"{name}_scale", np.asarray(scale))
        zero_point = self._zero_point(None)
        quantize = self._node("QuantizeLinear", [value, scales, zero_point], name, value.shape, self.dtype)
        operands = [quantize.outputs[0], scales, zero_point]
        dequantize = self._node("DequantizeLinear", operands, name, value.shape)
        rewriting.insert_behind(value, [quantize, dequantize], self.graph)
        return dequantize.outputs[0]

    def _quantized_weight(self, value: ir.Value, point: WeightPoint) -> ir.Value:
        weight = constant(value)
        assert weight is not None
        shape = weight.shape.numpy()
        axis, name, dtype = point.axis, self.name, self.dtype
        scales = _channel_scales(weight.numpy(), point, lambda amax: scale_of(amax, name, self.rest))
        broadcast = scales.reshape([-1 if each == axis else 1 for each in range(len(shape))])
        stored = self._unused(f"{point.tensor}_quantized")
        lazy = rewriting.lazy(stored, dtype, shape, lambda: quantized(weight.numpy(), broadcast, name))
        integers = rewriting.initializer(self.graph, lazy)
        operands = [integers, self._initializer(f"{point.tensor}_scale", scales), self._zero_point(len(scales))]
        node = self._node("DequantizeLinear", operands, point.tensor, ir.Shape(shape), axis=axis)
        self.graph.insert_before(self.graph[0], node)
        return node.outputs[0]

    def _forget(self, value: ir.Value) -> None:
        """Drop a weight, and what changed its layout, once nobody reads it: it would be written beside its twin."""
        while not value.uses() and not value.is_graph_output():
            producer = value.producer()
            if producer is None:
                if value.is_initializer():
                    self.graph.initializers.pop(value.name or "", None)
                return
            source = producer.inputs[0]
            self.graph.remove(producer, safe=True)
            if source is None:
                return
            value = source

    def _node(
        self,
        operator: str,
        inputs: list[ir.Value],
        tensor: str,
        shape: ir.Shape | None,
        dtype: ir.DataType = ir.DataType.FLOAT,
        **attributes: int,
    ) -> ir.Node:
        name = self._unused(f"{tensor}_{operator}")
        node = ir.node(operator, inputs, attributes=attributes, name=name)
        output = node.outputs[0]
        output.name, output.shape, output.dtype = self._unused(f"{name}_output"), shape, dtype
        return node

    def _zero_point(self, size: int | None) -> ir.Value:
        """The shared zero point for scales of this size; None for a scalar. Its type is what makes Q quantize to it."""
        if size not in self.zero_points:
            zeros = np.zeros(() if size is None else size, self.dtype.numpy())
            suffix = "" if size is None else f"_{size}"
            self.zero_points[size] = self._initializer(f"{self.name}_zero_point{suffix}", zeros)
        return self.zero_points[size]

    def _initializer(self, name: str, array: NDArray[Any]) -> ir.Value:
        return rewriting.initializer(self.graph, ir.Tensor(array, name=self._unused(name)))


def _channel_scales(
    weight: NDArray[Any], point: WeightPoint, scale: Callable[[float], np.float32]
) -> NDArray[np.float32]:
    others = tuple(each for each in range(weight.ndim) if each != point.axis)
    amax = np.maximum(weight.max(axis=others), -weight.min(axis=others))
    if not np.isfinite(amax).all():
        raise ModelError(
            f"weight {point.tensor!r} of node {point.node!r} holds NaN or infinity, which no scale can represent",
            "repair the model: its FP32 outputs are NaN or infinite too",
            code="reference-not-finite",
        )
    return np.array([scale(float(channel)) for channel in amax], np.float32)
