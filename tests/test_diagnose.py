"""Planted faults of the precision, and whether the diagnosis names them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pytest_trtcheck.diagnose import Blame, Budget, diagnose, explain
from pytest_trtcheck.record import jsonable
from pytest_trtcheck.spec import Calibration
from tests import onnx_models
from tests.diagnosed import (
    FLOAT,
    Bench,
    Case,
    all_tensors,
    assert_users_names,
    conv_chain,
    image,
    overflowing_block,
    set_weight,
    weight,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pytest_trtcheck.diagnose import Subject
    from tests.conftest import Suite


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def blamed(bench: Bench, subject: Subject, **budget: Any) -> Blame:
    """The diagnosis, checked for what holds of each: it is JSON, and its text fits a terminal."""
    found = diagnose(subject, bench.cache, budget=Budget(**budget))
    assert found is not None
    plain = json.loads(json.dumps(jsonable(found.to_dict()), allow_nan=False))
    for text in (explain(found.to_dict()), explain(plain)):
        assert text.splitlines()[0].startswith("  to blame     the precision: ")
        assert all(len(line) <= 100 for line in text.splitlines() if '"' not in line)
    assert found.errors.total == found.errors.lowered == pytest.approx(bench.error(subject), rel=1e-3, nan_ok=True)
    assert_users_names(subject, found)
    return found


def assert_advice_holds(bench: Bench, subject: Subject, found: Blame, most: int) -> None:
    """The names can be pasted: lowered so, by the way that a check goes, every input passes; and none is needless."""
    assert found.keep_fp32
    assert found.confirmed
    assert len(found.keep_fp32) <= most
    limit = found.errors.limit
    assert limit is not None
    errors = [bench.error(subject, found.keep_fp32, index) for index in range(len(subject.cases))]
    assert max(errors) <= limit
    assert found.keep_value == pytest.approx(max(errors), rel=1e-3)
    for name in found.keep_fp32:
        fewer = [each for each in found.keep_fp32 if each != name]
        assert not max(bench.error(subject, fewer, index) for index in range(len(subject.cases))) <= limit


# --- overflow and underflow ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [0, 2, 5])
def test_an_overflow_in_one_block(bench: Bench, block: int) -> None:
    subject = bench.failed(conv_chain(6, extra=overflowing_block(block)), "fp16", [image()])
    found = blamed(bench, subject)
    assert found.step == "precision"
    assert found.culprit is not None
    assert (found.culprit.kind, found.culprit.tensor, found.culprit.node) == ("overflow", "scaled_up", "scale_up")
    assert "overflow" in found.headline
    largest = float(np.abs(all_tensors(subject.model.path, subject.case)["scaled_up"]).max())
    assert found.culprit.max_abs == pytest.approx(largest, rel=1e-5)
    assert f"{largest:,.6g} is beyond FP16's largest value, 65,504" in found.culprit.detail
    assert_advice_holds(bench, subject, found, most=2)
    row = next(row for row in found.tensors if row["name"] == "scaled_up")
    assert row["overflow"] == np.count_nonzero(
        np.abs(all_tensors(subject.model.path, subject.case)["scaled_up"]) >= 65520
    )


def test_bf16_has_no_overflow_there(bench: Bench) -> None:
    subject = bench.failed(conv_chain(4, extra=overflowing_block(2)), "bf16", [image()], tol=1e-6)
    found = blamed(bench, subject)
    assert found.culprit is None or found.culprit.kind != "overflow"
    assert all(not row["overflow"] for row in found.tensors)


def test_an_overflow_on_a_later_input_alone(bench: Bench) -> None:
    """The input that fails is the second one; keep_fp32 is confirmed on both."""
    proto = conv_chain(3, extra=overflowing_block(1))
    set_weight(proto, "big", np.array(3e3, np.float32))
    cases = [image(low=-0.1, high=0.1), image(1, low=-20, high=20)]
    subject = bench.failed(proto, "fp16", cases)
    assert bench.error(subject, case=0) < 0.01
    from dataclasses import replace

    subject = replace(subject, worst=1)
    found = diagnose(subject, bench.cache)
    assert found is not None
    assert found.culprit is not None
    assert (found.culprit.kind, found.culprit.tensor) == ("overflow", "scaled_up")
    assert_advice_holds(bench, subject, found, most=2)


def test_an_epsilon_that_fp16_flushes_to_zero(bench: Bench) -> None:
    """1e-9 is 0 in FP16, and the division gives infinity."""
    nodes = [
        helper.make_node("Mul", ["x", "zero"], ["nothing"], "nothing"),
        helper.make_node("Add", ["nothing", "epsilon"], ["shifted"], "add_epsilon"),
        helper.make_node("Div", ["epsilon", "shifted"], ["one"], "divide"),
        helper.make_node("Mul", ["x", "one"], ["y"], "last"),
    ]
    weights = {"zero": np.zeros(1, np.float32), "epsilon": np.full(1, 1e-9, np.float32)}
    subject = bench.failed(
        onnx_models.elementwise(nodes, 8, weights), "fp16", [{"x": np.linspace(1, 2, 8, dtype=np.float32)}]
    )
    found = blamed(bench, subject)
    assert found.culprit is not None
    assert (found.culprit.kind, found.culprit.node, found.culprit.tensor) == ("underflow", "add_epsilon", "epsilon")
    assert "the constant 1e-09 becomes 0" in found.culprit.detail
    assert "0/0" in found.culprit.detail
    assert found.headline == "constant 'epsilon' underflows"
    assert found.keep_fp32 is not None
    assert set(found.keep_fp32) == {"add_epsilon", "divide"}


def test_cancellation(bench: Bench) -> None:
    """(x + 1000) − 1000 leaves x with three digits less."""
    nodes = [
        helper.make_node("Add", ["x", "thousand"], ["shifted"], "shift"),
        helper.make_node("Sub", ["shifted", "thousand"], ["back"], "shift_back"),
        helper.make_node("Mul", ["back", "two"], ["y"], "double"),
    ]
    weights = {"thousand": np.full(1, 1000, np.float32), "two": np.full(1, 2, np.float32)}
    case = {"x": np.random.default_rng(0).uniform(-1, 1, 64).astype(np.float32)}
    subject = bench.failed(onnx_models.elementwise(nodes, 64, weights), "fp16", [case])
    found = blamed(bench, subject)
    assert found.culprit is not None
    assert (found.culprit.kind, found.culprit.node) == ("cancellation", "shift_back")
    assert "operands of up to 1001" in found.culprit.detail
    assert found.keep_fp32 == ("shift", "shift_back")
    assert_advice_holds(bench, subject, found, most=2)


def test_a_mask_that_overflows_harmlessly_is_not_blamed(bench: Bench) -> None:
    """−1e9 becomes −inf in FP16, and 0 behind the Softmax, as in FP32. What is wrong comes later."""
    nodes = [
        helper.make_node("Mul", ["mask", "minus"], ["bias"], "mask_bias"),
        helper.make_node("Add", ["x", "bias"], ["scores"], "add_mask"),
        helper.make_node("Softmax", ["scores"], ["probabilities"], "softmax", axis=-1),
        helper.make_node("Add", ["probabilities", "probabilities"], ["twice"], "twice"),
        helper.make_node("Mul", ["twice", "big"], ["up"], "up"),
        helper.make_node("Div", ["up", "big"], ["y"], "down"),
    ]
    proto = onnx_models.model(
        nodes,
        {"x": (FLOAT, [4, 8]), "mask": (FLOAT, [4, 8])},
        {"y": (FLOAT, [4, 8])},
        {"minus": np.array(-1e9, np.float32), "big": np.array(6e4, np.float32)},
    )
    rng = np.random.default_rng(0)
    case = {"x": 5 * rng.standard_normal((4, 8)).astype(np.float32), "mask": np.eye(4, 8, dtype=np.float32)}
    subject = bench.failed(proto, "fp16", [case])
    found = blamed(bench, subject)
    assert next(row for row in found.tensors if row["name"] == "bias")["overflow"] == 4
    assert found.culprit is not None
    assert (found.culprit.kind, found.culprit.node) == ("overflow", "up")
    assert_advice_holds(bench, subject, found, most=2)
    assert set(found.keep_fp32 or ()) == {"up", "down"}


def test_the_names_hold_where_batch_normalization_is_folded(bench: Bench) -> None:
    """keep_fp32 takes the user's node names; what is lowered has no BatchNormalization any more."""
    proto = conv_chain(3)
    scale = {name: np.ones(8, np.float32) for name in ("scale", "mean", "variance")}
    scale["scale"] = np.full(8, 5e4, np.float32)
    for name, array in {**scale, "shift": np.zeros(8, np.float32)}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    proto.graph.node[2].output[0] = "before_norm"
    norm = helper.make_node(
        "BatchNormalization", ["before_norm", "scale", "shift", "mean", "variance"], ["normed"], "norm"
    )
    down = helper.make_node("Div", ["normed", "big"], ["c1"], "down")
    proto.graph.node.insert(3, norm)
    proto.graph.node.insert(4, down)
    subject = bench.failed(proto, "fp16", [image()])
    found = blamed(bench, subject)
    assert found.culprit is not None
    assert (found.culprit.kind, found.culprit.tensor) == ("overflow", "normed")
    assert found.keep_fp32 is not None
    assert set(found.keep_fp32) == {"conv1", "norm", "down"}
    assert bench.error(subject, found.keep_fp32) <= 0.01


