"""The neighbourhood of one operator as a picture that needs no script: for paper, and where scripts are off.

Layers by the longest way from what is read first, each ordered by where its neighbours stand (the barycentre heuristic
of Sugiyama, Tagawa and Toda, 1981). Enough for a dozen nodes; the whole model is the script's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pytest_trtcheck.errors import visible
from pytest_trtcheck.report import svg
from pytest_trtcheck.report.text import columns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_trtcheck.record import GraphNode, GraphRecord
    from pytest_trtcheck.report.graph import Mode

WIDTH, HEIGHT = 176, 50
_BESIDE, _BETWEEN, _EDGE = 14, 30, 24
_LONGEST = 25
_SWEEPS = 8
_MOST = 13


@dataclass
class _Place:
    """A node in its layer, or a bend of an edge that passes through one (`node` is None)."""

    node: int | None
    above: list[_Place] = field(default_factory=list)
    below: list[_Place] = field(default_factory=list)
    x: float = 0.0
    y: float = 0.0

    @property
    def width(self) -> int:
        return _BESIDE if self.node is None else WIDTH


def tail(name: str) -> str:
    """A name as a box has room for it: the end tells nodes apart."""
    if columns(name) <= _LONGEST:
        return name
    end = name[-_LONGEST:]
    while columns(end) >= _LONGEST:
        end = end[1:]
    return f"…{end}"


def picture(whole: GraphRecord, focus: int, mode: Mode, word: str) -> str:
    """Draw the nodes of `whole` around `focus`, which is marked with `word`, in the colours of `mode`."""
    name, graph = whole.nodes[focus].name, whole.around([focus], _MOST)
    order = {node.name: index for index, node in enumerate(whole.nodes)}
    layers = _layers(graph)
    _place(layers)
    places = [place for layer in layers for place in layer]
    width = round(max(place.x + place.width / 2 for place in places) + _EDGE)
    height = round(layers[-1][0].y + HEIGHT + _EDGE)
    edges = "".join(_edge(upper, lower) for upper in places for lower in upper.below)
    boxes = []
    for place in places:
        if place.node is not None:
            node = graph.nodes[place.node]
            boxes.append(_box(place, node, mode, order[node.name], word if node.name == name else ""))
    stubs = "".join(_stubs(graph, places))
    parts = [f'<path class="edge" d="{edges}"/>', f'<path class="edge stub" d="{stubs}"/>', *boxes]
    return svg.svg(width, height, f"{word}, {name}, and what is around it", parts, kind="model")


def _layers(graph: GraphRecord) -> list[list[_Place]]:
    by = graph.producers()
    ranks: list[int] = []
    parents: list[list[int]] = []
    for index, node in enumerate(graph.nodes):
        # A body's results are read by a node that stands before it: such edges go unranked.
        found = list(dict.fromkeys(by[tensor] for tensor in node.reads if by.get(tensor, index) < index))
        parents.append(found)
        ranks.append(max((ranks[parent] + 1 for parent in found), default=0))
    # What reads nothing here stands right above what reads it.
    for index in reversed(range(len(ranks))):
        below = [ranks[child] for child, found in enumerate(parents) if index in found]
        if below and not parents[index]:
            ranks[index] = min(below) - 1
    places = [_Place(index) for index in range(len(ranks))]
    layers: list[list[_Place]] = [[] for _ in range(max(ranks) + 1)]
    for rank, place in zip(ranks, places, strict=True):
        layers[rank].append(place)
    for child, found in enumerate(parents):
        for parent in found:
            upper = places[parent]
            for rank in range(ranks[parent] + 1, ranks[child]):
                bend = _Place(None, above=[upper])
                upper.below.append(bend)
                layers[rank].append(bend)
                upper = bend
            upper.below.append(places[child])
            places[child].above.append(upper)
    return layers


def _place(layers: Sequence[list[_Place]]) -> None:
    """Give every place its coordinates: its layer's line, as near to its neighbours as those beside it allow."""
    for rank, layer in enumerate(layers):
        _side_by_side(layer, lambda _: 0.0)
        for place in layer:
            place.y = _EDGE + rank * (HEIGHT + _BETWEEN)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for layer in layers if down else reversed(layers):
            _side_by_side(layer, lambda place, down=down: _mean(place.above if down else place.below, place.x))  # type: ignore[misc]
    left = min(place.x - place.width / 2 for layer in layers for place in layer) - _EDGE
    for layer in layers:
        for place in layer:
            place.x -= left


def _mean(places: Sequence[_Place], otherwise: float) -> float:
    return sum(place.x for place in places) / len(places) if places else otherwise


def _side_by_side(layer: list[_Place], wish: Callable[[_Place], float]) -> None:
    """Order a layer by where each wants to be, and move them apart around the middle of what they want."""
    wishes = {id(place): wish(place) for place in layer}
    layer.sort(key=lambda place: wishes[id(place)])
    at = 0.0
    for place in layer:
        place.x = at + place.width / 2
        at += place.width + _BESIDE
    shift = sum(wishes[id(place)] - place.x for place in layer) / len(layer)
    for place in layer:
        place.x += shift


def _edge(upper: _Place, lower: _Place) -> str:
    top = upper.y + HEIGHT
    middle = (top + lower.y) / 2
    curve = f"M{svg.px(upper.x)} {svg.px(top)}C{svg.px(upper.x)} {svg.px(middle)} {svg.px(lower.x)} {svg.px(middle)} "
    through = f"V{svg.px(lower.y + HEIGHT)}" if lower.node is None else ""
    return f"{curve}{svg.px(lower.x)} {svg.px(lower.y)}{through}"


def _stubs(graph: GraphRecord, places: Sequence[_Place]) -> list[str]:
    """Short ends where a node reads or is read by what is not in the picture."""
    by, read = graph.producers(), {tensor for node in graph.nodes for tensor in node.reads}
    found = []
    for place in places:
        if place.node is None:
            continue
        node = graph.nodes[place.node]
        if any(tensor not in by for tensor in node.reads):
            found.append(f"M{svg.px(place.x)} {svg.px(place.y)}v-12")
        if any(tensor not in read for tensor in node.writes):
            found.append(f"M{svg.px(place.x)} {svg.px(place.y + HEIGHT)}v12")
    return found


def _box(place: _Place, node: GraphNode, mode: Mode, index: int, word: str) -> str:
    x, y = place.x - WIDTH / 2, place.y
    return "".join(
        [
            f'<g class="node {mode.key}-{mode.colours[index]}{" marked" if word else ""}">',
            f'<rect x="{svg.px(x)}" y="{svg.px(y)}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
            svg.text(x + 8, y + 15, node.op_type, "op"),
            svg.text(x + 8, y + 29, tail(visible(node.name))),
            svg.text(x + 8, y + 43, mode.texts[index] or mode.unknown.partition(":")[0]),
            svg.text(place.x, y - 5, word, "flag", "middle") if word else "",
            "</g>",
        ]
    )
