"""The difference of two reports as lines for a terminal, and as Markdown for a GitHub step summary."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from pytest_trtcheck.errors import plural
from pytest_trtcheck.report.diff import KINDS
from pytest_trtcheck.report.text import columns, markdown_code, markdown_text, one_line, shorten_middle

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from pytest_trtcheck.report.diff import CheckDiff, EnvironmentChange, Kind, ReportDiff, Subject
    from pytest_trtcheck.report.diff_changes import Change

DEFAULT_WIDTH = 80
LISTED = 20
"""How many names of a group are listed before "… and 3 more": what was only added or cannot be compared."""
SUMMARY_LIMIT = 1000 * 1000
"""GitHub rejects a step's summary over 1 MiB."""

_ICONS: Mapping[Kind, str] = {"worse": "❌", "changed": "🔸", "better": "✅", "not comparable": "⬜"}
_ARROW = "→"


def totals(found: ReportDiff) -> str:
    """How many checks became what, in one line."""
    counts = [f"{len(found.of_kind(kind))} {kind}" for kind in KINDS if found.of_kind(kind)]
    counts += [f"{len(group)} {word}" for word, group in _sides(found) if group]
    counts.append(f"{found.unchanged} unchanged")
    return ", ".join(counts)


def lines(found: ReportDiff, names: tuple[str, str], width: int = DEFAULT_WIDTH) -> list[str]:
    """For a terminal, none longer than `width` columns.

    Parameters
    ----------
    found
        What changed.
    names
        Of the old and the new report.
    """
    text = [*wrapped(f"{names[0]} {_ARROW} {names[1]}", width), *environment_lines(found.environment, width)]
    for kind in KINDS:
        checks = found.of_kind(kind)
        if checks:
            text += ["", f"{kind} ({plural(len(checks), 'check')})"]
            text += _grouped(checks, width) if kind == "not comparable" else _detailed(checks, width)
    for word, subjects in _sides(found):
        if subjects:
            text += ["", f"{word} ({plural(len(subjects), 'check')})"]
            text += [name_line(subject, width, subject.verdict) for subject in subjects[:LISTED]]
            text += more(len(subjects))
    if found.unrecorded:
        text += ["", *wrapped(found.unrecorded, width)]
    return [*text, "", *wrapped(totals(found), width)]


def markdown(found: ReportDiff, names: tuple[str, str], limit: int = SUMMARY_LIMIT) -> str:
    """For a GitHub step summary, of at most `limit` bytes: the worst come first."""
    head = [f"## TensorRT checks: {markdown_text(names[0])} {_ARROW} {markdown_text(names[1])}", "", totals(found), ""]
    head += environment_table(found.environment)
    tail = [line for word, subjects in _sides(found)[1:] for line in _side_list(word, subjects)]
    tail += [markdown_text(found.unrecorded), ""] if found.unrecorded else []
    rows = [_new_row(each) for each in found.new_failures]
    rows += [row for check in found.checks for row in _rows(check)]
    if not rows:
        return "\n".join([*head, *tail]) + "\n"
    head += ["| | Test | Precision | What | Before | Now | |", "| --- | --- | --- | --- | ---: | ---: | --- |"]
    return "\n".join([*head, *fitting(rows, limit, [*head, *tail], cells=7), "", *tail]) + "\n"


def environment_lines(changes: Sequence[EnvironmentChange], width: int) -> list[str]:
    """What of the environment is another one, for a terminal."""
    if not changes:
        return ["the environment is the same"]
    pad = max(len(change.name) for change in changes)
    found = [_labelled(change.name, pad, f"{change.old} {_ARROW} {change.new}", width) for change in changes]
    return ["", "environment", *(line for each in found for line in each)]


def environment_table(changes: Sequence[EnvironmentChange]) -> list[str]:
    """The same in Markdown; nothing where nothing changed."""
    if not changes:
        return []
    rows = [row(map(markdown_text, (change.name, change.old, change.new))) for change in changes]
    return ["| Environment | Before | Now |", "| --- | --- | --- |", *rows, ""]


def fitting(rows: Sequence[str], limit: int, beside: Iterable[str], *, cells: int) -> list[str]:
    """As many rows of a Markdown table as fit into `limit` bytes beside other lines, and how many are left out."""
    room = limit - _size(beside) - 100
    shown: list[str] = []
    for each in rows:
        room -= _size([each])
        if room < 0:
            return [*shown, row(["", f"{plural(len(rows) - len(shown), 'more row')} left out", *[""] * (cells - 2)])]
        shown.append(each)
    return shown


