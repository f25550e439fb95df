"""Is today's latency significantly above what was recorded? Said with both distributions, or why it cannot be told.

Two runs of one engine, minutes or months apart, never have exactly the same distribution: the driver, the temperature
and the clocks differ a little, and a test for "the same distribution" (Mann-Whitney, Kolmogorov-Smirnov) would find
that with enough samples and call it significant. What matters is how much slower, so the ratio of the medians is
bounded, and a slowdown is one that surely exceeds the least slowdown worth a person's attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_trtcheck.latency.baselines.distribution import RECORD_AGAIN, Distribution
from pytest_trtcheck.latency.stats import SETTLING_S, Series, settling
from pytest_trtcheck.latency.verdict import QUANTILES, Decision
from pytest_trtcheck.record import SEVERITY, BudgetRecord, Conditions, LatencyDetails, LatencyRecord, Verdict, combine

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_trtcheck.latency.baselines.files import Baseline
    from pytest_trtcheck.latency.stats import Samples

NAME = "baseline"
"""The name of its entry among a record's budgets."""

MIN_SLOWDOWN = 0.03
"""A slowdown of the median that is surely above this fails: a loss of 5 % is to be seen in spite of the uncertainty of
both runs, and runs of one engine on a card that is left alone differ by less (docs/baselines.md)."""
SURELY_BELOW = 2.0
"""Where it cannot be told whether the slowdown is above the least that fails, it passes if it looks to be below that,
and is surely below so many times that."""
BETWEEN_REPORTS = 0.05
"""The least slowdown between two reports that is worth a person's attention, by default: below it lies what differs
between two runs of the same engine."""

OTHER_CLOCK = 0.1
"""SM clocks that differ by more than this are another GPU's, as it were: boost moves them by less under one load."""

TIGHT = 0.01
"""While a baseline is recorded, samples are taken until the median's bounds are so close to each other."""


@dataclass(frozen=True)
class Comparison:
    """Today against a baseline.

    Parameters
    ----------
    decision
        `fail`: surely slower by more than `min_slowdown`; `pass`: surely not; else undecided.
    ratio, lower, upper
        Today's quantile over the baseline's, with bounds; a bound is None where either side has none.
    message
        Both distributions, in words.
    """

    decision: Decision
    ratio: float
    lower: float | None
    upper: float | None
    min_slowdown: float
    message: str


def compare(
    now: Distribution, baseline: Distribution, *, name: str = "p50_ms", min_slowdown: float = BETWEEN_REPORTS
) -> Comparison:
    """Whether a quantile is significantly higher than in the baseline.

    The ratio of the two lies between now's lower bound over the baseline's upper one and the other way round. It must
    lie wholly above 1 + min_slowdown to fail and wholly within to pass.
    """
    today, before = now.quantile_ms(name), baseline.quantile_ms(name)
    lower = upper = None
    if name in now.bounds_ms and name in baseline.bounds_ms:
        (now_low, now_high), (then_low, then_high) = now.bounds_ms[name], baseline.bounds_ms[name]
        lower = now_low / then_high if then_high else None
        upper = now_high / then_low if then_low else None
    limit = 1 + min_slowdown
    decision: Decision = "undecided"
    if lower is not None and lower > limit:
        decision = "fail"
    elif upper is not None and upper <= limit:
        decision = "pass"
    ratio = today / before if before else math.inf
    between = f", between {lower - 1:+.1%} and {upper - 1:+.1%}" if lower is not None and upper is not None else ""
    message = (
        f"{name.removesuffix('_ms')} is {ratio - 1:+.1%} against the baseline{between} (allowed: {min_slowdown:+.1%}); "
        f"now {_words(now)}; baseline {_words(baseline)}"
    )
    return Comparison(decision, ratio, lower, upper, min_slowdown, message)


def decided(found: Comparison) -> Verdict:
    """`pass`, `fail` or `inconclusive`, by what the bounds say."""
    if found.decision != "undecided":
        return found.decision
    sure = found.upper is not None and found.upper <= 1 + SURELY_BELOW * found.min_slowdown
    return "pass" if sure and found.ratio <= 1 + found.min_slowdown else "inconclusive"


def enough(samples_ms: Samples, confidence: float, baseline: Baseline | None) -> bool:
    """Whether the samples decide about a baseline, or without one are good enough to be one.

    They are neither while clocks settle: the baseline of a cold GPU would fail every warm one.

    Parameters
    ----------
    samples_ms
        In the order in which they were taken.
    confidence
        To decide with: of this look, when looking repeatedly.
    """
    series = Series.of(samples_ms)
    moves = settling(series, confidence=confidence).percent_per_s
    if moves is not None and abs(moves) / 100 * SETTLING_S > TIGHT:
        return False
    now = Distribution.of(series, confidence)
    if baseline is None:
        return now.width <= TIGHT
    return compare(now, baseline.distribution, min_slowdown=MIN_SLOWDOWN).decision != "undecided"


def differences(baseline: Baseline, details: LatencyDetails, model_sha256: str | None) -> list[str]:
    """Why what is measured now cannot be compared with the baseline.

    Parameters
    ----------
    details
        Of the latency record. What is not known yet (`cuda_graph` and clocks, before the measurement) is not looked at.
    """
    now = details.conditions or Conditions()
    found = []
    if model_sha256 is not None and baseline.model_sha256 != model_sha256:
        found.append(f"it was recorded for another model (sha256 {str(baseline.model_sha256)[:8]}…)")
    recorded = baseline.input_shapes
    if now.input_shapes is not None and now.input_shapes != recorded:
        found.append(
            f"it was recorded for inputs of other shapes ({_shapes(recorded)}; now {_shapes(now.input_shapes)})"
        )
    if details.measured not in {None, baseline.measured}:
        found.append(f"it is of {baseline.measured}, and {details.measured} was measured now")
    if details.cuda_graph not in {None, baseline.cuda_graph}:
        words = ("as a CUDA graph", "without a CUDA graph")
        then, today = words if baseline.cuda_graph else words[::-1]
        found.append(f"it was recorded {then}, and the engine was launched {today} now")
    return [*found, *other_clocks(baseline, now)]


