"""From what was measured back to the user's own model: nodes that `keep_fp32` takes, tensors that the file has.

Between the two lie folded batch normalization, casts and Q/DQ nodes that the lowering puts in, control flow that was
unrolled, and models that are emulated. None of their names mean anything to the user.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from pytest_trtcheck.model.pieces import inner_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import onnx

    from pytest_trtcheck.diagnose.models import Pair
    from pytest_trtcheck.model.pieces import Graph

_UNCHANGED = frozenset({"Cast", "DequantizeLinear", "Identity", "QuantizeLinear"})
"""Operators behind which a tensor is still the same to the user."""


class Names:
    """The names in the user's file, `original`, for those in `pair`, where something could be measured."""

    def __init__(self, original: Path, pair: Pair | None = None) -> None:
        from pytest_trtcheck.model import graph

        model = graph.read(original)
        nodes = list(graph.all_nodes(model.graph))
        # Not the nodes themselves, which hold all of the model in memory.
        self._op_types = {node.name or "": node.op_type for node in nodes}
        self._results = {node.name or "": [value.name or "" for value in node.outputs] for node in nodes}
        self._weights = {
            node.name or "": [value.name or "" for value in node.inputs if value and value.is_initializer()]
            for node in nodes
        }
        self._makers = {value.name or "": node.name or "" for node in nodes for value in node.outputs}
        self._tensors = {*self._makers, *(value.name or "" for value in model.graph.inputs)}
        self._tensors |= {value.name or "" for value in graph.initializers(model.graph)}
        self._pair = pair
        self._originals = pair.unrolled.tensors if pair is not None else {}
        self._kept: dict[str, tuple[str, ...]] = {}
        if pair is not None:
            for each in pair.reference.nodes:
                if each.name not in pair.unrolled.handing_on:
                    self._kept.setdefault(pair.owner(each.name), self._to_keep(pair, each))

    def _to_keep(self, pair: Pair, node: onnx.NodeProto) -> tuple[str, ...]:
        name = pair.owner(node.name)
        # A normalization that was folded away gave its output's name to what it was folded into.
        outputs = (self._originals.get(output, output) for output in node.output)
        behind = {self._makers[output] for output in outputs if output in self._makers}
        inner = [each for each in inner_names(node) if each in self._op_types]
        # The nodes that compute its weights: lowered, they would round them before the node sees them.
        weights = [each for each in node.input if pair.reference.is_constant(each)]
        computing = (pair.reference.nodes[index].name for index in pair.reference.cut(weights).nodes)
        inner += [each for each in map(pair.owner, computing) if each in self._op_types]
        if name in self._op_types:
            return (name, *sorted(behind - {name}), *inner)
        return (*(sorted(behind) or self._nearby(pair.reference, node)), *inner)

    def _nearby(self, graph: Graph, node: onnx.NodeProto) -> tuple[str, ...]:
        """The user's node that one of ours was put beside: what it is called after, or computes for or from."""
        before = node.name.rpartition("/")[0]
        if before in self._op_types:
            return (before,)
        for each in _around(graph, node):
            if each.name in self._op_types:
                return (each.name,)
            found = next((self._makers[output] for output in each.output if output in self._makers), None)
            if found is not None:
                return (found,)
        return ()

    def keep(self, nodes: Sequence[str]) -> tuple[str, ...]:
        """What `keep_fp32` must name for these nodes to stay in FP32, in the model's order."""
        order = {name: index for index, name in enumerate(self._op_types)}
        found = {name for node in nodes for name in self._kept.get(node, ())}
        return tuple(sorted(found, key=order.__getitem__))

    def node(self, name: str, graph: Graph | None = None) -> str:
        """The user's node behind one that was measured, or behind one of `graph`."""
        if name in self._op_types:
            return name
        if name in self._kept:
            return (*self._kept[name], name)[0]
        if graph is None:
            return name
        return next((found for node in graph.nodes if node.name == name for found in self._nearby(graph, node)), name)

    def op_type(self, name: str, otherwise: str) -> str:
        """The operator of one of the user's nodes."""
        return self._op_types.get(name, otherwise)

    def has_tensor(self, name: str) -> bool:
        """Whether a tensor that was measured is one of the user's."""
        return self._originals.get(name, name) in self._tensors

    def tensor(self, name: str, node: str, graph: Graph | None = None) -> str:
        """The user's tensor behind one that was measured at `node`, one of the user's nodes."""
        name = self._originals.get(name, name)
        if name in self._tensors:
            return name
        weight = next((each for each in self._weights.get(node, ()) if name.startswith(each)), None)
        if weight is not None:
            return weight
        if graph is None and self._pair is not None:
            graph = self._pair.reference
        producer = graph.producer(name) if graph is not None else None
        while graph is not None and producer is not None and producer.op_type in _UNCHANGED:
            source: str = producer.input[0]
            if source in self._tensors:
                return source
            producer = graph.producer(source)
        return next(iter(self._results.get(node, ())), name)


def _around(graph: Graph, start: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """The nodes before `start`, the nearest first, then those behind it."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for index, node in enumerate(graph.nodes):
        for name in graph.reads(index):
            readers.setdefault(name, []).append(node)
    for forward in (False, True):
        seen = {start.name}
        waiting = deque([start])
        while waiting:
            node = waiting.popleft()
            yield node
            if forward:
                following = [each for name in node.output for each in readers.get(name, ())]
            else:
                following = [each for name in node.input if (each := graph.producer(name)) is not None]
            waiting.extend(each for each in following if each.name not in seen)
            seen |= {each.name for each in following}
