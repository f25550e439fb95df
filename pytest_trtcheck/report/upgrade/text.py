"""The verdict on an upgrade: lines for a terminal, Markdown for a GitHub step summary, a page, data for a program."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.errors import plural
from pytest_trtcheck.record import SCHEMA_VERSION, TOOL
from pytest_trtcheck.report.diff_text import (
    DEFAULT_WIDTH,
    LISTED,
    SUMMARY_LIMIT,
    environment_lines,
    environment_table,
    fitting,
    more,
    name_line,
    row,
    wrapped,
)
from pytest_trtcheck.report.text import markdown_code, markdown_text
from pytest_trtcheck.report.upgrade.questions import OUTCOMES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pytest_trtcheck.report.upgrade.gate import Gate, Judged
    from pytest_trtcheck.report.upgrade.questions import Finding, Outcome

_ICONS: Mapping[Outcome, str] = {"fail": "❌", "not compared": "⬜", "inconclusive": "❔", "pass": "✅"}
_ALLOWED = "not compared, allowed"
_PAD = max(len("precision"), len("latency"))


def headline(gate: Gate) -> str:
    """The verdict, and what the checks came to, in one line."""
    found = [f"{gate.counts[outcome]} {outcome}" for outcome in reversed(OUTCOMES) if gate.counts[outcome]]
    if gate.partly:
        found.append(f"{gate.partly} not compared in full, which {', '.join(sorted(gate.limits.allowed))} allows")
    if gate.added:
        found.append(f"{len(gate.added)} only in the new report, not judged")
    if gate.unrecorded:
        found.append("tests without a record")
    if not gate.fits:
        found.append("nothing was compared")
    return f"upgrade: {gate.verdict} ({', '.join(found)})"


def lines(gate: Gate, names: tuple[str, str], width: int = DEFAULT_WIDTH) -> list[str]:
    """For a terminal, none longer than `width` columns.

    Parameters
    ----------
    names
        Of the old and the new report.
    """
    text = [*wrapped(f"{names[0]} → {names[1]}", width), *environment_lines(gate.environment, width)]
    for outcome in reversed(OUTCOMES):
        checks = [check for check in gate.checks if check.outcome(gate.limits.allowed) == outcome]
        if checks:
            text += ["", f"{outcome} ({plural(len(checks), 'check')})"]
            for reasons, members in _alike(gate, checks).items():
                text += wrapped("; ".join(reasons), width, "  ") if reasons else []
                indent = "    " if reasons else "  "
                for check in members[:LISTED]:
                    text += [name_line(check.subject, width, indent=indent), *_answers(gate, check, width)]
                text += more(len(members), indent)
    if gate.unrecorded:
        text += ["", *wrapped(f"{gate.unrecorded}{_unrecorded_allowed(gate)}", width)]
    return [*text, "", *wrapped(headline(gate), width)]


def _unrecorded_allowed(gate: Gate) -> str:
    return " (allowed: missing)" if "missing" in gate.limits.allowed else ""


def _alike(gate: Gate, checks: Sequence[Judged]) -> dict[tuple[str, ...], list[Judged]]:
    """By what was not compared: after a change of the GPU every check has the same reason."""
    found: dict[tuple[str, ...], list[Judged]] = {}
    for check in checks:
        texts = [f"{_label(gate, each)}: {each.text}" for each in check.findings if each.outcome == "not compared"]
        found.setdefault(tuple(texts), []).append(check)
    return found


def _answers(gate: Gate, check: Judged, width: int) -> Iterator[str]:
    """What is worse or cannot be told, and beside it what changed; of what passes, that it does."""
    told = [each for each in check.findings if each.outcome not in {"pass", "not compared"}]
    if check.outcome(gate.limits.allowed) == "pass":
        return
    for each in told:
        first = f"      {each.question:<{_PAD}}  "
        mark = "" if each.outcome == check.outcome(gate.limits.allowed) else f"{each.outcome}: "
        yield from wrapped(f"{mark}{each.text}", width, first, " " * len(first))
    if passed := dict.fromkeys(each.question for each in check.findings if each.outcome == "pass"):
        yield from wrapped(f"pass: {', '.join(passed)}", width, " " * 6)
    if check.information and told:
        yield from wrapped("; ".join(check.information), width, " " * 6)


def _label(gate: Gate, each: Finding) -> str:
    allowed = f" (allowed: {each.kind})" if _word(gate, each) == _ALLOWED else ""
    return f"{each.question} not compared{allowed}" if each.question != "comparable" else f"not comparable{allowed}"


def markdown(gate: Gate, names: tuple[str, str], limit: int = SUMMARY_LIMIT) -> str:
    """For a GitHub step summary, of at most `limit` bytes: the worst come first."""
    title = f"## Upgrade: {gate.verdict} {_ICONS[gate.verdict]}"
    head = [title, "", f"{markdown_text(names[0])} → {markdown_text(names[1])}: {markdown_text(headline(gate))}", ""]
    if gate.unrecorded:
        head += [markdown_text(f"{gate.unrecorded}{_unrecorded_allowed(gate)}"), ""]
    head += environment_table(gate.environment)
    head += ["| | Test | Precision | Question | |", "| --- | --- | --- | --- | --- |"]
    rows = [line for check in gate.checks for line in _rows(gate, check)]
    return "\n".join([*head, *fitting(rows, limit, head, cells=5)]) + "\n"


def _rows(gate: Gate, check: Judged) -> Iterator[str]:
    who = [markdown_code(check.subject.nodeid), markdown_text(check.subject.precision)]
    for each in check.findings:
        allowed = " (not compared, which is allowed)" if _word(gate, each) == _ALLOWED else ""
        yield row([_ICONS[each.outcome], *who, each.question, markdown_text(each.text + allowed)])
    if check.information:
        yield row(["", *who, "for information", markdown_text("; ".join(check.information))])


def page(gate: Gate, names: tuple[str, str]) -> str:
    """As one HTML page, which needs nothing else.

    Raises
    ------
    MissingDependencyError
        jinja2 is not installed.
    """
    from pytest_trtcheck.report import html

    allowed = gate.limits.allowed
    checks = [(each, each.outcome(allowed), [(one, _word(gate, one)) for one in each.findings]) for each in gate.checks]
    return html.filled("upgrade.html", gate=gate, names=names, headline=headline(gate), checks=checks)


def data(gate: Gate, names: tuple[str, str], exit_status: int) -> dict[str, Any]:
    """For a program; docs/upgrade.md says what the keys are."""
    from pytest_trtcheck.baselines.errors import RISE, RISE_SHARE

    limits, allowed = asdict(gate.limits), gate.limits.allowed
    for name, default in (("error_ratio", RISE), ("error_share", RISE_SHARE)):
        limits[name] = default if limits[name] is None else limits[name]
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": f"{TOOL} upgrade",
        "old": names[0],
        "new": names[1],
        "verdict": gate.verdict,
        "exit_status": exit_status,
        "limits": {**limits, "allowed": sorted(allowed)},
        "environment": [asdict(change) for change in gate.environment],
        "summary": {outcome: gate.counts[outcome] for outcome in reversed(OUTCOMES)},
        "compared": gate.compared,
        "checks": [
            {
                "nodeid": check.subject.nodeid,
                "precision": check.subject.precision,
                "model": check.subject.model,
                "verdict": check.outcome(allowed),
                "findings": [{**asdict(each), "allowed": _word(gate, each) == _ALLOWED} for each in check.findings],
                "information": list(check.information),
            }
            for check in gate.checks
        ],
        "unrecorded": gate.unrecorded,
        "only_in_new": [subject.nodeid for subject in gate.added],
    }


def _word(gate: Gate, each: Finding) -> str:
    return _ALLOWED if each.kind is not None and each.kind in gate.limits.allowed else each.outcome