def _sides(found: ReportDiff) -> tuple[tuple[str, Sequence[Subject]], ...]:
    return (
        ("new and not passing", found.new_failures),
        ("only in the new report", [each for each in found.added if not each.failed]),
        ("only in the old report", found.removed),
    )


# --- terminal --------------------------------------------------------------------------------------------------------


def _detailed(checks: Iterable[CheckDiff], width: int) -> Iterator[str]:
    for check in checks:
        yield name_line(check.subject, width)
        pad = max(columns(one_line(change.what)) for change in check.changes)
        for change in check.changes:
            yield from _labelled(change.what, pad, _change(change, check.kind), width)


def _change(change: Change, kind: Kind) -> str:
    # The heading says it of the others.
    mark = change.direction if change.direction in {"worse", "better"} and change.direction != kind else ""
    remark = ", ".join(filter(None, (mark, change.remark)))
    return f"{change.old} {_ARROW} {change.new}" + (f"  ({remark})" if remark else "")


def _why_not(check: CheckDiff) -> tuple[str, ...]:
    """Why it cannot be compared, and what else is another one."""
    besides = tuple(f"besides, {each.what}: {each.old} before, {each.new} now" for each in check.besides)
    return (*check.obstacles, *besides)


def _grouped(checks: Iterable[CheckDiff], width: int) -> Iterator[str]:
    """By reason: after a change of the GPU every check has the same one."""
    groups: dict[tuple[str, ...], list[CheckDiff]] = {}
    for check in checks:
        groups.setdefault(_why_not(check), []).append(check)
    for obstacles, members in groups.items():
        yield from wrapped("; ".join(obstacles), width, "  ")
        for check in members[:LISTED]:
            old, new = check.verdicts
            yield name_line(check.subject, width, new if old == new else f"{old} {_ARROW} {new}", "    ")
        yield from more(len(members), "    ")


def name_line(subject: Subject, width: int, verdict: str = "", indent: str = "  ") -> str:
    """A check by name, in one line, with a verdict behind it."""
    place = f" #{subject.place + 1}" if subject.place else ""
    words = f"{one_line(subject.precision or '')}  {subject.where}".strip()
    behind = f"{place}  {words}".rstrip() + (f"  {verdict}" if verdict else "")
    name = shorten_middle(one_line(subject.nodeid), max(20, width - len(indent) - columns(behind)))
    return f"{indent}{name}{behind}"


def _labelled(label: str, pad: int, text: str, width: int) -> list[str]:
    pad = min(pad, width // 3)
    shown = shorten_middle(one_line(label), pad)
    first = f"    {shown}{' ' * (pad - columns(shown))}  "
    return wrapped(text, width, first, " " * (pad + 6))


def wrapped(text: str, width: int, first: str = "", rest: str | None = None) -> list[str]:
    """A text in lines of at most `width` columns."""
    follow = first + "  " if rest is None else rest
    return textwrap.wrap(
        one_line(text),
        width,
        initial_indent=first,
        subsequent_indent=follow,
        break_on_hyphens=False,
        break_long_words=False,
    )


def more(count: int, indent: str = "  ") -> list[str]:
    """How many of a list are not shown."""
    return [f"{indent}… and {count - LISTED} more"] if count > LISTED else []


# --- Markdown --------------------------------------------------------------------------------------------------------


def _who(subject: Subject) -> list[str]:
    place = f" #{subject.place + 1}" if subject.place else ""
    return [f"{markdown_code(subject.nodeid)}{place}", markdown_text(subject.precision)]


def _new_row(subject: Subject) -> str:
    """A check that fails, which only the new report has."""
    return row([_ICONS["worse"], *_who(subject), "new", "", markdown_text(subject.verdict), ""])


def _rows(check: CheckDiff) -> Iterator[str]:
    who = _who(check.subject)
    if check.obstacles:
        cells = ["not comparable", *check.verdicts, "; ".join(_why_not(check))]
        yield row([_ICONS["not comparable"], *who, *map(markdown_text, cells)])
    for change in check.changes:
        icon = _ICONS["changed" if change.direction == "untested" else change.direction]
        yield row([icon, *who, *map(markdown_text, (change.what, change.old, change.new, change.remark))])


def _side_list(word: str, subjects: Sequence[Subject]) -> list[str]:
    if not subjects:
        return []
    listed = [f"- {markdown_code(each.nodeid)} {markdown_text(each.precision)}: {each.verdict}" for each in subjects]
    title = f"<details><summary>{word}: {plural(len(subjects), 'check')}</summary>"
    return [title, "", *listed[:LISTED], *(f"- {line}" for line in more(len(subjects), "")), "", "</details>", ""]


def row(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def _size(lines: Iterable[str]) -> int:
    return sum(len(line.encode()) + 1 for line in lines)
