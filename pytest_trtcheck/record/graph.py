"""The model that was checked, as a graph to draw: what reads what, what it computes in, how far off it is there."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pytest_trtcheck.record.common import absent


@dataclass(frozen=True)
class GraphTensor:
    """A tensor of the user's file; what was not measured of it is left out."""

    name: str
    type: str | None = absent()
    """Element type and shape, such as "float32[1, 3, N, N]", as far as the file or ONNX's inference tells."""
    error: float | None = absent()
    """How far the lowered model's is from the FP32 model's, ‖y−r‖ / ‖r‖, by the trace of a diagnosis."""
    own: float | None = absent()
    """What its operator loses by itself, run, lowered, on the FP32 model's values: the same measure."""


@dataclass(frozen=True)
class GraphNode:
    """An operator of the user's file. `reads` and `writes` are places in `GraphRecord.tensors`.

    One with bodies (If, Loop, Scan) reads their results too; constants are not among what is read.
    """

    name: str
    op_type: str
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    precision: str | None = absent()
    """What the lowered model computes it in; left out of what only moves values, was folded away, or is not known."""


@dataclass(frozen=True)
class GraphRecord:
    """The graph, in the model's order, without what computes from constants alone.

    Parameters
    ----------
    inputs, outputs
        Of the model: places in `tensors`.
    left_out
        How many nodes are not in it, those far from what matters, where there are too many.
    """

    nodes: tuple[GraphNode, ...] = ()
    tensors: tuple[GraphTensor, ...] = ()
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    left_out: int = absent(0)

    def __post_init__(self) -> None:
        """Refuse what a report that was edited may hold.

        Raises
        ------
        ValueError
            A place is none of a tensor's.
        """
        places = [*self.inputs, *self.outputs, *(place for node in self.nodes for place in (*node.reads, *node.writes))]
        if places and not 0 <= min(places) <= max(places) < len(self.tensors):
            raise ValueError("the graph names a tensor by a place where there is none")

    def place(self, node: str | None) -> int | None:
        """Where a node of this name stands."""
        return next((index for index, each in enumerate(self.nodes) if each.name == node), None)

    def loss(self, node: int, figure: Literal["error", "own"] = "own") -> float:
        """The largest figure among what a node writes; 0 where none was measured, infinity for NaN."""
        found = [getattr(self.tensors[index], figure) for index in self.nodes[node].writes]
        return max((float("inf") if each != each else each for each in found if each is not None), default=0.0)  # noqa: PLR0124

    def producers(self) -> dict[int, int]:
        """By tensor, the node that writes it."""
        return {tensor: index for index, node in enumerate(self.nodes) for tensor in node.writes}

    def around(self, starts: Sequence[int], most: int) -> GraphRecord:
        """At most so many nodes: those nearest to `starts`, along the edges in either direction."""
        if len(self.nodes) <= most:
            return self
        neighbours: list[list[int]] = [[] for _ in self.nodes]
        by = self.producers()
        for index, node in enumerate(self.nodes):
            for producer in dict.fromkeys(by[tensor] for tensor in node.reads if tensor in by):
                neighbours[index].append(producer)
                neighbours[producer].append(index)
        kept: dict[int, None] = {}
        waiting = deque(dict.fromkeys(starts))
        rest = iter(range(len(self.nodes)))  # what no edge leads to
        while len(kept) < most:
            index = waiting.popleft() if waiting else next(rest)
            if index not in kept:
                kept[index] = None
                waiting.extend(neighbours[index])
        return self._only(sorted(kept))

    def _only(self, kept: Sequence[int]) -> GraphRecord:
        nodes = [self.nodes[index] for index in kept]
        used = sorted({tensor for node in nodes for tensor in (*node.reads, *node.writes)})
        new = {tensor: index for index, tensor in enumerate(used)}

        def moved(tensors: Sequence[int]) -> tuple[int, ...]:
            return tuple(new[tensor] for tensor in tensors if tensor in new)

        return GraphRecord(
            tuple(replace(node, reads=moved(node.reads), writes=moved(node.writes)) for node in nodes),
            tuple(self.tensors[tensor] for tensor in used),
            moved(self.inputs),
            moved(self.outputs),
            self.left_out + len(self.nodes) - len(nodes),
        )
