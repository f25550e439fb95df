"""Metrics of a user's own, and the example in the documentation as it stands."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_trtcheck.bundle import spec_from_json, spec_to_json
from pytest_trtcheck.check.arguments import trt_parity
from pytest_trtcheck.compare import explain, judge, loose_notes, measure, merge, resolve_limits, summarize
from pytest_trtcheck.errors import ArgumentError
from pytest_trtcheck.metrics import METRICS, Compared, Metric, Score, of_arrays, recorded, top1
from pytest_trtcheck.spec import ParitySpec, Tolerance
from tests import onnx_models
from tests.test_markers import outcomes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_trtcheck.record import OutputRecord
    from tests.conftest import Suite

ROOT = Path(__file__).resolve().parent.parent
EVEN = np.linspace(-1, 1, 101).astype(np.float32)


def example(section: str) -> dict[str, str]:
    """The code of a section of docs/extending.md: the text of each block by the file that its first line names."""
    text = (ROOT / "docs/extending.md").read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    blocks = re.findall(r'```python title="(\S+)"\n(.*?)```', text, re.DOTALL)
    assert all(len(code.splitlines()) < 40 for _, code in blocks)
    return dict(blocks)


def mean_error(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.mean(np.abs(actual - expected)))


def judged(
    metric: Any, *pairs: tuple[NDArray[Any], NDArray[Any]], tol: Any = 0.1, expected: str | None = None
) -> OutputRecord:
    spec = trt_parity(metric=metric, tol=tol)
    limits = resolve_limits(spec.tol, spec.metric, "fp16", ["x"])["x"]
    found = judge(merge([measure("x", *pair, limits=limits) for pair in pairs]), limits)
    assert expected is None or found.verdict == expected, found
    return found


def test_a_callable_is_judged_by_its_tolerance_and_named_by_its_name() -> None:
    metric = trt_parity(metric=mean_error, tol=0.1).metric
    (limit, _) = resolve_limits(0.1, metric, "fp16", ["x"])["x"]
    assert (limit.metric, limit.limit, limit.source) == (metric, 0.1, "tol=0.1")
    passed = judged(mean_error, (EVEN + np.float32(0.05), EVEN), expected="pass")
    assert passed.judged[0].metric == "mean_error"
    assert passed.judged[0].value == pytest.approx(0.05, rel=1e-5)
    failed = judged(mean_error, (EVEN + np.float32(0.5), EVEN), expected="fail")
    parity = summarize([failed], "mean_error")
    assert parity.reason == "output 'x': mean_error 0.5 > 0.1 (tol=0.1)"
    assert not loose_notes([judged(mean_error, (EVEN, EVEN))])


def test_it_gets_whole_fp64_arrays_of_its_own() -> None:
    def spoils(actual: NDArray[Any], expected: NDArray[Any]) -> float:
        assert actual.dtype == expected.dtype == np.float64
        assert actual.shape == (3, 1 << 17)
        actual[:] = expected[:] = 0
        return 0.0

    reference = np.ones((3, 1 << 17), np.float16)
    judged(spoils, (reference, reference), (reference, reference), expected="pass")
    assert reference.all()


def raises(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    raise ValueError("no such axis")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (raises, "raises failed: ValueError: no such axis"),
        (lambda *_: math.nan, "<lambda> gave NaN"),
        (lambda *_: None, "<lambda> failed: TypeError"),
        (lambda actual, _: actual, "<lambda> failed: TypeError"),
        (lambda *_: "0.0", "gave '0.0', which is no number"),
        (lambda actual, _: np.array_equal(actual, EVEN), "gave True, which is no number"),
        (lambda actual, expected: (actual == expected).all(), "which is no number"),
        (lambda *_: 10**400, "OverflowError"),
        (lambda _: 0.0, "failed: TypeError"),
    ],
)
def test_what_it_can_not_compute_is_an_error_that_names_it(function: Any, says: str) -> None:
    for pairs in ([(EVEN, EVEN)], [(EVEN, EVEN), (EVEN, EVEN)]):
        found = judged(function, *pairs, expected="error")
        assert found.judged[0].verdict == "error"
        assert says in str(found.judged[0].note)
        assert says in str(summarize([found], "max").reason)
    spec = trt_parity(metric=function, tol=0.1)
    limits = resolve_limits(spec.tol, spec.metric, "fp16", ["x"])["x"]
    text = explain({"x": measure("x", EVEN, EVEN, limits=limits)}, [found])
    assert function.__name__ in text
    assert "judge it by a metric that it has" not in text


def test_one_input_that_fails_or_can_not_be_computed_is_enough() -> None:
    def of_ones(actual: NDArray[Any], expected: NDArray[Any]) -> float:
        return math.nan if expected[0] == 2 else float(actual[0] - expected[0])

    one, two = np.ones(4), np.full(4, 2.0)
    assert judged(of_ones, (one, one), (one + 1, one), (one, one), expected="fail").judged[0].case == 1
    assert judged(of_ones, (one, one), (two, two), expected="error").judged[0].case == 1
    most = of_arrays(lambda actual, _: float(actual[0]), name="most", at_least=True)
    assert judged(most, (two, one), (one, one), tol=1.5, expected="fail").judged[0].case == 1


def test_a_difference_with_a_sign_is_no_distance() -> None:
    def bias(actual: NDArray[Any], expected: NDArray[Any]) -> float:
        return float((actual - expected).mean())

    lost = judged(bias, (EVEN - 5, EVEN), (EVEN, EVEN), expected="error")
    assert "bias gave -5: expected a distance, which is 0 where both are equal" in str(lost.judged[0].note)
    judged(bias, (EVEN + 5, EVEN), expected="fail")
    # Within the limit it is within it, and what rounding brings below 0 is 0.
    judged(bias, (EVEN - np.float32(0.05), EVEN), expected="pass")
    judged(lambda *_: -2e-16, (EVEN, EVEN), tol=0.0, expected="pass")


def test_nan_on_one_side_alone_fails_without_asking_it() -> None:
    broken = EVEN.copy()
    broken[3] = math.nan
    for metric in (raises, lambda *_: 0.0, of_arrays(raises, name="most", at_least=True)):
        found = judged(metric, (broken, EVEN), expected="fail")
        assert not METRICS.keys() & {entry.metric for entry in found.judged}
    # Alike on both sides, it is for the callable to say.
    judged(mean_error, (broken, broken), expected="error")
    judged(lambda actual, expected: float(np.nanmean(np.abs(actual - expected))), (broken, broken), expected="pass")


def test_the_least_that_it_may_be_is_said_in_record_and_message() -> None:
    most = of_arrays(lambda actual, _: float(actual.max()), name="most", at_least=True)
    found = judged(most, (EVEN / 2, EVEN), tol=0.75, expected="fail")
    (entry,) = (each for each in found.judged if each.metric == "most")
    assert (entry.value, entry.limit, entry.verdict, entry.at_least) == (0.5, 0.75, "fail", True)
    assert summarize([found], "max").reason == "output 'x': most 0.5 < 0.75 (tol=0.75)"
    assert most.used(0.5, 0.75) == 1.5
    assert recorded("most", at_least=True).used(0.5, 0.75) == 1.5
    judged(most, (EVEN, EVEN), tol=0.75, expected="pass")


def test_integers_and_booleans_are_left_to_it_where_the_tolerance_lets_them_differ() -> None:
    labels = np.arange(40) % 5
    wrong = labels.copy()
    wrong[:10] = 4 - wrong[:10]
    for actual, reference in ((wrong, labels), (wrong > 1, labels > 1)):
        judged(mean_error, (actual, reference), tol=10.0, expected="fail")
        for tol, verdict in ((10.0, "pass"), (0.01, "fail")):
            found = judged("max", (actual, reference), tol=Tolerance(mismatches=1.0, metrics={mean_error: tol}))
            assert found.verdict == verdict
            value = np.mean(np.abs(actual.astype(float) - reference))
            assert (found.judged[1].metric, found.judged[1].value) == ("mean_error", value)


def test_every_limit_of_a_tolerance_must_hold() -> None:
    tolerance = Tolerance(max=1.0, metrics={mean_error: 0.1})
    found = judged("max", (EVEN + np.float32(0.2), EVEN), tol=tolerance, expected="fail")
    assert [(entry.metric, entry.verdict) for entry in found.judged] == [("max", "pass"), ("mean_error", "fail")]


def test_a_metric_of_sums_needs_no_arrays() -> None:
    def of(compared: Compared) -> Score | float:
        return compared.dd / compared.rr if compared.rr else Score(None, "the reference is all zero")

    nmse = Metric("nmse", of, default=lambda precision: 1e-4 if precision == "fp16" else 1e-2)
    found = judged(nmse, (EVEN * np.float32(1.005), EVEN), tol=None, expected="pass")
    assert found.judged[0].value == pytest.approx(2.5e-5, rel=1e-3)
    assert found.judged[0].source == "default for fp16"
    judged(nmse, (EVEN * np.float32(1.02), EVEN), tol=None, expected="fail")
    judged(nmse, (EVEN * 0, EVEN * 0), tol=None, expected="error")
    judged(replace(nmse, on_demand=False), (EVEN * np.float32(1.02), EVEN), tol=None, expected="fail")
    labels = np.arange(10)
    judged("max", (labels, labels), tol=Tolerance(mismatches=1.0, metrics={nmse: 0.1}), expected="pass")
    judged("max", (labels + 9, labels), tol=Tolerance(mismatches=1.0, metrics={nmse: 0.1}), expected="fail")
    for given in (lambda compared: compared.dd / 0, lambda _: math.nan, lambda _: Score(False), lambda _: Score(None)):
        metric = Metric("nmse", given)
        assert "nmse" in str(judged(metric, (EVEN, EVEN), expected="error").judged[0].note)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"metric": mean_error}, "metric=mean_error: needs tol="),
        ({"metric": mean_error, "tol": "0.1"}, "tol='0.1'"),
        ({"metric": mean_error, "tol": math.nan}, "tol=nan"),
        ({"metric": 3, "tol": 0.1}, "metric=3"),
        ({"metric": max, "tol": 0.1}, "metric=max: a metric of that name is built in"),
        ({"metric": Metric("max", lambda _: 0.0, on_demand=False), "tol": 0.1}, "metric=max: a metric of that name"),
        ({"metric": of_arrays(mean_error, name="top1"), "tol": 0.1}, "metric=top1: a metric of that name"),
        ({"metric": of_arrays(mean_error, name="nonfinite"), "tol": 0.1}, "metric=nonfinite: a metric of that name"),
        ({"tol": Tolerance(mx=0.1)}, "Tolerance has no limit 'mx'"),
        ({"tol": Tolerance(metrics={mean_error: math.nan})}, r"Tolerance.metrics\[mean_error\]"),
        ({"tol": Tolerance(metrics={3: 0.1})}, "metric=3"),
        ({"metric": "l2", "tol": Tolerance(max=0.1)}, r"metric=l2 limits nothing.*\n.*Tolerance\(l2=…\)"),
        ({"metric": mean_error, "tol": {"a": Tolerance(max=0.1), "*": Tolerance(l2=1)}}, "metric=mean_error limits no"),
        ({"metric": top1(axis=1), "tol": Tolerance(max=0.1)}, "metric=top1 limits nothing"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        trt_parity("m.onnx", **arguments)


def test_a_metric_may_stand_beside_a_tolerance_that_leaves_it_something() -> None:
    for metric, tol in (
        ("l2", Tolerance(mismatches=0.1)),
        ("l2", {"a": Tolerance(max=0.1), "*": 0.1}),
        ("l2", Tolerance(l2=0.1, max=0.2)),
        (top1(axis=1), Tolerance(top1=0.1)),
        (mean_error, Tolerance(metrics={mean_error: 0.1})),
    ):
        trt_parity("m.onnx", metric=metric, tol=tol)


def test_two_metrics_of_one_name_are_refused() -> None:
    two: Any = Tolerance(metrics={lambda *_: 0.0: 0.1, lambda *_: 1.0: 0.1})
    with pytest.raises(ArgumentError, match="two metrics have one name"):
        resolve_limits(two, "max", "fp16", ["x"])


def test_a_bundle_names_the_callable_and_is_not_replayed() -> None:
    for spec in (
        trt_parity("m.onnx", metric=mean_error, tol=0.1),
        trt_parity("m.onnx", tol=Tolerance(max=0.1, metrics={mean_error: 1})),
    ):
        assert isinstance(spec, ParitySpec)
        with pytest.raises(ArgumentError, match="judged by mean_error, which is code"):
            spec_from_json(spec_to_json(spec))


def test_the_documented_metrics(suite: Suite) -> None:
    code = example("Metric")
    onnx_models.save(onnx_models.conv_net(1), suite.path / "upscaler.onnx")
    suite.write(**{name.removesuffix(".py"): text for name, text in code.items()})
    suite.write(
        test_bad="""
