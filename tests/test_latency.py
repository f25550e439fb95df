"""Latency verdicts: exact bounds, error rates over many simulated measurements, and what disturbs them."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pytest_trtcheck.errors import ArgumentError, ComparisonError
from pytest_trtcheck.latency import (
    BudgetResult,
    LookPlan,
    combine_decisions,
    conclude,
    decide,
    decide_exact,
    decide_qps,
    decide_speedup,
    min_samples,
    to_record,
)
from pytest_trtcheck.latency.probability import binomial_cdf, incomplete_beta, student_t_quantile
from pytest_trtcheck.latency.stats import (
    Series,
    autocorrelation_time,
    batch_mean_bounds,
    block_quantiles,
    quantile_bounds,
    rank_bounds,
    settling,
    unseen_stalls,
)
from pytest_trtcheck.record import CheckRecord, jsonable
from tests.latency_streams import ar1

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Process = Callable[[np.random.Generator, int], NDArray[np.float64]]


# The mathematics, against exact arithmetic.


def _exact_cdf(k: int, n: int, p: Fraction) -> Fraction:
    terms = (Fraction(math.comb(n, i)) * p**i * (1 - p) ** (n - i) for i in range(k + 1))
    return sum(terms, Fraction(0))


@given(st.integers(1, 60), st.integers(-1, 61), st.fractions(0, 1, max_denominator=100))
def test_binomial_cdf_is_exact(n: int, k: int, p: Fraction) -> None:
    assert binomial_cdf(k, n, float(p)) == pytest.approx(float(_exact_cdf(min(k, n), n, p)), abs=1e-12)


@pytest.mark.parametrize("n", [10**4, 10**6])
@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
def test_binomial_cdf_of_many_samples(n: int, q: float) -> None:
    # Summed in logarithms, by another way than the continued fraction.
    ks = np.arange(n + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1, dtype=np.longdouble)))])
    log_pmf = log_factorial[n] - log_factorial - log_factorial[::-1] + ks * math.log(q) + (n - ks) * math.log1p(-q)
    cdf = np.cumsum(np.exp(log_pmf))
    deviation = math.sqrt(n * q * (1 - q))
    for k in (int(n * q + z * deviation) for z in (-4.0, -2.6, 0.0, 2.6, 4.0)):
        if k < n:
            assert binomial_cdf(k, n, q) == pytest.approx(float(cdf[k]), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("p", "degrees", "value"),
    # Source of the values: NIST/SEMATECH e-Handbook of Statistical Methods, table 1.3.6.7.2.
    [(0.975, 1, 12.706), (0.995, 4, 4.604), (0.99, 9, 2.821), (0.995, 19, 2.861), (0.999, 29, 3.396)],
)
def test_student_t_quantile(p: float, degrees: int, value: float) -> None:
    assert student_t_quantile(p, degrees) == pytest.approx(value, abs=6e-4)


@given(st.floats(1, 1e4), st.floats(1, 1e4), st.floats(1e-6, 1 - 1e-6))
def test_incomplete_beta_is_a_symmetric_probability(a: float, b: float, x: float) -> None:
    value = incomplete_beta(a, b, x)
    assert 0 <= value <= 1
    assert value + incomplete_beta(b, a, 1 - x) == pytest.approx(1, abs=1e-9)


def test_both_distributions_are_those_of_scipy() -> None:
    special = pytest.importorskip("scipy.special", reason="only tests need scipy")
    random = np.random.default_rng(0)
    for _ in range(300):
        a, b, x = 10 ** random.uniform(-0.3, 5), 10 ** random.uniform(-0.3, 5), random.random()
        assert incomplete_beta(a, b, x) == pytest.approx(special.betainc(a, b, x), rel=1e-7, abs=1e-9)
        n, p = int(10 ** random.uniform(0, 5)), random.random()
        k = int(np.clip(random.normal(n * p, 3 * math.sqrt(n * p * (1 - p))), 0, n))
        assert binomial_cdf(k, n, p) == pytest.approx(special.bdtr(k, n, p), rel=1e-7, abs=1e-9)
    for degrees in (1, 2, 3, 7, 18, 19, 100):
        for p in (0.5, 0.9, 0.995, 0.99999):
            assert student_t_quantile(p, degrees) == pytest.approx(special.stdtrit(degrees, p), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("q", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("confidence", [0.9, 0.99, 0.9999])
def test_min_samples_is_where_both_bounds_appear(q: float, confidence: float) -> None:
    n = min_samples(q, confidence)
    assert None not in rank_bounds(n, q, confidence)
    assert None in rank_bounds(n - 1, q, confidence)


@given(st.integers(1, 300), st.sampled_from([0.5, 0.9, 0.99]), st.sampled_from([0.9, 0.99, 0.999]))
def test_ranks_hold_their_confidence_and_are_the_tightest(n: int, q: float, confidence: float) -> None:
    alpha, exact_q = Fraction(1 - confidence) / 2, Fraction(str(q))
    lower, upper = rank_bounds(n, q, confidence)
    slack = Fraction(1, 10**10)
    if lower is not None:
        assert _exact_cdf(lower - 1, n, exact_q) <= alpha + slack
    assert _exact_cdf(lower or 0, n, exact_q) > alpha - slack
    if upper is not None:
        assert 1 - _exact_cdf(upper - 1, n, exact_q) <= alpha + slack
        assert 1 - _exact_cdf(upper - 2, n, exact_q) > alpha - slack
    else:
        assert 1 - _exact_cdf(n - 1, n, exact_q) > alpha - slack


def test_autocorrelation_time_of_known_processes() -> None:
    random = np.random.default_rng(1)
    assert autocorrelation_time(random.normal(size=50_000)) == pytest.approx(1, abs=0.1)
    for rho, count in ((0.5, 50_000), (0.9, 50_000), (0.5, 500_000), (0.99, 500_000), (0.999, 2_000_000)):
        # For AR(1), τ = (1 + ρ) / (1 - ρ).
        assert autocorrelation_time(ar1(random, count, rho)) == pytest.approx((1 + rho) / (1 - rho), rel=0.15)
    assert autocorrelation_time(random.normal(size=500_000)) == pytest.approx(1, abs=0.1)
    # From 2 · 65,536 samples on it is worked out from the means of groups, the smallest ones first.
    assert autocorrelation_time(random.normal(size=140_000)) == pytest.approx(1, abs=0.1)
    assert autocorrelation_time(ar1(random, 140_000, 0.9)) == pytest.approx(19, rel=0.15)
    for count in (50_000, 140_000):
        noise = random.normal(size=count)
        assert autocorrelation_time(noise[1:] - 0.5 * noise[:-1]) == 1.0, "no sample tells more than itself"
    assert autocorrelation_time(np.tile([0.0, 1.0], 100)) == 1.0, "alternating samples tell no more than they are"
    assert autocorrelation_time(np.ones(100)) == 1.0


def test_a_drift_is_one_that_lasts_longer_than_a_twentieth_of_the_series() -> None:
    random = np.random.default_rng(4)
    ratios = []
    for _ in range(200):
        values = ar1(random, 400, 0.9)
        values -= values.min()
        at = np.sort(values)[199]
        tau = max(autocorrelation_time(values <= at), autocorrelation_time(values < at))
        assert quantile_bounds(values, 0.5).drifts == (tau >= 2 and 20 * tau > 400)
        ratios.append(400 / tau)
    assert any(19 <= each < 20 for each in ratios), "the least that is too short was among them"
    assert min(ratios) < 15
    assert max(ratios) > 25


def test_the_bounds_of_a_drift_go_twice_as_far_as_it_went() -> None:
    values = np.linspace(10, 11, 2_000)
    medians = np.array([np.median(block) for block in np.split(values, 10)])
    found = quantile_bounds(values, 0.5)
    reach = 2 * (medians[-1] - medians[0])
    assert found.drifts
    assert (found.lower, found.upper) == pytest.approx((medians[0] - reach, medians[-1] + reach))


def test_a_tail_moves_with_a_median_that_drifts() -> None:
    """Spikes at even distances tell as much as they are many; only what they stand on drifts."""
    values = np.linspace(10, 10.2, 2_000)
    values[::50] += 5
    lower, upper = rank_bounds(2_000, 0.99)
    assert lower is not None
    assert upper is not None
    ordered, medians = np.sort(values), [np.median(block) for block in np.split(values, 10)]
    moved = 2 * (max(medians) - min(medians))
    found = quantile_bounds(values, 0.99)
    assert found.drifts
    assert (found.lower, found.upper) == pytest.approx((ordered[lower - 1] - moved, ordered[upper - 1] + moved))
    # Too few for blocks that know their median: the order statistics alone.
    few = np.linspace(10, 10.2, 38)
    few[2::6] += 5
    lower, _ = rank_bounds(38, 0.9)
    assert lower is not None
    found = quantile_bounds(few, 0.9)
    assert (found.drifts, found.lower, found.upper) == (True, np.sort(few)[lower - 1], None)


def test_a_slow_change_between_ties_is_seen() -> None:
    """A coarse timer: ties at the median, and only "at most the median" moves as slowly as the level does."""
    random = np.random.default_rng(0)
    is_low = np.arange(4_000) // 30 % 5 < 3
    values = np.where(is_low, random.integers(1, 3, 4_000), 3).astype(np.float64)
    tau = autocorrelation_time(is_low)
    assert float(np.quantile(values, 0.5)) == 2.0
    assert tau > 2 * autocorrelation_time(values < 2)
    assert quantile_bounds(values, 0.5).effective == math.floor(4_000 / tau)


def test_blocks_know_a_quantile_from_two_samples_beyond_it() -> None:
    random = np.random.default_rng(0)
    values = random.random(407)
    found = block_quantiles(values, 0.9)
    assert found is not None
    np.testing.assert_allclose(found, [np.quantile(block, 0.9) for block in np.split(values[7:], 10)])
    assert block_quantiles(values, 0.99) is None
    assert block_quantiles(values, 0.01) is None
    assert block_quantiles(values[:40], 0.5) is not None
    assert block_quantiles(values[:39], 0.5) is None


def test_batches_need_two_samples_each() -> None:
    values = 1 + np.random.default_rng(0).random(40)
    found = batch_mean_bounds(values)
    assert found.lower is not None
    assert found.upper is not None
    assert found.lower < found.value < found.upper
    assert batch_mean_bounds(values[:39]).upper is None


# What clocks may yet do.


def regressed(values: NDArray[np.float64], span_s: float) -> tuple[float, float]:
    """The bounds of where a series settles, in units of its level, as the documentation of `settling` derives them."""
    medians = np.array([np.median(block) for block in np.split(values, 20)])
    place = (np.arange(20) + 0.5) / 20
    (slope, _), residuals, *_ = np.polyfit(place, medians, 1, full=True)
    level = np.median(medians)
    off = medians - np.polyval(np.polyfit(place, medians, 1), place)
    tau = autocorrelation_time(off)
    error = math.sqrt(float(residuals[0]) / 18 * tau / float(((place - 0.5) ** 2).sum()))
    error *= student_t_quantile(0.995, max(2, math.floor(18 / tau))) / level
    change, ahead = slope / level, 20.0 / span_s
    unsure = (error + 0.005) * (ahead + 0.5)
    if abs(change) <= error:
        most = min(unsure + abs(change) * (ahead + 0.5), 0.25)
        return 1 - most, 1 + most
    return max(0.0, 1 + min(0.0, change) * ahead - unsure), 1 + max(0.0, change) * ahead + unsure


@pytest.mark.parametrize("slope", [0.0, 0.05, -0.05])
def test_what_a_series_settles_at_is_bounded_by_a_regression(slope: float) -> None:
    """Of its whole, its second half or its last quarter: whichever may move least."""
    random = np.random.default_rng(6)
    for _ in range(10):
        values = 1 + slope * np.arange(400) / 400 + 0.02 * random.random(400)
        parts = [regressed(values[-size:], 200 * size / 400) for size in (400, 200, 100)]
        found = settling(values, 200.0)
        assert (found.lower, found.upper) == pytest.approx(min(parts, key=lambda each: each[1] - each[0]), rel=1e-9)


@pytest.mark.parametrize(("count", "size"), [(240, 60), (120, 120), (60, 60)])
def test_a_part_that_is_judged_alone_has_forty_samples(count: int, size: int) -> None:
    """It rises for four fifths of its time, and then stands still: the last quarter of it may move least."""
    values = np.minimum(np.arange(count) / count, 0.8) + 1
    assert settling(values, 60.0).judged.size == size


def test_samples_that_rise_are_judged_as_at_their_end() -> None:
    values = 5 * (1 + 0.1 * ((np.arange(200) + 0.5) / 200 - 0.5))
    found = settling(values, 1e4)
    np.testing.assert_allclose(found.judged, 5 * 1.05, rtol=1e-9)
    assert found.percent_per_s == pytest.approx(100 * 0.1 / 1e4)


def test_nothing_is_known_of_where_few_samples_or_zeros_settle() -> None:
    rising = settling(np.linspace(1, 1.001, 9), 1e4)
    assert (rising.lower, rising.upper) == (0.75, 1.25)
    still = settling(np.zeros(100), 100.0)
    assert (still.lower, still.upper) == pytest.approx((1 - 0.005 * 0.7, 1 + 0.005 * 0.7))
    mostly_zero = settling(np.where(np.arange(60) < 36, 0.0, 1.0), 1e4)
    assert (mostly_zero.lower, mostly_zero.upper) == (0.75, 1.25)


# Error rates: what a user meets when the same test runs again and again.


def _steady(random: np.random.Generator, n: int) -> NDArray[np.float64]:
    return 1 + 0.01 * random.normal(size=n)


def _coarse_timer(random: np.random.Generator, n: int) -> NDArray[np.float64]:
    return np.round(_steady(random, n) / 0.02) * 0.02


def _heavy_tail(random: np.random.Generator, n: int) -> NDArray[np.float64]:
    return np.asarray(1 + 0.01 * random.standard_t(1.5, size=n).clip(-50), dtype=np.float64)


def _warming_up(random: np.random.Generator, n: int) -> NDArray[np.float64]:
    return np.asarray(1 + 0.01 * np.arange(n) / n + 0.002 * random.normal(size=n))


PROCESSES: dict[str, Process] = {"steady": _steady, "coarse timer": _coarse_timer, "heavy tail": _heavy_tail}


def _run(samples: NDArray[np.float64], q: float, limit: float, plan: LookPlan) -> str:
    """What the samples' own bounds say, look by look, until they decide or are used up: nothing drifts here."""
    look = 1
    while True:
        taken = samples[: plan.samples_at(look)]
        if plan.is_due(look, taken.size, float(taken.sum())) or taken.size == samples.size:
            found = quantile_bounds(taken, q, plan.confidence_at(look))
            if found.upper is not None and found.upper <= limit:
                return "pass"
            if found.lower is not None and found.lower > limit:
                return "fail"
            if taken.size == samples.size:
                return "undecided"
        look += 1


