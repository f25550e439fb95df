"""Parts with scales of their own: found, judged as numpy judges the slice, and not found where there are none."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_trtcheck.check import arguments as markers
from pytest_trtcheck.compare import (
    Division,
    Limit,
    examine,
    explain,
    judge,
    measure,
    merge,
    resolve_limits,
    sentence,
    unexercised_notes,
)
from pytest_trtcheck.errors import ArgumentError
from pytest_trtcheck.metrics import DEFAULT_TOLERANCE, METRICS
from pytest_trtcheck.record import OutputRecord, jsonable
from pytest_trtcheck.spec import Part, Tolerance

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from pytest_trtcheck.compare.limits import TolArgument
    from pytest_trtcheck.spec import Precision

BOXES, SCORES = Part(((1, 0, 4),)), Part(((1, 4, 12),), 1.0)
FOUND = Division(search=True)


def by(division: Division) -> tuple[Limit, ...]:
    return (Limit(METRICS["max"], 1e-2, "tol", division=division),)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def detections(seed: int = 0, largest: float = 0.95) -> NDArray[np.float32]:
    """Four coordinates in pixels, eight scores: [2, 12, 50]."""
    boxes, scores = rng(seed).random((2, 4, 50)) * 640, rng(seed + 1).random((2, 8, 50)) * largest
    return np.concatenate([boxes, scores], axis=1).astype(np.float32)


def rounded(values: NDArray[Any], dtype: Any = np.float16) -> NDArray[Any]:
    """What a sound engine of FP16 gives: clipped to its range and rounded."""
    largest = float(np.finfo(dtype).max)
    found: NDArray[Any] = np.clip(values, -largest, largest).astype(dtype).astype(values.dtype)
    return found


def judged(
    actual: NDArray[Any],
    reference: NDArray[Any],
    division: Division = FOUND,
    precision: Precision = "fp16",
    *,
    tol: TolArgument = None,
    metric: str = "max",
) -> OutputRecord:
    limits = resolve_limits(tol, metric, precision, ["x"], known={"x": division})["x"]
    found = measure("x", actual, reference, limits=limits)
    record = judge(found, limits)
    # A record is JSON, whatever it says.
    assert json.loads(json.dumps(jsonable(asdict(record)), allow_nan=False))
    return record


def relative(actual: NDArray[Any], reference: NDArray[Any], metric: str = "max") -> float:
    """The metric as the documentation writes it, in FP64."""
    y, r = actual.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    if metric == "max":
        return float(np.abs(y - r).max() / np.abs(r).max())
    if metric == "cosine":
        return float(1 - y @ r / np.linalg.norm(y) / np.linalg.norm(r))
    l2 = float(np.linalg.norm(y - r) / np.linalg.norm(r))
    return -20 * math.log10(l2) if metric == "snr_db" else l2


# --- what the graph tells --------------------------------------------------------------------------------------------


def test_scores_that_are_lost_beside_boxes_fail_and_are_named() -> None:
    reference = detections()
    actual = reference.copy()
    actual[:, 4:] = 0
    assert relative(actual, reference) < DEFAULT_TOLERANCE["fp16"]
    assert judged(actual, reference, Division()).verdict == "pass"
    record = judged(actual, reference, Division((BOXES, SCORES)))
    assert record.verdict == "fail"
    (entry,) = record.judged
    assert entry.part == "part [4:12] along axis 1 (scores)"
    assert entry.value == 1.0
    assert sentence(entry) == "max 1 > 0.01 (default for fp16) in part [4:12] along axis 1 (scores)"
    boxes, scores = record.parts
    assert (boxes.verdict, boxes.value, scores.verdict) == ("pass", 0.0, "fail")
    assert (boxes.ranges, boxes.natural, scores.natural) == (((1, 0, 4),), None, 1.0)
    assert (boxes.size, scores.size) == (2 * 4 * 50, 2 * 8 * 50)
    assert boxes.peak == reference[:, :4].max()
    # As a whole it is what it always was.
    assert record.max == pytest.approx(relative(actual, reference))


@pytest.mark.parametrize("metric", ["max", "l2", "cosine", "snr_db"])
@pytest.mark.parametrize("share", [0.5, 2.0])
def test_a_part_is_judged_by_the_limit_of_a_whole_output(metric: str, share: float) -> None:
    reference = detections()
    actual = rounded(reference)
    actual[:, 4:] += np.float32(0.01) * rng(9).standard_normal((2, 8, 50)).astype(np.float32)
    value = relative(actual[:, 4:], reference[:, 4:], metric)
    limit = value - 20 * math.log10(share) if metric == "snr_db" else value * share
    record = judged(actual, reference, Division((BOXES, SCORES)), tol=limit, metric=metric)
    assert record.verdict == ("pass" if share > 1 else "fail")
    assert record.judged[0].value == pytest.approx(value, rel=1e-6)
    assert judged(actual, reference, Division(), tol=limit, metric=metric).verdict == "pass"


def test_metrics_in_the_outputs_own_unit_know_no_parts() -> None:
    reference = detections()
    actual = rounded(reference)
    for metric in ("abs", "allclose"):
        record = judged(actual, reference, Division((BOXES, SCORES)), tol=0.5, metric=metric)
        assert record.parts == ()
        assert record.judged[0].value == pytest.approx(
            np.max(np.abs(actual - reference) / (1 + np.abs(reference) * (metric == "allclose"))), rel=1e-5
        )


@pytest.mark.parametrize("precision", list(DEFAULT_TOLERANCE))
@pytest.mark.parametrize("metric", ["max", "l2", "cosine", "snr_db"])
@pytest.mark.parametrize("peak", [1e-6, 1e-3, 0.009, 0.011, 0.04, 0.06, 0.2, 0.26, 0.9])
def test_scores_that_are_lost_never_pass(precision: Precision, metric: str, peak: float) -> None:
    """Whatever their size: they fail, or are said not to have been exercised."""
    reference = detections(largest=peak)
    for replaced in (0.0, reference[:, 4:].mean()):
        actual = reference.copy()
        actual[:, 4:] = replaced
        record = judged(actual, reference, Division((BOXES, SCORES)), precision, metric=metric)
        assert record.parts[1].verdict == ("fail" if peak > DEFAULT_TOLERANCE[precision] else "not_measured")
        assert record.verdict == ("fail" if peak > DEFAULT_TOLERANCE[precision] else "pass")


def test_scores_that_appear_from_nothing_fail() -> None:
    reference = detections(largest=1e-5)
    actual = rounded(reference)
    actual[0, 6, 7] = 0.9
    record = judged(actual, reference, Division((BOXES, SCORES)))
    assert record.verdict == "fail"
    assert record.judged[0].value == pytest.approx(0.9, rel=1e-3)


def test_what_no_input_exercised_is_said_and_raises_no_alarm() -> None:
    reference = detections(largest=1e-5)
    actual = rounded(reference)
    actual[:, 4:] *= np.float32(1.3)  # the rounding of their logits
    record = judged(actual, reference, Division((BOXES, SCORES)))
    assert record.verdict == "pass"
    assert record.parts[1].value is None
    (note,) = unexercised_notes([record])
    assert note.startswith("output 'x', part [4:12] along axis 1 (scores): not exercised: its reference is at most ")
    alone = judged(actual[:, 4:], reference[:, 4:], Division((Part((), 1.0),)))
    assert alone.verdict == "not_measured"
    assert unexercised_notes([alone])
    # One input that does is enough.
    limits = resolve_limits(None, "max", "fp16", ["x"], known={"x": Division((BOXES, SCORES))})["x"]
    other = detections(2)
    both = [measure("x", y, r, limits=limits) for y, r in ((actual, reference), (rounded(other), other))]
    record = judge(merge(both), limits)
    assert [part.verdict for part in record.parts] == ["pass", "pass"]
    assert record.parts[1].case == 1


def test_scores_that_are_zero_throughout_were_not_exercised() -> None:
    for shape in ((1, 1), (4, 8)):
        zero = np.zeros(shape, np.float32)
        assert judged(zero, zero, Division((Part((), 1.0),))).verdict == "not_measured"
        assert judged(zero + np.float32(0.5), zero, Division((Part((), 1.0),))).verdict == "fail"
        # Of other outputs nothing is known, and they are judged by the absolute error.
        assert judged(zero, zero).verdict == "not_measured"
        assert judged(zero + np.float32(0.02), zero).verdict == "fail"
    boxes_too = np.zeros((2, 12, 50), np.float32)
    record = judged(boxes_too, boxes_too, Division((BOXES, SCORES)))
    assert [part.verdict for part in record.parts] == ["not_measured", "not_measured"]
    assert judged(boxes_too + np.float32(0.02), boxes_too, Division((BOXES, SCORES))).verdict == "fail"


def test_the_worst_part_of_the_worst_input_is_named() -> None:
    limits = resolve_limits(None, "max", "fp16", ["x"], known={"x": Division((BOXES, SCORES))})["x"]
    cases = []
    for seed, error in enumerate((0.002, 0.03, 0.004)):
        reference = detections(seed)
        actual = rounded(reference)
        actual[1, 5, 3] += np.float32(error)
        cases.append(measure("x", actual, reference, limits=limits))
    entry = judge(merge(cases), limits).judged[0]
    assert (entry.case, entry.part) == (1, "part [4:12] along axis 1 (scores)")
    assert entry.value == pytest.approx(0.03 / detections(1)[:, 4:].max(), rel=2e-2)


def test_inputs_whose_outputs_are_divided_and_others_whose_are_not() -> None:
    limits = resolve_limits(None, "max", "fp16", ["x"], known={"x": FOUND})["x"]
    divided, plain = detections(), rng(3).standard_normal((2, 12, 50)).astype(np.float32)
    for spoilt in (0, 1, None):
        cases = []
        for index, reference in enumerate((divided, plain)):
            actual = rounded(reference)
            if spoilt == index:
                actual[:, 5] *= np.float32(0.5)
            cases.append(measure("x", actual, reference, limits=by(FOUND)))
        assert [bool(case.parts) for case in cases] == [True, False]
        record = judge(merge(cases), limits)
        assert record.verdict == ("pass" if spoilt is None else "fail")
        if spoilt is not None:
            assert record.judged[0].case == spoilt
            assert (record.judged[0].part is not None) == (spoilt == 0)


@pytest.mark.parametrize("seed", range(20))
def test_an_output_that_fails_as_a_whole_fails_by_parts(seed: int) -> None:
    """Without scores and masks, whose own rules are wider, parts only ever add to what is seen."""
    values = rng(seed)
    for name in ("axis 1", "signed", "between", "three scales", "nested"):
        reference = np.array(STRETCHES[name][0])
        error = 10 ** values.uniform(-4, -1) * np.abs(reference).max()
        actual = reference + (error * (values.random(reference.shape) < 0.02)).astype(np.float32)
        if judged(actual, reference, Division()).verdict == "fail":
            assert judged(actual, reference).verdict == "fail"


def test_parts_the_graph_was_wrong_about_are_left_alone() -> None:
    reference = detections()
    for part in (Part(((1, 0, 13),)), Part(((3, 0, 4),)), BOXES):
        assert judged(rounded(reference), reference, Division((part,))).parts == ()


def test_nan_in_a_part_is_not_finite_like_anywhere() -> None:
    reference = detections()
    actual = rounded(reference)
    actual[0, 7, 7] = math.nan
    record = judged(actual, reference, Division((BOXES, SCORES)))
    assert record.verdict == "fail"
    assert record.judged[0].value == math.inf
    assert [part.verdict for part in record.parts] == ["pass", "fail"]


def test_the_text_of_a_failure_speaks_of_the_part() -> None:
    reference = detections()
    actual = rounded(reference)
    actual[:, 4:] = 0
    limits = resolve_limits(None, "max", "int8", ["x"], known={"x": Division((BOXES, SCORES))})
    found = {"x": measure("x", actual, reference, limits=limits["x"])}
    outputs = [judge(found["x"], limits["x"])]
    examined = examine({"x": actual}, {"x": reference}, found, outputs, "int8", limits=limits)
    assert examined["x"].beyond == np.count_nonzero(reference[:, 4:] > 0.05 * reference[:, 4:].max())
    assert [pattern.kind for pattern in examined["x"].patterns] == ["constant"]
    sample, score, anchor = map(int, np.unravel_index(reference[:, 4:].argmax(), (2, 8, 50)))
    assert examined["x"].worst[0].index == (sample, score + 4, anchor)
    text = explain(found, outputs, examined)
    assert "part [4:12] along axis 1 (scores): max 1 > 0.05" in " ".join(text.split())
    assert "there, every element is 0" in " ".join(text.split())


# --- what the reference tells ----------------------------------------------------------------------------------------


def regression(seed: int) -> NDArray[np.float32]:
    """A distance in metres, an angle in radians, a probability: [100, 3]."""
    values = rng(seed)
    columns = [values.uniform(1, 1000, 100), values.normal(0, 0.05, 100), values.uniform(0, 1, 100)]
    return np.stack(columns, axis=1).astype(np.float32)


STRETCHES: dict[str, tuple[NDArray[Any], list[tuple[int, int, int, float | None]]]] = {
    "axis 1": (detections(), [(1, 0, 4, None), (1, 4, 12, 1.0)]),
    "last axis": (np.ascontiguousarray(detections().transpose(0, 2, 1)), [(2, 0, 4, None), (2, 4, 12, 1.0)]),
    "strided": (detections().transpose(0, 2, 1), [(2, 0, 4, None), (2, 4, 12, 1.0)]),
    "between": (detections()[:, [4, 5, 0, 1, 2, 3, 6]], [(1, 0, 2, 1.0), (1, 2, 6, None), (1, 6, 7, 1.0)]),
    "signed": (detections() * np.where(np.arange(12) < 4, 1, -1)[:, None], [(1, 0, 4, None), (1, 4, 12, None)]),
    "three scales": (regression(0), [(1, 0, 1, None), (1, 1, 3, None)]),
    "nested": (
        np.concatenate([regression(0)[:, :1] * 50, regression(1)[:, :1], -regression(2)[:, 2:]], axis=1),
        [(1, 0, 1, None), (1, 1, 2, None), (1, 2, 3, None)],
    ),
    "large": (np.tile(detections(), (8, 1, 400)), [(1, 0, 4, None), (1, 4, 12, 1.0)]),
}


@pytest.mark.parametrize("name", list(STRETCHES))
def test_stretches_with_a_clean_gap_between_their_scales_are_found(name: str) -> None:
    reference, expected = STRETCHES[name]
    record = judged(rounded(reference), reference)
    assert record.verdict == "pass"
    assert [(tuple(part.ranges[0]), part.natural) for part in record.parts] == [
        ((axis, start, stop), natural) for axis, start, stop, natural in expected
    ]
    for axis, start, stop, _ in expected:
        actual = rounded(reference)
        where = [slice(None)] * reference.ndim
        where[axis] = slice(start, stop)
        actual[tuple(where)] = 0
        record = judged(actual, reference)
        assert record.verdict == "fail", name
        assert f"[{start}:{stop}] along axis {axis}" in str(record.judged[0].part)


def unremarkable(seed: int) -> dict[str, NDArray[Any]]:
    values = rng(seed)
    logits = values.normal(0, 4, (4, 1000))
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    sigmoid = 1 / (1 + np.exp(6 - 3 * values.standard_normal((1, 20, 500))))
    features = np.maximum(values.standard_normal((2, 64, 9, 9)) * np.exp(values.normal(0, 1.5, (1, 64, 1, 1))), 0)
    smooth = np.exp(-((np.linspace(-4, 4, 200)[None, None, :, None] - values.random((1, 1, 1, 200))) ** 2) * 3)
    return {
        "normal": values.standard_normal((2, 16, 100)),
        "logits": logits,
        "softmax": softmax,
        "sure": np.array([[0.99995, 0.00005]] * 40) + values.random((40, 2)) * 1e-6,
        "sigmoid": sigmoid,
        "features": features,
        "dead channels": features * (values.random((1, 64, 1, 1)) > 0.5),
        "heatmap": smooth * 255,
        "depth": np.abs(values.standard_normal((1, 1, 60, 80)).cumsum(axis=2)) + 1,
        "few": values.standard_normal((1, 5)) * 10.0 ** values.integers(-4, 4, (1, 5)),
        "heavy tails": values.standard_cauchy((4, 500)),
        "integers": values.integers(0, 80, (50, 4)).astype(np.float64),
        "sparse": values.random((4, 300)) * (values.random((4, 300)) > 0.97) * 500,
        "one-hot": np.eye(50) * 100,
    }


@pytest.mark.parametrize("seed", range(25))
def test_nothing_is_found_where_there_is_nothing(seed: int) -> None:
    for name, reference in unremarkable(seed).items():
        found = measure("x", reference, reference, limits=by(FOUND))
        assert found.parts == (), name


# --- sentinel values -------------------------------------------------------------------------------------------------


def masked(value: float, seed: int = 0, *, added: bool = False, share: float = 0.5) -> tuple[Any, NDArray[np.bool_]]:
    """Logits, [4, 6, 40], some of them masked; and which."""
    logits = rng(seed).normal(0, 5, (4, 6, 40)).astype(np.float32)
    mask = rng(seed + 1).random(logits.shape) < share
    return np.where(mask, logits + np.float32(value) if added else np.float32(value), logits), mask


MASKS = [-1e4, -1e9, -65504.0, -3.4028235e38, 1e6, -1e5]


@pytest.mark.parametrize("value", MASKS)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_logits_beside_a_mask_are_judged_by_their_own_scale(value: float, added: bool, share: float) -> None:
    reference, mask = masked(value, added=added, share=share)
    sound = judged(rounded(reference), reference)
    assert sound.verdict == "pass"
    rest, sentinels = sound.parts
    assert (rest.size, sentinels.size) == (int((~mask).sum()), int(mask.sum()))
    assert rest.peak == np.abs(reference[~mask]).max()
    assert str(sentinels.part).startswith("sentinel values up to")
    assert rest.band
    assert sentinels.band
    assert rest.peak
    assert sentinels.peak
    (low, bound), (same_bound, high) = rest.band, sentinels.band
    assert (low, bound, high) == (0.0, same_bound, math.inf)
    assert rest.peak <= bound < sentinels.peak
    actual = rounded(reference)
    actual[~mask] = rng(5).permutation(actual[~mask])
    assert relative(np.where(mask, reference, actual), reference) < 0.01
    record = judged(actual, reference)
    assert record.verdict == "fail"
    assert record.judged[0].value == pytest.approx(relative(actual[~mask], reference[~mask]))
    assert str(record.judged[0].part).startswith("all but the sentinel values")


def test_one_masked_element_of_a_few() -> None:
    reference = np.array([[3.0, -2.0, 5.0, 4.5, -1e4, 1.0]], np.float32)
    actual = rounded(reference)
    assert judged(actual, reference).verdict == "pass"
    actual[0, [2, 3]] = actual[0, [3, 2]]
    assert judged(actual, reference, Division()).verdict == "pass"
    assert judged(actual, reference).verdict == "fail"


@pytest.mark.parametrize("value", MASKS)
def test_a_mask_that_is_lost_or_lies_elsewhere_fails(value: float) -> None:
    reference, mask = masked(value)
    one_lost = rounded(reference)
    one_lost[tuple(np.argwhere(mask)[3])] = 2.5
    one_more = rounded(reference)
    one_more[tuple(np.argwhere(~mask)[3])] = rounded(np.array(value, np.float32))
    other_sign = np.where(mask, -rounded(reference), rounded(reference))
    for actual in (one_lost, one_more, other_sign):
        assert judged(actual, reference).verdict == "fail"
    infinite = np.where(mask, -np.inf, rounded(reference))
    assert judged(infinite, reference).verdict == "fail"


@pytest.mark.parametrize("value", [-1e9, -1e5, 1e6])
def test_a_mask_beyond_fp16_may_end_where_fp16_ends_and_nowhere_before(value: float) -> None:
    reference, mask = masked(value, share=0.1)
    # FP16's two largest values, and what lies before them.
    for magnitude, verdict in ((65504, "pass"), (65472, "pass"), (65408, "fail"), (32752, "fail"), (5, "fail")):
        actual = np.where(mask, np.float32(math.copysign(magnitude, value)), rounded(reference))
        assert judged(actual, reference).verdict == verdict, magnitude


def test_a_mask_that_ends_where_fp16_ends_has_no_error_at_all() -> None:
    reference, mask = masked(-1e5, share=0.1)
    actual = np.where(mask, np.float32(-65504), rounded(reference))
    _, sentinels = judged(actual, reference).parts
    assert (sentinels.value, sentinels.peak) == (0.0, 1e5)
    _, sentinels = judged(actual, reference, metric="snr_db").parts
    assert sentinels.value == math.inf


def test_a_mask_within_fp16_is_held_to_its_value() -> None:
    reference, mask = masked(-65504.0, share=0.1)
    assert judged(np.where(mask, np.float32(-64000), rounded(reference)), reference).verdict == "fail"


def test_every_element_is_of_one_band() -> None:
    """Zeros, and a mask that lies just where the rest ends under another that is a hundred times as large."""
    reference, _ = masked(-1e4, share=0)
    zeros, masks, greater = rng(2).permutation(reference.size)[:60].reshape(3, 20)
    reference.flat[zeros], reference.flat[masks], reference.flat[greater] = 0, -1e7, -1e9
    sound = judged(rounded(reference), reference)
    assert (sound.verdict, len(sound.parts)) == ("pass", 3)
    assert sum(part.size for part in sound.parts) == reference.size
    for places in (zeros, masks, greater):
        actual = rounded(reference)
        actual.flat[places[0]] = 50
        assert judged(actual, reference).verdict == "fail"


def test_one_large_number_is_no_mask() -> None:
    reference = np.array([20000.0], np.float32)
    assert judged(reference, reference).verdict == "pass"
    assert judged(reference * 2, reference).verdict == "fail"
    assert judged(reference.repeat(2), reference.repeat(2)).verdict == "not_measured"


@pytest.mark.parametrize("metric", ["max", "l2", "cosine", "snr_db"])
def test_a_part_that_hides_within_its_tolerance_counts_once_the_error_is_more(metric: str) -> None:
    """Scores that stay within the relative error that the limit stands for, of their scale 1: 10 % by each metric."""
    limit = {"max": 0.1, "l2": 0.1, "cosine": 0.005, "snr_db": 20.0}[metric]
    for peak, error, verdict, value in (
        (0.09, 0.09, "not_measured", None),
        (0.09, 0.11, "fail", {"cosine": 0.11**2 / 2, "snr_db": -20 * math.log10(0.11)}.get(metric, 0.11)),
        (0.11, 0.0, "pass", {"snr_db": math.inf}.get(metric, 0.0)),
    ):
        reference = np.concatenate([np.full((1, 4, 50), 300.0), np.full((1, 8, 50), peak)], axis=1)
        actual = reference.copy()
        actual[0, 6, 6] += error
        _, scores = judged(actual, reference, Division((BOXES, SCORES)), tol=limit, metric=metric).parts
        assert (scores.verdict, scores.value) == (verdict, value if value is None else pytest.approx(value))


@pytest.mark.parametrize("metric", ["max", "l2", "cosine", "snr_db"])
@pytest.mark.parametrize("natural", [None, 1.0])
def test_the_value_of_a_part_is_what_numpy_gives(metric: str, natural: float | None) -> None:
    """Against max|r|, or a quarter of the natural scale where that is more."""
    reference = detections()
    reference[:, 4:] *= np.float32(0.1)
    actual = reference.copy()
    actual[:, 4:] += np.float32(0.02) * rng(9).standard_normal((2, 8, 50)).astype(np.float32)
    record = judged(actual, reference, Division((BOXES, Part(((1, 4, 12),), natural))), metric=metric)
    expected = relative(actual[:, 4:], reference[:, 4:], metric)
    relief = 0.25 / float(reference[:, 4:].max()) if natural else 1.0
    assert relief > 2 or not natural
    if metric == "snr_db":
        expected += 20 * math.log10(relief)
    else:
        expected /= relief**2 if metric == "cosine" else relief
    assert record.parts[1].value == pytest.approx(expected, rel=1e-6)


def test_a_part_that_turns_to_its_opposite_or_to_nothing_by_cosine() -> None:
    reference = detections()
    for factor, value in ((-1.0, 2.0), (0.0, 1.0), (2.0, 0.0)):
        actual = reference.copy()
        actual[:, 4:] *= np.float32(factor)
        _, scores = judged(actual, reference, Division((BOXES, Part(((1, 4, 12),)))), metric="cosine").parts
        assert scores.value == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("longer", [1e-8, -1e-8])
def test_the_cosine_of_a_part_has_its_digits_where_the_two_are_all_but_alike(longer: float) -> None:
    """As 1 − 1 / sqrt(1 + t²) = t² / 2 for small t; 1 less a cosine would be 0 or 1.1e-16."""
    reference = np.concatenate([np.full(100, 300.0), np.ones(100)])
    actual = reference.copy()
    actual[100:] += longer + 1e-8 * np.tile([1.0, -1.0], 50)
    found = judged(
        actual, reference, Division((Part(((0, 0, 100),)), Part(((0, 100, 200),)))), metric="cosine", tol=0.1
    )
    assert found.parts[1].value == pytest.approx(0.5e-16, rel=1e-5, abs=0)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_an_error_that_is_no_number_of_scales_never_passes(order: list[int]) -> None:
    """Scores of FP64 so small that both 0.25 and the error are infinitely many of them, in one input of two."""
    reference = np.concatenate([np.full((1, 4, 50), 300.0), np.full((1, 8, 50), 1e-310)], axis=1)
    actual = reference.copy()
    actual[0, 6, 6] = 0.5
    (limit, _) = resolve_limits(0.0, "max", "fp16", ["x"], known={"x": Division((BOXES, SCORES))})["x"]
    found = [measure("x", each, reference, limits=(limit,)) for each in (actual, reference)]
    assert judge(merge([found[index] for index in order]), [limit]).verdict == "fail"


@pytest.mark.parametrize("metric", ["max", "l2", "cosine", "snr_db"])
@pytest.mark.parametrize("value", [1e154, 1e200, -1e300])
def test_errors_whose_squares_leave_fp64_fail_in_a_part(metric: str, value: float) -> None:
    reference = detections().astype(np.float64)
    actual = reference.copy()
    actual[0, 6, 6] = value
    _, scores = judged(actual, reference, Division((BOXES, Part(((1, 4, 12),)))), metric=metric).parts
    assert scores.verdict == "fail"


def test_a_sentinel_within_the_range_must_keep_its_value() -> None:
    """A column of timestamps is as constant as a mask is."""
    reference = np.stack([rng().standard_normal(200), np.full(200, 30000.0)], axis=1)
    actual = reference.copy()
    assert judged(actual, reference).verdict == "pass"
    actual[:, 1] = 20000
    assert judged(actual, reference).verdict == "fail"


@pytest.mark.parametrize(("kinds", "parts"), [(4, 2), (5, 0)])
def test_four_masks_beside_one_another_are_masks_and_more_are_values(kinds: int, parts: int) -> None:
    reference = rng().standard_normal((4, 80))
    for place, value in enumerate([-1e4, -8e3, -6e3, -5e3, -4.5e3][:kinds]):
        reference[:, place * 5 : place * 5 + 5] = value
    assert len(measure("x", reference, reference, limits=by(FOUND)).parts) == parts
    if parts:
        actual = reference.copy()
        actual[:, 30:] *= -1
        assert judged(actual, reference).verdict == "fail"


def test_four_masks_each_far_beyond_the_next() -> None:
    reference = rng().standard_normal((4, 80))
    for place, value in enumerate([2e3, 1e6, 1e9, 1e12]):
        reference[:, place * 5 : place * 5 + 5] = value
    parts = measure("x", reference, reference, limits=by(FOUND)).parts
    assert [part.size for part in parts] == [4 * 60, 20, 20, 20, 20]
    for columns in (slice(0, 5), slice(5, 10), slice(30, 80)):
        actual = reference.copy()
        actual[:, columns] *= -1
        assert judged(actual, reference).verdict == "fail"


def test_masks_two_fifths_as_large_as_the_largest_are_masks() -> None:
    reference = rng().standard_normal((4, 80))
    reference[:, :5], reference[:, 5:10] = -1e4, -4e3
    assert len(measure("x", reference, reference, limits=by(FOUND)).parts) == 2
    reference[:, 5:10] = -3999
    assert measure("x", reference, reference, limits=by(FOUND)).parts == ()


def test_two_masks_that_were_added_lie_no_further_apart_than_what_they_were_added_to() -> None:
    """Twice as far as from −2 to 2, and a thousandth of the mask: 18."""
    reference = rng().uniform(-1, 1, 60)
    reference[7] = 2.0
    for apart, parts in ((1.4, 2), (17.5, 2), (18.5, 0)):
        reference[20], reference[40] = -1e4, -1e4 + apart
        assert len(measure("x", reference, reference, limits=by(FOUND)).parts) == parts, apart


def test_a_part_without_a_finite_value_takes_nothing_from_the_others() -> None:
    reference = detections()
    reference[:, :4] = np.nan
    division = Division((Part(((1, 0, 4),)), Part(((1, 4, 12),))), search=True)
    actual = rounded(reference)
    assert judged(actual, reference, division).verdict == "pass"
    actual[:, 4:] *= -1
    assert judged(actual, reference, division).verdict == "fail"


def test_infinities_in_a_small_stretch_do_not_hide_it() -> None:
    reference = rng().standard_normal((2, 6, 40))
    reference[:, 3:] *= 0.01
    reference[:, 3:, 7], reference[:, 3:, 9] = np.inf, np.nan
    actual = reference.copy()
    assert judged(actual, reference).verdict == "pass"
    assert len(judged(actual, reference).parts) == 2
    actual[:, 3:] *= -1
    actual[:, 3:, 7] = np.inf
    assert judged(actual, reference).verdict == "fail"


def test_the_masks_of_several_inputs_are_one_part() -> None:
    inputs = [masked(-1e9, seed) for seed in (0, 10)]
    merged = merge([measure("x", each, each, limits=by(FOUND)) for each, _ in inputs])
    hidden = sum(int(np.count_nonzero(mask)) for _, mask in inputs)
    assert [part.size for part in merged.parts] == [2 * 4 * 6 * 40 - hidden, hidden]


def test_masks_upon_masks_and_masks_in_a_part() -> None:
    reference, mask = masked(-1e9)
    reference[0] = np.where(mask[0], reference[0] * 2, reference[0])
    reference[1] = np.where(mask[1], -1e4, reference[1])
    record = judged(rounded(reference), reference)
    assert record.verdict == "pass"
    actual = rounded(reference)
    actual[~mask] = 0
    assert judged(actual, reference).verdict == "fail"
    joined = np.concatenate(
        [detections()[:, :4] * 50, masked(-1e4)[0][:2, :, :40].repeat(2, axis=2)[:, :, :50]], axis=1
    )
    division = Division((Part(((1, 0, 4),)), Part(((1, 4, 10),))), search=True)
    actual = rounded(joined)
    assert judged(actual, joined, division).verdict == "pass"
    actual[:, 4:] = np.where(actual[:, 4:] > -5000, 0, actual[:, 4:])
    record = judged(actual, joined, division)
    assert record.verdict == "fail"
    assert str(record.judged[0].part).endswith("in part [4:10] along axis 1")


def test_one_huge_element_hides_nothing() -> None:
    reference = rng().standard_normal((8, 64)).astype(np.float32)
    reference[3, 7] = 4000
    assert judged(rounded(reference), reference).verdict == "pass"
    actual = rounded(reference)
    actual[:, 32:] = -actual[:, 32:]
    assert relative(actual, reference) < 0.01
    assert judged(actual, reference, Division()).verdict == "pass"
    assert judged(actual, reference).verdict == "fail"


def test_what_is_large_without_being_a_mask_stays_with_the_rest() -> None:
    values = rng()
    # Values of every size, a few values that are all different, and a value between the mask and the rest.
    decades = 10 ** values.uniform(-6, 1, 200)
    decades[7] = 1e6
    few = values.standard_normal(50)
    few[:3] = 1e5, 2e5, 1.5e5
    between = values.standard_normal(300_000)
    between[::2], between[123_457] = -1e4, 1000
    for reference in (decades, few, between):
        assert measure("x", reference, reference, limits=by(FOUND)).parts == ()


def test_one_small_channel_of_thousands_is_found() -> None:
    reference = rng().uniform(-1, 1, (1, 4000, 40))
    reference[:, 3999] *= 1e-3
    actual = reference.copy()
    assert judged(actual, reference).verdict == "pass"
    actual[:, 3999] = 0
    assert judged(actual, reference).verdict == "fail"


@pytest.mark.parametrize("columns", [[1, 2], [5], [38, 39]])
@pytest.mark.parametrize("fill", [-1e4, -1e9, float(np.finfo(np.float32).min)])
def test_padding_that_is_masked_is_no_stretch(columns: list[int], fill: float) -> None:
    """Whole columns of a mask, which FP16 ends before: a sound engine passes, and one that loses the rest fails."""
    reference = rng().standard_normal((4, 6, 40)).astype(np.float32)
    reference[:, :, columns] = fill
    actual = rounded(np.clip(reference, -65504, 65504))
    assert judged(actual, reference, Division(search=True)).verdict == "pass"
    lost = np.where(np.abs(reference) < 100, -actual, actual)
    assert judged(lost, reference, Division(search=True)).verdict == "fail"


# --- samples ---------------------------------------------------------------------------------------------------------


def test_each_sample_of_a_batch_is_judged_as_an_input_of_its_own() -> None:
    reference = rng().standard_normal((4, 100)).astype(np.float32) * np.array([[1000], [1], [50], [0]], np.float32)
    division = Division(batch=(4,))
    assert judged(rounded(reference), reference, division).verdict == "pass"
    actual = rounded(reference)
    actual[1] *= -1
    assert judged(actual, reference, Division()).verdict == "pass"
    record = judged(actual, reference, division)
    assert record.verdict == "fail"
    assert record.judged[0].sample == 1
    assert record.judged[0].value == pytest.approx(2, rel=1e-3)
    assert "sample 1" in sentence(record.judged[0])
    assert record.parts[0].sample == 1
    # What has no scale of its own is held against the whole.
    actual = rounded(reference)
    actual[3] = 0.5
    assert judged(actual, reference, division).verdict == "pass"
    actual[3] = 50
    record = judged(actual, reference, division)
    assert record.verdict == "fail"
    assert str(record.judged[0].note).startswith("its reference is all zero here: relative to the output's ")


@pytest.mark.parametrize("metric", ["max", "l2", "cosine", "snr_db"])
@pytest.mark.parametrize("count", [2, 300, 4096])
def test_one_wrong_sample_does_not_drown_in_a_large_batch(metric: str, count: int) -> None:
    reference = rng().standard_normal((count, 20)).astype(np.float32)
    reference[count // 2] *= np.float32(0.01)  # for `max`: so small that the others' scale hides it
    (limits,) = resolve_limits(None, metric, "int8", ["x"], known={"x": Division(batch=(count,))}).values()
    assert judge(measure("x", rounded(reference), reference, limits=limits), limits).verdict == "pass"
    actual = rounded(reference)
    actual[count // 2] *= -1
    record = judge(measure("x", actual, reference, limits=limits), limits)
    assert (record.verdict, record.judged[0].sample) == ("fail", count // 2)


@pytest.mark.parametrize("shape", [(4, 15), (5000, 16), (3, 100)])
def test_samples_that_are_small_or_too_many_or_no_samples_are_not_judged_apart(shape: tuple[int, ...]) -> None:
    reference = rng().standard_normal(shape)
    assert measure("x", reference, reference, limits=by(Division(batch=(4, 5000)))).parts == ()


def test_samples_and_parts_together() -> None:
    reference = detections()
    reference[1, :4] *= np.float32(0.01)
    actual = rounded(reference)
    actual[1, :4] += np.float32(0.5)
    record = judged(actual, reference, Division((BOXES, SCORES), batch=(2,)))
    entry = record.judged[0]
    assert (record.verdict, entry.sample, entry.part) == ("fail", 1, "part [0:4] along axis 1")
    assert entry.value == pytest.approx(relative(actual[1, :4], reference[1, :4]), rel=1e-5)


# --- what the user says ----------------------------------------------------------------------------------------------


def test_scores_share_one_scale_across_samples() -> None:
    """The best of 16 scores is 0.9 in one sample and 0.3 in the other: an error of 0.006 is within 1 % of the first."""
    scores = Part((), 1.0)
    reference = rng().uniform(0, 0.05, (2, 16))
    reference[0, 3], reference[1, 5] = 0.9, 0.3
    actual = reference.copy()
    actual[1, 5] += 0.006
    assert judged(actual, reference, Division((scores,), batch=(2,))).verdict == "pass"
    assert judged(actual, reference, Division(batch=(2,))).verdict == "fail"
    actual[1, 5] = 0
    assert judged(actual, reference, Division((scores,), batch=(2,))).verdict == "fail"


def test_the_users_parts() -> None:
    reference = detections()
    actual = rounded(reference)
    actual[:, 4:] = 0
    known = Division((BOXES, SCORES), search=True)
    given = Tolerance(max=0.01, parts={"x": [(1, 0, 4), (1, 4, 12)]})
    record = judged(actual, reference, Division(search=True), tol=given)
    assert (record.verdict, record.judged[0].part) == ("fail", "part [4:12] along axis 1")
    assert judged(actual, reference, known, tol=Tolerance(max=0.01, parts=None)).verdict == "pass"
    assert judged(actual, reference, known, tol=Tolerance(max=0.01)).verdict == "fail"
    # What the parts leave out is judged with the whole.
    some = Tolerance(max=0.01, parts={"x": [(-2, 4, None)]})
    record = judged(actual, reference, known, tol=some)
    assert [part.part for part in record.parts] == ["part [4:12] along axis 1", "the whole output"]
    wrong = rounded(reference)
    wrong[:, :4] = 0
    assert judged(wrong, reference, known, tol=some).verdict == "fail"
    # Parts that overlap cover no more than they do, however large they are together.
    twice = Tolerance(max=0.01, parts={"x": [(1, 4, 12), (1, 3, 12)]})
    wrong[:, 3] = reference[:, 3]
    assert judged(wrong, reference, known, tol=twice).verdict == "fail"
    everywhere = (("*", Tolerance(max=0.01, parts={"x": [(0, 0, 1), (0, 1, 2)]})),)
    assert judged(rounded(reference), reference, known, tol=everywhere).verdict == "pass"


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"x": [(3, 0, 4)]}, "has 3 axes"),
        ({"x": [(-4, 0, 4)]}, "has 3 axes"),
        ({"x": [(1, 0, 13)]}, "axis 1 has 12"),
        ({"x": [(1, 12, None)]}, "axis 1 has 12"),
        ({"y": [(1, 0, 4)]}, "no such output"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        judged(detections(), detections(), tol=Tolerance(max=0.1, parts=parts))


@pytest.mark.parametrize(
    "parts",
    [
        4,
        "all",
        {},
        {1: [(0, 0, 1)]},
        *({"x": each} for each in ([], [(0, 0)], [(0, 3, 3)], [(0, -1, 3)], [0, 1, 2], (0, 1, 2), [(0.5, 0, 1)])),
        {"x": [(True, 0, 1)]},
    ],
)
def test_parts_of_the_wrong_kind_are_refused(parts: Any) -> None:
    with pytest.raises(ArgumentError, match=r"Tolerance\.parts"):
        markers.trt_parity("m.onnx", tol=Tolerance(max=0.1, parts=parts))


def test_parts_alone_leave_the_default_limits() -> None:
    spec = markers.trt_parity("m.onnx", tol=Tolerance(parts=None))
    limits = resolve_limits(spec.tol, "max", "fp16", ["x"])["x"]
    assert limits[0].limit == DEFAULT_TOLERANCE["fp16"]
    with pytest.raises(ArgumentError, match="at least one limit"):
        markers.trt_parity("m.onnx", tol=Tolerance())


# --- nothing to compare ----------------------------------------------------------------------------------------------

NOTHING: dict[str, Callable[[], NDArray[Any]]] = {
    "empty": lambda: np.zeros((0, 4), np.float32),
    "masked": lambda: np.full((4, 4), -1e9, np.float32),
    "masked and infinite": lambda: np.where(np.eye(4) > 0, -np.inf, -1e4),
    "infinite": lambda: np.full(4, -np.inf),
    "nan": lambda: np.full(4, np.nan),
    "empty integers": lambda: np.zeros((0,), np.int64),
}


@pytest.mark.parametrize("name", list(NOTHING))
def test_where_nothing_was_compared_nothing_passes(name: str) -> None:
    reference = NOTHING[name]()
    record = judged(reference, reference)
    assert record.verdict == "not_measured"
    (note,) = unexercised_notes([record])
    assert note.startswith("output 'x' was not compared: ")
    if reference.size:
        other = np.where(np.arange(reference.size).reshape(reference.shape) == 1, 3.0, reference)
        assert judged(other, reference).verdict == "fail"
