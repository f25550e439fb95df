"""What changed from one run of a check to the next, where both were made in the same way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from pytest_trtcheck.cache import format_bytes
from pytest_trtcheck.choices import parts_of
from pytest_trtcheck.errors import ReportError, plural
from pytest_trtcheck.metrics import recorded
from pytest_trtcheck.record import ASKED_LIMITS, ASKED_SEARCH, BASELINE, SEVERITY, Conditions, Verdict
from pytest_trtcheck.report.text import MISSING, format_limit, format_number, format_optional
from pytest_trtcheck.report.view import AT_LEAST, Judgement, judgements, scored, verdict_word

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pytest_trtcheck.latency.distribution import Distribution
    from pytest_trtcheck.record import BudgetRecord, CheckRecord, LatencyDetails, LatencyRecord

Direction: TypeAlias = Literal["worse", "better", "changed", "untested"]

ERROR_RATIO = 1.1
"""An error changed when it is so many times larger or smaller …"""
ERROR_SHARE = 0.01
"""… and by more than this share of its limit: far below the limit, a few rounded bits double an error."""
SIZE_RATIO, SIZE_BYTES = 1.1, 1 << 20
"""An engine's size or memory changed when it is so many times larger or smaller, and by more than so many bytes."""


@dataclass(frozen=True)
class Change:
    """One thing that changed.

    Parameters
    ----------
    what
        "verdict", "boxes max" (an output and its metric), "p50", "engine size", …
    direction
        `changed`: neither better nor worse in itself; `untested`: whether it is worse could not be told.
    old, new
        In words, with units.
    remark
        How much, and whatever else it takes to understand it.
    verdict
        The new verdict, of a change of verdict.
    weight
        What orders changes of one direction: the factor, as a logarithm.
    lost
        Whether the old report tells something that the new one was not asked for, or does not tell.
    """

    what: str
    direction: Direction
    old: str
    new: str
    remark: str = ""
    verdict: Verdict | None = None
    weight: float = 0.0
    lost: bool = False


def changes(old: CheckRecord, new: CheckRecord) -> tuple[Change, ...]:
    """Everything that changed between two records of one check, the verdict first.

    Raises
    ------
    ReportError
        A latency distribution cannot be read.
    """
    return (
        *(*_verdicts(old, new), *_errors(old, new), *_score(old, new), *asked_otherwise(old, new)),
        *(*_latency(old, new), *_engine(old, new)),
    )


def asked_otherwise(old: CheckRecord, new: CheckRecord) -> tuple[Change, ...]:
    """What was given otherwise beside model, inputs and reference: it may be why a figure is another one."""
    return (*_ran_otherwise(old, new), *_calibration(old, new), *_options(old, new), *_judged_otherwise(old, new))


def _ran_otherwise(old: CheckRecord, new: CheckRecord) -> Iterator[Change]:
    """Another library that ran it on a GPU, and that it took other runs of its test to come to this."""
    if old.evidence == new.evidence == "provider" and old.backend != new.backend:
        yield Change("backend", "changed", str(old.backend), str(new.backend))
    if old.runs != new.runs:
        yield Change("runs of the test", "changed", str(old.runs), str(new.runs))


def _judged_otherwise(old: CheckRecord, new: CheckRecord) -> Iterator[Change]:
    """Another search, and what else was asked for in another way, or not at all."""
    # One that broke may not tell what is asked of it.
    if "error" in {old.verdict, new.verdict}:
        return
    searches = [each.search for each in (old, new)]
    # What fails on its own inputs is not searched.
    if all(each.search or (each.parity and each.parity.verdict == "pass") for each in (old, new)):
        depths = [(each.asked, not each.is_cut_short) if each else (0, False) for each in searches]
        words = [each.shown_tries if each else "none" for each in searches]
        if depths[0] != depths[1]:
            yield Change(ASKED_SEARCH, "changed", words[0], words[1], lost=depths[1] < depths[0])
    before, after = old.asked or {}, new.asked or {}
    for what in dict.fromkeys((*before, *after)):
        told = what == ASKED_LIMITS or (what == "score" and (what in before) != (what in after))
        if what == ASKED_SEARCH:
            told = None in searches or what not in before or what not in after
        if not told and before.get(what) != after.get(what):
            now = "not asked for" if what not in after else "asked for" if what not in before else "asked otherwise"
            then = "asked for" if what in before else "not asked for"
            yield Change(what, "changed", then, now, lost=what not in after)


