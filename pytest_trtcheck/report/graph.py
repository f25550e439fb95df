"""A model as the HTML report draws it: what colours each operator, and what is said where nothing was measured.

The script draws and nothing else: classes, texts and legends are all made here, for it and for the picture that is
there without it.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pytest_trtcheck.errors import listed, plural, visible
from pytest_trtcheck.metrics import DEFAULT_TOLERANCE
from pytest_trtcheck.report import still
from pytest_trtcheck.report.text import format_limit, format_number
from pytest_trtcheck.report.view import decisive

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_trtcheck.record import CheckRecord, GraphRecord, LayerRecord

UNKNOWN = "-"
"""The colour of what was not measured."""
_SIZES = (1000, 400, 150, 60)
"""Nodes of a graph, so many as there is room for."""
_PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8", "fp8", "int4", "fp4", "other")
_SHARES = (0.001, 0.003, 0.01, 0.03, 0.1)
"""Of the time of all layers: where the colours of time change."""


@dataclass(frozen=True)
class Mode:
    """One way of colouring: of each node a colour, one character, and a text; `legend` says what the colours mean.

    `missing` is why nothing has a colour, where nothing has; `unknown` what is said of a node that has none.
    """

    key: Literal["error", "own", "precision", "time"]
    title: str
    colours: str
    texts: tuple[str, ...]
    legend: tuple[tuple[str, str], ...]
    said: str
    missing: str = ""
    unknown: str = "not measured"


@dataclass(frozen=True)
class Drawing:
    """What the page holds of one graph: `data` and, shared among checks, `structure` are JSON for the script.

    `others` says what the nodes are that are marked beside the culprit, if there are any.
    """

    structure: int
    data: str
    picture: str
    modes: tuple[Mode, ...]
    shown: Mode
    heading: str
    others: str
    remark: str
    left_out: int


@dataclass(frozen=True)
class Drawings:
    """Those of a page: by place among its checks, what they share, and those that there was no room for."""

    by_check: Mapping[int, Drawing]
    structures: tuple[str, ...]
    left_out: frozenset[int] = frozenset()


def drawings(checks: Sequence[CheckRecord], room: int) -> Drawings:
    """As many of the checks' graphs as fit into `room` bytes, the first ones first, each as large as fits for all."""
    wanted = [index for index, record in enumerate(checks) if record.graph is not None and record.graph.nodes]
    for size in _SIZES:
        found = _drawn(checks, wanted, size, room)
        if not found.left_out:
            break
    return found


def _drawn(checks: Sequence[CheckRecord], wanted: Sequence[int], size: int, room: int) -> Drawings:
    structures: dict[str, int] = {}
    found: dict[int, Drawing] = {}
    for index in wanted:
        shared = len(structures)
        drawing = _drawing(checks[index], size, structures)
        texts = (drawing.data, drawing.picture, *list(structures)[shared:])
        room -= sum(len(text.encode()) for text in texts)
        if room < 0:
            return Drawings(found, tuple(structures)[:shared], frozenset(wanted) - set(found))
        found[index] = drawing
    return Drawings(found, tuple(structures))


