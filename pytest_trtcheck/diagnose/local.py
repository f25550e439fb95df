"""One operator at a time: what each adds to the error by itself, computed on the FP32 model's own values.

The lowered operator is run on what the FP32 model feeds to it. Its error is then its own: nothing was handed down. For
an operator with a large error, that is taken apart: with only its activations lowered, only its weights, or neither,
which leaves the rounding of its result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx
from onnx import TensorProto, helper

from pytest_trtcheck.diagnose import cutting
from pytest_trtcheck.diagnose.statistics import BF16

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.diagnose.cutting import Arrays, Graph
    from pytest_trtcheck.diagnose.models import Pair


@dataclass(frozen=True)
class Variant:
    """What of an operator is lowered; its result always is."""

    name: str
    activations: bool
    weights: bool


WHOLE = Variant("whole", True, True)
ACTIVATIONS = Variant("activations", True, False)
WEIGHTS = Variant("weights", False, True)
RESULT = Variant("result", False, False)
PARTS = (ACTIVATIONS, WEIGHTS, RESULT)


def boundary(pair: Pair, tensor: str) -> tuple[str, ...]:
    """The FP32 model's values that the lowered operator behind `tensor` is run on."""
    found = pair.emulated.cut([tensor], pair.known).given
    operands = (name for name in pair.node_of(tensor).input if name in pair.reference.producers)
    return tuple(dict.fromkeys((*found, *(name for name in operands if not pair.reference.is_constant(name)))))


def run(
    pair: Pair, tensors: Sequence[str], values: Mapping[str, NDArray[Any]], variants: Iterable[Variant]
) -> dict[str, Arrays]:
    """For each variant the tensors as their own operators compute them from `values`."""
    builder = Builder(pair)
    names = {
        variant.name: {tensor: builder.result(tensor, variant) for tensor in tensors}
        for variant in dict.fromkeys(variants)
    }
    outputs = [name for by_tensor in names.values() for name in by_tensor.values()]
    feeds = {name: values[name] for name in builder.feeds}
    model = pair.emulated.model(builder.nodes, feeds, outputs)
    model.graph.initializer.extend(builder.weights.values())
    results = cutting.run(model, pair.emulated.folder, feeds)
    return {
        variant: {tensor: results[name] for tensor, name in by_tensor.items()} for variant, by_tensor in names.items()
    }


def can_be_taken_apart(pair: Pair, tensor: str) -> bool:
    """Whether the operator behind `tensor` is the same in both graphs, operand for operand."""
    return Builder(pair).twin(_main_node(pair, tensor)) is not None


def _main_node(pair: Pair, tensor: str) -> onnx.NodeProto:
    """The lowered node of the same name as the FP32 model's; the last one before `tensor` where there is none."""
    wanted = pair.node_of(tensor).name
    piece = pair.emulated.cut([tensor], pair.known)
    nodes = [pair.emulated.nodes[index] for index in piece.nodes]
    return next((node for node in nodes if node.name == wanted), nodes[-1])


class Builder:
    """Copies of lowered operators that read the FP32 model's values; each value is made once a variant.

    `nodes` grow with each `result`, in an order in which they can run. They read `feeds`, tensors of the FP32 model by
    their names, weights of the lowered model, and `weights`, which are the FP32 model's under other names.
    """

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.by_name = {node.name: node for node in pair.reference.nodes}
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, TensorProto] = {}
        self.feeds: dict[str, None] = {}
        self._made: set[str] = set()

    def twin(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The FP32 model's node behind a lowered one, if their operands correspond."""
        found = self.by_name.get(node.name)
        same = found is not None and found.op_type == node.op_type and len(found.input) == len(node.input)
        return found if same else None

    def result(self, tensor: str, variant: Variant) -> str:
        """The name under which `tensor` is computed."""
        return self._computed(self.pair.emulated, tensor, variant)

    def _computed(self, graph: Graph, name: str, variant: Variant) -> str:
        """The name under which `name` is computed anew."""
        reference = graph is self.pair.reference
        suffix = "constant" if graph.is_constant(name) else variant.name
        made = f"{name}//{'reference' if reference else suffix}"
        if made in self._made:
            return made
        node = graph.nodes[graph.producers[name]]
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        twin = None if reference or variant is WHOLE else self.twin(node)
        operands: dict[str, str] = {}
        for index, operand in enumerate(node.input):
            if operand:
                exact = twin.input[index] if twin is not None else ""
                copy.input[index] = self._operand(graph, operand, exact, variant)
                operands[operand] = copy.input[index]
        for outer in cutting.reads(node):
            if outer not in operands and (outer in graph.producers or outer in graph.inputs):
                operands[outer] = self._operand(graph, outer, "", variant)
        cutting.rename_inside(copy, operands)
        suffix = made.rpartition("//")[2]
        copy.output[:] = [f"{output}//{suffix}" if output else "" for output in node.output]
        copy.name = f"{node.name}//{suffix}"
        self._made.update(name for name in copy.output if name)
        self.nodes.append(copy)
        return made

    def _operand(self, graph: Graph, name: str, exact: str, variant: Variant) -> str:
        """What to read instead of `name`; `exact` is the FP32 model's operand, where there is one."""
        if exact:
            if self.pair.reference.is_constant(exact):
                if not variant.weights:
                    return self._reference_constant(exact)
            elif not variant.activations and (exact in self.pair.known or exact in self.pair.reference.inputs):
                self.feeds[exact] = None
                return exact
        if name in graph.weights:
            return self._reference_constant(name) if graph is self.pair.reference else name
        if name in self.pair.known or name in graph.inputs:
            self.feeds[name] = None
            return self._as_held(name) if variant.activations else name
        return self._computed(graph, name, variant)

    def _reference_constant(self, name: str) -> str:
        """A weight of the FP32 model, which may have a namesake in the lowered one."""
        graph = self.pair.reference
        if name not in graph.weights:
            return self._computed(graph, name, RESULT)
        renamed = f"{name}//reference"
        if renamed not in self.weights:
            tensor = TensorProto()
            tensor.CopyFrom(graph.weights[name])
            tensor.name = renamed
            self.weights[renamed] = tensor
        return renamed

    def _as_held(self, name: str) -> str:
        """An FP32 value as the lowered model holds it."""
        held = self.pair.held.get(name)
        rounded = f"{name}//held"
        if held is None or name in self.pair.emulated.inputs:
            return name
        if rounded not in self._made:
            kind = TensorProto.BFLOAT16 if held is BF16 else TensorProto.FLOAT16
            self.nodes.append(helper.make_node("Cast", [name], [f"{rounded}/down"], to=kind))
            self.nodes.append(helper.make_node("Cast", [f"{rounded}/down"], [rounded], to=TensorProto.FLOAT))
            self._made.add(rounded)
        return rounded
