"""Planted faults: each must be named for what it is, in a text that fits a terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_trtcheck.compare import (
    Examination,
    concentration,
    examine,
    explain,
    judge,
    measure_all,
    merge,
    resolve_limits,
    worst_case,
)
from pytest_trtcheck.compare.explanation import WIDTH
from pytest_trtcheck.report.text import folded
from pytest_trtcheck.spec import Tolerance

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_trtcheck.compare.limits import TolArgument
    from pytest_trtcheck.spec import Precision

RNG = np.random.default_rng(7)
LOGITS = RNG.standard_normal((8, 100)).astype(np.float32)
FEATURES = RNG.standard_normal((2, 32, 8, 8)).astype(np.float32)
ROUNDING = np.float32(1e-3)


def noisy(values: NDArray[Any]) -> NDArray[Any]:
    return values + ROUNDING * np.random.default_rng(3).standard_normal(values.shape).astype(values.dtype)


def failure(
    actual: dict[str, NDArray[Any]] | NDArray[Any],
    reference: dict[str, NDArray[Any]] | NDArray[Any],
    precision: Precision = "fp16",
    tol: TolArgument = None,
    metric: str = "max",
) -> tuple[str, dict[str, Examination]]:
    if not isinstance(actual, dict) or not isinstance(reference, dict):
        assert isinstance(actual, np.ndarray)
        assert isinstance(reference, np.ndarray)
        actual, reference = {"x": actual}, {"x": reference}
    limits = resolve_limits(tol, metric, precision, list(reference))
    measurements = measure_all(actual, reference, limits)
    outputs = [judge(measurements[name], limits[name]) for name in reference]
    examinations = examine(actual, reference, measurements, outputs, precision, limits=limits)
    text = explain(measurements, outputs, examinations)
    assert max(map(len, text.splitlines())) <= WIDTH
    return text, examinations


def kinds(*arguments: Any, **options: Any) -> list[str]:
    _, examinations = failure(*arguments, **options)
    return [pattern.kind for pattern in examinations["x"].patterns]


def channel(values: NDArray[Any], index: int, factor: float) -> NDArray[Any]:
    changed = noisy(values)
    changed[:, index] *= np.float32(factor)
    return changed


@pytest.mark.parametrize(
    ("actual", "kind", "words"),
    [
        (noisy(FEATURES * np.float32(1.02)), "scale", "scaled by about 1.02"),
        (noisy(-FEATURES), "sign", "the sign is flipped"),
        (noisy(FEATURES * np.float32(-0.5)), "sign", "flipped and scaled by about 0.5"),
        (noisy(FEATURES + np.float32(0.3)), "shift", "shifted by about +0.3"),
        (np.zeros_like(FEATURES), "constant", "every element is 0"),
        (np.full_like(FEATURES, 0.25), "constant", "every element is 0.25"),
        (noisy(np.ascontiguousarray(FEATURES[:, ::-1])), "reversed", "axis 1 is reversed"),
        (noisy(FEATURES.swapaxes(2, 3).copy()), "transposed", "axes 2 and 3 are exchanged"),
        (RNG.permutation(FEATURES.ravel()).reshape(FEATURES.shape), "reordered", "in another order"),
        (channel(FEATURES, 17, 1.5), "place", "lies in [:, 17, :, :]"),
        (noisy(FEATURES) + np.float32(0.05) * noisy(RNG.standard_normal(FEATURES.shape)), "spread", "spread over"),
    ],
)
def test_planted_faults_are_named(actual: NDArray[Any], kind: str, words: str) -> None:
    text, examinations = failure(actual.astype(np.float32), FEATURES)
    assert [pattern.kind for pattern in examinations["x"].patterns] == [kind]
    assert words in " ".join(text.split())
    assert "\n  try " in text


def test_a_few_channels_are_listed() -> None:
    actual = noisy(FEATURES)
    actual[:, 4:7] *= np.float32(1.5)
    assert "[:, 4:7, :, :]" in failure(actual, FEATURES)[0]
    actual = noisy(FEATURES)
    actual[1, (3, 20)] += np.float32(1.0)
    assert "[1, {3, 20}, :, :]" in failure(actual, FEATURES)[0]


def test_a_channel_that_holds_the_large_values_is_no_finding() -> None:
    reference = FEATURES.copy()
    reference[:, 5] *= np.float32(100)
    actual = reference * (1 + np.float32(0.05) * RNG.standard_normal(reference.shape).astype(np.float32))
    assert kinds(actual, reference) == ["spread"]


def test_large_tensors_are_looked_at_in_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concentration, "_EXACT", 1 << 17)
    reference = np.random.default_rng(0).standard_normal((64, 8, 1000)).astype(np.float32)
    actual = reference.copy()
    actual[:, 3] += np.random.default_rng(1).standard_normal((64, 1000)).astype(np.float32)
    text, _ = failure(actual, reference)
    assert "99% of the squared error (of a sample) lies in [:, 3, :]" in " ".join(text.split())


def test_swapped_outputs_are_named() -> None:
    other = RNG.standard_normal(LOGITS.shape).astype(np.float32)
    text, examinations = failure({"a": noisy(other), "b": noisy(LOGITS)}, {"a": LOGITS, "b": other})
    assert {name: found.patterns[0].kind for name, found in examinations.items()} == {"a": "swapped", "b": "swapped"}
    assert "it holds what the reference has in output 'b'" in text
    # Outputs that look alike by themselves are not swapped.
    _, examinations = failure({"a": LOGITS * 1.05, "b": LOGITS * 1.05}, {"a": LOGITS * 1.0, "b": LOGITS * 1.0})
    assert examinations["a"].patterns[0].kind == "scale"


def test_overflow_points_at_the_precision() -> None:
    actual = noisy(LOGITS)
    actual[:, 9] = np.inf
    actual[2, 9] = np.nan
    text, examinations = failure(actual, LOGITS)
    flat = " ".join(text.split())
    assert [pattern.kind for pattern in examinations["x"].patterns] == ["overflow", "place"]
    assert examinations["x"].beyond == 8
    assert "NaN and Inf do not match the reference in 8 elements" in flat
    assert "1 NaN, 7 Inf where the reference has 0 and 0; 8 differ" in flat
    assert "over the elements that are finite on both sides" in flat
    assert "99% of the NaN and infinite elements lie in [:, 9]" in flat
    assert "keep_fp32=" in flat
    assert "max inf" not in flat
    assert kinds(actual, LOGITS, precision="fp32")[0] == "nonfinite"
    assert kinds(LOGITS, actual)[0] == "nonfinite_reference"
    assert "65504: scale" not in failure(actual, LOGITS)[0]
    large = LOGITS * np.float32(1e5)
    clipped = np.where(np.abs(large) > 65504, np.float32(math.inf), large)
    assert "more than the largest FP16 number" in " ".join(failure(clipped, large)[0].split())


def test_saturation_points_at_calibration() -> None:
    actual = np.clip(noisy(LOGITS), -1.5, 1.5)
    text, examinations = failure(actual, LOGITS, "int8")
    assert examinations["x"].patterns[0].kind == "clipped"
    assert "values stop at ±1.5" in text
    assert "calibration=" in text
    assert "keep_fp32=" in failure(actual, LOGITS, "fp16")[0]


def test_a_few_bad_elements_are_counted() -> None:
    reference = RNG.standard_normal(20_000).astype(np.float32)
    actual = noisy(reference)
    actual[::4000] += np.float32(1.0)
    text, examinations = failure(actual, reference)
    assert examinations["x"].beyond == 5
    assert "5 of 20,000 elements (0.025 %)" in text
    assert [pattern.kind for pattern in examinations["x"].patterns] == ["place"]
    actual = reference + np.float32(0.007) * RNG.uniform(-5, 5, reference.shape).astype(np.float32)
    actual[::4000] += np.float32(0.2)
    assert kinds(actual, reference) == ["few"]


@pytest.mark.parametrize("metric", ["max", "abs", "allclose", "l2"])
def test_the_elements_beyond_the_limit_are_counted_by_its_metric(metric: str) -> None:
    actual = noisy(LOGITS) + np.float32(0.1) * noisy(LOGITS[::-1])
    error, r = np.abs(actual.astype(np.float64) - LOGITS), np.abs(LOGITS.astype(np.float64))
    scale: Any = {"max": r.max(), "abs": 1.0, "allclose": 1 + r, "l2": None}[metric]
    _, examinations = failure(actual, LOGITS, tol=0.03, metric=metric)
    expected = None if scale is None else np.count_nonzero(error > 0.03 * scale)
    assert examinations["x"].beyond == expected


def test_integers_speak_of_thresholds() -> None:
    reference = np.arange(50)
    actual = reference.copy()
    actual[3] = 9
    text, examinations = failure(actual, reference)
    assert examinations["x"].patterns[0].kind == "unequal"
    assert "mismatches 0.02 > 0" in text
    assert "1 of 50 elements unequal" in text
    assert "[3]: expected 3, got 9, off by 6" in text
    assert "Tolerance(mismatches=" in text
    words = np.array(["a", "b"], object)
    assert "[0]: expected 'a', got 'b'" in failure(words[::-1], words)[0]


def test_a_long_first_line_is_one_line_again_in_any_terminal() -> None:
    text, _ = failure(FEATURES, np.zeros_like(FEATURES))
    assert "\n    " in text.partition("other metrics")[0]
    whole = folded(text, 400).split("\n")[0]
    assert whole.startswith("output 'x'")
    assert whole.endswith("the reference is all zero, so this is max|actual|, as for abs")


def test_shape_and_dtype_are_said_first() -> None:
    text, examinations = failure(FEATURES.transpose(0, 2, 3, 1), FEATURES)
    assert "another order (0, 2, 3, 1)" in " ".join(text.split())
    assert examinations["x"].patterns[0].kind == "shape"
    text, examinations = failure(LOGITS.astype(np.float16), LOGITS)
    assert "dtype float16 where float32 is expected" in text
    assert [pattern.kind for pattern in examinations["x"].patterns] == ["dtype"]


def test_an_all_zero_reference_is_said() -> None:
    text, examinations = failure(LOGITS, np.zeros_like(LOGITS))
    assert examinations["x"].patterns[0].kind == "zero_reference"
    assert "all zero, so this is max|actual|" in " ".join(text.split())


def test_a_metric_that_cannot_be_computed_gets_advice() -> None:
    zero = np.zeros_like(LOGITS)
    text, examinations = failure(zero, zero, metric="cosine", tol=0.1)
    assert not examinations
    assert "cosine cannot be computed: the reference is all zero (tol=0.1)" in " ".join(text.split())
    assert "judge it by a metric that it has" in text


def test_the_text_has_all_that_was_judged() -> None:
    tol = Tolerance(max=1e-3, cosine=1e-9, l2=0.5)
    text, _ = failure(noisy(LOGITS) * np.float32(1.01), LOGITS, tol=tol)
    flat = " ".join(text.split())
    assert flat.startswith("output 'x' (float32[8, 100]): max 0.0")
    assert "also cosine" in flat
    assert "> 1e-09 (tol)" in flat
    assert "other metrics l2 0.01" in flat
    assert "half of all |errors| are at most" in flat
    assert flat.count("expected") == 3
    text, _ = failure({"x": LOGITS * 2, "y": LOGITS}, {"x": LOGITS, "y": LOGITS})
    assert "1 of 2 outputs passed:\n  output 'y' (float32[8, 100]): max 0 ≤ 0.01 (default for fp16)" in text


def test_many_failed_outputs_stay_readable() -> None:
    reference = {f"output_{index}": LOGITS + index for index in range(12)}
    text, examinations = failure({name: value * 3 for name, value in reference.items()}, reference)
    assert len(examinations) == 12
    assert text.count("looks like") == 5
    assert text.count("output 'output_") == 12


def several(*runs: tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]], tol: TolArgument = 0.01) -> tuple[str, Any]:
    """Merge the runs, and look at each failed output in its worst case, as a check does."""
    names = list(runs[0][1])
    limits = resolve_limits(tol, "max", "fp16", names)
    cases = [measure_all(*run, limits) for run in runs]
    merged = {name: merge([case[name] for case in cases]) for name in names}
    outputs = [judge(merged[name], limits[name]) for name in names]
    found: dict[str, Examination] = {}
    for output in outputs:
        case = worst_case(output)
        found |= examine(*runs[case], merged, [output], "fp16", limits=limits, case=case)
    return explain(merged, outputs, found), found


def test_the_case_is_named_where_there_are_several() -> None:
    text, found = several(*(({"x": LOGITS * np.float32(factor)}, {"x": LOGITS}) for factor in (1.0, 1.0, 1.5)))
    assert "(float32[8, 100], 3 inputs): max 0.5 > 0.01 (tol=0.01, input 2)" in text
    assert f"{found['x'].beyond} of 800 elements of input 2 (" in text
    assert "worst at       input 2 [" in text
    assert found["x"].patterns[0].kind == "scale"
    assert found["x"].beyond == np.count_nonzero(np.abs(LOGITS) * 0.5 > 0.01 * np.abs(LOGITS).max())


def test_each_output_is_looked_at_where_it_fails() -> None:
    good: dict[str, NDArray[Any]] = {"a": LOGITS, "b": np.arange(20)}
    text, found = several((good, good), ({**good, "b": np.arange(20)[::-1]}, good), ({**good, "a": -LOGITS}, good))
    assert (found["a"].case, found["a"].patterns[0].kind) == (2, "sign")
    assert (found["b"].case, found["b"].beyond, found["b"].size) == (1, 20, 20)
    assert "mismatches 0.333 > 0" in text
    limits = resolve_limits(None, "max", "fp16", ["a", "b"])
    cases = [measure_all({**good, "a": LOGITS * f}, good, limits) for f in (1, 2)]
    merged = {name: merge([case[name] for case in cases]) for name in good}
    outputs = [judge(each, limits[name]) for name, each in merged.items()]
    assert not examine(good, good, merged, outputs, "fp16", limits=limits, case=0)


def test_a_shape_that_differs_in_one_case_is_found() -> None:
    good = {"x": LOGITS}
    text, found = several((good, good), ({"x": LOGITS[:4]}, good))
    assert "shape [4, 100] where the reference has [8, 100] (input 1)" in " ".join(text.split())
    assert found["x"].patterns[0].kind == "shape"


def test_values_that_round_alike_are_told_apart() -> None:
    reference = np.array([1000.0, 2.0], np.float64)
    text, _ = failure(reference + np.array([1e-4, 0.0]), reference, tol=1e-9)
    assert "expected 1000, got 1000.0001, off by 0.0001" in text
