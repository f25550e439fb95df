"""Whole parity checks, emulated: each with a fault that the judge must see, or nothing that it could see."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pytest_trtcheck.backends.tensorrt import acceptance
from pytest_trtcheck.bundle.spec_json import spec_from_json, spec_to_json
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.check import checker as check
from pytest_trtcheck.check import message, parity
from pytest_trtcheck.check.arguments import trt_parity
from pytest_trtcheck.check.request import Allowance, Known, Outcome, Request
from pytest_trtcheck.errors import ArgumentError
from pytest_trtcheck.metrics import top1
from pytest_trtcheck.model.ort_runner import OrtRunner
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.precision.lowering import lower
from pytest_trtcheck.precision.reference import Reference
from pytest_trtcheck.record import jsonable
from pytest_trtcheck.report import html, json_report
from pytest_trtcheck.spec import ParitySpec, Tolerance
from tests import onnx_models

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_trtcheck.record import CheckRecord
    from tests.conftest import Suite

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
N = helper.make_node


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def require_schema(report: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="validating the report needs jsonschema")
    schema = json.loads((Path(__file__).parent.parent / "docs" / "report.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(report)


def checked(
    proto: onnx.ModelProto, inputs: object, folder: Path, precision: Any = "fp16", **parity_arguments: Any
) -> CheckRecord:
    spec = ParitySpec(precision=(precision,), **parity_arguments)
    request = Request(nodeid="t", model=proto, folders=(folder,), parity=spec, inputs=inputs, inputs_source="returned")
    return check.Checker(cache=Cache(folder / "cache"), allowance=Allowance(0)).check(request)


# --- parts -----------------------------------------------------------------------------------------------------------


def detector(scores_bias: float = 0.0, *, joined: bool = True, quantized: bool = False) -> onnx.ModelProto:
    """Boxes in pixels and eight scores of 50 anchors: [1, 12, 50]."""
    nodes = [
        N("Mul", ["b", "stride"], ["boxes"], name="scale_boxes"),
        N("Add", ["s", "bias"], ["logits"], name="add_bias"),
        N("Sigmoid", ["logits"], ["scores"], name="sigmoid"),
    ]
    outputs: dict[str, tuple[int, list[int | str]]] = {"scores": (FLOAT, [1, 8, 50])}
    if joined:
        nodes += [N("Concat", ["boxes", "scores"], ["cat"], axis=1, name="concat"), N("Identity", ["cat"], ["y"])]
        outputs = {"y": (FLOAT, [1, 12, 50])}
    weights: dict[str, NDArray[Any]] = {
        "stride": np.array(8, np.float32),
        "bias": np.array(scores_bias, np.float32),
    }
    if quantized:
        nodes[-1:] = [
            N("QuantizeLinear", ["cat", "scale", "zero"], ["q"], name="q"),
            N("DequantizeLinear", ["q", "scale", "zero"], ["y"], name="dq"),
        ]
        weights |= {"scale": np.array(640 / 127, np.float32), "zero": np.array(0, np.int8)}
    inputs: dict[str, tuple[int, list[int | str]]] = {"b": (FLOAT, [1, 4, 50]), "s": (FLOAT, [1, 8, 50])}
    if not joined:
        nodes, inputs = nodes[1:], {"s": inputs["s"]}
    return onnx_models.model(nodes, inputs, outputs, weights)


def feeds(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    boxes, logits = rng(seed).random((1, 4, 50)) * 80, rng(seed + 1).normal(0, 2, (1, 8, 50))
    return {"b": boxes.astype(np.float32), "s": logits.astype(np.float32)}


def test_scores_that_int8_loses_beside_boxes_fail(tmp_path: Path) -> None:
    record = checked(detector(quantized=True), feeds(), tmp_path, "int8")
    scores = 1 / (1 + np.exp(-feeds()["s"]))
    scale = np.float32(640 / 127)
    assert not np.rint(scores / scale).any()
    assert record.verdict == "fail"
    assert record.parity is not None
    assert record.parity.worst == pytest.approx(1.0)
    assert "in part [4:12] along axis 1 (scores)" in str(record.parity.reason)
    assert "part [4:12] along axis 1 (scores)" in str(record.message)
    report = json_report.document([record], json_report.environment())
    require_schema(jsonable(report))
    page = " ".join(html.render(report).split())
    assert "part [4:12] along axis 1 (scores): <span" in page
    whole = checked(detector(quantized=True), feeds(), tmp_path, "int8", tol=Tolerance(max=0.05, parts=None))
    assert whole.verdict == "pass"


def test_a_sound_detector_passes_in_every_precision(tmp_path: Path) -> None:
    for precision in ("fp16", "bf16"):
        record = checked(detector(), feeds(), tmp_path, precision)
        assert record.verdict == "pass"
        assert record.parity is not None
        assert [part.verdict for part in record.parity.outputs[0].parts] == ["pass", "pass"]


def test_scores_that_the_inputs_do_not_exercise_are_said_to_be(tmp_path: Path) -> None:
    record = checked(detector(-14), feeds(), tmp_path)
    assert record.verdict == "pass"
    assert any("(scores): not exercised" in note for note in record.notes)
    alone = checked(detector(-14, joined=False), {"s": feeds()["s"]}, tmp_path)
    assert alone.verdict == "error"
    assert "nothing was compared" in str(alone.message)
    assert "give real inputs" in str(alone.message)
    assert alone.parity is not None
    assert [output.parts[0].verdict for output in alone.parity.outputs] == ["not_measured"]
    assert checked(detector(joined=False), {"s": feeds()["s"]}, tmp_path).verdict == "pass"


def test_each_sample_of_a_batch_counts(tmp_path: Path) -> None:
    """One scale for all: the sample of small values is lost, and was a pass as long as a large one stood beside it."""
    nodes = [
        N("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        N("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        N("DequantizeLinear", ["wq", "scale", "zero"], ["w"]),
        N("MatMul", ["d", "w"], ["y"], name="matmul"),
    ]
    weights: dict[str, NDArray[Any]] = {
        "scale": np.array(1 / 127, np.float32),
        "zero": np.array(0, np.int8),
        "wq": np.eye(32, dtype=np.int8) * np.int8(127),
    }
    proto = onnx_models.model(nodes, {"x": (FLOAT, ["n", 32])}, {"y": (FLOAT, ["m", 32])}, weights)
    large, small = rng().uniform(-1, 1, (2, 1, 32)).astype(np.float32) * np.array([[[1]], [[3e-3]]], np.float32)
    joined = np.concatenate([large, small])
    assert not np.rint(small * 127).any()
    assert checked(proto, {"x": large}, tmp_path, "int8").verdict == "pass"
    assert checked(proto, [{"x": large}, {"x": small}], tmp_path, "int8").verdict == "fail"
    record = checked(proto, {"x": joined}, tmp_path, "int8")
    assert record.verdict == "fail"
    assert "sample 1" in str(record.message)
    assert checked(proto, {"x": joined}, tmp_path, "int8", tol=Tolerance(max=0.05, parts=None)).verdict == "pass"


def test_first_axes_that_are_not_alike_count_no_samples(tmp_path: Path) -> None:
    proto = onnx_models.model(
        [N("MatMul", ["a", "b"], ["y"], name="matmul")],
        {"a": (FLOAT, ["n", 4]), "b": (FLOAT, ["k", 5])},
        {"y": (FLOAT, ["n", 5])},
    )
    cache = Cache(tmp_path / "cache")
    model = open_model(proto, (), cache)
    lowered, reference = lower(model, "fp16", cache), Reference(model, cache)

    def batch(*rows: int) -> tuple[int, ...]:
        cases = [{"a": np.ones((n, 4), np.float32), "b": np.ones((4, 5), np.float32)} for n in rows]
        job = Known(Request("t", proto, ()), model, lowered, cases, reference)
        return parity.limits_of(job)["y"][0].division.batch

    assert batch(4) == (4,)
    assert batch(2) == batch(4, 2) == batch(2, 4) == ()


def test_parts_that_do_not_fit_are_errors_of_the_check(tmp_path: Path) -> None:
    for parts, words in (({"z": [(1, 0, 4)]}, "no such output"), ({"y": [(1, 0, 13)]}, "axis 1 has 12")):
        record = checked(detector(), feeds(), tmp_path, tol=Tolerance(max=0.1, parts=parts))
        assert record.verdict == "error"
        assert words in str(record.message)


# --- places ----------------------------------------------------------------------------------------------------------


def judge_another(proto: onnx.ModelProto, other: onnx.ModelProto, folder: Path) -> tuple[Outcome, str]:
    """`other` judged as if it were the engine of `proto`, and the first line of the failure."""
    cache = Cache(folder / "cache")
    model = open_model(proto, (), cache)
    case = {"x": rng(3).standard_normal((2, 3, 8, 8)).astype(np.float32)}
    reference = Reference(model, cache)
    job = Known(Request("t", proto, ()), model, lower(model, "fp16", cache), [case], reference)
    path = folder / "other.onnx"
    onnx.save(other, path)
    job = replace(job, runner=OrtRunner(path, "other"))
    outcome = parity.judge(job)
    return outcome, str(message.comparison(replace(job, outcome=outcome))).partition("\n")[0]


def two_outputs(names: tuple[str, str], order: list[int] | None = None) -> onnx.ModelProto:
    weights = onnx_models.weights((6, 3, 1, 1), 1), onnx_models.weights((6, 3, 1, 1), 2)
    if order is not None:
        weights = weights[0][order], weights[1]
    nodes = [N("Conv", ["x", f"w{index}"], [name], name=f"conv{index}") for index, name in enumerate(names)]
    shape: tuple[int, list[int | str]] = (FLOAT, [2, 6, 8, 8])
    return onnx_models.model(
        nodes, {"x": (FLOAT, [2, 3, 8, 8])}, dict.fromkeys(sorted(names), shape), {"w0": weights[0], "w1": weights[1]}
    )


def test_swapped_outputs_are_called_swapped(tmp_path: Path) -> None:
    outcome, head = judge_another(two_outputs(("a", "b")), two_outputs(("b", "a")), tmp_path)
    assert outcome.record.verdict == "fail"
    assert head.endswith("outputs 'a' and 'b' are swapped")
    assert outcome.misplaced


def test_permuted_channels_are_called_swapped(tmp_path: Path) -> None:
    order = [0, 1, 3, 2, 4, 5]
    outcome, head = judge_another(two_outputs(("a", "b")), two_outputs(("a", "b"), order), tmp_path)
    assert outcome.record.verdict == "fail"
    assert "output 'a'" in head
    assert "swapped: axis 1 is in another order (3 → 2, 2 → 3)" in head
    assert outcome.misplaced
    wrong = two_outputs(("a", "b"))
    weight = wrong.graph.initializer[0]
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.5, weight.name))
    outcome, head = judge_another(two_outputs(("a", "b")), wrong, tmp_path)
    assert outcome.record.verdict == "fail"
    assert "swapped" not in head
    assert not outcome.misplaced


def doubling(dtype: int = FLOAT) -> onnx.ModelProto:
    factor = np.array(2, onnx.helper.tensor_dtype_to_np_dtype(dtype))
    return onnx_models.model(
        [N("Mul", ["x", "w"], ["y"], name="mul")], {"x": (dtype, [8])}, {"y": (dtype, [8])}, {"w": factor}
    )


def test_a_reference_that_differs_from_itself_is_an_error(tmp_path: Path) -> None:
    """Such as a model of the user's whose Dropout trains: nobody is to look for the fault in the engine."""
    inputs = {"x": np.linspace(-1, 1, 8, dtype=np.float32)}
    generator = rng()

    def random(feeds: Any) -> dict[str, NDArray[Any]]:
        return {"y": 2 * feeds["x"] + generator.normal(0, 0.1, 8).astype(np.float32)}

    record = checked(doubling(), inputs, tmp_path, reference=random)
    assert record.verdict == "error"
    assert "the model is random by itself: two runs of the FP32 reference" in str(record.message)
    steady = checked(doubling(), inputs, tmp_path, reference=lambda feeds: {"y": feeds["x"]})
    assert steady.verdict == "fail"


