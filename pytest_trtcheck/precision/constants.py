"""Weights that reach their operator through Transpose, Reshape or a widening Cast: one constant in another layout."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from pytest_trtcheck.model import graph as graphs
from pytest_trtcheck.precision import double, rewriting

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

_BY_CHANNEL = {"Sub": np.subtract, "Mul": np.multiply}
_WIDENED = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT})


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """What `value` holds whatever the model's inputs are; None where it is computed by more than a change of layout.

    Where an operator lies between `value` and the weight, the tensor is lazy: made when it is used, and not kept.
    """
    if value is None:
        return None
    if value.is_initializer():
        return value.const_value
    node = value.producer()
    if node is None or node.domain not in graphs.ONNX_DOMAINS or not node.inputs:
        return None
    relayout = _RELAYOUTS.get(node.op_type)
    source = constant(node.inputs[0]) if relayout is not None else None
    return relayout(node, source) if relayout is not None and source is not None else None


def stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """What an initializer holds, or the node of a constant that is a graph's output; None for anything else."""
    if value is None or value.is_initializer():
        return value.const_value if value is not None else None
    node = value.producer()
    return node.attributes.get_tensor("value") if node is not None and node.op_type == "Constant" else None


def fold_dequantized(model: ir.Model) -> None:
    """Make initializers of weights that a model holds as integers beside a scale and a zero point, in place.

    What `qdq.as_arithmetic` wrote out for a DequantizeLinear of a constant: a Cast, Sub, Mul, and Reshape.
    """
    fold_casts(model)
    for node in list(graphs.all_nodes(model.graph)):
        operands = [stored(value) for value in node.inputs]
        output = node.outputs[0]
        if node.op_type not in {*_BY_CHANNEL, "Reshape"} or output.is_graph_output() or None in operands:
            continue
        first, second = (tensor for tensor in operands if tensor is not None)
        if not (first.dtype == output.dtype == ir.DataType.FLOAT):
            continue
        tensor = _reshape(node, first) if node.op_type == "Reshape" else _by_channel(node.op_type, first, second)
        if tensor is not None:
            _replace(node, tensor)


def fold_casts(model: ir.Model) -> None:
    """Make initializers of casts of constants to FP32, in place.

    A number of another type is as constant as one of FP32 (a mask's −3.4e38 that is stored as a double, weights stored
    in 16 bits), and is to be treated as one. Magnitudes beyond FP32 become its largest, as TensorRT converts doubles.
    From FP8 and 4 bits TensorRT takes no cast at all.
    """
    for node in list(graphs.all_nodes(model.graph)):
        source = node.inputs[0] if node.op_type in {"Cast", "CastLike"} and node.inputs else None
        output, tensor = node.outputs[0], stored(source)
        if tensor is None or output.is_graph_output() or not graphs.is_tensor(output, ir.DataType.FLOAT):
            continue
        if not (tensor.dtype == ir.DataType.BOOL or tensor.dtype.is_integer() or tensor.dtype.is_floating_point()):
            continue

        def widened(array: NDArray[Any]) -> NDArray[Any]:
            return double.narrowed(array) if array.dtype == np.float64 else array.astype(np.float32)

        _replace(node, _lazy(tensor, widened, _shape(tensor), ir.DataType.FLOAT))


def _replace(node: ir.Node, tensor: ir.TensorProtocol) -> None:
    """Put a constant in the place of a node, under its output's name."""
    graph, output = node.graph, node.outputs[0]
    assert isinstance(graph, ir.Graph)
    value = ir.val(output.name, const_value=tensor)
    output.replace_all_uses_with(value)
    graph.remove(node, safe=True)
    graph.register_initializer(value)


def _by_channel(op_type: str, data: ir.TensorProtocol, by: ir.TensorProtocol) -> ir.TensorProtocol:
    shape = np.broadcast_shapes(_shape(data), _shape(by))
    return _lazy(data, lambda array: _BY_CHANNEL[op_type](array, by.numpy()), list(shape), ir.DataType.FLOAT)


def _identity(node: ir.Node, source: ir.TensorProtocol) -> ir.TensorProtocol | None:  # noqa: ARG001 - one signature
    return source


def _transpose(node: ir.Node, source: ir.TensorProtocol) -> ir.TensorProtocol | None:
    shape = _shape(source)
    order = node.attributes.get_ints("perm", range(len(shape))[::-1])
    return _lazy(source, lambda array: array.transpose(order), [shape[axis] for axis in order], source.dtype)


def _reshape(node: ir.Node, source: ir.TensorProtocol) -> ir.TensorProtocol | None:
    wanted = constant(node.inputs[1])
    if wanted is None:
        return None
    old, new = _shape(source), [int(size) for size in wanted.numpy()]
    if not node.attributes.get_int("allowzero", 0):
        new = [old[axis] if size == 0 else size for axis, size in enumerate(new)]
    if -1 in new:
        known = math.prod(size for size in new if size != -1)
        new[new.index(-1)] = math.prod(old) // known if known else 0
    return _lazy(source, lambda array: array.reshape(new), new, source.dtype)


def _cast(node: ir.Node, source: ir.TensorProtocol) -> ir.TensorProtocol | None:
    """Weights stored in 16 bits and computed with in FP32."""
    if node.attributes["to"].as_int() != ir.DataType.FLOAT or source.dtype not in _WIDENED:
        return None
    return _lazy(source, lambda array: array.astype(np.float32), _shape(source), ir.DataType.FLOAT)


_RELAYOUTS: dict[str, Callable[[ir.Node, ir.TensorProtocol], ir.TensorProtocol | None]] = {
    "Identity": _identity,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Cast": _cast,
}


def _shape(tensor: ir.TensorProtocol) -> list[int]:
    return list(tensor.shape.numpy())


def _lazy(
    source: ir.TensorProtocol, change: Callable[[NDArray[Any]], NDArray[Any]], shape: list[int], dtype: ir.DataType
) -> ir.TensorProtocol:
    return rewriting.lazy(source.name, dtype, shape, lambda: np.ascontiguousarray(change(source.numpy())))
