"""What the reports say about check records, before any of them says it in its own form.

A record is the mapping that `CheckRecord.to_json` writes, read back. Reports also read a few keys that whoever
collects the records may add; docs/report.md lists them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TypeAlias, get_args

from pytest_trtcheck.metrics import METRICS, rank, recorded
from pytest_trtcheck.record import Verdict, number
from pytest_trtcheck.report.text import format_against, format_limit, format_optional, one_line

Record: TypeAlias = Mapping[str, Any]

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
AT_LEAST = frozenset(metric.name for metric in METRICS.values() if metric.at_least)
"""Built-in metrics whose limit is the least they may be."""

_GENERIC_STEMS = frozenset({"model", "best", "inference", "network", "net", "onnx", "export"})


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
        return rank({**vars(self), "at_least": self.is_least})


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


def ordered(records: Iterable[Record]) -> list[Record]:
    """The records by node id, numbers in it by value, so that every way of running the tests reports the same."""
    return sorted(records, key=lambda record: natural(str(record["nodeid"])))


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key under which "b8" precedes "b16"."""
    parts = re.split(r"([0-9]+)", text)
    return tuple((1, int(part), part) if index % 2 else (0, 0, part) for index, part in enumerate(parts))


def judgements(record: Record) -> list[Judgement]:
    """Every limit that was applied to every output."""
    parity = record.get("parity") or {}
    return [
        Judgement(
            metric=str(judgement["metric"]),
            value=number(judgement.get("value")),
            limit=number(judgement.get("limit")),
            verdict=judgement["verdict"],
            output=output["name"],
            source=judgement.get("source"),
            is_least=judgement.get("at_least", False),
        )
        for output in parity.get("outputs") or ()
        for judgement in output.get("judged") or ()
    ]


def decisive(record: Record) -> Judgement | None:
    """The limit that decided the parity verdict: of the worst verdicts, the one most used up; None if none applied."""
    judged = judgements(record)
    parity = record.get("parity")
    if judged and parity:
        # Of limits that are used up as much, the one that the verdict names.
        return max(judged, key=lambda judgement: (judgement.severity, judgement.metric == parity["metric"]))
    if not parity or parity.get("worst") is None:
        return None
    return Judgement(
        metric=str(parity["metric"]),
        value=number(parity["worst"]),
        limit=number(parity.get("tol")),
        verdict=parity["verdict"],
        source=parity.get("tol_source"),
    )


def budgets(record: Record) -> list[BudgetView]:
    """What was measured of a check's latency, in the order of its budgets; the median where there is no budget."""
    latency = record.get("latency")
    if not latency or not latency.get("samples"):
        return []
    # What was not measured is said in a note; a row of it would hold no figure.
    given = [budget for budget in latency.get("budgets") or () if budget["verdict"] != "not_measured"]
    given = given or [{"quantile": "p50", "verdict": latency["verdict"]}]
    return [_budget(latency, budget) for budget in given]


def verdict_word(record: Record, part: str | None = None) -> str:
    """The verdict of the check or of one part of it; a failure that the test expected reads "xfail"."""
    source = record if part is None else record[part]
    verdict: str = source["verdict"]
    if verdict in {"fail", "error", "inconclusive"} and record.get("expected_failure"):
        return "xfail"
    return verdict.replace("_", " ")


def failed(record: Record) -> bool:
    """Whether somebody has to look: a bad verdict that the test did not expect."""
    return record["verdict"] in {"fail", "error", "inconclusive"} and verdict_word(record) != "xfail"


def counts(records: Iterable[Record]) -> dict[str, int]:
    """How many checks came to each verdict, every verdict named."""
    found = Counter(record["verdict"] for record in records)
    return {verdict: found[verdict] for verdict in VERDICTS}


def labels(records: Sequence[Record]) -> list[str]:
    """A short name of each record's model that tells the rows of a table apart.

    The model's file name, with as many parent directories as it takes to name one model; checks that would still look
    the same get the parameters of their test, or its name.
    """
    names = _short_names({str(record["model"]) for record in records})
    plain = [names[str(record["model"])] for record in records]
    rows = [
        (name, record.get("precision"), record.get("evidence")) for name, record in zip(plain, records, strict=True)
    ]
    repeated = {row for row, count in Counter(rows).items() if count > 1}
    return [
        f"{name} {_test_name(str(record['nodeid']))}" if row in repeated else name
        for name, row, record in zip(plain, rows, records, strict=True)
    ]


def not_measured(records: Iterable[Record]) -> list[tuple[str, str, int]]:
    """What was not measured: (part, reason, number of checks), the most frequent first."""
    found: Counter[tuple[str, str]] = Counter()
    for record in records:
        parts = [part for part in ("parity", "latency") if record.get(part)]
        for part in parts:
            if record[part]["verdict"] == "not_measured":
                found[part, one_line(record[part].get("reason") or "no reason was recorded")] += 1
        if not parts and record["verdict"] == "not_measured":
            found["check", one_line(record.get("message") or "no reason was recorded")] += 1
    return [(part, reason, count) for (part, reason), count in found.most_common()]


def inconclusive(records: Iterable[Record]) -> list[tuple[str, int]]:
    """Why measurements did not decide: (reason, number of checks)."""
    found = Counter(
        one_line(record["latency"].get("reason") or "the time allowed was over before the bounds decided")
        for record in records
        if record.get("latency") and record["latency"]["verdict"] == "inconclusive"
    )
    return found.most_common()


def notes(records: Iterable[Record]) -> list[tuple[str, int]]:
    """Every note once, with the number of checks that carry it, in order of first appearance."""
    return list(Counter(one_line(note) for record in records for note in record.get("notes") or ()).items())


def emulated(records: Iterable[Record]) -> list[Record]:
    """The records whose outputs did not come from a GPU."""
    return [record for record in records if record.get("evidence") == "emulated"]


def _limit_beside(value: float | None, limit: float) -> str:
    return format_limit(limit) if value is None else format_against(value, limit)[1]


def _budget(latency: Mapping[str, Any], budget: Mapping[str, Any]) -> BudgetView:
    name = str(budget.get("quantile") or budget.get("name"))
    if re.fullmatch(r"0?\.[0-9]+", name):
        name = f"p{100 * float(name):g}"
    name = name.removesuffix("_ms")
    quantile = re.fullmatch(r"p[0-9.]+", name) is not None
    bounds = latency.get("bounds_ms") or {}
    low, high = bounds.get(f"{name}_ms") or bounds.get(name) or (None, None)
    low, high = budget.get("lower_ms", budget.get("lower", low)), budget.get("upper_ms", budget.get("upper", high))
    units = {"baseline": "ms", "min_qps": "/s", "memory_mib": "MiB", "engine_mib": "MiB", "min_speedup": "×"}
    unit = "ms" if quantile else units.get(name, "")
    value = budget.get("value_ms", budget.get("value", latency.get(f"{name}_ms")))
    return BudgetView(
        name=name,
        value=number(value),
        limit=number(budget.get("limit_ms", budget.get("limit"))),
        verdict=budget["verdict"],
        unit=unit,
        low=number(low),
        high=number(high),
    )


def _short_names(models: Iterable[str]) -> dict[str, str]:
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


def _test_name(nodeid: str) -> str:
    """The parameters of a test ("[int8-b8]"), or its name where it has none."""
    name = nodeid.rsplit("::", 1)[-1]
    return name[name.index("[") :] if "[" in name else name
