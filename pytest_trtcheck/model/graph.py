"""Reading an ONNX file as a graph fit for rewriting, and writing it back, weights left on disk until they are needed.

Everything here costs an import of onnx_ir (0.4 s), so only code that changes a graph comes here: a check whose
lowered model is cached does not.
"""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import onnx_ir as ir
import onnx_ir.passes.common as passes

from pytest_trtcheck.errors import ArgumentError, ModelError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from pathlib import Path

EXTERNAL_DATA_THRESHOLD = 64 << 20
"""Bytes of weights above which they are written beside the model: they are not copied in memory then, and protobuf ends
at 2 GiB."""


def read(path: Path) -> ir.Model:
    """The model at `path`: functions inlined, constants as initializers, every node named, types inferred.

    External data stays on disk, memory-mapped when a weight is used.

    Raises
    ------
    ModelError
        The file is no ONNX model or its graph cannot be understood.
    """
    try:
        model = ir.load(path)
    except Exception as error:
        raise ModelError(f"{path}: not a readable ONNX model: {error}") from error
    passes.InlinePass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.RemoveInitializersFromInputsPass()(model)
    name_nodes(model)
    return infer_types(model)


def infer_types(model: ir.Model) -> ir.Model:
    """Fill in the types and shapes of every value that ONNX's own inference can tell."""
    # Data propagation is off: it fails on real models whose shape arithmetic the checker does not follow.
    return passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model).model


def name_nodes(model: ir.Model) -> None:
    """Give every node a name of its own, since `keep_fp32`, blame and TensorRT's messages all speak of names."""
    seen: set[str] = set()
    for index, node in enumerate(all_nodes(model.graph)):
        name = node.name or f"{node.op_type}_{index}"
        while name in seen:
            name = f"{name}_{index}"
        seen.add(name)
        node.name = name


def all_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes of `graph` and of the graphs inside its If, Loop and Scan nodes."""
    yield from ir.traversal.RecursiveGraphIterator(graph)


def write(model: ir.Model, path: Path) -> None:
    """Write `model`, with its weights in `<path>.data` when they are too large for one protobuf file."""
    weights = sum(value.const_value.nbytes for value in initializers(model.graph) if value.const_value is not None)
    if weights > EXTERNAL_DATA_THRESHOLD:
        ir.save(model, path, external_data=f"{path.name}.data")
    else:
        ir.external_data.load_to_model(model)
        ir.save(model, path)


def initializers(graph: ir.Graph) -> Iterable[ir.Value]:
    """The initializers of `graph` and of its inner graphs."""
    graphs = {id(graph): graph}
    for node in all_nodes(graph):
        if isinstance(node.graph, ir.Graph):
            graphs.setdefault(id(node.graph), node.graph)
    for each in graphs.values():
        yield from each.initializers.values()


def weight_bytes(path: Path) -> int:
    """Bytes of the model file and its weights; cheap, for error messages and limits."""
    data = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


def matching_nodes(model: ir.Model, globs: Collection[str], argument: str = "keep_fp32") -> frozenset[str]:
    """The names of the nodes that any of `globs` matches.

    Raises
    ------
    ArgumentError
        A glob matches no node; `argument` is named, with the nodes that come closest.
    """
    names = [node.name or "" for node in all_nodes(model.graph)]
    matched: set[str] = set()
    for glob in globs:
        # A name may itself hold brackets, so the literal name counts as well as the pattern.
        found = {name for name in names if name == glob or fnmatchcase(name, glob)}
        if not found:
            near = difflib.get_close_matches(glob, names, n=3, cutoff=0.4) or names[:3]
            raise ArgumentError(f"{argument}: no node is called {glob!r}", f"the nearest names are {', '.join(near)}")
        matched |= found
    return frozenset(matched)


def opset(model: ir.Model) -> int:
    """The version of ONNX's own operators that the model uses."""
    return model.opset_imports.get("", 1)


def at_least_opset(model: ir.Model, version: int) -> ir.Model:
    """The same model in at least this opset, which Q/DQ by channel (13), BF16 (13) or FP8 (19) need.

    Raises
    ------
    ModelError
        ONNX's converter cannot raise the model's version.
    """
    if opset(model) >= version:
        return model
    import onnx.version_converter

    before = opset(model)
    weights = _set_aside(model.graph)
    try:
        ir.external_data.load_to_model(model)
        converted = onnx.version_converter.convert_version(ir.to_proto(model), version)
    except Exception as error:
        raise ModelError(
            f"the model is in opset {before}, this precision needs {version}, and converting it failed: {error}",
            f"export the model in opset {version} or later",
        ) from error
    raised = ir.from_proto(converted)
    for value in list(raised.graph.inputs):
        if value.name in weights:
            raised.graph.inputs.remove(value)
            value.const_value = weights[value.name]
            raised.graph.register_initializer(value)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(raised)
    name_nodes(raised)
    return infer_types(raised)


_SET_ASIDE_BYTES = 1 << 10


def _set_aside(graph: ir.Graph) -> dict[str, ir.TensorProtocol]:
    """Make inputs of the large weights, and return them: ONNX's converter copies all that it is given several times."""
    weights: dict[str, ir.TensorProtocol] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > _SET_ASIDE_BYTES and not value.is_graph_output():
            weights[name] = tensor
            del graph.initializers[name]
            value.const_value, value.dtype, value.shape = None, tensor.dtype, ir.Shape(list(tensor.shape.numpy()))
            graph.inputs.append(value)
    return weights