def test_an_emulated_model_of_doubles_gives_doubles(tmp_path: Path) -> None:
    inputs = {"x": np.linspace(-1, 1, 8, dtype=np.float64)}
    assert checked(doubling(TensorProto.DOUBLE), inputs, tmp_path).verdict == "pass"


# --- nothing to compare ----------------------------------------------------------------------------------------------


def picking(other_output: bool = False) -> onnx.ModelProto:
    """The rows above a threshold: [n, 4], none of them for small inputs; and, if asked, a sum as well."""
    nodes = [
        N("MatMul", ["x", "w"], ["y"], name="matmul"),
        N("ReduceMax", ["x"], ["m"], axes=[1], keepdims=0),
        N("Greater", ["m", "threshold"], ["keep"]),
        N("NonZero", ["keep"], ["found"]),
        N("Squeeze", ["found", "first"], ["rows"]),
        N("Gather", ["y", "rows"], ["picked"], axis=0),
        N("ReduceMean", ["y"], ["mean"], axes=[0], keepdims=0),
    ]
    outputs: dict[str, tuple[int, list[int | str]]] = {"picked": (FLOAT, ["k", 4])}
    if other_output:
        outputs["mean"] = (FLOAT, [4])
    weights: dict[str, NDArray[Any]] = {
        "w": onnx_models.weights((4, 4)),
        "threshold": np.array(5, np.float32),
        "first": np.array([0], np.int64),
    }
    return onnx_models.model(nodes, {"x": (FLOAT, ["n", 4])}, outputs, weights)


