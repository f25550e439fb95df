"""The terminal summary: a table of the checks, and in plain words what was not run or not measured."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from pytest_trtcheck.errors import plural
from pytest_trtcheck.record import is_bad
from pytest_trtcheck.report import systems
from pytest_trtcheck.report.builds import HEADERS, side_by_side
from pytest_trtcheck.report.text import MISSING, columns, one_line, shorten_apart, shorten_middle
from pytest_trtcheck.report.view import (
    VERDICTS,
    WORDS,
    Label,
    budgets,
    decisive,
    emulated,
    inconclusive,
    labels,
    not_measured,
    notes,
    ordered,
    scored,
    unseen,
    verdict_word,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pytest_trtcheck.record import CheckRecord, RunRecord
    from pytest_trtcheck.report.view import Run

DEFAULT_WIDTH = 80

_NARROWEST_NAME = 12
_LEAST_TEST = 10
"""Columns that a test's name keeps beside a model's."""
MOST_ROWS = 40
"""Checks that all have rows, where nobody says which are listed."""
_MOST_NOTES = 5
_NO_ROWS = ("pass", "not measured")
_GAP = "  "
_MARKUP: Mapping[str, Mapping[str, bool]] = {
    "pass": {"green": True},
    "fail": {"red": True, "bold": True},
    "error": {"red": True, "bold": True},
    "inconclusive": {"yellow": True, "bold": True},
    "not measured": {"yellow": True},
    "xfail": {"yellow": True},
}


class Writer(Protocol):
    """What the summary needs of pytest's terminal reporter."""

    def write(self, content: str, **markup: bool) -> None:
        """Write text without a line break."""

    def line(self, msg: str) -> None:
        """Write text and a line break."""


@dataclass(frozen=True)
class Segment:
    """Text in one style; the keys of `markup` are those of pytest's terminal writer."""

    text: str
    markup: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """One line of the summary."""

    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        """The line without style."""
        return "".join(segment.text for segment in self.segments)


def write(run: Run) -> list[Line]:
    """The summary, to be shown."""
    lines = summary_lines(run.record.checks, run.width, run.listed)
    if run.record.environment.gpus:
        lines += _wrapped(_dealt_out(run.record), run.width, {})
    for said in unseen(run.record):
        lines += _wrapped(said, run.width, _MARKUP["error"])
    return lines


def _dealt_out(run: RunRecord) -> str:
    """How many checks each of several GPUs ran."""
    ran = Counter(check.gpu.uuid for check in run.checks if check.gpu)
    shares = ", ".join(f"{gpu.uuid} {plural(ran[gpu.uuid], 'check')}" for gpu in run.environment.gpus)
    return one_line(f"run on {run.environment.described()['GPU']}: {shares}")


def show(lines: Iterable[Line | str], writer: Writer) -> None:
    """Write the lines to pytest's terminal reporter."""
    for line in lines:
        if isinstance(line, str):
            writer.line(line)
            continue
        for segment in line.segments:
            writer.write(segment.text, **segment.markup)
        writer.line("")


def summary_lines(records: Iterable[CheckRecord], width: int = DEFAULT_WIDTH, listed: str = "all") -> list[Line]:
    """The summary of check records, in the same order however the tests were run: what to look at first comes first.

    Parameters
    ----------
    width
        In terminal columns. The tables take no more than they need.
    listed
        Which checks have rows: `all`, those that did not pass (`failed`), or `none`; `auto`: all of few.
    """
    checks = ordered(records)
    if not checks:
        return []
    if listed == "none":
        return [totals(checks)]
    shown = checks
    if listed == "failed" or (listed == "auto" and len(checks) > MOST_ROWS):
        shown = [check for check in checks if verdict_word(check) not in _NO_ROWS]
    names = labels(checks)
    listed_ids = set(map(id, shown))
    rows = [(check, name) for check, name in zip(checks, names, strict=True) if id(check) in listed_ids]
    tables = [table(*zip(*rows, strict=True)) for table in (_parity_table, _score_table, _latency_table) if rows]
    lines: list[Line] = []
    for table in tables:
        if table.rows:
            lines += [*table.lines(width), _EMPTY]
    if len(shown) < len(checks):
        left_out = [(check, name) for check, name in zip(checks, names, strict=True) if verdict_word(check) == "pass"]
        lines += [*_wrapped(_summed_up(left_out), width, {"green": True}), _EMPTY] if left_out else []
    models = {check.model for check in shown}
    beside = [check for check in checks if check.model in models]
    for compared in side_by_side(beside):
        table = Table(HEADERS, ("<", ">", ">", ">", ">", ">", "<"), list(compared.rows))
        lines += [Line((Segment(compared.title, {"bold": True}),)), *table.lines(width), _EMPTY]
    for each in systems.compared(beside):
        cells = [systems.cells(row) for row in each.systems]
        table = Table(systems.HEADERS, ("<", ">", ">", ">", ">", ">", ">", ">", ">"), cells)
        lines += [Line((Segment(systems.title(each), {"bold": True}),)), *table.lines(width)]
        for text in systems.remarks(each):
            lines += [Line((Segment(f"  {part}"),)) for part in wrapped(text, width - 2)]
        lines.append(_EMPTY)
    for text, markup in _remarks(checks, None if len(shown) == len(checks) else _MOST_NOTES):
        lines += _wrapped(text, width, markup)
    lines.append(totals(checks))
    return lines