@pytest.mark.parametrize("name", ["steady", "coarse timer", "heavy tail"])
@pytest.mark.parametrize("budget", ["p50_ms", "p99_ms"])
def test_looking_repeatedly_at_the_hardest_budget_keeps_the_error(name: str, budget: str) -> None:
    # The budget is the quantile itself: each decision is a coin that must not be thrown.
    process, random = PROCESSES[name], np.random.default_rng(11)
    q = {"p50_ms": 0.5, "p99_ms": 0.99}[budget]
    true = float(np.quantile(process(random, 2_000_000), q))
    plan = LookPlan((q,), confidence=0.9, min_total_ms=0)
    outcomes = [_run(process(random, 3_000), q, true, plan) for _ in range(300)]
    allowed = 300 * 0.05 + 3 * math.sqrt(300 * 0.05 * 0.95)  # each side, and three standard deviations
    assert outcomes.count("fail") <= allowed
    if name != "coarse timer":  # there the quantile equals its budget, and passing is right
        assert outcomes.count("pass") <= allowed


@pytest.mark.parametrize("rho", [0.9, 0.99])
def test_dependent_samples_keep_the_error(rho: float) -> None:
    random = np.random.default_rng(3)
    plan = LookPlan(confidence=0.99, min_total_ms=500)
    outcomes = [_run(1 + 0.02 * ar1(random, 4_000, rho), 0.5, 1.0, plan) for _ in range(200)]
    assert outcomes.count("pass") <= 8
    assert outcomes.count("fail") <= 8


