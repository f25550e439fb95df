"""The HTML report: one file that needs nothing else, for a desk and for a phone, in the light and in the dark."""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.util
import json
import math
import re
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytest_trtcheck.errors import MissingDependencyError, address_of, cut, listed, plural, visible
from pytest_trtcheck.record import BlameRecord, is_bad
from pytest_trtcheck.record.files import write_text
from pytest_trtcheck.report import builds, describe, fleet, graph, merge, plots, systems
from pytest_trtcheck.report.text import (
    format_against,
    format_duration,
    format_number,
    format_optional,
    one_line,
    short_commit,
    shorten_middle,
)
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
    short_names,
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
    from pytest_trtcheck.report.history import History
    from pytest_trtcheck.report.view import Run

_TEMPLATES = Path(__file__).parent / "templates"
_LIBRARIES = ("dagre", "panzoom")
"""What draws models in a browser: templates/vendor/README.md says where they came from."""
_LONGEST_NAME = 56
_LONGEST_ANCHOR = 100
_MANY_TIMES = 10
_WIDEST_LABEL = 20


@dataclass(frozen=True)
class Room:
    """How much of a check the page has room for: outputs, tensors and points of a curve, layers, characters of a
    message, and of which checks there are plots; and of all checks together, bytes of models that are drawn.
    """

    outputs: int
    tensors: int
    points: int
    layers: int
    message: int
    graphs: int
    plotted: Literal["all", "not passed", "none"] = "all"


