"""How far a score fell, and whether that is known: by counting all that can happen, and by drawing it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_trtcheck.compare import paired
from pytest_trtcheck.compare.paired import Drop, describe, drop_of_aggregate, drop_of_means
from pytest_trtcheck.errors import ComparisonError

if TYPE_CHECKING:
    from numpy.typing import NDArray

binom = pytest.importorskip("scipy.stats", reason="only tests need scipy").binom


def right_or_wrong(both: int, lost: int, gained: int, neither: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The reference's and the engine's scores, 0 or 1, of so many samples."""
    counts = [both, lost, gained, neither]
    return np.repeat([1, 1, 0, 0], counts), np.repeat([1, 0, 1, 0], counts)


def chances(samples: int, disagree: float, drop: float, max_drop: float) -> dict[str, float]:
    """The exact probability of each verdict: a sum over all numbers of samples that are lost and gained."""
    lost, gained = (disagree + drop) / 2, (disagree - drop) / 2
    found = {"pass": 0.0, "fail": 0.0, "inconclusive": 0.0}
    spread = [9 * math.sqrt(samples * each) + 10 for each in (lost, gained)]
    for more in range(max(0, int(samples * lost - spread[0])), min(samples, int(samples * lost + spread[0])) + 1):
        chance = binom.pmf(more, samples, lost)
        low, high = int(samples * gained - spread[1]), int(samples * gained + spread[1])
        less = np.arange(max(0, low), min(samples - more, high) + 1)
        for each, rest in zip(less, binom.pmf(less, samples - more, gained / (1 - lost)), strict=True):
            found[of_counts(samples, more, int(each)).verdict(max_drop)] += chance * rest
    return found


def of_counts(samples: int, lost: int, gained: int) -> Drop:
    total, changed = lost - gained, lost + gained
    mean = total / samples
    cube = total - 3 * mean * changed + 2 * samples * mean**3
    return Drop(0.9, 0.9 - mean, samples, changed, total, changed - samples * mean**2, cube, 1.0)


def test_the_counts_are_those_of_the_arrays() -> None:
    found = drop_of_means(*right_or_wrong(150, 12, 5, 33))
    expected = of_counts(200, 12, 5)
    assert (found.samples, found.changed) == (200, 17)
    assert (found.reference, found.value) == (162 / 200, 155 / 200)
    assert (found.lower, found.upper) == pytest.approx((expected.lower, expected.upper))


@pytest.mark.parametrize("disagree", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("samples", [200, 1000])
def test_at_the_limit_either_side_is_rarely_wrong(samples: int, disagree: float) -> None:
    found = chances(samples, disagree, 0.01, 0.01)
    assert sum(found.values()) == pytest.approx(1, abs=1e-6)
    assert found["fail"] <= 0.005
    assert found["pass"] <= 0.005


@pytest.mark.parametrize("samples", [20, 60, 200])
def test_models_that_only_lose_are_rarely_passed_unseen(samples: int) -> None:
    """The plain bootstrap passes them whenever no loss was seen: of 200 samples with 2 % lost, in 1.8 % of runs."""
    for drop in (0.005, 0.01, 0.02, 0.05, 0.1, 0.3):
        found = chances(samples, drop, drop, drop)
        assert max(found["pass"], found["fail"]) <= 0.005, drop


def test_twice_the_limit_is_found_in_ten_thousand_samples() -> None:
    lost = np.arange(0, 700)
    chance = binom.pmf(lost, 10_000, 0.035)
    gained = 150  # 1.5 %, as expected
    caught = [of_counts(10_000, int(each), gained).verdict(0.01) == "fail" for each in lost]
    assert chance[np.array(caught)].sum() > 0.95


def test_a_score_that_varies_wildly_decides_nothing() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(50, 40, (2, 1000))
    found = drop_of_means(before, after)
    assert found.verdict(0.5) == "inconclusive"
    assert (found.samples_to_decide(0.5) or 10_000) > 4000
    # Where the same noise is on both sides, pairing leaves it out.
    assert drop_of_means(before, before - rng.normal(0.1, 0.1, 1000)).verdict(2.0) == "pass"
    assert found.verdict(2.0) == "inconclusive"


def test_no_change_seen_is_no_proof_of_none() -> None:
    same = np.ones(200)
    assert drop_of_means(same, same).verdict(0.02) == "inconclusive"
    assert drop_of_means(same, same).samples_to_decide(0.02) == pytest.approx(300, rel=0.1)
    same = np.ones(10_000)
    assert drop_of_means(same, same).verdict(0.02) == "pass"


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=50), st.floats(1e-3, 1e3))
def test_the_unit_does_not_matter(pairs: list[tuple[float, float]], unit: float) -> None:
    before, after = np.array(pairs).T * 2.0
    one, other = drop_of_means(before, after), drop_of_means(before * unit, after * unit)
    if set(np.unique([before, after])) <= {0.0, 1.0} or set(np.unique([before * unit, after * unit])) <= {0.0, 1.0}:
        return
    assert other.lower == pytest.approx(one.lower * unit, rel=1e-9, abs=1e-12 * unit)
    assert other.upper == pytest.approx(one.upper * unit, rel=1e-9, abs=1e-12 * unit)
    assert one.lower <= one.drop <= one.upper