def _summed_up(passed: Sequence[tuple[CheckRecord, Label]]) -> str:
    """The checks that pass in one sentence: how many of which precision, and which is closest to its limit."""
    precisions = Counter(check.precision or MISSING for check, _ in passed)
    text = f"{plural(len(passed), 'check')} that pass are not listed (--trt-summary=all lists them): "
    text += ", ".join(f"{count} {precision}" for precision, count in precisions.most_common())
    closest = [(judged.used, judged, name) for check, name in passed if (judged := decisive(check)) and judged.used]
    if closest:
        used, judged, name = max(closest, key=lambda each: each[0] or 0.0)
        text += f"; closest to its limit is {name}, {judged.value_text} of {judged.limit_text} ({used:.0%})"
    return text


def wrapped(text: str, width: int) -> list[str]:
    """A paragraph in lines, the first of which stands out."""
    return textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def _wrapped(text: str, width: int, markup: Mapping[str, bool]) -> list[Line]:
    return [Line((Segment(part, markup),)) for part in wrapped(text, width)]


@dataclass(frozen=True)
class Table:
    """Columns by header; the first is shortened to fit, the last is styled by what it says.

    Parameters
    ----------
    spare
        A column that is said in a line of its own, where there is no room for it and all rows have the same in it.
    """

    headers: tuple[str, ...]
    align: tuple[Literal["<", ">"], ...]
    rows: list[tuple[str, ...]]
    spare: int | None = None

    def lines(self, width: int) -> list[Line]:
        """The table in at most `width` columns, as far as its first column can give way."""
        widths = [max(map(columns, column)) for column in zip(self.headers, *self.rows, strict=True)]
        room = width - sum(widths[1:]) - len(_GAP) * (len(widths) - 1)
        values = {row[self.spare] for row in self.rows} if self.spare is not None else set()
        if room < widths[0] and self.spare is not None and len(values) == 1:
            said = f"{self.headers[self.spare]}: {values.pop()}"
            return [*self._without(self.spare).lines(width), Line((Segment(said),))]
        widths[0] = min(widths[0], max(room, _NARROWEST_NAME, columns(self.headers[0])))
        header = Segment(self._join(self.headers, widths).rstrip(), {"bold": True})
        names = _fitted([row[0] for row in self.rows], widths[0])
        rows = [(name, *row[1:]) for name, row in zip(names, self.rows, strict=True)]
        return [Line((header,)), *(self._row(row, widths) for row in rows)]

    def _without(self, column: int) -> Table:
        rows = [(*row[:column], *row[column + 1 :]) for row in self.rows]
        headers, align = (
            (*self.headers[:column], *self.headers[column + 1 :]),
            (*self.align[:column], *self.align[column + 1 :]),
        )
        return Table(headers, align, rows)

    def _row(self, row: Sequence[str], widths: Sequence[int]) -> Line:
        text = self._join(row[:-1], widths[:-1])
        last = row[-1] if self.align[-1] == "<" else _pad(row[-1], widths[-1], ">")
        return Line((Segment(text + _GAP), Segment(last, _MARKUP.get(row[-1], {}))))

    def _join(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        return _GAP.join(
            _pad(cell, width, align) for cell, width, align in zip(cells, widths, self.align, strict=False)
        )


_EMPTY = Line(())


def _fitted(names: Sequence[str], width: int) -> list[str]:
    """What rows are called, in at most `width` columns: of a label the test gives way before the model's name."""
    labelled = [each if isinstance(each, Label) else Label(each) for each in names]
    least = min(_LEAST_TEST, max((columns(each.test) for each in labelled), default=0))
    models = list(dict.fromkeys(each.model for each in labelled))
    room = max(width - least - 1, _NARROWEST_NAME) if least else width
    short = dict(zip(models, shorten_apart(models, room), strict=True))
    found = []
    for each in labelled:
        if columns(each) <= width:
            found.append(str(each))
            continue
        model = each.model if columns(each.model) <= columns(short[each.model]) else short[each.model]
        room = width - columns(model) - 1
        found.append(f"{model} {shorten_middle(each.test, room)}" if each.test else model)
    alike = Counter(found)
    apart = shorten_apart([str(each) for each in names], width)
    return [apart[index] if alike[text] > 1 and names[index] != text else text for index, text in enumerate(found)]


def _worst_first(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    return sorted(rows, key=lambda row: WORDS.index(row[-1]) if row[-1] in WORDS else len(WORDS))


def _pad(text: str, width: int, align: Literal["<", ">"]) -> str:
    space = " " * (width - columns(text))
    return text + space if align == "<" else space + text


def _parity_table(records: Sequence[CheckRecord], names: Sequence[str]) -> Table:
    rows: list[tuple[str, ...]] = []
    for record, name in zip(records, names, strict=True):
        if record.parity is None:
            if record.score or record.latency or record.verdict == "not_measured":
                continue
            # A check that ended before it could compare anything still has its row.
            worst, tolerance, verdict = MISSING, MISSING, verdict_word(record)
        else:
            judgement = decisive(record)
            worst = judgement.value_text if judgement else MISSING
            tolerance = judgement.limit_text if judgement else MISSING
            # What fails for another reason (evidence that is asked for) than any part's is said here, or nowhere.
            is_told = any(is_bad(part.verdict) for part in record.parts.values()) or not is_bad(record.verdict)
            verdict = verdict_word(record, "parity") if is_told else verdict_word(record)
        evidence = record.evidence or MISSING
        rows.append((name, record.precision or MISSING, evidence, worst, tolerance, verdict))
    headers = ("model", "precision", "evidence", "worst error", "tolerance", "verdict")
    return Table(headers, ("<", "<", "<", ">", "<", "<"), _worst_first(rows), spare=2)


def _score_table(records: Sequence[CheckRecord], names: Sequence[str]) -> Table:
    rows: list[tuple[str, ...]] = []
    for record, name in zip(records, names, strict=True):
        if record.score is None:
            continue
        found = scored(record)
        cells = (found.values, found.drop, found.limit) if found else (MISSING, MISSING, MISSING)
        score = shorten_middle(one_line(record.score.name), 20)
        verdict = verdict_word(record, "score")
        rows.append((name, record.precision or MISSING, record.evidence or MISSING, score, *cells, verdict))
    headers = ("model", "precision", "evidence", "score", "reference → now", "drop (99 %)", "max drop", "verdict")
    return Table(headers, ("<", "<", "<", "<", ">", ">", "<", "<"), _worst_first(rows), spare=2)


def _latency_table(records: Sequence[CheckRecord], names: Sequence[str]) -> Table:
    rows: list[tuple[str, ...]] = []
    for record, name in zip(records, names, strict=True):
        gpu = shorten_middle(one_line((record.latency and record.latency.gpu) or MISSING), 16)
        for budget in budgets(record):
            if record.system is not None and budget.limit is None:
                continue  # The table of the systems has it.
            verdict = "xfail" if verdict_word(record, "latency") == "xfail" else budget.verdict.replace("_", " ")
            # Where the bounds are what kept the verdict open, they say more than the value between them.
            value = budget.bounds_text if budget.verdict == "inconclusive" else budget.value_text
            measured = f"{budget.name} {value} {budget.unit}".rstrip()
            rows.append((name, record.precision or MISSING, gpu, measured, budget.limit_text, verdict))
    headers = ("model", "precision", "GPU", "measured", "budget", "verdict")
    return Table(headers, ("<", "<", "<", ">", "<", "<"), _worst_first(rows), spare=2)


def _remarks(records: Sequence[CheckRecord], most_notes: int | None) -> list[tuple[str, Mapping[str, bool]]]:
    yellow = {"yellow": True}
    remarks: list[tuple[str, Mapping[str, bool]]] = []
    unrun = emulated(records)
    if unrun:
        share = "" if len(unrun) == len(records) else f" ({len(unrun)} of {plural(len(records), 'check')})"
        remarks.append(
            (
                f"emulated on CPU: not run on a GPU{share}. This is the error of the precision; what TensorRT adds to "
                "it was not seen.",
                yellow,
            )
        )
    # Checks may share an engine.
    built = {
        (one_line(record.compiled_for), record.engine.key if record.engine else str(number)): None
        for number, record in enumerate(records)
        if record.compiled_for
    }
    compiled = Counter(target for target, _ in built)
    remarks += [
        (f"built for {target}, not run: {plural(count, 'engine')}", yellow) for target, count in compiled.items()
    ]
    remarks += [
        (f"{'' if part == 'check' else part + ' '}not measured ({plural(count, 'check')}): {reason}", yellow)
        for part, reason, count in not_measured(records)
    ]
    remarks += [
        (f"inconclusive ({plural(count, 'check')}): {reason}", yellow) for reason, count in inconclusive(records)
    ]
    said = notes(records)
    often = said if most_notes is None else sorted(said, key=lambda note: -note[1])[:most_notes]
    remarks += [(f"note: {note}" + (f" ({plural(count, 'check')})" if count > 1 else ""), {}) for note, count in often]
    if len(often) < len(said):
        remarks.append((f"… and {plural(len(said) - len(often), 'note')} more: --trt-summary=all, or a report", {}))
    return remarks


def totals(records: Sequence[CheckRecord]) -> Line:
    """How many checks came to what."""
    words = Counter(verdict_word(record) for record in records)
    shown = [verdict.replace("_", " ") for verdict in VERDICTS]
    found = ", ".join(f"{words[word]} {word}" for word in (*shown, "xfail") if words[word])
    worst = next((word for word in ("error", "fail", "inconclusive") if words[word]), None)
    markup = _MARKUP[worst] if worst else {"green": True} if words["pass"] else {}
    return Line((Segment(f"{plural(len(records), 'check')}: {found}", markup),))
