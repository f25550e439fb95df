"""The reports of many machines as one: which model holds on which GPU, with one verdict."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from dataclasses import fields, replace
from pathlib import PurePath
from typing import TYPE_CHECKING

from pytest_trtcheck.errors import ArgumentError, ReportError, listed, plural
from pytest_trtcheck.record import BASELINE, Environment, MachineRecord, RunRecord, jsonable
from pytest_trtcheck.report import json_report, systems
from pytest_trtcheck.report.fleet import NOT_RUN, Cell, Fleet, fleet
from pytest_trtcheck.report.terminal import Table, totals, wrapped
from pytest_trtcheck.report.text import MISSING, markdown_code, markdown_text, one_line, short_commit, shorten_apart
from pytest_trtcheck.report.view import counts, emulated, failed, missing, ordered, told_of, verdict_word

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from pytest_trtcheck.record import CheckRecord


def merge(reports: Sequence[tuple[str, RunRecord]]) -> RunRecord:
    """One report of several, each check with the machine that it ran on; one that was merged before counts as many.

    Parameters
    ----------
    reports
        What each is called (its path), and what it holds; at least one.

    Raises
    ------
    ReportError
        One is given twice, or a merged one beside one that is in it.
    """
    refuse_twins(reports)
    parts = [part for name, run in reports for part in parts_of(name, run)]
    _refuse_repeated(reports)
    machines = _named_apart([machine for machine, _ in parts])
    named = [(machine.name, run) for machine, (_, run) in zip(machines, parts, strict=True)]
    checks = [replace(check, machine=name) for name, run in named for check in run.checks]
    unrecorded = [replace(each, machine=name) for name, run in named for each in run.missing]
    # A report that was merged before says itself which machine was stopped.
    stopped = [f"{name}: {run.stopped}" for name, run in named if run.stopped]
    stopped += [run.stopped for _, run in reports if run.machines and run.stopped]
    return RunRecord(
        tool=reports[0][1].tool,
        environment=_in_common([machine.environment for machine in machines]),
        checks=tuple(ordered(checks)),
        comparisons=systems.compared(ordered(checks)),
        summary=counts(checks),
        machines=tuple(machines),
        missing=tuple(unrecorded),
        planned=told_of(checks, unrecorded),
        stopped="; ".join(stopped) or None,
        started=min(filter(None, (run.started for _, run in reports)), default=None),
        commit=_shared([run.commit for _, run in reports]),
    )


def refuse_twins(reports: Sequence[tuple[str, RunRecord]]) -> None:
    """See that no report is given twice.

    Raises
    ------
    ReportError
        One is.
    """
    seen: dict[str, str] = {}
    for name, run in reports:
        # As text, in which NaN is NaN.
        other = seen.setdefault(json.dumps(jsonable(run)), name)
        if run.checks and other is not name:
            raise ReportError(f"{name} is the same report as {other}", "name each once", code="reports-unrelated")


def require_no_run(path: str) -> None:
    """See that a merged report takes the place of none of a run: in `merge -o a.json b.json` its name was forgotten.

    Raises
    ------
    ArgumentError
        A run's report is there.
    """
    try:
        run = json_report.read(path)
    except ReportError:  # nothing is there, or no report
        return
    if not run.machines:
        raise ArgumentError(
            f"--output {path}: the report of a run is there, and is not among those that are merged",
            "name another file",
            code="argument-conflict",
        )


def repeated(reports: Sequence[tuple[str, RunRecord]]) -> Iterator[tuple[int, MachineRecord, RunRecord, int]]:
    """The runs that are in a merged report, and by itself or in another one: where, whose, and where they are first."""
    seen: dict[str, int] = {}
    any_merged = any(run.machines for _, run in reports)
    for place, (name, run) in enumerate(reports):
        for machine, part in parts_of(name, run) if any_merged and run.checks else ():
            first = seen.setdefault(_identity(machine, part), place)
            if first != place and (reports[first][1].machines or run.machines):
                yield place, machine, part, first


def _refuse_repeated(reports: Sequence[tuple[str, RunRecord]]) -> None:
    """See that no run counts twice."""
    for place, machine, part, first in repeated(reports):
        if part.checks:
            raise ReportError(
                f"the run on {machine.name} is in {reports[first][0]} and in {reports[place][0]}",
                "name each once",
                code="reports-unrelated",
            )


def _identity(machine: MachineRecord, run: RunRecord) -> str:
    """What is the same of a machine's run by itself and in every merged report, and of no other run."""
    checks = [replace(each, machine=None) for each in run.checks]
    unrecorded = [replace(each, machine=None) for each in run.missing]
    return json.dumps(jsonable((machine.environment, checks, unrecorded)))