def worst(actual, expected):
    return 1 / (expected.size - expected.size)

def never(actual, expected):
    return 1.0

@trt_parity("upscaler.onnx", metric=worst, tol=1)
def test_error(): ...

@trt_parity("upscaler.onnx", metric=never, tol=0.5)
def test_fail(): ...

@trt_parity("upscaler.onnx", metric=never)
def test_without(): ...

def blind(actual, expected):
    return float(abs(expected - expected).max())

@trt_parity("upscaler.onnx", metric=blind, tol=0.5)
def test_blind(): ...

@trt_parity("upscaler.onnx", tol=Tolerance(max=0.01, metrics={blind: 0.5}))
def test_blind_beside_another(): ...
"""
    )
    run = suite.run()
    assert outcomes(run) == {
        "test_pixels": "pass",
        "test_noise": "pass",
        "test_both": "pass",
        "test_error": "error",
        "test_fail": "fail",
        "test_without": "error",
        "test_blind": "error",
        "test_blind_beside_another": "pass",
    }
    assert "worst failed: ZeroDivisionError" in " ".join(run.text.split())
    assert "never 1 > 0.5 (tol=0.5)" in run.text
    assert "metric=never: needs tol=" in run.text
    tells = "metric blind: an output 'logits' of zeros, and one with all signs changed, would keep 0.5 as well"
    assert tells in run.check("test_blind")["message"]
    assert any(tells in note for note in run.check("test_blind_beside_another")["notes"])
    parity = run.check("test_noise")["parity"]
    assert (parity["metric"], parity["tol"], parity["tol_source"]) == ("psnr", 40.0, "default for fp16")
