"""Which nodes make a model's outputs random: such outputs agree with no reference, not even with themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_trtcheck.model.proto import all_graphs, bodies, constant, elements

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import onnx

_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
)
_DROPOUT_TAKES_TRAINING_MODE = 12
_DROPOUT_HAS_IS_TEST = 7
"""Before this opset, Dropout is told by an attribute whether it is to drop nothing."""


def random_nodes(proto: onnx.ModelProto) -> tuple[str, ...]:
    """The nodes that are random and that an output depends on, each as "name (operator)", in the graph's order.

    Graphs inside If, Loop and Scan and the model's functions are looked into. Whether a Dropout trains is read where it
    is constant; one that an input decides is not counted.
    """
    return tuple(dict.fromkeys(_Search(proto).of(proto.graph, [value.name for value in proto.graph.output])))


class _Search:
    def __init__(self, proto: onnx.ModelProto) -> None:
        self._functions = {(each.domain, each.name): each for each in proto.functions}
        self._opset = max((each.version for each in proto.opset_import if each.domain in {"", "ai.onnx"}), default=1)

    def of(
        self, graph: Any, outputs: Iterable[str], outer: Mapping[str, Any] | None = None, within: tuple[str, ...] = ()
    ) -> Iterator[str]:
        """The random nodes of a graph, or of a function, that `outputs` depend on."""
        constants = {**(outer or {}), **_constants(graph)}
        for node in _needed(graph.node, outputs):
            label = "/".join((*within, node.name or node.output[0]))
            if self._is_random(node, constants):
                yield f"{label} ({node.op_type})"
            for inner in _taken(node, constants):
                yield from self.of(inner, [value.name for value in inner.output], constants, (*within, node.name))
            function = self._functions.get((node.domain, node.op_type))
            # A function that calls itself is no valid model; it would have no end here.
            if function is not None and len(within) < len(self._functions):
                yield from self.of(function, function.output, None, (*within, node.name or node.op_type))

    def _is_random(self, node: onnx.NodeProto, constants: Mapping[str, Any]) -> bool:
        if node.domain not in {"", "ai.onnx"}:
            return False
        if node.op_type in _RANDOM:
            return True
        if node.op_type != "Dropout":
            return False
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if self._opset < _DROPOUT_HAS_IS_TEST:
            return "is_test" not in attributes or not attributes["is_test"].i
        if self._opset < _DROPOUT_TAKES_TRAINING_MODE or len(node.input) < 3 or not node.input[2]:
            return False
        ratio = constants.get(node.input[1], 0.5) if node.input[1] else 0.5
        return bool(constants.get(node.input[2], False)) and bool(ratio)


def _needed(nodes: Any, outputs: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes that `outputs` depend on, in the order of the graph."""
    wanted = set(outputs)
    needed = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            needed.append(node)
            wanted.update(node.input)
            wanted.update(name for inner in bodies(node) for name in _outer_names(inner))
    return needed[::-1]


def _outer_names(graph: onnx.GraphProto) -> Iterator[str]:
    """Every name that a graph inside a node uses; some are its own, which does no harm."""
    for each in all_graphs(graph):
        yield from (value.name for value in each.output)
        for node in each.node:
            yield from node.input


def _taken(node: onnx.NodeProto, constants: Mapping[str, Any]) -> Iterator[onnx.GraphProto]:
    """The graphs inside a node that can run: of an If whose condition is constant, the one branch."""
    condition = constants.get(node.input[0]) if node.op_type == "If" and node.input else None
    if condition is None:
        yield from bodies(node)
        return
    branch = "then_branch" if condition else "else_branch"
    yield from (attribute.g for attribute in node.attribute if attribute.name == branch)


def _constants(graph: Any) -> dict[str, Any]:
    """The scalars that a graph holds, by name."""
    small = (tensor for tensor in getattr(graph, "initializer", ()) if all(size == 1 for size in tensor.dims))
    held = {tensor.name: elements(tensor) for tensor in small}
    held |= {node.output[0]: constant(node) for node in graph.node if node.op_type == "Constant"}
    return {name: found[0] for name, found in held.items() if found is not None and len(found) == 1}
