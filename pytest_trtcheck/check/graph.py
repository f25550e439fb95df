"""The checked model as a graph for the reports: the user's file, with what the check found of each operator."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_trtcheck.errors import CheckError
from pytest_trtcheck.record import GraphNode, GraphRecord, GraphTensor, combine, is_bad

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    import onnx_ir as ir

    from pytest_trtcheck.check.request import Known, Settings

MOST_NODES = 1000
"""That a record holds: a few hundred KB of JSON."""
_WORST = 8
"""Operators that lose most, around which nodes are kept beside the culprit's, where there are too many."""


def drawn(settings: Settings, known: Known) -> Known:
    """With the graph of the model, where the check failed, or all are asked for."""
    failed = is_bad(combine([part.verdict for part in known.record.parts.values()]))
    if settings.graphs == "none" or (settings.graphs == "failed" and not failed):
        return known
    try:
        return known.recorded(graph=_bounded(graph_of(known), known))
    except CheckError as error:
        # A picture that is missing hides nothing that was found.
        return known.recorded(f"the model could not be drawn: {error.headline}")


def graph_of(known: Known) -> GraphRecord:
    """All of it, with what the check found.

    Raises
    ------
    ModelError
        The file is not understood as a graph.
    """
    graph, kinds = _structure(known.model.path, known.model.sha256), _kinds(known)
    blame = known.record.parity.blame if known.record.parity else None
    errors = {each.name: (each.error, each.own) for each in blame.tensors} if blame else {}
    errors |= known.traced
    found = (errors.get(each.name, (None, None)) for each in graph.tensors)
    return replace(
        graph,
        nodes=tuple(replace(each, precision=kinds.get(each.name)) for each in graph.nodes),
        tensors=tuple(
            replace(each, error=_rounded(error), own=_rounded(own))
            for each, (error, own) in zip(graph.tensors, found, strict=True)
        ),
    )


@functools.lru_cache(maxsize=4)
def _structure(path: Path, sha256: str) -> GraphRecord:
    """What the file tells. Kept, since examples and precisions ask for one model again and again; it is small."""
    from pytest_trtcheck.model import graph

    del sha256  # tells one content of the path from another
    model = graph.read(path)
    nodes = list(_in_order(model.graph))
    constants = set(graph.initializers(model.graph))
    for node in nodes:
        read = [value for value in node.inputs if value is not None]
        if read and constants.issuperset(read) and not any(graph.bodies(node)):
            constants.update(node.outputs)
    places: dict[ir.Value, int] = {}

    def placed(values: Iterable[ir.Value | None]) -> tuple[int, ...]:
        """Where tensors stand, those that are no constants; each once."""
        computed = dict.fromkeys(each for each in values if each is not None and each.name and each not in constants)
        return tuple(places.setdefault(each, len(places)) for each in computed)

    inputs = placed(model.graph.inputs)
    found = tuple(
        GraphNode(
            node.name or "",
            node.op_type,
            reads=placed([*node.inputs, *(each for body in graph.bodies(node) for each in body.outputs)]),
            writes=placed(node.outputs),
        )
        for node in nodes
        if not constants.issuperset(node.outputs)
    )
    outputs = placed(model.graph.outputs)
    return GraphRecord(found, tuple(GraphTensor(each.name or "", _type(each)) for each in places), inputs, outputs)


def _in_order(graph: ir.Graph) -> Iterator[ir.Node]:
    """All nodes, those of a body before the one that has it: it gives what they compute."""
    from pytest_trtcheck.model.graph import bodies

    for node in graph:
        for body in bodies(node):
            yield from _in_order(body)
        yield node


def _bounded(graph: GraphRecord, known: Known) -> GraphRecord:
    """What matters of a large one: the surroundings of what is to blame, and of what loses most."""
    blame = known.record.parity.blame if known.record.parity else None
    named = [(blame.culprit or {}).get("node"), *blame.others[:_WORST]] if blame else []
    worst = sorted(range(len(graph.nodes)), key=lambda index: -graph.loss(index))[:_WORST]
    starts = [place for place in map(graph.place, named) if place is not None]
    return graph.around([*starts, *(index for index in worst if graph.loss(index))], MOST_NODES)


def _kinds(known: Known) -> Mapping[str, str]:
    """What each node computes in as it was lowered; nothing of a lowering that nobody here knows."""
    if known.is_given:
        return {}
    products = known.lowered.computed_in("tf32") if known.computed_in == "tf32" else None
    return known.lowered.kinds | {each.node: "tf32" for each in products or ()}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def _type(value: ir.Value) -> str | None:
    """Element type and shape as a person writes them; None where neither is known."""
    if value.dtype is None:
        return None
    name = "string" if value.dtype.name == "STRING" else value.dtype.numpy().name
    if value.shape is None:
        return f"{name}"
    dims = (_dimension(each if isinstance(each, int) else each.value) for each in value.shape)
    return f"{name}[{', '.join(dims)}]"


def _dimension(size: int | str | None) -> str:
    """A dimension by its number or name; what inference writes as a formula tells nobody anything."""
    return str(size) if isinstance(size, int) or (size and size.isidentifier()) else "?"