def _options(old: CheckRecord, new: CheckRecord) -> Iterator[Change]:
    """Other nodes left out, and other build options."""
    given: list[dict[str, object]] = []
    for record in (old, new):
        left_out = {name: getattr(record.lowered, name) for name in ("keep_fp32", "exclude")} if record.lowered else {}
        given.append(
            {name: list(nodes) for name, nodes in left_out.items() if nodes} | dict(record.build_options or {})
        )
    # A check that ended before its model was lowered says nothing of it.
    if old.lowered is None or new.lowered is None:
        return
    for name in dict.fromkeys((*given[0], *given[1])):
        words = [str(each[name]) if name in each else MISSING for each in given]
        if words[0] != words[1]:
            yield Change(name, "changed", words[0], words[1])


def _verdicts(old: CheckRecord, new: CheckRecord) -> Iterator[Change]:
    before, after = old.parts, new.parts
    overall = old.verdict, new.verdict
    for name in (None, *(name for name in before if name in after)):
        pair = overall if name is None else (before[name].verdict, after[name].verdict)
        # A part that says the same as the whole check is no news.
        if pair[0] == pair[1] or (name is not None and pair == overall):
            continue
        ranks = [SEVERITY.index(verdict) for verdict in pair]
        direction: Direction = "worse" if ranks[1] > ranks[0] else "better"
        if "not_measured" in pair:
            direction = "changed"
        words = [verdict_word(record, name) for record in (old, new)]
        what = "verdict" if name is None else f"{name} verdict"
        yield Change(what, direction, words[0], words[1], verdict=pair[1], weight=abs(ranks[1] - ranks[0]))
    if new.verdict == "pass" and (old.outcome, new.outcome) == ("passed", "failed"):
        yield Change("test", "worse", "passed", "failed", "though this check passed")
    if overall == ("pass", "pass") and (old.outcome, new.outcome) == ("failed", "passed"):
        yield Change("test", "better", "failed", "passed", "though this check passed")
    yield from _budget_verdicts(old, new)
    for name in ("parity", "score", "latency"):
        if (name in before) != (name in after) and "error" not in overall:
            words = ["checked" if name in there else "not asked for" for there in (before, after)]
            yield Change(name, "changed", words[0], words[1], lost=name in before)


def budgets(record: CheckRecord) -> dict[str, BudgetRecord]:
    """The budgets that were on a check, by what they are on."""
    return {each.name or each.quantile or "": each for each in record.budgets if each.name != BASELINE}


def _budget_verdicts(old: CheckRecord, new: CheckRecord) -> Iterator[Change]:
    """What a part does not say: of its budgets one is met no more, or not measured, and another one decides; and that
    one is another one, or gone.
    """
    before, after = budgets(old), budgets(new)
    for name in dict.fromkeys((*before, *after)) if old.latency and new.latency else ():
        one, two = before.get(name), after.get(name)
        limits = [limit_of(each) for each in (one, two)]
        if limits[0] != limits[1]:
            yield Change(f"budget {name} limit", "changed", limits[0], limits[1], lost=two is None)
        parts = [check.latency.verdict if check.latency else None for check in (old, new)]
        if one is None or two is None or one.verdict == two.verdict or [one.verdict, two.verdict] == parts:
            continue
        direction: Direction = "worse" if SEVERITY.index(two.verdict) > SEVERITY.index(one.verdict) else "better"
        if "not_measured" in {one.verdict, two.verdict}:
            direction = "changed"
        words = [each.verdict.replace("_", " ") for each in (one, two)]
        yield Change(f"budget {name}", direction, words[0], words[1], verdict=two.verdict)


