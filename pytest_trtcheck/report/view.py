"""What the reports say about check records, before any of them says it in its own form."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, TypeVar, get_args

from pytest_trtcheck.errors import listed, plural
from pytest_trtcheck.metrics import METRICS, distinct_digits, rank, recorded
from pytest_trtcheck.record import BudgetRecord, JudgedRecord, Verdict, is_bad
from pytest_trtcheck.report.text import format_against, format_limit, format_number, format_optional, one_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytest_trtcheck.record import CheckRecord, LatencyRecord, MissingRecord, RunRecord

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
WORDS = ("error", "fail", "inconclusive", "xfail", "not measured", "pass")
"""What `verdict_word` says, the ones to look at first come first."""
AT_LEAST = frozenset(metric.name for metric in METRICS.values() if metric.at_least)
"""Built-in metrics whose limit is the least they may be: they are in decibels."""

_UNITS = {
    "baseline": "ms",
    "min_qps": "/s",
    "memory_mib": "MiB",
    "engine_mib": "MiB",
    "load": "ms",
    "build_s": "s",
    "min_speedup": "×",
}
_GENERIC_STEMS = frozenset({"model", "best", "inference", "network", "net", "onnx", "export"})


@dataclass(frozen=True)
class Run:
    """What a report is written of.

    Parameters
    ----------
    record
        The checks, and where they ran.
    path
        What the report's option names; None for a report without one.
    rootdir
        Where node ids are relative to.
    width
        Of the terminal, in columns.
    key
        What the JSON report is signed with; None: it is not.
    listed
        Which checks the terminal lists: `all`, `failed`, `none`, or by their number, `auto`.
    """

    record: RunRecord
    path: Path | None = None
    rootdir: Path = Path()
    width: int = 80
    key: bytes | None = None
    listed: str = "auto"


@dataclass(frozen=True)
class Judgement:
    """One limit applied to one output. `value` is None where the metric could not be computed."""

    metric: str
    value: float | None
    limit: float | None
    verdict: Verdict
    output: str | None = None
    source: str | None = None
    is_least: bool = False

    @property
    def at_least(self) -> bool:
        """Whether the limit is the least that the value may be; `is_least` says so of a metric that is not built in."""
        return recorded(self.metric, at_least=self.is_least).at_least

    @property
    def value_text(self) -> str:
        """The value, with enough digits to differ from the limit."""
        if self.value is None or self.limit is None:
            return format_optional(self.value)
        return format_against(self.value, self.limit)[0]

    @property
    def limit_text(self) -> str:
        """The metric and its limit, as in "max ≤ 0.01"."""
        if self.limit is None:
            return f"same {self.metric}"
        sign = "≥" if self.at_least else "≤"
        return f"{self.metric} {sign} {_limit_beside(self.value, self.limit)}"

    @property
    def used(self) -> float | None:
        """How much of the limit the value uses, 1 being all of it; None where that has no meaning."""
        if not self.limit or self.value is None or math.isnan(self.value):
            return None
        return recorded(self.metric, at_least=self.is_least).used(self.value, self.limit)

    @property
    def severity(self) -> tuple[int, float]:
        """What orders judgements: the verdict, then how much of the limit is used up."""
        return rank(
            JudgedRecord(self.metric, self.value, self.limit, self.source, self.verdict, at_least=self.is_least)
        )


@dataclass(frozen=True)
class ScoreView:
    """A score in words: what it was and became, the drop with its bounds, and the limit on it."""

    name: str
    values: str
    drop: str
    limit: str
    verdict: Verdict


@dataclass(frozen=True)
class BudgetView:
    """One quantity, what was measured, and its budget; `low` and `high` are the confidence bounds, all in `unit`."""

    name: str
    value: float | None
    limit: float | None
    verdict: Verdict
    unit: str
    low: float | None = None
    high: float | None = None

    @property
    def at_least(self) -> bool:
        """Whether the limit is the least that the value may be."""
        return self.name.startswith("min_")

    @property
    def value_text(self) -> str:
        """The value, with enough digits to differ from the limit."""
        if self.value is None or self.limit is None:
            return format_optional(self.value)
        return format_against(self.value, self.limit)[0]

    @property
    def bounds_text(self) -> str:
        """The confidence bounds, as in "8.80–9.60"; the value where there are none."""
        if self.low is None or self.high is None or self.limit is None:
            return self.value_text
        return f"{format_against(self.low, self.limit)[0]}–{format_against(self.high, self.limit)[0]}"

    @property
    def limit_text(self) -> str:
        """The limit and its unit, as in "≤ 7 ms"."""
        if self.limit is None:
            return "no budget"
        return f"{'≥' if self.at_least else '≤'} {_limit_beside(self.value, self.limit)} {self.unit}".rstrip()


Tested = TypeVar("Tested", "CheckRecord", "MissingRecord")


def ordered(records: Iterable[Tested]) -> list[Tested]:
    """The records by node id, numbers in it by value, so that every way of running the tests reports the same."""
    return sorted(records, key=lambda record: natural(record.nodeid))


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key under which "b8" precedes "b16"."""
    parts = re.split(r"([0-9]+)", text)
    return tuple((1, int(part), part) if index % 2 else (0, 0, part) for index, part in enumerate(parts))