@pytest.fixture
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX, where it is installed, has no NonZero; TensorRT has."""
    monkeypatch.setattr(acceptance, "_installed", lambda _: None)


def test_outputs_without_elements_are_an_error(tmp_path: Path, no_tensorrt: None) -> None:
    rows = rng().random((6, 4), dtype=np.float32)
    record = checked(picking(), {"x": rows}, tmp_path)
    assert record.verdict == "error"
    assert "nothing was compared" in str(record.message)
    assert "output 'picked' was not compared: it has no elements" in str(record.message)
    assert checked(picking(), {"x": rows * 20}, tmp_path).verdict == "pass"
    # Among others it is said, and no more.
    record = checked(picking(other_output=True), {"x": rows}, tmp_path)
    assert record.verdict == "pass"
    assert "output 'picked' was not compared: it has no elements" in record.notes
    several = checked(picking(), [{"x": rows}, {"x": rows * 20}], tmp_path)
    assert several.verdict == "pass"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_an_empty_batch_is_an_error(tmp_path: Path, precision: str) -> None:
    empty = np.zeros((0, 4), np.float32)
    for inputs in ({"x": empty}, [{"x": np.ones((2, 4), np.float32)}, {"x": empty}]):
        record = checked(picking(other_output=True), inputs, tmp_path, precision)
        assert record.verdict == "error"
        assert re.search(r"(the inputs hold|inputs\[1\] holds) no elements: x \[0, 4\]", str(record.message))
        assert "at least one row" in str(record.message)


def test_an_output_that_is_all_mask_is_an_error(tmp_path: Path) -> None:
    nodes = [
        N("MatMul", ["x", "w"], ["logits"], name="matmul"),
        N("Greater", ["x", "threshold"], ["keep"]),
        N("Where", ["keep", "logits", "mask"], ["y"]),
    ]
    weights: dict[str, NDArray[Any]] = {
        "w": onnx_models.weights((4, 4)),
        "threshold": np.array(5, np.float32),
        "mask": np.array(-1e4, np.float32),
    }
    proto = onnx_models.model(nodes, {"x": (FLOAT, [6, 4])}, {"y": (FLOAT, [6, 4])}, weights)
    small = rng().random((6, 4), dtype=np.float32)
    record = checked(proto, {"x": small}, tmp_path)
    assert record.verdict == "error"
    assert "-10000" in str(record.message)
    assert checked(proto, {"x": small * 20}, tmp_path).verdict == "pass"


# --- through pytest --------------------------------------------------------------------------------------------------

SEGMENT = """
import onnx
from onnx import helper as h
from pytest_trtcheck import Tolerance, metrics