_ROOMS = (
    Room(12, 5, 160, 200, 4000, 450_000),
    Room(4, 3, 80, 5, 900, 300_000),
    Room(2, 2, 50, 0, 600, 200_000),
    Room(2, 2, 50, 0, 600, 100_000, "not passed"),
    Room(2, 2, 50, 0, 200, 100_000, "not passed"),
    Room(1, 1, 0, 0, 200, 0, "none"),
    Room(0, 0, 0, 0, 120, 0, "none"),
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
    anchor: str
    place: int
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
    explained_at: str | None

    @property
    def is_bad(self) -> bool:
        """Whether somebody has to look at it."""
        return failed(self.record)

    @property
    def test(self) -> str:
        """The test without the file that it is in."""
        return shorten_middle(one_line(self.record.nodeid.partition("::")[2] or self.record.nodeid), _LONGEST_NAME)

    @property
    def file(self) -> str:
        """The file that its test is in."""
        return self.record.nodeid.partition("::")[0]

    @property
    def reason(self) -> str:
        """What a closed row says of a check that did not pass: what is to blame, or what happened."""
        if self.word in {"pass", "not measured"}:
            return ""
        summary = self.blame.summary or self.blame.headline
        if self.blame.step and summary:
            kept = self.blame.keep_fp32
            cure = f"; passes with {plural(len(kept), 'node')} in FP32" if kept else ""
            return one_line(f"To blame: {self.blame.who}, {summary.rstrip('.')}{cure}")
        # That outputs differ is what the error beside its tolerance says.
        if self.record.parity and is_bad(self.record.parity.verdict):
            return ""
        reasons = (part.reason for part in self.record.parts.values() if is_bad(part.verdict))
        return one_line(self.record.headline or next(filter(None, reasons), ""))

    @property
    def lines(self) -> list[tuple[int, str]]:
        """The message, each line with the characters by which it hangs where it is too long for a screen."""
        return [(_hang(line), line) for line in self.message.splitlines()]

    @property
    def commands(self) -> list[tuple[str, str]]:
        """What there is to paste, and what it does."""
        record, kept = self.record, self.blame.keep_fp32
        quoted = ", ".join(json.dumps(name, ensure_ascii=False) for name in kept or ())
        found = [("Passes with", f"keep_fp32=[{quoted}]")] if kept else []
        if record.replay:
            found.append(("Replay it on any machine:", record.replay))
        # A test without code was made by options that the record does not have.
        if self.word != "pass" and ".py::" in record.nodeid:
            found.append(("Run it again:", f"pytest {shlex.quote(record.nodeid)}"))
        return found

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
        if not math.isfinite(used):
            return "not finite"
        return f"{format_against(100 * used, 100)[0]} %" if used < _MANY_TIMES else f"{format_number(used)} ×"

    @property
    def used_mark(self) -> float:
        """Where that is on the table's bar, 0 to 1: from nothing to one and a half tolerances."""
        return min(max((self.used or 0.0) / 1.5, 0.02), 1.0)


@dataclass(frozen=True)
class Group:
    """The checks of one model, the ones to look at first before the others."""

    name: str
    anchor: str
    rows: Sequence[Row]

    @property
    def word(self) -> str:
        """The worst of their verdicts."""
        return self.rows[0].word

    @property
    def counts(self) -> str:
        """How many came to what."""
        words = Counter(row.word for row in self.rows)
        return f"{plural(len(self.rows), 'check')}: " + ", ".join(
            f"{words[word]} {word}" for word in WORDS if words[word]
        )


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
    place, last = 0, len(_ROOMS) - 1
    while True:
        contents = _contents(run, checks, _ROOMS[place])
        page = filled("report.html", **contents, written=written, script=_asset("script.js"))
        size = len(page.encode())
        if size <= _LARGEST_PAGE or place == last:
            return page
        # What is far too large is so with a little less room, too: making a page of hundreds of checks takes a while.
        place = min(place + (2 if size > 2 * _LARGEST_PAGE else 1), last)


def save_history(path: str | os.PathLike[str], found: History) -> None:
    """Write what became of checks from report to report.

    Raises
    ------
    MissingDependencyError
        jinja2 is not installed.
    ReportError
        `path` cannot be written.
    """
    write_text(path, render_history(found))


def render_history(found: History) -> str:
    """The same as one HTML page.

    Raises
    ------
    MissingDependencyError
        jinja2 is not installed.
    """
    tracks = [(track, [(line, plots.history(line, track.turns)) for line in track.lines]) for track in found.tracks]
    return filled(
        "history.html",
        found=found,
        loud=[each for each in tracks if not each[0].is_quiet],
        quiet=[each for each in tracks if each[0].is_quiet],
        worse=sum(bool(track.worse) for track in found.tracks),
    )


def filled(template: str, **contents: Any) -> str:
    """A page of ours, with what it is filled with; every text is escaped.

    Raises
    ------
    MissingDependencyError
        jinja2 is not installed.
    """
    require()
    return _jinja().get_template(template).render(**contents, style=_asset("style.css"))


def _contents(run: RunRecord, checks: Sequence[CheckRecord], room: Room) -> dict[str, Any]:
    told = sorted(zip(checks, labels(checks), anchors(checks), strict=True), key=lambda each: rank(each[0]))
    rows = [_row(*each, place, room) for place, each in enumerate(told)]
    words = Counter(row.word for row in rows)
    drawings = graph.drawings([row.record for row in rows], room.graphs)
    table = fleet.fleet(run)
    return {
        "drawings": drawings,
        "graph_style": _asset("graph.css") if drawings.by_check else "",
        "graph_scripts": [*map(_vendored, _LIBRARIES), _asset("graph.js")] if drawings.by_check else [],
        "rows": rows,
        "groups": _groups(rows),
        "words": [(word, words[word]) for word in WORDS if words[word]],
        "bad": sum(row.is_bad for row in rows),
        "lost": sum(each.outcome != "skipped" for each in run.missing),
        "about": _about(run),
        "precisions": sorted({record.precision for record in checks if record.precision}),
        "evidences": sorted({record.evidence for record in checks if record.evidence}),
        "is_merged": bool(run.machines),
        "fleet": table,
        "fleet_rows": _linked(table, rows) if table else [],
        "gaps": merge.gaps(run) if run.machines else [],
        "emulated": len(emulated(checks)),
        "not_measured": not_measured(checks),
        "notes": [*((said, 1) for said in [missing(run)] if said and not run.machines), *notes(checks)],
        "overview": _overview(rows),
        "systems": [_compared(each) for each in systems.compared(checks)],
        "system_headers": systems.HEADERS,
        "builds": list(builds.side_by_side(checks)),
        "build_headers": builds.HEADERS,
        "environment": {"GPU": "none", "TensorRT": "not installed"} | run.environment.described(),
        "tool": run.tool,
    }


def _about(run: RunRecord) -> list[str]:
    """When, how long, on what and of which revision, as far as it is known."""
    took = sum(check.duration_s for check in run.checks)
    environment = run.environment.described()
    return [
        *([f"started {run.started.replace('T', ' ').replace('Z', ' UTC')}"] if run.started else []),
        *([f"took {format_duration(run.duration_s)}"] if run.duration_s else []),
        *([f"checks {'alone ' if run.duration_s else ''}{format_duration(took)}"] if took else []),
        *(environment[name] for name in ("GPU", "TensorRT") if name in environment),
        *([f"commit {short_commit(run.commit)}"] if run.commit else []),
    ]


def _groups(rows: Sequence[Row]) -> list[Group]:
    """The rows by model, a model before another where it has the worse verdict."""
    names = short_names({row.record.model for row in rows})
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.record.model, []).append(row)
    return [
        Group(shorten_middle(names[model], _LONGEST_NAME), f"model-{slug(model)}-{place}", of_model)
        for place, (model, of_model) in enumerate(found.items(), 1)
    ]


