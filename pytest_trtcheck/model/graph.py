"""Reading an ONNX file as a graph fit for rewriting, and writing it back, weights left on disk until they are needed.

Everything here costs an import of onnx_ir, so only code that changes a graph comes here: a check whose
lowered model is cached does not.
"""

from __future__ import annotations

import difflib
import logging
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from pytest_trtcheck.errors import ArgumentError, ModelError, UnforeseenError, first_line
from pytest_trtcheck.model.late import loaded_when_used
from pytest_trtcheck.model.onnx_model import explained, read_graph
from pytest_trtcheck.model.proto import LARGE_MODEL
from pytest_trtcheck.record.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

# Arithmetic with symbolic sizes alone uses them: most of what importing onnx_ir takes.
with loaded_when_used("sympy", "onnx_ir._symbolic_shapes"):
    import onnx_ir as ir
    import onnx_ir.passes.common as passes

EXTERNAL_DATA_THRESHOLD = LARGE_MODEL
"""Bytes of weights above which they are written beside the model: they are not copied in memory then, and protobuf ends
at 2 GiB."""
ONNX_DOMAINS = frozenset({"", "ai.onnx"})
_READ_ANEW_BYTES = 1 << 16
_WHOLE_BYTE = 8
_IR_VERSION_WITH_CONSTANTS = 4
_OPSET = 19
_OPSET_OF_SCAN = 9
"""From it on, Scan has no batch dimension of its own."""
_OPSET_OF_RESIZE = 11
"""From it on, Resize is told which places it reads, and half a pixel off is the default."""
_OPSETS_OF_DROPOUT = (10, 12)
"""From them on, Dropout's mask is no float any more, and says of what is kept that it is."""
_OPSET_OF_ONE_AXIS = 13
"""From it on, Hardmax and Softmax look along one axis, the last unless they name it, not along all from one on."""
_GIVEN_NAME = "pytest_trtcheck.given_name"
_FUNCTION_CALLS = "pytest_trtcheck.function_calls"


def _without_traceback(record: logging.LogRecord) -> bool:
    record.exc_info = None
    return True


# Of a model whose types contradict each other: that it says so is enough, what comes of it is ours to say.
logging.getLogger("onnx_ir.passes.common.shape_inference").addFilter(_without_traceback)


def read(path: Path) -> ir.Model:
    """The model at `path`: functions inlined, constants as initializers, every node named, types inferred.

    External data stays on disk; a large weight is read into memory while it is used, and no longer.

    Raises
    ------
    ModelError
        The file is no ONNX model or its graph cannot be understood.
    """
    try:
        model = ir.from_proto(read_graph(path))
        # They would be inlined as well, however much they stand for.
        passes.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
        calls = tuple(_function_calls(model))
        passes.InlinePass()(model)
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        passes.RemoveInitializersFromInputsPass()(model)
    except Exception as error:
        found = explained(error, path, str(path))
        if isinstance(found, UnforeseenError):  # a model that ONNX's checker takes, and its graph library does not
            found = ModelError(f"{path}: its graph is not understood: {first_line(error)}", "export it again")
        raise found from error
    for value in initializers(model.graph):
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = _read_anew(value.const_value)
    # Up to version 3, initializers had to be inputs as well.
    model.ir_version = max(model.ir_version, _IR_VERSION_WITH_CONSTANTS)
    # A model of other domains' operators alone gets casts of ONNX's.
    model.opset_imports.setdefault("", _OPSET)
    name_nodes(model)
    model = infer_types(model)
    model.meta[_FUNCTION_CALLS] = calls
    return model


def function_calls(model: ir.Model) -> tuple[tuple[str, ir.OperatorIdentifier], ...]:
    """The nodes of the file that called functions of the model's own, by name, and what they called."""
    found: tuple[tuple[str, ir.OperatorIdentifier], ...] = model.meta.get(_FUNCTION_CALLS, ())
    return found


def _function_calls(model: ir.Model) -> Iterator[tuple[str, ir.OperatorIdentifier]]:
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()] if model.functions else []
    for each in graphs:
        for node in ir.traversal.RecursiveGraphIterator(each):
            if node.op_identifier() in model.functions:
                yield node.name or node.outputs[0].name or "", node.op_identifier()