def test_counting_dependent_samples_as_independent_would_not_keep_it() -> None:
    # The fault that effective sizes are there to catch, planted: the same series, judged by their plain ranks.
    random = np.random.default_rng(3)
    wrong = 0
    lower, upper = rank_bounds(4_000, 0.5, 0.99)
    assert lower is not None
    assert upper is not None
    for _ in range(100):
        ordered = np.sort(1 + 0.02 * ar1(random, 4_000, 0.99))
        wrong += not ordered[lower - 1] <= 1.0 <= ordered[upper - 1]
    assert wrong > 50


@pytest.mark.parametrize("name", ["steady", "heavy tail"])
@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
def test_coverage_is_at_least_nominal(name: str, q: float) -> None:
    process, random = PROCESSES[name], np.random.default_rng(5)
    true = float(np.quantile(process(random, 2_000_000), q))
    missed_low = missed_high = 0
    for _ in range(400):
        found = quantile_bounds(process(random, 800), q, 0.9)
        assert found.lower is not None
        assert found.upper is not None
        missed_low += found.lower > true
        missed_high += found.upper < true
    allowed = 400 * 0.05 + 3 * math.sqrt(400 * 0.05 * 0.95)
    assert missed_low <= allowed
    assert missed_high <= allowed


def test_what_is_known_of_a_series_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []

    def counting(series: NDArray[np.bool_]) -> float:
        counted.append(series.size)
        return autocorrelation_time(series)

    samples = _steady(np.random.default_rng(0), 10_000)
    bounds = {q: quantile_bounds(samples, q) for q in (0.5, 0.9, 0.99)}
    monkeypatch.setattr("pytest_trtcheck.latency.stats.autocorrelation_time", counting)
    series = Series(samples)
    assert {q: quantile_bounds(series, q) for q in bounds for _ in range(2)} == bounds
    assert len(counted) == 6, "two indicators a quantile"


