"""FP64 as TensorRT takes it: as FP32.

TensorRT has no FP64 arithmetic. Its ONNX parser (TensorRT-RTX 1.7.1, tried) makes FLOAT of every DOUBLE: weights, whose
values are clamped to FP32's range, the targets of casts, inputs and outputs. Here the model's own inputs and outputs
stay FP64, behind casts that are none to TensorRT, so that the model can be fed and compared as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from pytest_trtcheck.model import graph as graphs
from pytest_trtcheck.precision import rewriting

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

_DOUBLE, _FLOAT = ir.DataType.DOUBLE, ir.DataType.FLOAT
_LARGEST = float(np.finfo(np.float32).max)


def narrowed(array: NDArray[Any]) -> NDArray[np.float32]:
    """FP64 as FP32; finite values beyond its range become its largest."""

    def in_range(block: NDArray[Any]) -> NDArray[Any]:
        return np.where(np.isfinite(block), np.clip(block, -_LARGEST, _LARGEST), block)

    return rewriting.by_element(in_range, array, np.float32)


def to_float(model: ir.Model) -> ir.Model:
    """Make FP32 of all FP64 inside `model` (as `graph.read` gives it), in place."""
    names = graphs.Names(model)
    outputs = [value.dtype for value in model.graph.outputs]
    for node in list(graphs.all_nodes(model.graph)):
        if node.op_type == "BitCast":  # is about bits, of which FP32 has half as many
            _keep_double(node, names)
        else:
            _declare_float(node.outputs)
            rewriting.retype(node, {_DOUBLE}, _FLOAT, narrowed)
    for graph in graphs.all_graphs(model.graph):
        for weight in graph.initializers.values():
            _narrow_weight(weight)
        if graph is not model.graph:
            _declare_float(graph.inputs)
    for value in list(model.graph.inputs):
        if graphs.is_tensor(value, _DOUBLE):
            _cast_behind(value, model.graph, names)
    for index, dtype in enumerate(outputs):
        if dtype == _DOUBLE and model.graph.outputs[index].dtype == _FLOAT:
            _cast_to_output(model.graph, index, names)
    return model


def _declare_float(values: Iterable[ir.Value]) -> None:
    for value in values:
        if value.dtype == _DOUBLE:
            value.dtype = _FLOAT


def _cast_to_output(graph: ir.Graph, index: int, names: graphs.Names) -> None:
    value = graph.outputs[index]
    cast = _cast(value, _DOUBLE, names)
    graph.append(cast)
    name, graph.outputs[index] = value.name, cast.outputs[0]
    value.name, cast.outputs[0].name = names.unused(f"{name}_float"), name


def _narrow_weight(weight: ir.Value) -> None:
    tensor = weight.const_value
    if tensor is None or tensor.dtype != _DOUBLE:
        return
    shape = tensor.shape.numpy()
    weight.const_value = rewriting.lazy(weight.name, _FLOAT, shape, lambda: narrowed(tensor.numpy()))
    weight.dtype = _FLOAT


def _keep_double(node: ir.Node, names: graphs.Names) -> None:
    """Put casts around a node that needs FP64 as it is."""
    graph, operand, output = node.graph, node.inputs[0], node.outputs[0]
    assert isinstance(graph, ir.Graph)
    if operand is not None and operand.dtype == _DOUBLE:
        cast = _cast(operand, _DOUBLE, names)
        node.replace_input_with(0, cast.outputs[0])
        graph.insert_before(node, cast)
    if output.dtype == _DOUBLE and not output.is_graph_output():
        _cast_behind(output, graph, names)


def _cast(value: ir.Value, dtype: ir.DataType, names: graphs.Names) -> ir.Node:
    word = dtype.name.lower()
    return rewriting.cast(value, dtype, *(names.unused(f"{value.name}_{word}") for word in (f"to_{word}", word)))


def _cast_behind(value: ir.Value, graph: ir.Graph, names: graphs.Names) -> None:
    if value.uses():
        rewriting.interpose(value, [_cast(value, _FLOAT, names)], graph)
