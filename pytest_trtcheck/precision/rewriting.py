"""What every rewriting of a graph does: make initializers and casts, put nodes behind a value or in another's place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes  # noqa: F401 - registers bfloat16 and FP8 with numpy
import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from numpy.typing import NDArray

FLOAT = ir.DataType.FLOAT
AXES_AS_INPUT = 13
"""The opset from which on Unsqueeze and ReduceSum take their axes as an input."""
_TELLING = frozenset({"Equal", "Greater", "IsNaN", "Less"})
"""Operators whose results are booleans."""
BLOCK = 1 << 20
"""Elements of a weight that are changed at a time."""
TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "output_datatype")
"""The attributes by which a node is told the type of its result."""


def initializer(graph: ir.Graph | ir.Function | None, tensor: ir.TensorProtocol) -> ir.Value:
    """A weight of `graph` under the tensor's own name."""
    assert isinstance(graph, ir.Graph)
    value = ir.val(tensor.name, const_value=tensor)
    graph.register_initializer(value)
    return value


def lazy(name: str | None, dtype: ir.DataType, shape: Sequence[int], make: Callable[[], NDArray[Any]]) -> ir.LazyTensor:
    """A tensor made anew each time it is read, that is, when the model is written: no two are in memory at once."""
    return ir.LazyTensor(
        lambda: ir.Tensor(make(), dtype=dtype, name=name), dtype=dtype, shape=ir.Shape(shape), name=name
    )