def test_a_slow_start_is_not_judged_within_its_own_range() -> None:
    samples = _warming_up(np.random.default_rng(0), 2_000)
    found = quantile_bounds(samples, 0.5)
    assert found.drifts
    # It rises by 0.5 % a second, and may do so for 20 s.
    for limit, decision in ((1.008, "undecided"), (1.05, "undecided"), (1.25, "pass"), (0.9, "fail")):
        assert decide(samples, {"p50_ms": limit}).decision == decision, limit
    assert "still settling" in str(decide(samples, {"p50_ms": 1.008}).reason)


def test_a_tail_over_a_drifting_median_can_still_be_judged() -> None:
    random = np.random.default_rng(0)
    samples = _warming_up(random, 4_000) + (random.random(4_000) < 0.03) * random.exponential(0.2, 4_000)
    assert decide(samples, {"p99_ms": 2.0}).decision == "pass"
    assert decide(samples, {"p99_ms": 1.02}).decision == "fail"
    assert decide(samples, {"p99_ms": float(np.quantile(samples, 0.99)) * 1.01}).decision == "undecided"


# Decisions.


def test_a_p99_needs_the_samples_that_a_p99_needs() -> None:
    fast = np.linspace(0.9, 1.0, 100)
    np.random.default_rng(0).shuffle(fast)
    decision = decide(fast, {"p50_ms": 2.0, "p99_ms": 2.0})
    assert [one.decision for one in decision.results] == ["pass", "undecided"]
    assert decision.decision == "undecided"
    assert decision.reason == "p99 needs at least 528 samples, and 100 were taken in the time allowed"
    assert conclude(decision) == ("inconclusive", decision.reason)
    # To fail takes fewer: most of the samples above the budget say enough.
    assert decide(fast, {"p99_ms": 0.5}).decision == "fail"