def judgements(record: CheckRecord) -> list[Judgement]:
    """Every limit that was applied to every output."""
    return [
        Judgement(
            judged.metric, judged.value, judged.limit, judged.verdict, output.name, judged.source, bool(judged.at_least)
        )
        for output in (record.parity.outputs if record.parity else ())
        for judged in output.judged
    ]


def decisive(record: CheckRecord) -> Judgement | None:
    """The limit that decided the parity verdict: of the worst verdicts, the one most used up; None if none applied."""
    judged = judgements(record)
    parity = record.parity
    if judged and parity:
        # Of limits that are used up as much, the one that the verdict names.
        return max(judged, key=lambda judgement: (judgement.severity, judgement.metric == parity.metric))
    if parity is None or parity.worst is None:
        return None
    return Judgement(parity.metric, parity.worst, parity.tol, parity.verdict, source=parity.tol_source)


def budgets(record: CheckRecord) -> list[BudgetView]:
    """What was measured of a check's latency, in the order of its budgets; the median where there is no budget."""
    latency = record.latency
    if latency is None or not latency.samples:
        return []
    # What was not measured is said in a note; a row of it would hold no figure.
    given = [budget for budget in latency.budgets if budget.verdict != "not_measured"]
    return [_budget(latency, budget) for budget in given or [BudgetRecord(latency.verdict, quantile="p50")]]


def scored(record: CheckRecord) -> ScoreView | None:
    """The score of a check; None where none was computed."""
    score = record.score
    if score is None or score.drop is None or score.reference is None or score.value is None:
        return None
    limit = score.max_drop or 0.0
    drop, low, high = (
        format_number(each, distinct_digits(each, limit, 2))
        for each in (score.drop, score.lower or 0.0, score.upper or 0.0)
    )
    return ScoreView(
        one_line(score.name),
        f"{format_number(score.reference, 4)} → {format_number(score.value, 4)}",
        f"{drop} ({low} to {high})",
        f"≤ {format_limit(limit)}",
        score.verdict,
    )


def verdict_word(record: CheckRecord, part: str | None = None) -> str:
    """The verdict of the check or of one part of it; a failure that the test expected reads "xfail"."""
    verdict = (record if part is None else record.parts[part]).verdict
    return "xfail" if is_bad(verdict) and record.expected_failure else verdict.replace("_", " ")


def failed(record: CheckRecord) -> bool:
    """Whether somebody has to look: a bad verdict that the test did not expect."""
    return is_bad(record.verdict) and not record.expected_failure


def counts(records: Iterable[CheckRecord]) -> dict[str, int]:
    """How many checks came to each verdict, every verdict named."""
    found = Counter(record.verdict for record in records)
    return {verdict: found[verdict] for verdict in VERDICTS}


