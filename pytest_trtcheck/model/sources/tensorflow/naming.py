"""What is named in an export of TensorFlow: sizes that are left open, and the layer that a node is in."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from pytest_trtcheck.model.sources.exported import SCOPES

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import onnx

    from pytest_trtcheck.model.sources.tensorflow.function import Function


_BATCH = "batch"
_SIZES = {True: (2, 3), False: (64, 96)}
"""Two sizes for a dimension that is left open: of the batch, and of another, which five strides of 2 divide."""


def name_dimensions(proto: onnx.ModelProto, function: Function) -> None:
    """Give a size that is left open one name wherever it occurs: the batch, and the others by input and axis."""
    names = {
        (name, axis): _BATCH if axis == 0 else f"{name}_{axis}"
        for name, spec in function.inputs.items()
        if spec.shape.rank is not None
        for axis, size in enumerate(spec.shape)
        if size is None
    }
    follows = _following(function, names)
    for value in proto.graph.value_info:
        _name_open(value, {})
    for value in proto.graph.input:
        _name_open(value, {axis: symbol for (name, axis), symbol in names.items() if name == value.name})
    for value in proto.graph.output:
        _name_open(value, follows.get(value.name, {}))


def _name_open(value: onnx.ValueInfoProto, names: Mapping[int, str]) -> None:
    for axis, dim in enumerate(value.type.tensor_type.shape.dim):
        if not dim.HasField("dim_value") or dim.dim_value < 0:
            dim.Clear()
            if axis in names:
                dim.dim_param = names[axis]


def _following(function: Function, names: Mapping[tuple[str, int], str]) -> dict[str, dict[int, str]]:
    """Which axes of the outputs have the size of an open dimension of the inputs, told by TensorFlow's own inference.

    Each dimension has one size, then another; what changes from the one to the other follows it.
    """
    symbols = list(dict.fromkeys(names.values()))
    sizes = {symbol: _SIZES[symbol == _BATCH] for symbol in symbols}
    usual = {symbol: sizes[symbol][0] for symbol in symbols}
    base = _output_shapes(function, names, usual)
    found: dict[str, dict[int, str]] = {}
    for symbol in symbols:
        varied = _output_shapes(function, names, {**usual, symbol: sizes[symbol][1]})
        for name, shape in base.items():
            other = varied.get(name, ())
            for axis, pair in enumerate(zip(shape, other, strict=False)):
                if pair == sizes[symbol]:
                    found.setdefault(name, {})[axis] = symbol
    return found


def _output_shapes(
    function: Function, names: Mapping[tuple[str, int], str], sizes: Mapping[str, int]
) -> dict[str, tuple[int | None, ...]]:
    """The outputs' shapes for these sizes; nothing where the function does not take them."""
    import tensorflow as tf

    specs = [
        tf.TensorSpec(
            [sizes[names[name, axis]] if (name, axis) in names else size for axis, size in enumerate(spec.shape)]
            if spec.shape.rank is not None
            else None,
            spec.dtype,
        )
        for name, spec in function.inputs.items()
    ]
    try:
        traced = function.traced_with(specs)
    except Exception:
        return {}
    shapes = {name: spec.shape for name, spec in traced.structured_outputs.items()}
    return {name: tuple(shape) for name, shape in shapes.items() if shape.rank is not None}


def layer_path(node: str, layers: Collection[str]) -> str:
    """The layer that a node of TensorFlow's graph is in, "encoder/attention/query"; empty where it is in none.

    TensorFlow makes a scope's name unique by a number behind it, which is taken off where a layer has the name without.
    """
    scopes = []
    for scope in node.split("/")[:-1]:
        plain = re.sub(r"_\d+$", "", scope)
        scopes.append(scope if scope in layers else plain)
    named = [scope for scope in scopes if scope in layers]
    if layers:
        return "/".join(named)
    return "/".join(scope for scope in node.split("/")[:-1] if "PartitionedCall" not in scope)


def add_scopes(node: onnx.NodeProto, layers: Collection[str]) -> None:
    """Write into a node which layers it is in, the outermost first."""
    parts = layer_path(node.name, layers).split("/")
    if parts != [""]:
        scopes = ["/".join(parts[: end + 1]) for end in range(len(parts))]
        node.metadata_props.add(key=SCOPES, value=json.dumps(scopes))