def test_a_bound_that_is_the_limit_does_not_fail() -> None:
    samples = _steady(np.random.default_rng(0), 1_000)
    (one,) = decide(samples, {"p50_ms": 1.0}).results
    assert one.lower is not None
    assert one.upper is not None
    assert decide(samples, {"p50_ms": one.lower}).decision == "undecided"
    assert decide(samples, {"p50_ms": one.upper}).decision == "pass"
    rate = decide_qps(samples, 1000)
    assert rate.lower is not None
    assert rate.upper is not None
    assert decide_qps(samples, rate.lower).decision == "pass"
    assert decide_qps(samples, rate.upper).decision == "undecided"


def test_one_failing_budget_fails() -> None:
    samples = _steady(np.random.default_rng(0), 1_000)
    decision = decide(samples, {"p50_ms": 0.7, "p90_ms": 2.0})
    assert decision.decision == "fail"
    assert str(decision.reason).endswith("over the limit of 0.7")
    assert decide(samples, {}).decision == "pass"


def test_the_reason_shows_digits_that_differ_from_the_limit() -> None:
    size = decide_exact("memory_mib", 7.00001, 7.0)
    assert "7.00001" in str(combine_decisions([size]).reason)
    decision = decide(np.full(100, 7.00001), {"p50_ms": 7.0})
    assert decision.decision == "undecided"
    assert "too close to the limit of 7 to tell" in str(decision.reason)