def other_clocks(then: Baseline | Conditions, now: Conditions) -> list[str]:
    """How a GPU was set up otherwise, by the conditions of two measurements; what either lacks is not looked at."""
    found = []
    if _apart(then.sm_mhz, now.sm_mhz, OTHER_CLOCK):
        found.append(f"its SM clock was {then.sm_mhz:g} MHz, and is {now.sm_mhz:g} MHz now")
    if _apart(then.power_limit_w, now.power_limit_w, 0.01):
        found.append(f"its power limit was {then.power_limit_w:.0f} W, and is {now.power_limit_w:.0f} W now")
    if then.power_mode and now.power_mode and then.power_mode != now.power_mode:
        found.append(f"its nvpmodel mode was {then.power_mode}, and is {now.power_mode} now")
    return found


def _apart(then: float | None, now: float | None, share: float) -> bool:
    """Whether two numbers above 0 are both known, and further apart than a share of the smaller one."""
    known = [value for value in (then, now) if value is not None and value > 0]
    return len(known) == 2 and max(known) > (1 + share) * min(known)


def judge(
    record: LatencyRecord, baseline: Baseline | None, *, model_sha256: str | None = None, updating: bool = False
) -> LatencyRecord:
    """The record with an entry "baseline" among its budgets, and the verdict and reason that follow from it.

    A slowdown fails the record, unless the measurement was disturbed: then it is inconclusive, like a budget. Where
    there is no baseline, or none that can be compared, the entry is `not_measured` and takes no part in the verdict.

    Parameters
    ----------
    record
        Measured, with `distribution`, `conditions` and `disturbances` in its details.
    baseline
        Of this test on this GPU.
    updating
        Whether what was measured becomes the baseline: then a slowdown is accepted, and said.
    """
    if not record.samples:
        return record
    gpu = (record.details.conditions and record.details.conditions.gpu) or record.gpu
    if baseline is None:
        what = f"no baseline of this test on {gpu}"
        return _not_judged(record, what if updating else f"{what}: record one, --trt-update-baseline")
    different = differences(baseline, record.details, model_sha256)
    if different:
        what = f"the baseline of {baseline.recorded} is not comparable: {'; '.join(different)}"
        return _not_judged(record, what if updating else f"{what}; {RECORD_AGAIN}")
    now = Distribution.from_json(record.details.distribution)
    found = compare(now, baseline.distribution, min_slowdown=MIN_SLOWDOWN)
    verdict = decided(found)
    text = f"{found.message}, recorded {_recorded(baseline, record)}"
    disturbances = record.details.disturbances
    if verdict != "pass" and updating:
        verdict, text = "pass", f"{text}; accepted as the new baseline"
    elif verdict == "fail" and disturbances:
        verdict, text = "inconclusive", f"{text}; but the measurement was disturbed: {'; '.join(disturbances)}"
    elif verdict == "inconclusive":
        text = f"{text}; that is too uncertain to tell"
    bounds = now.bounds_ms.get("p50_ms", (None, None))
    before = baseline.distribution.quantile_ms("p50_ms")
    entry = BudgetRecord(
        verdict,
        NAME,
        limit_ms=before * (1 + MIN_SLOWDOWN),
        value_ms=now.quantile_ms("p50_ms"),
        lower_ms=bounds[0],
        upper_ms=bounds[1],
        baseline_p50_ms=before,
        ratio=found.ratio,
        text=text,
    )
    return _with_entry(record, entry)


def notes(record: LatencyRecord) -> tuple[str, ...]:
    """What a person should know of the baseline although the verdict does not say it."""
    return tuple(
        entry.text or ""
        for entry in record.budgets
        if entry.name == NAME and entry.verdict == "not_measured" and record.verdict != "not_measured"
    )


def _not_judged(record: LatencyRecord, text: str) -> LatencyRecord:
    return _with_entry(record, BudgetRecord("not_measured", NAME, text=text))


def _with_entry(record: LatencyRecord, entry: BudgetRecord) -> LatencyRecord:
    verdict, text = entry.verdict, entry.text or ""
    # Without budgets there was nothing else that could pass.
    others: list[Verdict] = [record.verdict] if record.budgets else []
    total = combine([*others, verdict])
    told = [record.reason] if record.reason and record.budgets else []
    if verdict != "pass" and SEVERITY.index(verdict) >= SEVERITY.index(total):
        # The worst comes first; what is as bad stands beside it.
        told = [text, *told] if record.verdict != total else [*told, text]
    return replace(record, verdict=total, reason="; ".join(told) or None, budgets=(*record.budgets, entry))


def _recorded(baseline: Baseline, record: LatencyRecord) -> str:
    now = record.details.conditions or Conditions()
    pairs = [("", baseline.tensorrt, now.tensorrt), ("driver ", baseline.driver, now.driver)]
    words = [
        f"{what}{then}" + (f" (now {today})" if today is not None and today != then else "")
        for what, then, today in pairs
        if then
    ]
    return f"{baseline.recorded} with {', '.join(words)}"


def _shapes(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))


def _words(distribution: Distribution) -> str:
    quantiles = ", ".join(f"{name.removesuffix('_ms')} {distribution.quantile_ms(name):.4g}" for name in QUANTILES)
    return f"{quantiles} ms ({distribution.samples} samples)"