def limit_of(budget: BudgetRecord | None) -> str:
    """What a budget allows, with its unit where that is a time; a dash where there is none on this GPU."""
    if budget is None:
        return MISSING
    if budget.limit_ms is not None:
        return f"{format_limit(budget.limit_ms)} ms"
    return MISSING if budget.limit is None else format_limit(budget.limit)


# --- error -----------------------------------------------------------------------------------------------------------


def _errors(old: CheckRecord, new: CheckRecord) -> Iterator[Change]:
    before, after = by_place(old), by_place(new)
    for place in dict.fromkeys((*before, *after)):
        what = " ".join(place)
        one, two = before.get(place), after.get(place)
        if one is None or two is None:
            yield from _appeared(what, one, two)
            continue
        yield from _error(what, one, two)
        if one.limit != two.limit:
            yield Change(f"{what} limit", "changed", limit_text(one), limit_text(two))


def by_place(record: CheckRecord) -> dict[tuple[str, str], Judgement]:
    """The limits that were applied, by output and metric."""
    # What a baseline allowed is no limit of the test's: that an error rose is a change of verdict.
    return {
        (judged.output or "", judged.metric): judged
        for judged in judgements(record)
        if not (judged.source or "").startswith(BASELINE)
    }


def _appeared(what: str, old: Judgement | None, new: Judgement | None) -> Iterator[Change]:
    """A limit that was applied in one report alone: another tolerance, or a fault that ends the comparison."""
    judged = old or new
    assert judged is not None
    direction: Direction = "changed"
    if judged.verdict != "pass":
        direction = "better" if new is None else "worse"
    # Without a limit it is a fault in words ("shape"), and its value is that it is there.
    word = judged.value_text if judged.limit is not None or judged.value is not None else "not as the reference"
    before, now = MISSING if old is None else word, MISSING if new is None else word
    yield Change(what, direction, before, now, lost=new is None)


def _error(what: str, old: Judgement, new: Judgement) -> Iterator[Change]:
    before, after = cost(old), cost(new)
    if before == after:
        return
    limits = [cost_of(each, each.limit) for each in (old, new) if each.limit is not None]
    scale = min((limit for limit in limits if math.isfinite(limit)), default=0.0)
    low, high = sorted((before, after))
    if old.verdict == new.verdict and not (high > ERROR_RATIO * low and high - low > ERROR_SHARE * scale):
        return
    factor = high / low if low and math.isfinite(high) else math.inf
    remark = f"×{format_number(factor if after > before else 1 / factor)}" if math.isfinite(factor) else ""
    if old.metric in AT_LEAST and old.value is not None and new.value is not None:
        remark = f"{new.value - old.value:+.1f} dB"
    limit = f"limit {limit_text(new)}" if new.limit is not None else ""
    yield Change(
        what,
        "worse" if after > before else "better",
        value_text(old),
        value_text(new),
        ", ".join(filter(None, (remark, limit))),
        weight=math.log(min(factor, 1e300)),
    )


def _score(old: CheckRecord, new: CheckRecord) -> Iterator[Change]:
    """Another drop of the score, where neither's bounds hold the other's; and another limit on it."""
    before, after, views = old.score, new.score, [scored(each) for each in (old, new)]
    if before is None or after is None or views[0] is None or views[1] is None:
        return
    for what, one, two in (
        ("score", views[0].name, views[1].name),
        ("labels", before.labels_sha256 or MISSING, after.labels_sha256 or MISSING),
    ):
        if one != two:
            yield Change(what, "changed", one[:40], two[:40])
            return
    if before.reference != after.reference:
        texts = [format_number(each.reference or 0.0, 4) for each in (before, after)]
        yield Change(f"{after.name} of the reference", "changed", texts[0], texts[1])
    worse = after.fell_further_than(before)
    if worse or before.fell_further_than(after):
        yield Change(f"{after.name} drop", "worse" if worse else "better", views[0].drop, views[1].drop, views[1].limit)
    if before.max_drop != after.max_drop:
        yield Change(f"{after.name} max_drop", "changed", views[0].limit, views[1].limit)