def _shared(values: Sequence[str | None]) -> str | None:
    """What all of them say; None where they differ."""
    return values[0] if len(set(values)) == 1 else None


def parts_of(name: str, run: RunRecord) -> Iterator[tuple[MachineRecord, RunRecord]]:
    """The runs that a report holds: one, or where it was merged before, that of each machine."""
    if not run.machines:
        yield MachineRecord(machine_name(run.environment), name, run.environment, run.commit), run
    for machine in run.machines:
        yield machine, _of(machine, run)


def _of(machine: MachineRecord, run: RunRecord) -> RunRecord:
    """What a merged report holds of one machine."""
    checks = tuple(check for check in run.checks if check.machine == machine.name)
    unrecorded = tuple(each for each in run.missing if each.machine == machine.name)
    return replace(run, checks=checks, missing=unrecorded, planned=told_of(checks, unrecorded), stopped=None)


def machine_name(environment: Environment) -> str:
    """What a machine is called: its GPU, without the maker."""
    if environment.gpu and environment.gpu.name:
        return one_line(environment.gpu.name.removeprefix("NVIDIA "))
    return f"no GPU, for {environment.requested_gpu}" if environment.requested_gpu else "no GPU"


def _named_apart(machines: Sequence[MachineRecord]) -> list[MachineRecord]:
    """Machines of one name with their TensorRT behind it, the name of the report's file, its path, or a number.

    What they share is left out: two of one kind keep their names when both get another TensorRT.
    """

    def tensorrt(machine: MachineRecord) -> str:
        found = machine.environment.tensorrt
        return " ".join(filter(None, (found.module, found.version))) if found else "no TensorRT"

    for more in (tensorrt, lambda machine: PurePath(machine.file).stem, lambda machine: machine.file):
        found: dict[str, set[str]] = defaultdict(set)
        for each in machines:
            found[each.name].add(more(each))
        machines = [
            replace(each, name=f"{each.name}, {more(each)}") if len(found[each.name]) > 1 else each for each in machines
        ]
    named: dict[str, MachineRecord] = {}
    for each in machines:
        names = itertools.chain([each.name], (f"{each.name} ({number})" for number in itertools.count(2)))
        name = next(name for name in names if name not in named)
        named[name] = replace(each, name=name)
    return list(named.values())


def _in_common(environments: Sequence[Environment]) -> Environment:
    """What all machines agree on; what they differ in is not known of the whole."""
    first = environments[0]
    agreed = {each.name: getattr(first, each.name) for each in fields(Environment)}
    return Environment(
        **{name: v for name, v in agreed.items() if all(getattr(other, name) == v for other in environments)}
    )


def gaps(run: RunRecord, *, requires_all: bool = False) -> list[str]:
    """What is not known of a machine: checks without a record, or that others have, or that no GPU ran or measured; and
    that machines tested different commits, so that they say nothing of one.

    With `requires_all` each says why it decides the exit status.
    """
    why = "--require-all: " * requires_all
    parts = [(machine, _of(machine, run)) for machine in run.machines]
    everywhere = set().union(*(_slots(part.checks) for _, part in parts))
    found = [] if run.checks else ["no report holds a check"]
    for machine, part in parts:
        own, unrecorded = part.checks, missing(part)
        absent = len(everywhere - _slots(own))
        unmeasured = sum(check.verdict == "not_measured" for check in own)
        partly = sum(check.verdict != "not_measured" and _lacks_a_measurement(check) for check in own)
        unrun = len(emulated(own))
        failed_after = sum(check.verdict == "pass" and check.outcome == "failed" for check in own)
        unknown = sum(check.evidence in {"provider", "server"} and check.gpu_ran in {False, "unknown"} for check in own)
        said = [
            *([unrecorded] if unrecorded else []),
            *([f"lacks {plural(absent, 'check')} of others"] if absent else []),
            *([f"{plural(unmeasured, 'check')} not measured"] if unmeasured else []),
            *([f"{plural(partly, 'check')} measured in part"] if partly else []),
            *([f"{plural(unrun, 'check')} emulated, not run on a GPU"] if unrun else []),
            *([f"{plural(failed_after, 'check')} passed in a test that failed"] if failed_after else []),
            *([f"{plural(unknown, 'check')} not known to have run on a GPU"] if unknown else []),
        ]
        found += [f"{why}{machine.name}: {', '.join(said)}"] if said else []
    commits: dict[str, list[str]] = defaultdict(list)
    for machine in run.machines:
        if machine.commit is not None:
            commits[machine.commit].append(machine.name)
    if len(commits) > 1:
        tested = "; ".join(f"{short_commit(commit)} on {', '.join(names)}" for commit, names in commits.items())
        found.append(f"{why}different commits were tested: {tested}")
    return found


