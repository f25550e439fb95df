"""What each node of a model computes in."""

from __future__ import annotations

import onnx_ir as ir

from pytest_trtcheck.model import graph as graphs
from pytest_trtcheck.precision.arithmetic import ROUNDING, Computation

_MOVES = graphs.op_types(
    """
    Bernoulli BitCast Cast CastLike Compress Concat ConcatFromSequence Constant ConstantOfShape DepthToSpace
    DequantizeLinear Dropout DynamicQuantizeLinear Expand EyeLike Flatten Gather GatherElements GatherND Identity If
    Loop MaxUnpool Multinomial NonZero OneHot Optional OptionalGetElement OptionalHasElement Pad QuantizeLinear
    RandomNormal RandomNormalLike RandomUniform RandomUniformLike Reshape ReverseSequence Scan SequenceAt
    SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength SequenceMap Shape Size Slice
    SpaceToDepth Split SplitToSequence Squeeze TensorScatter Tile Transpose Trilu Unsqueeze Where
    """
)
"""Operators that move, make, convert or choose values, and control flow, whose inner nodes count by themselves."""

_MOVES_ONE = graphs.op_types("Cast Flatten Identity MaxPool Reshape Slice Squeeze Transpose Unsqueeze")
"""Through these TensorRT moves the Q/DQ that stands before a quantized operator."""
_BIAS = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2}
_KINDS = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.DOUBLE: "float64",
}
_GRIDS = {ir.DataType.INT8: "int8", ir.DataType.FLOAT8E4M3FN: "fp8"}


def survey(model: ir.Model) -> list[Computation]:
    """Every node of `model`, inner graphs included, that does arithmetic on floats which depend on its inputs.

    A QuantizeLinear counts as well: it rounds to a grid, whatever the operators around it compute in.
    """
    data = dependent_on_data(model)
    found = []
    for node in graphs.all_nodes(model.graph):
        rounds = node.op_type == ROUNDING
        computes = _does_arithmetic(node) and any(value in data for value in node.inputs if value is not None)
        if not rounds and not computes:
            continue
        kind = _grid_name(node.outputs[0].dtype) if rounds else _grid(node) or _kind(node)
        if kind is not None:
            found.append(Computation(node.name or "", node.op_type, kind))
    return found


def _does_arithmetic(node: ir.Node) -> bool:
    if node.op_type in {"Resize", "Upsample"}:
        return node.attributes.get_string("mode", "nearest") != "nearest"
    if node.op_type in {"ScatterElements", "ScatterND"}:
        return node.attributes.get_string("reduction", "none") != "none"
    return node.op_type not in _MOVES


def dependent_on_data(model: ir.Model) -> set[ir.Value]:
    """The values that change with the model's inputs, and not with their shapes alone; all of them without inputs."""
    dependent: set[ir.Value] = set()
    for graph in graphs.all_graphs(model.graph):
        dependent.update(graph.inputs)
    for node in graphs.all_nodes(model.graph):
        if node.op_type in {"Shape", "Size"}:
            continue
        has_body = next(graphs.bodies(node), None) is not None
        if has_body or not model.graph.inputs or any(value in dependent for value in node.inputs if value is not None):
            dependent.update(node.outputs)
    return dependent


def shape_arithmetic(model: ir.Model) -> set[ir.Node]:
    """The nodes that compute sizes as floats: from shapes and constants alone, to what becomes integers or scales.

    A size that is computed with as well is one all the same, and so is a number that a Range counts up to, whatever it
    is computed from (TensorRT takes it from integers alone).
    """
    data = dependent_on_data(model)
    found: set[ir.Node] = set()
    counts: set[ir.Node] = set()
    for node in reversed(list(graphs.all_nodes(model.graph))):
        uses = [use for output in node.outputs for use in output.uses()]
        is_counted = any(user in counts or _takes_size(user, index) for user, index in uses)
        is_read_as_size = is_counted or any(user in found or _makes_integers(user) for user, _ in uses)
        is_output = any(output.is_graph_output() for output in node.outputs)
        depends = any(value in data for value in (*node.inputs, *node.outputs) if value is not None)
        if is_read_as_size and not is_output and (not depends or (is_counted and _is_one_number(node.outputs[0]))):
            found.add(node)
            if is_counted:
                counts.add(node)
    return found


def _is_one_number(value: ir.Value) -> bool:
    return value.shape is not None and all(size == 1 for size in value.shape)


def _makes_integers(node: ir.Node) -> bool:
    return node.op_type == "Cast" and ir.DataType(node.attributes["to"].as_int()).is_integer()


def _takes_size(node: ir.Node, index: int) -> bool:
    return node.op_type == "Range" or (node.op_type, index) in {("OneHot", 1), ("Resize", 2), ("Upsample", 1)}


def _kind(node: ir.Node) -> str | None:
    """The type that the node computes in; its results tell, or for comparisons its operands."""
    if node.op_type.startswith("QLinear") or node.op_type.endswith("Integer"):
        return "integers"
    for value in (*node.outputs, *node.inputs):
        if value is not None and isinstance(value.type, ir.TensorType) and value.dtype in _KINDS:
            return _KINDS[value.dtype]
    return None


def _grid(node: ir.Node) -> str | None:
    """The quantized type in which all operands of the node come, a bias excepted; None where one comes as a float."""
    grids: set[str] = set()
    for index, value in enumerate(node.inputs):
        if value is None or index == _BIAS.get(node.op_type) or value.dtype not in _KINDS:
            continue
        grid = _dequantized_from(value)
        if grid is None:
            return None
        grids.add(_grid_name(grid) or "")
    return " and ".join(sorted(grids)) or None


def _grid_name(dtype: ir.DataType | None) -> str | None:
    return None if dtype is None else _GRIDS.get(dtype, dtype.name.lower())


def _dequantized_from(value: ir.Value) -> ir.DataType | None:
    node = value.producer()
    while node is not None and node.op_type in _MOVES_ONE and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    source = node.inputs[0] if node is not None and node.op_type == "DequantizeLinear" else None
    return source.dtype if source is not None else None
