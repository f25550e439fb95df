"""What GitHub Actions shows of a run: a step summary in Markdown, and annotations on the test files."""

from __future__ import annotations

import html
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.errors import ReportError
from pytest_trtcheck.report.text import MISSING, one_line, plural
from pytest_trtcheck.report.view import (
    Record,
    budgets,
    decisive,
    emulated,
    failed,
    inconclusive,
    labels,
    not_measured,
    notes,
    ordered,
    verdict_word,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

SUMMARY_LIMIT = 1024 * 1024
"""GitHub rejects a step's summary over 1 MiB."""

ANNOTATION_LIMIT = 10
"""GitHub keeps that many errors per step, and as many warnings, and drops the rest silently."""

_ICONS = {"pass": "✅", "fail": "❌", "error": "💥", "inconclusive": "⚠️", "not measured": "⬜", "xfail": "☑️"}


def running() -> bool:
    """Whether this process runs in a GitHub Actions step."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def write_step_summary(text: str) -> bool:
    """Append `text` to the step's summary; False where there is none to write to.

    Raises
    ------
    ReportError
        The file that GITHUB_STEP_SUMMARY names cannot be written.
    """
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return False
    try:
        with Path(path).open("a", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise ReportError(f"cannot write the step summary {path}: {error.strerror or error}") from error
    return True


def step_summary(
    records: Iterable[Record], environment: Mapping[str, Any] | None = None, limit: int = SUMMARY_LIMIT
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
    tail = ["", *(f"- {remark}" for remark in _remarks(checks)), *_environment(environment or {}), ""]
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


def annotation_commands(records: Iterable[Record], rootdir: str | os.PathLike[str] = ".") -> list[str]:
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
    errors = [record for record in bad if record["verdict"] != "inconclusive"]
    warnings = [record for record in bad if record["verdict"] == "inconclusive"]
    return [
        *_commands("error", errors, Path(rootdir), workspace),
        *_commands("warning", warnings, Path(rootdir), workspace),
    ]


def _commands(level: str, records: Sequence[Record], rootdir: Path, workspace: Path) -> list[str]:
    commands = []
    for index, record in enumerate(records[:ANNOTATION_LIMIT]):
        message = str(record.get("message") or _headline(record))
        left_out = len(records) - ANNOTATION_LIMIT
        if index == ANNOTATION_LIMIT - 1 and left_out > 0:
            message += f"\n… and {plural(left_out, 'more check')}: see the step summary"
        location = record.get("location") or {}
        file = location.get("file") or str(record["nodeid"]).partition("::")[0]
        where = {
            "file": _relative(rootdir / file, workspace),
            "line": location.get("line"),
            "title": f"{labels([record])[0]} {record.get('precision') or ''}: {verdict_word(record)}",
        }
        fields = ",".join(f"{key}={_escape_property(value)}" for key, value in where.items() if value is not None)
        commands.append(f"::{level} {fields}::{_escape_data(message)}")
    return commands


def _headline(record: Record) -> str:
    judgement = decisive(record)
    if judgement is not None:
        output = f"output {judgement.output}: " if judgement.output else ""
        return f"{output}{judgement.metric} = {judgement.value_text}, tolerance {judgement.limit_text}"
    return verdict_word(record)


def _relative(path: Path, workspace: Path) -> str:
    absolute, base = path.resolve(), workspace.resolve()
    return absolute.relative_to(base).as_posix() if absolute.is_relative_to(base) else path.as_posix()


def _escape_data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _escape_property(value: object) -> str:
    return _escape_data(one_line(str(value))).replace(":", "%3A").replace(",", "%2C")


def _totals(records: Sequence[Record]) -> str:
    words: dict[str, int] = {}
    for record in records:
        word = verdict_word(record)
        words[word] = words.get(word, 0) + 1
    return " · ".join(f"{icon} {words[word]} {word}" for word, icon in _ICONS.items() if word in words)


def _row(record: Record, name: str) -> str:
    judgement = decisive(record) if record.get("parity") else None
    word = verdict_word(record)
    measured = [
        f"{budget.name} {budget.value_text} {budget.unit} ({budget.limit_text})".replace("  ", " ")
        for budget in budgets(record)
    ]
    cells = [
        f"{_ICONS[word]} {word}",
        _code(name),
        _text(record.get("precision")),
        _text(record.get("evidence")),
        _text(judgement and judgement.value_text),
        _text(judgement and judgement.limit_text),
        _text("; ".join(measured)),
        _code(str(record["nodeid"])),
    ]
    return f"| {' | '.join(cells)} |"


def _remarks(records: Sequence[Record]) -> list[str]:
    unrun = len(emulated(records))
    remarks = [f"**emulated on CPU, not run on a GPU**: {plural(unrun, 'check')}"] if unrun else []
    remarks += [
        f"not measured ({'' if part == 'check' else part + ', '}{plural(count, 'check')}): {_text(reason)}"
        for part, reason, count in not_measured(records)
    ]
    remarks += [f"inconclusive ({plural(count, 'check')}): {_text(why)}" for why, count in inconclusive(records)]
    remarks += [f"{_text(note)}{f' ({count} checks)' if count > 1 else ''}" for note, count in notes(records)]
    return remarks


def _environment(environment: Mapping[str, Any]) -> list[str]:
    tensorrt, gpu = environment.get("tensorrt") or {}, environment.get("gpu") or {}
    known = {
        "GPU": gpu.get("name"),
        "requested GPU": environment.get("requested_gpu"),
        "driver": environment.get("driver"),
        tensorrt.get("module", "tensorrt"): tensorrt.get("version"),
        "ONNX Runtime": environment.get("onnxruntime"),
        "Python": environment.get("python"),
    }
    said = [f"{name} {_text(value)}" for name, value in known.items() if value]
    return ["", f"<sub>{' · '.join(said)}</sub>"] if said else []


def _text(value: object) -> str:
    """Text that Markdown and HTML leave as it is, fit for a table cell."""
    if not value:
        return MISSING
    escaped = html.escape(one_line(str(value)), quote=False)
    return re.sub(r"([\\`*_{}\[\]#|~])", r"\\\1", escaped)


def _code(text: str) -> str:
    """Code in a table cell; a backtick or a pipe in a Markdown code span would end it, so it is HTML's."""
    return f"<code>{html.escape(one_line(text), quote=False).replace('|', '&#124;').replace('`', '&#96;')}</code>"


def _size(lines: Iterable[str]) -> int:
    return sum(len(line.encode()) + 1 for line in lines)