def test_equal_samples_and_a_budget_that_they_meet_exactly() -> None:
    assert quantile_bounds(np.full(100, 7.0), 0.5).upper == 7.0
    assert decide(np.full(100, 7.0), {"p50_ms": 7.0}).decision == "undecided", "clocks may yet move it"
    assert decide(np.full(10_000, 7.0), {"p50_ms": 7.1}).decision == "pass"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_broken_timer_is_an_error(bad: float) -> None:
    samples = np.full(100, 1.0)
    samples[17] = bad
    with pytest.raises(ComparisonError, match="sample 17"):
        decide(samples, {"p50_ms": 2.0})


def test_no_samples_are_an_error() -> None:
    with pytest.raises(ComparisonError, match="no latency samples"):
        to_record([], combine_decisions([]))


@pytest.mark.parametrize("limit", [0, -1.0, math.nan, math.inf, "7"])
def test_a_budget_that_is_no_limit_is_an_error(limit: float) -> None:
    with pytest.raises(ArgumentError, match="p50_ms"):
        decide([1.0] * 20, {"p50_ms": limit})


def test_an_unknown_budget_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="p75_ms"):
        decide([1.0], {"p75_ms": 1.0})


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200), st.sampled_from(["p50_ms", "p90_ms", "p99_ms"]))
@example([0.0, 88667.0, 0.0, 86889.0, 0.0, 9423.0, 0.0, 42577.0, *[0.0] * 8], "p50_ms")  # its trend ends below zero
def test_bounds_enclose_the_estimate_and_decisions_follow_them(samples: list[float], name: str) -> None:
    for limit in (1e-9, 1.0, 1e7):
        (one,) = decide(samples, {name: limit}).results
        assert one.lower is None or one.lower <= one.value * (1 + 1e-12)
        assert one.upper is None or one.upper >= one.value * (1 - 1e-12)
        if one.decision == "pass":
            assert one.value <= limit * (1 + 1e-12)
        if one.decision == "fail":
            assert one.value > limit * (1 - 1e-12)