def model(rank):
    shape = [1, 5, 16, 16][:rank]
    node = h.make_node("Mul", ["x", "w"], ["y"], name="mul")
    values = [h.make_tensor_value_info(n, 1, shape) for n in "xy"]
    w = onnx.numpy_helper.from_array(np.array(1.5, np.float32), "w")
    graph = h.make_graph([node], "g", values[:1], values[1:], [w])
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9)

X = np.random.default_rng(0).standard_normal((1, 5, 16, 16)).astype(np.float32)

@trt_parity(model(4), metric=metrics.top1(axis=1), tol=0.01)
def test_axis():
    return X

@trt_parity(model(4), metric="top1", tol=0.01)
def test_ambiguous():
    return X

@trt_parity(model(4), tol=Tolerance(top1=0.01, top1_axis=1))
def test_in_a_tolerance():
    return X

@trt_parity(model(4), metric=metrics.top1(axis=7), tol=0.01)
def test_no_such_axis():
    return X

@trt_parity(model(4), metric=metrics.top1(axis="1"), tol=0.01)
def test_no_axis():
    return X

@trt_parity(model(4), metric=metrics.top1())
def test_no_tol():
    return X

@trt_parity(model(4), tol=Tolerance(max=0.1, parts={"y": [(1, 0, 2), (1, 2, 5)]}))
def test_parts():
    return X