def cost(judged: Judgement) -> float:
    """`cost_of` its value."""
    return cost_of(judged, judged.value)


def cost_of(judged: Judgement, value: float | None) -> float:
    """What a value costs: the larger, the worse."""
    return recorded(judged.metric, at_least=judged.is_least).cost(value)


def value_text(judged: Judgement) -> str:
    """Its value, or that there is none."""
    return "not computed" if judged.value is None else judged.value_text


def limit_text(judged: Judgement) -> str:
    """Its limit, with its sign."""
    sign = "≥" if judged.at_least else "≤"
    return MISSING if judged.limit is None else f"{sign} {format_limit(judged.limit)}"


def _calibration(old: CheckRecord, new: CheckRecord) -> Iterator[Change]:
    """Other calibration data, and what became of it: other ranges, and so another model, from the same file."""
    before, after = old.calibration, new.calibration
    if before is None or after is None:
        return
    if before.sha256 != after.sha256 and None not in {before.sha256, after.sha256}:
        words = [f"{plural(each.samples, 'sample')} (sha256 {str(each.sha256)[:8]}…)" for each in (before, after)]
        yield Change("calibration data", "changed", words[0], words[1])
    methods = [
        each.method + (f" {each.percentile:g}" if each.percentile is not None else "") for each in (before, after)
    ]
    if methods[0] != methods[1]:
        yield Change("calibration method", "changed", methods[0], methods[1])
    for name, found in (after.inputs or {}).items():
        then = (before.inputs or {}).get(name)
        if then is not None and found.drifted != then.drifted:
            words = ["not covered" if each.drifted else "covered" for each in (then, found)]
            yield Change(f"calibration of {name}", "changed", words[0], words[1])


# --- latency ---------------------------------------------------------------------------------------------------------


def _latency(old: CheckRecord, new: CheckRecord) -> Iterator[Change]:
    before, after = old.latency, new.latency
    if before is None or after is None or not before.samples or not after.samples:
        return
    other_way = measured_otherwise(before.details, after.details)
    # The median, and whatever else has a budget.
    budgeted = {budget.quantile for latency in (before, after) for budget in latency.budgets}
    for name in ("p50_ms", *(f"{each}_ms" for each in ("p90", "p95", "p99") if each in budgeted)):
        values: list[float | None] = [getattr(latency, name) for latency in (before, after)]
        if values[0] == values[1]:
            continue
        change = _quantile(name, before, after, new.nodeid) if not other_way else None
        if other_way or change is not None:
            texts = [f"{format_optional(value)} ms" for value in values]
            direction, remark, weight = change or ("untested", other_way, 0.0)
            yield Change(name.removesuffix("_ms"), direction, texts[0], texts[1], remark, weight=weight)


def measured_otherwise(old: LatencyDetails, new: LatencyDetails) -> str:
    """Why two latencies were measured in different ways; empty where they were not."""
    if old.measured != new.measured:
        return f"not compared: {old.measured} before, {new.measured} now"
    if old.cuda_graph != new.cuda_graph:
        words = ["as a CUDA graph" if details.cuda_graph else "without a CUDA graph" for details in (old, new)]
        return f"not compared: launched {words[0]} before, {words[1]} now"
    from pytest_trtcheck.latency.comparison import other_clocks

    clocks = other_clocks(old.conditions or Conditions(), new.conditions or Conditions())
    return f"not compared: {'; '.join(clocks)}" if clocks else ""


