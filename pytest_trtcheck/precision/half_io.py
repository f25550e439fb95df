"""Inputs and outputs in 16 bits, as engines are deployed that are fed and read on the GPU.

It is a choice apart from the precision: what the model computes in between stays as it was lowered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import onnx_ir as ir
import onnx_ir.passes.common as passes

from pytest_trtcheck.model import graph as graphs
from pytest_trtcheck.precision import rewriting
from pytest_trtcheck.precision.half import DTYPES

if TYPE_CHECKING:
    from pytest_trtcheck.choices import HalfName

_FLOAT = ir.DataType.FLOAT


class HalfIo(NamedTuple):
    """The inputs and outputs that became 16-bit, by name, and what they became."""

    kind: HalfName
    inputs: list[str]
    outputs: list[str]


def to_half(model: ir.Model, kind: HalfName) -> HalfIo:
    """Make 16-bit of the FP32 inputs and outputs of a lowered model (as `graph.read` gives it), in place."""
    graph, dtype, names = model.graph, DTYPES[kind], graphs.Names(model)
    found = HalfIo(kind, [], [])
    for value in graph.inputs:
        if value.dtype != _FLOAT:
            continue
        found.inputs.append(value.name or "")
        value.dtype = dtype
        uses = [(user, index) for user, index in value.uses() if not _casts_to(user, dtype)]
        casts = [user for user, _ in value.uses() if _casts_to(user, dtype)]
        if uses:
            cast = _cast(value, _FLOAT, names)
            for user, index in uses:
                user.replace_input_with(index, cast.outputs[0])
            rewriting.insert_behind(value, [cast], graph)
        for cast in casts:
            cast.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
            assert cast.graph is not None
            cast.graph.remove(cast, safe=True)
    for index, value in enumerate(list(graph.outputs)):
        if value.dtype == _FLOAT:
            found.outputs.append(value.name or "")
            source = _cast_to_output(graph, value, dtype)
            _put_out(graph, index, source or _appended(graph, value, dtype, names), names)
    passes.RemoveUnusedNodesPass()(model)
    return found


def float_inputs(model: ir.Model, io: HalfIo) -> None:
    """Let the model take FP32 and round it itself, in place: what is emulated takes what the FP32 model takes."""
    graph, names = model.graph, graphs.Names(model)
    for value in graph.inputs:
        if value.name in io.inputs:
            value.dtype = _FLOAT
            cast = _cast(value, DTYPES[io.kind], names)
            rewriting.replace_in_outputs(graph, value, rewriting.interpose(value, [cast], graph))


def float_outputs(model: ir.Model, io: HalfIo) -> None:
    """Let the model give its 16-bit outputs as FP32, in place; after all that looks at what becomes of them."""
    graph, names = model.graph, graphs.Names(model)
    for index, value in enumerate(list(graph.outputs)):
        if value.name in io.outputs:
            _put_out(graph, index, _appended(graph, value, _FLOAT, names), names)


def _casts_to(node: ir.Node, dtype: ir.DataType) -> bool:
    return node.op_type == "Cast" and node.attributes["to"].as_int() == dtype


def _cast(value: ir.Value, dtype: ir.DataType, names: graphs.Names) -> ir.Node:
    word = dtype.name.lower()
    return rewriting.cast(value, dtype, *(names.unused(f"{value.name}_{each}") for each in (f"to_{word}", word)))


def _appended(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, names: graphs.Names) -> ir.Value:
    cast = _cast(value, dtype, names)
    graph.append(cast)
    return cast.outputs[0]


def _put_out(graph: ir.Graph, index: int, replacement: ir.Value, names: graphs.Names) -> None:
    value = graph.outputs[index]
    name, graph.outputs[index] = value.name, replacement
    value.name, replacement.name = names.unused(f"{name}_inside"), name


def _cast_to_output(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value | None:
    """What was cast from `dtype` to make an output of it, if it may itself be the output."""
    producer = value.producer()
    source = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else None
    maker = source.producer() if source is not None else None
    if source is None or maker is None or maker.graph is not graph:
        return None
    return source if source.dtype == dtype and not source.is_graph_output() else None
