"""A TensorFlow function as ONNX, by tf2onnx: what Keras models and SavedModels have in common.

tf2onnx is used, not Keras' own `export(format="onnx")`, which wraps it: that one refuses models that were not called
yet, loses the names of inputs and outputs, and takes the constants that a function captured for inputs (a Normalization
layer's mean). Tensors keep the names that they have in TensorFlow's graph, by which `origin` finds them again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_trtcheck.errors import ModelError, first_line, listed
from pytest_trtcheck.model.proto import all_nodes
from pytest_trtcheck.model.sources.tensorflow.library import failing, on_cpu, quiet
from pytest_trtcheck.model.sources.tensorflow.naming import add_scopes, layer_path, name_dimensions

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    import onnx

    from pytest_trtcheck.model.sources.tensorflow.function import Function


OPSET = 18
"""The newest that tf2onnx writes. TensorRT's Q/DQ per axis needs 13; `lower` raises it where a type needs more."""
_TENSORRT_OPERATOR = "TRTEngineOp"


def write(path: Path, function: Function, label: str) -> None:
    """Export a function to ONNX.

    Raises
    ------
    ModelError
        TensorFlow can't trace it, or ONNX has no form of one of its operators; the message names operator and layer.
    """
    import onnx

    from pytest_trtcheck.model import layer_norm

    if unranked := [name for name, spec in function.inputs.items() if spec.shape.rank is None]:
        raise ModelError(
            f"{label}: input {listed(map(repr, unranked))} has no number of dimensions, and would be exported as a "
            "single number",
            "give it a shape, whose sizes may be open: tf.TensorSpec([None, 16], …)",
            code="export-inputs",
        )
    with on_cpu(), failing(f"{label}: cannot be exported to ONNX"), quiet() as said:
        graph = _inlinable(_without_wrapping(function.frozen.graph.as_graph_def(add_shapes=True), function.frozen))
        proto = _converted(graph, function)
        _refuse_unknown(proto, label, said, function.layers)
        layer_norm.join(proto)
        name_dimensions(proto, function)
        for node in all_nodes(proto.graph.node):
            add_scopes(node, function.layers)
    try:
        onnx.save(proto, path)
    except ValueError as error:
        raise ModelError(
            f"{label}: is larger than the 2 GiB that one ONNX file holds",
            "convert it by `python -m tf2onnx.convert --large_model`, unpack what that writes, and give the path",
            code="model-size",
        ) from error


def _converted(graph: Any, function: Function) -> onnx.ModelProto:
    import tf2onnx

    inputs, outputs = ([tensor.name for tensor in each] for each in (function.frozen.inputs, function.frozen.outputs))
    handlers = {"Erfc": _erfc, "Expm1": _expm1}
    proto, _ = tf2onnx.convert.from_graph_def(
        graph,
        input_names=inputs,
        output_names=outputs,
        opset=OPSET,
        custom_op_handlers={name: (handler, []) for name, handler in handlers.items()},
        tensors_to_rename=dict(zip([*inputs, *outputs], [*function.inputs, *function.outputs], strict=True)),
    )
    converted: onnx.ModelProto = proto
    return converted


def refuse_engines(graph: Any, label: str) -> None:
    """Refuse a tf.GraphDef that TF-TRT made.

    Raises
    ------
    ModelError
        It holds engines of TensorRT.
    """
    if engines := [node.name for node in _nodes(graph) if node.op == _TENSORRT_OPERATOR]:
        raise ModelError(
            f"{label}: was converted by TF-TRT: it holds {_TENSORRT_OPERATOR} {listed(engines)}, whose own operators "
            "cannot be seen any more",
            "give the SavedModel or the Keras model that it was converted from",
            code="model-kind",
        )


def _nodes(graph: Any) -> list[Any]:
    return [*graph.node, *(node for function in graph.library.function for node in function.node_def)]