def told_of(checks: Iterable[CheckRecord], missing: Iterable[MissingRecord]) -> int:
    """How many tests a report tells of: a test may make several checks, and every machine has its own."""
    told: tuple[CheckRecord | MissingRecord, ...] = (*checks, *missing)
    return len({(each.machine, each.nodeid) for each in told})


class Label(str):
    """What a row is called: the model, and the test where the model alone does not tell rows apart."""

    __slots__ = ("model", "test")

    model: str
    test: str

    def __new__(cls, model: str, test: str = "") -> Label:  # noqa: D102
        label = super().__new__(cls, f"{model} {test}".rstrip())
        label.model, label.test = model, test
        return label


def labels(records: Sequence[CheckRecord]) -> list[Label]:
    """A short name of each record's model that tells the rows of a table apart.

    The model's file name, with as many parent directories as it takes to name one model. Where two checks of a model
    would still look the same, all of its checks are called by their tests as well: without what stands in the column of
    the precision, and without the function's name where it is one for all.
    """
    names = short_names({record.model for record in records})
    # Of several systems the name says which it was to be.
    # What ended before its model was known is called by its test.
    plain = [
        f"{names[record.model] if record.model else one_line(_function(record.nodeid))} {record.system or ''}".rstrip()
        for record in records
    ]
    rows = [(name, record.precision, record.evidence) for name, record in zip(plain, records, strict=True)]
    repeated = {row[0] for row, count in Counter(rows).items() if count > 1}
    tests = dict.fromkeys(
        (name, record.nodeid) for name, record in zip(plain, records, strict=True) if name in repeated
    )
    functions = {name: {_function(nodeid) for model, nodeid in tests if model == name} for name in repeated}
    found = [
        Label(name, _test_name(record, alone=len(functions[name]) == 1)) if name in repeated else Label(name)
        for name, record in zip(plain, records, strict=True)
    ]
    seen: dict[tuple[str, str | None, str | None], set[str]] = {}
    for label, record in zip(found, records, strict=True):
        seen.setdefault((label, record.precision, record.evidence), set()).add(record.nodeid)
    return [
        label
        if len(seen[label, record.precision, record.evidence]) == 1
        else Label(label.model, one_line(_from_file_name(record.nodeid)))
        for label, record in zip(found, records, strict=True)
    ]


def not_measured(records: Iterable[CheckRecord]) -> list[tuple[str, str, int]]:
    """What was not measured: (part, reason, number of checks), the most frequent first."""
    found: Counter[tuple[str, str]] = Counter()
    for record in records:
        for name, part in record.parts.items():
            if part.verdict == "not_measured":
                found[name, one_line(part.reason or "no reason was recorded")] += 1
        if not record.parts and record.verdict == "not_measured":
            found["check", one_line(record.message or "no reason was recorded")] += 1
    return [(part, reason, count) for (part, reason), count in found.most_common()]


def inconclusive(records: Iterable[CheckRecord]) -> list[tuple[str, int]]:
    """Why measurements did not decide: (reason, number of checks)."""
    found = Counter(
        one_line(part.reason or "the time allowed was over before the bounds decided")
        for record in records
        for part in record.parts.values()
        if part.verdict == "inconclusive"
    )
    return found.most_common()


def notes(records: Iterable[CheckRecord]) -> list[tuple[str, int]]:
    """Every note once, with the number of checks that carry it, in order of first appearance."""
    return list(Counter(one_line(note) for record in records for note in record.notes).items())


def missing(run: RunRecord) -> str | None:
    """What is said of the tests that left no record; nothing of those that were skipped, which pytest says."""
    absent = [each for each in run.missing if each.outcome != "skipped"]
    if not absent:
        return None
    shown = listed((one_line(f"{each.nodeid} ({each.reason})") for each in absent), separator="; ")
    return f"not in this report: {len(absent)} of {plural(run.planned or len(absent), 'test')} with checks: {shown}"