@trt_parity(model(4), tol=Tolerance(max=0.1, parts={"y": [(1, 2, 0)]}))
def test_wrong_parts():
    return X
"""


def test_axes_and_parts_are_given_in_the_marker(run_everywhere: Any, suite: Suite) -> None:
    suite.write(test_it=SEGMENT)
    run = run_everywhere()
    run.result.assert_outcomes(passed=3, failed=3, errors=2)
    verdicts = {record["nodeid"].rpartition("::")[2]: record["verdict"] for record in run.checks}
    assert verdicts == {
        "test_axis": "pass",
        "test_ambiguous": "error",
        "test_in_a_tolerance": "pass",
        "test_no_such_axis": "error",
        "test_no_axis": "error",
        "test_no_tol": "error",
        "test_parts": "pass",
        "test_wrong_parts": "error",
    }
    messages = {record["nodeid"].rpartition("::")[2]: record["message"] for record in run.checks}
    assert "which axis of shape [1, 5, 16, 16] holds the choices is not clear" in " ".join(
        messages["test_ambiguous"].split()
    )
    assert "no axis 7" in messages["test_no_such_axis"]
    assert "Tolerance.parts['y']" in messages["test_wrong_parts"]
    (judged,) = [each for each in run.check("test_axis")["parity"]["outputs"][0]["judged"] if each["metric"] == "top1"]
    assert judged["note"] == "along axis 1"
    require_schema(run.report)
    parts = run.check("test_parts")["parity"]["outputs"][0]["parts"]
    assert [part["ranges"] for part in parts] == [[[1, 0, 2]], [[1, 2, 5]]]


def test_tolerance_parts_survive_a_bundle() -> None:
    for arguments in (
        {"metric": top1(axis=-2), "tol": 0.5},
        {"tol": Tolerance(top1=0.1, top1_axis=1, parts=None)},
        {"tol": {"y": Tolerance(max=0.1, parts={"y": [(1, 0, 4), (1, 4, None)]})}},
    ):
        spec = trt_parity("m.onnx", **arguments)

        assert spec_from_json(json.loads(json.dumps(spec_to_json(spec)))) == replace(spec, model=None)


def test_parity_that_was_not_checked_says_why() -> None:
    found = parity.not_measured(ParitySpec(precision=("fp16",)), "no GPU")
    assert (found.verdict, found.reason) == ("not_measured", "no GPU")


def test_a_limit_on_top1_is_what_its_axis_is_for() -> None:
    with pytest.raises(ArgumentError, match="top1_axis"):
        trt_parity("m.onnx", tol=Tolerance(max=0.1, top1_axis=1))
