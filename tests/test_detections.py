"""`metrics.detections`: detections matched by where they lie, whatever their order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from pytest_trtcheck import metrics
from pytest_trtcheck.check.arguments import trt_parity
from pytest_trtcheck.compare import judge, measure_all, merge, resolve_limits, unexercised_notes
from pytest_trtcheck.errors import ArgumentError
from pytest_trtcheck.spec import Tolerance
from tests import onnx_models
from tests.onnx_models import FLOAT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_trtcheck.record import OutputRecord
    from tests.conftest import Suite

Outputs = dict[str, "NDArray[Any]"]
NAMES = ("boxes", "scores", "classes")


def found(count: int = 6, images: int = 1, seed: int = 0) -> Outputs:
    """Detections that do not overlap, at least 0.3 sure."""
    rng = np.random.default_rng(seed)
    corners = (np.arange(count) * 50 + rng.random((images, count)) * 10)[..., None] * [1.0, 1.0]
    boxes = np.concatenate([corners, corners + 20 + rng.random((images, count, 2)) * 10], axis=2)
    return {
        "boxes": boxes.astype(np.float32),
        "scores": (0.3 + rng.random((images, count)) * 0.7).astype(np.float32),
        "classes": rng.integers(0, 3, (images, count)),
    }


def shuffled(outputs: Outputs, seed: int = 1) -> Outputs:
    order = np.random.default_rng(seed).permutation(outputs["scores"].shape[1])
    return {name: array[:, order] for name, array in outputs.items()}


def judged(*pairs: tuple[Outputs, Outputs], tol: Any = 0.0, metric: Any = None, **arguments: Any) -> list[OutputRecord]:
    """The records of all outputs of pairs (actual, reference)."""
    metric = metric or metrics.detections(*NAMES, **arguments)
    spec = trt_parity(metric=metric, tol=tol)
    limits = resolve_limits(spec.tol, spec.metric, "fp16", list(pairs[0][1]))
    measured = [measure_all(actual, reference, limits) for actual, reference in pairs]
    return [judge(merge([each[name] for each in measured]), limits[name]) for name in pairs[0][1]]


def value(actual: Outputs, reference: Outputs, **arguments: Any) -> float | None:
    first, *others = judged((actual, reference), tol=0.5, **arguments)
    assert all(other.judged[0].value == first.judged[0].value for other in others)
    return first.judged[0].value


def changed(outputs: Outputs, **what: Any) -> Outputs:
    """The same with elements set: name=(index, value)."""
    copies = {name: array.copy() for name, array in outputs.items()}
    for name, (index, new) in what.items():
        copies[name][index] = new
    return copies


@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 3))
def test_the_order_does_not_matter(seed: int, count: int, images: int) -> None:
    reference = found(count, images, seed)
    assert value(shuffled(reference, seed), reference) == 0
    noisy = {**reference, "boxes": reference["boxes"] + 0.5, "scores": reference["scores"] + 0.05}
    assert value(shuffled(noisy, seed), reference) == 0
    # Either side may be the reference.
    lossy = changed(noisy, scores=((0, 0), 0.0))
    assert value(lossy, reference) == value(reference, lossy)


def test_what_has_no_partner_counts_on_either_side() -> None:
    reference = found(6)
    assert value(changed(reference, scores=((0, 2), 0.0)), reference) == pytest.approx(1 / 11)
    assert value(reference, changed(reference, scores=((0, 2), 0.0))) == pytest.approx(1 / 11)
    assert value(changed(reference, classes=((0, 2), 7)), reference) == pytest.approx(2 / 12)
    assert value(changed(reference, boxes=((0, 2), [900, 900, 950, 950])), reference) == pytest.approx(2 / 12)
    scores = reference["scores"][0, 2] - 0.2
    assert value(changed(reference, scores=((0, 2), scores)), reference, score_threshold=0.05) == pytest.approx(2 / 12)
    everything = {**reference, "scores": np.zeros_like(reference["scores"])}
    assert value(everything, reference) == value(reference, everything) == 1


def test_two_detections_of_one_object_are_no_partners_of_the_same() -> None:
    reference = found(3)
    twice = {name: np.concatenate([array, array[:, :1]], axis=1) for name, array in reference.items()}
    assert value(twice, reference) == pytest.approx(1 / 7)
    assert value(reference, twice) == pytest.approx(1 / 7)


def test_a_score_at_the_threshold_is_no_loss() -> None:
    reference = changed(found(4), scores=((0, 1), 0.2501))
    assert value(changed(reference, scores=((0, 1), 0.2499)), reference) == 0
    assert value(changed(reference, scores=((0, 1), 0.2499)), reference, score_tol=0.0001) == pytest.approx(1 / 7)


def test_another_number_of_detections_is_no_other_shape() -> None:
    reference = found(6)
    fewer = {name: array[:, :5] for name, array in reference.items()}
    assert value(fewer, reference) == pytest.approx(1 / 11)
    nothing = {name: array[:, :0] for name, array in reference.items()}
    assert value(nothing, reference) == 1
    assert value(reference, nothing) == 1
    (record, *_) = judged((nothing, nothing))
    assert record.verdict == "not_measured"
    assert "neither side detects anything" in unexercised_notes([record])[0]


def test_every_input_is_judged_by_itself_and_the_worst_counts() -> None:
    reference, nothing = found(6), {name: array[:, :0] for name, array in found(6).items()}
    lossy = changed(reference, scores=((0, 2), 0.0))
    for tol, verdict in ((0.09, "fail"), (0.1, "pass")):
        (record, *_) = judged((reference, reference), (lossy, reference), (nothing, nothing), tol=tol)
        assert record.verdict == verdict
        assert record.judged[0].case == 1
        assert record.judged[0].value == pytest.approx(1 / 11)
        assert record.judged[0].note == "1 of 11 detections on both sides have no partner"


def test_nan_fails_wherever_it_is() -> None:
    reference = found(6)
    for name in ("boxes", "scores"):
        for record in judged(
            (changed(reference, **{name: ((0, 1, *((0,) if name == "boxes" else ())), np.nan)}), reference), tol=1.0
        ):
            assert record.verdict == "fail"


@pytest.mark.parametrize("form", ["xyxy", "xywh", "cxcywh"])
def test_boxes_are_read_as_their_format_says(form: str) -> None:
    reference = found(6)
    first, second = reference["boxes"][..., :2], reference["boxes"][..., 2:]
    boxes = {
        "xyxy": reference["boxes"],
        "xywh": np.concatenate([first, second - first], axis=2),
        "cxcywh": np.concatenate([(first + second) / 2, second - first], axis=2),
    }[form]
    outputs = {**reference, "boxes": boxes}
    factors = np.array([1, 1, *((1, 1) if form == "xyxy" else (0.6, 0.6))], np.float32)
    smaller = {**outputs, "boxes": outputs["boxes"] * factors}
    assert value(shuffled(outputs), outputs, format=form) == 0
    # A box of 0.36 of the area fits at 0.3 and not at 0.5.
    expected = 0 if form == "xyxy" else 1
    assert value(smaller, outputs, format=form) == expected
    assert value(smaller, outputs, format=form, iou=0.3) == 0


def test_all_in_one_output_or_a_score_for_each_class() -> None:
    reference = found(6, images=2)
    one = np.concatenate([reference["boxes"], reference["scores"][..., None], reference["classes"][..., None]], axis=2)
    joined = {"output": one.astype(np.float32)}
    metric = metrics.detections("output")
    (record,) = judged((shuffled_rows(joined), joined), metric=metric)
    assert record.verdict == "pass"
    swapped = {"output": joined["output"][..., [0, 1, 2, 3, 5, 4]]}
    metric = metrics.detections("output", columns=(0, 1, 2, 3, 5, 4))
    assert judged((shuffled_rows(swapped), swapped), metric=metric)[0].verdict == "pass"
    assert judged((swapped, joined), metric=metric, tol=0.9)[0].verdict == "fail"
    by_class = np.eye(3)[reference["classes"]] * reference["scores"][..., None]
    outputs = {"boxes": reference["boxes"], "scores": by_class.astype(np.float32)}
    metric = metrics.detections("boxes", "scores")
    assert judged((shuffled(outputs), outputs), metric=metric)[0].verdict == "pass"
    other = {**outputs, "scores": outputs["scores"][..., ::-1].copy()}
    assert judged((other, outputs), metric=metric)[0].verdict == "fail"
    counted = {**reference, "n": np.array([[3], [6]])}
    padded = {**counted, "scores": np.where(np.arange(6) < counted["n"], counted["scores"], 1.0).astype(np.float32)}
    metric = metrics.detections(*NAMES, count="n")
    assert [each.verdict for each in judged((padded, counted), metric=metric)] == ["pass"] * 4


def shuffled_rows(outputs: Outputs) -> Outputs:
    return {name: array[:, ::-1] for name, array in outputs.items()}


@pytest.mark.parametrize(
    ("outputs", "metric", "said"),
    [
        ({"boxes": np.zeros((1, 6, 84))}, metrics.detections("boxes", "boxes"), "expected [images, detections, 4]"),
        ({"boxes": np.zeros((1, 6, 5))}, metrics.detections("boxes"), "expected [images, detections, 6 or more]"),
        ({"boxes": np.zeros((6,))}, metrics.detections("boxes"), "is [6]"),
        (
            {"boxes": np.zeros((1, 6, 4)), "scores": np.zeros((1, 5))},
            metrics.detections("boxes", "scores"),
            "output 'scores' has [1, 5] beside boxes of [1, 6, 4]",
        ),
        (
            {"boxes": np.zeros((2, 6, 6)), "n": np.zeros(3)},
            metrics.detections("boxes", count="n"),
            "output 'n' has 3 counts of 2 images",
        ),
        *(
            ({"boxes": np.ones((2, 6, 6)), "n": np.array([6, bad])}, metrics.detections("boxes", count="n"), said)
            for bad, said in ((-1, "output 'n' says -1 of 6 detections"), (7, "output 'n' says 7 of 6 detections"))
        ),
    ],
)
def test_outputs_that_are_no_detections_are_an_error_and_no_pass(outputs: Outputs, metric: Any, said: str) -> None:
    (record, *_) = judged((outputs, outputs), metric=metric, tol=1.0)
    assert record.verdict == "error"
    assert said in str(record.judged[0].note)


@pytest.mark.parametrize("bad", [-1, 100, 2**31 - 1])
def test_a_count_that_is_none_is_no_pass(bad: int) -> None:
    reference = {**found(6), "n": np.array([5])}
    reference["scores"][0, 5] = 0  # padded
    metric = metrics.detections(*NAMES, count="n")
    assert {each.verdict for each in judged((reference, reference), metric=metric)} == {"pass"}
    (verdict,) = {each.verdict for each in judged(({**reference, "n": np.array([bad])}, reference), metric=metric)}
    assert verdict == "error"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"iou": 0}, "iou (above 0, at most 1)"),
        ({"iou": float("nan")}, "iou"),
        ({"format": "yxyx"}, "format (xyxy, xywh or cxcywh)"),
        ({"score_tol": -1}, "score_tol (at least 0)"),
        ({"columns": (0, 1, 2, 3)}, "columns"),
        ({"classes": "classes"}, "classes= needs scores="),
        ({"scores": 1}, "boxes, scores"),
    ],
)
def test_arguments_are_checked_when_the_metric_is_made(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        metrics.detections("boxes", **arguments)
    assert said in str(caught.value)


def test_limits_say_what_they_are_of() -> None:
    metric = metrics.detections(*NAMES)
    names = [*NAMES, "embedding"]
    limits = resolve_limits(Tolerance(metrics={metric: 0.1}), "max", "fp16", names)
    assert [limits[name][0].metric.name for name in names] == ["detections"] * 3 + ["max"]
    assert "none of the outputs that are judged together" in limits["embedding"][0].source
    limits = resolve_limits((("boxes", Tolerance(metrics={metric: 0.1})),), "max", "fp16", names)
    assert [limits[name][0].metric.name for name in names] == ["detections"] * 3 + ["max"]
    with pytest.raises(ArgumentError, match="the model has no output 'classes'"):
        resolve_limits(0.1, metric, "fp16", ["boxes", "scores"])
    with pytest.raises(ArgumentError, match="judges 'boxes' alone"):
        resolve_limits(Tolerance(max=0.1, metrics={metric: 0.1}), "max", "fp16", list(NAMES))
    with pytest.raises(ArgumentError, match="has no default tolerance"):
        resolve_limits(None, metric, "fp16", list(NAMES))


def test_a_metric_of_ones_own_may_be_of_several_outputs() -> None:
    def fewer(joint: metrics.Joint) -> float:
        return float(joint.actual["scores"].size < joint.reference["scores"].size)

    metric = metrics.Metric("fewer", fewer, joins=("boxes", "scores"), default=lambda _: 0.0)
    reference = {name: array for name, array in found(6).items() if name != "classes"}
    fewer_of_them = {name: array[:, :5] for name, array in reference.items()}
    spec = trt_parity(metric=metric, tol=0.0)
    limits = resolve_limits(spec.tol, spec.metric, "fp16", list(reference))
    for actual, verdict in ((shuffled(reference), "pass"), (fewer_of_them, "fail")):
        measured = measure_all(actual, reference, limits)
        assert [judge(each, limits[name]).verdict for name, each in measured.items()] == [verdict] * 2


SUITE = """
from pytest_trtcheck import metrics
DETECTIONS = metrics.detections("boxes", "scores")