def rank(record: CheckRecord) -> int:
    """What sorts the verdicts: the ones to look at first come first."""
    return WORDS.index(verdict_word(record))


def anchors(checks: Sequence[CheckRecord]) -> list[str]:
    """The address of each check in the page: the same in every report of the test, so that links to it stay right."""
    wanted = [" ".join(filter(None, (check.nodeid, check.machine))) for check in checks]
    # Two tests that differ in a sign alone look the same in an address; so do several checks of one test.
    told = [f"{name} {check.precision or ''}" for name, check in zip(wanted, checks, strict=True)]
    several = {name for name, count in Counter(map(slug, wanted)).items() if count > 1}
    found: list[str] = []
    count: Counter[str] = Counter()
    for name, more in zip(wanted, told, strict=True):
        anchor = slug(name)
        if anchor in several:
            anchor = f"{anchor}-{hashlib.sha256(more.encode(errors='replace')).hexdigest()[:6]}"
        count[anchor] += 1
        found.append(anchor if count[anchor] == 1 else f"{anchor}_again_{count[anchor]}")
    return found


def slug(text: str) -> str:
    """What of a text can stand in an address as it is."""
    plain = re.sub(r"[^A-Za-z0-9_.]+", "-", text.replace(".py::", "-")).strip("-") or "check"
    if len(plain) <= _LONGEST_ANCHOR:
        return plain
    return f"{plain[:_LONGEST_ANCHOR]}-{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:6]}"


def _compared(comparison: ComparisonRecord) -> dict[str, Any]:
    """A table of systems: the verdict beside each, what is missing under it."""
    rows = [(systems.cells(row), row.verdict.replace("_", " ")) for row in comparison.systems]
    return {"title": systems.title(comparison), "rows": rows, "remarks": systems.remarks(comparison)}


def _linked(
    table: fleet.Fleet, rows: Sequence[Row]
) -> list[tuple[str, str | None, list[tuple[fleet.Cell, str | None]]]]:
    """Models and machines: each cell with the address of its worst check."""
    places = {id(row.record): row.anchor for row in rows}
    return [
        (row.model, row.precision, [(cell, places.get(id(cell.worst))) for cell in row.cells]) for row in table.rows
    ]


def _hang(line: str) -> int:
    """By how many characters a line of a message hangs: to the column of what it says behind a label, or a little."""
    label = re.match(r" +\S+(?: \S+)* {2,}(?=\S)", line)
    indent = len(line) - len(line.lstrip())
    return label.end() if label and label.end() <= _WIDEST_LABEL else min(indent + 2, _WIDEST_LABEL)


@functools.cache
def _jinja() -> Environment:
    """Where templates come from, compiled once: a large page is made again and again until it is small enough."""
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
    environment.filters["rank"] = rank
    environment.filters["duration"] = format_duration
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


def _row(record: CheckRecord, name: str, anchor: str, place: int, room: Room) -> Row:
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
    is_plotted = room.plotted == "all" or (room.plotted == "not passed" and record.verdict != "pass")
    return Row(
        record=record,
        name=shorten_middle(name, _LONGEST_NAME),
        anchor=anchor,
        place=place,
        word=verdict_word(record),
        judgement=decisive(record),
        latency=max(measured, key=_tightness, default=None),
        budgets=measured,
        plots=_plots(record, blame, shown, measured, room) if is_plotted else (),
        facts=describe.check(record),
        outputs=shown,
        outputs_left_out=len(all_outputs) - len(shown),
        score=scored(record),
        blame=blame,
        tensors=_tensors_to_look_at(blame, room.tensors),
        layers=layers[: room.layers],
        layers_left_out=max(0, len(layers) - room.layers),
        explained_at=address_of(record.code) if record.code else None,
        message=cut(message, room.message) + (" …" if len(message) > room.message else ""),
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
