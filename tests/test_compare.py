"""The metrics against the formulas as numpy would write them, over whole tensors in FP64."""

from __future__ import annotations

import math
import pickle
import tracemalloc
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pytest_trtcheck.compare import (
    Fault,
    Limit,
    Measurement,
    NonFinite,
    measure,
    measure_all,
    merge,
    resolve_limits,
    streaming,
)
from pytest_trtcheck.errors import ComparisonError
from pytest_trtcheck.metrics import Score, top1

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


SOME = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FLOATS = st.sampled_from([np.dtype(each) for each in ("float16", "float32", "float64", ml_dtypes.bfloat16)])
INTEGERS = st.sampled_from([np.dtype(each) for each in ("int8", "uint8", "int16", "int32", "int64", "uint64")])
SPECIAL = (math.nan, math.inf, -math.inf)


def top1_limits(tie: float, axis: int | None = None) -> tuple[Limit, ...]:
    return (Limit(top1(axis), tie, "tol"),)


@pytest.fixture(params=[streaming.CHUNK, 7], ids=["chunk", "chunk-of-7"])
def _chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors must cross the boundaries of chunks too."""
    monkeypatch.setattr(streaming, "CHUNK", request.param)


chunked = pytest.mark.usefixtures("_chunked")


@st.composite
def float_pairs(draw: st.DrawFn, special: tuple[float, ...] = ()) -> tuple[NDArray[Any], NDArray[Any]]:
    dtype = draw(FLOATS)
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, max_side=6))
    elements = st.floats(-100, 100, width=32)
    if special:
        elements = st.one_of(elements, st.sampled_from(special))
    pair = [draw(hnp.arrays(np.float64, shape, elements=elements)).astype(dtype) for _ in range(2)]
    if draw(st.booleans()):
        with np.errstate(invalid="ignore"):
            pair[0] = (pair[1].astype(np.float64) * (1 + 1e-2 * pair[0].astype(np.float64))).astype(dtype)
    return pair[0], pair[1]


def naive(actual: NDArray[Any], reference: NDArray[Any]) -> dict[str, float]:
    y, r = np.atleast_1d(actual).astype(np.float64).ravel(), np.atleast_1d(reference).astype(np.float64).ravel()
    d = np.abs(y - r)
    with np.errstate(all="ignore"):
        return {
            "max": d.max() / np.abs(r).max(),
            "l2": float(np.linalg.norm(y - r) / np.linalg.norm(r)),
            "abs": d.max(),
            "allclose": (d / (1 + np.abs(r))).max(),
            "cosine": float(1 - (y @ r) / (np.linalg.norm(y) * np.linalg.norm(r))),
            "snr_db": float(10 * np.log10((r @ r) / ((y - r) @ (y - r)))),
        }


def value(measurement: Measurement, metric: str) -> float:
    found = measurement.scores[metric].value
    assert found is not None
    return found


@chunked
@SOME
@given(float_pairs())
def test_metrics_are_the_formulas(pair: tuple[NDArray[Any], NDArray[Any]]) -> None:
    actual, reference = pair
    found = measure("x", actual, reference)
    assert found.size == reference.size
    if not reference.any():
        assert value(found, "max") == value(found, "l2") == value(found, "abs")
        assert found.scores["max"].note
        assert found.value("max") is None
        assert found.scores["cosine"].value is None
        assert found.scores["snr_db"].value is None
        return
    expected = naive(actual, reference)
    for metric in ("max", "l2", "abs", "allclose"):
        assert value(found, metric) == pytest.approx(expected[metric], rel=1e-12, abs=0)
    if not actual.any():
        assert found.scores["cosine"].value is None
    else:
        assert value(found, "cosine") == pytest.approx(expected["cosine"], rel=1e-9, abs=1e-14)
    assert value(found, "snr_db") == pytest.approx(expected["snr_db"], rel=1e-9, abs=1e-9)
    assert found.shape == actual.shape


@chunked
@SOME
@given(float_pairs())
def test_allclose_is_the_least_tolerance_of_numpys(pair: tuple[NDArray[Any], NDArray[Any]]) -> None:
    actual, reference = (each.astype(np.float64) for each in pair)
    tol = value(measure("x", *pair), "allclose")
    above, below = tol * (1 + 1e-12), tol * (1 - 1e-12)
    assert np.allclose(actual, reference, rtol=above, atol=above)
    if tol:
        assert not np.allclose(actual, reference, rtol=below, atol=below)


@chunked
@SOME
@given(float_pairs(SPECIAL))
def test_nan_and_infinity_are_counted_and_set_aside(pair: tuple[NDArray[Any], NDArray[Any]]) -> None:
    y, r = (each.astype(np.float64) for each in pair)
    finite = np.isfinite(y) & np.isfinite(r)
    same = ~finite & ((np.isnan(y) & np.isnan(r)) | (y == r))
    found = measure("x", *pair)
    assert found.nonfinite == NonFinite(
        same=int(same.sum()),
        different=int((~finite & ~same).sum()),
        nan_actual=int(np.isnan(y).sum()),
        inf_actual=int(np.isinf(y).sum()),
        nan_reference=int(np.isnan(r).sum()),
        inf_reference=int(np.isinf(r).sum()),
    )
    if found.nonfinite.different:
        assert value(found, "max") == value(found, "l2") == value(found, "abs") == math.inf
        assert value(found, "snr_db") == -math.inf
        assert math.isnan(value(found, "cosine"))
        assert not math.isfinite(found.worst[0].error)
    elif finite.any() and r[finite].any():
        expected = naive(y[finite], r[finite])
        assert value(found, "max") == pytest.approx(expected["max"], rel=1e-12)
        assert value(found, "l2") == pytest.approx(expected["l2"], rel=1e-12)


@chunked
@SOME
@given(st.data())
def test_integers_are_equal_or_not_exactly(data: st.DataObject) -> None:
    dtype = data.draw(INTEGERS)
    shape = data.draw(hnp.array_shapes(max_dims=3, max_side=6))
    reference = data.draw(hnp.arrays(dtype, shape))
    actual = np.where(data.draw(hnp.arrays(np.bool_, shape)), reference, data.draw(hnp.arrays(dtype, shape)))
    found = measure("x", actual, reference)
    assert found.kind == "integer"
    assert found.mismatches == np.count_nonzero(actual != reference)
    largest = max(abs(int(a) - int(b)) for a, b in zip(actual.ravel(), reference.ravel(), strict=True))
    assert value(found, "abs") == pytest.approx(largest, rel=1e-15)


def test_neighbouring_large_integers_differ() -> None:
    reference = np.array([2**53, -(2**62), 2**63 - 1])
    found = measure("x", reference - np.array([-1, -1, 1]), reference)
    assert found.mismatches == 3
    assert value(found, "abs") == 1.0
    assert found.worst[0].expected == 2**53
    unsigned = np.array([2**64 - 1], np.uint64)
    assert value(measure("x", unsigned - np.uint64(1), unsigned), "abs") == 1.0


@chunked
@SOME
@given(float_pairs(SPECIAL))
def test_worst_elements_are_the_largest_errors(pair: tuple[NDArray[Any], NDArray[Any]]) -> None:
    actual, reference = pair
    y, r = (np.atleast_1d(each).astype(np.float64) for each in pair)
    with np.errstate(invalid="ignore"):
        errors = np.abs(y - r).ravel()
    errors[((np.isnan(y) & np.isnan(r)) | (y == r)).ravel()] = 0.0
    errors[np.isnan(errors)] = math.inf
    order = [i for i in sorted(range(errors.size), key=lambda i: (-errors[i], i)) if errors[i] > 0][:5]
    found = measure("x", actual, reference)
    assert [element.error for element in found.worst] == [errors[i] for i in order]
    assert [element.index for element in found.worst] == [np.unravel_index(i, reference.shape) for i in order]
    for element in found.worst:
        assert repr(element.actual) == repr(actual[element.index].item())
        assert repr(element.expected) == repr(reference[element.index].item())


@chunked
@SOME
@given(st.data())
def test_top1_is_the_share_of_rows_that_disagree(data: st.DataObject) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=2, max_side=5))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    scores = st.sampled_from([0.0, 0.5, 0.996, 1.0, -1.0, 3.0])
    dtype = data.draw(FLOATS)
    actual, reference = (data.draw(hnp.arrays(np.float64, shape, elements=scores)).astype(dtype) for _ in range(2))
    tie = data.draw(st.sampled_from([0.0, 0.01, 0.6]))
    disagreeing = 0
    moved = (np.moveaxis(each, axis, -1).astype(np.float64) for each in (actual, reference))
    rows = (each.reshape(-1, shape[axis]).tolist() for each in moved)
    for y, r in zip(*rows, strict=True):
        best, chosen = r[r.index(max(r))], r[y.index(max(y))]
        disagreeing += not abs(best - chosen) <= tie * max(abs(best), abs(chosen))
    found = measure("x", actual, reference, limits=top1_limits(tie, axis))
    if not reference.any():
        assert found.scores["top1"].value is None
    else:
        assert found.scores["top1"].rows == (disagreeing, reference.size // shape[axis])
        assert value(found, "top1") == disagreeing / (reference.size // shape[axis])
        assert found.scores["top1"].note == f"along axis {axis % len(shape)}"


def test_top1_swaps_are_excused_only_within_the_tie() -> None:
    reference = np.array([[0.50, 0.499, 0.0], [0.9, 0.1, 0.0]])
    swapped = reference[:, [1, 0, 2]]
    assert measure("x", swapped, reference, limits=top1_limits(0.01)).scores["top1"].rows == (1, 2)
    assert measure("x", swapped, reference, limits=top1_limits(0.0)).scores["top1"].rows == (2, 2)
    infinite = np.array([[math.inf, 1.0], [2.0, 1.0]])
    swapped = np.array([[1.0, math.inf], [2.0, 1.0]])
    assert measure("x", swapped, infinite, limits=top1_limits(0.5)).scores["top1"].rows == (1, 2)


@pytest.mark.parametrize("shape", [(), (3, 1)])
def test_top1_without_a_choice_has_no_value(shape: tuple[int, ...]) -> None:
    score = measure("x", np.ones(shape), np.ones(shape), limits=top1_limits(0.1)).scores["top1"]
    assert score.value is None
    assert "last axis" in score.note
    assert "metrics.top1(axis=1)" in score.note
    assert "top1" not in measure("x", np.ones((2, 2)), np.ones((2, 2))).scores


@pytest.mark.parametrize("shape", [(1, 21, 64, 64), (2, 21, 64), (8, 3, 1, 5)])
def test_top1_asks_which_axis_where_that_is_not_clear(shape: tuple[int, ...]) -> None:
    """Along the last axis of a segmentation, most of the changed labels would not be seen."""
    rng = np.random.default_rng(0)
    reference = rng.standard_normal(shape)
    actual = np.roll(reference, 1, axis=1)
    score = measure("x", actual, reference, limits=top1_limits(0.0)).scores["top1"]
    assert score.value is None
    assert "not clear" in score.note
    labels = [each.argmax(axis=1) for each in (actual, reference)]
    found = measure("x", actual, reference, limits=top1_limits(0.0, 1)).scores["top1"]
    assert found.value == np.mean(labels[0] != labels[1])
    assert np.mean(labels[0] != labels[1]) > 0.5
    for axis in (len(shape), -len(shape) - 1):
        assert "no axis" in measure("x", actual, reference, limits=top1_limits(0.0, axis)).scores["top1"].note


@pytest.mark.parametrize("shape", [(21,), (2, 21), (1, 1, 4, 21), (1, 8, 21), (21, 1, 21)])
def test_top1_takes_the_last_axis_where_no_more_than_two_are_longer_than_one(shape: tuple[int, ...]) -> None:
    reference = np.random.default_rng(0).standard_normal(shape)
    found = measure("x", reference, reference, limits=top1_limits(0.0))
    assert found.scores["top1"].rows == (0, math.prod(shape[:-1]))
    assert found.scores["top1"].note == f"along axis {len(shape) - 1}"


@pytest.mark.parametrize("factor", [1e300, 1e-300, 2.0**1022, 5e-320])
def test_squares_that_leave_fp64_do_not_spoil_the_metrics(factor: float) -> None:
    plain = np.array([1.0, -2.0, 3.0]), np.array([1.0, -2.5, 3.1])
    found, expected = measure("x", plain[0] * factor, plain[1] * factor), measure("x", *plain)
    rough = 1e-3 if factor < 1e-308 else 1e-12
    for metric in ("max", "l2", "cosine", "snr_db"):
        assert value(found, metric) == pytest.approx(value(expected, metric), rel=rough)
    assert value(found, "abs") == pytest.approx(0.5 * factor, rel=rough)
    assert found.peak == pytest.approx(3.1 * factor, rel=rough)
    assert found.fit is not None
    assert found.fit.d / found.fit.count / found.fit.unit == pytest.approx(0.4 / 3 * factor, rel=rough)
    assert found.quantiles()["p99_9"] == pytest.approx(0.5 * factor, rel=rough)
    opposite = measure("x", np.array([1.7e308, 1.0]), np.array([-1.7e308, 1.0]))
    assert value(opposite, "max") == pytest.approx(2.0)
    assert value(opposite, "abs") == math.inf


def test_a_tiny_output_still_has_its_cosine() -> None:
    reference = np.random.default_rng(0).standard_normal(1000)
    assert value(measure("x", reference * 1e-9, reference), "cosine") == pytest.approx(0.0, abs=1e-14)
    assert value(measure("x", reference * -1e-9, reference), "cosine") == pytest.approx(2.0)
    alike = reference * (1 + 1e-9 * np.arange(1000) / 1000)
    assert 1e-20 < value(measure("x", alike, reference), "cosine") < 1e-18


@chunked
def test_strides_byte_order_and_memory_maps_make_no_difference(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((6, 5, 4)).astype(np.float32)
    actual = reference + rng.standard_normal(reference.shape).astype(np.float32)
    expected = measure("x", actual, reference, limits=top1_limits(0.1))
    np.save(tmp_path / "reference.npy", reference)
    mapped = np.load(tmp_path / "reference.npy", mmap_mode="r")
    wide = np.zeros((6, 10, 4), np.float32)
    wide[:, ::2] = actual
    for other in (np.asfortranarray(actual), wide[:, ::2], actual.astype(">f4"), actual[::-1].copy()[::-1]):
        assert measure("x", other, mapped, limits=top1_limits(0.1)) == expected


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "int4", "uint4"])
def test_ml_dtypes(name: str) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name))
    reference = np.array([1, 2, 3, 4], dtype)
    actual = np.array([1, 2, 3, 6], dtype)
    found = measure("x", actual, reference, limits=top1_limits(0.0))
    assert found.kind == ("integer" if "int" in name else "float")
    assert found.dtype == name
    assert value(found, "max") == 0.5
    assert found.mismatches == (1 if "int" in name else 0)
    assert found.worst[0].expected == 4
    assert not found.faults


def test_booleans_and_strings_are_equal_or_not() -> None:
    found = measure("x", np.array([True, False, True]), np.array([True, True, True]))
    assert (found.kind, found.mismatches, dict(found.scores)) == ("bool", 1, {})
    for dtype in (object, "U", "S"):
        found = measure("x", np.array(["a", "b", "x"]).astype(dtype), np.array(["a", "b", "c"]).astype(dtype))
        assert (found.kind, found.dtype, found.mismatches) == ("string", "string", 1)
        assert found.worst[0].index == (2,)
        assert "x" in str(found.worst[0].actual)


def test_shape_and_dtype_that_differ_are_faults() -> None:
    ones = np.ones((2, 3, 4), np.float32)
    assert measure("x", ones[:1], ones).faults == (Fault("shape", "shape [1, 3, 4] where the reference has [2, 3, 4]"),)
    (fault,) = measure("x", ones.transpose(0, 2, 1), ones).faults
    assert fault.text.endswith("the same axes in another order (0, 2, 1)")
    half = measure("x", ones.astype(np.float16), ones)
    assert half.faults == (Fault("dtype", "dtype float16 where float32 is expected"),)
    assert value(half, "max") == 0.0
    assert not measure("x", ones.astype(np.float16), ones, expected_dtype=np.float16).faults
    assert measure("x", ones, ones, expected_dtype="float16").faults
    assert measure("x", ones.astype(str), ones).faults == (Fault("dtype", "dtype string where float32 is expected"),)
    assert measure("x", ones.astype(np.int64), ones.astype(np.int32)).mismatches == 0


def test_nothing_to_compare_is_said() -> None:
    found = measure("x", np.ones((0, 4)), np.ones((0, 4)), limits=top1_limits(0.1))
    assert (found.size, found.uncompared) == (0, "it has no elements")
    assert measure("x", np.ones((0, 4)), np.ones((0, 5))).faults


@pytest.mark.parametrize("dtype", ["complex64", "datetime64[s]", np.longdouble])
def test_dtypes_beyond_fp64_are_refused(dtype: Any) -> None:
    with pytest.raises(ComparisonError, match=r"'scores'.*cannot be compared"):
        measure("scores", np.zeros(3, dtype), np.zeros(3, dtype))


def test_outputs_that_are_missing_are_refused() -> None:
    one = {"a": np.ones(3)}
    with pytest.raises(ComparisonError, match="without b"):
        measure_all(one, {**one, "b": np.ones(3)}, {})
    with pytest.raises(ComparisonError, match="with b"):
        measure_all({**one, "b": np.ones(3)}, one, {})


def test_top1_is_measured_where_it_is_limited() -> None:
    tensors = {"a": np.eye(3), "b": np.eye(3)}
    limits = resolve_limits((("a", 0.1), ("b", 0.2)), "top1", "fp16", list(tensors))
    assert measure_all(tensors, tensors, limits)["a"].scores["top1"].rows == (0, 3)
    assert "top1" not in measure_all(tensors, tensors, {"b": limits["b"]})["a"].scores


def test_histogram_and_quantiles_bound_the_errors() -> None:
    errors = np.geomspace(1e-6, 1.0, 5000)
    reference = np.zeros(5000)
    reference[0] = 1.0
    found = measure("x", reference + errors, reference)
    assert found.histogram.sampled == 5000
    for share, quantile in ((0.5, "p50"), (0.9, "p90"), (0.99, "p99")):
        exact = float(np.quantile(errors, share))
        assert exact * 0.99 <= found.quantiles()[quantile] <= exact * 1.27
    assert sum(count for _, count in found.histogram.octaves()) == 5000
    equal = measure("x", reference, reference)
    assert (equal.histogram.zeros, equal.quantiles()["p50"], equal.worst) == (5000, 0.0, ())


def test_large_tensors_need_little_memory() -> None:
    reference = np.ones((3000, 1000), np.float32)
    actual = reference.copy()
    actual[1234, 567] = np.nan
    tracemalloc.start()
    try:
        found = measure("x", actual, reference, limits=top1_limits(0.0))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * 2**20
    assert found.worst[0].index == (1234, 567)
    assert 1 << 19 < found.histogram.sampled < 3_000_000


def test_a_measurement_crosses_processes() -> None:
    found = measure("x", np.ones((2, 3)), np.eye(2, 3), limits=top1_limits(0.1))
    assert pickle.loads(pickle.dumps(found)) == found


def test_merging_keeps_the_worst_case_of_each_metric() -> None:
    reference = np.array([[1.0, 2.0, 3.0, 4.0]])
    spread, peaked = reference + 0.3, reference + np.array([[0.0, 0.0, 0.0, 0.5]])
    wrong = reference[:, ::-1].copy()
    cases = [measure("x", actual, reference, limits=top1_limits(0.0)) for actual in (reference, spread, peaked)]
    merged = merge(cases)
    assert merged.scores["abs"] == Score(0.5, case=2)
    assert merged.scores["l2"] == Score(value(cases[1], "l2"), case=1)
    assert merged.scores["snr_db"] == Score(value(cases[1], "snr_db"), case=1)
    assert (merged.cases, merged.size, merged.scores["top1"].rows) == (3, 12, (0, 3))
    assert merged.worst[0].case == 2
    assert merged.worst[0].index == (0, 3)
    pooled = merge([*cases, measure("x", wrong, reference, limits=top1_limits(0.0))])
    assert pooled.scores["top1"] == Score(0.25, "along axis 1", rows=(1, 4))
    labels = merge([measure("x", np.array([1]), np.array([each])) for each in (1, 1, 1, 2)])
    assert labels.mismatch_share == 0.25


def test_merging_never_loses_a_fault() -> None:
    good = measure("x", np.ones(3), np.ones(3))
    (fault,) = merge([good, measure("x", np.ones(2), np.ones(3))]).faults
    assert (fault.what, fault.case) == ("shape", 1)
    assert merge([good, measure("x", np.zeros(3), np.zeros(3))]).scores["cosine"].value is None
    broken = merge([good, measure("x", np.array([1, np.nan, 1]), np.ones(3))])
    assert (broken.nonfinite.different, broken.scores["max"].value, broken.finite_max) == (1, math.inf, 0.0)
    assert math.isnan(broken.scores["cosine"].value or 0.0)
    with pytest.raises(ComparisonError, match="exactly one output"):
        merge([good, measure("y", np.ones(3), np.ones(3))])
    with pytest.raises(ComparisonError):
        merge([])
