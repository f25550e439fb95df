"""Nodes that are put in the place of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes  # noqa: F401 - registers bfloat16 and FP8 with numpy
import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

FLOAT = ir.DataType.FLOAT


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
        """One more node, with an output for each of `dtypes`; None stands for the steps' own."""
        name = f"{self._prefix}/{op_type.lower()}{len(self.nodes)}"
        step = ir.node(op_type, list(operands), attributes=attributes, num_outputs=len(dtypes), name=name)
        self.nodes.append(step)
        for index, (output, dtype) in enumerate(zip(step.outputs, dtypes, strict=True)):
            output.name, output.dtype = f"{name}/{index}" if index else name, dtype or self.dtype
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
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        graph.register_initializer(value)
        self._constants[asked] = value
        return value

    def scalar(self, number: float, suffix: str) -> ir.Value:
        """A number of the steps' own type, rounded to it."""
        return self.constant(np.array(number, self.dtype.numpy()), suffix)

    def input(self, label: str, dtype: ir.DataType | None = None) -> ir.Value:
        """An input of the graph that these steps are inside of."""
        return ir.Value(name=f"{self._prefix}/{label}", type=ir.TensorType(dtype or self.dtype))


def replace(node: ir.Node, steps: Steps, results: Sequence[ir.Value]) -> None:
    """Put `steps` in the place of `node`: `results` take over the names, types and users of its outputs, in turn."""
    graph = node.graph
    assert graph is not None
    graph.insert_before(node, steps.nodes)
    for output, result in zip(node.outputs, results, strict=False):
        for user, index in list(output.uses()):
            user.replace_input_with(index, result)
        for index, value in enumerate(graph.outputs):
            if value is output:
                graph.outputs[index] = result
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
