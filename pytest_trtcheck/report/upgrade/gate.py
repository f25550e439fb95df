"""May the upgrade go out? Two reports, one verdict: the old TensorRT's, driver's or ONNX Runtime's, and the new one's.

What changed is `diff`'s matter. Here every check of the old report is asked a list of questions, and what could not be
asked counts as a loss unless that is allowed: a verdict speaks of what was compared alone.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pytest_trtcheck.errors import ArgumentError, ReportError
from pytest_trtcheck.record import jsonable
from pytest_trtcheck.report import diff
from pytest_trtcheck.report.upgrade import questions
from pytest_trtcheck.report.upgrade.questions import OUTCOMES, Allowable, Finding, Limits, Outcome
from pytest_trtcheck.report.view import missing

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from pytest_trtcheck.record import CheckRecord, Environment, Library, RunRecord
    from pytest_trtcheck.report.diff import EnvironmentChange, Subject


@dataclass(frozen=True)
class Judged:
    """A check of the old report, question by question; `information` is what changed and is not judged."""

    subject: Subject
    findings: tuple[Finding, ...]
    information: tuple[str, ...] = ()

    def outcome(self, allowed: Collection[Allowable]) -> Outcome:
        """The worst of its answers; what was not compared and need not be is none."""
        counted = [each.outcome for each in self.findings if each.kind is None or each.kind not in allowed]
        return max(counted, key=OUTCOMES.index, default="not compared")

    def is_allowed(self, allowed: Collection[Allowable]) -> bool:
        """Whether something was not compared, and need not be."""
        return any(each.kind in allowed for each in self.findings)


@dataclass(frozen=True)
class Gate:
    """The verdict on an upgrade, and all that it rests on. `checks` come worst first."""

    environment: tuple[EnvironmentChange, ...]
    checks: tuple[Judged, ...]
    added: tuple[Subject, ...]
    unrecorded: str | None
    """What is said of tests that left no record in the new report, and were to check something."""
    limits: Limits
    compared: int
    """How many checks had something compared."""
    partly: int
    """Of how many something was not compared, which was allowed."""
    counts: Counter[Outcome] = field(default_factory=Counter)

    @property
    def fits(self) -> bool:
        """Whether the reports fit together: anything in them could be compared."""
        return self.compared > 0

    @property
    def verdict(self) -> Literal["pass", "fail", "inconclusive"]:
        """What was not compared, and was not allowed, fails it; so does that nothing was."""
        unrecorded = self.unrecorded is not None and "missing" not in self.limits.allowed
        if not self.fits or unrecorded or self.counts["fail"] or self.counts["not compared"]:
            return "fail"
        return "inconclusive" if self.counts["inconclusive"] else "pass"


def judge(old: RunRecord, new: RunRecord, limits: Limits, *, downgrade: bool = False) -> Gate:
    """Judge an upgrade by the report of before and that of after.

    Parameters
    ----------
    downgrade
        Whether the new report may be of older versions.

    Raises
    ------
    ReportError
        The two are the same, have no check in common, or are no reports as they were written.
    ArgumentError
        The new report is of older versions.
    """
    found = diff.paired(old, new)
    _refuse(old, new, found, downgrade=downgrade)
    reasons = {each.nodeid: f": {each.reason}" for each in new.missing}
    judged = []
    for key, (one, two) in found.items():
        if two is None:
            text = f"the new report has no such check{reasons.get(key[0], '')}"
            lost = Finding("comparable", "not compared", text, "missing")
            judged += [Judged(diff.subject(key, one), (lost,))] if one else []
        elif one is not None:
            answers = questions.answers(one, two, (old, new), limits)
            judged.append(Judged(diff.subject(key, two), answers, tuple(questions.information(one, two))))
    outcomes = [each.outcome(limits.allowed) for each in judged]
    order = sorted(range(len(judged)), key=lambda index: -OUTCOMES.index(outcomes[index]))
    return Gate(
        environment=diff.environment(old, new),
        checks=tuple(judged[index] for index in order),
        added=tuple(diff.subject(key, two) for key, (one, two) in found.items() if two and not one),
        unrecorded=missing(new),
        limits=limits,
        compared=sum(any(each.outcome != "not compared" for each in check.findings) for check in judged),
        partly=sum(check.is_allowed(limits.allowed) for check in judged),
        # A check of which nothing was compared, and need not be, is none.
        counts=Counter(
            outcome
            for check, outcome in zip(judged, outcomes, strict=True)
            if outcome != "not compared" or any(each.kind not in limits.allowed for each in check.findings)
        ),
    )


# --- do they fit together? -------------------------------------------------------------------------------------------


def _refuse(
    old: RunRecord,
    new: RunRecord,
    found: dict[diff.Key, tuple[CheckRecord | None, CheckRecord | None]],
    *,
    downgrade: bool,
) -> None:
    # As JSON, in which NaN is NaN.
    if jsonable(old) == jsonable(new):
        raise ReportError(
            "both are the same report",
            "name the report of before the upgrade, then that of after it",
            code="reports-unrelated",
        )
    for name, run in (("old", old), ("new", new)):
        if not run.checks:
            raise ReportError(
                f"the {name} report has no checks", "name a report of a run that made some", code="reports-unrelated"
            )
    if not any(one and two for one, two in found.values()):
        raise ReportError(
            "the two reports have no check in common: no node id and precision is in both",
            "name two reports of one suite, made from the same rootdir",
            code="reports-unrelated",
        )
    machines = {each.name for each in old.machines} & {each.name for each in new.machines}
    for machine in sorted(machines) or (None,):
        older = _older(*(diff.environment_of(run, machine) for run in (old, new)))
        if older and not downgrade:
            raise ArgumentError(
                f"the new report is of an older {older}",
                "name the report of before the upgrade first; to go back is judged with --downgrade",
                code="reports-unrelated",
            )


def _older(old: Environment, new: Environment) -> str | None:
    """What says that the reports were swapped: the first of these that differs tells."""
    libraries = [environment.tensorrt for environment in (old, new)]
    modules = {library.module for library in libraries if library}
    versions: dict[str, tuple[str | None, str | None]] = {
        # TensorRT's numbers and those of TensorRT-RTX say nothing of each other.
        "TensorRT": _versions(libraries) if len(modules) == 1 else (None, None),
        "driver": (old.driver, new.driver),
        "ONNX Runtime": (old.onnxruntime, new.onnxruntime),
    }
    for name, (before, after) in versions.items():
        if before and after and before != after:
            return f"{name}: {before} before, {after} now" if _numbers(after) < _numbers(before) else None
    return None


def _versions(libraries: Sequence[Library | None]) -> tuple[str | None, str | None]:
    before, after = (library.version if library else None for library in libraries)
    return before, after


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]