def test_what_is_kept_already_is_part_of_the_advice(bench: Bench) -> None:
    proto = conv_chain(4, extra={**overflowing_block(1)})
    subject = bench.failed(proto, "fp16", [image()], keep_fp32=("conv0",))
    found = blamed(bench, subject)
    assert found.keep_fp32 is not None
    assert set(found.keep_fp32) == {"conv0", "scale_up", "scale_down"}


def test_a_16_bit_model_is_traced_and_told_to_be_exported_anew(bench: Bench) -> None:
    half = TensorProto.FLOAT16
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["m"], "first"),
        helper.make_node("Mul", ["m", "w"], ["n"], "second"),
        helper.make_node("Div", ["n", "w"], ["y"], "third"),
    ]
    proto = onnx_models.model(nodes, {"x": (half, [3])}, {"y": (half, [3])}, {"w": np.full(3, 300, np.float16)})
    subject = bench.failed(proto, "fp16", [{"x": np.array([1, 2, -3], np.float16)}])
    found = blamed(bench, subject)
    assert found.culprit is not None
    assert (found.culprit.kind, found.culprit.tensor) == ("overflow", "n")
    assert found.keep_fp32 is None
    assert any("keep_fp32 has no effect" in note for note in found.notes)
    assert any("'second', 'third'" in note for note in found.notes)