def test_disturbances_excuse_a_failure_only() -> None:
    samples = _steady(np.random.default_rng(0), 1_000)
    hot = ["the temperature held the clocks down"]
    assert conclude(decide(samples, {"p50_ms": 2.0}), hot) == ("pass", None)
    verdict, reason = conclude(decide(samples, {"p50_ms": 0.5}), hot)
    assert verdict == "inconclusive"
    assert "over the limit of 0.5" in str(reason)
    assert hot[0] in str(reason)
    verdict, reason = conclude(decide(samples, {"p50_ms": 1.0}), hot)
    assert verdict == "inconclusive"
    assert hot[0] in str(reason)


def test_no_disturbance_excuses_memory() -> None:
    memory = decide_exact("memory_mib", 600.0, 512.0)
    assert memory.decision == "fail"
    assert decide_exact("memory_mib", 512.0, 512.0).decision == "pass"
    assert conclude(combine_decisions([memory]), ["busy"]) == ("fail", "memory_mib is 600, over the limit of 512")

    slow = decide(np.full(10_000, 7.0), {"p50_ms": 5.0})
    both = combine_decisions([*slow.results, memory])
    assert slow.decision == "fail"
    assert conclude(slow, ["busy"])[0] == "inconclusive"
    assert conclude(both, ["busy"])[0] == "fail"


# Throughput and speedup.


def test_throughput() -> None:
    intervals = 2 + 0.1 * np.random.default_rng(0).normal(size=10_000)
    assert decide_qps(intervals, 475).decision == "pass"
    assert decide_qps(intervals, 515).decision == "fail"
    assert decide_qps(intervals, 500).decision == "undecided"
    assert decide_qps(intervals[:30], 475).decision == "undecided"
    one = decide_qps(intervals, 515)
    assert combine_decisions([one]).reason == f"min_qps is {one.value:.4g}, below the limit of 515"


def test_runs_that_took_no_time_are_an_error_where_all_did() -> None:
    intervals = np.full(1_000, 1.0)
    intervals[17] = 0
    assert decide_qps(intervals, 1.0).decision == "pass"
    with pytest.raises(ComparisonError, match="no time at all"):
        decide_qps(np.zeros(1_000), 1.0)


def test_one_stall_counts_in_full_for_throughput() -> None:
    intervals = np.full(1_000, 1.0)
    intervals[500] = 500.0
    found = decide_qps(intervals, 900)
    assert found.value == pytest.approx(1000 / 1.499)
    assert found.decision != "pass"


def test_batch_mean_bounds_cover_a_dependent_mean() -> None:
    random = np.random.default_rng(2)
    missed = 0
    for _ in range(200):
        found = batch_mean_bounds(10 + ar1(random, 4_000, 0.9), 0.95)
        assert found.lower is not None
        assert found.upper is not None
        missed += not found.lower <= 10 <= found.upper
    assert missed <= 200 * 0.05 + 3 * math.sqrt(200 * 0.05 * 0.95)


def test_speedup_is_free_of_the_drift_that_both_saw() -> None:
    random = np.random.default_rng(0)
    clock = 1 + 0.2 * ar1(random, 1_000, 0.999)
    slow = 2.0 * clock * (1 + 0.01 * random.normal(size=1_000))
    fast = 1.0 * clock * (1 + 0.01 * random.normal(size=1_000))
    assert decide_speedup(slow, fast, 1.98).decision == "pass"
    assert decide_speedup(slow, fast, 2.02).decision == "fail"
    assert decide_speedup(slow, fast, 2.0).decision == "undecided"
    assert decide_speedup(fast, slow, 1.0).decision == "fail"


def test_throughput_allows_for_the_stalls_that_were_not_seen() -> None:
    intervals = np.full(2_000, 1.0)
    clocks, stalls = settling(intervals).upper - 1, unseen_stalls(intervals)
    assert stalls > 0
    slowest = 1 + math.hypot(clocks, stalls)
    assert decide_qps(intervals, 1.0).lower == pytest.approx(1000 / slowest)
    assert decide_qps(intervals, 999 / slowest).decision == "pass"
    assert decide_qps(intervals, 1001 / slowest).decision == "undecided"