def _read_anew(tensor: ir.ExternalTensor) -> ir.LazyTensor | ir.Tensor[Any] | ir.TensorProtoTensor:
    """A weight in a file, a large one read each time it is used: onnx-ir's own keeps its pages until the model is gone.

    It is not mapped: who cuts off a file that is mapped here would end the session, and not this check alone.
    """

    def read_now() -> ir.Tensor[Any] | ir.TensorProtoTensor:
        try:
            with open_regular(tensor.path) as file:
                file.seek(tensor.offset or 0)
                raw = file.read(tensor.nbytes)
            problem = "is cut off" if len(raw) < tensor.nbytes else None
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
        if problem is not None:
            raise ModelError(
                f"{tensor.path}: was changed during the check: weight {tensor.name} {problem}",
                "run the test again",
                code="model-changed",
            )
        if tensor.dtype.bitwidth < _WHOLE_BYTE:  # several elements share one
            proto = onnx.TensorProto(
                name=tensor.name, data_type=tensor.dtype.value, dims=tensor.shape.numpy(), raw_data=raw
            )
            return ir.TensorProtoTensor(proto)
        array = np.frombuffer(raw, tensor.dtype.numpy()).reshape(tensor.shape.numpy())
        return ir.Tensor(array, tensor.dtype, shape=tensor.shape, name=tensor.name)

    if tensor.nbytes < _READ_ANEW_BYTES:
        return read_now()
    return ir.LazyTensor(read_now, tensor.dtype, tensor.shape, name=tensor.name)


def infer_types(model: ir.Model) -> ir.Model:
    """Fill in the types and shapes of every value that ONNX's own inference, or its operators' schemas, can tell."""
    # Data propagation is off: it fails on real models whose shape arithmetic the checker does not follow.
    model = passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model).model
    for node in all_nodes(model.graph):
        schema = schema_of(node, model)
        if schema is not None:
            _infer_containers(node, schema)
            _infer_from_schema(node, schema)
    return model


def _infer_containers(node: ir.Node, schema: onnx.defs.OpSchema) -> None:
    """Sequences and optionals, of which onnx-ir's inference makes tensors of their elements' type."""
    allowed = {each.type_param_str: each.allowed_type_strs for each in schema.type_constraints}
    carried: Sequence[ir.Value | None] = ()
    if node.op_type == "Identity":
        carried = node.inputs
    elif node.op_type == "If":
        carried = next(bodies(node)).outputs
    elif node.op_type == "Loop":
        carried = next(bodies(node)).outputs[1:]
    for index, value in enumerate(node.outputs):
        kinds = allowed.get(formal_parameter(schema.outputs, index).type_str, ())
        source = carried[index] if index < len(carried) else None
        if source is not None and isinstance(source.type, (ir.SequenceType, ir.OptionalType)):
            value.type = source.type
        elif kinds and value.dtype is not None and not isinstance(value.type, (ir.SequenceType, ir.OptionalType)):
            element = ir.TensorType(value.dtype)
            if all(kind.startswith("seq(") for kind in kinds):
                value.type = ir.SequenceType(element)
            elif all(kind.startswith("optional(") for kind in kinds):
                value.type = ir.OptionalType(element)


def _infer_from_schema(node: ir.Node, schema: onnx.defs.OpSchema) -> None:
    """Values that a schema ties to one type have it as soon as one of them is known.

    ONNX's inference stops at an operator that it does not know, one of another domain; what is behind it still
    meets weights whose type is known.
    """
    tied: dict[str, list[ir.Value]] = {}
    for formals, values in ((schema.inputs, node.inputs), (schema.outputs, node.outputs)):
        for index, value in enumerate(values):
            if value is not None and value.name:
                formal = formal_parameter(formals, index)
                if formal.is_homogeneous:
                    tied.setdefault(formal.type_str, []).append(value)
    constraints = {each.type_param_str for each in schema.type_constraints}
    for kind, values in tied.items():
        known = next((value.type for value in values if value.type is not None), None)
        if kind in constraints and isinstance(known, ir.TensorType):
            for value in values:
                if value.type is None:
                    value.type = ir.TensorType(known.dtype)


def schema_of(node: ir.Node, model: ir.Model) -> onnx.defs.OpSchema | None:
    """What ONNX says of the node's operator in the model's opset; None for operators that are not ONNX's."""
    version = model.opset_imports.get(node.domain, 1)
    domain = "" if node.domain in ONNX_DOMAINS else node.domain
    return onnx.defs.get_schema(node.op_type, version, domain) if onnx.defs.has(node.op_type, version, domain) else None


def formal_parameter(parameters: Any, index: int) -> onnx.defs.OpSchema.FormalParameter:
    """A schema's parameter at `index`; the last one may stand for many."""
    sequence: list[onnx.defs.OpSchema.FormalParameter] = list(parameters)
    return sequence[min(index, len(sequence) - 1)]


