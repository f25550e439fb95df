"""What GitHub Actions shows of a run: a step summary in Markdown, and annotations on the test files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_trtcheck.errors import ReportError, plural, visible
from pytest_trtcheck.record import Location
from pytest_trtcheck.report.text import markdown_code, markdown_text, one_line
from pytest_trtcheck.report.view import (
    budgets,
    decisive,
    emulated,
    failed,
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
    from collections.abc import Iterable, Iterator, Sequence

    from pytest_trtcheck.record import CheckRecord, Environment
    from pytest_trtcheck.report.view import Run

SUMMARY_LIMIT = 1024 * 1024
"""GitHub rejects a step's summary over 1 MiB."""

ANNOTATION_LIMIT = 10
"""GitHub keeps that many errors per step, and as many warnings, and drops the rest silently."""

_ICONS = {"pass": "✅", "fail": "❌", "error": "💥", "inconclusive": "⚠️", "not measured": "⬜", "xfail": "☑️"}


def write(run: Run) -> Iterator[str]:
    """The commands that annotate, to be printed each on a line of its own; then the step's summary is written."""
    if os.environ.get("GITHUB_ACTIONS") == "true" and (run.record.checks or run.record.missing):
        yield from annotation_commands(run.record.checks, run.rootdir)
        said = "".join(f"\n**{markdown_text(each)}**\n" for each in unseen(run.record))
        write_step_summary(step_summary(run.record.checks, run.record.environment) + said)