def test_a_speedup_that_may_just_be_reached_is_undecided() -> None:
    candidate = np.ones(100)
    reference = np.where(np.arange(100) % 2, 1.9, 2.0)
    assert decide_speedup(reference, candidate, 2.0).decision == "undecided"
    assert decide_speedup(reference, candidate, 1.9).decision == "pass"
    assert decide_speedup(reference, candidate, 2.01).decision == "fail"


def test_speedup_needs_pairs() -> None:
    for reference, candidate in (([1.0, 2.0], [1.0]), ([1.0], [1.0, 2.0])):
        with pytest.raises(ComparisonError, match="no pairs"):
            decide_speedup(reference, candidate, 2.0)
    with pytest.raises(ComparisonError, match="no time"):
        decide_speedup([1.0, 2.0], [1.0, 0.0], 2.0)


# The plan and the record.


def test_the_error_spent_never_exceeds_the_error_allowed() -> None:
    plan = LookPlan((0.5, 0.99), others=1, confidence=0.99)
    assert 3 * sum(1 - plan.confidence_at(look) for look in range(1, 10_000)) <= 0.01
    sizes = [plan.samples_at(look) for look in range(1, 20)]
    assert sizes == sorted(set(sizes))
    assert sizes[0] >= min_samples(0.99, plan.confidence_at(1))
    assert LookPlan((0.5,)).samples_at(1) == 50
    # A quarter more than the 597 of which all lie below p99 with a probability of 0.01 / 2 / 2: ln 0.0025 / ln 0.99.
    assert [LookPlan((0.99,)).samples_at(look) for look in (1, 2)] == [747, 1120]


def test_a_look_is_due_with_samples_and_time() -> None:
    plan = LookPlan((0.5,))
    assert not plan.is_due(1, 49, 1e6)
    assert not plan.is_due(1, 10_000, 499)
    assert plan.is_due(1, 50, 500)


def test_record() -> None:
    samples = _steady(np.random.default_rng(0), 100)
    decision = combine_decisions([*decide(samples, {"p50_ms": 2.0, "p99_ms": 2.0}).results, decide_qps(samples, 100)])
    record = to_record(samples, decision, gpu="T4", clocks={"after": {"sm_mhz": 1590}})
    assert record.verdict == "inconclusive"
    assert (record.gpu, record.samples) == ("T4", 100)
    assert record.p50_ms == pytest.approx(1.0, abs=0.01)
    assert record.p50_ms is not None
    low, high = record.bounds_ms["p50_ms"]
    assert low is not None
    assert high is not None
    assert low < record.p50_ms < high
    assert record.bounds_ms["p99_ms"][1] == math.inf
    exact = quantile_bounds(samples, 0.5)
    assert (low, high) == (exact.lower, exact.upper)
    assert to_record([1.0], decision).bounds_ms["p50_ms"] == (0.0, math.inf)
    statistics = {"mean_ms": samples.mean(), "min_ms": samples.min(), "max_ms": samples.max()}
    assert {name: getattr(record.details, name) for name in statistics} == pytest.approx(statistics)
    rate = decision.results[2]
    assert jsonable(record.budgets[2]) == {
        "verdict": "pass",
        "name": "min_qps",
        "limit": 100,
        "value": rate.value,
        "lower": rate.lower,
        "upper": rate.upper,
    }
    assert [(entry.name, entry.verdict) for entry in record.budgets] == [
        ("p50_ms", "pass"),
        ("p99_ms", "inconclusive"),
        ("min_qps", "pass"),
    ]
    assert record.budgets[0].quantile == "p50"
    assert record.budgets[0].limit_ms == 2.0
    loaded = json.loads(CheckRecord("n", "m", record.verdict, latency=record).to_json())
    assert loaded["latency"]["bounds_ms"]["p99_ms"][1] == "inf"


def test_results_are_plain() -> None:
    (one,) = decide([1.0] * 50, {"p50_ms": 2.0}).results
    assert one == BudgetResult("p50_ms", 2.0, 1.0, 0.75, 1.25, "pass")