def is_tensor(value: ir.Value | None, dtype: ir.DataType) -> bool:
    """Whether `value` is a tensor of `dtype`; sequences and optionals of such tensors are none."""
    return value is not None and isinstance(value.type, ir.TensorType) and value.dtype == dtype


def op_types(text: str) -> frozenset[str]:
    """The operators named in `text`, with white space between them."""
    return frozenset(text.split())


def made_by(value: ir.Value | None, op_type: str) -> bool:
    """Whether a node of this operator computes `value`."""
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == op_type


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """The node's input at `index`; None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def name_nodes(model: ir.Model) -> None:
    """Give every node a name of its own, since `keep_fp32`, blame and TensorRT's messages all speak of names.

    A node that shares its name with an earlier one goes by a new name, and remembers the one that it was given.
    """
    names = Names(model)
    seen: set[str] = set()
    for index, node in enumerate(all_nodes(model.graph)):
        given = node.name
        if not given:
            node.name = names.unused(f"{node.op_type}_{index}")
        elif given in seen:
            node.name = names.unused(f"{given}_{index}")
            node.metadata_props[_GIVEN_NAME] = given
        seen.add(node.name or "")


class Names:
    """Names that no value and no node of `model` bears, its inner graphs' included."""

    def __init__(self, model: ir.Model) -> None:
        self._taken: set[str | None] = set()
        for graph in all_graphs(model.graph):
            self._taken |= {value.name for value in (*graph.inputs, *graph.initializers.values())}
            for node in graph:
                self._taken |= {node.name, *(value.name for value in node.outputs)}

    def unused(self, name: str) -> str:
        """`name`, with a number behind it where it is taken; it is taken from now on."""
        candidate, number = name, 1
        while candidate in self._taken:
            candidate, number = f"{name}_{number}", number + 1
        self._taken.add(candidate)
        return candidate


