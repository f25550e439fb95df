"""Model × GPU: what each machine of a merged report says of each model, or each GPU that `--trt-gpu` named of one run.

What was not run somewhere is said in its cell; a cell of several checks shows the worst of them, and says so.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from pytest_trtcheck.errors import listed, plural
from pytest_trtcheck.record import without_parameter
from pytest_trtcheck.report.text import MISSING, format_number, one_line
from pytest_trtcheck.report.view import WORDS, decisive, scored, short_names, verdict_word

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_trtcheck.record import CheckRecord, RunRecord

NOT_RUN = "not run there"


@dataclass(frozen=True)
class Cell:
    """What one machine says of one model in one precision.

    Parameters
    ----------
    checks
        What it ran, the worst first; none where it ran nothing.
    absent
        How many checks of this model and precision others ran, and this one did not.
    why
        Why they were not run, as far as the report tells.
    """

    checks: tuple[CheckRecord, ...] = ()
    absent: int = 0
    why: tuple[str, ...] = ()

    @property
    def worst(self) -> CheckRecord | None:
        """The check to look at first."""
        return self.checks[0] if self.checks else None

    @property
    def word(self) -> str:
        """Its verdict."""
        return verdict_word(self.checks[0]) if self.checks else MISSING

    @property
    def error(self) -> str:
        """The error that decided it, or the score where no error did; empty where neither is known."""
        judged = decisive(self.checks[0]) if self.checks else None
        score = scored(self.checks[0]) if self.checks else None
        if judged and judged.value is not None:
            return judged.value_text
        return f"{score.name} {score.values}" if score else ""

    @property
    def text(self) -> str:
        """The verdict and the error."""
        return f"{self.word} {self.error}".rstrip()

    @property
    def latency(self) -> str:
        """The median and the 99th percentile in ms, as in "p50 1.17, p99 1.35 ms"; empty where nothing was measured."""
        told = [
            f"{name} {text}" for name, text in (("p50", self.quantile("p50")), ("p99", self.quantile("p99"))) if text
        ]
        return f"{', '.join(told)} ms" if told else ""

    def quantile(self, name: str) -> str:
        """A quantile in ms; of several checks from the least to the largest."""
        values = sorted(
            value
            for check in self.checks
            if check.latency and check.latency.samples
            for value in [getattr(check.latency, f"{name}_ms")]
            if value is not None
        )
        return "–".join(dict.fromkeys(map(format_number, (values[0], values[-1])))) if values else ""

    @property
    def evidence(self) -> str:
        """Where its outputs came from."""
        return ", ".join(sorted({check.evidence for check in self.checks if check.evidence}))

    @property
    def remark(self) -> str:
        """That it is several checks, and what of them was not run."""
        words = Counter(map(verdict_word, self.checks))
        said = []
        if len(self.checks) > 1:
            counted = ", ".join(f"{words[word]} {word}" for word in WORDS if words[word])
            said.append(f"the worst of {len(self.checks)}" + (f": {counted}" if len(words) > 1 else ""))
        if self.absent and self.checks:
            said.append(f"{plural(self.absent, 'check')} {NOT_RUN}")
        return "; ".join([*said, *([listed(self.why)] if self.why else [])])


@dataclass(frozen=True)
class Row:
    """One model in one precision: a cell for each column."""

    model: str
    precision: str | None
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Fleet:
    """The whole table; `columns` are machines or GPUs."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def fleet(run: RunRecord) -> Fleet | None:
    """Every model and precision, with what each machine or GPU says of it; None where there is but one of them."""
    columns = list(dict.fromkeys(filter(None, map(_column, run.checks))))
    # A machine whose report holds no check is a column all the same: of it nothing is known.
    with_checks = {check.machine for check in run.checks}
    columns += [machine.name for machine in run.machines if machine.name not in with_checks]
    if run.machines:
        order = {machine.name: place for place, machine in enumerate(run.machines)}
        places = {_column(check): order.get(check.machine or "", 0) for check in run.checks}
        columns.sort(key=lambda name: places.get(name, order.get(name, 0)))
    if not run.machines and len(columns) < 2:
        return None
    names = _models(run.checks)
    found: dict[tuple[str, str | None], dict[str | None, list[CheckRecord]]] = defaultdict(lambda: defaultdict(list))
    for check in run.checks:
        found[names[_identity(check)], check.precision][_column(check)].append(check)
    rows = [
        Row(model, precision, tuple(_cell(run, name, of_column, _tests(of_column)) for name in columns))
        for (model, precision), of_column in sorted(found.items(), key=lambda item: (item[0][0], item[0][1] or ""))
    ]
    return Fleet(tuple(columns), tuple(rows))


def _tests(of_column: dict[str | None, list[CheckRecord]]) -> set[str]:
    """The tests of a row."""
    return {check.test for checks in of_column.values() for check in checks}


def _column(check: CheckRecord) -> str | None:
    """The machine that a check ran on, and the GPU that it was for where it was one of several."""
    return ": ".join(filter(None, (check.machine, check.for_gpu))) or None


def _identity(check: CheckRecord) -> tuple[str, str]:
    """The file of one content is one model, wherever each machine keeps it."""
    return (PurePath(check.model).name, check.model_sha256) if check.model_sha256 else (check.model, "")


def _models(checks: Iterable[CheckRecord]) -> dict[tuple[str, str], str]:
    """What each model is called."""
    paths = {_identity(check): check.model for check in reversed(list(checks))}
    names = short_names(paths.values())
    return {identity: names[path] for identity, path in paths.items()}


def _cell(run: RunRecord, column: str, of_column: dict[str | None, list[CheckRecord]], everywhere: set[str]) -> Cell:
    checks = of_column.get(column, [])
    absent = everywhere - {check.test for check in checks}
    here = [each for each in run.missing if column.startswith(each.machine or "")]
    reasons = [each.reason for each in here if {each.nodeid, without_parameter(each.nodeid, column)} & absent]
    return Cell(tuple(sorted(checks, key=_severity)), len(absent), tuple(map(one_line, dict.fromkeys(reasons))))


def _severity(check: CheckRecord) -> tuple[int, float]:
    judged = decisive(check)
    return WORDS.index(verdict_word(check)), -((judged and judged.used) or 0.0)