@given(st.integers(0, 2**32 - 1), st.integers(2, 200))
def test_the_other_way_round_is_the_mirror_image(seed: int, count: int) -> None:
    before, after = np.random.default_rng(seed).random((2, count))
    found, mirrored = drop_of_means(before, after), drop_of_means(after, before)
    errors = drop_of_means(1 - before, 1 - after, lower_is_better=True)
    assert (mirrored.lower, mirrored.upper) == pytest.approx((-found.upper, -found.lower))
    assert errors.drop == pytest.approx(found.drop)


def test_an_aggregate_that_is_the_mean_is_judged_as_the_mean() -> None:
    rng = np.random.default_rng(3)
    before = rng.random(400)
    after = before - (rng.random(400) < 0.3) * rng.random(400) * 0.1
    exact, drawn = drop_of_means(before, after), drop_of_aggregate(before, after, np.mean)
    assert (drawn.reference, drawn.value, drawn.changed) == (exact.reference, exact.value, exact.changed)
    assert drawn.drop == pytest.approx(exact.drop)
    width = exact.upper - exact.lower
    assert (drawn.lower, drawn.upper) == pytest.approx((exact.lower, exact.upper), abs=0.1 * width)


def test_an_aggregate_is_called_a_bounded_number_of_times_whatever_the_samples() -> None:
    calls = 0

    def rate(items: list[tuple[int, int]]) -> float:
        nonlocal calls
        calls += 1
        return sum(wrong for wrong, _ in items) / sum(words for _, words in items)

    for count in (1, 3000):
        calls = 0
        before = [(index % 3, 10) for index in range(count)]
        after = [(index % 3 + (index % 50 == 0), 10) for index in range(count)]
        found = drop_of_aggregate(before, after, rate, lower_is_better=True)
        assert calls <= 2 * (1 + paired.RESAMPLES + paired.PROBES)
        assert found.drop > 0
        assert found.value > found.reference
    assert found.changed == 60
    assert found.verdict(0.01) == "pass"
    assert found.verdict(0.0005) == "fail"
    assert drop_of_aggregate(before, after, rate, lower_is_better=True) == found  # the same seed


def mean_of_classes(items: NDArray[Any]) -> float:
    return float(np.mean([items[items[:, 0] == number, 1].mean() for number in np.unique(items[:, 0])]))


def test_a_rare_class_counts_as_much_as_it_may_cost() -> None:
    rng = np.random.default_rng(4)
    labels = np.repeat(np.arange(10), [5, *[55] * 9])
    # 15 % of one class of 10 are lost, which is not seen where none of its 5 samples is among them.
    missed = {"seen": 0, "at stake": 0}
    for run in range(40):
        reference = np.stack([labels, np.ones(500)], axis=1)
        actual, zeros = reference.copy(), reference.copy()
        actual[:5, 1] = rng.random(5) > 0.15
        zeros[:, 1] = labels == 3
        for name, lost in {"seen": (), "at stake": (zeros, np.stack([labels, np.zeros(500)], axis=1))}.items():
            found = drop_of_aggregate(reference, actual, mean_of_classes, lost=lost, seed=run)
            missed[name] += found.upper < 0.015
    assert missed["seen"] > 8
    assert missed["at stake"] == 0
    assert found.at_stake == pytest.approx(500 / 10 / 5)
    assert found.lower < found.drop


def test_an_error_without_a_limit_counts_as_much_as_lost_outputs_cost() -> None:
    rng = np.random.default_rng(5)
    missed = {"seen": 0, "at stake": 0}
    for _ in range(300):
        before = rng.exponential(0.2, 200)
        after = before + 5 * (rng.random(200) < 0.01)
        zeros, changed_signs = np.full(100, math.log(1000)), 2 * math.log(1000) + before[:100]
        for name, lost in {"seen": (), "at stake": (zeros, changed_signs)}.items():
            found = drop_of_means(before, after, lower_is_better=True, lost=lost)
            missed[name] += found.upper < 0.05
    assert missed["seen"] > 20
    assert missed["at stake"] == 0
    assert found.at_stake == pytest.approx(math.log(1000) - before[:100].min())