def _drawing(record: CheckRecord, size: int, structures: dict[str, int]) -> Drawing:
    assert record.graph is not None
    blame = record.parity.blame if record.parity else None
    blamed = (blame.culprit if blame else None) or {}
    named = [blamed.get("node"), *blame.others] if blame else []
    graph = record.graph
    starts = [place for place in map(graph.place, named) if place is not None]
    graph = graph.around(starts or [_focus(record, graph)[0]], size)
    culprit = graph.place(named[0]) if named else None
    others = [place for place in map(graph.place, named[1:]) if place is not None]
    modes = (*_errors(record, graph), _precision(record, graph), _time(record, graph))
    focus, heading = (culprit, "the culprit") if culprit is not None else _focus(record, graph)
    by_node = _layers_by_node(record)
    shown = next((mode for mode in modes if not mode.missing), modes[0])
    structure = _json(
        {
            "names": [visible(node.name) for node in graph.nodes],
            "ops": [visible(node.op_type) for node in graph.nodes],
            "reads": [node.reads for node in graph.nodes],
            "writes": [node.writes for node in graph.nodes],
            "tensors": [visible(tensor.name) for tensor in graph.tensors],
            "types": [visible(tensor.type or "") for tensor in graph.tensors],
            "inputs": graph.inputs,
            "outputs": graph.outputs,
        }
    )
    layers = {layer.name: _layer_text(layer) for held in by_node.values() for layer in held}
    places = {name: place for place, name in enumerate(layers)}
    is_engine_s = blamed.get("kind") == "engine"
    remark = "The culprit is where the engine departs from the emulation, whose errors the colors show." * is_engine_s
    data: dict[str, Any] = {
        "why": visible(str(blamed.get("detail") or "")),
        "alike": "not told apart from the culprit" if is_engine_s else "the same fault as the culprit's",
        "colours": {mode.key: mode.colours for mode in modes},
        "texts": {mode.key: mode.texts for mode in modes},
        "errors": ["" if each.error is None else format_number(each.error) for each in graph.tensors],
        "layers": [visible(text) for text in layers.values()],
        "layersOf": [[places[layer.name] for layer in by_node.get(node.name, ())] for node in graph.nodes],
        "culprit": culprit,
        "others": others,
        "focus": focus,
        "mode": shown.key,
        "unknown": {mode.key: mode.unknown for mode in modes},
    }
    return Drawing(
        structures.setdefault(structure, len(structures)),
        _json(data),
        still.picture(graph, focus, shown, heading),
        modes,
        shown,
        heading,
        data["alike"] if others else "",
        remark,
        graph.left_out,
    )


def _focus(record: CheckRecord, graph: GraphRecord) -> tuple[int, str]:
    """Where to look first if nobody is to blame."""
    losses = [graph.loss(index) for index in range(len(graph.nodes))]
    if any(losses):
        return losses.index(max(losses)), "what loses most by itself"
    times = [_ms(layers) or 0.0 for layers in _by_node(record, graph)]
    if any(times):
        return times.index(max(times)), "what takes longest"
    return 0, "the first operator"


# --- error -----------------------------------------------------------------------------------------------------------


def _errors(record: CheckRecord, graph: GraphRecord) -> tuple[Mode, Mode]:
    """How far off each operator's results are, and what it loses by itself, on the scale of the tolerance."""
    judged = decisive(record)
    if judged is not None and judged.limit and judged.metric in {"max", "l2"}:
        limit, whose = judged.limit, "the tolerance"
    else:
        asked = (record.precision or "").partition(" ")[0]
        limit = next((tol for name, tol in DEFAULT_TOLERANCE.items() if name == asked), DEFAULT_TOLERANCE["fp16"])
        whose = f"what {asked or 'fp16'} may cost by default"
    steps = (limit / 1000, limit / 100, limit / 10, limit, 10 * limit)
    said = [format_limit(float(f"{step:.3g}")) for step in steps]
    legend = (
        ("0", f"≤ {said[0]}"),
        ("1", f"≤ {said[1]}"),
        ("2", f"≤ {said[2]}"),
        ("3", f"≤ {said[3]}, {whose}"),
        ("4", f"above it, ≤ {said[4]}"),
        ("5", f"> {said[4]}"),
        ("6", "NaN or infinite"),
    )

    def mode(key: Literal["error", "own"], title: str, what: str) -> Mode:
        figures = [_worst(graph, index, key) for index in range(len(graph.nodes))]
        colours = "".join(
            UNKNOWN if each is None else "6" if not math.isfinite(each) else str(bisect_left(steps, each))
            for each in figures
        )
        texts = tuple("" if each is None else format_number(each) for each in figures)
        missing = "" if any(texts) else "no error was traced: a diagnosis does that where a check fails"
        beside = "; what TensorRT adds of its own is not in it" if record.evidence == "engine" else ""
        return Mode(key, title, colours, texts, legend, f"{what}{beside}.", missing)

    measure = "‖y−r‖ / ‖r‖ of what each operator gives"
    return (
        mode("error", "Error", f"{measure}, the emulated lowered model against the FP32 model, on the worst input"),
        mode(
            "own",
            "Lost here",
            f"{measure} if it alone is lowered, emulated on the FP32 model's values; by channel where that is more",
        ),
    )


