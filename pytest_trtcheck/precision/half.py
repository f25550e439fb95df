"""Lowering to 16-bit floats: the FP32 model becomes an FP16 or BF16 model, as a strongly typed TensorRT runs it.

So does the rest of a model with Q/DQ nodes ("int8+fp16"). These take the type of what is around them, scales included,
as ONNX, TensorRT's layers and NVIDIA's Model Optimizer have it.

Every operator whose ONNX schema admits FP16 for a tensor gets that tensor in the 16-bit type; a tensor that the schema
fixes at FP32 (Resize's scales, NonMaxSuppression's boxes, …) stays as it is, and so does a node that TensorRT has no
16-bit kernel for (`families.kernels`), which is said. The model's own inputs and outputs stay FP32, with a Cast behind
or before them, as engines are usually deployed. Nothing is protected in secret: what must stay in FP32 is named by the
user in `keep_fp32`. Sizes that are computed as floats are no data, and stay FP32.

Constants that the type can't hold become its largest finite value, wherever they stand (initializers, the fill of
ConstantOfShape, the padding of old Pads): TensorRT converts weights so, and infinity times 0 would be NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from pytest_trtcheck.model import graph as graphs
from pytest_trtcheck.precision import constants, families, rewriting, survey
from pytest_trtcheck.precision.families.kernels import halves

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from numpy.typing import NDArray

    from pytest_trtcheck.choices import HalfName

DTYPES: dict[HalfName, ir.DataType] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
LARGEST: dict[HalfName, float] = {"fp16": 65504.0, "bf16": 3.3895313892515355e38}
_FLOAT = ir.DataType.FLOAT
_KEPT_OPERATORS = frozenset(
    ["If", "Loop", "Scan", "BitCast", "Constant", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"]
)
"""Control flow keeps its edges in FP32 (its inner nodes are lowered); Q/DQ keeps the types of its scales, and BitCast
the width of its bits."""
_FLOAT_BY_DEFAULT = {
    "RandomNormal": "dtype",
    "RandomUniform": "dtype",
    "MelWeightMatrix": "output_datatype",
}
"""The attribute that says FP32 by not being there."""


@dataclass(frozen=True)
class ChangedConstant:
    """A constant of which the 16-bit type cannot hold what matters.

    Parameters
    ----------
    name
        The tensor's name.
    value
        Overflow: the largest of the finite magnitudes that became the type's largest finite value. Underflow: the
        largest magnitude of a constant all of which became 0.
    count, size
        How many elements were changed so, and how many there are.
    readers
        The nodes that read it in 16 bits.
    """

    name: str
    value: float
    count: int
    size: int
    readers: tuple[str, ...] = ()


@dataclass(frozen=True)
class HalfModel:
    """The lowered model, and what happened on the way.

    Parameters
    ----------
    overflow
        Constants with finite values beyond the type's range, which became the largest value of the type.
    underflow
        Constants that were not 0 and are 0 now, in every element.
    left
        Why nodes with FP32 operands were not lowered, by name.
    without_kernel
        Those of them that TensorRT has no 16-bit kernel for: their operators by name.
    """

    model: ir.Model
    overflow: tuple[ChangedConstant, ...] = ()
    underflow: tuple[ChangedConstant, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    without_kernel: Mapping[str, str] = field(default_factory=dict)


QDQ_OPSET = 19
"""The first opset with 16-bit scales."""


def to_half(model: ir.Model, kind: HalfName, keep_fp32: Collection[str] = (), *, around_qdq: bool = False) -> HalfModel:
    """Lower an FP32 model (as `graph.read` gives it) in place.

    Parameters
    ----------
    keep_fp32
        Globs of the names of nodes that stay in FP32.
    around_qdq
        Whether the Q/DQ nodes of the model stand between 16-bit values from now on; otherwise they and the operators
        that read them stay FP32.

    Raises
    ------
    ArgumentError
        A glob of `keep_fp32` matches no node.
    ModelError
        The model's opset is too old for the type and can't be raised.
    """
    kept = graphs.matching_nodes(model, keep_fp32)
    if around_qdq or kind == "bf16":
        model = graphs.at_least_opset(model, QDQ_OPSET if around_qdq else 13)
    constants.fold_casts(model)
    lowering = _Lowering(model, kind)
    sizes = survey.shape_arithmetic(model)
    without_kernel = {name: op for name, op in families.without_kernel(model, kind).items() if name not in kept}
    for node in list(graphs.all_nodes(model.graph)):
        name = node.name or ""
        if name in kept:
            lowering.left[name] = "named in keep_fp32"
        elif name in without_kernel:
            lowering.left[name] = f"TensorRT has no {kind} kernel for {without_kernel[name]}"
        elif not around_qdq and _reads_dequantized(node):
            lowering.left[name] = f"its products do not fit {kind}"
        elif node not in sizes and not _reads_sizes(node, sizes):
            _lower_node(node, model, lowering)
    if around_qdq:
        _lower_qdq(model, lowering)
    lowering.connect(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    overflow, underflow = (tuple(lowering.found(what)) for what in ("overflow", "underflow"))
    return HalfModel(model, overflow, underflow, lowering.left, without_kernel)


def _reads_sizes(node: ir.Node, sizes: Collection[ir.Node]) -> bool:
    """Whether the node makes integers of sizes, of which FP16 holds none beyond 2048 for certain, BF16 256."""
    source = node.inputs[0].producer() if node.op_type == "Cast" and node.inputs and node.inputs[0] else None
    return source in sizes


def _reads_dequantized(node: ir.Node) -> bool:
    producers = (value.producer() for value in node.inputs if value is not None)
    return any(each is not None and each.op_type == "DequantizeLinear" for each in producers)


class _Lowering:
    """Which values are 16-bit now, and which operands want them so; casts come last, where the two disagree."""

    def __init__(self, model: ir.Model, kind: HalfName) -> None:
        self.dtype = DTYPES[kind]
        self.largest = LARGEST[kind]
        self.half: set[ir.Value] = set()
        self.wants_half: set[tuple[ir.Node, int]] = set()
        self.left: dict[str, str] = {}
        self._suffix = self.dtype.name.lower()
        self._names = graphs.Names(model)
        self._changed: list[tuple[str, ChangedConstant, Callable[[], tuple[str, ...]]]] = []

    def found(self, what: str) -> list[ChangedConstant]:
        """The constants that overflowed or underflowed, with who reads them now."""
        return [replace(each, readers=readers()) for kind, each, readers in self._changed if kind == what]

    def connect(self, graph: ir.Graph) -> None:
        """Give every operand the type that it wants, with one Cast a value, and keep the graphs' outputs FP32."""
        twins: dict[ir.Value, ir.Value] = {}
        for node in list(graphs.all_nodes(graph)):
            for index, value in enumerate(node.inputs):
                if value is None or not graphs.is_tensor(value, _FLOAT):
                    continue
                if ((node, index) in self.wants_half) != (value in self.half):
                    twin = twins[value] = twins.get(value) or self._twin(value, graph)
                    node.replace_input_with(index, twin)
        for each in list(graphs.all_graphs(graph)):
            self._restore_outputs(each, twins)
        for value in self.half:
            value.dtype = self.dtype

    def converted(self, array: NDArray[Any]) -> NDArray[Any]:
        """The array in the 16-bit type, finite values beyond its range as the largest one."""

        def in_range(block: NDArray[Any]) -> NDArray[Any]:
            return np.where(np.isfinite(block), np.clip(block, -self.largest, self.largest), block)

        return rewriting.by_element(in_range, array, self.dtype.numpy())

    def holds(self, scale: ir.Value | None) -> bool:
        """Whether the 16-bit type has a number for each of a constant's, none of them 0 or infinite."""
        tensor = constants.stored(scale)
        if tensor is None or tensor.dtype != _FLOAT:
            return False
        with np.errstate(over="ignore"):
            held = tensor.numpy().astype(self.dtype.numpy()).astype(np.float32)
        return bool((np.isfinite(held) & (held != 0)).all())

    def note(self, name: str, array: NDArray[Any], readers: Callable[[], tuple[str, ...]]) -> None:
        """Remember a constant that overflows, or of which nothing is left."""
        if not array.size or array.dtype.kind in "OSU":
            return
        peak = max(abs(array.max()), abs(array.min()))
        if peak <= self.largest:
            if not peak or self.converted(peak).any():
                return
            what, count = "underflow", np.count_nonzero(array)
        else:
            magnitude = np.abs(array)
            changed = (magnitude > self.largest) & np.isfinite(array)
            what, count, peak = "overflow", changed.sum(), magnitude[changed].max(initial=0)
            if not count:
                return
        found = ChangedConstant(name, float(peak), int(count), array.size)
        self._changed.append((what, found, readers))

    def _twin(self, value: ir.Value, main: ir.Graph) -> ir.Value:
        """`value` in the other of the two types."""
        to_half = value not in self.half
        tensor = constants.stored(value) if to_half else None
        if tensor is not None:
            return self._half_weight(value, tensor)
        cast = self._cast(value)
        rewriting.insert_behind(value, [cast], value.graph or main)
        return cast.outputs[0]

    def _cast(self, value: ir.Value) -> ir.Node:
        dtype, suffix = (_FLOAT, "fp32") if value in self.half else (self.dtype, self._suffix)
        names = (self._names.unused(f"{value.name}_{word}") for word in (f"to_{suffix}", suffix))
        return rewriting.cast(value, dtype, *names)

    def _half_weight(self, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        name, shape = self._names.unused(f"{value.name}_{self._suffix}"), tensor.shape.numpy()
        half = rewriting.lazy(name, self.dtype, shape, lambda: self.converted(tensor.numpy()))
        producer = value.producer()
        twin = rewriting.initializer(value.graph if producer is None else producer.graph, half)
        self.note(value.name or "", tensor.numpy(), lambda: tuple(dict.fromkeys(u.name or "" for u, _ in twin.uses())))
        return twin

    def _restore_outputs(self, graph: ir.Graph, twins: dict[ir.Value, ir.Value]) -> None:
        for index, value in enumerate(graph.outputs):
            if value not in self.half:
                continue
            producer = value.producer()
            if producer is None or producer.graph is not graph:
                # A branch that hands on a value from outside itself.
                cast = self._cast(value)
                graph.append(cast)
                graph.outputs[index] = cast.outputs[0]
                continue
            twin = twins[value] = twins.get(value) or self._twin(value, graph)
            name, graph.outputs[index] = value.name, twin
            value.name, twin.name = self._names.unused(f"{name}_{self._suffix}"), name


def _lower_node(node: ir.Node, model: ir.Model, lowering: _Lowering) -> None:
    """Mark what of `node` becomes 16-bit, or note why nothing does."""
    if node.op_type in _KEPT_OPERATORS or _holds_no_tensors(node):
        return
    schema = graphs.schema_of(node, model)
    if schema is None:
        lowering.left[node.name or ""] = f"{_qualified(node)} is none of ONNX's operators"
        return
    kinds = [graphs.formal_parameter(schema.inputs, index).type_str for index in range(len(node.inputs))]
    operands = [(value, kind) for value, kind in zip(node.inputs, kinds, strict=True) if value is not None]
    results = [
        (value, graphs.formal_parameter(schema.outputs, index).type_str)
        for index, value in enumerate(node.outputs)
        if value.name
    ]
    values = [*operands, *results]
    # Where one of the values that share a type is not known, the others can't become 16-bit.
    lowered = halves(schema) - {kind for value, kind in values if value.type is None}
    if not any(kind in lowered and graphs.is_tensor(value, _FLOAT) for value, kind in values):
        if any(graphs.is_tensor(value, _FLOAT) for value, _ in operands):
            unknown = any(value.type is None for value, _ in values)
            why = "the type of its operands is not known" if unknown else f"ONNX has no 16-bit {node.op_type}"
            lowering.left[node.name or ""] = why
        return
    for index, (value, kind) in enumerate(zip(node.inputs, kinds, strict=True)):
        if kind in lowered and graphs.is_tensor(value, _FLOAT):
            lowering.wants_half.add((node, index))
    made = [value for value, kind in results if kind in lowered and graphs.is_tensor(value, _FLOAT)]
    lowering.half.update(made)
    if made:
        _lower_attributes(node, lowering)


def _lower_qdq(model: ir.Model, lowering: _Lowering) -> None:
    """Let DQ nodes give 16-bit values where all that reads them takes such, and Q nodes read what is 16-bit.

    What a Q reads in FP32 (an input, a node that is kept) it rounds from there: a cast would round twice. A node whose
    scale the type can't hold stays FP32.
    """
    nodes = list(graphs.all_nodes(model.graph))
    for node in nodes:
        output = node.outputs[0]
        if node.op_type == "DequantizeLinear" and not output.is_graph_output():
            uses = [(user, index) for user, index in output.uses() if user.op_type != "QuantizeLinear"]
            if uses and all(use in lowering.wants_half for use in uses) and lowering.holds(node.inputs[1]):
                lowering.half.add(output)
                lowering.wants_half.add((node, 1))
    for node in nodes:
        if node.op_type == "QuantizeLinear" and node.inputs[0] in lowering.half and lowering.holds(node.inputs[1]):
            lowering.wants_half.update({(node, 0), (node, 1)})


def _holds_no_tensors(node: ir.Node) -> bool:
    """Sequences and optionals stay FP32, and so does what is put into them and taken out."""
    if any(word in node.op_type for word in ("Sequence", "Optional")) and node.op_type != "ReverseSequence":
        return True
    values = (*node.inputs, *node.outputs)
    return any(value is not None and isinstance(value.type, (ir.SequenceType, ir.OptionalType)) for value in values)


def _qualified(node: ir.Node) -> str:
    return node.op_type if node.domain in graphs.ONNX_DOMAINS else f"{node.domain}.{node.op_type}"


def _lower_attributes(node: ir.Node, lowering: _Lowering) -> None:
    for name in rewriting.TYPE_ATTRIBUTES:
        if name in node.attributes and node.attributes[name].as_int() == _FLOAT:
            node.attributes[name] = ir.AttrInt64(name, int(lowering.dtype))
    missing = _FLOAT_BY_DEFAULT.get(node.op_type)
    if missing is not None and missing not in node.attributes:
        node.attributes[missing] = ir.AttrInt64(missing, int(lowering.dtype))
    name = node.name or ""
    if node.op_type == "ConstantOfShape":
        value = node.attributes.get("value")
        fill = value.as_tensor().numpy() if value is not None else np.zeros(1, np.float32)
        lowering.note(node.outputs[0].name or name, fill, lambda: (name,))
        tensor = ir.Tensor(lowering.converted(fill), dtype=lowering.dtype)
        node.attributes["value"] = ir.AttrTensor("value", tensor)
    if node.op_type == "Pad" and "value" in node.attributes:
        fill = np.array(node.attributes["value"].as_float(), np.float32)
        lowering.note(f"{name}: value", fill, lambda: (name,))
        node.attributes["value"] = ir.AttrFloat32("value", float(lowering.converted(fill)))