def by_element(change: Callable[[NDArray[Any]], NDArray[Any]], array: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """What a change of each element makes of an array, block by block: nothing between is as large as a weight."""
    array = np.asarray(array)
    changed = np.empty(array.shape, dtype)
    source, target = array.reshape(-1), changed.reshape(-1)
    for start in range(0, source.size, BLOCK):
        target[start : start + BLOCK] = change(source[start : start + BLOCK])
    return changed


def cast(value: ir.Value, dtype: ir.DataType, name: str, output: str | None = None) -> ir.Node:
    """A Cast of `value`, in no graph yet."""
    node = ir.node("Cast", [value], attributes={"to": int(dtype)}, name=name)
    result = node.outputs[0]
    result.name, result.shape, result.dtype = output or name, value.shape, dtype
    return node


def insert_behind(value: ir.Value, nodes: Sequence[ir.Node], graph: ir.Graph | ir.Function) -> None:
    """Put nodes right behind the one that makes `value`; in front of all others of `graph` where none does."""
    producer = value.producer()
    if producer is not None and producer.graph is not None:
        producer.graph.insert_after(producer, nodes)
    elif len(graph):
        graph.insert_before(graph[0], nodes)
    else:
        graph.extend(nodes)


def interpose(value: ir.Value, nodes: Sequence[ir.Node], graph: ir.Graph | ir.Function) -> ir.Value:
    """Put nodes between `value` and the nodes that use it, which use the last one's output from then on."""
    result = nodes[-1].outputs[0]
    for user, index in list(value.uses()):
        if user not in nodes:
            user.replace_input_with(index, result)
    insert_behind(value, nodes, graph)
    return result


def replace_in_outputs(graph: ir.Graph | ir.Function, old: ir.Value, new: ir.Value) -> None:
    """Let a graph give `new` wherever it gave `old`."""
    for index, value in enumerate(graph.outputs):
        if value is old:
            graph.outputs[index] = new


def values_of(node: ir.Node) -> dict[str, Any]:
    """A node's attributes as `Steps.add` takes them."""
    return {name: attribute.value for name, attribute in node.attributes.items()}


def retype(
    node: ir.Node, types: Collection[ir.DataType], dtype: ir.DataType, convert: Callable[[NDArray[Any]], NDArray[Any]]
) -> None:
    """Let a node that is told to make one of `types`, or holds a tensor of it, make or hold `dtype`."""
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.INT and name in TYPE_ATTRIBUTES and attribute.as_int() in types:
            node.attributes[name] = ir.AttrInt64(name, int(dtype))
        elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in types:
            tensor = ir.Tensor(convert(attribute.as_tensor().numpy()), dtype=dtype)
            node.attributes[name] = ir.AttrTensor(name, tensor)


class Steps:
    """What replaces a node, step by step.

    Parameters
    ----------
    node
        The node to be replaced; names, constants and the graph are its.
    dtype
        The type of every step's output that is not said to be another.
    opset
        The version of ONNX's operators that the model uses.
    prefix
        What the steps' names begin with; the node's name unless given.
    """

    def __init__(self, node: ir.Node, dtype: ir.DataType = FLOAT, opset: int = 0, prefix: str = "") -> None:
        self.opset = opset
        self.nodes: list[ir.Node] = []
        self.dtype = dtype
        self.node = node
        self._prefix = prefix or node.name or ""
        self._constants: dict[str, ir.Value] = {}

    def inside(self, label: str) -> Steps:
        """Steps of a graph inside this node, such as a loop's body."""
        inner = Steps(self.node, self.dtype, self.opset)
        inner._prefix = f"{self._prefix}/{label}"
        inner._constants = self._constants
        return inner

    def add(
        self,
        op_type: str,
        *operands: ir.Value | None,
        dtype: ir.DataType | None = None,
        shape: ir.Shape | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """One more node with one output; its shape is left open unless given."""
        (output,) = self.add_many(op_type, operands, [dtype], attributes)
        output.shape = shape
        return output

    def add_many(
        self,
        op_type: str,
        operands: Sequence[ir.Value | None],
        dtypes: Sequence[ir.DataType | None],
        attributes: dict[str, Any],
    ) -> Sequence[ir.Value]:
        """One more node, with an output for each of `dtypes`; None stands for what it makes of the steps' type."""
        name = f"{self._prefix}/{op_type.lower()}{len(self.nodes)}"
        step = ir.node(op_type, list(operands), attributes=attributes, num_outputs=len(dtypes), name=name)
        self.nodes.append(step)
        for index, (output, dtype) in enumerate(zip(step.outputs, dtypes, strict=True)):
            output.name = f"{name}/{index}" if index else name
            output.dtype = dtype or (ir.DataType.BOOL if op_type in _TELLING else self.dtype)
        return step.outputs

    def constant(self, array: NDArray[Any], suffix: str) -> ir.Value:
        """An initializer beside the nodes; one that was made for the same suffix is used again."""
        name = f"{self._prefix}/{suffix}"
        if name in self._constants:
            return self._constants[name]
        graph = self.node.graph
        assert isinstance(graph, ir.Graph)
        asked = name
        while name in graph.initializers:
            name += "_"
        value = self._constants[asked] = initializer(graph, ir.Tensor(array, name=name))
        return value

    def scalar(self, number: float, suffix: str) -> ir.Value:
        """A number of the steps' own type, rounded to it."""
        return self.constant(np.array(number, self.dtype.numpy()), suffix)

    def integer(self, number: int) -> ir.Value:
        """A tensor of one INT64, as bounds and axes are given."""
        return self.constant(np.array([number], np.int64), f"int{number}")

    def slice(self, value: ir.Value | None, bounds: tuple[int, int], axis: int) -> ir.Value:
        """The part of `value` between two bounds of an axis."""
        return self.add("Slice", value, *map(self.integer, (*bounds, axis)))

    def unsqueeze(self, value: ir.Value, axis: int, dtype: ir.DataType | None = None) -> ir.Value:
        """`value` with one more axis."""
        if self.opset < AXES_AS_INPUT:
            return self.add("Unsqueeze", value, dtype=dtype, axes=[axis])
        return self.add("Unsqueeze", value, self.integer(axis), dtype=dtype)

    def input(self, label: str, dtype: ir.DataType | None = None) -> ir.Value:
        """An input of the graph that these steps are inside of."""
        return ir.Value(name=f"{self._prefix}/{label}", type=ir.TensorType(dtype or self.dtype))


def replace(node: ir.Node, steps: Steps, results: Sequence[ir.Value]) -> None:
    """Put `steps` in the place of `node`: `results` take over the names, types and users of its outputs, in turn."""
    graph = node.graph
    assert graph is not None
    graph.insert_before(node, steps.nodes)
    for output, result in zip(node.outputs, results, strict=False):
        output.replace_all_uses_with(result, replace_graph_outputs=True)
        result.shape = result.shape or output.shape
    names = [output.name for output in node.outputs]
    graph.remove(node, safe=True)
    for name, output, result in zip(names, node.outputs, results, strict=False):
        if name:
            output.name, result.name = f"{name}/replaced", name


def replaced(node: ir.Node, make: Callable[[Steps, ir.Node], ir.Value]) -> None:
    """Put what `make` adds in the place of a node with one output."""
    steps = Steps(node)
    replace(node, steps, [make(steps, node)])