def test_magika(bench: Bench) -> None:
    """By hand: the second LayerNorm sums 512 squares, up to 126,000 for this input; FP16 ends at 65,504."""
    case = {"bytes": np.random.default_rng(0).integers(0, 257, (1, 2048)).astype(np.int32)}
    subject = bench.failed(onnx_models.magika(), "fp16", [case])
    tensors = all_tensors(subject.model.path, case)
    beyond = [name for name, array in tensors.items() if np.abs(array).max() > 65504]
    squares = next(name for name in tensors if name.endswith("LayerNorm_1/Square:0"))
    assert beyond == [squares.replace("Square", "Sum_1")]
    assert float(tensors[squares].sum()) == pytest.approx(float(tensors[beyond[0]].max()), rel=1e-5)
    found = blamed(bench, subject)
    assert found.culprit is not None
    assert (found.culprit.kind, found.culprit.tensor) == ("overflow", beyond[0])
    assert_advice_holds(bench, subject, found, most=2)


# --- quantization ----------------------------------------------------------------------------------------------------


def with_qdq(proto: onnx.ModelProto, ranges: dict[str, float], per_tensor: Sequence[str]) -> onnx.ModelProto:
    """Q/DQ in front of every Conv, as exporters write them; the weights named in `per_tensor` get a single scale."""
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, np.ndarray[Any, Any]] = {"zero": np.zeros((), np.int8)}
    for node in proto.graph.node:
        if node.op_type == "Conv":
            values = weight(proto, node.input[1])
            for index, name in enumerate(node.input):
                by_channel = index == 1 and name not in per_tensor
                amax = np.abs(values).max(axis=(1, 2, 3)) if by_channel else np.abs(values).max()
                scale = (amax if index else np.float32(ranges[name])) / np.float32(127)
                constants[f"{name}_s"] = np.asarray(scale, np.float32)
                constants[f"{name}_z"] = np.zeros(constants[f"{name}_s"].shape, np.int8)
                operands = [f"{name}_s", f"{name}_z"]
                axis: dict[str, Any] = {"axis": 0} if by_channel else {}
                nodes.append(helper.make_node("QuantizeLinear", [name, *operands], [f"{name}_q"], f"q_{name}", **axis))
                nodes.append(
                    helper.make_node("DequantizeLinear", [f"{name}_q", *operands], [f"{name}_d"], f"d_{name}", **axis)
                )
                node.input[index] = f"{name}_d"
        nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    onnx.checker.check_model(proto)
    return proto


