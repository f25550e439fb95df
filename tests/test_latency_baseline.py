"""Comparing today's latency with a recorded one."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from pytest_trtcheck.errors import ReportError
from pytest_trtcheck.latency.comparison import compare
from pytest_trtcheck.latency.distribution import Distribution


def _distribution(median: float, seed: int, n: int = 1_000) -> Distribution:
    return Distribution.of(median * (1 + 0.01 * np.random.default_rng(seed).normal(size=n)))


def test_the_same_engine_passes_and_a_slower_one_fails() -> None:
    baseline = _distribution(2.0, 0)
    decisions = {
        slowdown: compare(_distribution(2.0 * slowdown, 1), baseline).decision
        for slowdown in (0.5, 1.0, 1.02, 1.05, 1.08, 2.0)
    }
    assert decisions == {0.5: "pass", 1.0: "pass", 1.02: "pass", 1.05: "undecided", 1.08: "fail", 2.0: "fail"}


def test_a_significant_but_tiny_slowdown_passes() -> None:
    now, baseline = _distribution(2.01, 1, 100_000), _distribution(2.0, 0, 100_000)
    found = compare(now, baseline)
    assert found.lower is not None
    assert found.lower > 1, "slower beyond doubt"
    assert found.decision == "pass", "and not worth a person's time"
    assert compare(now, baseline, min_slowdown=0.001).decision == "fail"


def test_false_alarms_are_rare() -> None:
    baseline = _distribution(2.0, 0, 200)
    decisions = [compare(_distribution(2.1, seed, 200), baseline).decision for seed in range(1, 200)]
    assert decisions.count("fail") <= 3, "at exactly the slowdown allowed"


def test_the_message_names_both_distributions() -> None:
    found = compare(_distribution(3.0, 1), _distribution(2.0, 0, 500))
    assert found.message.startswith("p50 is +50.")
    assert "(1,000 samples)" in found.message
    assert "baseline p50 1.999," in found.message
    assert "(500 samples)" in found.message


def microseconds(p50: float, *, waited: float = 0.005, launch: float = 3.6, seed: int = 0) -> Distribution:
    """An engine's, in steps of 32 ns, with a share of runs for whose launch the GPU waited."""
    rng = np.random.default_rng(seed)
    took = p50 + rng.normal(0, 0.1, 20_000) + np.where(rng.random(20_000) < waited, launch, 0)
    return Distribution.of(np.round(took / 0.032) * 0.032 / 1000)


def test_an_engine_of_microseconds_is_not_slower_because_the_gpu_waited_for_the_host_more_often() -> None:
    before, again = microseconds(15), microseconds(15.2, waited=0.02, seed=1)
    tail = compare(again, before, name="p99_ms")
    assert tail.ratio > 1.2
    assert tail.lower is not None
    assert tail.lower > 1.05, "the ratio alone would be surely above"
    assert (tail.decision, tail.allowed) == ("pass", "+10 µs")
    assert "(allowed: +10 µs)" in tail.message
    assert compare(again, before, min_slowdown=0.03).decision == "pass"


@pytest.mark.parametrize(
    ("before", "now", "name", "decision"),
    [
        (15, 30, "p50_ms", "fail"),
        (15, 30, "p99_ms", "fail"),
        (15, 17, "p50_ms", "fail"),
        (15, 17, "p99_ms", "pass"),
        (15, 15.5, "p50_ms", "pass"),
        (1000, 1060, "p50_ms", "fail"),
        (1000, 1060, "p99_ms", "fail"),
        (1000, 1040, "p99_ms", "pass"),
        (30, 15, "p50_ms", "pass"),
    ],
)
def test_a_real_slowdown_is_found_whatever_the_engine_s_size(
    before: float, now: float, name: str, decision: str
) -> None:
    assert compare(microseconds(now, seed=1), microseconds(before), name=name).decision == decision


def test_the_median_of_an_engine_that_waits_for_the_host_is_the_hosts() -> None:
    before, now = microseconds(9), microseconds(12, seed=1)
    assert compare(now, before).decision == "fail"
    assert compare(now, before, enqueue_bound=True).decision == "pass"
    assert compare(microseconds(20, seed=1), before, enqueue_bound=True).decision == "fail"


def test_too_few_samples_for_a_tail_are_undecided() -> None:
    found = compare(_distribution(9.0, 1, 100), _distribution(2.0, 0), name="p99_ms")
    assert (found.decision, found.lower) == ("undecided", None)


def test_json_round_trip_is_stable_and_small() -> None:
    found = _distribution(2.0, 0)
    text = json.dumps(found.to_json())
    assert len(text) < 1_000
    again = Distribution.from_json(json.loads(text))
    assert again == found
    assert json.dumps(again.to_json()) == text
    assert found.quantile_ms("p50_ms") == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize(
    "change",
    [
        {"samples": "many"},
        {"quantiles_ms": {}},
        {"quantiles_ms": {"0.5": "nan"}},
        {"quantiles_ms": {"0.5": 3.0, "0.9": 2.0}},
        {"quantiles_ms": {"0.5": -3.0, "0.9": 2.0}},
        {"quantiles_ms": [1, 2]},
        {"bounds_ms": {"p50_ms": [2.0, 1.0]}},
        {"bounds_ms": {"p50_ms": [2.0, 1.0], "p90_ms": [2.0, 3.0]}},
        {"bounds_ms": {"p50_ms": [-1.0, 3.0]}},
        {"bounds_ms": {"p50_ms": [2.0]}},
        {"confidence": 2},
    ],
)
def test_a_damaged_baseline_is_an_error(change: dict[str, Any]) -> None:
    with pytest.raises(ReportError, match="baseline"):
        Distribution.from_json(_distribution(2.0, 0).to_json() | change)


def test_samples_that_are_all_alike_make_a_baseline() -> None:
    found = Distribution.of(np.full(100, 2.0))
    assert found.bounds_ms["p50_ms"] == (2.0, 2.0)
    assert Distribution.from_json(found.to_json()) == found


def test_a_slowdown_that_may_be_just_what_is_allowed_is_undecided() -> None:
    def bounded(low: float, high: float) -> Distribution:
        return Distribution(1_000, 0.99, ((0.0, low), (1.0, high)), {"p50_ms": (low, high)})

    baseline = bounded(1.0, 2.0)
    assert compare(bounded(2.5, 3.0), baseline, min_slowdown=0.25).decision == "undecided"
    assert compare(bounded(2.500001, 3.0), baseline, min_slowdown=0.25).decision == "fail"
    assert compare(bounded(1.0, 1.25), baseline, min_slowdown=0.25).decision == "pass"
    assert compare(bounded(1.0, 1.250001), baseline, min_slowdown=0.25).decision == "undecided"


def test_a_missing_key_is_an_error() -> None:
    with pytest.raises(ReportError, match="bounds_ms"):
        Distribution.from_json({"samples": 1, "confidence": 0.9, "quantiles_ms": {"0.5": 1.0}})