def unseen(run: RunRecord) -> list[str]:
    """What a green run does not show: tests without a record, failures that a test's own code caught, further runs."""
    said = [missing(run)]
    for outcome, words in (("passed", "passed"), ("skipped", "was skipped")):
        # Of what did not decide, we skip the test ourselves.
        found = [
            each
            for each in run.checks
            if failed(each) and each.outcome == outcome and (outcome, each.verdict) != ("skipped", "inconclusive")
        ]
        said.append(_of_tests(found, f"failed in a test that {words}, whose own code caught the error"))
    found = [each for each in run.checks if each.runs > 1 and each.verdict == "pass" and each.outcome == "passed"]
    said.append(_of_tests(found, "passed only when the test was run again"))
    return [each for each in said if each is not None]


def _of_tests(checks: Sequence[CheckRecord], words: str) -> str | None:
    shown = listed(dict.fromkeys(one_line(each.nodeid) for each in checks))
    return f"{plural(len(checks), 'check')} {words}: {shown}" if checks else None


def emulated(records: Iterable[CheckRecord]) -> list[CheckRecord]:
    """The records whose outputs did not come from a GPU."""
    return [record for record in records if record.evidence == "emulated"]


def _limit_beside(value: float | None, limit: float) -> str:
    return format_limit(limit) if value is None else format_against(value, limit)[1]


def _budget(latency: LatencyRecord, budget: BudgetRecord) -> BudgetView:
    name = (budget.quantile or budget.name or "").removesuffix("_ms")
    is_quantile = re.fullmatch(r"p[0-9.]+", name) is not None
    low, high = latency.bounds_ms.get(f"{name}_ms") or latency.bounds_ms.get(name) or (None, None)
    value = getattr(latency, f"{name}_ms", None)
    # An entry with a value has its own bounds, unknown ones too.
    if budget.value_ms is not None:
        value, low, high = budget.value_ms, budget.lower_ms, budget.upper_ms
    elif budget.value is not None:
        value, low, high = budget.value, budget.lower, budget.upper
    return BudgetView(
        name=name,
        value=value,
        limit=budget.limit if budget.limit_ms is None else budget.limit_ms,
        verdict=budget.verdict,
        unit="ms" if is_quantile else _UNITS.get(name.partition("[")[0], ""),
        low=low,
        high=high,
    )


def short_names(models: Iterable[str]) -> dict[str, str]:
    """Each model by the shortest tail of its path that no other model shares."""
    parts = {model: [one_line(part) for part in PurePath(model).parts] or [model] for model in models}
    depth = {model: 2 if PurePath(model).stem in _GENERIC_STEMS else 1 for model in parts}
    while True:
        names = {model: "/".join(parts[model][-depth[model] :]).replace("//", "/") for model in parts}
        shared = Counter(names.values())
        growing = [model for model in parts if shared[names[model]] > 1 and depth[model] < len(parts[model])]
        if not growing:
            return names
        for model in growing:
            depth[model] += 1


def _function(nodeid: str) -> str:
    return _in_file(nodeid).partition("[")[0]


def _from_file_name(nodeid: str) -> str:
    file, colons, test = nodeid.partition("::")
    return f"{file.rpartition('/')[2]}{colons}{test}"


def _in_file(nodeid: str) -> str:
    """A test's function with its parameters, which may hold whatever divides a node id."""
    file, _, test = nodeid.partition("::")
    names, bracket, parameters = (test or file).partition("[")
    return names.rpartition("::")[2] + bracket + parameters


def _test_name(record: CheckRecord, *, alone: bool) -> str:
    """A test by its function and its parameters ("sizes[b8]"), of a function that is `alone` by these ("[b8]")."""
    precision = record.precision or ""
    name, _, parameters = _in_file(record.nodeid).partition("[")
    given = [each for each in parameters.removesuffix("]").split("-") if each != precision]
    shown = "" if alone and any(given) else re.sub(rf"_?{re.escape(precision)}(?=_|$)", "", name.removeprefix("test"))
    return one_line(shown.strip("_") + (f"[{'-'.join(given)}]" if any(given) else ""))