def unbalanced_chain() -> onnx.ModelProto:
    """conv2's first output channel has weights 500 times as large as the others', and is divided by 500 again."""
    balance = np.ones((1, 8, 1, 1), np.float32)
    balance[0, 0] = 1 / 500
    extra = {2: [helper.make_node("Mul", ["r2", "balance"], ["x3"], "balance")]}
    proto = conv_chain(5, extra=extra, more_weights={"balance": balance})
    values = weight(proto, "w2").copy()
    values[0] *= 500
    set_weight(proto, "w2", values)
    return proto


def ranges_of(bench: Bench, proto: onnx.ModelProto, case: Case) -> dict[str, float]:
    tensors = all_tensors(onnx_models.save(proto, bench.folder / "float.onnx"), case) | case
    return {name: float(np.abs(array).max()) for name, array in tensors.items()}


def test_one_weight_quantized_per_tensor_that_needs_per_channel(bench: Bench) -> None:
    proto = unbalanced_chain()
    ranges = ranges_of(bench, proto, image())
    sound = bench.failed(with_qdq(unbalanced_chain(), ranges, []), "int8", [image()])
    assert bench.error(sound) < 0.05
    subject = bench.failed(with_qdq(proto, ranges, ["w2"]), "int8", [image()])
    assert bench.error(subject) > 0.05
    found = blamed(bench, subject)
    assert found.step == "precision"
    assert found.culprit is not None
    assert (found.culprit.kind, found.culprit.node, found.culprit.tensor) == ("weights", "conv2", "w2")
    assert "in one scale for the whole tensor" in found.culprit.detail
    assert any("'conv2'" in note and "would pass" in note for note in found.notes)


def test_all_weights_per_tensor_blame_the_one_that_cannot(bench: Bench) -> None:
    proto = unbalanced_chain()
    ranges = ranges_of(bench, proto, image())
    subject = bench.failed(with_qdq(proto, ranges, [f"w{index}" for index in range(5)]), "int8", [image()])
    found = blamed(bench, subject)
    assert found.culprit is not None
    assert (found.culprit.kind, found.culprit.tensor) == ("weights", "w2")


@pytest.mark.parametrize(
    ("factor", "kind", "words"),
    [(0.02, "saturation", "lie outside its range"), (300.0, "range", "times as wide as needed")],
)
def test_a_wrong_calibration_range_on_one_tensor(bench: Bench, factor: float, kind: str, words: str) -> None:
    sound = bench.failed(conv_chain(6), "int8", [image()], calibration=[image()])
    assert bench.error(sound) < 0.05
    subject = bench.requantized(sound, "x3", factor)
    found = blamed(bench, subject)
    assert found.step == "precision"
    assert found.culprit is not None
    assert (found.culprit.kind, found.culprit.tensor, found.culprit.node) == (kind, "x3", "conv3")
    assert words in found.culprit.detail
    assert found.keep_fp32 == ("conv3",)
    assert found.confirmed
    assert found.calibration is not None
    outside = {each["tensor"]: each["share"] for each in found.calibration["outside"]}
    values = all_tensors(subject.model.path, subject.case)["x3"]
    range_ = subject.ranges().tensors["x3"].amax
    share = np.count_nonzero(np.abs(values) > range_ * (1 + 0.5 / 127)) / values.size
    assert outside.get("x3", 0.0) == pytest.approx(share, abs=1e-6)
    assert (share > 0.01) == (kind == "saturation")


def test_another_calibration_method_that_passes_is_named(bench: Bench) -> None:
    """A single outlier in the calibration data ruins minmax, and no other method."""
    spoiled = image(1)
    spoiled["image"][0, 0, 0, 0] = 300.0
    data = [*(image(seed) for seed in range(2, 10)), spoiled]
    calibration = Calibration(data, method="minmax")
    subject = bench.failed(conv_chain(3), "int8", [image()], calibration=calibration)
    assert bench.error(subject) > 0.05
    found = blamed(bench, subject)
    assert found.calibration is not None
    methods = {each["method"]: each for each in found.calibration["methods"]}
    assert set(methods) == {"percentile", "entropy", "mse"}
    better = bench.failed(conv_chain(3), "int8", [image()], calibration=Calibration(data, method="percentile"))
    assert methods["percentile"]["value"] == pytest.approx(bench.error(better), rel=1e-3)
    assert methods["percentile"]["passes"] == (bench.error(better) <= 0.05)
    assert any(each["passes"] for each in methods.values())
    assert "passes" in explain(found.to_dict())
    assert found.culprit is not None
    assert found.culprit.kind == "range"


