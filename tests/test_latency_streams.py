"""Error rates of latency verdicts over simulated measurements of up to 30 s; `benchmarks/bench_latency.py` takes more.

The bounds have a confidence of 99 % in all looks together: each side is wrong at most once in 200, and 2.5 % is allowed
for what they cannot know. Runs of 5 ms keep the streams short; what counts is time.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from pytest_trtcheck.latency import decide, decide_qps
from pytest_trtcheck.latency.stats import SETTLING_S, UNSEEN_SHIFT, batch_mean_bounds, settling
from tests import latency_streams
from tests.latency_streams import CALM, STATIONARY, Shape, Stalls, count, measured, speeding_up, warming_up

RUN_MS = 5.0
RUNS = 6_600


@pytest.mark.parametrize("shape", ["exponential", "ramp", "steps"])
def test_a_slow_warm_up_never_passes_too_early(shape: Shape) -> None:
    random = np.random.default_rng(0)
    outcomes = count([measured(warming_up(random, RUN_MS, shape), {"p50_ms": RUN_MS}) for _ in range(100)])
    assert outcomes["pass"] == 0, outcomes
    assert outcomes["fail"] >= 40, "most have settled within 30 s"


@pytest.mark.parametrize("shape", ["exponential", "ramp", "steps"])
def test_clocks_that_are_still_rising_never_fail_an_engine(shape: Shape) -> None:
    random = np.random.default_rng(1)
    outcomes = count([measured(speeding_up(random, RUN_MS, shape), {"p50_ms": RUN_MS}) for _ in range(60)])
    assert outcomes["fail"] == 0, outcomes
    assert outcomes["pass"] >= 24


def test_a_warm_up_bends_throughput_as_well() -> None:
    random = np.random.default_rng(2)
    outcomes = count([measured(warming_up(random, RUN_MS, "exponential"), min_qps=1000 / RUN_MS) for _ in range(60)])
    assert outcomes["pass"] == 0, outcomes


def test_the_fault_planted_bounds_of_the_samples_alone_pass_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_trtcheck.latency.stats.SETTLING_S", 0.0)
    random = np.random.default_rng(0)
    outcomes = count([measured(warming_up(random, RUN_MS, "exponential"), {"p50_ms": RUN_MS}) for _ in range(30)])
    assert outcomes["pass"] >= 25


@pytest.mark.parametrize("name", CALM)
@pytest.mark.parametrize("side", [1.03, 0.97])
def test_a_budget_three_percent_off_is_decided_rightly_on_a_calm_gpu(name: str, side: float) -> None:
    process, random = STATIONARY[name], np.random.default_rng(3)
    limit = RUN_MS * side * latency_streams.true_quantile(process, 0.5)
    outcomes = [measured(RUN_MS * process(random, RUNS), {"p50_ms": limit}) for _ in range(50)]
    assert count(outcomes) == {"pass" if side > 1 else "fail": 50}


@pytest.mark.parametrize("name", STATIONARY)
def test_a_budget_that_is_the_median_itself_is_no_coin_to_throw(name: str) -> None:
    process, random = STATIONARY[name], np.random.default_rng(4)
    limit = RUN_MS * latency_streams.true_quantile(process, 0.5)
    outcomes = count([measured(RUN_MS * process(random, RUNS), {"p50_ms": limit}) for _ in range(40)])
    assert outcomes["pass"] <= 1, outcomes
    assert outcomes["fail"] <= 1, outcomes


def test_a_budget_far_off_is_decided_at_the_first_look() -> None:
    random = np.random.default_rng(5)
    stream = RUN_MS * STATIONARY["iid, 1 %"](random, RUNS)
    for limit, decision in ((RUN_MS * 1.3, "pass"), (RUN_MS * 0.7, "fail")):
        outcome = measured(stream, {"p50_ms": limit})
        assert (outcome.decision, outcome.seconds < 1) == (decision, True)


STALLS = [
    Stalls(RUN_MS, per_s=1, stall_ms=50),
    Stalls(RUN_MS, per_s=0.5, stall_ms=100),
    Stalls(RUN_MS, per_s=0.25, stall_ms=150),
    Stalls(RUN_MS, per_s=0.1, stall_ms=100),
    Stalls(RUN_MS, per_s=2, stall_ms=100),
    Stalls(RUN_MS, per_s=1, stall_ms=50, exponential=True),
]


@pytest.mark.parametrize("stalls", STALLS, ids=str)
def test_rare_stalls_are_reckoned_with_before_they_are_seen(stalls: Stalls) -> None:
    # The budget is the true throughput: without the stalls that did not come yet, it looks to be met.
    random = np.random.default_rng(6)
    outcomes = count([measured(stalls.stream(random), min_qps=stalls.qps) for _ in range(80)])
    assert outcomes["pass"] <= 2, outcomes
    assert outcomes["fail"] <= 2, outcomes


def test_throughput_of_a_steady_gpu_is_decided() -> None:
    random = np.random.default_rng(7)
    steady = Stalls(RUN_MS, per_s=0, stall_ms=0)
    for factor, decision in ((0.95, "pass"), (0.9, "pass"), (1.03, "fail"), (1.1, "fail")):
        outcomes = [measured(steady.stream(random), min_qps=factor * steady.qps) for _ in range(20)]
        assert count(outcomes) == {decision: 20}, factor


def test_the_fault_planted_batch_means_alone_pass_what_stalls_forbid() -> None:
    stalls, random = Stalls(RUN_MS, per_s=0.5, stall_ms=100), np.random.default_rng(6)
    passes = 0
    for _ in range(100):
        early = stalls.stream(random)[:300]
        upper = batch_mean_bounds(early).upper
        assert upper is not None
        passes += upper <= 1000 / stalls.qps
    assert passes > 30


def test_a_stall_in_the_samples_that_make_no_whole_batch_does_not_fail_an_engine() -> None:
    intervals = np.full(62, 5.0)
    intervals[0] = 200.0
    assert decide_qps(intervals, 171.0).decision == "undecided"


# What a person is told.


def test_the_reason_says_that_it_is_still_settling() -> None:
    random = np.random.default_rng(8)
    stream = latency_streams.settling_clocks(random, 1.0, shape="exponential", settle_s=10, start=0.95, end=1.05)
    reason = str(decide(stream[:5_000], {"p50_ms": 1.0}).reason)
    assert "still settling: the median rises by 0." in reason
    assert reason.endswith(" % a second")
    falling = latency_streams.settling_clocks(random, 1.0, shape="exponential", settle_s=10, start=1.05, end=0.95)
    assert "still settling: the median falls by" in str(decide(falling[:5_000], {"p50_ms": 0.97}).reason)


def test_the_reason_says_what_was_not_seen_yet() -> None:
    random = np.random.default_rng(9)
    steady = Stalls(1.0, per_s=0, stall_ms=0).stream(random)
    (close,) = decide(steady[:2_000], {"p50_ms": 1.02}).results
    assert close.decision == "undecided"
    assert "clocks that settle over 20 s may yet move it by" in str(close.reason)
    rare = decide_qps(steady[:2_000], 900)
    assert rare.decision == "undecided"
    assert re.search(r"stalls too rare to be seen in 2 s may cost 39\.\d%", str(rare.reason))


# The bounds themselves.


def test_settling_bounds_hold_what_an_exponential_settles_at() -> None:
    random = np.random.default_rng(10)
    missed = 0
    for _ in range(100):
        end, seconds = 1 + random.uniform(-0.1, 0.1), random.uniform(1, 20)
        settle_s = random.uniform(1, SETTLING_S)
        stream = latency_streams.settling_clocks(
            random, 1.0, shape="exponential", settle_s=settle_s, start=1.0, end=end
        )[: int(1000 * seconds)]
        found = settling(stream)
        level = float(np.median(found.judged))
        missed += not found.lower * level <= end <= found.upper * level
    assert missed <= 2


def test_a_series_that_stands_still_is_judged_whole_and_moves_little() -> None:
    stream = STATIONARY["iid, 1 %"](np.random.default_rng(11), 20_000)
    found = settling(stream)
    assert (found.judged.size, found.percent_per_s) == (20_000, None)
    assert 0.98 < found.lower < 1 < found.upper < 1.02
    early = settling(stream[:400])
    assert early.upper <= 1 + UNSEEN_SHIFT


def test_elapsed_time_counts_and_not_the_time_computed() -> None:
    # 2 s of GPU time, spread over 20 s of the clock.
    stream = STATIONARY["iid, 1 %"](np.random.default_rng(12), 2_000)
    assert settling(stream, 20.0).upper < settling(stream).upper


def test_a_warm_up_that_is_over_is_left_out() -> None:
    random = np.random.default_rng(13)
    stream = latency_streams.settling_clocks(random, 1.0, shape="exponential", settle_s=1.5, start=0.9, end=1.0)
    found = settling(stream[:20_000])
    assert found.judged.size < 20_000
    assert float(np.median(found.judged)) == pytest.approx(1.0, abs=1e-3)