def test_of_two_ways_to_lose_outputs_the_one_counts_that_costs_less_and_something() -> None:
    right = np.ones(3)
    one, other = np.array([0.5, 1.0, 1.5]), np.array([0.25, 0.75, 1.0])
    assert drop_of_means(right, right, lost=(one, other)).at_stake == 0.5
    assert drop_of_means(right, right, lost=(right, right)).at_stake == 0
    assert drop_of_means(right, right).at_stake == 0
    assert drop_of_aggregate(right, right, np.mean, lost=(one, other)).at_stake == pytest.approx(0.5)


def test_what_an_aggregate_cannot_cope_with_is_no_stake() -> None:
    def rate(items: list[tuple[int, int]]) -> float:
        return sum(wrong for wrong, _ in items) / sum(words for _, words in items)

    items = [(1, 10), (0, 5)] * 10
    lost: Any
    for lost in ([None] * 20, [(0, -145)] * 20, ["words"] * 20, [(lambda: 0, 5)] * 20):
        found = drop_of_aggregate(items, items, rate, lower_is_better=True, lost=[lost])
        assert found.at_stake == 0
    assert drop_of_aggregate(items, items, rate, lower_is_better=True, lost=[[(5, 5)] * 20]).at_stake > 0


@pytest.mark.parametrize(
    ("aggregate", "said"),
    [
        (lambda _: math.nan, "gave nan on the items of all 5 samples"),
        (lambda items: 1 / (len(set(items)) - 4), "on resample"),
        (lambda items: items.nothing, "AttributeError"),
        (lambda _: None, "TypeError"),
    ],
)
def test_an_aggregate_that_gives_no_number_is_named_with_what_it_was_given(aggregate: Any, said: str) -> None:
    with pytest.raises(ComparisonError, match=said):
        drop_of_aggregate([1, 2, 3, 4, 5], [1, 2, 3, 4, 6], aggregate)


def test_items_are_compared_by_what_they_hold() -> None:
    item = (np.array([0.9, 0.2]), [True, False], {"boxes": np.zeros((2, 4))})
    other = (np.array([0.9, 0.2]), [True, False], {"boxes": np.ones((2, 4))})
    twin = (np.array([0.9, 0.2]), [True, False], {"boxes": np.zeros((2, 4))})
    found = drop_of_aggregate([item, item], [twin, other], lambda items: float(np.mean([i[0].mean() for i in items])))
    assert found.changed == 1
    assert paired.same(np.array([1.0, np.nan]), np.array([1.0, np.nan]))
    assert paired.same(["a"], ["a"])
    assert not paired.same("a", "b")
    assert not paired.same(np.array([1.0]), "b")


def test_the_words_read_as_they_were_judged() -> None:
    found = drop_of_means(*right_or_wrong(9000, 230, 30, 740))
    assert describe("top1", found, 0.01) == (
        "top1 fell from 0.923 to 0.903: a loss of 0.02 (0.0158 to 0.0244 with 99% confidence, 10,000 samples, "
        "260 of which changed), max_drop is 0.01"
    )
    rose = drop_of_means(*right_or_wrong(9000, 30, 230, 740))
    assert "top1 rose from 0.903 to 0.923: a loss of -0.02" in describe("top1", rose, 0.01)
    errors = drop_of_means(*right_or_wrong(9000, 30, 230, 740), lower_is_better=True)
    assert "wer rose from 0.903 to 0.923: a loss of 0.02" in describe("wer", errors, 0.01)
    near = drop_of_means(np.full(100, 3.7161), np.full(100, 3.71609))
    assert "mean fell from 3.7161 to 3.71609: a loss of 1e-05" in describe("mean", near, 0.01)


def test_an_aggregate_may_sort_in_place() -> None:
    rng = np.random.default_rng(0)
    reference, actual = rng.random(200), rng.random(200)

    def sorting(items: Any) -> float:
        items.sort()
        return float(np.mean(items[:100]))

    def sound(items: Any) -> float:
        return float(np.mean(np.sort(items)[:100]))

    expected = drop_of_aggregate(reference, actual, sound)
    assert drop_of_aggregate(reference, actual, sorting) == expected
