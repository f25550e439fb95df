"""Limits and verdicts: what is judged by what, and what must never pass."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_trtcheck.compare import (
    Limit,
    judge,
    loose_notes,
    measure,
    merge,
    resolve_limits,
    sentence,
    summarize,
    unexercised_notes,
)
from pytest_trtcheck.compare.judge import distinct
from pytest_trtcheck.errors import ArgumentError, ComparisonError
from pytest_trtcheck.metrics import DEFAULT_TOLERANCE, METRICS
from pytest_trtcheck.record import JudgedRecord, OutputRecord, jsonable
from pytest_trtcheck.spec import PRECISIONS, Tolerance

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_trtcheck.compare.limits import TolArgument
    from pytest_trtcheck.spec import Precision

EVEN = np.linspace(-1, 1, 101).astype(np.float32)


def judged(
    actual: NDArray[Any],
    reference: NDArray[Any],
    tol: TolArgument = None,
    metric: str = "max",
    precision: Precision = "fp16",
) -> OutputRecord:
    limits = resolve_limits(tol, metric, precision, ["x"])["x"]
    return judge(measure("x", actual, reference, limits=limits), limits)


def entry(record: OutputRecord, metric: str) -> JudgedRecord:
    (found,) = [each for each in record.judged if each.metric == metric]
    return found


def test_the_defaults_are_the_contract() -> None:
    assert dict(DEFAULT_TOLERANCE) == {
        "fp32": 1e-4,
        "tf32": 5e-3,
        "fp16": 1e-2,
        "bf16": 3e-2,
        "int8": 5e-2,
        "fp8": 5e-2,
        "int8+fp16": 5e-2,
        "int8+bf16": 5e-2,
        "fp8+fp16": 5e-2,
        "fp8+bf16": 5e-2,
    }
    assert set(DEFAULT_TOLERANCE) == set(PRECISIONS)
    (limit, unequal) = resolve_limits(None, "max", "int8", ["x"])["x"]
    assert limit == Limit(METRICS["max"], 0.05, "default for int8")
    assert (unequal.metric.name, unequal.limit) == ("mismatches", 0.0)


def test_derived_defaults_describe_one_error() -> None:
    # An error of relative size l2 at right angles to the reference: what each metric's default should just allow.
    reference = np.array([1.0, 0.0])
    for precision in PRECISIONS:
        found = measure("x", reference + np.array([0.0, DEFAULT_TOLERANCE[precision]]), reference)
        for metric in ("l2", "snr_db", "cosine"):
            default = METRICS[metric].default
            assert default is not None
            limit = default(precision)
            assert found.scores[metric].value == pytest.approx(limit, rel=2e-3)


@pytest.mark.parametrize("metric", ["abs", "top1"])
def test_metrics_without_a_default_ask_for_tol(metric: str) -> None:
    with pytest.raises(ArgumentError, match=f"metric='{metric}' has no default") as caught:
        resolve_limits(None, metric, "fp16", ["x"])
    assert "tol=" in caught.value.hint
    assert resolve_limits(0.5, metric, "fp16", ["x"])["x"][0] == Limit(METRICS[metric], 0.5, "tol=0.5")


def test_the_first_pattern_that_matches_wins() -> None:
    tol = (("boxes_0", 0.5), ("boxes*", Tolerance(abs=2.0, cosine=1e-3)), ("*", 0.1))
    limits = resolve_limits(tol, "l2", "fp16", ["boxes_0", "boxes_1", "scores"])
    assert limits["boxes_0"][0] == Limit(METRICS["l2"], 0.5, "tol['boxes_0']", named=True)
    assert [(each.metric.name, each.limit) for each in limits["boxes_1"]] == [
        ("abs", 2.0),
        ("cosine", 1e-3),
        ("mismatches", 0.0),
    ]
    assert limits["scores"][0] == Limit(METRICS["l2"], 0.1, "tol['*']")
    assert list(limits) == ["boxes_0", "boxes_1", "scores"]


def test_an_output_that_no_pattern_matches_has_the_default() -> None:
    limits = resolve_limits((("boxes", 0.5),), "top1", "bf16", ["boxes", "scores"])
    assert limits["scores"][0].metric.name == "max"
    assert limits["scores"][0].limit == 0.03
    assert limits["scores"][0].source == "default for bf16: tol names no such output"


def test_patterns_that_do_nothing_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"tol\['box'\] matches no output") as caught:
        resolve_limits((("box", 0.5),), "max", "fp16", ["boxes", "scores"])
    assert "'boxes', 'scores'" in caught.value.hint
    with pytest.raises(ArgumentError, match=r"tol\['boxes'\] is never used.*tol\['\*'\]"):
        resolve_limits((("*", 0.5), ("boxes", 0.1)), "max", "fp16", ["boxes", "scores"])


def test_names_with_brackets_match_themselves() -> None:
    assert resolve_limits((("out[0]", 0.5),), "max", "fp16", ["out[0]"])["out[0]"][0].limit == 0.5


@pytest.mark.parametrize(
    ("tol", "metric"),
    [
        (math.nan, "max"),
        (-0.1, "max"),
        (1.5, "top1"),
        (2.5, "cosine"),
        (Tolerance(mismatches=1.5), "max"),
        (Tolerance(snr_db=math.nan), "max"),
    ],
)
def test_limits_out_of_range_are_refused(tol: TolArgument, metric: str) -> None:
    with pytest.raises(ArgumentError, match="no limit for"):
        resolve_limits(tol, metric, "fp16", ["x"])


def test_who_gave_the_limit_on_mismatches_is_told() -> None:
    for tol, source in ((Tolerance(max=0.1, mismatches=0.2), "tol"), (Tolerance(max=0.1), "must be equal")):
        *_, limit = resolve_limits(tol, "max", "fp16", ["x"])["x"]
        assert (limit.metric.name, limit.limit) == ("mismatches", tol.mismatches)
        assert source in limit.source


def test_a_tolerance_for_mismatches_alone_leaves_floats_their_default() -> None:
    limits = resolve_limits(Tolerance(mismatches=0.5), "cosine", "fp16", ["x"])["x"]
    assert [each.metric.name for each in limits] == ["cosine", "mismatches"]
    assert judged(EVEN * 1.5, EVEN, Tolerance(mismatches=0.5)).verdict == "fail"


@pytest.mark.parametrize("metric", ["max", "l2", "abs", "allclose", "cosine", "snr_db"])
def test_every_metric_passes_at_its_value_and_fails_beyond(metric: str) -> None:
    actual = EVEN + np.float32(0.01) * np.cos(10 * EVEN)
    value = measure("x", actual, EVEN).scores[metric].value
    assert value is not None
    worse, better = (np.nextafter(value, side) for side in (-math.inf, math.inf))
    if metric == "snr_db":
        worse, better = better, worse
    assert judged(actual, EVEN, float(value), metric).verdict == "pass"
    assert judged(actual, EVEN, float(better), metric).verdict == "pass"
    record = judged(actual, EVEN, float(worse), metric)
    assert record.verdict == "fail"
    assert entry(record, metric).value == value


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("metric", [each for each in METRICS if each != "snr_db"])
def test_nan_and_infinity_never_pass(bad: float, metric: str) -> None:
    reference = np.stack([EVEN, EVEN])
    spoilt = reference.copy()
    spoilt[0, 3] = bad
    tol = 1.0 if metric == "top1" else 2.0
    for actual, expected in ((spoilt, reference), (reference, spoilt)):
        record = judged(actual, expected, tol, metric)
        assert record.verdict == "fail"
        assert entry(record, "nonfinite").value == 1
        assert record.nonfinite == 1
    assert judged(spoilt, reference, -500.0, "snr_db").verdict == "fail"


def test_nan_and_infinity_on_both_sides_pass_and_are_counted() -> None:
    actual, reference = EVEN.copy(), EVEN.copy()
    actual[:3] = reference[:3] = (math.nan, math.inf, -math.inf)
    record = judged(actual, reference)
    assert (record.verdict, record.nonfinite) == ("pass", 3)
    assert "NaN or infinite on both sides alike in 3 elements" in record.details.notes[0]
    actual[1] = -math.inf
    assert judged(actual, reference).verdict == "fail"
    every = np.full(4, -math.inf)
    assert judged(every, every).verdict == "not_measured"


def test_nan_on_both_sides_leaves_small_values_their_scale() -> None:
    reference = EVEN * np.float32(1e-3)
    actual = reference * np.float32(1.5)
    reference[3] = actual[3] = math.nan
    assert entry(judged(actual, reference), "max").value == pytest.approx(0.5, rel=1e-6)
    assert judged(actual, reference).verdict == "fail"


@pytest.mark.parametrize("metric", [each for each in METRICS if each != "abs"])
@pytest.mark.parametrize("worst", [0, 1, 2])
def test_of_several_inputs_the_worst_decides_by_every_metric(metric: str, worst: int) -> None:
    reference = np.eye(8, dtype=np.float32)
    actual = [reference.copy() for _ in range(3)]
    actual[worst][:2] = reference[1::-1]
    limits = resolve_limits(100.0 if metric == "snr_db" else 1e-3, metric, "fp16", ["x"])["x"]
    cases = [measure("x", each, reference, limits=limits) for each in actual]
    alone = [judge(case, limits).verdict for case in cases]
    assert alone == ["fail" if index == worst else "pass" for index in range(3)]
    assert judge(merge(cases), limits).verdict == "fail"


def test_no_limit_holds_for_nan() -> None:
    assert not any(
        Limit(METRICS[metric], limit, "").holds(math.nan) for metric in METRICS for limit in (math.inf, -math.inf)
    )


def test_an_infinite_tolerance_still_needs_finite_values() -> None:
    assert judged(EVEN * 100, EVEN, math.inf).verdict == "pass"
    assert judged(EVEN * math.nan, EVEN, math.inf).verdict == "fail"


@pytest.mark.parametrize("metric", ["max", "l2", "abs", "allclose"])
def test_an_all_zero_reference_is_judged_by_abs(metric: str) -> None:
    zero = np.zeros(5, np.float32)
    # An engine that had lost everything would come out as well: that is no pass.
    quiet = judged(zero + np.float32(0.009), zero, 0.01, metric)
    assert quiet.verdict == "not_measured"
    (note,) = unexercised_notes([quiet])
    assert "not exercised: its reference is zero throughout" in note
    record = judged(zero + np.float32(0.02), zero, 0.01, metric)
    assert record.verdict == "fail"
    assert entry(record, metric).value == pytest.approx(0.02)
    if metric in {"max", "l2"}:
        assert "all zero" in str(entry(record, metric).note)
        assert getattr(record, metric) is None


@pytest.mark.parametrize("metric", ["abs", "allclose"])
def test_an_absolute_limit_above_all_of_the_reference_says_nothing(metric: str) -> None:
    scores = np.full(1000, 0.001, np.float32)
    for actual in (scores, np.zeros_like(scores)):
        record = judged(actual, scores, 0.01, metric)
        assert record.verdict == "not_measured"
        assert "at most 0.001 on these inputs, and zeros would keep 0.01" in str(entry(record, metric).note)
    assert judged(scores + np.float32(0.02), scores, 0.01, metric).verdict == "fail"
    # Something beside it that it does see is enough.
    assert judged(np.append(scores, 0.5), np.append(scores, 0.5), 0.01, metric).verdict == "pass"


@pytest.mark.parametrize(
    ("metric", "actual", "reference"),
    [
        ("cosine", np.zeros(5), np.zeros(5)),
        ("cosine", np.zeros(5), np.ones(5)),
        ("snr_db", np.zeros(5), np.zeros(5)),
        ("top1", np.zeros(5), np.zeros(5)),
        ("top1", np.array(1.0), np.array(1.0)),
        ("top1", np.ones((3, 1)), np.ones((3, 1))),
    ],
)
def test_a_metric_that_cannot_be_computed_is_an_error(
    metric: str, actual: NDArray[Any], reference: NDArray[Any]
) -> None:
    record = judged(actual, reference, 1.0, metric)
    assert record.verdict == "error"
    assert entry(record, metric).value is None
    assert "cannot be computed" in sentence(entry(record, metric))


def test_a_metric_that_was_not_measured_is_an_error() -> None:
    limits = resolve_limits(0.1, "top1", "fp16", ["x"])["x"]
    assert judge(measure("x", np.eye(3), np.eye(3)), limits).verdict == "error"
    with pytest.raises(ComparisonError, match="no limit"):
        judge(measure("x", EVEN, EVEN), [])


def test_integers_must_be_equal_unless_the_tolerance_says_otherwise() -> None:
    reference = np.arange(100)
    actual = reference.copy()
    actual[7] += 3
    for tol in (None, 10.0, Tolerance(max=10.0), (("x", 10.0),)):
        assert judged(actual, reference, tol).verdict == "fail"
        assert judged(reference, reference, tol).verdict == "pass"
    assert judged(actual, reference, Tolerance(max=1e-9, mismatches=0.01)).verdict == "pass"
    assert judged(actual, reference, Tolerance(max=1e-9, mismatches=0.009)).verdict == "fail"


def test_integers_that_may_differ_are_judged_by_how_far() -> None:
    reference = np.arange(100, dtype=np.uint8)
    actual = reference + np.uint8(2)
    assert judged(actual, reference, Tolerance(abs=2, mismatches=1.0)).verdict == "pass"
    assert judged(actual, reference, Tolerance(abs=1, mismatches=1.0)).verdict == "fail"
    assert judged(actual, reference, Tolerance(l2=1e-3, mismatches=1.0)).verdict == "fail"
    one = reference.copy()
    one[0] += 2
    assert judged(one, reference, Tolerance(abs=1, mismatches=0.5)).verdict == "fail"
    # Relative metrics mean little for labels; given for the output by name they count.
    assert judged(one, reference, Tolerance(max=1e-3, mismatches=0.5)).verdict == "pass"
    assert judged(one, reference, (("x", Tolerance(max=1e-3, mismatches=0.5)),)).verdict == "fail"


def test_booleans_and_strings_are_judged_by_equality() -> None:
    for reference in (np.array([True, False]), np.array(["a", "b"], object)):
        assert judged(reference, reference).verdict == "pass"
        assert judged(reference[::-1], reference, 1.0).verdict == "fail"
        assert judged(reference[::-1], reference, Tolerance(mismatches=1.0)).verdict == "pass"


def test_shape_and_dtype_must_be_the_same() -> None:
    for actual in (EVEN[:-1], EVEN.reshape(1, -1), EVEN.astype(np.float64), EVEN.astype(str)):
        record = judged(actual, EVEN, math.inf)
        assert record.verdict == "fail"
        assert "where" in sentence(record.judged[0])


def test_an_empty_output_is_no_pass() -> None:
    empty = np.zeros((0, 4), np.float32)
    record = judged(empty, empty)
    assert (record.verdict, record.judged) == ("not_measured", ())
    assert unexercised_notes([record]) == ("output 'x' was not compared: it has no elements",)
    parity = summarize([record], "max")
    assert (parity.verdict, parity.worst, parity.tol, parity.reason) == ("not_measured", None, None, None)
    assert summarize([record, judged(EVEN, EVEN)], "max").verdict == "pass"
    assert judged(empty, np.zeros((1, 4), np.float32)).verdict == "fail"
    assert judged(np.zeros((1, 4), np.float32), empty).verdict == "fail"


def test_a_record_becomes_json() -> None:
    spoilt = EVEN.copy()
    spoilt[3] = math.nan
    for actual, reference in ((spoilt, EVEN), (EVEN * 2, EVEN), (np.arange(3), np.arange(1, 4))):
        record = judged(actual, reference)
        text = json.dumps(jsonable(dataclasses.asdict(record)), allow_nan=False)
        assert json.loads(text)["worst_index"] == list(record.worst_index or ())
    assert json.loads(json.dumps(jsonable(dataclasses.asdict(judged(spoilt, EVEN)))))["max"] == "inf"


def test_a_measurement_can_be_judged_again() -> None:
    found = measure("x", EVEN * np.float32(1.01), EVEN)
    verdicts = [judge(found, resolve_limits(tol, "max", "fp16", ["x"])["x"]).verdict for tol in (0.1, 0.001)]
    assert verdicts == ["pass", "fail"]


def test_the_worst_of_several_cases_decides() -> None:
    limits = resolve_limits(0.01, "max", "fp16", ["x"])["x"]
    cases = [measure("x", EVEN * np.float32(1 + error), EVEN) for error in (0.001, 0.02, 0.005)]
    record = judge(merge(cases), limits)
    assert record.verdict == "fail"
    assert entry(record, "max").case == 1
    assert "input 1" in sentence(entry(record, "max"))
    assert judge(merge(cases[::2]), limits).verdict == "pass"


def test_the_summary_names_the_decisive_limit() -> None:
    tol = (("a", 0.1), ("b", 0.01), ("ids", 0.0))
    limits = resolve_limits(tol, "max", "fp16", ["a", "b", "ids"])
    pairs = {"a": (EVEN * 1.05, EVEN * 1.0), "b": (EVEN * 1.009, EVEN * 1.0), "ids": (np.arange(3), np.arange(3))}
    outputs = [judge(measure(name, *pair), limits[name]) for name, pair in pairs.items()]
    parity = summarize(outputs, "max")
    assert (parity.verdict, parity.metric, parity.tol, parity.reason) == ("pass", "max", 0.01, None)
    assert parity.worst == pytest.approx(0.009, rel=1e-4)
    assert parity.tol_source == "tol['b']"
    outputs[2] = judge(measure("ids", np.arange(3), np.array([0, 1, 5])), limits["ids"])
    parity = summarize(outputs, "max")
    assert (parity.verdict, parity.metric, parity.tol) == ("fail", "mismatches", 0.0)
    assert "'ids'" in str(parity.reason)


def test_the_summary_of_nan_is_an_infinite_error() -> None:
    parity = summarize([judged(EVEN * math.nan, EVEN)], "max")
    assert (parity.verdict, parity.metric, parity.worst) == ("fail", "max", math.inf)
    assert "do not match the reference in 101 elements" in str(parity.reason)
    assert summarize([judged(EVEN, EVEN), judged(EVEN * 2, EVEN)], "max").verdict == "fail"
    error = judged(np.zeros(3), np.zeros(3), 0.1, "cosine")
    assert summarize([error, judged(EVEN * 2, EVEN)], "cosine").verdict == "error"


@given(
    st.floats(1e-12, 1e6), st.one_of(st.floats(-1e-3, 1e-3), st.sampled_from([1e-9, -1e-12, 0.0])), st.integers(1, 17)
)
def test_value_and_limit_never_look_alike(limit: float, off: float, digits: int) -> None:
    limit = float(f"{limit:.{digits}g}")
    value = limit * (1 + off)
    shown, bound = distinct(value, limit)
    assert float(bound) == limit
    assert (float(shown) > limit, float(shown) < limit) == (value > limit, value < limit)


def test_value_and_limit_are_as_short_as_they_can_be() -> None:
    assert distinct(0.01000004, 0.01) == ("0.01000004", "0.01")
    assert distinct(0.0132123, 0.01) == ("0.0132", "0.01")
    assert distinct(math.inf, 0.01) == ("inf", "0.01")
    record = judged(np.array([1.0100000004, 0.5]), np.array([1.0, 0.5]), 0.01)
    assert sentence(record.judged[0]) == "max 0.0100000004 > 0.01 (tol=0.01)"


def test_a_tolerance_far_above_the_error_gets_a_note() -> None:
    (note,) = loose_notes([judged(EVEN * np.float64(1.0001), EVEN.astype(np.float64), 0.1)])
    assert note.startswith("tol=0.1: the limit of 0.1 is 1,000× looser")
    assert not loose_notes([judged(EVEN * np.float64(1.002), EVEN.astype(np.float64), 0.1)])
    (note,) = loose_notes([judged(EVEN * np.float64(1.0001), EVEN.astype(np.float64), 20.0, "snr_db")])
    assert "60 dB looser" in note
    assert not loose_notes([judged(EVEN * np.float64(1.01), EVEN.astype(np.float64), 10.0, "snr_db")])
    # 40 dB are a factor of 100; of several outputs the worst one counts.
    by_db = {db: judged(EVEN * (1 + 10 ** (-db / 20)), EVEN.astype(np.float64), 20.0, "snr_db") for db in (59, 61, 90)}
    assert loose_notes([by_db[61]])
    assert not loose_notes([by_db[59]])
    (note,) = loose_notes([by_db[90], by_db[61]])
    assert "41 dB looser" in note
    assert not loose_notes([by_db[90], by_db[59]])


@pytest.mark.parametrize(
    ("metric", "limit", "says"),
    [
        (
            "cosine",
            0.99,
            "cosine is 1 − cos: next to any output keeps the limit of 0.99 (an agreement of 0.99 is a limit of 0.01)",
        ),
        ("cosine", 1.5, "cosine is 1 − cos: next to any output keeps the limit of 1.5"),
        ("cosine", 2, "2 is the most that cosine can be: no output fails it"),
        ("top1", 0.95, "top1 is the share of rows that disagree: next to any"),
        ("top1", 1, "1 is the most that top1 can be"),
    ],
)
def test_a_limit_that_was_meant_as_an_agreement_is_noted(metric: str, limit: float, says: str) -> None:
    (note,) = loose_notes([judged(np.eye(4)[:, ::-1] + np.eye(4) * 0.9, np.eye(4)[:, ::-1], limit, metric)])
    assert f"tol={limit:g}: {says}" in note


def test_mismatches_that_were_meant_as_an_agreement_are_noted() -> None:
    (note,) = loose_notes([judged(np.arange(9), np.arange(9), Tolerance(mismatches=0.9))])
    assert note.startswith("tol: mismatches is the share of elements that are unequal")
    assert not loose_notes([judged(np.arange(9), np.arange(9), Tolerance(mismatches=0.1))])


def test_notes_on_loose_tolerances_spare_what_says_nothing() -> None:
    assert loose_notes([judged(EVEN, EVEN, 0.1)])
    assert not loose_notes([judged(EVEN, EVEN)])
    assert not loose_notes([judged(np.arange(3), np.arange(3), 0.1)])
    assert not loose_notes([judged(np.eye(3), np.eye(3), 0.1, "top1")])
    assert not loose_notes([judged(EVEN * 2, EVEN, 0.001)])
    limits = resolve_limits(0.1, "max", "fp16", ["a", "b"])
    shared = [judge(measure(name, EVEN * f, EVEN * 1.0), limits[name]) for name, f in (("a", 1.00001), ("b", 1.05))]
    assert not loose_notes(shared)