def _worst(graph: GraphRecord, node: int, key: Literal["error", "own"]) -> float | None:
    known = [getattr(graph.tensors[tensor], key) for tensor in graph.nodes[node].writes]
    measured = [math.inf if math.isnan(each) else each for each in known if each is not None]
    return max(measured, default=None)


# --- precision -------------------------------------------------------------------------------------------------------


def _precision(record: CheckRecord, graph: GraphRecord) -> Mode:
    """What the engine computes each operator in, where it tells; else what the model was lowered to."""
    layers = _by_node(record, graph)
    if any(layers):
        # The layer that computes counts, and not one that moves its values.
        texts = tuple(
            "/".join(dict.fromkeys(each.precision or "not told" for each in found if node.name in each.nodes))
            or "/".join(dict.fromkeys(each.precision or "not told" for each in found))
            for node, found in zip(graph.nodes, layers, strict=True)
        )
        said = "as TensorRT's engine inspector tells it, by the layer that holds the operator."
        unknown = "not told: no layer names it"
    else:
        texts = tuple(node.precision or "" for node in graph.nodes)
        said = "as the model was lowered; what TensorRT makes of it was not seen."
        unknown = "not told: it only moves values, or became part of another"
    texts = tuple(map(visible, texts))
    kinds = [text.partition("/")[0] for text in texts]
    colours = "".join(
        UNKNOWN if not kind else str(_PRECISIONS.index(kind if kind in _PRECISIONS else "other")) for kind in kinds
    )
    present = {*colours}
    legend = tuple((str(place), name) for place, name in enumerate(_PRECISIONS) if str(place) in present)
    missing = "" if any(texts) else "it is not known what the operators compute in"
    return Mode("precision", "Precision", colours, texts, legend, f"Computes in: {said}", missing, unknown)


# --- time ------------------------------------------------------------------------------------------------------------


def _time(record: CheckRecord, graph: GraphRecord) -> Mode:
    """What the layers take that hold an operator, as a share of all layers."""
    layers = record.engine.layers if record.engine else ()
    total = sum(layer.time_ms or 0.0 for layer in layers)
    times = [_ms(found) for found in _by_node(record, graph)]
    colours = "".join(
        UNKNOWN if each is None or not total else str(bisect_left(_SHARES, each / total)) for each in times
    )
    texts = tuple("" if each is None else f"{format_number(each)} ms" for each in times)
    edges = [f"{100 * share:g} %" for share in _SHARES]
    named = [f"≤ {edge}" for edge in edges] + [f"> {edges[-1]} of {format_number(total)} ms"]
    said = (
        "Median time in TensorRT's profiler of the layers that hold the operator, as a share of all layers; a layer of "
        "several operators counts at each of them."
    )
    missing = ""
    if not any(texts):
        untimed = record.engine.layers_untimed if record.engine else None
        missing = untimed or "no layer was timed: a GPU does that where latency is measured, or with --trt-layers"
    return Mode("time", "Time", colours, texts, tuple((str(n), text) for n, text in enumerate(named)), said, missing)


def _ms(layers: Sequence[LayerRecord]) -> float | None:
    known = [layer.time_ms for layer in layers if layer.time_ms is not None]
    return sum(known) if known else None


def _layers_by_node(record: CheckRecord) -> dict[str, list[LayerRecord]]:
    found: dict[str, list[LayerRecord]] = {}
    for layer in record.engine.layers if record.engine else ():
        for node in dict.fromkeys((*layer.nodes, *layer.moves)):
            found.setdefault(node, []).append(layer)
    return found


def _by_node(record: CheckRecord, graph: GraphRecord) -> list[list[LayerRecord]]:
    layers = _layers_by_node(record)
    return [layers.get(node.name, []) for node in graph.nodes]


def _layer_text(layer: LayerRecord) -> str:
    held = len({*layer.nodes, *layer.moves})
    figures = [
        layer.precision or "",
        "" if layer.time_ms is None else f"{format_number(layer.time_ms)} ms",
        f"{plural(held, 'operator')} in it" if held > 1 else "",
    ]
    told = listed([each for each in figures if each], 3)
    return f"{layer.name}: {told}" if told else layer.name


def _json(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it ends that, or begins a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