@pytest.mark.parametrize(("scale", "how"), [(0.01, "too small"), (0.0, "too wide")])
def test_calibration_data_of_another_scale_is_blamed_and_not_the_model(bench: Bench, scale: float, how: str) -> None:
    """Calibrated with data like the input, the same model passes."""
    width, steps = 32, range(6)
    nodes = [
        node
        for i in steps
        for node in (
            helper.make_node("MatMul", [f"x{i}" if i else "x", f"w{i}"], [f"m{i}"], f"matmul{i}"),
            helper.make_node("Relu", [f"m{i}"], [f"x{i + 1}"], f"relu{i}"),
        )
    ]
    nodes.append(helper.make_node("MatMul", [f"x{len(steps)}", "head"], ["y"], "last"))
    weights = {f"w{i}": onnx_models.weights((width, width), i) for i in steps}
    proto = onnx_models.model(
        nodes,
        {"x": (TensorProto.FLOAT, ["batch", width])},
        {"y": (TensorProto.FLOAT, ["batch", 8])},
        {**weights, "head": onnx_models.weights((width, 8), 77)},
    )
    case = {"x": np.random.default_rng(0).standard_normal((4, width)).astype(np.float32)}
    sound = bench.failed(proto, "int8", [case], calibration=[case])
    assert bench.error(sound) <= 0.05
    subject = bench.failed(proto, "int8", [case], calibration=[{"x": np.float32(scale) * case["x"]}])
    found = blamed(bench, subject)
    assert found.headline == f"calibrated ranges are {how} in much of the graph, no single layer is to blame"
    assert "every node would have to stay in FP32 with these calibrated ranges" in found.notes


def test_an_overflow_is_blamed_beside_an_input_that_was_not_calibrated_for(bench: Bench) -> None:
    """All of INT8 would have to go for that input; what overflows in FP16 is a fault of its own all the same."""
    proto = conv_chain(4, extra=overflowing_block(2))
    data = [image(seed) for seed in range(8)]
    subject = bench.failed(proto, "int8+fp16", [image(9), image(10, -8, 8)], calibration=data)
    found = blamed(bench, subject)
    assert found.culprit is not None
    assert (found.culprit.kind, found.culprit.node) == ("overflow", "scale_up")
    assert not any("does not suit" in note for note in found.notes)


# --- spread ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "share"), [("fp16", 0.4), ("bf16", 0.4), ("int8", 0.4)])
def test_an_error_that_is_spread_evenly(bench: Bench, precision: Any, share: float) -> None:
    proto, calibration = conv_chain(14), [image()] if precision == "int8" else None
    total = bench.error(bench.failed(proto, precision, [image()], calibration=calibration))
    subject = bench.failed(proto, precision, [image()], tol=share * total, calibration=calibration)
    found = blamed(bench, subject)
    assert found.step == "spread"
    assert found.culprit is None
    assert "no single layer is to blame" in explain(found.to_dict())
    if found.keep_fp32:
        assert bench.error(subject, found.keep_fp32) <= share * total


def test_nothing_is_tried_beyond_the_budget(bench: Bench) -> None:
    subject = bench.failed(conv_chain(4, extra=overflowing_block(2)), "fp16", [image()])
    found = blamed(bench, subject, trials=0)
    assert found.trials == 0
    assert found.keep_fp32 is None
    assert any("budget is spent" in note for note in found.notes)
    # What the trace alone says is still said.
    assert found.culprit is not None
    assert found.culprit.tensor == "scaled_up"


def test_another_number_of_rows_fails_and_is_no_error(suite: Suite) -> None:
    """Where the size of an output depends on the data, FP16 gives it another shape: there is nothing to hold apart."""
    floats = {name: (onnx_models.FLOAT, [4]) for name in ("x", "y")}
    sized_by_data = onnx_models.model(
        [helper.make_node("Mul", ["x", "small"], ["y"], "scale"), helper.make_node("NonZero", ["y"], ["rows"], "rows")],
        {"x": floats["x"]},
        {"y": floats["y"], "rows": (TensorProto.INT64, [1, "n"])},
        {"small": np.array(1e-6, np.float32)},
    )
    onnx_models.save(sized_by_data, suite.path / "rows.onnx")
    suite.write(test_it='@trt_parity("rows.onnx")\ndef test_it():\n    return np.float32([1, 2, 3, 1e-3])\n')
    for _ in range(2):  # made, and from the cache
        run = suite.run("--trt-backend=onnxruntime")
        run.result.assert_outcomes(failed=1)
        (record,) = run.checks
        assert record["verdict"] == "fail"
        assert "shape" in record["message"]
