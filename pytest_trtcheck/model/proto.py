"""Walking a model as `onnx` alone reads it: graphs inside graphs, and what constants hold."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import onnx


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs inside an If, Loop or Scan node."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """`nodes` and those of the graphs inside them."""
    for node in nodes:
        yield node
        for inner in bodies(node):
            yield from all_nodes(inner.node)


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """`graph` and the graphs inside its nodes."""
    yield graph
    for node in all_nodes(graph.node):
        yield from bodies(node)


SMALL_WEIGHT = 1 << 10
"""Elements up to which a weight can be the shape, the axes or the sizes that an operator is told."""


def elements(tensor: onnx.TensorProto) -> list[Any] | None:
    """A small weight's elements; None for a large one, and where they lie in another file."""
    import onnx

    if tensor.data_location == onnx.TensorProto.EXTERNAL or math.prod(tensor.dims) > SMALL_WEIGHT:
        return None
    found: list[Any] = onnx.numpy_helper.to_array(tensor).reshape(-1).tolist()
    return found


def constant(node: onnx.NodeProto) -> list[Any] | None:
    """The elements of what a Constant node holds; None for large ones, strings, sparse tensors, and other nodes."""
    for attribute in node.attribute if node.op_type == "Constant" else ():
        if attribute.name == "value":
            return elements(attribute.t)
        if attribute.name in {"value_int", "value_float"}:
            return [attribute.i if attribute.name == "value_int" else attribute.f]
        if attribute.name in {"value_ints", "value_floats"}:
            return list(attribute.ints or attribute.floats)
    return None
