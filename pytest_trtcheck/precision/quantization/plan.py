"""Where Q/DQ goes: TensorRT's rules for explicit quantization, applied to a graph as `graph.read` gives it.

- Conv, ConvTranspose, Gemm and MatMul with a constant weight are quantized: their input per tensor, their weight per
  output channel, their bias not at all. A product of two activations (attention) stays float.
- An Add that fuses with the convolution before it gets Q/DQ on its other branch, the residual, so that the fused kernel
  reads and writes 8-bit values. The branch that fuses gets none: the sum is taken before rounding.
- Everything else (normalization, Softmax, activation functions, …) stays float. MaxPool, Concat, Resize, Reshape and
  other operators that only move values get no Q/DQ of their own: TensorRT moves the Q in front of the next quantized
  operator up through them.
- What lies inside If, Loop and Scan stays float.

Sources: NVIDIA TensorRT documentation, "Explicit Quantization" (Q/DQ placement recommendations), and the placement of
residual Q/DQ in NVIDIA's Model Optimizer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from pytest_trtcheck.errors import ModelError, listed, plural
from pytest_trtcheck.model import graph as graphs
from pytest_trtcheck.precision.constants import constant

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

QUANTIZED_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_CONVOLUTIONS = ("Conv", "ConvTranspose")


@dataclass(frozen=True)
class ActivationPoint:
    """Operand `index` of `node`, which reads `tensor` through Q/DQ per tensor."""

    node: str
    index: int
    tensor: str


@dataclass(frozen=True)
class WeightPoint:
    """Operand `index` of `node`, the constant `tensor`, quantized with one scale for each index along `axis`."""

    node: str
    index: int
    tensor: str
    axis: int


@dataclass(frozen=True)
class QuantizationPlan:
    """What will be quantized, in graph order, and what was left float although it looks quantizable, and why.

    `left_float` maps node names to reasons.
    """

    activations: tuple[ActivationPoint, ...]
    weights: tuple[WeightPoint, ...]
    left_float: tuple[tuple[str, str], ...] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        """The activation tensors that need a range, each once."""
        return tuple(dict.fromkeys(point.tensor for point in self.activations))

    def readers(self, tensor: str) -> tuple[str, ...]:
        """The nodes that will read `tensor` quantized."""
        return tuple(point.node for point in self.activations if point.tensor == tensor)


def points(model: ir.Model, keep_fp32: Collection[str] = (), exclude: Collection[str] = ()) -> QuantizationPlan:
    """Choose what is quantized in `model` (as `graph.read` gives it); the model is not changed.

    Parameters
    ----------
    keep_fp32
        Globs of the names of nodes that stay in FP32: no Q/DQ on any of their operands.
    exclude
        Globs of the names of nodes that are not quantized, and run in what the rest of the model runs in.

    Raises
    ------
    ArgumentError
        A glob of `keep_fp32` or `exclude` matches no node.
    ModelError
        Nothing is left to quantize: an engine of this precision would be an FP32 engine by another name.
    """
    excluded = graphs.matching_nodes(model, exclude, "exclude")
    kept = graphs.matching_nodes(model, keep_fp32)
    planner = _Planner({**dict.fromkeys(excluded, "named in exclude"), **dict.fromkeys(kept, "named in keep_fp32")})
    for node in graphs.all_nodes(model.graph):
        if node.domain in graphs.ONNX_DOMAINS and node.op_type in QUANTIZED_OPERATORS:
            planner.visit(node, inner=node.graph is not model.graph)
    planner.visit_residuals(model.graph)
    if not planner.weights:
        raise _nothing_to_quantize(planner)
    return planner.plan(model.graph)


def _nothing_to_quantize(planner: _Planner) -> ModelError:
    if not planner.left_float:
        return ModelError(
            f"nothing to quantize: the model has no {', '.join(QUANTIZED_OPERATORS[:-1])} or MatMul node",
            "an 8-bit engine of this model would compute in FP32 throughout; check it as fp16 or bf16",
            code="nothing-computed",
        )
    reasons = listed([f"{node}: {reason}" for node, reason in planner.left_float.items()], 10, "\n    ")
    return ModelError(
        f"nothing to quantize: every node that could be is left out\n    {reasons}",
        "narrow keep_fp32 or exclude, or check this model as fp16 or bf16",
        code="nothing-computed",
    )


class _Planner:
    def __init__(self, kept: Mapping[str, str]) -> None:
        self.kept = kept
        self.activations: list[ActivationPoint] = []
        self.weights: list[WeightPoint] = []
        self.left_float: dict[str, str] = {}
        self.quantized: set[ir.Node] = set()

    def visit(self, node: ir.Node, *, inner: bool) -> None:
        name = node.name or ""
        reason = self.kept.get(name) or ("inside If, Loop or Scan" if inner else self._add(node))
        if reason:
            self.left_float[name] = reason

    def _add(self, node: ir.Node) -> str:
        """Plan `node`, or say why not."""
        index = _weight_index(node)
        if isinstance(index, str):
            return index
        tensor, activation = node.inputs[index], node.inputs[1 - index]
        weight = constant(tensor)
        assert weight is not None
        assert tensor is not None
        assert activation is not None
        transposed = node.attributes.get("transB")
        axis = output_channels(
            node.op_type, index, len(weight.shape), transposed=transposed is not None and bool(transposed.as_int())
        )
        if weight.dtype != ir.DataType.FLOAT:
            return f"its weight is {weight.dtype.name}, not FLOAT"
        if axis is None or weight.size == 0:
            return "its weight has no output channels"
        self.weights.append(WeightPoint(node.name or "", index, tensor.name or "", axis))
        self.activations.append(ActivationPoint(node.name or "", 1 - index, activation.name or ""))
        self.quantized.add(node)
        return ""

    def visit_residuals(self, graph: ir.Graph) -> None:
        outputs = set(graph.outputs)
        depths = _depths(graph)
        for node in graph:
            if node.op_type != "Add" or node.domain not in graphs.ONNX_DOMAINS or node.name in self.kept:
                continue
            operands = [value for value in node.inputs if value is not None]
            if len(operands) == 2 and (index := self._residual(operands[0], operands[1], outputs, depths)) is not None:
                self.activations.append(ActivationPoint(node.name or "", index, operands[index].name or ""))

    def _residual(
        self, first: ir.Value, second: ir.Value, outputs: set[ir.Value], depths: dict[ir.Value, int]
    ) -> int | None:
        """Which operand of a sum is the residual; None where the sum does not fuse with a quantized convolution."""
        if constant(first) is not None or constant(second) is not None or not _same_shape(first, second):
            return None
        fuses = [self._fuses(value, outputs) for value in (first, second)]
        if fuses[0] == fuses[1]:
            if not fuses[0]:
                return None
            # Both branches end in a convolution (a block that changes its resolution): the longer one is the block's
            # body, with which the sum fuses, the shorter one its shortcut.
            residual = 0 if depths.get(first, 0) < depths.get(second, 0) else 1
        else:
            residual = 1 if fuses[0] else 0
        return None if graphs.made_by((first, second)[residual], "DequantizeLinear") else residual

    def _fuses(self, value: ir.Value, outputs: set[ir.Value]) -> bool:
        """Whether `value` is a quantized convolution's result, normalized or shifted at most, that nobody else reads.

        TensorRT folds such steps into the convolution; an activation function in between would end the fusion.
        """
        while len(value.uses()) == 1 and value not in outputs:
            producer = value.producer()
            if producer is None or producer.domain not in graphs.ONNX_DOMAINS:
                return False
            if producer.op_type in _CONVOLUTIONS:
                return producer in self.quantized
            source = _folded_into_convolution(producer)
            if source is None:
                return False
            value = source
        return False

    def plan(self, graph: ir.Graph) -> QuantizationPlan:
        order = {node.name: index for index, node in enumerate(graph)}
        activations = sorted(self.activations, key=lambda point: (order[point.node], point.index))
        return QuantizationPlan(tuple(activations), tuple(self.weights), tuple(self.left_float.items()))


def _folded_into_convolution(node: ir.Node) -> ir.Value | None:
    """The operand that `node` normalizes, or shifts or scales by a constant."""
    if node.op_type in {"BatchNormalization", "Identity"}:
        return node.inputs[0]
    if node.op_type in {"Add", "Mul"}:
        variable = [value for value in node.inputs if value is not None and constant(value) is None]
        if len(variable) == 1:
            return variable[0]
    return None


def _weight_index(node: ir.Node) -> int | str:
    """Which of the two operands is the constant weight; a reason where neither, or not one that can be quantized."""
    operands = node.inputs[:2]
    if any(graphs.made_by(value, "DequantizeLinear") for value in operands):
        return "already quantized in the model"
    fixed = [constant(value) is not None for value in operands]
    if all(fixed):
        return "both operands are constants"
    if fixed[1]:
        return 1
    return 0 if fixed[0] and node.op_type == "MatMul" else "its weight is computed in the graph"


def output_channels(op_type: str, index: int, rank: int, *, transposed: bool = False) -> int | None:
    """An operand's axis of output channels, what the operator must not sum over; `transposed` is Gemm's `transB`."""
    if op_type in {"Conv", "ConvTranspose"}:
        return int(op_type == "ConvTranspose") if rank >= 3 else None
    if rank < 2:
        return None
    if op_type == "Gemm":
        return int(not transposed)
    return rank - 1 if index == 1 else rank - 2


def _same_shape(first: ir.Value, second: ir.Value) -> bool:
    """False where it is known that one operand is broadcast: TensorRT fuses sums of equal shapes only."""
    if first is second:
        return False
    if first.shape is None or second.shape is None:
        return True
    if len(first.shape) != len(second.shape):
        return False
    pairs = zip(first.shape, second.shape, strict=True)
    return all(one == other or not (isinstance(one, int) and isinstance(other, int)) for one, other in pairs)


def _depths(graph: ir.Graph) -> dict[ir.Value, int]:
    """For every value the number of nodes on the longest path to it."""
    depths: dict[ir.Value, int] = {}
    for node in graph:
        depth = 1 + max((depths.get(value, 0) for value in node.inputs if value is not None), default=0)
        depths.update(dict.fromkeys(node.outputs, depth))
    return depths


def summary(plan: QuantizationPlan) -> str:
    """One line: how much is quantized, how much stays float, and why."""
    reasons = Counter(reason for _, reason in plan.left_float)
    left = ", ".join(f"{reason} ({plural(count, 'node')})" for reason, count in reasons.most_common())
    return f"{plural(len(plan.weights), 'node')} quantized" + (f"; left float: {left}" if left else "")
