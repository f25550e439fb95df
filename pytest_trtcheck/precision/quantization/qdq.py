"""Q/DQ nodes as plain arithmetic, or taken out.

ONNX Runtime rewrites graphs around QuantizeLinear and DequantizeLinear. With FP8 that goes wrong: at its default
optimization level a small convolutional net came out with a relative error of 0.51 where 0.06 is right. And an INT8
QuantizeLinear turns NaN into −128. The formulas of the ONNX standard, written as Div, Round, Clip and Mul, leave
nothing to rewrite; FP8 lets NaN through, and INT8 makes 0 of it, as a GPU does.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from pytest_trtcheck.model import graph as graphs
from pytest_trtcheck.precision.constants import constant
from pytest_trtcheck.precision.rewriting import FLOAT, Steps, replaced

_FLOAT8 = frozenset(
    {ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E4M3FNUZ, ir.DataType.FLOAT8E5M2, ir.DataType.FLOAT8E5M2FNUZ}
)


def as_arithmetic(model: ir.Model) -> ir.Model:
    """Replace Q/DQ nodes, in place, by what ONNX defines them to compute, in FP32.

    QuantizeLinear is saturate(round(x / scale) + zero_point), rounding half to even; DequantizeLinear is
    (q − zero_point) · scale (ONNX operators, opset 21). The integer grid stays in FP32, which holds every value of the
    8-bit types, and of the 16-bit ones, exactly. A Q whose integers go elsewhere than to DQ nodes stays as it is, and
    so do blocked ones.
    """
    for node in list(graphs.all_nodes(model.graph)):
        if node.op_type == "QuantizeLinear" and _becomes_float(node):
            replaced(node, _quantize)
    for node in list(graphs.all_nodes(model.graph)):
        if node.op_type == "DequantizeLinear" and not _is_blocked(node):
            replaced(node, _dequantize)
    passes.RemoveUnusedNodesPass()(model)
    return model


def without(model: ir.Model) -> ir.Model:
    """The float model behind one with Q/DQ, in place: each Q → DQ pair becomes its input, a weight's DQ stays.

    A weight that the file holds only as integers keeps its DequantizeLinear, since no better value of it is known.

    Where the least value that a pair can represent is 0 (a zero point at the end of the grid, as 0 of uint8 and −128 of
    int8), it becomes a Relu: quantizers remove the model's own Relu there, since the pair clips just so. What it clips
    at the upper end is no part of the float model: a range that is too narrow is what a check has to find.
    """
    for node in list(graphs.all_nodes(model.graph)):
        quantize = node.inputs[0].producer() if node.op_type == "DequantizeLinear" and node.inputs[0] else None
        if quantize is not None and quantize.op_type == "QuantizeLinear":
            operator = "Relu" if _clips_at_zero(quantize) else "Identity"
            replaced(node, lambda steps, _: steps.add(operator, quantize.inputs[0]))  # noqa: B023 - called at once
    passes.RemoveUnusedNodesPass()(model)
    return model


def integers_alone(model: ir.Model) -> list[str]:
    """The weights that a model holds as integers behind a DequantizeLinear: what they were as floats is not known."""
    dequantized = (node.inputs[0] for node in graphs.all_nodes(model.graph) if node.op_type == "DequantizeLinear")
    return list(dict.fromkeys(str(value.name) for value in dequantized if value and value.const_value is not None))


def _clips_at_zero(quantize: ir.Node) -> bool:
    """Whether the zero point is the least value of the grid, so that nothing below 0 is represented.

    Without a zero point it is 0, in the type that the node gives: uint8 unless it says otherwise.
    """
    grid = quantize.outputs[0].dtype
    if grid is None or not grid.is_integer():
        return False
    least = ml_dtypes.iinfo(grid.numpy()).min  # type: ignore[no-untyped-call]
    zero_point = graphs.operand(quantize, 2)
    if zero_point is None:
        return bool(least == 0)
    tensor = constant(zero_point)
    return tensor is not None and bool((tensor.numpy() == least).all())


def _float(steps: Steps, value: ir.Value) -> ir.Value:
    """The value as FP32."""
    return value if value.dtype == FLOAT else steps.add("Cast", value, shape=value.shape, to=int(FLOAT))


def _by_channel(steps: Steps, value: ir.Value, suffix: str) -> ir.Value:
    """A scale or zero point as FP32, in a shape that broadcasts against the node's input."""
    data, sizes = steps.node.inputs[0], value.shape
    value = _float(steps, value)
    rank = len(data.shape) if data is not None and data.shape is not None else None
    if sizes is None or len(sizes) != 1 or rank is None:
        return value
    shape = np.ones(rank, np.int64)
    # One scale alone belongs to the whole tensor, whatever the axis.
    if sizes[0] != 1:
        shape[steps.node.attributes.get_int("axis", 1)] = -1
    return steps.add("Reshape", value, steps.constant(shape, f"{suffix}_shape"))


def _quantize(steps: Steps, node: ir.Node) -> ir.Value:
    data, scale = node.inputs[0], node.inputs[1]
    assert data is not None
    assert scale is not None
    grid = node.outputs[0].dtype
    assert grid is not None
    scaled = steps.add("Div", _float(steps, data), _by_channel(steps, scale, "scale"))
    if grid in _FLOAT8:
        largest = float(ml_dtypes.finfo(grid.numpy()).max)  # type: ignore[no-untyped-call]
        limits = [steps.constant(np.array(limit, np.float32), f"limit{limit:g}") for limit in (-largest, largest)]
        rounded = steps.add("Cast", steps.add("Clip", scaled, *limits), dtype=grid, to=int(grid))
        return steps.add("Cast", rounded, to=int(FLOAT))
    # An INT8 number of NaN is 0 on a GPU.
    nan = steps.add("IsNaN", scaled)
    rounded = steps.add("Round", steps.add("Where", nan, steps.constant(np.array(0, np.float32), "none"), scaled))
    if (zero_point := graphs.operand(node, 2)) is not None:
        rounded = steps.add("Add", rounded, _by_channel(steps, zero_point, "zero_point"))
    info = ml_dtypes.iinfo(grid.numpy())  # type: ignore[no-untyped-call]
    limits = [steps.constant(np.array(limit, np.float32), f"limit{limit}") for limit in (info.min, info.max)]
    return steps.add("Clip", rounded, *limits)


def _dequantize(steps: Steps, node: ir.Node) -> ir.Value:
    data, scale = node.inputs[0], node.inputs[1]
    assert data is not None
    assert scale is not None
    wanted = node.outputs[0].dtype or FLOAT
    steps_from_zero = _float(steps, data)
    zero_point = graphs.operand(node, 2)
    if zero_point is not None and zero_point.dtype not in _FLOAT8:
        steps_from_zero = steps.add("Sub", steps_from_zero, _by_channel(steps, zero_point, "zero_point"))
    result = steps.add("Mul", steps_from_zero, _by_channel(steps, scale, "scale"))
    return result if wanted == FLOAT else steps.add("Cast", result, dtype=wanted, to=int(wanted))


def _is_blocked(node: ir.Node) -> bool:
    return node.attributes.get_int("block_size", 0) != 0


def _becomes_float(node: ir.Node) -> bool:
    output = node.outputs[0]
    users = [user for user, _ in output.uses()]
    return (
        not _is_blocked(node)
        and not output.is_graph_output()
        and output.dtype is not None
        and all(user.op_type == "DequantizeLinear" and not _is_blocked(user) for user in users)
    )