def images():
    rng = np.random.default_rng(0)
    corners = np.arange(8)[None, :, None] * 60 + rng.random((2, 8, 2)) * 9
    scores = 0.4 + rng.random((2, 8, 1)) / 2
    return {"image": np.concatenate([corners, corners + 30, scores], axis=2).astype(np.float32)}

@trt_parity("same.onnx", metric=DETECTIONS, tol=0.0)
def test_sound(): return images()

@trt_parity("reversed.onnx", reference="same.onnx", metric=DETECTIONS, tol=0.0)
def test_another_order(): return images()

@trt_parity("reversed.onnx", reference="same.onnx", tol=0.1)
def test_another_order_by_elements(): return images()

@trt_parity("lost.onnx", reference="same.onnx", metric=DETECTIONS, tol=0.05)
def test_one_in_eight_lost(): return images()
"""


def test_a_detector_in_pytest(suite: Suite) -> None:
    for name, nodes in {
        "same": [],
        "reversed": [helper.make_node("Slice", ["m", "last", "first", "axis", "back"], ["y"])],
        "lost": [helper.make_node("Slice", ["m", "one", "all", "axis"], ["y"])],
    }.items():
        tail = nodes or [helper.make_node("Identity", ["m"], ["y"])]
        proto = onnx_models.model(
            [
                helper.make_node("MatMul", ["image", "w"], ["m"]),
                *tail,
                helper.make_node("Slice", ["y", "zero", "four", "columns"], ["boxes"]),
                helper.make_node("Slice", ["y", "four", "five", "columns"], ["column"]),
                helper.make_node("Squeeze", ["column", "columns"], ["scores"]),
            ],
            {"image": (FLOAT, ["N", 8, 5])},
            {"boxes": (FLOAT, ["N", "M", 4]), "scores": (FLOAT, ["N", "M"])},
            {"w": np.eye(5, dtype=np.float32), "axis": np.array([1]), "columns": np.array([2]), "back": np.array([-1])}
            | {"last": np.array([7]), "first": np.array([-99]), "one": np.array([1]), "all": np.array([99])}
            | {"zero": np.array([0]), "four": np.array([4]), "five": np.array([5])},
        )
        onnx_models.save(proto, suite.path / f"{name}.onnx")
    suite.write(test_detector=SUITE)
    run = suite.run("--trt-html=r.html", "--trt-bundle=bundles")
    verdicts = {check["nodeid"].split("::test_")[1]: check["verdict"] for check in run.checks}
    assert verdicts == {
        "sound": "pass",
        "another_order": "pass",
        "another_order_by_elements": "fail",
        "one_in_eight_lost": "fail",
    }
    lost = run.check("test_one_in_eight_lost")
    assert lost["parity"]["worst"] == pytest.approx(2 / 30)
    message = " ".join(lost["message"].split())
    assert "detections 0.0667 > 0.05 (tol=0.05): 2 of 30 detections on both sides have no partner" in message
    assert any("not diagnosed: detections are compared as sets" in note for note in lost["notes"])
    assert "detections ≤ 0.05" in run.text
    replay = suite.run("bundles/test_detector.py-test_one_in_eight_lost/bundle.json")
    assert replay.checks[0]["parity"]["worst"] == lost["parity"]["worst"]
    assert replay.checks[0]["verdict"] == "fail"


@pytest.mark.parametrize(("sign", "least"), [(-1.0, -9.0), (1.0, 1.5)], ids=["other order", "fewer"])
def test_behind_nms_another_order_or_number_names_the_metric(suite: Suite, sign: float, least: float) -> None:
    for name, factor, lowest in (("reference", 1.0, -9.0), ("changed", sign, least)):
        proto = onnx_models.model(
            [
                helper.make_node("MatMul", ["rows", "w"], ["m"]),
                helper.make_node("Split", ["m", "sizes"], ["boxes", "column"], axis=2),
                helper.make_node("Transpose", ["column"], ["scores"], perm=[0, 2, 1]),
                helper.make_node("NonMaxSuppression", ["boxes", "scores", "most", "iou", "lowest"], ["kept"]),
                helper.make_node("Gather", ["kept", "two"], ["index"], axis=1),
                helper.make_node("Gather", ["m", "index"], ["found"], axis=1),
            ],
            {"rows": (FLOAT, [1, 8, 5])},
            {"found": (FLOAT, [1, "n", 5])},
            {"w": np.diag([1, 1, 1, 1, factor]).astype(np.float32), "sizes": np.array([4, 1]), "two": np.array(2)}
            | {"most": np.array([8]), "iou": np.array([0.5], np.float32)}
            | {"lowest": np.array([lowest], np.float32)},
        )
        onnx_models.save(proto, suite.path / f"{name}.onnx")
    suite.write(
        test_nms="""
@trt_parity("changed.onnx", reference="reference.onnx")
def test_rows():
    corners = np.arange(8.0)[:, None] * 60 * np.ones(2)
    return np.concatenate([corners, corners + 30, np.arange(8.0)[:, None]], axis=1)[None].astype(np.float32)
"""
    )
    message = suite.run("--trt-backend=onnxruntime", "--trt-diagnose=0").check("test_rows")["message"]
    assert "metric=metrics.detections(…) matches them by where they lie" in " ".join(message.split())