def _quantile(name: str, old: LatencyRecord, new: LatencyRecord, nodeid: str) -> tuple[Direction, str, float] | None:
    """Whether a quantile is significantly another one: the direction, how sure that is, and its weight."""
    before, after = distribution_of(old, nodeid), distribution_of(new, nodeid)
    if before is None or after is None:
        return "untested", "could not be tested: a report has no distribution", 0.0
    from pytest_trtcheck.latency.comparison import compare

    waited = old.details.enqueue_bound or new.details.enqueue_bound
    slower = compare(after, before, name=name, enqueue_bound=waited)
    faster = compare(before, after, name=name, enqueue_bound=waited)
    if slower.lower is None or slower.upper is None:
        return "untested", f"{slower.ratio - 1:+.1%}, could not be tested: too few samples for bounds", 0.0
    remark = f"{slower.ratio - 1:+.1%}, between {slower.lower - 1:+.1%} and {slower.upper - 1:+.1%}"
    weight = abs(math.log(slower.ratio)) if 0 < slower.ratio < math.inf else math.inf
    direction: Direction = (
        "worse" if slower.decision == "fail" else "better" if faster.decision == "fail" else "untested"
    )
    # What was disturbed looks slower than it is.
    disturbed = (new if direction == "worse" else old).details.disturbances
    if direction != "untested" and disturbed:
        return "untested", f"{remark}, but it was disturbed: {'; '.join(disturbed)}", weight
    if direction == "untested":
        if all(found.ratio <= 1 + found.min_slowdown for found in (slower, faster)):
            return None
        return "untested", f"{remark}: too uncertain to tell", weight
    return direction, remark, weight


def distribution_of(latency: LatencyRecord, nodeid: str) -> Distribution | None:
    """The distribution in a report; None where there is none.

    Raises
    ------
    ReportError
        It is none.
    """
    data = latency.details.distribution
    if data is None:
        return None
    from pytest_trtcheck.latency.distribution import Distribution

    try:
        return Distribution.from_json(data)
    except ReportError:
        raise ReportError(
            f"{nodeid}: its latency distribution in the report cannot be read",
            "name a file that --trt-report wrote, as it was",
        ) from None


# --- the engine ------------------------------------------------------------------------------------------------------


def _engine(old: CheckRecord, new: CheckRecord) -> Iterator[Change]:
    before, after = old.engine, new.engine
    if before is None or after is None:
        if before is not after and "error" not in {old.verdict, new.verdict}:
            words = ["built" if engine else "not built" for engine in (before, after)]
            yield Change("engine", "changed", words[0], words[1], lost=after is None)
        return
    targets = [record.compiled_for or "the GPU there" for record in (old, new)]
    if targets[0] != targets[1]:
        yield Change("compiled for", "changed", targets[0], targets[1])
        return
    if "file" in {before.source, after.source} and before.sha256 != after.sha256:
        words = [engine.file or "built" for engine in (before, after)]
        hashes = [f"{word} ({(engine.sha256 or '')[:8]})" for word, engine in zip(words, (before, after), strict=True)]
        yield Change("engine file", "changed", hashes[0], hashes[1])
    yield from _size("engine size", before.bytes, after.bytes)
    yield from _size("device memory", before.device_memory_bytes, after.device_memory_bytes)
    yield from _layers(before.layers_by_precision, after.layers_by_precision, new.precision)


def _size(what: str, old: float | None, new: float | None) -> Iterator[Change]:
    if old is None or new is None:
        return
    low, high = sorted((old, new))
    if high > SIZE_RATIO * low and high - low > SIZE_BYTES:
        factor = high / low if low else math.inf
        remark = f"{new / old - 1:+.0%}" if old else ""
        direction: Direction = "worse" if new > old else "better"
        yield Change(what, direction, format_bytes(old), format_bytes(new), remark, weight=math.log(min(factor, 1e300)))


def _layers(old: Mapping[str, int] | None, new: Mapping[str, int] | None, precision: str | None) -> Iterator[Change]:
    if not old or not new or old == new:
        return
    asked = parts_of(precision or "")
    for name in sorted({*old, *new}, key=lambda name: (name not in asked, name)):
        counts = old.get(name, 0), new.get(name, 0)
        if counts[0] == counts[1]:
            continue
        # Other fusions change every count; that none is left in the precision asked for is another matter.
        direction: Direction = "changed"
        if name in asked and 0 in counts:
            direction = "worse" if not counts[1] else "better"
        remark = "no layer runs in it any more" if direction == "worse" else ""
        yield Change(f"layers in {name}", direction, str(counts[0]), str(counts[1]), remark)
