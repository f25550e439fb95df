"""The HTML report: one file that needs nothing else, for a desk and for a phone, in the light and in the dark."""

from __future__ import annotations

import datetime
import importlib.util
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.errors import MissingDependencyError, listed, plural, visible
from pytest_trtcheck.record import BlameRecord
from pytest_trtcheck.record.files import write_text
from pytest_trtcheck.report import builds, describe, graph, merge, plots, systems
from pytest_trtcheck.report.text import format_number, format_optional, one_line, shorten_middle
from pytest_trtcheck.report.view import (
    WORDS,
    BudgetView,
    Judgement,
    ScoreView,
    budgets,
    decisive,
    emulated,
    failed,
    judgements,
    labels,
    missing,
    not_measured,
    notes,
    ordered,
    scored,
    verdict_word,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

    from jinja2 import Environment

    from pytest_trtcheck.record import (
        CheckRecord,
        ComparisonRecord,
        LayerRecord,
        OutputDetails,
        OutputRecord,
        RunRecord,
        TensorRecord,
    )
    from pytest_trtcheck.report.merge import Cell
    from pytest_trtcheck.report.view import Run

_TEMPLATES = Path(__file__).parent / "templates"
_LIBRARIES = ("dagre", "panzoom")
"""What draws models in a browser: templates/vendor/README.md says where they came from."""
_LONGEST_NAME = 56


@dataclass(frozen=True)
class Room:
    """How much of a check the page has room for: outputs, tensors and points of a curve, layers, characters of a
    message; and of all checks together, bytes of models that are drawn.
    """

    outputs: int
    tensors: int
    points: int
    layers: int
    message: int
    graphs: int


_ROOMS = (
    Room(12, 5, 160, 200, 4000, 450_000),
    Room(4, 3, 80, 5, 900, 300_000),
    Room(2, 2, 50, 0, 200, 100_000),
)
_LARGEST_PAGE = 950_000
"""In bytes. A page that is larger says less of each check, as long as that helps: it should be small enough to mail."""


@dataclass(frozen=True)
class Plot:
    """An SVG, in which every text is escaped already, and what it shows."""

    title: str
    picture: str


@dataclass(frozen=True)
class Row:
    """One check as the page shows it: a row of the table, and the details under it."""

    record: CheckRecord
    name: str
    word: str
    judgement: Judgement | None
    latency: BudgetView | None
    budgets: Sequence[BudgetView]
    plots: Sequence[Plot]
    facts: Sequence[tuple[str, str]]
    outputs: Sequence[tuple[OutputRecord, Judgement | None]]
    outputs_left_out: int
    score: ScoreView | None
    blame: BlameRecord
    tensors: Sequence[TensorRecord]
    layers: Sequence[tuple[LayerRecord, float]]
    layers_left_out: int
    message: str

    @property
    def rank(self) -> int:
        """What sorts the verdicts: the ones to look at first come first."""
        return WORDS.index(self.word)

    @property
    def used(self) -> float | None:
        """The share of the tolerance that is used."""
        return self.judgement.used if self.judgement else None

    @property
    def used_text(self) -> str:
        """The same in words."""
        used = self.used
        if used is None:
            return ""
        return f"{format_number(100 * used)} % of the tolerance" if math.isfinite(used) else "not finite"

    @property
    def used_mark(self) -> float:
        """Where that is on the table's bar, 0 to 1: the scale is logarithmic, from 0.001 to 10 tolerances."""
        return min(max((math.log10(max(self.used or 0.0, 1e-9)) + 3) / 4, 0.02), 1.0)


def require() -> None:
    """See before the tests run that the page can be made.

    Raises
    ------
    MissingDependencyError
        jinja2 is not installed.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise MissingDependencyError(
            "the HTML report needs jinja2, which is not installed", 'pip install "pytest-trtcheck[report]"'
        )


def write(run: Run) -> Iterable[str]:
    """Write the file that the option names."""
    assert run.path is not None
    save(run.path, run.record)
    return ()


def save(path: str | os.PathLike[str], run: RunRecord) -> None:
    """Write the report of a run.

    Raises
    ------
    MissingDependencyError
        jinja2 is not installed.
    ReportError
        `path` cannot be written.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    write_text(path, render(run, written=f"{now:%Y-%m-%d %H:%M} UTC"))


def render(run: RunRecord, written: str = "") -> str:
    """The report as one HTML page.

    Raises
    ------
    MissingDependencyError
        jinja2 is not installed.
    """
    checks = ordered(run.checks)
    for room in _ROOMS:
        page = filled("report.html", **_contents(run, checks, room), written=written, script=_asset("script.js"))
        if len(page.encode()) <= _LARGEST_PAGE:
            break
    return page


def filled(template: str, **contents: Any) -> str:
    """A page of ours, with what it is filled with; every text is escaped.

    Raises
    ------
    MissingDependencyError
        jinja2 is not installed.
    """
    return _jinja().get_template(template).render(**contents, style=_asset("style.css"))


def _contents(run: RunRecord, checks: Sequence[CheckRecord], room: Room) -> dict[str, Any]:
    rows = [_row(record, name, room) for record, name in zip(checks, labels(checks), strict=True)]
    rows.sort(key=lambda row: row.rank)
    words = Counter(row.word for row in rows)
    drawings = graph.drawings([row.record for row in rows], room.graphs)
    return {
        "drawings": drawings,
        "graph_style": _asset("graph.css") if drawings.by_check else "",
        "graph_scripts": [*map(_vendored, _LIBRARIES), _asset("graph.js")] if drawings.by_check else [],
        "rows": rows,
        "words": [(word, words[word]) for word in WORDS if words[word]],
        "bad": sum(failed(record) for record in checks),
        "precisions": sorted({record.precision for record in checks if record.precision}),
        "evidences": sorted({record.evidence for record in checks if record.evidence}),
        "machines": [machine.name for machine in run.machines],
        "fleet": _fleet(run, rows),
        "emulated": len(emulated(checks)),
        "not_measured": not_measured(checks),
        "notes": [*((said, 1) for said in [missing(run)] if said), *notes(checks)],
        "overview": _overview(rows),
        "systems": [_compared(each) for each in systems.compared(checks)],
        "system_headers": systems.HEADERS,
        "builds": list(builds.side_by_side(checks)),
        "build_headers": builds.HEADERS,
        "environment": {"GPU": "none", "TensorRT": "not installed"} | run.environment.described(),
        "tool": run.tool,
    }


def _compared(comparison: ComparisonRecord) -> dict[str, Any]:
    """A table of systems: the verdict beside each, what is missing under it."""
    rows = [(systems.cells(row), row.verdict.replace("_", " ")) for row in comparison.systems]
    return {"title": systems.title(comparison), "rows": rows, "remarks": systems.remarks(comparison)}


def _fleet(run: RunRecord, rows: Sequence[Row]) -> list[tuple[str, str | None, list[tuple[Cell, int | None]]]]:
    """Models and machines of a merged report: each cell with the place of its worst check among the rows."""
    places = {id(row.record): place for place, row in enumerate(rows, 1)}
    return [
        (row.model, row.precision, [(cell, places.get(id(cell.worst))) for cell in row.cells])
        for row in merge.fleet(run)
    ]


def _jinja() -> Environment:
    require()
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters["number"] = format_optional
    environment.filters["sortable"] = _sortable
    environment.filters["value"] = _element
    environment.globals["plural"] = plural
    environment.globals["listed"] = listed
    environment.globals["shortened"] = lambda text: shorten_middle(one_line(text), _LONGEST_NAME)
    return environment


def _asset(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _vendored(name: str) -> str:
    """A library with its license, as that demands; without the map that a browser would look for beside the page."""
    code = _asset(f"vendor/{name}.min.js").partition("//# sourceMappingURL")[0]
    return f"/*! {name}\n{_asset(f'vendor/{name}.LICENSE')}*/\n{code}"


def _row(record: CheckRecord, name: str, room: Room) -> Row:
    parity = record.parity
    blame = (parity and parity.blame) or BlameRecord()
    judged = _by_output(record)
    all_outputs = sorted(
        ((output, judged.get(output.name)) for output in (parity.outputs if parity else ())),
        key=lambda pair: pair[1].severity if pair[1] else (-1, 0.0),
        reverse=True,
    )
    shown = all_outputs[: room.outputs]
    measured = budgets(record)
    layers = _layers(record)
    message = record.message or ""
    return Row(
        record=record,
        name=shorten_middle(name, _LONGEST_NAME),
        word=verdict_word(record),
        judgement=decisive(record),
        latency=max(measured, key=_tightness, default=None),
        budgets=measured,
        plots=_plots(record, blame, shown, measured, room),
        facts=describe.check(record),
        outputs=shown,
        outputs_left_out=len(all_outputs) - len(shown),
        score=scored(record),
        blame=blame,
        tensors=_tensors_to_look_at(blame, room.tensors),
        layers=layers[: room.layers],
        layers_left_out=max(0, len(layers) - room.layers),
        message=message[: room.message] + (" …" if len(message) > room.message else ""),
    )


def _layers(record: CheckRecord) -> list[tuple[LayerRecord, float]]:
    """The layers, each with its share of the time of all, the one that takes longest first; the engine's order where
    none was timed.
    """
    layers = record.engine.layers if record.engine else ()
    total = sum(layer.time_ms or 0.0 for layer in layers) or 1.0
    return sorted(((layer, (layer.time_ms or 0.0) / total) for layer in layers), key=lambda pair: -pair[1])


def _by_output(record: CheckRecord) -> dict[str | None, Judgement]:
    """What decided each output."""
    found: dict[str | None, Judgement] = {}
    for judgement in judgements(record):
        best = found.get(judgement.output)
        if best is None or judgement.severity > best.severity:
            found[judgement.output] = judgement
    return found


def _plots(
    record: CheckRecord,
    blame: BlameRecord,
    shown: Sequence[tuple[OutputRecord, Judgement | None]],
    measured: Sequence[BudgetView],
    room: Room,
) -> list[Plot]:
    engine = record.evidence == "engine"
    rows = [(judgement, _emulated(output, judgement), engine) for output, judgement in shown if judgement is not None]
    found = {"Error against tolerance": plots.outputs(rows) if rows else ""}
    if blame.tensors:
        found["Error along the graph"] = plots.along_graph(blame.tensors, blame.tensor, room.points)
    drawn = next(((output, judged) for output, judged in shown if output.details.error_octaves), None)
    if drawn:
        name, details = drawn[0].name, drawn[0].details
        picture = plots.histogram(details.error_octaves, details.error_zeros or 0, _absolute_limit(details, drawn[1]))
        found[f"Error histogram of {one_line(name)}"] = picture
    if record.latency and record.latency.details.samples_ms:
        found["Latency distribution"] = plots.latency(record.latency.details.samples_ms, measured)
    return [Plot(title, picture) for title, picture in found.items() if picture]


def _emulated(output: OutputRecord, judgement: Judgement) -> float | None:
    """The emulated model's error of an output whose verdict is an engine's."""
    return (output.details.emulated or {}).get(judgement.metric)


def _absolute_limit(details: OutputDetails, judgement: Judgement | None) -> float | None:
    """The limit in the units of |y−r|, where the metric says what that is."""
    if judgement is None or judgement.limit is None:
        return None
    if judgement.metric == "abs":
        return judgement.limit
    return judgement.limit * details.peak if judgement.metric == "max" and details.peak else None


def _tensors_to_look_at(blame: BlameRecord, most: int) -> list[TensorRecord]:
    """The tensor to blame, and those where the error grows most over the tensor before."""
    tensors = blame.tensors
    errors = [tensor.error or 0.0 for tensor in tensors]
    # Below what is usual in this graph, growth means nothing: 0 to 1e-7 is no jump.
    usual = sorted(errors)[len(errors) // 2] if errors else 0.0
    growth = [after / max(before, usual, 1e-12) for before, after in zip([0.0, *errors], errors, strict=False)]
    order = sorted(range(len(tensors)), key=lambda i: (tensors[i].name != blame.tensor, -growth[i], i))
    return [tensors[index] for index in sorted(order[:most])]


def _overview(rows: Sequence[Row]) -> Plot | None:
    """Emulated against engine, over the checks that have both."""
    points = []
    for row in rows:
        if row.record.evidence != "engine":
            continue
        output = next((output for output, judged in row.outputs if judged is not None), None)
        judgement = row.judgement
        seen = _emulated(output, judgement) if output and judgement and not judgement.at_least else None
        if seen is not None and judgement is not None and judgement.value is not None:
            points.append((f"{row.name} {row.record.precision}", seen, judgement.value, failed(row.record)))
    return Plot("Emulated against engine", plots.emulated_against_engine(points)) if len(points) > 1 else None


def _tightness(budget: BudgetView) -> float:
    """How much of its limit a budget uses."""
    if budget.value is None or not budget.limit:
        return 0.0
    return budget.limit / max(budget.value, 1e-12) if budget.at_least else budget.value / budget.limit


def _element(value: Any) -> str:
    """An element of an output, in as many digits as FP32 has."""
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _sortable(value: float | None) -> str:
    """A number for the script to sort by: NaN is as bad as infinity, and what is not known has no place."""
    if value is None:
        return ""
    return "inf" if math.isnan(value) else f"{value:.6g}"