def write_step_summary(text: str) -> None:
    """Append `text` to the step's summary, where there is one.

    Raises
    ------
    ReportError
        The file that GITHUB_STEP_SUMMARY names cannot be written.
    """
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return
    try:
        with Path(path).open("a", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
    except OSError as error:
        raise ReportError(
            f"cannot write the step summary {path}: {error.strerror or error}", code="report-unwritable"
        ) from error


def step_summary(
    records: Iterable[CheckRecord], environment: Environment | None = None, limit: int = SUMMARY_LIMIT
) -> str:
    """The run as Markdown of at most `limit` bytes: the rows that somebody has to look at come first."""
    checks = ordered(records)
    if not checks:
        return ""
    rows = list(zip(checks, labels(checks), strict=True))
    rows.sort(key=lambda row: not failed(row[0]))
    head = ["## TensorRT checks", "", _totals(checks), ""]
    head += ["| | Model | Precision | Evidence | Worst error | Tolerance | Latency | Test |"]
    head += ["| --- | --- | --- | --- | ---: | --- | --- | --- |"]
    tail = ["", *(f"- {remark}" for remark in _remarks(checks)), *_environment(environment), ""]
    room = limit - _size(head) - _size(tail) - 100
    shown: list[str] = []
    for record, name in rows:
        row = _row(record, name)
        room -= _size([row])
        if room < 0:
            tail.insert(
                0, f"| | {plural(len(rows) - len(shown), 'more check')} left out: the report has them | | | | | | |"
            )
            break
        shown.append(row)
    return "\n".join([*head, *shown, *tail]) + "\n"


def annotation_commands(records: Iterable[CheckRecord], rootdir: str | os.PathLike[str] = ".") -> list[str]:
    """Workflow commands that mark failing checks at their tests; print each on a line of its own.

    Parameters
    ----------
    records
        Check records; `location` (file, and line from 1) says where the test is.
    rootdir
        Where node ids are relative to; GitHub wants paths relative to the workspace.
    """
    workspace = Path(os.environ.get("GITHUB_WORKSPACE") or rootdir)
    bad = [record for record in ordered(records) if failed(record)]
    errors = [record for record in bad if record.verdict != "inconclusive"]
    warnings = [record for record in bad if record.verdict == "inconclusive"]
    return [
        *_commands("error", errors, Path(rootdir), workspace),
        *_commands("warning", warnings, Path(rootdir), workspace),
    ]


def _commands(level: str, records: Sequence[CheckRecord], rootdir: Path, workspace: Path) -> list[str]:
    commands = []
    for index, record in enumerate(records[:ANNOTATION_LIMIT]):
        message = record.message or _headline(record)
        left_out = len(records) - ANNOTATION_LIMIT
        if index == ANNOTATION_LIMIT - 1 and left_out > 0:
            message += f"\n… and {plural(left_out, 'more check')}: see the step summary"
        location = record.location or Location(record.nodeid.partition("::")[0])
        where = {
            "file": _relative(rootdir / location.file, workspace),
            "line": location.line,
            "title": f"{labels([record])[0]} {record.precision or ''}: {verdict_word(record)}",
        }
        fields = ",".join(f"{key}={_escape_property(value)}" for key, value in where.items() if value is not None)
        commands.append(f"::{level} {fields}::{_escape_data(message)}")
    return commands


def _headline(record: CheckRecord) -> str:
    judgement = decisive(record)
    if judgement is not None:
        output = f"output {judgement.output}: " if judgement.output else ""
        return f"{output}{judgement.metric} = {judgement.value_text}, tolerance {judgement.limit_text}"
    return verdict_word(record)


def _relative(path: Path, workspace: Path) -> str:
    absolute, base = path.resolve(), workspace.resolve()
    return absolute.relative_to(base).as_posix() if absolute.is_relative_to(base) else path.as_posix()


def _escape_data(text: str) -> str:
    return visible(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _escape_property(value: object) -> str:
    return _escape_data(one_line(str(value))).replace(":", "%3A").replace(",", "%2C")


def _totals(records: Sequence[CheckRecord]) -> str:
    words: dict[str, int] = {}
    for record in records:
        word = verdict_word(record)
        words[word] = words.get(word, 0) + 1
    return " · ".join(f"{icon} {words[word]} {word}" for word, icon in _ICONS.items() if word in words)


def _row(record: CheckRecord, name: str) -> str:
    judgement, score = decisive(record), scored(record)
    word = verdict_word(record)
    shown: list[str | None] = [judgement.value_text, judgement.limit_text] if judgement else []
    if score:
        told = (f"{score.name} {score.values}, drop {score.drop}", f"drop {score.limit}")
        shown = [f"{outputs}; {task}" for outputs, task in zip(shown, told, strict=True)] if shown else list(told)
    measured = [
        f"{budget.name} {budget.value_text} {budget.unit} ({budget.limit_text})".replace("  ", " ")
        for budget in budgets(record)
    ]
    cells = [
        f"{_ICONS[word]} {word}",
        markdown_code(name),
        markdown_text(record.precision),
        markdown_text(record.evidence),
        *map(markdown_text, shown or (None, None)),
        markdown_text("; ".join(measured) or None),
        markdown_code(record.nodeid),
    ]
    return f"| {' | '.join(cells)} |"


def _remarks(records: Sequence[CheckRecord]) -> list[str]:
    unrun = len(emulated(records))
    remarks = [f"**emulated on CPU, not run on a GPU**: {plural(unrun, 'check')}"] if unrun else []
    remarks += [
        f"not measured ({'' if part == 'check' else part + ', '}{plural(count, 'check')}): {markdown_text(reason)}"
        for part, reason, count in not_measured(records)
    ]
    remarks += [
        f"inconclusive ({plural(count, 'check')}): {markdown_text(why)}" for why, count in inconclusive(records)
    ]
    remarks += [f"{markdown_text(note)}{f' ({count} checks)' if count > 1 else ''}" for note, count in notes(records)]
    return remarks


def _environment(environment: Environment | None) -> list[str]:
    known = environment.described() if environment else {}
    said = [f"{name} {markdown_text(text)}" for name, text in known.items()]
    return ["", f"<sub>{' · '.join(said)}</sub>"] if said else []


def _size(lines: Iterable[str]) -> int:
    return sum(len(line.encode()) + 1 for line in lines)