def _inlinable(graph: Any) -> Any:
    """The tf.GraphDef, its functions free to be inlined, which tf2onnx needs of them.

    Keras compiles grouped convolutions by XLA, and what must be compiled is left as it is.
    """
    for holder in (*_nodes(graph), *graph.library.function):
        for attribute in ("_XlaMustCompile", "_noinline"):
            holder.attr.pop(attribute, None)
    return graph


def _without_wrapping(graph: Any, frozen: Any) -> Any:
    """The tf.GraphDef of `frozen`, a table of n rows read at `i` and not at `i + n if i < 0 else i`.

    Keras writes the latter, because TensorFlow takes no negative index; ONNX's Gather does, and means the same by it.
    What is left tells that an input is an index, and how many rows there are.
    """
    import tensorflow as tf

    operations = {each.name: each for each in frozen.graph.get_operations()}

    def value(tensor: Any) -> Any:
        if tensor.op.type != "StridedSlice":
            return tf.get_static_value(tensor)
        # A size, which is an element of a constant shape.
        shape, begin, end, step = map(tf.get_static_value, tensor.op.inputs)
        is_element = all(each is not None and each.size == 1 for each in (begin, end, step)) and tensor.shape.rank == 0
        return shape[begin[0] : end[0] : step[0]].item() if is_element and shape is not None else None

    for node in graph.node:
        chosen = operations[node.name].inputs[1].op if node.op == "GatherV2" else None
        if chosen is None or chosen.type not in {"Select", "SelectV2"}:
            continue
        less, added, index = chosen.inputs[0].op, chosen.inputs[1].op, chosen.inputs[2]
        if less.type != "Less" or added.type not in {"Add", "AddV2"}:
            continue
        if not less.inputs[0].name == added.inputs[0].name == index.name:
            continue
        table, axis = operations[node.name].inputs[0], value(operations[node.name].inputs[2])
        if value(less.inputs[1]) == 0 and axis == 0 and value(added.inputs[1]) == table.shape[0]:
            node.input[1] = index.name.removesuffix(":0")
    return graph


def _erfc(context: Any, node: Any, name: str, _: object) -> None:
    """1 − erf(x), which tf2onnx does not know; Keras' exact GELU is made of it."""
    _less_one(context, node, name, "Erf", one_first=True)


def _expm1(context: Any, node: Any, name: str, _: object) -> None:
    """exp(x) − 1, which tf2onnx does not know."""
    _less_one(context, node, name, "Exp", one_first=False)


def _less_one(context: Any, node: Any, name: str, operator: str, *, one_first: bool) -> None:
    import numpy as np
    from tf2onnx import utils

    (output,) = node.output
    dtype, shape = context.get_dtype(output), context.get_shape(output)
    inputs = list(node.input)
    context.remove_node(node.name)
    one = context.make_const(f"{name}/one", np.ones((), utils.map_onnx_to_numpy_type(dtype))).output[0]
    value = context.make_node(operator, inputs, name=f"{name}/{operator}", dtypes=[dtype], shapes=[shape]).output[0]
    operands = [one, value] if one_first else [value, one]
    context.make_node("Sub", operands, name=name, outputs=[output], dtypes=[dtype], shapes=[shape])


def _refuse_unknown(proto: onnx.ModelProto, label: str, said: Sequence[str], layers: Collection[str]) -> None:
    """What tf2onnx could not convert it leaves in the graph under TensorFlow's name."""
    import onnx

    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    unknown = [
        node for node in all_nodes(proto.graph.node) if node.domain in {"", "ai.onnx"} and node.op_type not in known
    ]
    if unknown:
        found = dict.fromkeys(f"{node.op_type} in {layer_path(node.name, layers) or node.name}" for node in unknown)
        raise ModelError(
            f"{label}: cannot be exported to ONNX: tf2onnx has no ONNX form of TensorFlow's {listed(found, 5)}",
            "compute that part with other operators, or outside of the model",
            code="export-failed",
        )
    if failed := [each for each in said if "Failed to convert" in each]:
        raise ModelError(
            f"{label}: cannot be exported to ONNX: {listed(map(first_line, failed))}", code="export-failed"
        )
