"""Lowering to 16-bit floats: the FP32 model becomes an FP16 or BF16 model, as a strongly typed TensorRT runs it.

Every operator whose ONNX schema admits FP16 for a tensor gets that tensor in the 16-bit type; a tensor that the schema
fixes at FP32 (Resize's scales, NonMaxSuppression's boxes, …) stays as it is. The model's own inputs and outputs stay
FP32, with a Cast behind or before them, as engines are usually deployed. Nothing is protected in secret: what must stay
in FP32 is named by the user in `keep_fp32`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from pytest_trtcheck.model import graph as graphs

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray

HalfName = Literal["fp16", "bf16"]

DTYPES: dict[HalfName, ir.DataType] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
LARGEST: dict[HalfName, float] = {"fp16": 65504.0, "bf16": 3.3895313892515355e38}
_KEPT_OPERATORS = frozenset({"If", "Loop", "Scan", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
"""Control flow keeps its edges in FP32 (its inner nodes are lowered); Q/DQ keeps the types of its scales."""
_DTYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "output_datatype")


@dataclass(frozen=True)
class ClampedWeight:
    """A weight with finite values that the 16-bit type cannot hold; they become its largest finite value.

    That is what TensorRT itself does with such weights ("converted them to the closest finite FP16 value").
    """

    name: str
    largest: float
    count: int


@dataclass(frozen=True)
class HalfModel:
    """The lowered model, and what happened to its weights."""

    model: ir.Model
    clamped: tuple[ClampedWeight, ...]


def to_half(model: ir.Model, kind: HalfName, keep_fp32: Collection[str] = ()) -> HalfModel:
    """Lower `model` (as `graph.read` gives it) in place.

    Parameters
    ----------
    model
        An FP32 model; it is changed.
    kind
        "fp16" or "bf16".
    keep_fp32
        Globs of the names of nodes that stay in FP32.

    Raises
    ------
    ArgumentError
        A glob of `keep_fp32` matches no node.
    ModelError
        The model's opset is too old for the type and can't be raised.
    """
    if kind == "bf16":
        model = graphs.at_least_opset(model, 13)
    kept = graphs.matching_nodes(model, keep_fp32)
    lowering = _Lowering(DTYPES[kind], LARGEST[kind])
    versions = model.opset_imports
    for node in list(graphs.all_nodes(model.graph)):
        if node.name not in kept:
            _lower_node(node, versions.get(node.domain, 1), lowering)
    lowering.connect(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    return HalfModel(model, tuple(lowering.clamped))


class _Lowering:
    """Which values are 16-bit now, and which operands want them so; casts come last, where the two disagree."""

    def __init__(self, dtype: ir.DataType, largest: float) -> None:
        self.dtype = dtype
        self.largest = largest
        self.half: set[ir.Value] = set()
        self.wants_half: list[tuple[ir.Node, int]] = []
        self.clamped: list[ClampedWeight] = []

    def connect(self, graph: ir.Graph) -> None:
        """Give every operand the type that it wants, with one Cast a value, and keep the graphs' outputs FP32."""
        wanting = set(self.wants_half)
        twins: dict[ir.Value, ir.Value] = {}
        for node in list(graphs.all_nodes(graph)):
            for index, value in enumerate(node.inputs):
                if value is None or value.dtype != ir.DataType.FLOAT:
                    continue
                if ((node, index) in wanting) != (value in self.half):
                    twin = twins.get(value)
                    if twin is None:
                        twin = twins[value] = self._twin(value, graph)
                    node.replace_input_with(index, twin)
        for each in {id(graph): graph, **{id(n.graph): n.graph for n in graphs.all_nodes(graph)}}.values():
            if isinstance(each, ir.Graph):
                self._restore_outputs(each, twins)
        for value in self.half:
            value.dtype = self.dtype

    def _twin(self, value: ir.Value, main: ir.Graph) -> ir.Value:
        """`value` in the other of the two types."""
        to_half = value not in self.half
        dtype = self.dtype if to_half else ir.DataType.FLOAT
        if to_half and value.is_initializer() and value.const_value is not None:
            return self._half_weight(value)
        suffix = "fp32" if not to_half else self.dtype.name.lower()
        cast = ir.node("Cast", [value], attributes={"to": int(dtype)}, name=f"{value.name}_to_{suffix}")
        twin = cast.outputs[0]
        twin.name, twin.shape, twin.dtype = f"{value.name}_{suffix}", value.shape, dtype
        producer = value.producer()
        if producer is not None and producer.graph is not None:
            producer.graph.insert_after(producer, cast)
        else:
            owner = value.graph or main
            first = next(iter(owner), None)
            if first is None:
                owner.append(cast)
            else:
                owner.insert_before(first, cast)
        return twin

    def _half_weight(self, value: ir.Value) -> ir.Value:
        tensor = value.const_value
        owner = value.graph
        assert tensor is not None
        assert owner is not None
        self._note_overflow(value.name or "", tensor.numpy())
        largest, dtype = self.largest, self.dtype

        # Converted when the model is written, one weight at a time, so that memory stays near one weight.
        def convert() -> ir.TensorProtocol:
            array = tensor.numpy()
            finite = np.isfinite(array)
            clipped = np.where(finite, np.clip(array, -largest, largest), array)
            return ir.Tensor(clipped.astype(dtype.numpy()), dtype=dtype, name=name)

        name = f"{value.name}_{self.dtype.name.lower()}"
        lazy = ir.LazyTensor(convert, dtype=dtype, shape=ir.Shape(list(tensor.shape.numpy())), name=name)
        twin = ir.Value(
            name=name, type=ir.TensorType(dtype), shape=ir.Shape(list(tensor.shape.numpy())), const_value=lazy
        )
        owner.register_initializer(twin)
        return twin

    def _note_overflow(self, name: str, array: NDArray[Any]) -> None:
        if not array.size:
            return
        magnitude = np.abs(array)
        over = (magnitude > self.largest) & np.isfinite(array)
        if over.any():
            self.clamped.append(ClampedWeight(name, float(magnitude[over].max()), int(over.sum())))

    def _restore_outputs(self, graph: ir.Graph, twins: dict[ir.Value, ir.Value]) -> None:
        for index, value in enumerate(graph.outputs):
            if value not in self.half:
                continue
            twin = twins.get(value)
            if twin is None or twin.graph is not graph:
                twin = self._twin(value, graph)
                twins[value] = twin
            name, graph.outputs[index] = value.name, twin
            value.name, twin.name = f"{name}_{self.dtype.name.lower()}", name


