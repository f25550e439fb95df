"""From latency samples to a verdict that does not flake: pass, fail, or not yet known.

A budget on a quantile passes when the quantile's upper confidence bound is within it, fails when the lower bound is
over it, and is undecided in between. Samples are taken until every budget is decided or the time is up. Looking again
and again at growing data would let chance decide: each look gets a share of the error instead, so that all looks
together are wrong no more often than `confidence` says, however many there are (`LookPlan`). The bounds are those of
what the latency settles at (`stats.settling`): the first seconds of a GPU whose clocks still move decide nothing.

Times are in ms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pytest_trtcheck.errors import ArgumentError, ComparisonError, plural
from pytest_trtcheck.latency.stats import (
    CONFIDENCE,
    SETTLING_S,
    Bounds,
    Series,
    Settling,
    as_samples,
    batch_mean_bounds,
    min_samples,
    quantile_bounds,
    rank_bounds,
    settling,
    unseen_stalls,
)
from pytest_trtcheck.metrics import distinct_digits
from pytest_trtcheck.record import BudgetRecord, LatencyDetails, LatencyRecord, Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_trtcheck.latency.stats import Samples

Decision = Literal["pass", "fail", "undecided"]

QUANTILES: Mapping[str, float] = {"p50_ms": 0.50, "p90_ms": 0.90, "p95_ms": 0.95, "p99_ms": 0.99}
"""The quantiles that are reported, by the name of their budget."""


@dataclass(frozen=True)
class BudgetResult:
    """One budget, and what was found of it.

    Parameters
    ----------
    name
        The marker's argument: "p99_ms", "min_qps", "memory_mib", "min_speedup".
    limit, value, lower, upper
        The budget, the estimate and its confidence bounds, in the budget's unit. A bound is None where there are too
        few independent samples for it.
    decision
        Pass, fail, or undecided.
    reason
        Why it is undecided.
    exact
        Whether the value is known exactly, so that no disturbance of the measurement excuses it.
    """

    name: str
    limit: float
    value: float
    lower: float | None
    upper: float | None
    decision: Decision
    reason: str | None = None
    exact: bool = False


@dataclass(frozen=True)
class LatencyDecision:
    """Several budgets together: fail when one fails, else undecided when one is, else pass."""

    decision: Decision
    results: tuple[BudgetResult, ...]

    @property
    def reason(self) -> str | None:
        """What is over its budget, or else what is undecided and why."""
        failed = [
            f"{one.name} is {_apart(one.value, one.limit)}, {'below' if one.name.startswith('min_') else 'over'}"
            f" the limit of {one.limit:g}"
            for one in self.results
            if one.decision == "fail"
        ]
        undecided = [one.reason for one in self.results if one.decision == "undecided" and one.reason]
        return "; ".join(failed or undecided) or None


@dataclass(frozen=True)
class LookPlan:
    """When to look at the samples, and how sure to be at each look.

    Look k, from 1, spends the share 1/(k (k+1)) of the error 1 - confidence; the shares add up to 1 over any number of
    looks, and by the union bound so do the errors. Looks come at geometrically growing numbers of samples, so that
    later, smaller shares meet more data. Source of the idea: alpha spending, Lan and DeMets, "Discrete sequential
    boundaries for clinical trials", Biometrika 70(3), 1983; for quantiles, Howard and Ramdas, "Sequential estimation of
    quantiles with applications to A/B testing and best-arm identification", Bernoulli 28(3), 2022.

    Parameters
    ----------
    quantiles
        The quantiles that have budgets; the error is shared out among them and `others`.
    others
        How many other budgets (`min_qps`, `min_speedup`) share it.
    confidence
        That no budget is judged wrongly, in either direction.
    min_total_ms
        The least measuring time before the first look: clocks drift over time and not over samples, and the samples of
        a few milliseconds know nothing of that.
    growth
        From look to look.
    """

    quantiles: tuple[float, ...] = (0.5,)
    others: int = 0
    confidence: float = CONFIDENCE
    min_total_ms: float = 500.0
    growth: float = 1.5

    def confidence_at(self, look: int) -> float:
        """The confidence to judge each budget with at a look (from 1)."""
        budgets = max(1, len(self.quantiles) + self.others)
        return 1 - (1 - self.confidence) / (look * (look + 1) * budgets)

    def samples_at(self, look: int) -> int:
        """The number of samples to have at a look (from 1)."""
        needed = max((min_samples(q, self.confidence_at(1)) for q in self.quantiles), default=0)
        # A quarter more, since bounds at the extreme ranks decide little; and never so few that drift cannot be seen.
        return math.ceil(max(50, 1.25 * needed) * self.growth ** (look - 1))

    def is_due(self, look: int, samples: int, total_ms: float) -> bool:
        """Whether there are enough samples, over enough time, for a look (from 1)."""
        return samples >= self.samples_at(look) and total_ms >= self.min_total_ms


def decide(
    samples_ms: Samples,
    budgets: Mapping[str, float],
    *,
    confidence: float = CONFIDENCE,
    elapsed_s: float | None = None,
) -> LatencyDecision:
    """Judge quantiles by their budgets: what they settle at, where the clocks are still settling.

    Parameters
    ----------
    samples_ms
        In the order in which they were taken.
    budgets
        The most that a quantile may be, by its name in `QUANTILES`.
    confidence
        Of the bounds of each quantile; when looking repeatedly, `LookPlan.confidence_at`.
    elapsed_s
        Over how long the samples were taken; None: they followed each other without a gap.
    """
    series = Series.of(samples_ms)
    shift = settling(series, elapsed_s, confidence)
    judged = series if shift.judged is series.values else Series(shift.judged)
    results = []
    for name, limit in budgets.items():
        if name not in QUANTILES:
            raise ArgumentError(
                f"no latency budget is called {name!r}", f"there are {', '.join(QUANTILES)}", code="argument-unknown"
            )
        q = QUANTILES[name]
        found = quantile_bounds(judged, q, confidence)
        shortage = _shortage(found, q, confidence, series.values.size)
        results.append(_result(name, limit, shift.of(found), shortage, shift))
    return combine_decisions(results)


def decide_qps(intervals_ms: Samples, min_qps: float, *, confidence: float = CONFIDENCE) -> BudgetResult:
    """Judge the throughput: the queries completed per second, over times between one completed run and the next.

    Throughput is a mean, so that a single long stall counts in full; its bounds come from batch means. To pass, the
    budget must also be met with the stalls that are too rare to have been seen (`unseen_stalls`).
    """
    values = as_samples(intervals_ms)
    if not values.any():
        raise ComparisonError("the runs took no time at all", "the timer is broken", code="timer-broken")
    shift = settling(values, confidence=confidence)
    stalls = unseen_stalls(shift.judged)
    # Clocks that move and stalls that come, both unseen, are not both taken for the worst.
    unseen = replace(shift, upper=1 + math.hypot(shift.upper - 1, stalls))
    found = unseen.of(batch_mean_bounds(shift.judged, confidence))
    rate = replace(
        found,
        value=1000 / found.value,
        lower=None if found.upper is None else 1000 / found.upper,
        upper=None if found.lower is None else 1000 / found.lower if found.lower > 0 else math.inf,
    )
    shortage = f"too few runs ({found.samples}) to bound the throughput" if found.upper is None else None
    result = _result("min_qps", min_qps, rate, shortage, shift)
    if result.decision == "undecided" and shortage is None and rate.value >= min_qps:
        time = f"{shift.judged.sum() / 1000:.3g} s"
        return replace(result, reason=f"{result.reason}; stalls too rare to be seen in {time} may cost {stalls:.1%}")
    return result


def decide_speedup(
    reference_ms: Samples, candidate_ms: Samples, min_speedup: float, *, confidence: float = CONFIDENCE
) -> BudgetResult:
    """Judge how many times faster the candidate is, from runs that alternate with the reference's.

    Sample i of one was taken next to sample i of the other, so their ratio is free of the drift that both saw. The
    speedup is the median of these ratios, bounded by order statistics.
    """
    reference, candidate = as_samples(reference_ms), as_samples(candidate_ms)
    if reference.size != candidate.size:
        raise ComparisonError(
            f"{reference.size} reference samples and {candidate.size} candidate samples make no pairs",
            "measure both in turns",
            code="timer-broken",
        )
    if not candidate.all():
        raise ComparisonError("a run took no time at all", "the timer is broken", code="timer-broken")
    found = quantile_bounds(reference / candidate, 0.5, confidence)
    return _result("min_speedup", min_speedup, found, _shortage(found, 0.5, confidence, reference.size))


def decide_exact(name: str, value: float, limit: float) -> BudgetResult:
    """Judge a quantity that is known exactly and must not exceed its limit, such as `memory_mib`."""
    return replace(_result(name, limit, Bounds(value, value, value), None), exact=True)


def decide_median(name: str, samples: Samples, limit: float, *, confidence: float = CONFIDENCE) -> BudgetResult:
    """Judge the median of what was done anew each time, such as `load_ms`: by order statistics, as independent."""
    ordered = np.sort(as_samples(samples))
    ranks = rank_bounds(ordered.size, 0.5, confidence)
    lower, upper = (None if rank is None else float(ordered[rank - 1]) for rank in ranks)
    found = Bounds(float(np.median(ordered)), lower, upper, ordered.size, ordered.size)
    return _result(name, limit, found, _shortage(found, 0.5, confidence, ordered.size))


def combine_decisions(results: Sequence[BudgetResult]) -> LatencyDecision:
    """Several budgets as one decision."""
    decisions = {one.decision for one in results}
    order: tuple[Decision, ...] = ("fail", "undecided")
    return LatencyDecision(next((one for one in order if one in decisions), "pass"), tuple(results))


def conclude(
    decision: LatencyDecision, disturbances: Sequence[str] = (), remarks: Sequence[str] = ()
) -> tuple[Verdict, str | None]:
    """The verdict when no more samples will come, and its reason.

    A disturbance (throttling, another process on the GPU) can only make an engine look slower: it takes a failure
    back to inconclusive, and leaves a pass as it is. Exact quantities such as memory fail all the same. Remarks (low
    clocks, no CUDA graph) excuse nothing; they stand behind the reason.
    """
    if decision.decision == "pass":
        return "pass", None
    why = "; ".join(disturbances)
    if decision.decision == "undecided":
        return "inconclusive", "; ".join(filter(None, (decision.reason, why, *remarks))) or None
    certain = any(one.exact for one in decision.results if one.decision == "fail")
    reason = "; ".join(filter(None, (decision.reason, *remarks)))
    if disturbances and not certain:
        return "inconclusive", f"{reason}, but the measurement was disturbed: {why}"
    return "fail", reason


def to_record(
    samples_ms: Samples,
    decision: LatencyDecision,
    *,
    gpu: str | None = None,
    disturbances: Sequence[str] = (),
    remarks: Sequence[str] = (),
    clocks: Mapping[str, Any] | None = None,
    details: Mapping[str, Any] | None = None,
) -> LatencyRecord:
    """The latency part of a check's record, with the samples' own quantiles and their bounds."""
    series = Series.of(samples_ms)
    values = series.values
    verdict, reason = conclude(decision, disturbances, remarks)
    found = {name: quantile_bounds(series, q) for name, q in QUANTILES.items()}
    extremes: dict[str, Any] = {
        "mean_ms": float(values.mean()),
        "min_ms": float(values.min()),
        "max_ms": float(values.max()),
    }
    return LatencyRecord(
        verdict=verdict,
        reason=reason,
        gpu=gpu,
        samples=values.size,
        **{name: one.value for name, one in found.items()},
        bounds_ms={
            name: (0.0 if one.lower is None else one.lower, math.inf if one.upper is None else one.upper)
            for name, one in found.items()
        },
        budgets=tuple(_budget_entry(one) for one in decision.results),
        clocks=clocks or {},
        details=LatencyDetails(**extremes, **(details or {})),
    )


def _budget_entry(result: BudgetResult) -> BudgetRecord:
    found = {name: getattr(result, name) for name in ("limit", "value", "lower", "upper")}
    return _entry("inconclusive" if result.decision == "undecided" else result.decision, result.name, **found)


def unmeasured(limits: Mapping[str, float], why: str | None) -> tuple[BudgetRecord, ...]:
    """The budgets by which a check would have been judged, had it been measured."""
    return tuple(_entry("not_measured", name, why, limit=limit) for name, limit in limits.items())


def _entry(verdict: Verdict, name: str, text: str | None = None, **found: float | None) -> BudgetRecord:
    is_quantile = name in QUANTILES
    values: dict[str, Any] = {f"{key}_ms" if is_quantile else key: value for key, value in found.items()}
    return BudgetRecord(verdict, name, name.removesuffix("_ms") if is_quantile else None, text=text, **values)


def _result(
    name: str, limit: float, found: Bounds, shortage: str | None, shift: Settling | None = None
) -> BudgetResult:
    """An estimate by its limit: from below where the limit is a minimum, else from above."""
    if not (isinstance(limit, (int, float)) and math.isfinite(limit) and limit > 0):
        raise ArgumentError(f"{name}={limit!r} is no limit", "a limit is a finite number above 0")
    lower, upper = found.lower, found.upper
    if name.startswith("min_"):
        good, bad = lower is not None and lower >= limit, upper is not None and upper < limit
    else:
        good, bad = upper is not None and upper <= limit, lower is not None and lower > limit
    if good or bad:
        return BudgetResult(name, limit, found.value, lower, upper, "pass" if good else "fail")
    low, high = ("unknown" if side is None else _apart(side, limit) for side in (lower, upper))
    close = f"{name} is between {low} and {high}, too close to the limit of {limit:g} to tell"
    reason = shortage or f"{close}{_unsettled(found, shift)}"
    return BudgetResult(name, limit, found.value, lower, upper, "undecided", reason)


def _unsettled(found: Bounds, shift: Settling | None) -> str:
    """What makes bounds wider than the samples' own spread does."""
    if shift is not None and shift.percent_per_s is not None:
        way = "rises" if shift.percent_per_s > 0 else "falls"
        return f"; still settling: the median {way} by {abs(shift.percent_per_s):.2g} % a second"
    if found.drifts:
        return "; still settling: the samples drift"
    if shift is not None:
        most = max(shift.upper - 1, 1 - shift.lower)
        return f" (clocks that settle over {SETTLING_S:g} s may yet move it by {most:.1%}, for all that was seen)"
    return ""


def _shortage(found: Bounds, q: float, confidence: float, taken: int) -> str | None:
    """Why a side has no bound. `taken`: all samples, also those that are not judged."""
    if found.lower is not None and found.upper is not None:
        return None
    needed = min_samples(q, confidence)
    if found.samples < needed:
        late = "" if taken == found.samples else f", the last {found.samples} of them after the clocks had settled"
        return (
            f"p{100 * q:g} needs at least {plural(needed, 'sample')}, and {taken} were taken in the time allowed{late}"
        )
    return (
        f"{found.samples} samples were taken, but they depend on each other and tell as much as {found.effective}"
        f" independent ones; p{100 * q:g} needs {needed}"
    )


def _apart(value: float, limit: float) -> str:
    """`value` with as many digits as it takes to differ from `limit`, at least four."""
    return f"{value:.{distinct_digits(value, limit, 4)}g}"