def all_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes of `graph` and of the graphs inside its If, Loop and Scan nodes."""
    yield from ir.traversal.RecursiveGraphIterator(graph)


def all_graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    """`graph` and the graphs inside its If, Loop and Scan nodes, those without a node too."""
    yield graph
    for node in graph:
        for inner in bodies(node):
            yield from all_graphs(inner)


def bodies(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs inside an If, Loop or Scan node."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def write(model: ir.Model, path: Path) -> bool:
    """Write `model`, with its weights in `<path>.data` when they are too large for one protobuf file, and say if so.

    Where two values or two nodes go by one name, the later one is renamed; inputs and outputs keep theirs.
    """
    _tell_apart(model)
    weights = sum(value.const_value.nbytes for value in initializers(model.graph) if value.const_value is not None)
    is_large = weights > EXTERNAL_DATA_THRESHOLD
    if is_large:
        ir.save(model, path, external_data=f"{path.name}.data")
    else:
        ir.external_data.load_to_model(model)
        ir.save(model, path)
    return is_large


def _tell_apart(model: ir.Model) -> None:
    names = Names(model)

    def visit(graph: ir.Graph, outer: Mapping[str | None, ir.Value]) -> None:
        seen = dict(outer)
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
            seen.setdefault(value.name, value)
        for node in graph:
            for value in node.outputs:
                if value.name and seen.setdefault(value.name, value) is not value:
                    value.name = names.unused(value.name)
                    seen[value.name] = value
        for node in graph:
            for inner in bodies(node):
                visit(inner, seen)

    visit(model.graph, {})
    nodes: set[str | None] = set()
    for node in all_nodes(model.graph):
        if node.name in nodes:
            node.name = names.unused(node.name or node.op_type)
        nodes.add(node.name)


def initializers(graph: ir.Graph) -> Iterable[ir.Value]:
    """The initializers of `graph` and of its inner graphs."""
    for each in all_graphs(graph):
        yield from each.initializers.values()


def matching_nodes(model: ir.Model, globs: Collection[str], argument: str = "keep_fp32") -> frozenset[str]:
    """The names of the nodes that any of `globs` matches, all of them where several nodes were given one name.

    Raises
    ------
    ArgumentError
        A glob matches no node; `argument` is named, with the nodes that come closest.
    """
    matched: set[str] = set()
    for glob in globs:
        found = _matched(model, glob)
        if not found:
            names = [node.name or "" for node in all_nodes(model.graph)]
            near = difflib.get_close_matches(glob, names, n=3, cutoff=0.4) or names[:3]
            raise ArgumentError(
                f"{argument}: no node is called {glob!r}",
                f"the nearest names are {', '.join(near)}",
                code="node-unknown",
            )
        matched |= found
    return frozenset(matched)


def still_there(model: ir.Model, globs: Collection[str]) -> tuple[str, ...]:
    """Those of `globs`, which match nodes of the user's model, that match one of what was made of it.

    A cast of a constant, a batch normalization or the Transpose of a weight may be worked away by then.
    """
    return tuple(glob for glob in globs if _matched(model, glob))


def _matched(model: ir.Model, glob: str) -> set[str]:
    # A name may itself hold brackets, so the literal name counts as well as the pattern.
    return {
        node.name or ""
        for node in all_nodes(model.graph)
        for known in (node.name or "", node.metadata_props.get(_GIVEN_NAME))
        if known is not None and (known == glob or fnmatchcase(known, glob))
    }


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
    for node in all_nodes(model.graph):
        # ONNX's converter leaves these as they are, which means something else from then on.
        is_scan = node.op_type == "Scan" and before < _OPSET_OF_SCAN
        is_hardmax = node.op_type == "Hardmax" and before < _OPSET_OF_ONE_AXIS <= version
        is_dropout = node.op_type == "Dropout" and any(before < each <= version for each in _OPSETS_OF_DROPOUT)
        if is_dropout and not _is_used(node, 1):
            node.resize_outputs(1)
        if is_scan or (is_hardmax and not is_along_last(node, before)) or (is_dropout and len(node.outputs) > 1):
            raise _not_converted(before, version, f"a {node.op_type} of opset {before} cannot be converted")
        if is_hardmax:
            node.attributes["axis"] = ir.AttrInt64("axis", -1)
    metadata = {node.name: dict(node.metadata_props) for node in all_nodes(model.graph) if node.metadata_props}
    weights = _set_aside(model.graph)
    try:
        ir.external_data.load_to_model(model)
        converted = onnx.version_converter.convert_version(ir.to_proto(model), version)
    except Exception as error:
        raise _not_converted(before, version, f"converting it failed: {error}") from error
    raised = ir.from_proto(converted)
    for value in list(raised.graph.inputs):
        if value.name in weights:
            raised.graph.inputs.remove(value)
            value.const_value = weights[value.name]
            raised.graph.register_initializer(value)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(raised)
    for node in all_nodes(raised.graph):
        node.metadata_props.update(metadata.get(node.name, {}))
        if node.op_type == "Resize" and before < _OPSET_OF_RESIZE:
            # What Upsample and the first Resize did, and the converter does not say.
            node.attributes["coordinate_transformation_mode"] = ir.AttrString(
                "coordinate_transformation_mode", "asymmetric"
            )
            scales = _scales(node, 2)
            skips = skips_elements(node, 2)
            if skips and max(scales) > 1:
                what = f"a Resize of opset {before} that makes one side larger and one smaller cannot be converted"
                raise _not_converted(before, version, what)
            node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "ceil" if skips else "floor")
    name_nodes(raised)
    return infer_types(raised)


def _not_converted(before: int, version: int, why: str) -> ModelError:
    return ModelError(
        f"the model is in opset {before}, this precision needs {version}, and {why}",
        f"export the model in opset {version} or later",
        code="opset-conversion",
    )


def skips_elements(resize: ir.Node, index: int) -> bool:
    """Whether a Resize of opset 10, with its scales at `index`, takes its elements from between those of its input.

    Where a side gets smaller, ONNX Runtime takes the next one then, and TensorRT the one before.
    """
    if resize.attributes.get_string("mode", "nearest") != "nearest":
        return False
    steps = [1 / scale for scale in _scales(resize, index) if 0 < scale < 1]
    return any(abs(step - round(step)) > _EXACT * step for step in steps)


_EXACT = 1e-6
"""The part that a scale of FP32 may be off by."""


def _scales(resize: ir.Node, index: int) -> list[float]:
    value = operand(resize, index)
    return [] if value is None or value.const_value is None else [float(each) for each in value.const_value.numpy()]


def _is_used(node: ir.Node, index: int) -> bool:
    output = node.outputs[index] if index < len(node.outputs) else None
    return output is not None and (bool(output.uses()) or output.is_graph_output())


def is_along_last(node: ir.Node, opset: int) -> bool:
    """Whether a Hardmax or Softmax of an opset looks along the last axis alone."""
    default = -1 if opset >= _OPSET_OF_ONE_AXIS else 1
    axis, data = node.attributes.get_int("axis", default), node.inputs[0]
    return axis == -1 or (data is not None and data.shape is not None and axis == len(data.shape) - 1)


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