def _lower_node(node: ir.Node, version: int, lowering: _Lowering) -> None:
    """Mark what of `node` becomes 16-bit."""
    holds_no_tensors = "Sequence" in node.op_type or "Optional" in node.op_type
    if node.op_type in _KEPT_OPERATORS or holds_no_tensors or not onnx.defs.has(node.op_type, version, node.domain):
        return
    schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    halves = {
        constraint.type_param_str
        for constraint in schema.type_constraints
        if {"tensor(float)", "tensor(float16)"} <= set(constraint.allowed_type_strs)
    }
    for index, value in enumerate(node.inputs):
        if value is not None and value.dtype == ir.DataType.FLOAT and _formal(schema.inputs, index).type_str in halves:
            lowering.wants_half.append((node, index))
    _lower_attributes(node, lowering.dtype)
    for index, value in enumerate(node.outputs):
        if value.dtype == ir.DataType.FLOAT and _formal(schema.outputs, index).type_str in halves:
            lowering.half.add(value)


def _formal(parameters: object, index: int) -> onnx.defs.OpSchema.FormalParameter:
    """The schema's parameter at `index`; the last one may stand for many."""
    sequence: list[onnx.defs.OpSchema.FormalParameter] = list(parameters)  # type: ignore[call-overload]
    return sequence[min(index, len(sequence) - 1)]


def _lower_attributes(node: ir.Node, dtype: ir.DataType) -> None:
    for name in _DTYPE_ATTRIBUTES:
        if name in node.attributes and node.attributes[name].as_int() == ir.DataType.FLOAT:
            node.attributes[name] = ir.AttrInt64(name, int(dtype))
    if node.op_type == "ConstantOfShape" and node.outputs[0].dtype == ir.DataType.FLOAT:
        value = node.attributes.get("value")
        fill = value.as_tensor().numpy() if value is not None else np.zeros(1, np.float32)
        node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(fill.astype(dtype.numpy()), dtype=dtype))
    if node.op_type in {"RandomNormal", "RandomUniform"} and "dtype" not in node.attributes:
        node.attributes["dtype"] = ir.AttrInt64("dtype", int(dtype))