def _slots(checks: Iterable[CheckRecord]) -> set[tuple[str, str, str | None, int]]:
    """What checks are of, the same on every machine; those of one test that are alike are told apart by their order."""
    places: Counter[tuple[str, str, str | None, str | None]] = Counter()
    found = set()
    for check in checks:
        slot = check.test, check.asked_precision, check.system
        key = (*slot, check.for_gpu)
        found.add((*slot, places[key]))
        places[key] += 1
    return found


def _lacks_a_measurement(check: CheckRecord) -> bool:
    """Whether a part of it, or a budget, was not measured."""
    # What is measured to compare systems alone was not asked for.
    parts = [part for name, part in check.parts.items() if name != "latency" or check.system is None or check.budgets]
    asked = [*parts, *(budget for budget in check.budgets if budget.name != BASELINE)]
    return any(each.verdict == "not_measured" for each in asked)


def _again(run: RunRecord) -> list[str]:
    """What passed on a machine only when its test was run again: no verdict tells."""
    found = [
        (machine, [each for each in _of(machine, run).checks if each.runs > 1 and each.verdict == "pass"])
        for machine in run.machines
    ]
    return [
        f"{machine.name}: {plural(len(checks), 'check')} passed only when the test was run again: "
        f"{listed(dict.fromkeys(each.nodeid for each in checks))}"
        for machine, checks in found
        if checks
    ]


def is_bad(run: RunRecord) -> bool:
    """Whether somebody has to look at a merged report: a check failed or left no record, or there is none."""
    return not run.checks or missing(run) is not None or any(map(failed, run.checks))


def lines(run: RunRecord, width: int, *, requires_all: bool = False) -> list[str]:
    """A merged report for a terminal, none of its lines longer than `width` columns where that can be."""
    found = fleet(run) or Fleet((), ())
    bad: dict[str, list[str]] = defaultdict(list)
    for check in run.checks:
        if failed(check):
            bad[f"{check.nodeid}: {check.headline or verdict_word(check)}"].append(check.machine or MISSING)
    said = [f"{what} ({', '.join(machines_of)})" for what, machines_of in bad.items()]
    said += [*gaps(run, requires_all=requires_all), *_again(run)]
    told = [line for text in said for line in wrapped(one_line(text), width)]
    tables = [_table(found, width, lambda cell: cell.text)]
    if any(cell.latency for row in found.rows for cell in row.cells):
        tables.append(["", "p50 / p99 in ms", *_table(found, width, _quantiles)])
    return [*itertools.chain(*tables), *([""] if told else []), *told, totals(run.checks).text]


def _table(found: Fleet, width: int, text: Callable[[Cell], str]) -> list[str]:
    # Each name in its share of what the models leave.
    share = max(12, (width - 30) // max(len(found.columns), 1) - 2)
    headers = ("model", "precision", *shorten_apart(found.columns, share))
    rows = [(row.model or MISSING, row.precision or MISSING, *map(text, row.cells)) for row in found.rows]
    return [line.text.rstrip() for line in Table(headers, tuple("<" for _ in headers), rows).lines(width)]


def _quantiles(cell: Cell) -> str:
    return f"{cell.quantile('p50')} / {cell.quantile('p99') or MISSING}" if cell.quantile("p50") else MISSING


def markdown(run: RunRecord, *, requires_all: bool = False) -> str:
    """A merged report for a GitHub step summary."""
    found = fleet(run) or Fleet((), ())
    headers = ["Model", "Precision", *map(markdown_text, found.columns)]
    rows = [
        [markdown_code(row.model), markdown_text(row.precision), *(markdown_text(_said(cell)) for cell in row.cells)]
        for row in found.rows
    ]
    table = [headers, ["---"] * len(headers), *rows]
    text = [f"## TensorRT checks on {plural(len(run.machines), 'machine')}", "", totals(run.checks).text, ""]
    text += [f"| {' | '.join(cells)} |" for cells in table]
    told = (f"- {markdown_text(gap)}" for gap in [*gaps(run, requires_all=requires_all), *_again(run)])
    return "\n".join([*text, "", *told]).rstrip() + "\n"


def _said(cell: Cell) -> str:
    """All that there is to say of a cell."""
    told = ", ".join(filter(None, (cell.text, cell.latency, cell.evidence)))
    return f"{told if cell.checks else NOT_RUN}{f' ({cell.remark})' if cell.remark else ''}"
