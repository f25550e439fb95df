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

from pytest_trtcheck.diagnose.statistics import BF16
from pytest_trtcheck.model import pieces
from pytest_trtcheck.model.pieces import copied

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.diagnose.models import Pair
    from pytest_trtcheck.model.pieces import Arrays, Graph


@dataclass(frozen=True)
class Variant:
    """What of an operator is lowered; its result always is."""

    name: str
    activations: bool
    weights: bool


WHOLE = Variant("whole", True, True)
RESULT = Variant("result", False, False)
_CONSTANT = "//constant"
PARTS = (Variant("activations", True, False), Variant("weights", False, True), RESULT)


def boundary(pair: Pair, tensor: str) -> tuple[str, ...]:
    """The FP32 model's values that the lowered operator behind `tensor` is run on."""
    found = pair.emulated.cut([tensor], pair.known).given
    operands = (name for name in pair.node_of(tensor).input if name in pair.reference.producers)
    return tuple(dict.fromkeys((*found, *(name for name in operands if not pair.reference.is_constant(name)))))


def in_parts(pair: Pair, tensors: Sequence[str], values: Mapping[str, NDArray[Any]]) -> dict[str, Arrays]:
    """For each of PARTS the tensors as their own operators compute them from `values`."""
    builder = Builder(pair)
    names = {each.name: {tensor: builder.result(tensor, each) for tensor in tensors} for each in PARTS}
    outputs = [name for by_tensor in names.values() for name in by_tensor.values()]
    feeds = {name: values[name] for name in builder.feeds}
    results = pieces.run(pair.emulated, builder.nodes, feeds, outputs, pair.reference)
    return {part: {tensor: results[name] for tensor, name in by_tensor.items()} for part, by_tensor in names.items()}


def can_be_taken_apart(pair: Pair, tensor: str) -> bool:
    """Whether the operator behind `tensor` is the same in both graphs, operand for operand."""
    nodes = [pair.emulated.nodes[index] for index in pair.emulated.cut([tensor], pair.known).nodes]
    # The lowered node of the same name as the FP32 model's; the last one before `tensor` where there is none.
    main = next((node for node in nodes if node.name == pair.node_of(tensor).name), nodes[-1])
    return pair.twin(main) is not None


class Builder:
    """Copies of lowered operators that read the FP32 model's values; each value is made once a variant.

    `nodes` grow with each `result`, in an order in which they can run. They read `feeds`, tensors of the FP32 model by
    their names, and weights of both models.
    """

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.nodes: list[onnx.NodeProto] = []
        self.feeds: dict[str, None] = {}
        self._made: set[str] = set()

    def result(self, tensor: str, variant: Variant) -> str:
        """The name under which `tensor` is computed."""
        return self._computed(self.pair.emulated, tensor, variant)

    @staticmethod
    def is_constant(node: onnx.NodeProto) -> bool:
        """Whether one of `nodes` is computed from weights alone."""
        return node.name.endswith(_CONSTANT)

    def _computed(self, graph: Graph, name: str, variant: Variant) -> str:
        """The name under which `name` is computed anew."""
        reference = graph is self.pair.reference
        suffix = "//reference" if reference else _CONSTANT if graph.is_constant(name) else f"//{variant.name}"
        made = f"{name}{suffix}"
        if made in self._made:
            return made
        node = graph.nodes[graph.producers[name]]
        copy = copied(node, name=f"{node.name}{suffix}")
        twin = None if reference or variant is WHOLE else self.pair.twin(node)
        operands: dict[str, str] = {}
        for index, operand in enumerate(node.input):
            if operand:
                exact = twin.input[index] if twin is not None else ""
                copy.input[index] = operands[operand] = self._operand(graph, operand, exact, variant)
        for outer in pieces.reads(node):
            if outer not in operands and (outer in graph.producers or outer in graph.inputs):
                operands[outer] = self._operand(graph, outer, "", variant)
        pieces.rename_inside(copy, operands)
        copy.output[:] = [f"{output}{suffix}" if output else "" for output in node.output]
        self._made.update(name for name in copy.output if name)
        self.nodes.append(copy)
        return made

    def _operand(self, graph: Graph, name: str, exact: str, variant: Variant) -> str:
        """What to read instead of `name`; `exact` is the FP32 model's operand, where there is one."""
        reference = self.pair.reference
        if exact:
            if reference.is_constant(exact):
                if not variant.weights:
                    return exact if exact in reference.weights else self._computed(reference, exact, RESULT)
            elif not variant.activations and (exact in self.pair.known or exact in reference.inputs):
                self.feeds[exact] = None
                return exact
        if name in graph.weights:
            return name
        if name in self.pair.known or name in graph.inputs:
            self.feeds[name] = None
            return self._as_held(name) if variant.activations else name
        return self._computed(graph, name, variant)

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
